"""`revision`, `token` and `trust_remote_code` reach whatever is loaded. Each run is a process with its own cache."""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
import textwrap
import traceback
from pathlib import Path

import pytest
from forks import Forks

from optimum_eggs.errors import ModelError
from optimum_eggs.hf.loading import translated

sys.path.insert(0, str(Path(__file__).parents[1] / "sharing"))
from loopback_hub import Commit, LoopbackHub, Repository

START = """
import json, sys
from transformers import AutoModelForCausalLM
from optimum_eggs import EGGSConfig, EGGSPruner
from optimum_eggs.streaming import prune_checkpoint
model, text, out = sys.argv[1:4]
options = json.loads(sys.argv[4])
config = EGGSConfig("2:4", num_samples=8, seq_len=16, band=8, calibration=text, token=options.get("token"))
"""
ROADS = {
    "in memory": """
pruner = EGGSPruner.from_pretrained(model, **options)
pruner.prune(config, progress=False)
pruner.save_pretrained(out)
""",
    "on load": """
pruned = AutoModelForCausalLM.from_pretrained(model, quantization_config=config, **options)
pruned.save_pretrained(out)
pruned.hf_quantizer.report.save(out + "/report.json")
""",
    "from disk": """
prune_checkpoint(model, out, config, progress=False, **options)
""",
}


@pytest.fixture
def run(own_forks):
    shutil.rmtree(own_forks.environment["HF_HOME"], ignore_errors=True)

    def run(code, *arguments, **environment):
        known = {key: value for key, value in own_forks.environment.items() if key != "HF_TOKEN"}
        return own_forks.run("-c", START + code, *arguments, environment=known | environment, check=True)

    return run


@pytest.fixture(scope="module")
def hub(dense_folder):
    """A private repository whose branch `v1` holds a model and its tokenizer, and whose `main` holds nothing of use."""
    files = {path.name: path.read_bytes() for path in dense_folder.iterdir()}
    branches = {
        name: [Commit(hashlib.sha1(name.encode()).hexdigest(), name, held)]
        for name, held in (("main", {"README.md": b"moved"}), ("v1", files))
    }
    with LoopbackHub(token="hf_" + "x1" * 17) as made:
        made.repositories["me/private"] = Repository(private=True, branches=branches)
        yield made


@pytest.fixture(scope="module")
def own_forks(hub, tmp_path_factory):
    """Processes that know no other hub."""
    home = str(tmp_path_factory.mktemp("home") / "hf")
    with Forks(HF_ENDPOINT=hub.endpoint, HF_HUB_OFFLINE="0", HF_HUB_DISABLE_XET="1", HF_HOME=home) as forks:
        yield forks


@pytest.mark.slow
@pytest.mark.parametrize("road", ROADS)
def test_revision_and_token_hold_for_model_and_tokenizer(road, run, hub, text_file, tmp_path):
    out = tmp_path / "out"
    options = json.dumps({"revision": "v1", "token": hub.token})
    run(ROADS[road], "me/private", text_file, out, options)
    report = json.loads((out / "report.json").read_text())
    assert report["base_model"] == {"id": "me/private", "revision": hub.repositories["me/private"].at("v1").oid}
    assert len(report["layers"]) == 14
    for path in out.rglob("*.json"):
        assert hub.token not in path.read_text()


@pytest.mark.parametrize("kind", [OSError, RuntimeError, Exception])
def test_a_token_is_not_shown(kind):
    secret = "hf_" + "x1" * 17

    def load():
        with translated("me/private", "model", f"{secret}\n"):
            try:
                raise Exception(f"Illegal header value b'Bearer {secret}\\n'")
            except Exception as cause:
                raise kind("cannot be sent") from cause

    with pytest.raises(ModelError, match=r"me/private: cannot load the model: cannot be sent") as caught:
        load()
    assert secret not in "".join(traceback.format_exception(caught.value))


