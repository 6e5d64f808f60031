"""Publish a pruned model with its card, and load it back by its id, as anyone would.

    python examples/push_to_hub.py PACKED me/model-2-4

Without a token of the Hub (`hf auth login`), the same happens on a small server on this machine that speaks the Hub's
protocol, so that the example can be tried; what it published is gone when it ends.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from huggingface_hub import get_token

PUSH = """
import sys
from optimum_eggs import EGGSPruner
print("published:", EGGSPruner.push_to_hub(sys.argv[1], sys.argv[2]))
"""
LOAD = """
import sys
import optimum_eggs  # makes transformers know the format
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[2])
print("loaded:", sum(isinstance(module, optimum_eggs.NMLinear) for module in model.modules()), "packed layers")
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", help="folder of a packed model")
    parser.add_argument("repository", help="id on the Hub: user/name")
    args = parser.parse_args()

    if get_token():
        publish_and_load(args.folder, args.repository, dict(os.environ))
        return
    print("no token: publishing to a server on this machine instead")
    sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "sharing"))
    from loopback_hub import LoopbackHub

    with LoopbackHub(user=args.repository.split("/")[0]) as hub, tempfile.TemporaryDirectory() as home:
        local = {"HF_ENDPOINT": hub.endpoint, "HF_TOKEN": hub.token, "HF_HOME": home, "HF_HUB_DISABLE_XET": "1"}
        publish_and_load(args.folder, args.repository, os.environ | local | {"HF_HUB_OFFLINE": "0"})


def publish_and_load(folder: str, repository: str, environment: dict[str, str]) -> None:
    """Each in a process of its own: the Hub's address is read when huggingface_hub is imported."""
    for code in (PUSH, LOAD):
        subprocess.run([sys.executable, "-c", code, folder, repository], check=True, env=environment)


if __name__ == "__main__":
    main()
