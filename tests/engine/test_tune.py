from __future__ import annotations

import pytest
import tiny
import torch

from optimum_eggs import EGGSConfig, NMLinear
from optimum_eggs.calibration import InMemoryBlocks, Walk, find_block_list
from optimum_eggs.engine import precision, prune_model
from optimum_eggs.engine.block import DenseStream
from optimum_eggs.engine.prune import check_run
from optimum_eggs.engine.tune import token_error, tune_block
from optimum_eggs.errors import ModelError
from optimum_eggs.masks import topn_mask
from optimum_eggs.measure import Meter
from optimum_eggs.nn import dense_weight, is_dense_linear
from optimum_eggs.pattern import NMPattern

WINDOWS = tiny.make_windows(16, 16)
STEPS = 28


@pytest.fixture
def meter():
    with Meter() as meter:
        yield meter


def outputs(walk, block):
    """What block 0 gives for all batches."""
    stream = DenseStream(walk)
    stream.advance(block, 0)
    return stream.hidden


def prepared(meter, name="llama", dtype=torch.float32):
    """A walk before block 0, that block with magnitude masks applied, the masks, and what it gave when dense."""
    model = tiny.make_model(name, dtype=dtype)
    model.config.use_cache = False  # or every run of a block would add to one cache
    walk = Walk(InMemoryBlocks(model, find_block_list(model)), WINDOWS.split(2), meter)
    block = walk.provider.skeleton(0)
    targets = outputs(walk, block)
    masks = {}
    with torch.no_grad():
        for module in block.modules():
            if is_dense_linear(module):
                weight = dense_weight(module)
                masks[module] = topn_mask(weight.float().abs(), NMPattern(2, 4))
                weight.mul_(masks[module])
    return model, walk, block, masks, targets


def judged(walk, block, targets):
    """The mean error over all batches."""
    pairs = list(zip(outputs(walk, block), targets, strict=True))
    return sum(float(token_error(output.float(), target.float())) for output, target in pairs) / len(pairs)


@pytest.mark.parametrize("name", tiny.CONFIGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tuning_lowers_the_error_and_keeps_every_zero(name, dtype, meter):
    _, walk, block, masks, targets = prepared(meter, name, dtype)
    dtypes = {key: (value.dtype, value.requires_grad) for key, value in block.named_parameters()}
    matrices = {key: value.clone() for key, value in block.named_parameters() if value.dim() > 1}
    found = tune_block(walk, block, 0, masks, targets, STEPS, 0.01, seed=0)
    assert found.error_after < found.error_before
    assert (found.kept, found.steps) == (True, STEPS)
    for module, mask in masks.items():
        assert not dense_weight(module)[~mask].any()
    assert {key: (value.dtype, value.requires_grad) for key, value in block.named_parameters()} == dtypes
    assert all(value.grad is None for value in block.parameters())
    # Of the matrices, only those that were pruned move.
    pruned = {id(module.weight) for module in masks}
    for key, value in block.named_parameters():
        if value.dim() > 1:
            assert torch.equal(value, matrices[key]) == (id(value) not in pruned)
    if dtype == torch.float32:
        assert judged(walk, block, targets) == pytest.approx(found.error_after, rel=1e-4)


def test_the_error_is_relative_for_each_token():
    target = torch.tensor([[3.0, 4.0], [3000.0, 4000.0]])
    output = torch.tensor([[3.0, 3.0], [3000.0, 4000.0]])
    assert float(token_error(output, target)) == pytest.approx((1 / 25 + 0) / 2)
    assert float(token_error(torch.zeros(1, 2), torch.zeros(1, 2))) == 0


def test_steps_that_do_harm_are_not_kept(meter):
    _, walk, block, masks, targets = prepared(meter)
    before = {key: value.clone() for key, value in block.state_dict().items()}
    found = tune_block(walk, block, 0, masks, targets, STEPS, 100.0, seed=0)
    assert (found.kept, found.error_after) == (False, found.error_before)
    assert all(torch.equal(before[key], value) for key, value in block.state_dict().items())


@pytest.mark.parametrize("batch", range(8))
def test_every_batch_is_tuned_on(batch, meter):
    results = []
    for scale in (1.0, 2.0):
        _, walk, block, masks, targets = prepared(meter)
        targets[batch] = targets[batch] * scale
        found = tune_block(walk, block, 0, masks, targets, 8, 0.01, seed=0)  # one step on each
        assert found.kept
        results.append(torch.cat([value.flatten() for value in block.state_dict().values()]))
    assert not torch.equal(*results)


def test_the_same_seed_gives_the_same_bits_and_another_seed_others(meter):
    results = []
    for seed in (0, 0, 1):
        _, walk, block, masks, targets = prepared(meter)
        tune_block(walk, block, 0, masks, targets, 5, 0.03, seed)
        results.append(torch.cat([value.flatten() for value in block.state_dict().values()]))
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])


