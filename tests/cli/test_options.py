"""Numbers and sizes are checked where they are given, and the help says what there is."""

from __future__ import annotations

import pytest

from optimum_eggs.cli.main import build_parser, main
from optimum_eggs.errors import ConfigError
from optimum_eggs.recovery.recover import RecoverySettings
from optimum_eggs.validation import size

NEEDED = {
    "prune": ["MODEL", "OUT"],
    "pack": ["MODEL", "OUT"],
    "quantize": ["DIR", "OUT"],
    "evaluate": ["DIR"],
    "inspect": ["DIR"],
    "export": ["DIR", "OUT"],
    "benchmark": ["DIR"],
    "recover": ["DIR", "OUT", "--train", "a.txt"],
    "report": ["DIR"],
    "push": ["DIR", "me/model"],
}
COUNTS = {
    "prune": ["--num-samples", "--seq-len", "--batch-size"],
    "quantize": ["--num-samples", "--seq-len", "--value-group"],
    "evaluate": ["--seq-len", "--stride", "--num-windows", "--batch-size", "--limit"],
    "benchmark": ["--batch", "--prompt", "--new-tokens", "--repeats", "--layer-repeats"],
    "recover": ["--rank", "--steps", "--seq-len", "--batch-size", "--lr"],
}


def commands():
    (action,) = [action for action in build_parser()._actions if action.dest == "subcommand"]
    return action.choices


def refused(capsys, command, *options):
    with pytest.raises(SystemExit) as ended:
        main([command, *NEEDED[command], *options])
    assert ended.value.code == 2
    *_, last = capsys.readouterr().err.splitlines()
    return last


@pytest.mark.parametrize(("command", "flag"), [(command, flag) for command in COUNTS for flag in COUNTS[command]])
def test_a_number_that_counts_something_is_not_zero(command, flag, capsys):
    assert f"argument {flag}: '0' must be a" in refused(capsys, command, flag, "0")


@pytest.mark.parametrize(
    ("command", "flag", "value"),
    [
        ("prune", "--min-degree", "-1"),
        ("prune", "--block-tuning", "-1"),
        ("prune", "--seed", "99999999999999999999"),
        ("recover", "--seed", "4294967296"),
        ("quantize", "--rounding-tuning", "-1"),
        ("quantize", "--seed", "99999999999999999999"),
        ("recover", "--lr", "nan"),
        ("recover", "--lr", "inf"),
        ("recover", "--block-matching", "-0.5"),
        ("recover", "--held-out", "1"),
        ("recover", "--held-out", "-0.1"),
        ("recover", "--held-out", "nan"),
        ("recover", "--kd-ratio", "0"),
        ("recover", "--kd-ratio", "1.5"),
        ("evaluate", "--num-fewshot", "-1"),
        ("evaluate", "--num-windows", "1.5"),
    ],
)
def test_a_number_out_of_its_range_is_refused_with_the_range(command, flag, value, capsys):
    assert f"argument {flag}: '{value}' must be " in refused(capsys, command, flag, value)


def test_every_option_that_takes_a_number_has_a_rule():
    assert NEEDED.keys() == commands().keys()
    for name, parser in commands().items():
        for action in parser._actions:
            assert action.type not in (int, float), f"{name} {action.option_strings}"


@pytest.mark.parametrize("command", ["prune", "pack", "quantize", "export"])
@pytest.mark.parametrize("value", ["bla", "0GB", "", "-5GB", "5 apples", "GB"])
def test_a_shard_size_that_is_none_is_refused_before_work_begins(command, value, capsys):
    assert "argument --max-shard-size: " in refused(capsys, command, f"--max-shard-size={value}")


@pytest.mark.parametrize(
    ("given", "bytes"),
    [(7, 7), ("1000", 1000), ("8GiB", 8 * 2**30), ("2gb", 2 * 10**9), ("3 mib", 3 * 2**20), ("1.5GB", 15 * 10**8)],
)
def test_sizes_are_read(given, bytes):
    assert size("memory_budget", given) == bytes


@pytest.mark.parametrize("given", [True, 1.5, None, "1.5.2GB", "two"])
def test_other_things_are_no_sizes(given):
    with pytest.raises(ConfigError, match=r"memory_budget=.* is no size"):
        size("memory_budget", given)


@pytest.mark.parametrize("seed", [-1, 2**32, 1.0])
def test_a_seed_that_numpy_does_not_take_is_refused(seed):
    with pytest.raises(ConfigError, match=r"seed=.* must be an integer from 0 to 4294967295"):
        RecoverySettings(["a.txt"], seed=seed)


def test_the_help_of_prune_fits_a_screen_and_the_rest_is_asked_for(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    shown = []
    for flag in ("--help", "--help-all"):
        with pytest.raises(SystemExit):
            main(["prune", flag])
        shown.append(capsys.readouterr().out)
    short, full = shown
    assert len(short.splitlines()) <= 40
    assert max(map(len, full.splitlines())) <= 80
    flags = {flag for action in commands()["prune"]._actions for flag in action.option_strings}
    assert {flag for flag in flags if flag not in full} == set()
    assert "--text-column" not in short


def test_every_option_states_its_default_and_every_pattern_an_example():
    for name, parser in commands().items():
        for action in parser._actions:
            told = getattr(action, "full_help", action.help)
            if not action.option_strings or action.dest in ("help", "help_all", "json"):
                continue
            assert "(default: " in told or "(required)" in told, f"{name} {action.option_strings}"
            if action.dest in ("targets", "ignore"):
                assert "such as" in told


def test_a_number_too_large_for_what_counts_is_refused(capsys):
    with pytest.raises(SystemExit):
        main(["evaluate", "m", "--batch-size", "9" * 20])
    assert "must be an integer from 1 to 2147483647" in capsys.readouterr().err
