"""Imports point one way: a module may import from its own layer's left, never from its right."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import optimum_eggs

PACKAGE = Path(optimum_eggs.__file__).parent
LAYERS = [
    ["access", "dtypes", "errors", "imports", "interrupts", "logs", "version"],
    ["devices", "pattern", "malloc", "measure", "memory", "huge_pages", "ranks", "strict_json", "locks"],
    ["files", "autoload", "startup"],
    ["importance", "packing", "presets", "folders", "runs", "names", "validation"],
    ["ops"],
    ["masks"],
    ["update"],
    ["config"],
    ["nn"],
    ["calibration"],
    ["engine"],
    ["hf", "serving"],
    ["pruner", "quantize", "inspection", "evaluation", "speed", "streaming"],
    ["recovery", "sharing", "report"],
    ["cli"],
    ["__init__", "__main__"],
]
RANK = {name: rank for rank, layer in enumerate(LAYERS) for name in layer}
FILES = sorted(PACKAGE.rglob("*.py"))


def part_of(path):
    relative = path.relative_to(PACKAGE)
    return relative.parts[0].removesuffix(".py")


def imports(path, top_level_only):
    """Absolute dotted names that a file imports."""
    tree = ast.parse(path.read_text())
    package = ["optimum_eggs", *path.relative_to(PACKAGE).parent.parts]
    nodes = list(tree.body) if top_level_only else list(ast.walk(tree))
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            stem = [*base, *([node.module] if node.module else [])]
            if node.module:
                yield ".".join(stem)
            else:
                yield from (".".join([*stem, alias.name]) for alias in node.names)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_left(path):
    own = part_of(path)
    assert own in RANK, f"{own} has no place in the layers"
    for name in imports(path, top_level_only=True):
        if not name.startswith("optimum_eggs."):
            continue
        other = name.split(".")[1]
        assert other == own or RANK[other] < RANK[own], f"{own} imports {other}, which is not left of it"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_only_the_right_end_imports_transformers_at_the_top(path):
    # config must subclass what transformers looks for; everything else left of hf works without it.
    if RANK[part_of(path)] < RANK["hf"] and part_of(path) != "config":
        assert not any(name.split(".")[0] == "transformers" for name in imports(path, top_level_only=True))


def test_optional_packages_are_nowhere_imported_at_the_top():
    optional = {"peft", "matplotlib", "lm_eval", "gguf", "datasets", "scipy", "triton"}
    # These extend classes or compile functions of such a package, and are imported by those that found it there.
    exceptions = {"recovery/install.py", "recovery/lora.py", "ops/triton/decode.py"}
    for path in FILES:
        if str(path.relative_to(PACKAGE)) not in exceptions:
            assert not optional & {name.split(".")[0] for name in imports(path, top_level_only=True)}, path
