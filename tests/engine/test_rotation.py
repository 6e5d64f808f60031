"""A dense model turned into another basis, and pruned there."""

import copy
import json

import pytest
import tiny
import torch
import transformers as t
from oracles import generator
from safetensors.torch import load_file, save_file

from optimum_eggs import EGGSConfig, EGGSPruner
from optimum_eggs.calibration import InMemoryBlocks
from optimum_eggs.calibration.states import states_in_memory
from optimum_eggs.engine.plan import make_plan
from optimum_eggs.engine.prune import evaluation_mode
from optimum_eggs.engine.residual import find_block_parts
from optimum_eggs.engine.rotate import choose_turn, turn_model
from optimum_eggs.engine.rotation import (
    BlockSample,
    HeadSample,
    ReaderSample,
    WriterSample,
    _lost,
    _orthogonal,
    learn_rotation,
)
from optimum_eggs.errors import CheckpointError, ConfigError, ModelError
from optimum_eggs.inspection import inspect_checkpoint
from optimum_eggs.masks import topn_mask
from optimum_eggs.measure import Meter
from optimum_eggs.nn import MatrixNorm, packed_layers
from optimum_eggs.pattern import NMPattern
from optimum_eggs.recovery.recover import RecoverySettings, recover

WINDOWS = tiny.make_windows(8, 32)
SIZE = {"num_samples": 8, "seq_len": 32, "band": 8, "batch_size": 4}
OTHERS = {
    "qwen2": lambda: (t.Qwen2ForCausalLM, t.Qwen2Config(**tiny._LLAMA, tie_word_embeddings=True)),
    "gemma": lambda: (t.GemmaForCausalLM, t.GemmaConfig(**tiny._LLAMA, head_dim=8)),
    "gemma2": lambda: (t.Gemma2ForCausalLM, t.Gemma2Config(**tiny._LLAMA, head_dim=8)),
    "olmo2": lambda: (t.Olmo2ForCausalLM, t.Olmo2Config(**tiny._LLAMA)),
    "cohere": lambda: (t.CohereForCausalLM, t.CohereConfig(**tiny._LLAMA)),
}
TIED = {"llama", "qwen2"}


def make_model(name):
    """A tiny model whose gains and biases are not what they are at first; a gain of it is zero."""
    kind, config = (OTHERS.get(name) or tiny.CONFIGS[name])()
    torch.manual_seed(0)
    model = kind._from_config(config).eval()
    drawn = generator(1)
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.data += 0.3 * torch.randn(parameter.shape, generator=drawn)
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.weight.data[3] = 0
    return model


def chosen(model, **values):
    config = EGGSConfig("2:4", rotation=True, **SIZE | values)
    plan = make_plan(model, config)
    with evaluation_mode(model), Meter() as meter:
        blocks = InMemoryBlocks(model, plan.block_list)
        return plan, choose_turn(model, blocks, plan, config, WINDOWS, meter, states_in_memory, progress=False)


def logits(model):
    with torch.no_grad():
        return model(input_ids=WINDOWS).logits


def apart(one, other):
    return float((one - other).norm() / other.norm())


