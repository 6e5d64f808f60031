import copy
import dataclasses
import itertools
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from oracles import PATTERNS, checked

from optimum_eggs.config import SELECTIONS, UPDATES, EGGSConfig
from optimum_eggs.errors import ConfigError
from optimum_eggs.importance import IMPORTANCE
from optimum_eggs.pattern import NMPattern
from optimum_eggs.presets import METHOD, PRESETS


def through_json(config: EGGSConfig) -> EGGSConfig:
    return EGGSConfig.from_dict(json.loads(json.dumps(config.to_dict())))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"min_degre": 1}, r"min_degre=1: EGGSConfig has no such key; did you mean 'min_degree'\?"),
        ({"zzzz": 1}, r"zzzz=1: EGGSConfig has no such key; the keys are \['pattern', 'n', 'm', .*\]"),
        ({"quant_method": "gptq"}, r"quant_method='gptq' is not this package's; it must be 'eggs'"),
        (
            {"format_version": 3},
            r"format_version=3 is unknown .* reads versions up to 2; upgrade optimum-eggs, or prune",
        ),
        ({"format_version": 2}, r"format_version=2 with values=None, head=None and ignored=None: .*; leave it out"),
        (
            {"values": "int8", "format_version": 1},
            r"format_version=1 with values='int8', head=None and ignored=None: .*; leave",
        ),
        ({"values": "int3"}, r"values='int3' is unknown; use one of \['int8', 'int4'\]"),
        ({"values": "int8", "value_group": 96}, r"value_group=96 is no multiple of 64 inputs of up to 65536; use 64"),
        ({"value_group": 64}, r"value_group=64 without `values`: there is no scale; add values='int8'"),
        ({"rounding": "nearest"}, r"rounding='nearest' without `values`: no value is rounded; add values='int8'"),
        ({"rounding_tuning": 3}, r"rounding_tuning=3 without `values`"),
        ({"values": "int4", "rounding": "up"}, r"rounding='up' is unknown; use one of \['gptq', 'nearest'\]"),
        ({"head": "int4"}, r"head='int4' is unknown; use one of \['int8'\]"),
        ({"coded_modules": {"a": "int8"}}, r"coding='int8' is not of the form 'int8:128'"),
        ({"coded_modules": ["a"]}, r"coded_modules=\['a'\] must map the names of layers to codings such as 'int8:128'"),
        ({"pattern": "4:2"}, r"pattern 4:2: n=4 is the number kept"),
        ({"pattern": "0:4"}, r"pattern 0:4: n=0 is the number kept"),
        ({"pattern": "2:5"}, r"pattern 2:5: m=5 is not a supported group size"),
        ({"pattern": "two:four"}, r"pattern='two:four' is not of the form"),
        ({"n": 2}, r"n=2, m=None: both are needed; write n=2, m=4 or pattern='2:4'"),
        ({"m": 4}, r"n=None, m=4: both are needed"),
        ({"pattern": "1:4", "n": 2, "m": 4}, r"pattern='1:4' contradicts n=2, m=4; pass one of the two"),
        (
            {"preset": "slow"},
            r"preset='slow' is unknown; use one of \['fast', 'best', 'paper', 'alps', 'sparsegpt', 'ria', .*\]",
        ),
        ({"preset": ["fast"]}, r"preset=\['fast'\] is unknown"),
        ({"importance": "size"}, r"importance='size' is unknown; use one of \['magnitude', 'ria', 'wanda'\], or make"),
        ({"selection": "best"}, r"selection='best' is unknown; use one of \['optimal', 'diagonal', 'none'\]"),
        ({"weight_update": "sgd"}, r"weight_update='sgd' is unknown; use one of \['refit', 'none'\]"),
        ({"sampling": ["random"]}, r"sampling=\['random'\] is unknown; use one of \['random', 'sequential'\]"),
        ({"exponent": -0.5}, r"exponent=-0.5 must be a finite number of at least 0"),
        ({"exponent": float("nan")}, r"exponent=nan must be a finite number"),
        ({"damping": float("inf")}, r"damping=inf must be a finite number"),
        ({"damping": "0.1"}, r"damping='0.1' must be a finite number"),
        ({"damping": True}, r"damping=True must be a finite number"),
        ({"selection": "none", "min_degree": 1}, r"min_degree=1 with selection='none': nothing would keep that floor"),
        ({"min_degree": -1}, r"min_degree=-1 must be an integer of at least 0"),
        (
            {"preset": "ria", "selection": "diagonal", "min_degree": 3},
            r"min_degree=3 with selection='diagonal' at 2:4: .* use 2 or less",
        ),
        (
            {"preset": "ria", "selection": "diagonal", "band": 8},
            r"band=8 with selection='diagonal': diagonals live in tiles of m=4 rows",
        ),
        ({"band": 0, "min_degree": 0}, r"band=0 must be an integer of at least 1"),
        ({"band": 3, "min_degree": 2}, r"band=3 with min_degree=2 at 2:4: 3 rows keep 6 .* takes 8; use a band of 4"),
        ({"min_degree": "most"}, r"min_degree='most' must be an integer of at least 0"),
        ({"solver": "adam"}, r"solver='adam' is unknown; use one of \['score', 'admm', 'sparsegpt'\]"),
        (
            {"solver": "sparsegpt", "selection": "diagonal"},
            r"selection='diagonal' with solver='sparsegpt': diagonals are for solver='score'",
        ),
        (
            {"solver": "admm", "selection": "diagonal"},
            r"selection='diagonal' with solver='admm': diagonals are for solver='score'",
        ),
        ({"solver": "admm", "swaps": 3}, r"swaps=3 with solver='admm': swaps are for solver='score'; use swaps=0"),
        ({"swaps": -1}, r"swaps=-1 must be an integer of at least 0"),
        ({"descent_sweeps": 2}, r"descent_sweeps=2: this key is gone, it improved no model measured; leave it"),
        ({"permutation": 1}, r"permutation=1 must be True or False"),
        ({"rotation": 1}, r"rotation=1 must be True, False or 'auto'"),
        ({"rotation": "yes"}, r"rotation='yes' must be True, False or 'auto'"),
        ({"block_tuning": -1}, r"block_tuning=-1 must be an integer of at least 0"),
        ({"block_tuning": 10, "tuning_lr": 0}, r"tuning_lr=0.0 with block_tuning=10 would tune nothing"),
        ({"refit_steps": 0}, r"refit_steps=0 must be an integer of at least 1"),
        ({"refit_steps": 1.5}, r"refit_steps=1.5 must be an integer"),
        ({"num_samples": 0}, r"num_samples=0 must be an integer of at least 1"),
        ({"seq_len": 1}, r"seq_len=1 must be an integer of at least 2"),
        ({"seed": -1}, "seed=-1 must be an integer from 0 to 18446744073709551615"),
        ({"seed": 2**64}, "seed=18446744073709551616 must be an integer from 0 to 18446744073709551615"),
        ({"short_share": 2}, r"short_share=2 must be a finite number between 0 and 1"),
        ({"batch_size": False}, r"batch_size=False must be an integer of at least 1"),
        ({"split": ""}, r"split='' must be a text that is not empty, or None"),
        ({"text_column": 3}, r"text_column=3 must be a text"),
        ({"dataset_config_name": ""}, r"dataset_config_name='' must be a text"),
        ({"dataset_revision": 3}, r"dataset_revision=3 must be a text"),
        ({"block_list": ""}, r"block_list='' must be a text"),
        (
            {"targets": "down_proj"},
            r"targets='down_proj' must be a list of name patterns; write .* targets=\[.down_proj.\]",
        ),
        ({"targets": 5}, r"targets=5 must be a list of name patterns"),
        ({"ignore": ["lm_head", ""]}, r"ignore=\['lm_head', ''\] must be a list of name patterns"),
        ({"pruned_modules": ["a"]}, r"pruned_modules=\['a'\] must map the names of layers to patterns such as '2:4'"),
        ({"pruned_modules": {"a": "2:5"}}, r"pattern 2:5: m=5 is not a supported group size"),
    ],
)
def test_a_bad_value_is_refused_with_its_reason(values, message):
    with pytest.raises(ConfigError, match=message):
        EGGSConfig(**values)


