import pytest
import torch

from optimum_eggs.cli.main import main
from optimum_eggs.devices import choose_device, described, device_map
from optimum_eggs.errors import ConfigError


def test_the_device_is_an_accelerator_that_factorises_or_the_cpu(monkeypatch):
    for accelerator in (None, torch.device("cpu"), torch.device("meta")):
        monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available, found=accelerator: found)
        assert choose_device() == (accelerator or torch.device("cpu"))
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: torch.device("meta"))

    def without_float64(*size, dtype=None, device=None):
        raise TypeError("this device has no float64")

    monkeypatch.setattr(torch, "empty", without_float64)
    assert choose_device("auto") == torch.device("cpu")


def test_a_device_that_is_not_there_is_named():
    with pytest.raises(ConfigError, match=r"device='elsewhere' cannot be used \(.*\); leave it out"):
        choose_device("elsewhere")


def test_a_device_in_words_and_as_an_argument():
    assert described(torch.device("meta")) == "meta"
    assert device_map(torch.device("cpu")) is None
    assert device_map(torch.device("meta")) == torch.device("meta")


@pytest.mark.parametrize("command", ["evaluate", "benchmark", "prune", "pack", "recover"])
def test_every_command_takes_a_device(command, packed_folder, dense_folder, text_file, tmp_path, capsys):
    arguments = {
        "evaluate": [packed_folder, "--text", text_file],
        "benchmark": [packed_folder],
        "prune": [dense_folder, tmp_path / "out", "--calibration", text_file],
        "pack": [dense_folder, tmp_path / "out"],
        "recover": [packed_folder, tmp_path / "out", "--train", text_file],
    }
    assert main([command, *map(str, arguments[command]), "--device", "elsewhere"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: device='elsewhere' (--device) cannot be used (")
    assert not (tmp_path / "out").exists()
