import json
import math

import pytest
import torch
from oracles import dense_sigma2, gaussian, loop_floor, random_mask

from optimum_eggs.errors import ShapeError
from optimum_eggs.masks import expander_mask
from optimum_eggs.masks.certificate import certify, floor, second_singular_value
from optimum_eggs.pattern import NMPattern

TWO_OF_FOUR = NMPattern(2, 4)


def assert_sigma2(found, adjacency):
    # Both stand for eigenvalues of SSᵀ, of norm 1. Lanczos stops at a residual, hence an error, of 2e-4 of the value;
    # sums of k float32 products are off by k rounding errors at most, and so is each of the two factors' rounding.
    exact = dense_sigma2(adjacency)
    rounding = (sum(adjacency.shape) + 8) * torch.finfo(torch.float32).eps
    assert abs(found**2 - exact**2) <= 2e-4 * exact**2 + rounding


@pytest.mark.parametrize("rows", [8, 16, 21, 40, 300])
@pytest.mark.parametrize("band", [1, 4, 7, 16, 64, 512])
def test_a_floor_is_what_a_loop_finds(rows, band):
    mask = random_mask(rows, 16, 6, 8)
    assert floor(mask, band) == loop_floor(mask, band)


def test_floors_are_reported_for_the_usual_bands_and_the_extra_ones():
    mask = random_mask(300, 8, 2, 4)
    certificate = certify(mask, mask.float(), TWO_OF_FOUR, extra_bands=(10, 999))
    assert certificate.floors == {band: loop_floor(mask, band) for band in (4, 10, 16, 64, 256, 300)}
    assert certificate.floors[300] > 100


def test_the_floor_asked_of_the_optimal_mask_is_certified():
    score = gaussian(48, 32).abs() * torch.logspace(0, 3, 32)  # inputs of very different size
    mask = expander_mask(score, NMPattern(2, 8), 3, band=16)
    assert certify(mask, mask * score, NMPattern(2, 8)).floors[16] == 3


def test_degrees_are_counted():
    mask = torch.tensor([[1, 1, 0, 0], [1, 0, 1, 0], [1, 1, 0, 0]], dtype=torch.bool)
    certificate = certify(mask, mask.float(), TWO_OF_FOUR)
    assert (certificate.input_degree_min, certificate.input_degree_mean, certificate.input_degree_max) == (0, 1.5, 3)
    deviation = math.sqrt(((3 - 1.5) ** 2 + (2 - 1.5) ** 2 + (1 - 1.5) ** 2 + (0 - 1.5) ** 2) / 4)
    assert certificate.input_degree_cv == pytest.approx(deviation / 1.5, rel=1e-15)


def test_starved_inputs_are_counted():
    mask = torch.tensor([[1, 1, 0, 0, 1, 0, 0, 1]] * 5 + [[1, 0, 1, 0, 1, 0, 0, 1]], dtype=torch.bool)
    assert certify(mask, mask.float(), TWO_OF_FOUR).starved_inputs == 3


@pytest.mark.parametrize("kept", [1, 3])
def test_a_single_group_that_keeps_another_number_is_not_legal(kept):
    mask = random_mask(8, 16, 2, 4)
    assert certify(mask, mask.float(), TWO_OF_FOUR).legal
    mask[5, 8:12] = torch.arange(4) < kept
    assert not certify(mask, mask.float(), TWO_OF_FOUR).legal


@pytest.mark.parametrize("shape", [(2, 4), (8, 16), (31, 64), (64, 31), (32, 32), (80, 64), (64, 200)])
def test_sigma2_is_that_of_a_dense_svd(shape):
    adjacency = (torch.rand(shape, generator=torch.Generator().manual_seed(0)) < 0.5).float()
    assert_sigma2(second_singular_value(adjacency), adjacency)


@pytest.mark.parametrize("rows", [16, 96])
def test_the_weighted_gap_is_of_the_weights(rows):
    mask = random_mask(rows, 64, 2, 4)
    weight = gaussian(rows, 64) * mask
    certificate = certify(mask, weight, TWO_OF_FOUR)
    assert_sigma2(certificate.sigma2, mask.float())
    assert_sigma2(certificate.sigma2_weighted, weight.abs())
    assert certificate.sigma2 < certificate.sigma2_weighted


@pytest.mark.parametrize("rows", [8, 64])
def test_sigma2_leaves_nodes_without_edges_out(rows):
    adjacency = gaussian(rows, 80).abs()
    adjacency[3] = 0
    adjacency[:, 5:50] = 0
    assert_sigma2(second_singular_value(adjacency), adjacency)


@pytest.mark.parametrize("half", [8, 32])
def test_a_graph_in_two_parts_has_no_gap(half):
    adjacency = torch.block_diag(torch.ones(half, half), torch.ones(half, half))
    rounding = (4 * half + 8) * torch.finfo(torch.float32).eps
    assert second_singular_value(adjacency) == pytest.approx(1.0, abs=1e-4 + rounding)


@pytest.mark.parametrize("size", [8, 64])
def test_a_complete_graph_has_the_whole_gap(size):
    # Σ of a matrix of rank one: what is left of its square after the first pair is rounding.
    assert second_singular_value(torch.ones(size, size)) ** 2 <= 2 * size * torch.finfo(torch.float32).eps


def test_rows_that_all_keep_the_same_inputs_are_certified():
    mask = torch.tensor([1, 1, 0, 0], dtype=torch.bool).repeat(64, 32)
    certificate = certify(mask, mask.float(), TWO_OF_FOUR)
    assert certificate.starved_inputs == 64
    assert certificate.sigma2**2 <= 128 * torch.finfo(torch.float32).eps


def test_one_output_has_no_second_singular_value():
    mask = torch.tensor([[1, 1, 0, 0]], dtype=torch.bool)
    assert certify(mask, mask.float(), TWO_OF_FOUR).sigma2 == 0


def test_the_ramanujan_bound_is_of_the_mean_degrees():
    mask = random_mask(12, 16, 2, 4)  # inputs keep 6 on average, outputs 8
    bound = (math.sqrt(5) + math.sqrt(7)) / math.sqrt(48)
    assert certify(mask, mask.float(), TWO_OF_FOUR).ramanujan == pytest.approx(bound, rel=1e-15)


def test_it_survives_json():
    mask = random_mask(20, 16, 2, 4)
    certificate = certify(mask, mask.float(), TWO_OF_FOUR)
    stored = json.loads(json.dumps(certificate.to_dict()))
    assert stored["floors"] == {str(band): degree for band, degree in certificate.floors.items()}
    assert stored["sigma2"] == certificate.sigma2


@pytest.mark.parametrize(("mask", "weight"), [((4, 8), (4, 4)), ((4, 6), (4, 6)), ((8,), (8,))])
def test_shapes_that_do_not_fit_are_refused(mask, weight):
    with pytest.raises(ShapeError, match=r"must be \(out, in\) with in a multiple of m=4"):
        certify(torch.ones(mask, dtype=torch.bool), torch.ones(weight), TWO_OF_FOUR)
