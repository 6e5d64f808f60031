"""A few hundred mutated checkpoints; `fuzz_checkpoints.py` itself runs as many as one likes."""

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent / "fuzz_checkpoints.py"


@pytest.mark.slow
def test_mutated_checkpoints_end_in_typed_errors_or_right_answers():
    command = [sys.executable, str(SCRIPT), "--first", "1000000", "--runs", "300"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:]
    assert "300 cases: " in done.stdout
    assert "CheckpointError" in done.stdout
    assert "right" in done.stdout
