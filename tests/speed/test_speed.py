import pytest
import torch

from optimum_eggs.errors import NumericalError
from optimum_eggs.ops import INSTRUCTION_SETS, force, held
from optimum_eggs.pattern import NMPattern
from optimum_eggs.speed import layers, read_bandwidth, time_layer, time_models, timing
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
