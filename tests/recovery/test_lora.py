"""LoRA on packed models, with nothing of ours in the user's calls."""

from __future__ import annotations

import copy
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import tiny
import torch
from oracles import gaussian
from torch import nn

from optimum_eggs import EGGSPruner, NMLinear
from optimum_eggs.errors import ConfigError
from optimum_eggs.inspection import inspect_checkpoint
from optimum_eggs.nn import CodedLinear, packed_layers
from optimum_eggs.ops import force
from optimum_eggs.packing.codes import Coding
from optimum_eggs.pattern import NMPattern
from optimum_eggs.recovery.low_rank import masked_low_rank
from optimum_eggs.update.rounding import nearest

peft = pytest.importorskip("peft")
from peft import LoraConfig, PeftModel, get_peft_model  # noqa: E402
from transformers import AutoModelForCausalLM  # noqa: E402


@pytest.fixture(scope="module")
def folders(tmp_path_factory, tokenizer):
    """Packed folders by architecture."""
    from optimum_eggs import EGGSConfig

    made = {}
    for name in ("llama", "gpt2", "gemma3"):
        pruner = EGGSPruner(tiny.make_model(name), tokenizer)
        config = EGGSConfig("2:4", num_samples=8, seq_len=16, band=8)
        pruner.prune(config, calibration=tiny.make_windows(8, 16))
        made[name] = tmp_path_factory.mktemp("lora") / name
        pruner.save_pretrained(made[name])
    return made


