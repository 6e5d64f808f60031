"""The built wheel must bring the command, without the repository beside it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

# The tests may run on an editable install, which would register the command a second time.
WITHOUT_EDITABLE = """
import sys
sys.meta_path[:] = [finder for finder in sys.meta_path if "editable" not in getattr(finder, "__module__", "")]
site = sys.argv.pop(1)
sys.path[:] = [site, *(path for path in sys.path if "editable" not in path)]
import optimum_eggs
print("from", optimum_eggs.__file__, file=sys.stderr)
from optimum.commands.optimum_cli import main
main()
"""

ROOT = Path(__file__).parents[2]


def build(tmp_path, **environment):
    """The folder that a wheel built from the sources alone unpacks to."""
    source, site = tmp_path / "source", tmp_path / "site"
    ignored = shutil.ignore_patterns("__pycache__", "*.so")
    shutil.copytree(ROOT / "optimum_eggs", source / "optimum_eggs", ignore=ignored)
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    options = ["--quiet", "--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", tmp_path]
    command = [sys.executable, "-m", "pip", "wheel", *map(str, options), str(source)]
    subprocess.run(command, check=True, env=os.environ | environment)
    with zipfile.ZipFile(next(tmp_path.glob("*.whl"))) as wheel:
        wheel.extractall(site)
    return site


def test_without_a_compiler_the_package_installs_all_the_same(tmp_path):
    site = build(tmp_path, CC="false", CXX="false")
    assert (site / "optimum_eggs" / "ops" / "native" / "__init__.py").is_file()
    assert not list(site.rglob("*.so"))


@pytest.mark.slow
def test_the_command_works_from_a_wheel(tmp_path):
    site = build(tmp_path)
    if shutil.which(sysconfig.get_config_var("CC").split()[0]):
        (extension,) = (site / "optimum_eggs" / "ops" / "native").glob("_native*")
        assert ".abi3." in extension.name  # one build for every Python
    if shutil.which(sysconfig.get_config_var("CXX").split()[0]):
        (extension,) = (site / "optimum_eggs" / "ops" / "native").glob("_torch_ops*")
        assert ".abi3." in extension.name
    assert (site / "optimum_eggs" / "py.typed").is_file()
    for name in ("sample.txt.gz", "sample.md"):
        shipped = site / "optimum_eggs" / "calibration" / name
        assert shipped.read_bytes() == (ROOT / "optimum_eggs" / "calibration" / name).read_bytes()
    assert not list((site / "optimum").rglob("__init__.py"))  # one there would hide the rest of optimum

    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_EDITABLE, str(site), "eggs", "--help"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert "{prune,pack,quantize,evaluate,inspect,export,benchmark,recover,report,push}" in done.stdout, done.stderr
    assert f"from {site}" in done.stderr