MODEL = """
import os, pathlib
from transformers import LlamaConfig, LlamaForCausalLM
pathlib.Path(os.environ["MARK"]).touch()
class OwnConfig(LlamaConfig):
    model_type = "own_llama"
class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig
"""
TOKENIZER = """
from transformers import PreTrainedTokenizerFast
class OwnTokenizer(PreTrainedTokenizerFast):
    pass
"""


@pytest.fixture
def remote(dense_folder, tmp_path):
    """A model whose code is in its folder."""
    folder = shutil.copytree(dense_folder, tmp_path / "remote")
    (folder / "own.py").write_text(MODEL)
    (folder / "own_tokenizer.py").write_text(TOKENIZER)
    for name, changes in {
        "config.json": {
            "model_type": "own_llama",
            "architectures": ["OwnForCausalLM"],
            "auto_map": {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnForCausalLM"},
        },
        "tokenizer_config.json": {
            "tokenizer_class": "OwnTokenizer",
            "auto_map": {"AutoTokenizer": [None, "own_tokenizer.OwnTokenizer"]},
        },
    }.items():
        values = json.loads((folder / name).read_text()) | changes
        (folder / name).write_text(json.dumps(values))
    return folder


LOAD = """
import os, pathlib
assert pathlib.Path(os.environ["MARK"]).exists()
again = AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True)
assert type(again).__name__ == "OwnForCausalLM"
assert sum(type(module).__name__ == "NMLinear" for module in again.modules()) == 14
"""
REFUSE = "refused = []\n" + "".join(
    f"try:\n{textwrap.indent(code, '    ')}\nexcept (ValueError, OSError) as error:\n    refused.append(str(error))\n"
    for code in ROADS.values()
)


def test_code_of_a_model_is_not_run_unasked(run, remote, text_file, tmp_path):
    out, mark = tmp_path / "out", tmp_path / "mark"
    done = run(REFUSE + "print(); print(json.dumps(refused))", remote, text_file, out, "{}", MARK=str(mark))
    refused = json.loads(done.stdout.splitlines()[-1])  # behind what transformers asks
    assert len(refused) == 3
    assert all("trust_remote_code=True" in message for message in refused), refused
    assert not mark.exists()
    assert not out.exists()


@pytest.mark.parametrize("road", ROADS)
def test_code_of_a_model_is_run_if_that_is_asked_for(road, run, remote, text_file, tmp_path):
    options, mark = json.dumps({"trust_remote_code": True}), str(tmp_path / "mark")
    run(ROADS[road] + LOAD, remote, text_file, tmp_path / "out", options, MARK=mark)
    assert (tmp_path / "out" / "own.py").is_file()


COMMANDS = """
evaluate {out} --text {text} --seq-len 16 --num-windows 2
benchmark {out} --prompt 4 --new-tokens 2 --repeats 1 --layer-repeats 1 --batch 1
recover {out} {next} --train {text} --steps 2 --seq-len 16 --batch-size 1 --method values
export {out} {next}
pack {zeros} {next}
"""
RUN = """
import contextlib, io, os, shutil
from optimum_eggs.cli.main import main
pruner.model.dequantize().save_pretrained(out + "-zeros")
places = {"out": out, "text": text, "next": out + "-next", "zeros": out + "-zeros"}
for line in sys.argv[5].split("\\n"):
    words = [word.format(**places) for word in line.split()]
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        status = main(words)
    assert status == 2 and "--trust-remote-code" in said.getvalue(), (line, status, said.getvalue())
    assert not os.path.exists(places["next"])
    assert main([*words, "--trust-remote-code"]) == 0, line
    shutil.rmtree(places["next"], ignore_errors=True)
"""


@pytest.mark.slow
def test_commands_run_the_code_of_a_model_if_that_is_asked_for(run, remote, text_file, tmp_path):
    options, mark = json.dumps({"trust_remote_code": True}), str(tmp_path / "mark")
    run(ROADS["in memory"] + RUN, remote, text_file, tmp_path / "out", options, COMMANDS.strip(), MARK=mark)