def test_the_defaults_are_the_fast_preset_at_two_of_four():
    config = EGGSConfig()
    assert (config.preset, config.pattern, config.importance) == ("fast", NMPattern(2, 4), "ria")
    assert (config.selection, config.min_degree, config.band, config.weight_update) == ("optimal", 1, 16, "refit")
    assert config == EGGSConfig("2:4", preset="fast") == EGGSConfig(n=2, m=4)


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_sets_what_it_stands_for(name):
    config = EGGSConfig(preset=name)
    assert {field: getattr(config, field) for field in PRESETS[name]} == PRESETS[name]
    assert config.preset == name


def test_what_is_passed_besides_a_preset_wins():
    config = EGGSConfig(preset="paper", importance="wanda")
    assert (config.importance, config.selection, config.preset) == ("wanda", "diagonal", None)


@pytest.mark.parametrize("pattern", ["1:2", "2:4", "1:4", "6:8", "31:32"])
@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_survives_json(name, pattern):
    config = EGGSConfig(pattern, preset=name)
    again = through_json(config)
    assert again == config
    assert (again.preset, str(again.pattern)) == (name, pattern)


@pytest.mark.parametrize("name", [name for name, values in PRESETS.items() if values["solver"] == "score"])
def test_every_mix_of_methods_survives_json(name):
    for importance, selection, update in itertools.product(IMPORTANCE, SELECTIONS, UPDATES):
        config = EGGSConfig(preset=name, importance=importance, selection=selection, weight_update=update)
        assert through_json(config) == config