@pytest.mark.parametrize("name", ["llama", "llama-untied", "qwen2", "qwen3", "mistral", "phi3"])
def test_a_turned_model_computes_the_same(name):
    model = make_model(name)
    expected, before = logits(model), copy.deepcopy(model.state_dict())
    plan, turn = chosen(model)
    assert turn.rotation.lost_after < 0.95 * turn.rotation.lost_before
    for matrix in (turn.rotation.residual, *(each for block in turn.rotation.values for each in block)):
        unit = torch.eye(matrix.shape[-1], dtype=torch.float64).expand(matrix.shape)
        torch.testing.assert_close(matrix.mT @ matrix, unit, rtol=0, atol=1e-12)
        assert float((matrix - unit).norm()) > 0.1
    turn_model(model, plan, turn)
    assert apart(logits(model), expected) < 1e-5
    norms = [n for n, module in model.named_modules() if isinstance(module, MatrixNorm)]
    assert norms == (turn.matrix_norms or []) == (["model.norm"] if name in TIED else [])
    moved = [key for key, value in model.state_dict().items() if key in before and not value.equal(before[key])]
    assert {key.split(".")[-2] for key in moved} >= {"embed_tokens", "o_proj", "down_proj"}


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("opt", "model.decoder.embed_positions lies outside the blocks"),
        ("gpt2", "transformer.wpe lies outside the blocks"),
        ("gpt_neox", "gpt_neox.final_layer_norm lies outside the blocks"),
        ("cohere", "model.norm lies outside the blocks"),
        ("gemma", "its embeddings are a GemmaTextScaledWordEmbedding"),
        ("gemma2", "its embeddings are a Gemma2TextScaledWordEmbedding"),
        ("gemma3", "its embeddings are a Gemma3TextScaledWordEmbedding"),
        ("olmo2", r"block 0: .*norm is followed by no linear layer"),
        ("mixtral", r"block 0: mlp.gate.weight is no linear layer"),
        ("qwen3_moe", r"block 0: mlp.gate.weight is no linear layer"),
    ],
)
def test_what_cannot_be_turned_is_refused_as_it_was(name, why):
    model = make_model(name)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ModelError, match=rf"rotation=True: \w+: {why}.*; prune it with rotation=False, or 'auto'"):
        EGGSPruner(model).prune(EGGSConfig("2:4", rotation=True, **SIZE), WINDOWS)
    assert before.keys() == model.state_dict().keys()
    assert all(value.equal(before[key]) for key, value in model.state_dict().items())


def test_a_model_that_cannot_be_turned_is_left_as_it_is_if_so_asked(caplog):
    automatic, plain = (EGGSPruner(make_model("olmo2")) for _ in range(2))
    report = automatic.prune(EGGSConfig("2:4", rotation="auto", **SIZE), WINDOWS, progress=False)
    plain.prune(EGGSConfig("2:4", **SIZE), WINDOWS, progress=False)
    assert "norm is followed by no linear layer" in report.rotation["reason"]
    assert report.rotation["reason"] in caplog.text
    assert report.config["matrix_norms"] is None
    assert torch.equal(logits(automatic.model), logits(plain.model))

    model = make_model("llama")
    report = EGGSPruner(model).prune(EGGSConfig("2:4", rotation="auto", **SIZE), WINDOWS, progress=False)
    assert 0 < report.rotation["lost_after"] < report.rotation["lost_before"]
    assert report.to_dict()["rotation"] == report.rotation
    assert isinstance(model.model.norm, MatrixNorm)


def test_a_damping_that_is_too_small_for_a_factor_is_raised():
    model = make_model("llama")
    half_as_many_as_inputs = {"num_samples": 1, "seq_len": 16}
    config = EGGSConfig("2:4", rotation=True, damping=0, band=8, batch_size=1, **half_as_many_as_inputs)
    report = EGGSPruner(model).prune(config, WINDOWS[:1, :16], progress=False)
    assert 0 < report.rotation["lost_after"] < report.rotation["lost_before"]
    assert torch.isfinite(logits(model)).all()


def test_a_block_that_does_more_than_it_shows_is_refused():
    class ShiftingRMSNorm(type(make_model("llama").model.norm)):
        def forward(self, x):
            return super().forward(x) + shift * x[..., :1]  # in this basis alone

    model = make_model("llama")
    model.model.layers[1].input_layernorm.__class__ = ShiftingRMSNorm
    shift = 0.0
    chosen(model)
    shift = 1.0
    with pytest.raises(ModelError, match="block 1: turned, a block computes something else"):
        chosen(model)


def test_gains_with_an_offset_are_refused():
    class OffsetRMSNorm(type(make_model("llama").model.norm)):
        def forward(self, x):
            return super().forward(x) / self.weight * (1 + self.weight)

    model = make_model("llama")
    for layer in model.model.layers:
        layer.input_layernorm.weight.data.fill_(0.5)
        layer.input_layernorm.__class__ = OffsetRMSNorm
    with pytest.raises(ModelError, match="block 0: turned, a block computes something else"):
        chosen(model)


