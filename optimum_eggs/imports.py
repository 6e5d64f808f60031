"""Importing a module of ours as soon as another package is imported, and not before.

What makes transformers know packed checkpoints needs transformers, whose import takes seconds, as torch's does. A
program that uses neither yet, such as the command line when it prints its help, need not wait for them.
"""

from __future__ import annotations

import importlib
import importlib.abc
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any


def after_import(name: str, *ours: str) -> None:
    """Import the modules `ours` once the module `name` has been imported; at once if it has been. Twice is harmless.

    They may import `name` themselves, and may be imported first: each is run once, and never before `name` is whole.
    """
    if name in sys.modules:
        for module in ours:
            importlib.import_module(module)
    elif not any(isinstance(finder, _AfterImport) and finder.name == name for finder in sys.meta_path):
        sys.meta_path.insert(0, _AfterImport(name, *ours))


class _AfterImport(importlib.abc.MetaPathFinder):
    """Finds one module as the other finders do, and imports ours when it has been run."""

    def __init__(self, name: str, *ours: str) -> None:
        self.name, self.ours = name, ours

    def find_spec(self, fullname: str, path: Any = None, target: ModuleType | None = None) -> ModuleSpec | None:
        """The spec of the module waited for, with a loader that goes on to ours; None for every other name."""
        spec = self._found(fullname, path, target) if fullname == self.name else None
        if spec is None or spec.loader is None:
            return spec
        run = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            run(module)
            if self in sys.meta_path:
                sys.meta_path.remove(self)
            for name in self.ours:
                importlib.import_module(name)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec

    def _found(self, fullname: str, path: Any, target: ModuleType | None) -> ModuleSpec | None:
        # Not importlib.util.find_spec, which would ask this finder again.
        specs = (finder.find_spec(fullname, path, target) for finder in sys.meta_path if finder is not self)
        return next((spec for spec in specs if spec is not None), None)