@checked
@given(st.sampled_from(PATTERNS), st.integers(0, 40), st.integers(0, 2**40), st.floats(0, 10))
def test_numbers_survive_json(legal, min_degree, seed, damping):
    config = EGGSConfig(n=legal[0], m=legal[1], min_degree=min_degree, seed=seed, damping=damping)
    again = through_json(config)
    assert again == config
    assert (again.pattern, again.min_degree, again.seed, again.damping) == (
        NMPattern(*legal),
        min_degree,
        seed,
        damping,
    )


@pytest.mark.parametrize(
    ("values", "band"),
    [
        ({}, 16),
        ({"min_degree": 2}, 16),
        ({"min_degree": 3}, 24),  # a floor of 3 at 2:4 needs 6 rows
        ({"pattern": "1:4"}, 16),
        ({"pattern": "1:8"}, 32),
        ({"pattern": "1:32"}, 128),
        ({"pattern": "6:8"}, 16),
        ({"min_degree": 0}, 16),
        ({"pattern": "4:8", "preset": "paper"}, 8),
        ({"band": 2}, 2),
    ],
)
def test_the_default_band_is_sixteen_or_four_times_what_the_floor_needs(values, band):
    assert EGGSConfig(**values).band == band


@checked
@given(st.sampled_from(PATTERNS), st.integers(1, 20))
def test_the_default_band_can_hold_the_floor(legal, min_degree):
    config = EGGSConfig(n=legal[0], m=legal[1], min_degree=min_degree)
    assert config.band * config.n >= min_degree * config.m


def test_a_floor_is_on_by_default_wherever_a_selection_keeps_it():
    assert EGGSConfig(preset="ria", selection="optimal").min_degree == 1
    assert EGGSConfig(preset="fast", selection="none").min_degree == 0


def test_deepcopy_shares_data_and_tokenizer():
    texts = (text for text in ["one", "two"])  # a generator can be neither copied nor pickled
    tokenizer = object()
    twin = copy.deepcopy(EGGSConfig(calibration=texts, tokenizer=tokenizer))
    assert twin.calibration is texts
    assert twin.tokenizer is tokenizer


