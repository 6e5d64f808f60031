"""What streaming calls of transformers that is not public is as it was; else `streaming/internals.py` must follow."""

from __future__ import annotations

import importlib
import inspect
from dataclasses import fields

import pytest
import tiny
import torch
import transformers

from optimum_eggs.errors import CheckpointError
from optimum_eggs.streaming import DenseSource, source
from optimum_eggs.streaming.internals import conversions_of, name_of

LOOK = (
    f"transformers {transformers.__version__} changed what optimum_eggs/streaming/internals.py calls; see how "
    "PreTrainedModel._load_pretrained_model calls it now"
)
FUNCTIONS = {
    "conversion_mapping.get_model_conversion_mapping": ["model"],
    "core_model_loading.convert_and_load_state_dict_in_model": ["model", "state_dict", "load_config"],
    "core_model_loading.rename_source_key": [
        "source_key",
        "weight_renamings",
        "weight_converters",
        "base_model_prefix",
        "meta_state_dict",
    ],
    "modeling_utils.PreTrainedModel._get_dtype_plan": ["self", "dtype"],
    "modeling_utils.PreTrainedModel._from_config": ["config"],
    "modeling_utils.PreTrainedModel.named_non_persistent_buffers": ["self"],
    "modeling_utils.PreTrainedModel.initialize_weights": ["self"],
    "modeling_utils.PreTrainedModel.tie_weights": ["self"],
    "dynamic_module_utils.custom_object_save": ["obj", "folder", "config"],
}


def named(path):
    """What is called so in transformers, or None."""
    file, *rest = path.split(".")
    found = importlib.import_module(f"transformers.{file}")
    for part in rest:
        found = getattr(found, part, None)
    return found


@pytest.mark.parametrize("path", FUNCTIONS)
def test_functions_take_what_they_are_given(path):
    function, given = named(path), FUNCTIONS[path]
    assert function is not None, f"{path} is gone: {LOOK}"
    takes = inspect.signature(function).parameters
    assert list(takes)[: len(given)] == given, f"{path} takes {list(takes)}: {LOOK}"
    kinds = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    more = [name for name, each in takes.items() if name not in given and each.kind not in kinds]
    needed = [name for name in more if takes[name].default is inspect.Parameter.empty]
    assert not needed, f"{path} now needs {needed}: {LOOK}"


def test_a_load_is_described_by_these_fields():
    config = named("modeling_utils.LoadStateDictConfig")
    assert config is not None, f"modeling_utils.LoadStateDictConfig is gone: {LOOK}"
    missing = {"dtype", "dtype_plan", "weight_mapping", "device_map"} - {each.name for each in fields(config)}
    assert not missing, f"LoadStateDictConfig has no {sorted(missing)}: {LOOK}"


def test_a_load_tells_of_what_does_not_fit():
    found = named("core_model_loading.LoadStateDictInfo")
    assert found is not None, f"core_model_loading.LoadStateDictInfo is gone: {LOOK}"
    missing = {"mismatched_keys", "conversion_errors", "error_msgs"} - {each.name for each in fields(found)}
    assert not missing, f"LoadStateDictInfo has no {sorted(missing)}: {LOOK}"


def test_models_tell_of_their_names():
    model = tiny.make_model("llama")
    for name in ("base_model_prefix", "all_tied_weights_keys", "_auto_class"):
        assert hasattr(model, name), f"PreTrainedModel has no {name}: {LOOK}"
    assert model.all_tied_weights_keys == {"lm_head.weight": "model.embed_tokens.weight"}


def test_keys_go_where_transformers_puts_them():
    model = tiny.make_model("mixtral")
    known = model.state_dict()
    conversions = conversions_of(model)
    stored = "model.layers.1.block_sparse_moe.experts.3.w2.weight"
    assert name_of(stored, model, conversions, known) == "model.layers.1.mlp.experts.down_proj"
    assert name_of("model.norm.weight", model, conversions, known) == "model.norm.weight"
    assert name_of("layers.1.mlp.experts.down_proj", model, [], known) == "model.layers.1.mlp.experts.down_proj"


def test_what_does_not_fit_is_told(tmp_path):
    model = tiny.make_model("llama", dtype=torch.bfloat16)
    state = model.state_dict()
    state["model.layers.1.mlp.up_proj.weight"] = torch.zeros(8, 32, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "dense", state_dict=state)
    dense = DenseSource(tmp_path / "dense", device="cpu")
    dense.materialise(0)
    with pytest.raises(CheckpointError, match=r"model\.layers\.1\.mlp\.up_proj\.weight.*does not fit the model"):
        dense.materialise(1)


def test_all_weights_of_a_block_are_looked_at_in_one_go(tmp_path, monkeypatch):
    # Each look at a value waits for a GPU.
    tiny.make_model("llama", dtype=torch.bfloat16).save_pretrained(tmp_path / "dense")
    looks, tolist = [], torch.Tensor.tolist
    dense = DenseSource(tmp_path / "dense", device="cpu")
    monkeypatch.setattr(torch.Tensor, "tolist", lambda tensor: looks.append(len(tensor)) or tolist(tensor))
    monkeypatch.setattr(torch.Tensor, "__bool__", lambda tensor: pytest.fail("a value was looked at by itself"))
    monkeypatch.setattr(torch.Tensor, "__float__", lambda tensor: pytest.fail("a value was looked at by itself"))
    source._check_finite(dict(dense.materialise(0).named_parameters()))
    assert looks == [9, 9]  # once when it was loaded
