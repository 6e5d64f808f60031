"""vLLM serves packed models. Run in an environment that has it: docs/sharing.md says how one is made."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch
import transformers as t

vllm = pytest.importorskip("vllm", reason="needs an environment with vLLM")

from vllm.config import VllmConfig, set_current_vllm_config  # noqa: E402
from vllm.model_executor.layers.layernorm import RMSNorm  # noqa: E402
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod  # noqa: E402
from vllm.model_executor.layers.quantization import get_quantization_config  # noqa: E402
from vllm.plugins import load_general_plugins  # noqa: E402

from optimum_eggs import EGGSConfig, EGGSPruner, NMLinear, NMPattern  # noqa: E402
from optimum_eggs.errors import CheckpointError, ModelError  # noqa: E402
from optimum_eggs.nn import CodedLinear  # noqa: E402
from optimum_eggs.packing.codes import Coding  # noqa: E402
from optimum_eggs.serving.vllm_layers import EGGSServingConfig, StoredLinear  # noqa: E402
from optimum_eggs.update.rounding import nearest  # noqa: E402

SERVING = Path(__file__).parents[2] / "benchmarks" / "serving.py"
SIZES = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": tiny.VOCABULARY,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
}
MODELS = {
    "llama": lambda: t.LlamaForCausalLM(t.LlamaConfig(**SIZES, tie_word_embeddings=True)),
    "qwen2": lambda: t.Qwen2ForCausalLM(t.Qwen2Config(**SIZES, tie_word_embeddings=True)),
    "untied": lambda: t.LlamaForCausalLM(t.LlamaConfig(**SIZES, tie_word_embeddings=False)),
}
LISTS = {"format_version": 1, "pruned_modules": {"a.q_proj": "2:4", "a.k_proj": "2:4", "a.v_proj": "2:4"}}


@pytest.fixture
def packed(tmp_path, tokenizer):
    def prune(name, pattern="2:4", **integers):
        torch.manual_seed(0)
        pruner = EGGSPruner(MODELS[name]().eval(), tokenizer)
        settings = EGGSConfig(pattern, num_samples=8, seq_len=16, **integers)
        pruner.prune(settings, calibration=tiny.make_windows(8, 16))
        pruner.save_pretrained(tmp_path / "packed")
        return tmp_path / "packed"

    return prune


@pytest.fixture
def default_vllm_config():
    """What vLLM asks for while a layer is made."""
    with set_current_vllm_config(VllmConfig()):
        yield


def serve(folder, text, tmp_path, *options):
    command = [
        sys.executable,
        SERVING,
        folder,
        "--text",
        text,
        "--prompt",
        "24",
        "--new-tokens",
        "64",
        "--log",
        tmp_path / "log",
    ]
    nodes = {"VLLM_CPU_SIM_MULTI_NUMA": "1"}  # a processor of one node may be split too
    done = subprocess.run(
        [*map(str, command), "--options", *options], capture_output=True, text=True, env=os.environ | nodes
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "integers", "options"),
    [
        ("llama", {}, ["--enforce-eager"]),
        ("qwen2", {}, []),  # compiled
        ("untied", {}, ["--enforce-eager", "--tensor-parallel-size", "2"]),
        ("llama", {"values": "int8", "value_group": 64, "head": "int8"}, ["--enforce-eager"]),
        (
            "qwen2",
            {"values": "int4", "value_group": 64, "head": "int8"},
            ["--enforce-eager", "--tensor-parallel-size", "2"],
        ),
        ("untied", {"values": "int8", "value_group": 64, "head": "int8"}, ["--enforce-eager"]),
        ("llama", {"rotation": True}, []),
        ("qwen2", {"rotation": True, "head": "int8"}, ["--enforce-eager", "--tensor-parallel-size", "2"]),
        ("untied", {"rotation": True}, ["--enforce-eager"]),
    ],
)
def test_greedy_tokens_are_those_of_transformers(packed, text_file, tmp_path, name, integers, options):
    printed = serve(packed(name, **integers), text_file, tmp_path, *options)
    assert "those of transformers, 4 x 64" in printed


def method(config, kind, prefix):
    layer = kind.__new__(kind)
    torch.nn.Module.__init__(layer)
    return config.get_quant_method(layer, prefix)


def test_the_plugin_is_found_and_tells_layers_apart():
    load_general_plugins()
    config = get_quantization_config("eggs").from_config(LISTS)
    config.packed_modules_mapping = {"qkv_proj": ["q_proj", "k_proj", "v_proj"]}
    assert method(config, LinearBase, "a.qkv_proj").pattern == NMPattern(2, 4)
    assert isinstance(method(config, LinearBase, "a.o_proj"), UnquantizedLinearMethod)
    assert config.get_quant_method(torch.nn.Module(), "a") is None
    with pytest.raises(CheckpointError, match="pruned_modules"):
        EGGSServingConfig.from_config({"format_version": 1})
    with pytest.raises(CheckpointError, match="format_version=3"):
        EGGSServingConfig.from_config(LISTS | {"format_version": 3})


def test_what_it_cannot_hold_as_one_is_refused():
    some = {name: pattern for name, pattern in LISTS["pruned_modules"].items() if name != "a.v_proj"}
    config = EGGSServingConfig.from_config(LISTS | {"pruned_modules": some})
    config.packed_modules_mapping = {"qkv_proj": ["q_proj", "k_proj", "v_proj"]}
    with pytest.raises(ModelError, match=r"a\.v_proj dense floats"):
        method(config, LinearBase, "a.qkv_proj")
    with pytest.raises(ModelError, match="experts are not served"):
        EGGSServingConfig.from_config(LISTS | {"pruned_modules": {"model.layers.0.mlp.experts.0.up_proj": "2:4"}})


def test_a_norm_takes_gains_or_a_matrix(default_vllm_config):
    config = EGGSServingConfig.from_config(LISTS | {"matrix_norms": ["norm"]})
    for _ in range(2):
        config.get_quant_method(torch.nn.Module(), "a")
    plain, norm = RMSNorm(16, eps=1e-5), RMSNorm(16, eps=1e-5)
    gains, matrix = torch.randn(16), torch.randn(16, 16)
    x, residual = torch.randn(3, 16), torch.randn(3, 16)
    plain.weight.weight_loader(plain.weight, gains)
    assert type(plain) is RMSNorm
    torch.testing.assert_close(plain(x.clone()), torch.nn.functional.rms_norm(x, (16,), gains, 1e-5))
    norm.weight.weight_loader(norm.weight, matrix)
    expected = torch.nn.functional.rms_norm(x + residual, (16,), None, 1e-5) @ matrix.T
    found, total = norm(x.clone(), residual.clone())
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(total, x + residual)
    torch.testing.assert_close(norm((x + residual).clone()), expected)
    with pytest.raises(CheckpointError, match=r"\(3, 16\) in the file; they must be \(16,\) or \(16, 16\)"):
        plain.weight.weight_loader(plain.weight, x)


@pytest.mark.parametrize("coding", [None, Coding("int8", 64), Coding("int4", 64)])
def test_a_layer_computes_what_ours_computes_whole_and_in_parts(coding):
    torch.manual_seed(0)
    dense = torch.nn.Linear(256, 48).requires_grad_(False)
    ours = NMLinear.from_linear(dense, NMPattern(2, 4))
    if coding is not None:
        codes, scale = nearest(ours.dense_weight(), coding)
        ours = CodedLinear.from_codes(ours, codes[ours.mask()].view(48, -1), scale, coding)
    x = torch.randn(5, 256)
    whole = fill(StoredLinear(NMPattern(2, 4), coding), ours, slice(None), 256)
    assert torch.equal(whole(x, ours.bias), ours(x))
    parts = [fill(StoredLinear(NMPattern(2, 4), coding), ours, slice(s, s + 128), 256) for s in (0, 128)]
    found = parts[0](x[:, :128], None) + parts[1](x[:, 128:], ours.bias)
    torch.testing.assert_close(found, ours(x), rtol=1e-4, atol=1e-4)
    whole.method.make_dense(whole.layer)
    assert torch.equal(whole.layer.weight, ours.dense_weight())
    torch.testing.assert_close(
        whole(x, ours.bias), ours(x), rtol=2e-2, atol=2e-2
    )  # int8: few inputs are rounded in ours
    with pytest.raises(ModelError, match="smaller tensor_parallel_size"):
        fill(StoredLinear(NMPattern(2, 4), coding), ours, slice(0, 256 // 3), 256)
    damaged = fill(StoredLinear(NMPattern(2, 4), coding), ours, slice(None), 256)
    damaged.layer.weight_meta.data[0, 0] = 255
    with pytest.raises(CheckpointError, match="keeps exactly 2"):
        damaged.method.process_weights_after_loading(damaged.layer)


def test_what_is_missing_or_of_another_kind_is_refused():
    """vLLM's own loaders cast dtypes, cut widths, and leave what they do not find as the memory was."""
    dense = torch.nn.Linear(256, 48, bias=False).requires_grad_(False)
    packed = NMLinear.from_linear(dense, NMPattern(2, 4))
    codes, scale = nearest(packed.dense_weight(), Coding("int8", 64))
    codes = codes[packed.mask()].view(48, -1)
    stored = {"weight": codes, "weight_meta": packed.weight_meta, "weight_scale": scale}
    for name, wrong, why in (
        ("weight", codes.float(), "must have 128 columns of torch.int8"),
        ("weight_meta", packed.weight_meta.to(torch.int8), "must have 32 columns of torch.uint8"),
        ("weight_scale", torch.cat([scale, scale], 1), "must have 4 columns of floats"),
        ("weight_scale", None, "weight_scale is missing"),
    ):
        with pytest.raises(CheckpointError, match=why):
            loaded(StoredLinear(NMPattern(2, 4), Coding("int8", 64)), stored | {name: wrong}, [48])
    loaded(StoredLinear(NMPattern(2, 4), Coding("int8", 64)), stored, [48])
    with pytest.raises(CheckpointError, match="weight is missing"):  # the second of two parts
        loaded(StoredLinear(NMPattern(2, 4), Coding("int8", 64)), stored, [24, 24], "q")


