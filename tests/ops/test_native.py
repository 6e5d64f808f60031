"""The kernels in C against sums in float64; the C driver once more under the sanitizers, and for other processors."""

import importlib
import os
import platform
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import gaussian

from optimum_eggs import NMLinear
from optimum_eggs.masks import topn_mask
from optimum_eggs.ops import INSTRUCTION_SETS, explain, force, native, nm_linear
from optimum_eggs.ops.wide import widens
from optimum_eggs.packing import pack, unpack_mask
from optimum_eggs.pattern import NMPattern

HERE = Path(__file__).parent
SOURCES = Path(native.__file__).parent
UNIT = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
PATTERNS = [NMPattern(2, 4), NMPattern(1, 4), NMPattern(4, 8), NMPattern(6, 8), NMPattern(5, 16), NMPattern(17, 32)]
pytestmark = pytest.mark.skipif(not INSTRUCTION_SETS, reason=f"no native extension: {native.missing}")


def problem(pattern, rows, groups, tokens, dtype, bias, seed=0):
    weight = gaussian(rows, groups * pattern.m, seed=seed, dtype=dtype)
    mask = topn_mask(gaussian(rows, groups * pattern.m, seed=seed + 3), pattern)
    values, meta = pack(weight, mask, pattern)
    x = gaussian(tokens, groups * pattern.m, seed=seed + 1, dtype=dtype)
    return weight * mask, values, meta, x, gaussian(rows, seed=seed + 2, dtype=dtype) if bias else None


def check(y, x, dense, bias):
    """Assert that y is X Wᵀ + b up to rounding.

    Sums of k + 1 terms in float32, in any order, are off by at most (k + 1) u Σ|terms|, with u = 2⁻²⁴ (Higham, Accuracy
    and Stability of Numerical Algorithms, 2002, section 4.2); the result is then rounded to its dtype once, by half a
    unit. The bfloat16 product instruction takes subnormal numbers for zero: the 1e-7.
    """
    wide, weight = x.double(), dense.double()
    offset = torch.zeros(len(weight), dtype=torch.float64) if bias is None else bias.double()
    exact = wide @ weight.t() + offset
    size = wide.abs() @ weight.t().abs() + offset.abs()
    terms = int((dense != 0).sum(1).max()) + 1
    bound = terms * 2.0**-24 * size + UNIT[y.dtype] * exact.abs() + 1e-7
    assert bool(((y.double() - exact).abs() <= bound).all())


@settings(deadline=None)
@given(
    isa=st.sampled_from(INSTRUCTION_SETS or ("none",)),
    pattern=st.sampled_from(PATTERNS),
    rows=st.integers(1, 80),
    groups=st.integers(1, 60),
    tokens=st.one_of(st.integers(1, 8), st.integers(9, 257)),
    dtype=st.sampled_from(list(UNIT)),
    bias=st.booleans(),
    backend=st.sampled_from(["native", "panel"]),
)
def test_a_kernel_is_right_up_to_rounding(isa, pattern, rows, groups, tokens, dtype, bias, backend):
    dense, values, meta, x, offset = problem(pattern, rows, groups, tokens, dtype, bias, seed=rows)
    with force(backend, isa):
        check(nm_linear(x, values, meta, offset, pattern.n, pattern.m), x, dense, offset)