def test_deepcopy_copies_the_lists():
    config = EGGSConfig(targets=["up"], pruned_modules={"a": "2:4"})
    twin = copy.deepcopy(config)
    twin.targets.append("down")
    twin.ignore.append("down")
    twin.pruned_modules["b"] = "2:4"
    assert (config.targets, config.ignore, config.pruned_modules) == (["up"], ["lm_head"], {"a": "2:4"})


OWN = EGGSConfig(
    "4:8", preset="best", refit_steps=7, num_samples=7, seed=3, targets=["up"], tokenizer=object(), calibration=[[1, 2]]
)


@pytest.mark.parametrize(
    ("config", "changes", "expected"),
    [
        (EGGSConfig("4:8", preset="best", num_samples=7), {"seed": 4}, {"preset": "best", "num_samples": 7}),
        (OWN, {}, {"refit_steps": 7, "num_samples": 7, "seed": 3, "targets": ["up"]}),
        (OWN, {"pattern": "2:4"}, {"pattern": NMPattern(2, 4), "refit_steps": 7, "block_tuning": 200}),
        (OWN, {"n": 3}, {"pattern": NMPattern(3, 8)}),
        (OWN, {"preset": "fast"}, {"preset": "fast", "refit_steps": 10, "batch_size": 4, "num_samples": 7}),
        (OWN, {"preset": "ria", "min_degree": None}, {"preset": "ria", "min_degree": 0}),
        (OWN, {"preset": "fast", "refit_steps": 7}, {"preset": None, "solver": "sparsegpt", "refit_steps": 7}),
        (OWN, {"refit_steps": 10}, {"preset": "best"}),
        (OWN, {"block_tuning": 0}, {"batch_size": 4, "short_share": 0.0}),
        (OWN, {"targets": None}, {"targets": None}),
        # What follows from other values follows again, and what was chosen stays.
        (EGGSConfig("1:8"), {"min_degree": 2}, {"band": 64}),
        (EGGSConfig("1:8", min_degree=2), {"min_degree": 1, "pattern": "2:4"}, {"band": 16}),
        (EGGSConfig(band=32), {"min_degree": 2}, {"band": 32, "preset": None}),
        (EGGSConfig(band=32), {"band": None}, {"band": 16, "preset": "fast"}),
        (EGGSConfig(band=32), {"preset": "ria"}, {"band": 16, "preset": "ria"}),
        (EGGSConfig(), {"selection": "none"}, {"min_degree": 0}),
        (EGGSConfig(preset="ria"), {"selection": "optimal"}, {"min_degree": 1}),
        (EGGSConfig("4:8", preset="ria"), {"selection": "diagonal"}, {"band": 8, "min_degree": 1}),
        (EGGSConfig("4:8", preset="paper"), {"selection": "optimal"}, {"band": 16}),
        (EGGSConfig(batch_size=9), {"preset": "best"}, {"batch_size": 9}),
    ],
)
def test_replacing_values_keeps_the_others(config, changes, expected):
    before = config.to_dict()
    found = config.replace(**changes)
    given = {key: value for key, value in changes.items() if value is not None and key != "pattern"}
    expected = given | expected
    assert {key: getattr(found, key) for key in expected} == expected
    assert config.to_dict() == before
    assert found.tokenizer is config.tokenizer
    assert found.calibration is config.calibration
    method = set(METHOD) | {"n", "m", "band", "short_share", "batch_size", "preset"}
    untouched = before.keys() - method - changes.keys() - {"calibration"}
    assert {key: found.to_dict()[key] for key in untouched} == {key: before[key] for key in untouched}


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("other", PRESETS)
def test_replacing_the_preset_gives_the_other_one(name, other):
    assert EGGSConfig("4:8", preset=name, seed=3).replace(preset=other) == EGGSConfig("4:8", preset=other, seed=3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seeds": 4}, r"seeds=4: EGGSConfig has no such key; did you mean 'seed'"),
        ({"pattern": "1:4", "n": 2, "m": 4}, r"pattern='1:4' contradicts n=2, m=4"),
        ({"selection": "none", "min_degree": 1}, r"min_degree=1 with selection='none'"),
        ({"band": 1, "min_degree": 2}, r"use a band of 4 or more"),
    ],
)
def test_a_replacement_is_checked_as_a_new_configuration_is(changes, message):
    with pytest.raises(ConfigError, match=message):
        EGGSConfig().replace(**changes)