def test_what_is_added_to_the_embeddings_is_refused():
    model = make_model("llama-untied")
    inner, shift = model.model.forward, torch.linspace(-1, 1, 32)

    def forward(input_ids=None, inputs_embeds=None, **kwargs):
        return inner(inputs_embeds=model.model.embed_tokens(input_ids) + shift, **kwargs)

    model.model.forward = forward
    with pytest.raises(ModelError, match="more than the embeddings goes into the first block"):
        chosen(model)


def drawn_sample(heads=2, copies=2, size=4, width=16, inner=24, dtype=torch.float64):
    """Of one block."""
    draw = generator(0)

    def normal(*shape):
        return torch.randn(*shape, dtype=dtype, generator=draw)

    def inverse(*shape):
        root = normal(*shape, shape[-1])
        return root @ root.mT + torch.eye(shape[-1], dtype=dtype)

    return BlockSample(
        [
            ReaderSample(normal(width), inverse(width), [normal(8, width)]),
            ReaderSample(normal(width), inverse(width), [normal(inner, width)] * 2),
        ],
        [WriterSample(normal(width, inner), normal(inner).square() + 0.1)],
        [HeadSample(0, normal(heads, size, width), normal(width, heads, copies, size), inverse(heads, copies, size))],
    )


def by_autograd(residual, turn, sample, pattern):
    """The loss as its definition has it, whole matrices and all."""

    def share(weight, inverse):
        importance = weight.square() / inverse.diagonal()
        return importance[~topn_mask(importance.detach(), pattern)].sum() / importance.detach().sum()

    inverses = [residual.T @ reader.inverse @ residual for reader in sample.readers]
    loss = sum(
        share(weight * reader.gains @ residual, inverse)
        for reader, inverse in zip(sample.readers, inverses, strict=True)
        for weight in reader.weights
    )
    loss += sum(share(residual.T @ writer.weight, writer.inverse.diag()) for writer in sample.writers)
    (head,) = sample.heads
    heads, copies, size = head.outputs.shape[1:]
    by_head = torch.block_diag(*turn)
    by_copy = torch.block_diag(*turn.repeat_interleave(copies, 0))
    whole = torch.block_diag(*head.inverse.flatten(0, 1))
    values = head.values.reshape(heads * size, -1) * sample.readers[head.reader].gains
    loss = loss + share(by_head.T @ values @ residual, inverses[head.reader])
    return loss + share(residual.T @ head.outputs.flatten(1) @ by_copy, by_copy.T @ whole @ by_copy)


@pytest.mark.parametrize("pattern", ["2:4", "1:4", "3:4"])
def test_gradients_are_those_of_the_definition(pattern):
    pattern, sample = NMPattern.parse(pattern), drawn_sample()
    draw = generator(1)
    turns = [_orthogonal(torch.randn(*shape, dtype=torch.float64, generator=draw)) for shape in ((16, 16), (2, 4, 4))]
    for turn in turns:
        turn.requires_grad_()
    expected = by_autograd(*turns, sample, pattern)
    expected.backward()
    with torch.no_grad():
        sums = _lost([turn.detach() for turn in turns], [sample], pattern)
    assert sums.layers == 6
    assert sums.loss == pytest.approx(expected.item(), rel=1e-12)
    torch.testing.assert_close(sums.residual, turns[0].grad)
    torch.testing.assert_close(sums.values[0], turns[1].grad)


def test_a_layer_that_has_a_basis_without_loss_gets_near_it():
    """Rows that have two entries of four that are not zero, turned at random."""
    weight = torch.zeros(64, 8)
    weight[:, [0, 1, 4, 5]] = torch.randn(64, 4, generator=generator(0))
    hidden = torch.linalg.qr(torch.eye(8) + 0.3 * torch.randn(8, 8, generator=generator(1)))[0]
    sample = BlockSample([ReaderSample(torch.ones(8), torch.eye(8), [weight @ hidden.T])], [], [])
    found = learn_rotation([sample], 8, NMPattern(2, 4), steps=150)
    assert found.lost_before > 0.02
    assert found.lost_after < 0.1 * found.lost_before
    kept = topn_mask((weight @ hidden.T @ found.residual.float()).square(), NMPattern(2, 4))
    assert kept.sum() == weight.numel() / 2