@pytest.mark.parametrize("isa", INSTRUCTION_SETS)
@pytest.mark.parametrize("tokens", [1, 40, 600])
@pytest.mark.parametrize("pattern", PATTERNS[:3], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_wide_rows_and_many_panels(isa, tokens, pattern, dtype, monkeypatch):
    groups = 2800 // pattern.m
    dense, values, meta, x, _ = problem(pattern, 200, groups, tokens, dtype, False)
    monkeypatch.setattr(importlib.import_module("optimum_eggs.ops.nm_linear"), "_PANEL_BYTES", 1)  # panels of 64 rows
    for backend in ("native", "panel"):
        with force(backend, isa):
            check(nm_linear(x, values, meta, None, pattern.n, pattern.m), x, dense, None)


@pytest.mark.parametrize("isa", INSTRUCTION_SETS)
@pytest.mark.parametrize("dtype", UNIT)
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_unpacking_is_exact(isa, dtype, pattern):
    dense, values, meta, _, _ = problem(pattern, 67, 9, 1, dtype, False)
    out = torch.full_like(dense, torch.nan)
    native.unpack(isa, values, meta, out)
    assert torch.equal(out, dense)


@pytest.mark.parametrize("dtype", UNIT)
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_packing_is_exact(dtype, pattern):
    dense, values, meta, _, _ = problem(pattern, 67, 9, 1, dtype, False)
    dense[dense == 0] = torch.nan  # what is not kept is not looked at
    dense = torch.where(dense.isnan() & unpack_mask(meta, dense.shape[1]), 0, dense)
    out = torch.full_like(values, torch.nan)
    native.pack(dense, meta, out)
    assert torch.equal(out, values)


@pytest.mark.parametrize("isa", INSTRUCTION_SETS)
@pytest.mark.parametrize("tokens", [3, 70])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_infinities_and_nan_come_through(isa, tokens, dtype):
    dense, values, meta, x, _ = problem(NMPattern(2, 4), 8, 16, tokens, dtype, False)
    x[1, 5], x[2, 7] = torch.inf, torch.nan
    with force("native", isa):
        y = nm_linear(x, values, meta, None, 2, 4)
    # A weight that was dropped may count as a zero, which makes NaN of an infinity, or not at all.
    assert (dense[:, 5] != 0).any()
    assert (dense[:, 7] != 0).any()
    assert not y[1, dense[:, 5] != 0].isfinite().any()
    assert y[2, dense[:, 7] != 0].isnan().all()
    assert y[0].isfinite().all()


@pytest.mark.parametrize("isa", INSTRUCTION_SETS)
@pytest.mark.parametrize("tokens", [3, 100])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_threads_change_nothing(isa, tokens, dtype):
    pattern = NMPattern(2, 4)
    dense, values, meta, x, _ = problem(pattern, 513, 256, tokens, dtype, False)
    with force("native", isa):
        expected = nm_linear(x, values, meta, None, 2, 4)
        check(expected, x, dense, None)
        before = torch.get_num_threads()
        try:
            for threads in (2, 5, 16):
                torch.set_num_threads(threads)
                assert torch.equal(nm_linear(x, values, meta, None, 2, 4), expected)
        finally:
            torch.set_num_threads(before)


@pytest.mark.skipif("avx2" not in INSTRUCTION_SETS, reason="another processor")
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_what_is_skipped_is_multiplied_by_the_kernel_for_any_number_of_tokens(pattern):
    for isa in INSTRUCTION_SETS:
        for dtype in UNIT:
            skipped = isa != "portable" and 2 * pattern.n <= pattern.m
            f32 = skipped and dtype is torch.float32
            bf16 = isa == "avx512_bf16" and dtype is torch.bfloat16 and str(pattern) in ("2:4", "1:4", "4:8")
            assert native.skips(isa, dtype, 4096, pattern.n, pattern.m) is (f32 or bf16)
            if dtype is torch.bfloat16 and isa == "amx":
                continue  # whose tiles take any number too
            layer = NMLinear(128, 8, pattern=pattern, bias=False, dtype=dtype)
            with force(isa=isa):
                wide = widens(dtype, "cpu")
                assert explain(layer, 4096).wide is wide
                assert explain(layer, 4096).backend == ("native" if f32 or bf16 or (wide and skipped) else "panel")


@pytest.mark.skipif("avx512_bf16" not in INSTRUCTION_SETS, reason="this processor does not multiply bfloat16")
def test_groups_that_are_taken_together_must_be_there():
    assert native.skips("avx512_bf16", torch.bfloat16, 4104, 1, 4)
    assert not native.skips("avx512_bf16", torch.bfloat16, 4100, 1, 4)


@pytest.mark.parametrize("tokens", [2, 64])
def test_two_python_threads_at_once(tokens):
    pattern = NMPattern(2, 4)
    _, values, meta, x, _ = problem(pattern, 1024, 256, tokens, torch.bfloat16, False)
    with force("native"):
        expected = nm_linear(x, values, meta, None, 2, 4)
        wrong = []

        def work():
            for _ in range(50):
                if not torch.equal(nm_linear(x, values, meta, None, 2, 4), expected):
                    wrong.append(1)

        workers = [threading.Thread(target=work) for _ in range(2)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
    assert not wrong


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this platform")
def test_a_forked_child_computes():
    code = """
import os, torch
from optimum_eggs import NMLinear, NMPattern
from optimum_eggs.ops import explain
torch.set_num_threads(2)
layers = [NMLinear.from_linear(torch.nn.Linear(1024, 1024, dtype=dtype), pattern)
          for dtype in (torch.float32, torch.bfloat16) for pattern in (NMPattern(2, 4), NMPattern(6, 8))]
calls = [(layer, torch.ones(tokens, 1024, dtype=layer.weight.dtype)) for tokens in (1, 64, 1024) for layer in layers]
expected = [layer(x) for layer, x in calls]  # of 6:8 by torch's product where there are many tokens
child = os.fork()
if child == 0:
    found = [layer(x) for layer, x in calls]
    chosen = {explain(layer, len(x)).backend for layer, x in calls}
    torch.set_num_threads(1)  # torch waits for nobody now, as it would in `allclose` too
    good = all(torch.allclose(y, z, 0.02, 1e-4) for y, z in zip(found, expected)) and torch.equal(found[0], expected[0])
    os._exit(0 if good and chosen == {"native"} and explain(layers[1], 1024).backend == "panel" else 1)
raise SystemExit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True, timeout=30)


def drive(compiler, flags, runner, tmp_path):
    """Compile the kernels with their driver, and run it."""
    program = tmp_path / "drive"
    sources = [path for path in SOURCES.glob("*.c") if path.name != "module.c"]
    subprocess.run(
        [
            compiler,
            "-std=c11",
            "-O1",
            "-g1",
            *flags,
            f"-I{SOURCES}",
            *sources,
            HERE / "drive_native.c",
            "-lm",
            "-o",
            program,
        ],
        check=True,
    )
    done = subprocess.run([*runner, program], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("gcc"), reason="no gcc")
def test_no_kernel_reads_or_writes_out_of_bounds(tmp_path, monkeypatch):
    monkeypatch.setenv("ASAN_OPTIONS", "detect_leaks=0")  # OpenMP keeps its threads
    flags = ["-Wall", "-Wextra", "-Werror", "-fopenmp", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    printed = drive("gcc", flags, [], tmp_path)
    assert printed.split()[2:] == list(INSTRUCTION_SETS)


@pytest.mark.skipif(
    not (shutil.which("aarch64-linux-gnu-gcc") and shutil.which("qemu-aarch64")) or platform.machine() == "aarch64",
    reason="no compiler and emulator for 64-bit Arm (Debian: gcc-aarch64-linux-gnu libc6-dev-arm64-cross qemu-user)",
)
def test_the_kernel_for_arm_is_right(tmp_path):
    printed = drive(
        "aarch64-linux-gnu-gcc", ["-static", "-fopenmp", "-Wall", "-Wextra", "-Werror"], ["qemu-aarch64"], tmp_path
    )
    assert printed.split()[2:] == ["portable", "neon", "neon_dotprod"]
