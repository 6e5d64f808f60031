"""The built wheel must bring the command, without the repository beside it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_command_works_from_a_wheel(tmp_path):
    source = tmp_path / "source"
    shutil.copytree(ROOT / "optimum_eggs", source / "optimum_eggs", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    options = ["--quiet", "--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", tmp_path]
    subprocess.run([sys.executable, "-m", "pip", "wheel", *map(str, options), str(source)], check=True)
    site = tmp_path / "site"
    with zipfile.ZipFile(next(tmp_path.glob("*.whl"))) as wheel:
        wheel.extractall(site)
    assert (site / "optimum_eggs" / "py.typed").is_file()
    assert not list((site / "optimum").rglob("__init__.py"))  # one there would hide the rest of optimum

    environment = os.environ | {"PYTHONPATH": str(site)}
    command = [str(Path(sys.executable).with_name("optimum-cli")), "eggs", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path, check=True)
    assert "{prune,evaluate,inspect,export}" in done.stdout
    code = "import optimum_eggs, optimum.commands.register as r; print(optimum_eggs.__file__, *r.__path__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert done.stdout.startswith(str(site))
