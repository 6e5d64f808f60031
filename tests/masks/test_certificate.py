import json
import math

import pytest
import torch
from oracles import gaussian, loop_floor, random_mask

from optimum_eggs.errors import ShapeError
from optimum_eggs.masks import expander_mask
from optimum_eggs.masks.certificate import certify, floor
from optimum_eggs.pattern import NMPattern

TWO_OF_FOUR = NMPattern(2, 4)


@pytest.mark.parametrize("rows", [8, 16, 21, 40, 300])
@pytest.mark.parametrize("band", [1, 4, 7, 16, 64, 512])
def test_a_floor_is_what_a_loop_finds(rows, band):
    mask = random_mask(rows, 16, 6, 8)
    assert floor(mask, band) == loop_floor(mask, band)


def test_floors_are_reported_for_the_usual_bands_and_the_extra_ones():
    mask = random_mask(300, 8, 2, 4)
    certificate = certify(mask, TWO_OF_FOUR, extra_bands=(10, 999))
    assert certificate.floors == {band: loop_floor(mask, band) for band in (4, 10, 16, 64, 256, 300)}
    assert certificate.floors[300] > 100


def test_the_floor_asked_of_the_optimal_mask_is_certified():
    score = gaussian(48, 32).abs() * torch.logspace(0, 3, 32)  # inputs of very different size
    mask = expander_mask(score, NMPattern(2, 8), 3, band=16)
    assert certify(mask, NMPattern(2, 8)).floors[16] == 3


def test_degrees_are_counted():
    mask = torch.tensor([[1, 1, 0, 0], [1, 0, 1, 0], [1, 1, 0, 0]], dtype=torch.bool)
    certificate = certify(mask, TWO_OF_FOUR)
    assert (certificate.input_degree_min, certificate.input_degree_mean, certificate.input_degree_max) == (0, 1.5, 3)
    deviation = math.sqrt(((3 - 1.5) ** 2 + (2 - 1.5) ** 2 + (1 - 1.5) ** 2 + (0 - 1.5) ** 2) / 4)
    assert certificate.input_degree_cv == pytest.approx(deviation / 1.5, rel=1e-15)


def test_starved_inputs_are_counted():
    mask = torch.tensor([[1, 1, 0, 0, 1, 0, 0, 1]] * 5 + [[1, 0, 1, 0, 1, 0, 0, 1]], dtype=torch.bool)
    assert certify(mask, TWO_OF_FOUR).starved_inputs == 3


@pytest.mark.parametrize("kept", [1, 3])
def test_a_single_group_that_keeps_another_number_is_not_legal(kept):
    mask = random_mask(8, 16, 2, 4)
    assert certify(mask, TWO_OF_FOUR).legal
    mask[5, 8:12] = torch.arange(4) < kept
    assert not certify(mask, TWO_OF_FOUR).legal


def test_rows_that_all_keep_the_same_inputs_are_certified():
    mask = torch.tensor([1, 1, 0, 0], dtype=torch.bool).repeat(64, 32)
    certificate = certify(mask, TWO_OF_FOUR)
    assert certificate.starved_inputs == 64


def test_it_survives_json():
    mask = random_mask(20, 16, 2, 4)
    certificate = certify(mask, TWO_OF_FOUR)
    stored = json.loads(json.dumps(certificate.to_dict()))
    assert stored["floors"] == {str(band): degree for band, degree in certificate.floors.items()}
    assert stored["input_degree_cv"] == certificate.input_degree_cv
    assert not {"sigma2", "sigma2_weighted", "ramanujan"} & stored.keys()  # on request only


@pytest.mark.parametrize("shape", [(4, 6), (8,)])
def test_shapes_that_do_not_fit_are_refused(shape):
    with pytest.raises(ShapeError, match=r"must be \(out, in\) with in a multiple of m=4"):
        certify(torch.ones(shape, dtype=torch.bool), TWO_OF_FOUR)