def test_lists_are_not_shared_with_the_replacement():
    found = OWN.replace(seed=1)
    found.targets.append("down")
    found.ignore.append("down")
    assert (OWN.targets, OWN.ignore) == (["up"], ["lm_head"])


def test_dataclasses_refuse_what_they_would_lose():
    # transformers' base class is a dataclass of one field: a replacement by its fields would drop all others.
    assert not dataclasses.is_dataclass(EGGSConfig())
    with pytest.raises(TypeError, match="dataclass"):
        dataclasses.replace(OWN, seed=4)


@pytest.mark.skipif(not hasattr(copy, "replace"), reason="copy.replace came with Python 3.13")
def test_copy_replace_is_the_same():
    assert copy.replace(OWN, seed=4) == OWN.replace(seed=4)


def test_what_copy_replace_calls_is_the_same():
    assert OWN.__replace__(seed=4) == OWN.replace(seed=4)


def test_names_given_as_an_iterator_are_all_kept():
    assert EGGSConfig(targets=iter(["up", "down"])).targets == ["up", "down"]


@pytest.mark.parametrize(
    ("source", "stored"),
    [
        ("wikitext2", "wikitext2"),
        (Path("a") / "b.txt", str(Path("a") / "b.txt")),
        ({"c4": 3, Path("b.txt"): 1}, {"c4": 3.0, "b.txt": 1.0}),
        (["a text"], None),
        ({"input_ids": [[1, 2], [3, 4]]}, None),
    ],
)
def test_calibration_is_stored_only_where_it_names_its_sources(source, stored):
    assert EGGSConfig(calibration=source).to_dict()["calibration"] == stored


def test_the_tokenizer_is_not_stored():
    assert "tokenizer" not in EGGSConfig(tokenizer=object()).to_dict()


def test_a_token_is_nowhere_to_be_read():
    config = EGGSConfig(token="hf_secret", calibration="me/private")
    assert "hf_secret" not in json.dumps(config.to_dict()) + repr(config) + config.to_json_string()
    assert copy.deepcopy(config).token == "hf_secret"


def test_a_data_set_keeps_its_configuration_and_revision():
    config = EGGSConfig(calibration="me/data:plain@v1", dataset_config_name="all", dataset_revision="v2")
    again = through_json(config)
    assert (again.calibration, again.dataset_config_name, again.dataset_revision) == ("me/data:plain@v1", "all", "v2")


def test_changing_the_stored_form_leaves_the_configuration_alone():
    config = EGGSConfig(pruned_modules={"a": "2:4"})
    config.to_dict()["pruned_modules"]["a"] = "1:4"
    assert config.pruned_modules == {"a": "2:4"}


def test_a_model_of_an_earlier_release_promises_no_floor_that_was_chosen_layer_by_layer():
    stored = EGGSConfig("2:4").to_dict() | {"min_degree": "auto", "allocation": "error", "pruned_modules": {"a": "2:4"}}
    assert EGGSConfig.from_dict(stored).min_degree == 0


def test_pruned_modules_are_stored_as_plain_text():
    given_names = {"a": NMPattern(2, 4), "b": " 6:8 "}
    assert EGGSConfig(pruned_modules=given_names).to_dict()["pruned_modules"] == {"a": "2:4", "b": "6:8"}


def test_the_stored_form_names_the_method_and_its_version():
    stored = EGGSConfig().to_dict()
    assert (stored["quant_method"], stored["format_version"]) == ("eggs", 1)


