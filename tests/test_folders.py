import json
import os
import re
import signal
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from optimum_eggs import folders
from optimum_eggs.errors import OutputError
from optimum_eggs.files import add_to_list, changed_files, listed_files
from optimum_eggs.folders import PUT_IN_PLACE, check_output, claimed, new_folder
from optimum_eggs.locks import locked


def saved_model(path, **files):
    """A folder that this package wrote."""
    with new_folder(path) as made:
        (made / "config.json").write_text("old")
        (made / "figures").mkdir()
        (made / "figures" / "old.png").write_text("old")
    return path


def names(path):
    return sorted(entry.name for entry in path.iterdir())


def test_the_folder_appears_when_it_is_whole(tmp_path):
    with new_folder(tmp_path / "out") as made:
        (made / "config.json").write_text("new")
        assert not (tmp_path / "out").exists()
    assert (tmp_path / "out" / "config.json").read_text() == "new"
    assert names(tmp_path) == ["out"]


def test_the_record_lists_what_is_in_it_and_the_digests_of_weights(tmp_path):
    with new_folder(tmp_path / "out") as made:
        (made / "report.json").write_text('{"layers": []}')
        (made / "a").mkdir()
        (made / "a" / "b.png").touch()
        save_file({"w": torch.zeros(2)}, made / "model.safetensors")
    out = tmp_path / "out"
    files = json.loads((out / "report.json").read_text())["files"]
    assert list(files) == ["a/b.png", "model.safetensors", "report.json"]
    assert files["a/b.png"] is None
    assert re.fullmatch("[0-9a-f]{64}", files["model.safetensors"])
    assert json.loads((out / "report.json").read_text())["layers"] == []
    assert changed_files(out) == []
    save_file({"w": torch.ones(2)}, out / "model.safetensors")
    assert changed_files(out) == ["model.safetensors"]


def test_a_list_from_elsewhere_names_nothing_outside(tmp_path):
    (tmp_path / "out").mkdir()
    files = {"/etc/passwd": "0", "../x.safetensors": "0", "a/../../x": None, "config.json": None}
    (tmp_path / "out" / "report.json").write_text(json.dumps({"files": files}))
    assert listed_files(tmp_path / "out") == {"config.json": None}
    for record in ("[]", "{", '{"files": []}'):
        (tmp_path / "out" / "report.json").write_text(record)
        assert listed_files(tmp_path / "out") == {}


def test_parents_are_made(tmp_path):
    with new_folder(str(tmp_path / "a" / "b")) as made:
        (made / "file").touch()
    assert names(tmp_path / "a" / "b") == ["file", "report.json"]


@pytest.mark.parametrize("here", [False, True])
def test_an_empty_folder_is_filled_and_not_replaced(here, tmp_path, monkeypatch):
    out = tmp_path / "out"
    out.mkdir()
    (out / "lost+found").mkdir()  # as on a disk of its own
    before = out.stat().st_ino
    if here:
        monkeypatch.chdir(out)
    monkeypatch.setattr(folders.os, "access", lambda path, mode: Path(path) == out)  # its parent may not be written
    with new_folder("." if here else out) as made:
        (made / "file").touch()
        (made / "folder").mkdir()
        (made / "folder" / "file").touch()
        assert made.is_relative_to(out)
    assert names(out) == ["file", "folder", "lost+found", "report.json"]
    assert out.stat().st_ino == before
    assert names(tmp_path) == ["out"]


FILL = """
import os, sys
from pathlib import Path
from optimum_eggs.folders import new_folder
out, moved, rename = Path(sys.argv[1]), [], Path.rename

def cut(self, target):
    moved.append(target.name)
    if len(moved) == 3:
        os._exit(9)  # it is killed, and does not clean up
    return rename(self, target)

Path.rename = cut
with new_folder(out) as made:
    for name in ("config.json", "a", "z"):
        (made / name).touch()
"""


def fill(out, overwrite=False):
    with new_folder(out, overwrite) as made:
        for name in ("config.json", "a", "z"):
            (made / name).touch()


def test_filling_goes_on_where_it_was_cut(forks, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    assert forks.run("-c", FILL, out).returncode == 9
    assert names(out) == [".unfinished", "a", "report.json"]
    fill(out)
    assert names(out) == ["a", "config.json", "report.json", "z"]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(5, "Input/output error")])
