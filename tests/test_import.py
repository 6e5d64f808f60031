from __future__ import annotations

import subprocess

import pytest

import optimum_eggs

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


def test_the_package_imports_without_optional_packages(python):
    done = run(python, HIDE + "import optimum_eggs; optimum_eggs.EGGSPruner; optimum_eggs.EGGSConfig('2:4')")
    assert done.returncode == 0, done.stderr


def test_importing_registers_and_importing_twice_is_harmless(python):
    code = (
        "import importlib, optimum_eggs; importlib.reload(optimum_eggs); "
        "from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING as m; print(m['eggs'].__name__)"
    )
    done = run(python, code)
    assert done.stdout == "EGGSHfQuantizer\n", done.stderr


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
    assert set(optimum_eggs.__all__) == {*classes, "register_importance", "__version__"}
    assert all(getattr(optimum_eggs, name) for name in optimum_eggs.__all__)
    assert set(optimum_eggs.__all__) <= set(dir(optimum_eggs))
    with pytest.raises(AttributeError, match="has no attribute 'Nothing'"):
        _ = optimum_eggs.Nothing
