import json
import os
import socket
from pathlib import Path

import pytest

from optimum_eggs.access import closed, is_there, kind, no_file, no_utf8
from optimum_eggs.errors import ModelError, OutputError
from optimum_eggs.folders import check_folder, check_output

SAY = f"""
import json, sys
from pathlib import Path
sys.path.insert(0, {str(Path(__file__).parent)!r})
from unprivileged import become_ordinary
from optimum_eggs.access import closed, is_there, no_file
become_ordinary()
print(json.dumps([[is_there(path), closed(Path(path)), no_file(Path(path))] for path in sys.argv[1:]]))
"""


@pytest.fixture
def said(unprivileged, forks, tmp_path):
    """What an ordinary user is told of names in `tmp_path`."""

    def said(*paths):
        told = json.loads(forks.run("-c", SAY, *(tmp_path / path for path in paths), check=True).stdout)
        for path in tmp_path.iterdir():
            if not path.is_symlink():
                path.chmod(0o700)
        return told

    return said


def test_the_permission_that_is_missing_is_named(said, tmp_path):
    owner = tmp_path.owner()
    (tmp_path / "file").touch(0o200)
    for name, mode in (("folder", 0o300), ("parent", 0o600)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").touch()
        (tmp_path / name).chmod(mode)
    (tmp_path / "link").symlink_to(tmp_path / "parent" / "file")
    (tmp_path / "way").symlink_to(tmp_path / "parent" / "sub")
    of = f"its owner is {owner}); allow it with `chmod u+"
    parent = f"{tmp_path}/parent may not be entered (its permissions are drw-------, {of}x`"
    for (there, why, other), expected in zip(
        said("file", "folder", "parent/file", "link", "way/file"),
        [
            f"may not be read (its permissions are --w-------, {of}r`",
            f"may not be read (its permissions are d-wx------, {of}rx`",
            parent,
            f"is a link to {tmp_path}/parent/file: {parent}",
            f"{tmp_path}/way is a link to {tmp_path}/parent/sub: {parent}",
        ],
        strict=True,
    ):
        assert there
        assert why == other == expected


def test_what_may_be_read_has_nothing_said_of_it(said, tmp_path):
    (tmp_path / "file").touch(0o400)
    (tmp_path / "folder").mkdir(0o500)
    file, folder, *none = said("file", "folder", "none", "none/file", "file/none")
    assert file == [True, None, None]
    assert folder == [True, None, "is a folder, where a file must be; put the file there"]
    assert none == [[False, None, None]] * 3


def test_a_file_of_another_owner_is_theirs_to_open(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path).name != "file")
    monkeypatch.setattr(os, "geteuid", lambda: tmp_path.stat().st_uid + 1)
    assert closed(tmp_path / "file").endswith(f"; have {tmp_path.owner()} allow it")
    monkeypatch.setattr(Path, "owner", lambda self: {}[self])  # no name for the user id
    number = tmp_path.stat().st_uid
    assert closed(tmp_path / "file").endswith(f"; have {number} allow it")

    def no_owners(self):
        raise NotImplementedError

    monkeypatch.setattr(Path, "owner", no_owners)  # as on Windows
    monkeypatch.delattr(os, "geteuid")
    assert closed(tmp_path / "file").endswith(f"its owner is {number}); have {number} allow it")


def test_what_is_in_a_files_place_is_called_what_it_is(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "dangling").symlink_to("gone")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "good").symlink_to(__file__)
    os.mkfifo(tmp_path / "pipe")
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind(str(tmp_path / "socket"))
    for what in ("folder", "pipe", "socket", "device"):
        path = Path("/dev/null") if what == "device" else tmp_path / what
        assert kind(path) == what
        assert no_file(path) == f"is a {what}, where a file must be; put the file there"
        if what != "folder":
            with pytest.raises(ModelError, match=f"^{path}: is a {what}; name the folder of a saved model$"):
                check_folder(path)
            with pytest.raises(OutputError, match=f"^{path}: is a {what}; name a folder$"):
                check_output(path)
    for name, target in (("dangling", "gone"), ("loop", "loop")):
        why = f"is a link to {target}, which is not there; put the file there, or in the link's place"
        assert kind(tmp_path / name) == "link"
        assert no_file(tmp_path / name) == why
        message = f"{name}: is a link to {target}, which is not there; name the folder of a saved model$"
        with pytest.raises(ModelError, match=message):
            check_folder(tmp_path / name)
    assert kind(tmp_path / "good") == "file"
    assert no_file(tmp_path / "good") is None


@pytest.mark.parametrize("name", ["x" * 300, "a\0b", "a\ud800b", "/dev/null/x"])
def test_a_name_that_can_be_none_is_not_there(name):
    assert not is_there(name)
    assert [say(Path(name)) for say in (kind, closed, no_file)] == [None] * 3


def test_a_path_that_is_no_utf8():
    assert no_utf8(os.fsdecode(b"a/o\xff/b")).startswith("the path is not UTF-8, as")
    assert no_utf8(Path("größe")) is None
