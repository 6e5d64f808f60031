"""The native extension; everything else is in pyproject.toml."""

import sys
from pathlib import Path

from setuptools import Extension, setup

NATIVE = Path("optimum_eggs/ops/native")
# Apple's clang has no OpenMP runtime of its own: the kernels run on one thread there.
OPENMP = [] if sys.platform == "darwin" else ["-fopenmp"]
HEADERS = sorted(map(str, NATIVE.glob("*.h")))

setup(
    ext_modules=[
        Extension(
            "optimum_eggs.ops.native._native",
            sources=sorted(map(str, NATIVE.glob("*.c"))),
            depends=HEADERS,
            # With Python's own -fwrapv, what gcc 12 makes of the tiles of AVX-512 takes a quarter longer.
            extra_compile_args=["-O3", "-std=c11", "-fno-wrapv", *OPENMP],
            extra_link_args=OPENMP,
            py_limited_api=True,
            optional=True,  # without a compiler the package installs all the same, and says so when it is used
        ),
        Extension(
            "optimum_eggs.ops.native._torch_ops",
            sources=[str(NATIVE / "torch_ops.cpp")],
            depends=HEADERS,
            extra_compile_args=["-O2", "-std=c++17", *OPENMP],
            extra_link_args=OPENMP,
            py_limited_api=True,
            optional=True,  # without it, compiled models call the kernels by way of Python
        ),
    ],
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