def test_one_batch_is_enough():
    report = prune_model(tiny.make_model("llama"), EGGSConfig("2:4", preset="best", batch_size=16), WINDOWS)
    assert all(block.kept for block in report.tuning)
    assert report.warnings == []


def test_the_report_warns_of_blocks_whose_tuning_was_undone():
    config = EGGSConfig("2:4", preset="best", block_tuning=STEPS, tuning_lr=100.0)
    report = prune_model(tiny.make_model("llama"), config, WINDOWS)
    said = "blocks 0, 1: tuning did not lower the error and was undone: use a smaller `tuning_lr`, or more steps"
    assert report.to_dict()["warnings"] == [said]


def test_a_tuned_model_comes_nearer_to_the_dense_one():
    windows, judge = tiny.make_windows(32, 16), tiny.make_windows(8, 16, seed=9)
    with torch.no_grad():
        expected = tiny.make_model("llama")(input_ids=judge, output_hidden_states=True).hidden_states[-1]
    errors = {}
    for steps in (0, 60):
        model = tiny.make_model("llama")
        config = EGGSConfig("2:4", block_tuning=steps, tuning_lr=0.03)
        report = prune_model(model, config, windows)
        with torch.no_grad():
            given = model(input_ids=judge, output_hidden_states=True).hidden_states[-1]
        errors[steps] = float(token_error(given, expected))
        assert [block.block for block in report.tuning] == ([0, 1] if steps else [])
        assert len(report.to_dict()["tuning"]) == len(report.tuning)
    assert errors[60] < 0.9 * errors[0]


def test_biases_of_layers_left_dense_stay_as_they_were():
    model = tiny.make_model("gpt2")
    before = {key: value.clone() for key, value in model.named_parameters()}
    config = EGGSConfig("2:4", targets=["mlp"], block_tuning=STEPS, tuning_lr=0.01)
    report = prune_model(model, config, WINDOWS)
    assert all(block.kept for block in report.tuning)
    after = dict(model.named_parameters())
    for kind in ("attn.c_attn.bias", "attn.c_attn.weight", "attn.c_proj.bias"):
        assert torch.equal(after[f"transformer.h.0.{kind}"], before[f"transformer.h.0.{kind}"])
    for kind in ("ln_1.weight", "ln_2.bias", "mlp.c_fc.bias"):
        assert not torch.equal(after[f"transformer.h.0.{kind}"], before[f"transformer.h.0.{kind}"])


def test_what_cannot_be_tuned_is_refused_before_anything_is_done():
    model = tiny.make_model("llama")
    with torch.inference_mode(), pytest.raises(ModelError, match=r"inference_mode\(\) forbids them; use torch.no_grad"):
        prune_model(model, EGGSConfig("2:4", preset="best"), WINDOWS)
    assert not any(isinstance(layer, NMLinear) for layer in model.modules())


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"preset": "best"}, "block_tuning=200 runs"),
        ({"preset": "best", "block_tuning": 0}, "permutation=True runs"),
        ({"permutation": True}, "permutation=True runs"),
    ],
)
def test_attention_in_half_precision_alone_is_refused_before_anything_is_done(changes, why):
    model = tiny.make_model("llama")
    model.config._attn_implementation = "flash_attention_2"
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(
        ModelError, match=rf"{why} blocks in float32, .*'flash_attention_2' cannot do; .* attn_implementation='sdpa'"
    ):
        prune_model(model, EGGSConfig("2:4", **changes), WINDOWS)
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_attention_in_half_precision_is_left_alone_where_nothing_runs_in_float32():
    model = tiny.make_model("llama")
    model.config._attn_implementation = "flash_attention_2"
    check_run(model, EGGSConfig("2:4"), WINDOWS)


def test_any_seed_will_do(meter):
    _, walk, block, masks, targets = prepared(meter)
    tune_block(walk, block, 0, masks, targets, 1, 0.005, seed=2**62)


def test_gradients_may_be_in_another_order_in_memory_than_weights(meter):
    found = []
    for transposed in (False, True):
        _, walk, block, masks, targets = prepared(meter)
        for layer in masks if transposed else ():
            layer.weight.data = layer.weight.data.t().contiguous().t()
            layer.forward = lambda x, layer=layer: torch.nn.functional.linear(x, layer.weight.contiguous(), layer.bias)
        tune_block(walk, block, 0, masks, targets, 8, 0.01, seed=0)
        found.append([parameter.detach().clone() for parameter in block.parameters()])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-2, atol=1e-4)


def test_products_in_bfloat16_lower_the_error_as_those_in_float32_do(meter, monkeypatch):
    found = {}
    for exact in (False, True):
        monkeypatch.setattr(precision, "has_bfloat16_products", lambda device, exact=exact: not exact)
        _, walk, block, masks, targets = prepared(meter)
        found[exact] = tune_block(walk, block, 0, masks, targets, STEPS, 0.01, seed=0)
    assert found[True].error_before == found[False].error_before
    assert found[True].error_after != found[False].error_after
    assert found[False].error_after == pytest.approx(found[True].error_after, rel=0.02)
