"""Pushing and pulling over a real socket, with the real client, each in a process of its own."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
from transformers import AutoModelForCausalLM

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))
from forks import Forks  # noqa: E402
from loopback_hub import LoopbackHub  # noqa: E402

from optimum_eggs.sharing.models import _same_weights  # noqa: E402


@pytest.fixture
def packed_folder(packed_folder, tmp_path_factory):
    """A copy: some tests write to it."""
    return shutil.copytree(packed_folder, tmp_path_factory.mktemp("pushed") / "llama")


@pytest.fixture(scope="module")
def clients(tmp_path_factory):
    """A hub, and processes that know no other."""
    with LoopbackHub() as hub:
        known = {
            "HF_ENDPOINT": hub.endpoint,
            "HF_HUB_DISABLE_XET": "1",
            "HF_HOME": str(tmp_path_factory.mktemp("clients") / "hf"),
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_IMPLICIT_TOKEN": "0",
        }
        with Forks(**known) as forks:
            yield hub, forks


@pytest.fixture
def hub(clients):
    """The hub, with nothing on it."""
    made, forks = clients
    made.clear()
    shutil.rmtree(forks.environment["HF_HOME"], ignore_errors=True)
    yield made
    assert made.unknown == []


@pytest.fixture
def client(clients):
    """Run Python code against the hub, and return what it printed."""

    def run(code, *arguments, token="hf_test", offline=False, check=True):
        environment = {key: value for key, value in clients[1].environment.items() if key != "HF_TOKEN"}
        if token:
            environment["HF_TOKEN"] = token
        if not offline:
            return clients[1].run("-c", code, *arguments, environment=environment, check=check)
        command = [sys.executable, "-W", "ignore", "-c", code, *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, env=environment | {"HF_HUB_OFFLINE": "1"})

    return run


PUSH = """
import sys
from optimum_eggs.cli.main import main
sys.exit(main(["push", *sys.argv[1:]]))
"""
LOGITS = """
import sys, json, torch, optimum_eggs
from transformers import AutoModelForCausalLM
options = json.loads(sys.argv[2]) if len(sys.argv) > 2 else {}
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], **options).eval()
with torch.no_grad():
    print(json.dumps(model(input_ids=torch.arange(8)[None]).logits.flatten().tolist()[:50]))
"""


@pytest.mark.slow
def test_a_folder_is_pushed_in_one_commit_and_loads_back(hub, client, packed_folder):
    done = client(PUSH, packed_folder, "me/tiny", "--json")
    pushed = json.loads(done.stdout)
    commits = hub.repositories["me/tiny"].branches["main"]
    assert [commit.oid for commit in commits[1:]] == [pushed["commit"]]
    files = hub.files("me/tiny")
    assert {"README.md", "report.json", "config.json", "model.safetensors", "tokenizer.json"} <= files.keys()
    card = files["README.md"].decode()
    assert 'from_pretrained("me/tiny")' in card
    assert "'2:4'" in card.split("---")[1]
    local = client(LOGITS, packed_folder).stdout
    assert client(LOGITS, "me/tiny").stdout == local
    assert client(LOGITS, "me/tiny", offline=True).stdout == local  # from the cache
    assert client(LOGITS, "me/tiny", json.dumps({"revision": pushed["commit"]})).stdout == local


def test_a_branch_and_a_pull_request(hub, client, packed_folder):
    client(PUSH, packed_folder, "me/tiny", "--revision", "two-four")
    assert "model.safetensors" not in hub.files("me/tiny")
    assert "model.safetensors" in hub.files("me/tiny", "two-four")
    local = client(LOGITS, packed_folder).stdout
    assert client(LOGITS, "me/tiny", json.dumps({"revision": "two-four"})).stdout == local
    done = client(PUSH, packed_folder, "me/tiny", "--create-pr")
    assert "/discussions/" in done.stdout
    assert "model.safetensors" not in hub.files("me/tiny")


def test_the_pruner_pushes_what_it_holds_in_shards(hub, client, dense_folder, text_file, tmp_path):
    code = """
