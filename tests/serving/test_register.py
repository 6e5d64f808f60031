"""What vLLM calls in each of its processes, where it is of another version, or as here not there at all."""

import sys

from optimum_eggs import serving
from optimum_eggs.serving.vllm import register


def test_another_version_is_said_and_stops_nothing(monkeypatch, caplog):
    monkeypatch.delattr(serving, "vllm_layers", raising=False)
    monkeypatch.setitem(sys.modules, "optimum_eggs.serving.vllm_layers", None)  # its import fails
    register()
    assert "serves packed models by vLLM 0.32" in caplog.text
