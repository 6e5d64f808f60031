import pytest

from optimum_eggs.errors import OutputError
from optimum_eggs.folders import check_output, new_folder


def saved_model(path):
    path.mkdir()
    (path / "config.json").write_text("old")
    (path / "old.txt").write_text("old")
    return path


def names(path):
    return sorted(entry.name for entry in path.iterdir())


def test_the_folder_appears_when_it_is_whole(tmp_path):
    with new_folder(tmp_path / "out") as partial:
        (partial / "config.json").write_text("new")
        assert not (tmp_path / "out").exists()
    assert (tmp_path / "out" / "config.json").read_text() == "new"
    assert names(tmp_path) == ["out"]


def test_parents_are_made(tmp_path):
    with new_folder(str(tmp_path / "a" / "b")) as partial:
        (partial / "file").touch()
    assert names(tmp_path / "a" / "b") == ["file"]


def test_an_empty_folder_is_filled(tmp_path):
    (tmp_path / "out").mkdir()
    with new_folder(tmp_path / "out") as partial:
        (partial / "file").touch()
    assert names(tmp_path / "out") == ["file"]


def test_nothing_is_left_of_a_failure(tmp_path):
    with pytest.raises(FileNotFoundError), new_folder(tmp_path / "out") as partial:
        (partial / "no such folder" / "file").touch()
    assert names(tmp_path) == []


def test_a_failure_keeps_the_old_folder(tmp_path):
    out = saved_model(tmp_path / "out")
    with pytest.raises(ZeroDivisionError), new_folder(out, overwrite=True):
        raise ZeroDivisionError
    assert names(tmp_path) == ["out"]
    assert names(out) == ["config.json", "old.txt"]


def test_overwriting_replaces_the_whole_folder(tmp_path):
    out = saved_model(tmp_path / "out")
    with new_folder(out, overwrite=True) as partial:
        (partial / "new.txt").touch()
    assert names(tmp_path) == ["out"]
    assert names(out) == ["new.txt"]


def test_others_may_read_the_folder(tmp_path):
    with new_folder(tmp_path / "out"):
        pass
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o755


def test_a_file_is_refused(tmp_path):
    (tmp_path / "out").touch()
    with pytest.raises(OutputError, match=r"out: is a file; name a folder"):
        check_output(tmp_path / "out", overwrite=True)


def test_a_full_folder_is_refused(tmp_path):
    out = saved_model(tmp_path / "out")
    with pytest.raises(OutputError, match=r"out: exists and is not empty; .* pass --overwrite \(overwrite=True\)"):
        check_output(out)


def test_what_is_no_saved_model_is_never_overwritten(tmp_path):
    (tmp_path / "thesis.tex").touch()
    with (
        pytest.raises(OutputError, match=r"has no config\.json, so it is no saved model and is not overwritten"),
        new_folder(tmp_path, overwrite=True),
    ):
        pass
    assert names(tmp_path) == ["thesis.tex"]


def test_a_parent_that_is_a_file_is_named(tmp_path):
    (tmp_path / "file").touch()
    with (
        pytest.raises(OutputError, match=r"out: cannot be written \(.*\); name another folder"),
        new_folder(tmp_path / "file" / "out"),
    ):
        pass