import sys
from optimum_eggs import EGGSConfig, EGGSPruner
pruner = EGGSPruner.from_pretrained(sys.argv[1])
pruner.prune(EGGSConfig("2:4", num_samples=8, seq_len=16, band=8), calibration=sys.argv[2], progress=False)
pruner.save_pretrained(sys.argv[3])
print(pruner.push_to_hub("me/tiny", max_shard_size="20KB"))
"""
    done = client(code, dense_folder, text_file, tmp_path / "saved")
    assert done.stdout.startswith(f"{hub.endpoint}/me/tiny/commit/")
    assert sum(name.endswith(".safetensors") for name in hub.files("me/tiny")) > 1
    local = client(LOGITS, tmp_path / "saved").stdout
    assert client(LOGITS, "me/tiny").stdout == local


PRUNE = """
import sys
import optimum_eggs.pruner
from optimum_eggs.cli.main import main
optimum_eggs.pruner.EGGSPruner.prune = None  # in memory it would fail
sys.exit(main(["prune", *sys.argv[1:], "--num-samples", "8", "--seq-len", "16"]))
"""


@pytest.mark.parametrize("sharded", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_model_on_the_hub_is_pruned_block_by_block(sharded, clients, hub, client, dense_folder, text_file, tmp_path):
    folder = tmp_path / "dense"
    if sharded:
        model = AutoModelForCausalLM.from_pretrained(dense_folder)
        model.save_pretrained(folder, max_shard_size="20KB")
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(dense_folder / name, folder)
    else:
        shutil.copytree(dense_folder, folder)
    (folder / "pytorch_model.bin").write_bytes(b"pickled")
    (folder / "consolidated.safetensors").write_bytes(b"the same weights once more")
    upload = "import sys, huggingface_hub as h; h.create_repo(sys.argv[2]); h.upload_folder(repo_id=sys.argv[2], "
    client(upload + "folder_path=sys.argv[1])", folder, "me/dense")
    client(PRUNE, "me/dense", tmp_path / "out", "--calibration", text_file)
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    revision = hub.repositories["me/dense"].branches["main"][-1].oid
    assert report["base_model"] == {"id": "me/dense", "revision": revision}
    cached = {path.name for path in Path(clients[1].environment["HF_HOME"], "hub").rglob("snapshots/*/*")}
    assert {"config.json", "tokenizer.json"} < cached
    assert not {"pytorch_model.bin", "consolidated.safetensors"} & cached
    client(PRUNE, folder, tmp_path / "local", "--calibration", text_file)
    for file in (tmp_path / "local").glob("*.safetensors"):
        assert file.read_bytes() == (tmp_path / "out" / file.name).read_bytes()
    if sharded:
        client(PRUNE, "me/dense", tmp_path / "again", "--calibration", text_file, offline=True)


def test_a_model_that_is_not_on_the_hub(hub, client, text_file, tmp_path):
    done = client(PRUNE, "me/none", tmp_path / "out", "--calibration", text_file, check=False)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: me/none: there is no such folder, and no such model on the Hub")
    assert not (tmp_path / "out").exists()


def test_the_class_pushes_a_folder(hub, client, packed_folder):
    code = """
import sys
from optimum_eggs import EGGSPruner
print(EGGSPruner.push_to_hub(sys.argv[1], "me/tiny", commit_message="first"))
"""
    printed = client(code, packed_folder).stdout
    (commit,) = hub.repositories["me/tiny"].branches["main"][1:]
    assert printed.strip() == f"{hub.endpoint}/me/tiny/commit/{commit.oid}"
    assert commit.message == "first"
    assert hub.files("me/tiny")["model.safetensors"] == (packed_folder / "model.safetensors").read_bytes()


def test_what_was_written_into_the_card_on_the_hub_is_kept(hub, client, packed_folder, tmp_path):
    folder = shutil.copytree(packed_folder, tmp_path / "copy")
    client(PUSH, folder, "me/tiny")
    files = hub.repositories["me/tiny"].branches["main"][-1].files
    files["README.md"] = files["README.md"].replace(b"# tiny\n", b"# tiny\n\nWritten by hand.\n")
    edited = files["README.md"]
    assert b"Written by hand." in edited
    client(PUSH, folder, "me/tiny", "--revision", "new")
    assert hub.files("me/tiny", "new")["README.md"] == edited
    client(PUSH, folder, "me/tiny")
    assert hub.files("me/tiny")["README.md"] == edited
    (folder / "README.md").write_text("# tiny\n\nOf the folder.\n")  # text of the folder's own goes before
    client(PUSH, folder, "me/tiny")
    card = hub.files("me/tiny")["README.md"]
    assert b"Of the folder." in card
    assert b"Written by hand." not in card
    assert b"The certificate" in card


def test_a_plain_push_of_a_model_ends_with_our_card(hub, client, packed_folder):
    code = """
