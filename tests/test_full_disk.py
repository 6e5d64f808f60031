"""A disk that is full at any file of any command: one error, nothing half written, and the same command again."""

from __future__ import annotations

import pytest

RUN = """
import contextlib, io, resource, signal, sys
from optimum_eggs.cli.main import main
limit, *arguments = sys.argv[1:]
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
_, most = resource.getrlimit(resource.RLIMIT_FSIZE)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(limit), most))  # no file may be larger: whoever writes it, fails
with contextlib.redirect_stderr(io.StringIO()) as said, contextlib.redirect_stdout(io.StringIO()) as printed:
    code = main(arguments)
resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
assert not printed.getvalue()
print(said.getvalue().splitlines()[-1])
sys.exit(main(arguments) if code == 2 else 1)
"""
SMALL = ["--seq-len", "16", "--batch-size", "2"]
AGAIN = "give the same command again"
BEHIND = "the same command goes on behind the last finished block"
CHECKPOINT = "the same command goes on from the last checkpoint"


# Limits at which another file is the first that does not fit: its record, a configuration, weights, an optimiser's.
@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "limit", "remedy"),
    [
        (["prune", "dense", "OUT", "--calibration", "TEXT", "--num-samples", "4", *SMALL], 100, BEHIND),
        (["prune", "dense", "OUT", "--calibration", "TEXT", "--num-samples", "4", *SMALL], 40_000, BEHIND),
        (["export", "packed", "OUT"], 600, AGAIN),
        (["recover", "packed", "OUT", "--train", "TEXT", "--steps", "2", *SMALL], 40_000, CHECKPOINT),
        (
            ["recover", "packed", "OUT", "--train", "TEXT", "--method", "values", "--steps", "2", *SMALL],
            90_000,
            CHECKPOINT,
        ),
    ],
)
def test_a_full_disk(command, limit, remedy, forks, dense_folder, packed_folder, text_file, tmp_path):
    places = {"dense": dense_folder, "packed": packed_folder, "OUT": tmp_path / "out", "TEXT": text_file}
    done = forks.run("-c", RUN, limit, *(places.get(part, part) for part in command))
    assert done.returncode == 0, done.stderr[-2000:]
    error = done.stdout.splitlines()[0]
    assert error.startswith(f"error: {tmp_path / 'out'}: cannot be written (")
    assert error.endswith(remedy)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
