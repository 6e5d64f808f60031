"""Python imports this at its start if the folder is in PYTHONPATH: the hook, then the `sitecustomize` it has hidden."""

import os
import sys

_HERE = os.path.dirname(os.path.abspath(__file__))

if __name__ == "sitecustomize":
    with open(os.path.join(_HERE, "hook.py"), encoding="utf-8") as _hook:
        exec(compile(_hook.read(), _hook.name, "exec"), {"__name__": "optimum_eggs_hook"})
    _rest = [_path for _path in sys.path if os.path.abspath(_path) != _HERE]
    _spec = next(filter(None, (_finder.find_spec("sitecustomize", _rest) for _finder in sys.meta_path)), None)
    if _spec is not None and _spec.loader is not None:
        _next = type(sys)("sitecustomize")  # importlib.util would take ten times as long as all of this
        _next.__spec__, _next.__loader__, _next.__file__ = _spec, _spec.loader, _spec.origin
        sys.modules["sitecustomize"] = _next
        _spec.loader.exec_module(_next)