import sys, optimum_eggs
from transformers import AutoModelForCausalLM
print(AutoModelForCausalLM.from_pretrained(sys.argv[1]).push_to_hub("me/plain", private=True))
"""
    client(code, packed_folder)
    files = hub.files("me/plain")
    assert hub.repositories["me/plain"].private
    assert b"The certificate" in files["README.md"]
    assert "report.json" in files
    # Pulled by another user and pushed again, the report comes along.
    again = code.replace("me/plain", "me/again")
    client(again, "me/plain")
    assert b"The certificate" in hub.files("me/again")["README.md"]


def test_a_model_of_a_subfolder_and_of_a_branch_is_pushed_with_its_report(hub, client, packed_folder, tmp_path):
    shutil.copytree(packed_folder, tmp_path / "all" / "one")
    code = """
import json, sys, optimum_eggs
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], **json.loads(sys.argv[3]))
print(model.push_to_hub(sys.argv[2]))
"""
    client(code, tmp_path / "all", "me/local", json.dumps({"subfolder": "one"}))
    assert b"The certificate" in hub.files("me/local")["README.md"]
    upload = (
        "import sys, huggingface_hub as h; h.create_repo(sys.argv[2]); h.create_branch(sys.argv[2], branch='other'); "
    )
    upload += "h.upload_folder(repo_id=sys.argv[2], folder_path=sys.argv[1], revision='other')"
    client(upload, tmp_path / "all", "me/all")
    client(code, "me/all", "me/hub", json.dumps({"subfolder": "one", "revision": "other"}))
    assert b"The certificate" in hub.files("me/hub")["README.md"]


def test_a_model_that_was_pruned_again_is_pushed_with_its_own_report(hub, client, packed_folder, text_file):
    code = """
import sys
from optimum_eggs import EGGSConfig, EGGSPruner
pruner = EGGSPruner.from_pretrained(sys.argv[1])
pruner.model.dequantize()
pruner.prune(EGGSConfig("1:4", num_samples=8, seq_len=16, band=8), calibration=sys.argv[2], progress=False)
pruner.model.push_to_hub("me/again")
"""
    client(code, packed_folder, text_file)
    assert json.loads(hub.files("me/again")["report.json"])["config"]["n"] == 1
    assert b"The certificate" in hub.files("me/again")["README.md"]


def test_weights_that_changed_take_no_measurement_along(hub, client, packed_folder, tmp_path):
    code = """
import shutil, sys, optimum_eggs
from optimum_eggs.engine.report import update_report
from transformers import AutoModelForCausalLM
shutil.copytree(sys.argv[1], sys.argv[2])
entry = {"dataset": "d", "split": None, "conditions": "c", "metrics": {"perplexity": 12.34}}
update_report(sys.argv[2], evaluations=[entry])
model = AutoModelForCausalLM.from_pretrained(sys.argv[2])
model.push_to_hub("me/same", tags=["mine"])
model.push_to_hub("me/shards", max_shard_size="20KB")
model.model.layers[0].mlp.down_proj.weight.data.mul_(2)
model.push_to_hub("me/changed")
model.push_to_hub("me/changed-shards", max_shard_size="20KB")
"""
    client(code, packed_folder, tmp_path / "copy")
    names = ("me/same", "me/changed", "me/shards", "me/changed-shards")
    same, changed, shards, changed_shards = (hub.files(name)["README.md"].decode() for name in names)
    assert sum(name.endswith(".safetensors") for name in hub.files("me/shards")) > 1
    assert "12.34" in same
    assert "12.34" in shards
    assert "12.34" not in changed_shards
    assert "- mine" in same.split("---")[1]
    assert "12.34" not in changed
    assert "The certificate" in changed


def test_a_model_without_a_report_is_pushed_by_transformers_with_a_warning(hub, client, packed_folder, tmp_path):
    code = """
