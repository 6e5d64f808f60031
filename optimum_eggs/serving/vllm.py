"""The entry point `vllm.general_plugins`: vLLM calls it in each of its processes, whatever it serves."""

from __future__ import annotations

import logging

VERSION = "0.32"


def register() -> None:
    """Make the format known to vLLM, if it is of a version that is known here; else say so in its log."""
    try:
        from . import vllm_layers
    except ImportError as error:
        logging.getLogger(f"vllm.{__name__}").warning(  # vLLM shows the loggers below its own
            "optimum-eggs serves packed models by vLLM %s, and this is another version (%s)", VERSION, error
        )
        return
    vllm_layers.register()