def test_configurations_that_differ_are_not_equal():
    assert EGGSConfig(seed=1) != EGGSConfig()
    assert EGGSConfig() != EGGSConfig().to_dict()


def test_block_tuning_takes_one_window_a_step_unless_told_otherwise():
    assert EGGSConfig().batch_size == 4
    assert EGGSConfig(preset="best").batch_size == EGGSConfig(block_tuning=5).batch_size == 1
    assert EGGSConfig(preset="best", batch_size=2).batch_size == 2
    assert EGGSConfig(preset="best", block_tuning=0).batch_size == 4


def test_short_windows_go_with_tuning():
    assert EGGSConfig().short_share == EGGSConfig(preset="best", block_tuning=0).short_share == 0
    assert EGGSConfig(preset="best").short_share == EGGSConfig(values="int4", rounding_tuning=5).short_share == 0.125
    assert EGGSConfig(preset="best", short_share=0).short_share == 0
    assert EGGSConfig(short_share=0.5).replace(preset="best").short_share == 0.5
    stored = EGGSConfig(preset="best", pruned_modules={"a": "2:4"}).to_dict()
    assert EGGSConfig.from_dict(stored).replace(seed=1).short_share == 0.125
    del stored["short_share"]
    assert EGGSConfig.from_dict(stored).short_share == 0  # an earlier release made none


def test_values_beside_the_stored_ones_are_checked_as_in_a_new_configuration():
    stored = EGGSConfig("4:8", preset="best", seed=3).to_dict()
    config, unused = EGGSConfig.from_dict(stored, return_unused_kwargs=True, pattern="1:8", bogus=1)
    assert (config, unused) == (EGGSConfig("1:8", preset="best", seed=3), {"bogus": 1})
    assert EGGSConfig.from_dict(stored, seed=4) == EGGSConfig("4:8", preset="best", seed=4)
    with pytest.raises(ConfigError, match="pattern 9:8: n=9"):
        EGGSConfig.from_dict(stored, n=9)
    with pytest.raises(ConfigError, match="bogus=1: EGGSConfig has no such key"):
        EGGSConfig.from_dict(stored, bogus=1)


def test_an_update_is_checked_and_gives_back_what_is_no_key():
    config = EGGSConfig("2:4")
    assert config.update(preset="wanda", revision="main") == {"revision": "main"}
    assert config == EGGSConfig("2:4", preset="wanda")
    before = config.to_dict()
    for wrong in ({"damping": -1}, {"n": 5}, {"to_dict": 3, "seed": "one"}):
        with pytest.raises(ConfigError):
            config.update(**wrong)
        assert config.to_dict() == before
    assert config.update(to_dict=3) == {"to_dict": 3}
    assert config.to_dict() == before


def test_what_follows_from_the_values_follows_again():
    config = EGGSConfig(preset="best", values="int4")
    assert (config.rounding, config.value_group, config.rounding_tuning, config.format_version) == ("gptq", 128, 100, 2)
    eight = config.replace(values="int8")
    assert (eight.rounding, eight.rounding_tuning) == ("nearest", 0)
    other = EGGSConfig(preset="best", values="int4", value_group=64, rounding="nearest", rounding_tuning=7, head="int8")
    assert other.replace(values=None, head=None) == EGGSConfig(preset="best")
    assert other.replace(values=None).value_group == 64
    floats = config.replace(values=None)
    assert floats == EGGSConfig(preset="best")
    assert floats.format_version == 1
    assert config.preset == "best"
    assert EGGSConfig(values="int4").rounding_tuning == 0  # fast tunes nothing
    assert EGGSConfig.from_dict(config.to_dict()) == config


def test_a_row_with_an_odd_number_of_values_has_bytes():
    config = EGGSConfig("1:4", values="int4")
    assert str(config.coding(5)) == "int8:128"
    assert str(config.coding(6)) == "int4:128"