def loaded(method, stored, rows, *part):
    """A layer of vLLM's, as its loader fills it."""
    layer = torch.nn.Module()
    layer.prefix = "layer"

    def load(parameter, given, *part):
        parameter.data.copy_(given)

    method.create_weights(layer, 256, rows, 256, sum(rows), torch.float32, weight_loader=load)
    for name, given in stored.items():
        if given is not None:
            parameter = getattr(layer, name)
            parameter.weight_loader(parameter, given, *part)
    method.process_weights_after_loading(layer)


class fill:  # noqa: N801
    """A layer of vLLM's that holds the `columns` of `ours`."""

    def __init__(self, method, ours, columns, whole):
        self.method, self.layer = method, torch.nn.Module()
        self.layer.prefix = "layer"
        first, last, _ = columns.indices(whole)

        def load(parameter, given):
            start = first * given.shape[1] // whole
            parameter.data.copy_(given[:, start : start + parameter.shape[1]])

        rows = ours.out_features
        method.create_weights(self.layer, last - first, [rows], whole, rows, torch.float32, weight_loader=load)
        for name, part in self.layer.named_parameters():
            part.weight_loader(part, getattr(ours, name).detach())
        method.process_weights_after_loading(self.layer)

    def __call__(self, x, bias):
        return self.method.apply(self.layer, x, bias)
