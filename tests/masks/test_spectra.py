from __future__ import annotations

import math

import pytest
import torch
from oracles import dense_sigma2, gaussian, random_mask

from optimum_eggs.errors import ShapeError
from optimum_eggs.masks.spectra import second_singular_value, spectra


def assert_sigma2(found, adjacency):
    # Both stand for eigenvalues of SSᵀ, of norm 1. Lanczos stops at a residual, hence an error, of 2e-4 of the value;
    # sums of k float32 products are off by k rounding errors at most, and so is each of the two factors' rounding.
    exact = dense_sigma2(adjacency)
    rounding = (sum(adjacency.shape) + 8) * torch.finfo(torch.float32).eps
    assert abs(found**2 - exact**2) <= 2e-4 * exact**2 + rounding


@pytest.mark.parametrize("shape", [(2, 4), (8, 16), (31, 64), (64, 31), (32, 32), (80, 64), (64, 200)])
def test_sigma2_is_that_of_a_dense_svd(shape):
    adjacency = (torch.rand(shape, generator=torch.Generator().manual_seed(0)) < 0.5).float()
    assert_sigma2(second_singular_value(adjacency), adjacency)


@pytest.mark.parametrize("rows", [16, 96])
def test_the_weighted_gap_is_of_the_weights(rows):
    mask = random_mask(rows, 64, 2, 4)
    weight = gaussian(rows, 64) * mask
    found = spectra(mask, weight)
    assert_sigma2(found.sigma2, mask.float())
    assert_sigma2(found.sigma2_weighted, weight.abs())
    assert found.sigma2 < found.sigma2_weighted


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


def test_rows_that_all_keep_the_same_inputs_have_the_whole_gap():
    mask = torch.tensor([1, 1, 0, 0], dtype=torch.bool).repeat(64, 32)
    assert spectra(mask, mask.float()).sigma2 ** 2 <= 128 * torch.finfo(torch.float32).eps


def test_one_output_has_no_second_singular_value():
    mask = torch.tensor([[1, 1, 0, 0]], dtype=torch.bool)
    assert spectra(mask, mask.float()).sigma2 == 0


def test_the_ramanujan_bound_is_of_the_mean_degrees():
    mask = random_mask(12, 16, 2, 4)  # inputs keep 6 on average, outputs 8
    bound = (math.sqrt(5) + math.sqrt(7)) / math.sqrt(48)
    assert spectra(mask, mask.float()).ramanujan == pytest.approx(bound, rel=1e-15)


@pytest.mark.parametrize(("mask", "weight"), [((4, 8), (4, 4)), ((8,), (8,))])
def test_shapes_that_do_not_fit_are_refused(mask, weight):
    with pytest.raises(ShapeError, match=r"must both be \(out, in\)"):
        spectra(torch.ones(mask, dtype=torch.bool), torch.ones(weight))