import sys, optimum_eggs
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
model.save_pretrained(sys.argv[2])
AutoModelForCausalLM.from_pretrained(sys.argv[2]).push_to_hub("me/plain")
"""
    done = client(code, packed_folder, tmp_path / "bare")
    assert "no report.json was found" in done.stderr
    assert b"The certificate" not in hub.files("me/plain")["README.md"]


def test_weights_are_the_same_in_whatever_files(packed_folder, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(packed_folder)
    model.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    assert _same_weights(tmp_path / "shards", packed_folder)
    file = max((tmp_path / "shards").glob("*.safetensors"), key=lambda path: path.stat().st_size)
    file.write_bytes(file.read_bytes()[:-8])
    assert not _same_weights(packed_folder, tmp_path / "shards")
    model.model.norm.weight.data[0] += 1
    model.save_pretrained(tmp_path / "changed", max_shard_size="20KB")
    assert not _same_weights(tmp_path / "changed", packed_folder)


def test_the_card_validates_as_the_hub_asks(hub, client, packed_folder):
    client(PUSH, packed_folder, "me/tiny")
    # Before there is a repository, and by huggingface_hub with the commit.
    assert {content.encode() for content in hub.validated} == {hub.files("me/tiny")["README.md"]}


@pytest.mark.parametrize("token", [None, "hf_wrong"])
def test_without_a_token_nothing_is_pushed_and_the_error_says_what_to_do(token, hub, client, packed_folder):
    done = client(PUSH, packed_folder, "me/tiny", token=token, check=False)
    assert done.returncode == 2
    assert "hf auth login" in done.stderr
    assert "Traceback" not in done.stderr
    assert hub.repositories == {}


def test_a_private_model_is_not_seen_without_a_token(hub, client, packed_folder):
    client(PUSH, packed_folder, "me/secret", "--private")
    done = client(LOGITS, "me/secret", token=None, check=False)
    assert done.returncode != 0
    assert "me/secret" in done.stderr


def test_an_upload_that_fails_publishes_nothing(hub, client, packed_folder):
    hub.fail_uploads = True
    done = client(PUSH, packed_folder, "me/tiny", check=False)
    assert done.returncode == 2, done.stderr
    assert "me/tiny" in done.stderr
    assert hub.files("me/tiny") == {}


def test_a_damaged_folder_is_not_pushed(hub, client, packed_folder, tmp_path):
    folder = tmp_path / "damaged"
    shutil.copytree(packed_folder, folder)
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-200] + b"\xff" * 200)
    assert "error: " in refused(client(PUSH, folder, "me/tiny", check=False))
    weights.write_bytes(whole)
    tiny.flip_a_bit(weights)
    assert "its bytes are not those that were saved" in refused(client(PUSH, folder, "me/tiny", check=False))
    assert hub.repositories == {}


def refused(done):
    """The one line of a command that was refused."""
    (line,) = done.stderr.splitlines()
    assert done.returncode == 2
    return line


@pytest.mark.parametrize("name", ["", "a/b/c", "me/my model", "me/-model", "me/model.git"])
def test_a_name_that_no_repository_may_have_is_refused(name, hub, client, packed_folder):
    line = refused(client(PUSH, packed_folder, name, check=False))
    assert line.startswith(f"error: repo_id={name!r} is no name of a repository on the Hub; write NAME or USER/NAME")


@pytest.mark.parametrize(("name", "message"), [("nosuch", "nosuch: there is no such folder"), ("file", "is a file")])
def test_what_is_no_folder_is_not_pushed(name, message, hub, client, tmp_path):
    (tmp_path / "file").touch()
    code = f"import os; os.chdir({str(tmp_path)!r})" + PUSH
    assert message in refused(client(code, name, "me/tiny", check=False))
    assert hub.repositories == {}


def test_a_push_leaves_the_folder_as_it_is(hub, client, packed_folder):
    before = {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in packed_folder.iterdir()}
    (packed_folder / ".cache").mkdir()
    (packed_folder / ".cache" / "lock").touch()
    for path in (packed_folder / ".cache", packed_folder):
        path.chmod(0o555)  # nothing can be written into it, but for root
    client(PUSH, packed_folder, "me/tiny")
    (packed_folder / ".cache").chmod(0o755)
    packed_folder.chmod(0o755)
    shutil.rmtree(packed_folder / ".cache")
    assert {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in packed_folder.iterdir()} == before
    assert hub.files("me/tiny").keys() - {".gitattributes"} == before.keys()
    assert b"me/tiny" in hub.files("me/tiny")["README.md"]


@pytest.mark.parametrize(
    ("before", "message"),
    [
        ("constants.HF_HUB_OFFLINE = True", "me/tiny: HF_HUB_OFFLINE=1 forbids every request to the Hub"),
        ("constants.ENDPOINT = 'http://127.0.0.1:9'", r"me/tiny: the Hub cannot be reached \(\[Errno \d+\] Connection"),
        (
            "constants.ENDPOINT = 'http://127.0.0.1:no'",
            r"me/tiny: HF_ENDPOINT='http://127.0.0.1:no' is no address \(Invalid port: 'no'\); mend it, or unset it$",
        ),
    ],
    ids=["offline", "unreachable", "malformed"],
)
def test_without_a_network_nothing_is_pushed_and_the_error_says_so(before, message, hub, client, packed_folder):
    code = f"from huggingface_hub import constants; {before}" + PUSH
    assert re.search(message, refused(client(code, packed_folder, "me/tiny", check=False)))
    assert hub.repositories == {}


NOWHERE = """
import sys, time
from huggingface_hub import constants
constants.ENDPOINT = "http://127.0.0.1:9"
constants.HUGGINGFACE_CO_URL_TEMPLATE = constants.ENDPOINT + "/{repo_id}/resolve/{revision}/{filename}"
time.sleep = None  # nothing is tried again
import optimum_eggs.sharing.push as push
push.inspect_checkpoint = None  # nor are the weights read
"""


def test_a_hub_that_cannot_be_reached_is_asked_once_before_the_weights_are_read(hub, client, packed_folder):
    line = refused(client(NOWHERE + PUSH, packed_folder, "me/tiny", check=False))
    assert re.match(r"error: me/tiny: the Hub cannot be reached \(\[Errno \d+\] Connection", line)


AS_A_USER = f"""
import sys
sys.path.insert(0, {str(HERE.parent)!r})
from unprivileged import become_ordinary
become_ordinary()
"""
PUSH_FOLDER = """
from optimum_eggs.sharing import push_folder
push_folder(*sys.argv[1:])
"""
PUSH_MODEL = """
import os, optimum_eggs
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
os.chmod(sys.argv[3], 0)
model.push_to_hub(sys.argv[2])
"""


@pytest.mark.parametrize("code", [PUSH_FOLDER, PUSH], ids=["python", "command"])
@pytest.mark.parametrize("closed", ["tokenizer.json", "figures", "figures/tile.png"])
def test_a_file_that_may_not_be_read_is_named_before_the_hub_is_asked(closed, code, hub, client, packed_folder):
    (packed_folder / "figures").mkdir(exist_ok=True)
    (packed_folder / "figures" / "tile.png").touch()
    (packed_folder / closed).chmod(0)
    done = client(AS_A_USER + code, packed_folder, "me/tiny", check=False)
    (packed_folder / closed).chmod(0o700)
    *_, line = done.stderr.splitlines()
    assert re.search(rf"(error|ModelError): {re.escape(str(packed_folder / closed))}: may not be read \(its perm", line)
    assert "; allow it with `chmod u+r" in line
    assert hub.asked == []


@pytest.mark.parametrize("closed", ["report.json", "model.safetensors", "."])
def test_what_a_model_was_loaded_from_is_named_if_it_may_not_be_read(closed, hub, client, packed_folder):
    done = client(AS_A_USER + PUSH_MODEL, packed_folder, "me/tiny", packed_folder / closed, check=False)
    packed_folder.chmod(0o700)
    *_, line = done.stderr.splitlines()
    assert f"ModelError: {packed_folder}" in line
    assert "(its permissions are " in line
    assert hub.repositories == {}


def test_a_file_whose_name_is_no_utf8_is_named_before_the_hub_is_asked(hub, client, packed_folder):
    (packed_folder / os.fsdecode(b"o\xff")).touch()
    *_, line = client("import sys" + PUSH_FOLDER, packed_folder, "me/tiny", check=False).stderr.splitlines()
    assert "o\\udcff: the path is not UTF-8" in line
    assert hub.asked == []


def test_what_is_not_pushed_need_not_be_readable(hub, client, packed_folder):
    for name in ("half.tmp", ".hidden"):
        (packed_folder / name).touch()
        (packed_folder / name).chmod(0)
    client(AS_A_USER + PUSH, packed_folder, "me/tiny")
    assert "model.safetensors" in hub.files("me/tiny")
    assert not {"half.tmp", ".hidden"} & hub.files("me/tiny").keys()


ASKED_ONCE = """
import sys, optimum_eggs
from optimum_eggs import EGGSPruner
from transformers import AutoModelForCausalLM
source, road = sys.argv[1:]
if road == "folder":
    EGGSPruner.push_to_hub(source, "me/out")