def test_filling_that_fails_is_undone(error, tmp_path, monkeypatch):
    out = tmp_path / "out"
    out.mkdir()
    rename = Path.rename

    def fails(self, target):
        if target.name == "config.json":
            raise error
        return rename(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", fails)
        with pytest.raises((KeyboardInterrupt, OutputError)) as raised:
            fill(out)
    assert "in place" not in str(raised.value)
    assert names(out) == []
    fill(out)
    assert names(out) == ["a", "config.json", "report.json", "z"]


def interrupt(*_, **__):
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(0.01)  # until Python has heard it


@pytest.mark.parametrize(
    ("there", "moved"),
    [("nothing", "made"), ("an empty folder", "a"), ("a model", "out"), ("a model", "made"), ("a model", "old")],
)
def test_an_interrupt_of_the_exchange_waits_for_its_end_and_says_so(there, moved, tmp_path, monkeypatch):
    out = tmp_path / "out"
    if there == "a model":
        saved_model(out)
    elif there == "an empty folder":
        out.mkdir()
    came = []

    def interrupting(act):
        def acts(path, *arguments, **options):
            now = Path(path).name == moved and Path(path).exists() and not came
            done = act(path, *arguments, **options)
            if now:
                came.append(path)
                interrupt()
            return done

        return acts

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", interrupting(Path.rename))
        patch.setattr(folders.shutil, "rmtree", interrupting(folders.shutil.rmtree))
        with pytest.raises(KeyboardInterrupt, match=f"^{re.escape(str(out))} is whole and in place$"):
            fill(out, overwrite=True)
    assert came
    assert names(out) == ["a", "config.json", "report.json", "z"]
    assert names(tmp_path) == ["out"]
    assert PUT_IN_PLACE[-1] == out
    fill(out, overwrite=True)


def test_a_second_interrupt_is_heard_at_once_and_what_is_left_is_in_nobodys_way(tmp_path, monkeypatch):
    out = saved_model(tmp_path / "out")
    rmtree = folders.shutil.rmtree

    def interrupted(path, **options):
        if Path(path).name == "old" and Path(path).exists():
            interrupt()
            interrupt()
        return rmtree(path, **options)

    with monkeypatch.context() as patch:
        patch.setattr(folders.shutil, "rmtree", interrupted)
        with pytest.raises(KeyboardInterrupt, match=r"out is whole and in place$"):
            fill(out, overwrite=True)
    assert names(tmp_path) == [".out.unfinished", "out"]
    fill(out, overwrite=True)
    assert names(tmp_path) == ["out"]


def test_an_interrupt_before_the_exchange_puts_nothing_in_place(tmp_path, monkeypatch):
    out = saved_model(tmp_path / "out")
    monkeypatch.setattr(folders, "seal", interrupt)
    with pytest.raises(KeyboardInterrupt, match=r"^$"):
        fill(out, overwrite=True)
    assert names(out) == ["config.json", "figures", "report.json"]
    assert names(tmp_path) == ["out"]


def test_a_link_to_a_folder_is_followed(tmp_path):
    saved_model(tmp_path / "real")
    (tmp_path / "empty").mkdir()
    for name, target in (("a", "real"), ("b", "empty")):
        (tmp_path / name).symlink_to(tmp_path / target)
        with new_folder(tmp_path / name, overwrite=True) as made:
            (made / "new").touch()
        assert (tmp_path / name).is_symlink()
        assert names(tmp_path / target) == ["new", "report.json"]
    assert names(tmp_path) == ["a", "b", "empty", "real"]


def test_nothing_is_left_of_a_failure(tmp_path):
    with (
        pytest.raises(OutputError, match=r"cannot be written .* give the same command again"),
        new_folder(tmp_path / "out") as made,
    ):
        (made / "no such folder" / "file").touch()
    assert names(tmp_path) == []


def test_a_failure_keeps_the_old_folder(tmp_path):
    out = saved_model(tmp_path / "out")
    with pytest.raises(ZeroDivisionError), new_folder(out, overwrite=True):
        raise ZeroDivisionError
    assert names(tmp_path) == ["out"]
    assert names(out) == ["config.json", "figures", "report.json"]


def test_overwriting_replaces_the_whole_folder(tmp_path):
    out = saved_model(tmp_path / "out")
    with new_folder(out, overwrite=True) as made:
        (made / "new.txt").touch()
    assert names(tmp_path) == ["out"]
    assert names(out) == ["new.txt", "report.json"]


def test_others_may_read_all_of_it(tmp_path):
    before = os.umask(0o027)
    try:
        with new_folder(tmp_path / "out") as made:
            save_file({"w": torch.zeros(2)}, made / "model.safetensors")
            (made / "model.safetensors").chmod(0o600)
    finally:
        os.umask(before)
    modes = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "out").iterdir()}
    assert modes == {"model.safetensors": 0o640, "report.json": 0o640}
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o750


