"""From statistics to packed values: every step on the device gives what it gives on the CPU."""

from __future__ import annotations

from dataclasses import asdict

import pytest
import torch
from oracles import gaussian, is_legal, loop_floor, random_mask, same_bits, total
from problems import layer

from optimum_eggs.calibration import GramAccumulator
from optimum_eggs.importance import importance_score
from optimum_eggs.masks import channel_order, diagonal_mask, expander_mask, shortfall, swap_mask, topn_mask
from optimum_eggs.masks.certificate import certify
from optimum_eggs.masks.permutation import kept_score
from optimum_eggs.ops import gather, spread
from optimum_eggs.packing import pack, unpack, unpack_mask
from optimum_eggs.packing.pack import kept_positions
from optimum_eggs.pattern import NMPattern
from optimum_eggs.update import Problem, admm, masked_refit, relative_error, sparsegpt

PATTERNS = [NMPattern(2, 4), NMPattern(4, 8), NMPattern(1, 4), NMPattern(5, 16), NMPattern(17, 32)]
TWO_OF_FOUR = NMPattern(2, 4)
HARD = ["random", "correlated", "dead inputs", "few tokens", "one large input"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_statistics(dtype, device):
    batches = [gaussian(2, 40, 64, seed=seed, dtype=dtype) for seed in range(3)]
    found = []
    for place in (torch.device("cpu"), device):
        statistics = GramAccumulator(64, place)
        for batch in batches:
            statistics.add(batch.to(place))
        assert statistics.gram.device == place
        assert statistics.is_finite()
        found.append(statistics)
    own, other = found
    assert own.tokens == other.tokens == 240
    torch.testing.assert_close(other.gram.cpu(), own.gram, rtol=1e-5, atol=1e-3)
    torch.testing.assert_close(other.input_norm.cpu(), own.input_norm)
    other.add(torch.full((1, 64), torch.nan, device=device))
    assert not other.is_finite()
    other.forget_inputs()
    assert torch.equal(other.gram, torch.eye(64, device=device))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_statistics_are_summed_in_float32(dtype, device):
    one = gaussian(1, 64, dtype=dtype)
    statistics = GramAccumulator(64, device)
    statistics.add(one.to(device))
    assert torch.equal(statistics.gram.cpu(), (one.double().T @ one.double()).float())  # every product is exact
    many = gaussian(4096, 64, seed=1, dtype=dtype).abs()  # all of one sign: what is lost on the way adds up
    statistics.add(many.to(device))
    both = torch.cat([one, many]).double()
    # A rounding for each token, of the last bit of the sum, whichever way the device rounds; bfloat16 has but 8 bits.
    bound = len(both) * 2**-23 * (both.abs().T @ both.abs())
    assert bool(((statistics.gram.cpu() - both.T @ both).abs() <= bound).all())


@pytest.mark.parametrize("name", ["ria", "wanda", "magnitude"])
def test_scores(name, device):
    weight, norm = gaussian(32, 64), gaussian(64, seed=1).abs()
    weight[3], weight[:, 5] = 0, 0
    found = importance_score(name, weight.to(device), norm.to(device))
    torch.testing.assert_close(found.cpu(), importance_score(name, weight, norm))


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_masks_by_score_alone(pattern, device):
    score = gaussian(40, 64).abs()
    assert torch.equal(topn_mask(score.to(device), pattern).cpu(), topn_mask(score, pattern))
    assert torch.equal(diagonal_mask(score.to(device), pattern).cpu(), diagonal_mask(score, pattern))


@pytest.mark.parametrize(("n", "m", "min_degree", "band"), [(2, 4, 1, 4), (2, 4, 3, 8), (4, 8, 2, 16), (1, 8, 1, 16)])
def test_the_mask_under_a_floor(n, m, min_degree, band, device):
    pattern, score = NMPattern(n, m), gaussian(40, 64, dtype=torch.float64).abs()
    found = expander_mask(score.to(device), pattern, min_degree, band).cpu()
    assert is_legal(found, n, m)
    assert loop_floor(found, band) >= min_degree
    best = expander_mask(score, pattern, min_degree, band)
    assert total(score, found) == pytest.approx(total(score, best), rel=1e-9)  # equally good masks would do
    own, other = (
        shortfall(topn_mask(score, pattern), pattern, min_degree, band),
        shortfall(topn_mask(score, pattern).to(device), pattern, min_degree, band),
    )
    for key in ("input_degree_min", "starved_inputs", "short", "pairs"):
        assert getattr(own, key) == getattr(other, key)


@pytest.mark.parametrize("min_degree", [0, 1])
def test_swaps(min_degree, device):
    weight, gram = layer("correlated")
    score = importance_score("ria", weight, gram.diagonal().sqrt())
    start = expander_mask(score, TWO_OF_FOUR, min_degree, 8)
    found = swap_mask(weight.to(device), start.to(device), gram.to(device), TWO_OF_FOUR, min_degree, 8).cpu()
    expected = swap_mask(weight, start, gram, TWO_OF_FOUR, min_degree, 8)
    assert is_legal(found, 2, 4)
    assert loop_floor(found, 8) >= min_degree
    error = relative_error(weight, weight * found, gram)
    assert error == pytest.approx(relative_error(weight, weight * expected, gram), rel=1e-3)
    assert error < relative_error(weight, weight * start, gram)


def test_the_order_of_channels(device):
    score = gaussian(32, 64, dtype=torch.float64).abs() * gaussian(64, seed=1, dtype=torch.float64).abs()
    found = channel_order(score.to(device), TWO_OF_FOUR).cpu()
    assert torch.equal(found.sort().values, torch.arange(64))
    expected = kept_score(score[:, channel_order(score, TWO_OF_FOUR)], TWO_OF_FOUR)
    assert kept_score(score[:, found], TWO_OF_FOUR) == pytest.approx(expected, rel=1e-3)
    assert kept_score(score[:, found].to(device), TWO_OF_FOUR) > kept_score(score, TWO_OF_FOUR)


@pytest.mark.parametrize("kind", HARD)
@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float64, 1e-6), (torch.float32, 1e-3)])
def test_the_refit(kind, dtype, rtol, device):
    weight, gram = layer(kind, dtype=dtype)
    mask = random_mask(32, 32, 2, 4)
    found = masked_refit(weight.to(device), mask.to(device), Problem(gram.to(device))).cpu()
    assert not found[~mask].any()
    expected = relative_error(weight, masked_refit(weight, mask, Problem(gram)), gram)
    assert relative_error(weight, found, gram) == pytest.approx(expected, rel=rtol, abs=1e-5)
    on_device = relative_error(weight.to(device), found.to(device), gram.to(device))
    assert on_device == pytest.approx(relative_error(weight, found, gram), rel=rtol, abs=1e-5)