elif road == "model":
    AutoModelForCausalLM.from_pretrained(source).push_to_hub("me/out")
elif road == "save":
    from functools import partial
    from shutil import copytree
    from optimum_eggs.sharing import save_and_push
    save_and_push(partial(copytree, source), "me/out")
"""


@pytest.mark.parametrize(
    ("road", "source"), [("folder", "here"), ("save", "here"), ("model", "here"), ("model", "me/tiny")]
)
def test_whether_the_hub_answers_is_asked_once(road, source, hub, client, packed_folder):
    client(PUSH, packed_folder, "me/tiny")
    client(ASKED_ONCE, packed_folder if source == "here" else source, road)
    assert hub.asked.count("HEAD /api/models/me/out") == 1
    assert b"The certificate" in hub.files("me/out")["README.md"]


def test_a_model_of_a_folder_that_is_gone_takes_no_report_of_another_from_the_hub(hub, client, packed_folder, tmp_path):
    client(PUSH, packed_folder, "me/tiny")
    shutil.copytree(packed_folder, tmp_path / "me" / "tiny")
    code = """
import os, shutil, sys, optimum_eggs
from transformers import AutoModelForCausalLM
os.chdir(sys.argv[1])
model = AutoModelForCausalLM.from_pretrained("me/tiny")
shutil.rmtree("me")
model.push_to_hub("me/out")
"""
    done = client(code, tmp_path)
    assert "me/out: no report.json was found" in done.stderr
    assert "report.json" not in hub.files("me/out")
    assert b"The certificate" not in hub.files("me/out")["README.md"]


def test_a_model_is_not_pushed_without_its_report_since_the_hub_is_broken(hub, client, packed_folder):
    client(PUSH, packed_folder, "me/tiny")
    hub.broken = "report.json"
    code = """