def adapted(folder, **options):
    """A packed model with an adapter whose weights are not zero."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(folder)
    options = {"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM"} | options
    model = get_peft_model(model, LoraConfig(**options))
    fill(model)
    return model.eval()


def fill(model, adapter="default"):
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_" in name and adapter in name:
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)


@torch.no_grad()
def logits(model):
    return model(input_ids=tiny.make_windows(2, 16)).logits


def masks(model):
    return {
        name.split("base_model.model.")[-1].replace(".base_layer", ""): layer.mask()
        for name, layer in packed_layers(model).items()
    }


@pytest.mark.parametrize("shape", [(5, 8), (30, 16)])
def test_the_masked_product_and_its_gradients(shape, monkeypatch):
    monkeypatch.setattr("optimum_eggs.recovery.low_rank._CHUNK", 40)  # several chunks
    rows, columns = shape
    layer = NMLinear.from_linear(nn.Linear(columns, rows), NMPattern(2, 4))
    down = gaussian(3, columns, seed=1, dtype=torch.float64).requires_grad_()
    up = gaussian(rows, 3, seed=2, dtype=torch.float64).requires_grad_()
    packed = masked_low_rank(down, up, layer.weight_meta, layer.pattern)
    torch.testing.assert_close(packed.flatten(), (up @ down)[layer.mask()])
    assert torch.autograd.gradcheck(lambda a, b: masked_low_rank(a, b, layer.weight_meta, layer.pattern), (down, up))


def test_a_layer_under_an_adapter_compiles_as_one_graph():
    torch.manual_seed(0)
    base = nn.Sequential(NMLinear.from_linear(nn.Linear(24, 10), NMPattern(2, 4)))
    model = get_peft_model(base, LoraConfig(r=3, target_modules=["0"], init_lora_weights=False))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    found, expected = [], []
    for run, gradients in ((compiled, found), (model, expected)):
        output = run(gaussian(5, 24, seed=2))
        output.square().sum().backward()
        gradients += [output.detach(), *(parameter.grad for parameter in model.parameters() if parameter.requires_grad)]
        model.zero_grad()
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["added to the weight", "beside it"])
def test_derivatives_of_torch_func_are_those_of_the_dense_layer(dtype):
    torch.manual_seed(0)
    base = NMLinear.from_linear(nn.Linear(24, 10), NMPattern(2, 4))
    config = LoraConfig(r=3, target_modules=["0"], init_lora_weights=False)
    layer = get_peft_model(nn.Sequential(base), config).base_model.model[0].to(dtype)
    down, up = (factor["default"].weight.detach().clone() for factor in (layer.lora_A, layer.lora_B))
    x = gaussian(5, 24, seed=2, dtype=dtype)

    def own(down, up, x):
        factors = {"lora_A.default.weight": down, "lora_B.default.weight": up}
        return torch.func.functional_call(layer, factors, (x,)).tanh()

    def dense(down, up, x):
        weight = base.dense_weight() + layer.scaling["default"] * base.mask() * (up @ down)
        return nn.functional.linear(x, weight, base.bias).tanh()

    def loss(run):
        return lambda *arguments: run(*arguments).square().sum()

    each = (0, 1)
    for transform in (
        lambda run: torch.func.grad(loss(run), argnums=each)(down, up, x),
        lambda run: torch.func.vmap(torch.func.grad(loss(run), argnums=each), (None, None, 0))(down, up, x),
        lambda run: (torch.func.vmap(run, (None, None, 0))(down, up, x),),
        lambda run: torch.func.jvp(run, (down, up, x), (down.sin(), up.sin(), x.sin())),
        lambda run: torch.func.jacrev(run, argnums=each)(down, up, x),
        lambda run: torch.func.jacfwd(run, argnums=each)(down, up, x),
        lambda run: torch.func.hessian(loss(run))(down, up, x),
    ):
        torch.testing.assert_close(transform(own), transform(dense), rtol=1e-4, atol=1e-4)
    with torch.autograd.forward_ad.dual_level():
        tangent = torch.autograd.forward_ad.make_dual(down, down.sin())
        found, expected = (torch.autograd.forward_ad.unpack_dual(run(tangent, up, x)) for run in (own, dense))
        torch.testing.assert_close(found.tangent, expected.tangent, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dropout", [0.0, 1e-9], ids=["added to the weight", "beside it"])
def test_onnx_holds_an_adapter_that_is_not_merged(dropout):
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnx")
    from onnx.reference import ReferenceEvaluator

    base = NMLinear.from_linear(nn.Linear(24, 10), NMPattern(2, 4))
    config = LoraConfig(r=3, target_modules=["0"], lora_dropout=dropout, init_lora_weights=False)
    layer, x = get_peft_model(nn.Sequential(base), config).base_model.model[0].eval(), gaussian(3, 24, seed=2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = torch.onnx.export(layer, (x,), dynamo=True, verbose=False).model_proto
    (y,) = ReferenceEvaluator(model).run(None, {model.graph.input[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(y), layer(x))


@pytest.mark.parametrize("dropout", [0.0, 1e-9], ids=["added to the weight", "beside it"])
@pytest.mark.parametrize("batch", [(), (3,), (2, 5), (0,), (2, 0)])
def test_inputs_of_any_shape_and_their_gradients(batch, dropout):
    torch.manual_seed(0)
    base = NMLinear.from_linear(nn.Linear(24, 10), NMPattern(2, 4))
    config = LoraConfig(r=3, target_modules=["0"], lora_dropout=dropout, init_lora_weights=False)
    layer = get_peft_model(nn.Sequential(base), config).base_model.model[0]
    x = gaussian(*batch, 24, seed=2).requires_grad_()
    down, up = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    dense = base.dense_weight() + layer.scaling["default"] * base.mask() * (up @ down)
    expected, y = nn.functional.linear(x, dense, base.bias), layer(x)
    torch.testing.assert_close(y, expected)
    for own, exact in zip(*(torch.autograd.grad(z.square().sum(), (x, down, up)) for z in (y, expected)), strict=True):
        torch.testing.assert_close(own, exact, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("safe", [True, False])
@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3"])
def test_merging_gives_what_was_trained_and_keeps_every_zero(name, safe, folders, tmp_path):
    model = adapted(folders[name])
    kept, expected = masks(model), logits(model)
    plain = AutoModelForCausalLM.from_pretrained(folders[name]).eval()
    assert not torch.allclose(logits(plain), expected, atol=1e-3)
    merged = model.merge_and_unload(safe_merge=safe)
    assert type(merged) is type(plain)
    torch.testing.assert_close(logits(merged), expected, rtol=1e-5, atol=1e-5)
    assert masks(merged).keys() == kept.keys() == masks(plain).keys()
    assert all(torch.equal(mask, kept[name]) for name, mask in masks(merged).items())
    merged.save_pretrained(tmp_path / "merged")
    assert inspect_checkpoint(tmp_path / "merged").ok
    sizes = [(folder / "model.safetensors").stat().st_size for folder in (folders[name], tmp_path / "merged")]
    assert sizes[0] == sizes[1]
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    assert torch.equal(logits(again), logits(merged))


@pytest.mark.parametrize(
    "options",
    [
        {"r": 2, "lora_alpha": 32},
        {"use_rslora": True},
        {"init_lora_weights": "gaussian"},
        {"init_lora_weights": False},
        {"target_modules": ["q_proj", "down_proj"]},
        {"target_modules": r".*\.mlp\.(gate|up)_proj"},
        {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"q_proj": 3}},
        {"layers_to_transform": [0], "target_modules": ["q_proj", "v_proj"]},
        {"modules_to_save": ["norm"]},
    ],
    ids=str,
)
def test_options_of_a_plain_lora(options, folders):
    model = adapted(folders["llama"], **options)
    expected = logits(model)
    torch.testing.assert_close(logits(model.merge_and_unload()), expected, rtol=1e-5, atol=1e-5)


def test_a_bias_of_the_adapter(folders):
    model = adapted(folders["gpt2"], lora_bias=True)
    for name, parameter in model.named_parameters():
        if name.endswith("lora_B.default.bias"):
            parameter.data.normal_()
    expected = logits(model)
    torch.testing.assert_close(logits(model.merge_and_unload()), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore:merging into layers of integers rounds the sum")
@pytest.mark.parametrize("safe_merge", [False, True])
def test_a_bias_is_merged_into_a_layer_of_integers_that_has_one(safe_merge):
    torch.manual_seed(0)
    packed = NMLinear.from_linear(nn.Linear(64, 32), NMPattern(2, 4))
    expected = packed.bias.detach().clone()
    coding = Coding("int8", 64)
    codes, scale = nearest(packed.dense_weight(), coding)
    coded = CodedLinear.from_codes(packed, codes[packed.mask()].view(32, -1), scale, coding)
    model = get_peft_model(nn.Sequential(coded), LoraConfig(r=2, target_modules=["0"], lora_bias=True))
    bias = model.base_model.model[0].lora_B["default"].bias
    bias.data.normal_()
    expected += bias.detach() * model.base_model.model[0].scaling["default"]
    merged = model.merge_and_unload(safe_merge=safe_merge)[0]
    assert merged.bias.dtype is torch.float32
    torch.testing.assert_close(merged.bias.data, expected.data)
    assert torch.isfinite(merged(gaussian(3, 64))).all()


@pytest.mark.filterwarnings("ignore:.lora_bias=True. was passed but")
def test_a_bias_that_no_layer_takes_is_said_before_anything_is_merged(folders):
    model = adapted(folders["llama"], lora_bias=True)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ConfigError, match=r"'default' has a bias \(lora_bias=True\).*has none"):
        model.merge_and_unload(safe_merge=True)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_bias_that_is_not_finite_leaves_all_as_it_was_in_a_safe_merge(folders):
    model = adapted(folders["gpt2"], lora_bias=True)
    layer = model.base_model.model.transformer.h[0].attn.c_attn
    layer.lora_B["default"].bias.data[0] = torch.nan
    before = layer.get_base_layer().weight.data.clone()
    with pytest.raises(ValueError, match="NaNs detected in the merged weights"):
        layer.merge(safe_merge=True)
    assert torch.equal(layer.get_base_layer().weight.data, before)
    assert not layer.merged


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_adapters_combined_by_their_product_are_their_sum(name, folders):
    options = {"fan_in_fan_out": True} if name == "gpt2" else {}
    model = adapted(folders[name], **options)
    model.add_adapter("second", model.peft_config["default"])
    fill(model, "second")
    model.add_weighted_adapter(["default", "second"], [0.5, 0.25], "by_factors", combination_type="cat")
    model.add_weighted_adapter(["default", "second"], [0.5, 0.25], "by_product", combination_type="svd", svd_rank=16)
    found = []
    for combined in ("by_factors", "by_product"):
        model.set_adapter(combined)
        found.append(logits(model))
    torch.testing.assert_close(found[1], found[0], rtol=1e-3, atol=1e-3)
    model.set_adapter("default")
    assert (logits(model) - found[0]).abs().max() > 0.1


@pytest.mark.filterwarnings("ignore:lora with eva")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"use_dora": True}, "DoraLinearVariant"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa'"),
        ({"init_lora_weights": "olora"}, "init_lora_weights='olora'"),
        ({"init_lora_weights": "orthogonal"}, "init_lora_weights='orthogonal'"),
        ({"init_lora_weights": "eva", "eva_config": peft.tuners.lora.config.EvaConfig()}, "init_lora_weights='eva'"),
        (
            {"target_modules": [], "target_parameters": ["mlp.up_proj.weight"]},
            "target_parameters names a packed weight",
        ),
    ],
)
def test_what_does_not_keep_the_mask_is_refused_with_the_reason(options, message, folders):
    with pytest.raises(ConfigError, match=message):
        adapted(folders["llama"], **options)


@pytest.mark.parametrize("kind", ["LoHaConfig", "LoKrConfig", "IA3Config", "OFTConfig", "VeraConfig", "AdaLoraConfig"])
def test_other_adapters_are_refused_on_packed_layers(kind, folders):
    options = {"target_modules": ["q_proj", "down_proj"]}
    if kind == "IA3Config":
        options["feedforward_modules"] = ["down_proj"]
    if kind == "AdaLoraConfig":
        options["total_step"] = 10
    model = AutoModelForCausalLM.from_pretrained(folders["llama"])
    with pytest.raises(ConfigError, match="do not keep the zeros of packed layers"):
        get_peft_model(model, getattr(peft, kind)(**options))


def test_other_adapters_are_left_alone_on_dense_models():
    model = get_peft_model(tiny.make_model("llama"), peft.LoHaConfig(target_modules=["q_proj"]))
    assert "loha" in str(type(model.base_model)).lower()


def test_a_dense_model_gets_the_plain_layer():
    model = get_peft_model(tiny.make_model("llama"), LoraConfig(target_modules=["q_proj"]))
    assert type(model.base_model.model.model.layers[0].self_attn.q_proj) is peft.tuners.lora.Linear


def test_merge_and_unmerge_come_back(folders):
    model = adapted(folders["llama"])
    expected = logits(model)
    model.merge_adapter()
    torch.testing.assert_close(logits(model), expected, rtol=1e-5, atol=1e-5)
    model.unmerge_adapter()
    torch.testing.assert_close(logits(model), expected, rtol=1e-5, atol=1e-5)
    with model.disable_adapter():
        plain = AutoModelForCausalLM.from_pretrained(folders["llama"]).eval()
        torch.testing.assert_close(logits(model), logits(plain), rtol=1e-5, atol=1e-5)


def test_two_adapters_add_up_and_are_deleted(folders):
    model = adapted(folders["llama"])
    one = logits(model)
    model.add_adapter("second", LoraConfig(r=2, target_modules=["q_proj", "up_proj"], task_type="CAUSAL_LM"))
    fill(model, "second")
    model.base_model.set_adapter(["default", "second"])
    both = logits(model)
    assert not torch.allclose(one, both, atol=1e-3)
    model.base_model.set_adapter("default")
    torch.testing.assert_close(logits(model), one)
    deleted = copy.deepcopy(model)
    deleted.delete_adapter("second")
    assert not any("second" in name for name in deleted.state_dict())
    torch.testing.assert_close(logits(deleted), one)
    model.base_model.set_adapter(["default", "second"])
    merged = model.merge_and_unload(adapter_names=["default", "second"])
    torch.testing.assert_close(logits(merged), both, rtol=1e-5, atol=1e-5)


def test_held_weights_are_made_again_after_two_adapters_are_merged():
    torch.manual_seed(0)
    base = nn.Sequential(NMLinear.from_linear(nn.Linear(64, 32), NMPattern(2, 4)))
    config = LoraConfig(r=2, target_modules=["0"], init_lora_weights=False)
    model, x = get_peft_model(base, config), gaussian(3, 64)
    model.add_adapter("second", config)
    model.eval().requires_grad_(False)
    with force("dense"):
        with model.disable_adapter():
            model(x)  # holds
        model.base_model.merge_adapter(["default", "second"])  # each puts other values in the place of the packed ones
        found = model(x)
    with force("reference"):
        assert torch.equal(found, model(x))


def test_an_adapter_comes_back_masked(folders, tmp_path):
    model = adapted(folders["llama"])
    expected = logits(model)
    model.save_pretrained(tmp_path / "adapter")
    base = AutoModelForCausalLM.from_pretrained(folders["llama"])
    again = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    torch.testing.assert_close(logits(again), expected)
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "adapter").eval()  # the base is found through the adapter
    torch.testing.assert_close(logits(whole), expected)


@pytest.mark.slow
@pytest.mark.parametrize("first", ["import optimum_eggs, peft", "import peft, optimum_eggs"])
def test_the_order_of_imports_does_not_matter(first):
    code = f"""
{first}
import torch
from optimum_eggs import NMLinear, NMPattern
model = torch.nn.Sequential(NMLinear.from_linear(torch.nn.Linear(8, 4), NMPattern(2, 4)))
model = peft.get_peft_model(model, peft.LoraConfig(target_modules=["0"]))
print(type(model.base_model.model[0]).__name__)
"""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True)
    assert done.stdout.split() == ["MaskedLoraLinear"], done.stderr


def test_importing_this_package_does_not_import_peft():
    code = "import optimum_eggs, sys; raise SystemExit('peft' in sys.modules)"
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_training_lowers_the_loss_and_moves_the_adapter_alone(checkpointing, folders):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(folders["llama"])
    model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.1, task_type="CAUSAL_LM"))
    before = {name: copy.deepcopy(layer.state_dict()) for name, layer in packed_layers(model).items()}
    if checkpointing:
        model.gradient_checkpointing_enable()
        model.enable_input_require_grads()
    windows = tiny.make_windows(8, 16)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    model.train()
    for _ in range(20):
        loss = model(input_ids=windows, labels=windows).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1
    for name, layer in packed_layers(model).items():
        assert all(torch.equal(tensor, before[name][key]) for key, tensor in layer.state_dict().items())


def test_the_trainer_takes_a_packed_model_with_an_adapter(folders, tmp_path):
    from transformers import Trainer, TrainingArguments

    model = adapted(folders["llama"])
    windows = [{"input_ids": row, "labels": row} for row in tiny.make_windows(8, 16)]
    arguments = TrainingArguments(
        tmp_path,
        max_steps=2,
        per_device_train_batch_size=4,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
    )
    Trainer(model=model, args=arguments, train_dataset=windows).train()
    merged = model.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    assert inspect_checkpoint(tmp_path / "merged").ok


@pytest.mark.slow
@pytest.mark.parametrize("name", ["lora_recovery.py", "sft_recovery.py"])
def test_the_examples_run(name, forks, packed_folder, text_file, tmp_path):
    if name == "sft_recovery.py":
        pytest.importorskip("trl")
    example = Path(__file__).parents[2] / "examples" / name
    arguments = [packed_folder, tmp_path / "out", "--text", text_file, "--steps", 2, "--seq-len", 16]
    forks.run(example, *arguments, check=True)
    assert inspect_checkpoint(tmp_path / "out").ok
    before, after = (packed_layers(AutoModelForCausalLM.from_pretrained(f)) for f in (packed_folder, tmp_path / "out"))
    assert any(not torch.equal(layer.weight, after[key].weight) for key, layer in before.items())
