from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

import optimum_eggs

PACKAGE = Path(optimum_eggs.__file__).parent
GOLDEN = Path(__file__).parent / "golden" / "v1" / "packed"
HIDE = """
import sys
class Hide:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"peft", "datasets", "gguf", "matplotlib", "lm_eval", "scipy", "pytest", "hypothesis"}:
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Hide())
"""


def run(python, code):
    return subprocess.run([python, "-c", code], capture_output=True, text=True)


@pytest.mark.slow
def test_the_package_imports_without_optional_packages(python):
    done = run(python, HIDE + "import optimum_eggs; optimum_eggs.EGGSPruner; optimum_eggs.EGGSConfig('2:4')")
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_importing_registers_and_importing_twice_is_harmless(python):
    code = (
        "import importlib, optimum_eggs; importlib.reload(optimum_eggs); "
        "from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING as m; print(m['eggs'].__name__)"
    )
    done = run(python, code)
    assert done.stdout == "EGGSHfQuantizer\n", done.stderr


@pytest.mark.parametrize(
    "first",
    [
        "import optimum_eggs",
        *(
            pytest.param(order, marks=pytest.mark.slow)
            for order in (
                "import transformers, optimum_eggs",
                "import transformers.modeling_utils, optimum_eggs",
                "import optimum_eggs.hf.quantizer",
                "import optimum_eggs.ops",
                "import optimum_eggs, threading as t; i = t.Thread(None, __import__, None, ['torch']); "
                "i.start(); i.join()",
            )
        ),
    ],
)
def test_packed_models_load_after_any_order_of_imports(first, python):
    code = (
        f"{first}; from transformers import AutoModelForCausalLM; "
        f"model = AutoModelForCausalLM.from_pretrained({str(GOLDEN)!r}); "
        "import torch, sys; print(type(model.hf_quantizer).__name__, bool(torch.ops.optimum_eggs.nm_linear))"
        "; assert not any('_AfterImport' in type(finder).__name__ and finder.name != 'peft.tuners.lora.model' "
        "for finder in sys.meta_path)"
    )
    done = run(python, code)
    assert done.stdout == "EGGSHfQuantizer True\n", done.stderr


@pytest.mark.slow
def test_the_operation_is_there_as_soon_as_torch_is(python):
    for first in ("torch, optimum_eggs", "optimum_eggs, torch"):
        done = run(python, f"import {first}; print(torch.ops.optimum_eggs.nm_linear.default)")
        assert done.stdout == "optimum_eggs.nm_linear.default\n", done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("part", sorted(path.stem for path in PACKAGE.glob("[a-z]*") if path.suffix in ("", ".py")))
def test_any_part_may_be_imported_first(part, python):
    done = run(python, f"import optimum_eggs.{part}, torch; print(torch.ops.optimum_eggs.nm_linear.default)")
    assert done.stdout == "optimum_eggs.nm_linear.default\n", done.stderr


def test_importing_alone_imports_neither_torch_nor_transformers(python):
    done = run(python, "import sys, optimum_eggs; print({'torch', 'transformers', 'numpy'} & set(sys.modules))")
    assert done.stdout == "set()\n", done.stderr


def test_a_module_whose_import_failed_is_waited_for_again(python, tmp_path):
    (tmp_path / "theirs.py").write_text("import os\nif 'FAIL' in os.environ: raise ImportError('not yet')\n")
    (tmp_path / "ours.py").write_text("import theirs\nprint('ours')\n")
    code = (
        f"import os, sys; sys.path.insert(0, {str(tmp_path)!r}); from optimum_eggs.imports import after_import\n"
        "for _ in range(2): after_import('theirs', 'ours')\n"
        "os.environ['FAIL'] = '1'\n"
        "try: import theirs\nexcept ImportError: print('failed')\n"
        "del os.environ['FAIL']\nimport theirs; print('theirs')\nafter_import('theirs', 'ours')"
    )
    done = run(python, code)
    assert done.stdout == "failed\nours\ntheirs\n", done.stderr


def test_optimum_cli_starts_without_importing_torch(python):
    code = (
        "import sys; sys.argv = ['optimum-cli']; import optimum.commands.optimum_cli as c\n"
        "try: c.main()\nexcept SystemExit: pass\n"
        "print('torch' in sys.modules)"
    )
    done = run(python, code)
    assert done.stdout.endswith("False\n")
    assert "eggs" in done.stdout


def test_exports():
    classes = {"EGGSConfig", "EGGSPruner", "NMLinear", "NMPattern"}
    assert set(optimum_eggs.__all__) == {*classes, "compile_generation", "register_importance", "__version__"}
    assert all(getattr(optimum_eggs, name) for name in optimum_eggs.__all__)
    assert set(optimum_eggs.__all__) <= set(dir(optimum_eggs))
    with pytest.raises(AttributeError, match="has no attribute 'Nothing'"):
        _ = optimum_eggs.Nothing