import time, optimum_eggs
from transformers import AutoModelForCausalLM
time.sleep = lambda seconds: None
AutoModelForCausalLM.from_pretrained("me/tiny").push_to_hub("me/out")
"""
    done = client(code, check=False)
    assert "HubError: me/tiny: the Hub refused (500: " in done.stderr
    assert hub.repositories.keys() == {"me/tiny"}


def test_a_model_on_the_hub_without_a_report_is_pushed_by_transformers(hub, client, packed_folder):
    client(PUSH, packed_folder, "me/tiny")
    hub.files("me/tiny").pop("report.json")
    done = client(ASKED_ONCE, "me/tiny", "model")
    assert "me/out: no report.json was found" in done.stderr
    assert "model.safetensors" in hub.files("me/out")


@pytest.mark.parametrize(
    ("report", "message"),
    [
        (None, "has no report.json of a pruned model"),
        ("{}", "has no report.json of a pruned model"),
        ("{", "is no JSON"),
    ],
)
def test_a_report_that_is_not_there_or_damaged_is_said_before_the_hub_is_asked(
    report, message, hub, client, packed_folder
):
    (packed_folder / "report.json").unlink()
    if report is not None:
        (packed_folder / "report.json").write_text(report)
    line = refused(client(NOWHERE + PUSH, packed_folder, "me/tiny", check=False))
    assert message in line


def test_a_model_is_not_saved_for_a_hub_that_cannot_be_reached(hub, client, packed_folder):
    client(PUSH, packed_folder, "me/tiny")
    code = (
        """
import sys, optimum_eggs
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
model.save_pretrained = None
"""
        + NOWHERE
    )
    for source in (packed_folder, "me/tiny"):  # the report of the second is not here
        done = client(code + 'model.push_to_hub("me/other")', source, check=False)
        assert "HubError: me/other: the Hub cannot be reached (" in done.stderr
        assert "Retrying" not in done.stderr
    assert hub.repositories.keys() == {"me/tiny"}


def test_a_card_that_cannot_be_had_for_want_of_a_network_is_not_replaced(hub, client, packed_folder):
    code = """