def test_an_exchange_that_was_killed_is_undone(tmp_path):
    out = saved_model(tmp_path / "out")
    work = tmp_path / ".out.unfinished"
    work.mkdir()
    out.rename(work / "old")
    with pytest.raises(OutputError, match="exists and is not empty"), new_folder(out):
        pass
    assert names(out) == ["config.json", "figures", "report.json"]
    work.mkdir(exist_ok=True)
    (work / "old").mkdir()  # killed after it
    with new_folder(out, overwrite=True):
        pass
    assert names(tmp_path) == ["out"]


def refused(path, message, **asked):
    before = sorted(path.parent.iterdir()) if path.parent.is_dir() else None
    with pytest.raises(OutputError, match=message), new_folder(path, **asked):
        pytest.fail("the work began")
    assert before is None or sorted(path.parent.iterdir()) == before


def test_what_is_no_folder_is_refused(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "dangling").symlink_to(tmp_path / "gone")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    os.mkfifo(tmp_path / "pipe")
    for name, message in (
        ("file", r"file: is a file; name a folder"),
        ("dangling", r"dangling: is a link to .*gone, which is not there"),
        ("loop", r"loop: is a link to .*loop, which is not there"),
        ("pipe", r"pipe: is a pipe; name a folder"),
        ("file/out", r"out: .*file is no folder, so nothing can be in it; name another folder"),
        ("x" * 300, r"cannot be written \(.*too long.*\); name another folder"),
    ):
        refused(tmp_path / name, message, overwrite=True)
    refused(Path("/dev/null"), "/dev/null: is a device; name a folder")
    with pytest.raises(OutputError, match="the name of the output folder is empty"):
        check_output("")


def test_a_place_that_may_not_be_written_is_refused(tmp_path, monkeypatch):
    with (
        pytest.raises(OutputError, match=r"out: cannot be written \(.*\); name another folder"),
        claimed(Path("/proc/none/out")),
    ):
        pass
    out = saved_model(tmp_path / "out")
    with monkeypatch.context() as patch:
        patch.setattr(folders.os, "access", lambda path, mode: Path(path) != out)
        refused(out, r"out: .*out may not be written to; name another folder", overwrite=True)
    monkeypatch.setattr(folders.os, "access", lambda path, mode: False)
    refused(tmp_path / "a" / "out", r"out: .* may not be written to; name another folder, or change its permissions")


def test_too_little_space_is_seen_before_the_work(tmp_path):
    refused(
        tmp_path / "out",
        r"out: about 1,000,000,000,000.0 MB will be written, and [\d.,]+ MB are free there; free some, or name",
        needs=10**18,
    )


def test_a_full_folder_is_refused(tmp_path):
    out = saved_model(tmp_path / "out")
    refused(out, r"out: exists and is not empty; .* pass --overwrite \(overwrite=True\)")


def test_what_this_package_did_not_write_is_never_overwritten(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "config.json").write_text("{}")
    refused(tmp_path / "mine", r"mine: is not empty, and has no list of files in a report\.json", overwrite=True)
    out = saved_model(tmp_path / "out")
    for precious in (".git", "thesis.tex", "figures/mine.png"):
        (out / precious).touch()
        refused(out, rf"out: {re.escape(precious)} in it was not written by this package", overwrite=True)
        (out / precious).unlink()
    (out / "report.html").touch()
    add_to_list(out, [out / "report.html", out / ".." / "elsewhere.html"])
    check_output(out, overwrite=True)
    assert list(listed_files(out)) == ["config.json", "figures/old.png", "report.html", "report.json"]


