"""The built wheel must bring the command, without the repository beside it."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

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

    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_EDITABLE, str(site), "eggs", "--help"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert "{prune,evaluate,inspect,export}" in done.stdout, done.stderr
    assert f"from {site}" in done.stderr