import time
from huggingface_hub import constants
constants.HUGGINGFACE_CO_URL_TEMPLATE = "http://127.0.0.1:9/{repo_id}/resolve/{revision}/{filename}"
time.sleep = lambda seconds: None
"""
    done = client(code + PUSH, packed_folder, "me/tiny", check=False)
    *notes, line = done.stderr.splitlines()
    assert line.startswith("error: me/tiny: the Hub cannot be reached (")
    assert len(notes) == len(set(notes)) == 2  # what failed, and that it is tried again, once each
    assert hub.repositories == {}


def test_a_card_that_the_hub_refuses_leaves_no_empty_repository(hub, client, packed_folder):
    hub.refuse_cards = True
    line = refused(client(PUSH, packed_folder, "me/tiny", check=False))
    assert line.startswith("error: me/tiny: the Hub refuses the metadata of its card (")
    assert '"license" must be one of' in line
    assert hub.repositories == {}


@pytest.mark.parametrize(
    ("card", "message"),
    [
        (
            b"---\nlicense: [mit\n---\n# My model\n\nMy words.\n",
            "its metadata, between the first two ---, cannot be read",
        ),
        ("# My model\n\nCaf\xe9.\n".encode("latin-1"), "is no UTF-8 text ("),
    ],
)
def test_a_card_that_cannot_be_read_is_named(card, message, hub, client, packed_folder):
    (packed_folder / "README.md").write_bytes(card)
    assert f"README.md: {message}" in refused(client(PUSH, packed_folder, "me/tiny", check=False))
    assert hub.repositories == {}


@pytest.mark.parametrize("token", ["hf_abc\n", "hf_abc\r\nhf_def"])
def test_a_token_with_a_line_end_is_not_shown(token, hub, client, packed_folder):
    code = """
import os, sys
from optimum_eggs.engine.report import update_report
from optimum_eggs.sharing import push_folder
update_report(sys.argv[1], base_model={"id": "me/dense", "revision": None})
push_folder(sys.argv[1], "me/tiny", token=sys.argv[2])
"""
    done = client(code, packed_folder, token, check=False)
    assert "HubError: me/tiny: " in done.stderr
    assert "hf_abc" not in done.stderr
    assert "hf_def" not in done.stderr
    assert hub.repositories == {}


@pytest.mark.parametrize("held", ["[]", "{", "3", '{"layers": 3}', '{"summary": [], "layers": []}'])
def test_a_report_of_another_kind_is_not_pushed(held, packed_folder):
    from optimum_eggs.errors import CheckpointError
    from optimum_eggs.sharing import push_folder

    (packed_folder / "report.json").write_text(held)
    with pytest.raises(CheckpointError, match=r"report.json: .*; save the model again"):
        push_folder(packed_folder, "me/tiny")


PACK = """
import sys
from optimum_eggs.cli.main import main
sys.exit(main(["pack", *sys.argv[1:]]))
"""


@pytest.mark.slow
def test_what_is_missing_of_a_name_that_is_nowhere_is_the_model(hub, client, tmp_path):
    for offline, why in (
        (False, "no such model on the Hub, or the token"),
        (True, "the model is neither in the cache"),
    ):
        done = client(PACK, "me/none", tmp_path / "out", offline=offline, check=False)
        assert done.returncode == 2
        (line,) = done.stderr.splitlines()
        assert line.startswith(f"error: me/none: there is no such folder, and {why}")


LOAD = """
import sys, time, logging
time.sleep = lambda seconds: None
from huggingface_hub import constants
constants.HUGGINGFACE_CO_URL_TEMPLATE = sys.argv[2] + "/{repo_id}/resolve/{revision}/{filename}"
from optimum_eggs.hf.loading import load_model
load_model(sys.argv[1])
"""


def test_a_name_that_is_neither_a_folder_nor_on_the_hub(hub, client):
    done = client(LOAD, "me/nosuch", hub.endpoint, check=False)
    assert "ModelError: me/nosuch: there is no such folder, and no such model on the Hub, or the token" in done.stderr


def test_a_name_that_cannot_be_asked_for_says_so_once(hub, client):
    done = client(LOAD, "me/nosuch", "http://127.0.0.1:9", check=False)
    assert (
        "ModelError: me/nosuch: there is no such folder, and the model is neither in the cache nor can" in done.stderr
    )
    assert done.stderr.count("Retrying in") == 1
    assert done.stderr.count("thrown while requesting") == 1