def test_weights_that_changed_since_are_not_overwritten(tmp_path):
    with new_folder(tmp_path / "out") as made:
        save_file({"w": torch.zeros(2)}, made / "model.safetensors")
    check_output(tmp_path / "out", overwrite=True)
    save_file({"w": torch.ones(2)}, tmp_path / "out" / "model.safetensors")
    refused(tmp_path / "out", "model.safetensors in it was not written by this package, or changed", overwrite=True)


def test_what_another_process_is_filling_is_not_replaced(tmp_path):
    out = tmp_path / "out"
    other = out / ".unfinished"
    with claimed(out) as work:
        (work / "made").mkdir()
        other.mkdir(parents=True)
        (other / "blocks").touch()
        with locked(other), pytest.raises(OutputError, match=rf"process {os.getpid()} of .* is writing to it"):
            folders.put_in_place(work / "made", out, work)
    assert (other / "blocks").exists()


@pytest.mark.parametrize("there", [False, True])
def test_what_is_put_at_the_output_meanwhile_stays(there, tmp_path):
    out = tmp_path / "out"
    if there:
        out.mkdir()

    def fill():
        with new_folder(out) as made:
            (made / "README.md").write_text("made")
            out.mkdir(exist_ok=True)
            (out / "README.md").write_text("mine")

    with pytest.raises(OutputError, match="exists and is not empty"):
        fill()
    assert (out / "README.md").read_text() == "mine"


def test_an_exchange_that_fails_is_undone(tmp_path, monkeypatch):
    out = saved_model(tmp_path / "out")
    rename = Path.rename

    def fails(self, target):
        if self.name == "made":
            raise OSError(5, "Input/output error")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fails)
    with pytest.raises(OutputError, match=r"cannot be written \(.*Input/output error"), new_folder(out, overwrite=True):
        pass
    assert names(tmp_path) == ["out"]
    assert names(out) == ["config.json", "figures", "report.json"]


@pytest.mark.parametrize(
    "error", [OSError(12, "Cannot allocate memory"), OSError(2, "none", "/elsewhere"), KeyError(1)]
)
def test_errors_of_another_kind_are_left_as_they_are(error, tmp_path):
    with pytest.raises(type(error)) as raised, new_folder(tmp_path / "out"):
        raise error
    assert raised.value is error


def test_the_folder_one_is_in_is_not_replaced(tmp_path, monkeypatch):
    out = saved_model(tmp_path / "out")
    monkeypatch.chdir(out / "figures")
    refused(out, r"out: is the folder you are in, which cannot be replaced; empty it", overwrite=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Path, "is_mount", lambda self: self == out)
    refused(out, r"out: is a mount point, which cannot be replaced; empty it", overwrite=True)


def test_what_is_read_is_not_written(tmp_path, monkeypatch):
    model = saved_model(tmp_path / "model")
    (model / "m.gguf").touch()
    (tmp_path / "link").symlink_to(model)
    monkeypatch.chdir(tmp_path)
    for out in ("model", "./model/", "link", str(model), "link/../model"):
        for read in ("model", str(model), "link", model / "m.gguf"):
            with pytest.raises(OutputError, match="itself, which is read; name another folder"):
                check_output(out, overwrite=True, sources=[read])
    with pytest.raises(OutputError, match=r"holds .*figures, which is read"):
        check_output(model, overwrite=True, sources=[model / "figures"])
    check_output("other", sources=["model", "gpt2", None, "", {"in": "memory"}])
    check_output(model / "inside", sources=[model])


def test_a_second_process_is_refused(forks, tmp_path):
    code = "import sys, time; from pathlib import Path; from optimum_eggs.folders import new_folder\n"
    code += "with new_folder(sys.argv[1]): Path(sys.argv[2]).touch(); time.sleep(60)"
    first = forks.start("-c", code, tmp_path / "out", tmp_path / "held")
    deadline = time.monotonic() + 60
    while not (tmp_path / "held").exists():
        assert time.monotonic() < deadline, first.wait(0).stderr
        time.sleep(0.01)
    message = rf"process {first.pid} of .* begun 0 minutes ago, is writing to it"
    with pytest.raises(OutputError, match=message), new_folder(tmp_path / "out"):
        pass
    first.kill()
    first.wait()
    with new_folder(tmp_path / "out"):  # the dead one holds nothing, and what it left is not in the way
        pass
    assert names(tmp_path) == ["held", "out"]


def test_the_lock_is_let_go(tmp_path):
    for _ in range(2):
        with locked(tmp_path):
            pass
