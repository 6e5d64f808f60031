import pytest
import torch
import transformers

from optimum_eggs.errors import ModelError, NumericalError
from optimum_eggs.hf.loading import load_model
from optimum_eggs.nn import packed_layers
from optimum_eggs.ops import INSTRUCTION_SETS, force, held
from optimum_eggs.pattern import NMPattern
from optimum_eggs.speed import check_models, layers, models, parts, read_bandwidth, time_layer, time_models, timing
from optimum_eggs.speed.timing import alternate


def test_runs_take_turns_after_one_round_to_warm_up():
    calls = []
    found = alternate([lambda: calls.append("a"), lambda: calls.append("b")], 3)
    assert "".join(calls) == "abababab"
    assert all(seconds.low <= seconds.median <= seconds.high for seconds in found)


def test_a_turn_of_several_calls_counts_as_one_of_them(monkeypatch):
    now, order = [0.0], []
    monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])

    def call(name, seconds):
        order.append(name)
        now[0] += seconds

    found = alternate([lambda: call("a", 2.0), lambda: call("b", 5.0)], 2, calls=3)
    assert "".join(order) == "aaabbb" * 3
    assert [seconds.median for seconds in found] == [2.0, 5.0]


def test_a_turn_ends_when_the_gpu_is_done(monkeypatch):
    now, pending = [0.0], [100.0]
    monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])

    def wait(device):
        assert device == torch.device("cuda:1")
        now[0] += pending.pop() if pending else 0

    monkeypatch.setattr(torch.accelerator, "synchronize", wait)
    found = alternate([lambda: pending.append(2.0), lambda: pending.append(5.0)], 3, devices=[torch.device("cuda:1")])
    assert [seconds.median for seconds in found] == [2.0, 5.0]


@pytest.mark.skipif(not INSTRUCTION_SETS, reason="no native extension")
def test_memory_is_read_at_some_speed():
    assert read_bandwidth(1 << 20, repeats=2) > 0.1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_layer_is_timed_in_both_forms(dtype):
    seen = []
    others = {"other": lambda x, dense: seen.append((x.shape, dense.shape, dense.count_nonzero().item()))}
    with force("reference"):
        found = time_layer(24, 64, NMPattern(1, 4), dtype, 3, repeats=2, working_set=24 * 64 * 4 * 3, others=others)
    assert (found.out_features, found.in_features, found.pattern, found.tokens) == (24, 64, "1:4", 3)
    assert (found.backend, found.isa) == ("reference", None)
    assert found.ratio == pytest.approx(found.dense.median / found.packed.median)
    read = 24 * 16 * dtype.itemsize + 24 * 8
    assert found.gigabytes_per_second == pytest.approx(read / found.packed.median / 1e9)
    assert seen == [((3, 64), (24, 64), 24 * 16)] * 3 * layers._CALLS


def test_what_is_held_is_made_before_anything_is_timed(monkeypatch):
    unpacked, timed, plain = [], [], held.unpack
    monkeypatch.setattr(held, "unpack", lambda *given: unpacked.append(given) or plain(*given))
    monkeypatch.setattr(
        layers, "alternate", lambda *given, **more: timed.append(len(unpacked)) or alternate(*given, **more)
    )
    with force("dense"):
        found = time_layer(24, 64, NMPattern(2, 4), torch.float32, 3, repeats=1, working_set=24 * 64 * 4 * 20)
    assert timed == [20]
    assert len(unpacked) == 20
    assert found.gigabytes_per_second == pytest.approx(24 * 64 * 4 / found.packed.median / 1e9)  # the dense weight


def test_a_wrong_product_is_not_timed(monkeypatch):
    right = layers.nm_linear
    monkeypatch.setattr(layers, "nm_linear", lambda *arguments: right(*arguments) * 1.01)
    with pytest.raises(NumericalError, match="differs from the dense one"):
        time_layer(24, 64, NMPattern(2, 4), torch.float32, 3, repeats=1, working_set=1)


def test_models_are_timed_in_turn(packed_folder, dense_folder):
    packed, dense = time_models([packed_folder, dense_folder], prompt=8, new_tokens=3, repeats=2)
    assert (packed.folder, dense.folder) == (str(packed_folder), str(dense_folder))
    assert packed.weights < dense.weights
    assert packed.prefill_speed == pytest.approx(8 / packed.prefill.median)
    assert dense.decode_speed == pytest.approx(3 / dense.decode.median)
    for model in (packed, dense):
        of_step = model.parts
        assert of_step.step == pytest.approx(model.decode.median / 3)
        assert of_step.matrices + of_step.head + of_step.rest == pytest.approx(of_step.step)
        assert min(of_step.matrices, of_step.head) > 0
        assert (of_step.limit is not None) == bool(INSTRUCTION_SETS)


@pytest.mark.parametrize("name", ["BertModel", "BertForMaskedLM", "T5ForConditionalGeneration"])
def test_models_that_do_not_write_are_refused_before_they_are_loaded(name, tmp_path):
    cls = getattr(transformers, name)
    cls.config_class(architectures=[name]).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=rf"a {name} does not write token after token, .* with --layers-only"):
        check_models([tmp_path], 8, 8)


def test_speeds_are_those_of_all_sequences(dense_folder, monkeypatch):
    given = set()
    for name in ("_prefill", "_decode"):
        run = getattr(models, name)
        monkeypatch.setattr(
            models, name, lambda model, ids, *more, run=run: given.add(tuple(ids.shape)) or run(model, ids, *more)
        )
    (dense,) = time_models([dense_folder], prompt=8, new_tokens=3, repeats=1, sequences=4)
    assert dense.prefill_speed == pytest.approx(4 * 8 / dense.prefill.median)
    assert dense.decode_speed == pytest.approx(4 * 3 / dense.decode.median)
    assert given == {(1, 2), (4, 8), (4, 1)}  # the first warms up


def test_linear_layers_are_called_again_as_the_model_calls_them(packed_folder, monkeypatch):
    model = load_model(packed_folder).eval()
    once, runs = [], []
    monkeypatch.setattr(parts, "alternate", lambda given, *more, **other: runs.extend(given) or alternate(given, 1))
    found = parts.time_parts(model, 0.5, torch.tensor([[1], [2]]), 1, 100.0)
    for name, module in model.named_modules():
        module.register_forward_hook(lambda module, given, out, name=name: once.append((name, given[0].shape)))
    for run in runs:
        run()
    linear = [*packed_layers(model), "lm_head"]
    assert sorted(name for name, _ in once) == sorted(linear)
    assert once[-1] == ("lm_head", (2, 1, model.config.hidden_size))
    weights = [tensor for name in linear for tensor in model.get_submodule(name).state_dict().values()]
    assert found.read == sum(tensor.nbytes for tensor in weights)
    assert found.limit == pytest.approx(found.read / 100.0 / 0.5)


def test_only_packed_models_decode_compiled(packed_folder, dense_folder, monkeypatch):
    compiled = []
    monkeypatch.setattr("optimum_eggs.speed.models.compile_generation", compiled.append)
    packed, dense = time_models([packed_folder, dense_folder], prompt=8, new_tokens=3, repeats=1, compiled=True)
    assert [bool(packed_layers(model)) for model in compiled] == [True]
    assert (packed.compiled, dense.compiled) == (True, False)