@pytest.mark.parametrize("kind", HARD)
@pytest.mark.parametrize("min_degree", [0, 1])
def test_admm(kind, min_degree, device):
    weight, gram = layer(kind)

    def project(score):
        return expander_mask(score, TWO_OF_FOUR, min_degree, 8)

    mask, values = (each.cpu() for each in admm(weight.to(device), Problem(gram.to(device)), project))
    assert is_legal(mask, 2, 4)
    assert loop_floor(mask, 8) >= min_degree
    assert not values[~mask].any()
    error = relative_error(weight, masked_refit(weight, mask, Problem(gram)), gram)
    expected, _ = admm(weight, Problem(gram), project)
    # A rounding may decide between masks that are nearly as good.
    assert error == pytest.approx(
        relative_error(weight, masked_refit(weight, expected, Problem(gram)), gram), rel=0.05, abs=1e-6
    )


@pytest.mark.parametrize("kind", HARD)
def test_sparsegpt(kind, device):
    weight, gram = layer(kind)
    mask, values = (each.cpu() for each in sparsegpt(weight.to(device), Problem(gram.to(device)), TWO_OF_FOUR))
    assert is_legal(mask, 2, 4)
    assert not values[~mask].any()
    _, expected = sparsegpt(weight, Problem(gram), TWO_OF_FOUR)
    error = relative_error(weight, values, gram)
    assert error == pytest.approx(relative_error(weight, expected, gram), rel=0.05, abs=1e-6)


@pytest.mark.parametrize("rows", [24, 64])  # with and without Lanczos
def test_the_certificate(rows, device):
    mask = random_mask(rows, 64, 2, 4)
    weight = gaussian(rows, 64) * mask
    own = asdict(certify(mask, weight, TWO_OF_FOUR, extra_bands=(8,)))
    other = asdict(certify(mask.to(device), weight.to(device), TWO_OF_FOUR, extra_bands=(8,)))
    for key in ("sigma2", "sigma2_weighted", "input_degree_mean", "input_degree_cv", "ramanujan"):
        assert other.pop(key) == pytest.approx(own.pop(key), rel=1e-3)
    assert other == own


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_packing_and_back(pattern, dtype, device):
    mask = random_mask(12, 96, pattern.n, pattern.m)
    weight = gaussian(12, 96, dtype=dtype)
    values, meta = pack(weight.to(device), mask.to(device), pattern)
    own_values, own_meta = pack(weight, mask, pattern)
    assert same_bits(values.cpu(), own_values)
    assert torch.equal(meta.cpu(), own_meta)
    assert torch.equal(unpack_mask(meta, 96).cpu(), mask)
    assert torch.equal(kept_positions(meta, 96, pattern).cpu(), kept_positions(own_meta, 96, pattern))
    dense = unpack(values, meta, pattern)
    assert dense.device == values.device == meta.device == device
    assert torch.equal(dense.cpu(), weight * mask)
    assert torch.equal(spread(values, meta, pattern), dense)
    assert torch.equal(gather(weight.to(device), meta, pattern), values)