@pytest.mark.parametrize("preset", ["fast", "best", "wanda"])
@pytest.mark.parametrize("name", ["llama", "llama-untied", "phi3"])
def test_a_turned_model_is_pruned_saved_and_made_dense(name, preset, tmp_path):
    pruner = EGGSPruner(make_model(name))
    report = pruner.prune(EGGSConfig("2:4", preset=preset, rotation=True, **SIZE), WINDOWS, progress=False)
    assert report.config["rotation"] is True
    expected = logits(pruner.model)
    pruner.save_pretrained(tmp_path / "packed")
    found = inspect_checkpoint(tmp_path / "packed")
    assert found.ok, found.violations
    assert found.config["matrix_norms"] == (["model.norm"] if name in TIED else None)

    model = t.AutoModelForCausalLM.from_pretrained(tmp_path / "packed")
    assert torch.equal(logits(model), expected)
    inner = t.AutoModel.from_pretrained(tmp_path / "packed")
    with torch.no_grad():
        hidden = inner(input_ids=WINDOWS).last_hidden_state
        assert apart(model.lm_head(hidden), expected) < 1e-6
    model.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(t.AutoModelForCausalLM.from_pretrained(tmp_path / "again")), expected)

    dense = model.dequantize()
    assert not packed_layers(dense)
    assert apart(logits(dense), expected) < 1e-5
    dense.save_pretrained(tmp_path / "dense")
    config = json.loads((tmp_path / "dense" / "config.json").read_text())
    assert config["tie_word_embeddings"] is False
    assert "quantization_config" not in config
    again, info = t.AutoModelForCausalLM.from_pretrained(tmp_path / "dense", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert torch.equal(logits(again), logits(dense))
    assert not any(isinstance(module, MatrixNorm) for module in again.modules())


@pytest.mark.parametrize("name", ["llama", "llama-untied"])
def test_a_turned_model_in_bfloat16_computes_nearly_the_same(name):
    model = make_model(name).to(torch.bfloat16)
    expected = logits(model).float()
    plan, turn = chosen(model)
    turn_model(model, plan, turn)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert 0 < apart(logits(model).float(), expected) < 0.03


def test_a_number_that_scales_the_embeddings_is_no_obstacle():
    config = t.GraniteConfig(**tiny._LLAMA, embedding_multiplier=12.7, residual_multiplier=0.3, logits_scaling=3.0)
    torch.manual_seed(0)
    model = t.GraniteForCausalLM(config).eval().to(torch.bfloat16)
    expected = logits(model).float()
    plan, turn = chosen(model)
    turn_model(model, plan, turn)
    assert 0 < apart(logits(model).float(), expected) < 0.03


def test_a_layer_of_zeros_changes_nothing():
    model = make_model("llama")
    model.model.layers[0].mlp.down_proj.weight.data.zero_()
    _, turn = chosen(model)
    assert 0 < turn.rotation.lost_after < turn.rotation.lost_before


def test_what_is_lost_is_the_mean_over_the_layers():
    sample, pattern = drawn_sample(dtype=torch.float32), NMPattern(2, 4)
    found = learn_rotation([sample], 16, pattern, steps=0)
    expected = by_autograd(torch.eye(16), torch.eye(4).repeat(2, 1, 1), sample, pattern).item() / 6
    assert found.lost_before == found.lost_after == pytest.approx(expected)


def test_without_a_head_it_is_not_made_dense(packed):
    model = t.AutoModel.from_pretrained(packed)
    before = set(packed_layers(model))
    with pytest.raises(ModelError, match=r"norm: its gains are a matrix, .*LlamaModel has none; load it with its head"):
        model.dequantize()
    assert set(packed_layers(model)) == before


def test_integers_for_a_turned_models_embeddings(tmp_path):
    pruner = EGGSPruner(make_model("llama"))
    config = EGGSConfig("2:4", rotation=True, values="int8", head="int8", **SIZE)
    pruner.prune(config, WINDOWS, progress=False)
    expected = logits(pruner.model)
    pruner.save_pretrained(tmp_path / "packed")
    model = t.AutoModelForCausalLM.from_pretrained(tmp_path / "packed")
    assert torch.equal(logits(model), expected)
    assert apart(logits(model.dequantize()), expected) < 1e-2


@pytest.mark.parametrize("target", ["up_proj", "down_proj", "v_proj", "layers.1"])
def test_layers_that_stay_dense_are_turned_with_the_rest(target, capsys):
    model = make_model("llama")
    expected = logits(model)
    pruner = EGGSPruner(model)
    report = pruner.prune(EGGSConfig("2:4", rotation=True, targets=[target], **SIZE), WINDOWS)
    assert {layer.name for layer in report.layers} == {
        name for name in packed_layers(model) if target in name.split(".") or target in name
    }
    assert "choosing a rotation first (a pass through the dense model, 60 steps): about 1 s" in capsys.readouterr().err
    own = logits(pruner.model)
    plain = EGGSPruner(make_model("llama"))
    plain.prune(EGGSConfig("2:4", targets=[target], **SIZE), WINDOWS, progress=False)
    assert apart(own, expected) < apart(logits(plain.model), expected) < 1


@pytest.fixture
def packed(tmp_path):
    pruner = EGGSPruner(make_model("llama"), tiny.make_tokenizer())
    pruner.prune(EGGSConfig("2:4", rotation=True, **SIZE), WINDOWS, progress=False)
    pruner.save_pretrained(tmp_path / "packed")
    return tmp_path / "packed"


@pytest.mark.parametrize("damage", ["missing", "shape", "name"])
def test_a_damaged_matrix_is_refused(packed, damage):
    tensors = load_file(packed / "model.safetensors")
    if damage == "missing":
        del tensors["model.norm.weight"]
    elif damage == "shape":
        tensors["model.norm.weight"] = tensors["model.norm.weight"][:16].contiguous()
    save_file(tensors, packed / "model.safetensors", metadata={"format": "pt"})
    if damage == "name":
        config = json.loads((packed / "config.json").read_text())
        config["quantization_config"]["matrix_norms"] = ["model.layers"]
        (packed / "config.json").write_text(json.dumps(config))
    said = {
        "missing": "its weight is missing",
        "shape": r"has shape \(16, 32\).*must be \(32, 32\)",
        "name": "no RMS norm",
    }
    with pytest.raises(CheckpointError, match=said[damage]):
        t.AutoModelForCausalLM.from_pretrained(packed)


def test_blocks_of_another_basis_are_not_matched(packed, text_file, tmp_path):
    make_model("llama").save_pretrained(tmp_path / "dense")
    settings = RecoverySettings([str(text_file)], teacher=str(tmp_path / "dense"), block_matching=1.0)
    with pytest.raises(ConfigError, match=r"block_matching=1.0: the model was pruned with rotation=True"):
        recover(packed, tmp_path / "out", settings)
    assert not (tmp_path / "out").exists()


def test_the_parts_of_a_block():
    model = make_model("phi3")
    block = model.model.layers[0]
    states = torch.randn(1, 4, 32)
    tables = model.model.rotary_emb(states, torch.arange(4)[None])
    found = find_block_parts(block, 32, lambda: block(states, position_embeddings=tables))
    assert [(each.norm, each.linears) for each in found.readers] == [
        ("input_layernorm", ("self_attn.qkv_proj",)),
        ("post_attention_layernorm", ("mlp.gate_up_proj",)),
    ]
    assert found.writers == ("self_attn.o_proj", "mlp.down_proj")
    assert [fold.consumer for fold in found.heads] == ["self_attn.o_proj"]
