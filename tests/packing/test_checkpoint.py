"""Every way in which a packed folder may be damaged, and the name that each is given."""

import json
from functools import partial
from pathlib import Path

import pytest
import torch
from oracles import gaussian, loop_floor, random_mask
from safetensors.torch import save_file

from optimum_eggs.errors import CheckpointError
from optimum_eggs.inspection import inspect_checkpoint
from optimum_eggs.packing import pack, unpack
from optimum_eggs.packing.checkpoint import (
    INDEX_NAME,
    WEIGHTS_NAME,
    check_files,
    check_packed_tensors,
    pruned_patterns,
    read_config,
    read_headers,
    weight_files,
)
from optimum_eggs.pattern import NMPattern

UP, DOWN = "model.layers.0.up_proj", "model.layers.0.down_proj"
PATTERN = NMPattern(2, 4)


class Checkpoint:
    """A small packed checkpoint in the making: change its parts, then write it."""

    def __init__(self, folder):
        self.folder = folder
        self.tensors = {"model.norm.weight": torch.ones(12)}
        self.add(UP, rows=16, columns=12)
        self.add(DOWN, rows=12, columns=16)
        self.packed = {"quant_method": "eggs", "format_version": 1, "pruned_modules": {UP: "2:4", DOWN: "2:4"}}

    def add(self, name, rows, columns):
        parts = pack(gaussian(rows, columns, dtype=torch.bfloat16), random_mask(rows, columns, 2, 4), PATTERN)
        self.tensors[f"{name}.weight"], self.tensors[f"{name}.weight_meta"] = parts

    def write(self):
        save_file(self.tensors, self.folder / WEIGHTS_NAME)
        (self.folder / "config.json").write_text(json.dumps({"quantization_config": self.packed}))
        return self.folder

    def inspect(self):
        return inspect_checkpoint(self.write(), progress=False)

    def check(self):
        check_files(weight_files(self.write()), self.packed["pruned_modules"])


@pytest.fixture
def checkpoint(tmp_path):
    return Checkpoint(tmp_path)


def found_in(folder):
    return [(violation.where, violation.rule) for violation in inspect_checkpoint(folder, progress=False).violations]


def test_a_sound_checkpoint_has_no_violations(checkpoint):
    inspection = checkpoint.inspect()
    assert inspection.ok
    assert [(layer.name, layer.out_features, layer.in_features) for layer in inspection.layers] == [
        (UP, 16, 12),
        (DOWN, 12, 16),
    ]
    checkpoint.check()


def test_a_sound_layer_is_certified_and_measured(checkpoint):
    layer = checkpoint.inspect().layers[1]
    assert layer.certificate.legal
    assert layer.certificate.floors[12] == loop_floor(random_mask(12, 16, 2, 4), 12)
    assert (layer.packed_bytes * 16, layer.dense_bytes) == (layer.dense_bytes * 9, 12 * 16 * 2)


def test_the_findings_survive_json(checkpoint):
    del checkpoint.tensors[f"{UP}.weight"]
    stored = json.loads(json.dumps(checkpoint.inspect().to_dict()))
    assert (stored["ok"], [violation["where"] for violation in stored["violations"]]) == (False, [UP])
    assert stored["layers"][0]["certificate"]["floors"]["12"] > 0


# --- the tensors of one layer, from the headers


def missing_meta(tensors):
    del tensors[f"{UP}.weight_meta"]


def missing_weight(tensors):
    del tensors[f"{UP}.weight"]


def short_meta(tensors):
    tensors[f"{UP}.weight_meta"] = tensors[f"{UP}.weight_meta"][:, :1].clone()


def too_few_rows_of_meta(tensors):
    tensors[f"{UP}.weight_meta"] = tensors[f"{UP}.weight_meta"][:3].clone()


def signed_meta(tensors):
    tensors[f"{UP}.weight_meta"] = tensors[f"{UP}.weight_meta"].view(torch.int8)


def whole_number_weight(tensors):
    tensors[f"{UP}.weight"] = tensors[f"{UP}.weight"].to(torch.int32)


def odd_width(tensors):
    tensors[f"{UP}.weight"] = tensors[f"{UP}.weight"][:, :5].clone()


def flat_weight(tensors):
    tensors[f"{UP}.weight"] = tensors[f"{UP}.weight"].flatten()


def empty_weight(tensors):
    tensors[f"{UP}.weight"] = tensors[f"{UP}.weight"][:0].clone()


@pytest.mark.parametrize(
    ("damage", "rule", "message"),
    [
        (missing_meta, "missing tensor", r"config\.json lists it as pruned, and its weight_meta is missing"),
        (missing_weight, "missing tensor", r"config\.json lists it as pruned, and its weight is missing"),
        (
            short_meta,
            "weight_meta length",
            r"weight_meta has shape \(16, 1\); with weight \(16, 6\) at 2:4 .* \(16, 2\)",
        ),
        (too_few_rows_of_meta, "weight_meta length", r"weight_meta has shape \(3, 2\); .* it must be \(16, 2\)"),
        (signed_meta, "weight_meta dtype", r"weight_meta has dtype I8; it must be U8"),
        (whole_number_weight, "weight dtype", r"weight has dtype I32; it must be F64, F32, F16 or BF16"),
        (odd_width, "weight shape", r"weight has shape \(16, 5\); at 2:4 it must be \(out, in\*2/4\)"),
        (flat_weight, "weight shape", r"weight has shape \(96,\)"),
        (empty_weight, "weight shape", r"weight has shape \(0, 6\)"),
    ],
)
def test_a_wrong_header_is_named_with_its_layer(checkpoint, damage, rule, message):
    damage(checkpoint.tensors)
    assert [(violation.where, violation.rule) for violation in checkpoint.inspect().violations] == [(UP, rule)]
    with pytest.raises(CheckpointError, match=rf"^{UP}: {message}.*; download it again, or prune the model again"):
        checkpoint.check()


@pytest.mark.parametrize("twin", ["model.layers.1.up_proj", "model.decoder.layers.0.up_proj"])
def test_a_lost_layer_is_not_taken_for_its_twin_elsewhere(checkpoint, twin):
    checkpoint.packed["pruned_modules"][twin] = "2:4"  # listed, and there are no tensors of it
    assert [(violation.where, violation.rule) for violation in checkpoint.inspect().violations] == [
        (twin, "missing tensor")
    ]
    with pytest.raises(CheckpointError, match=f"{twin}: config.json lists it as pruned, and its weight is missing"):
        checkpoint.check()


@pytest.mark.parametrize("prefix", ["", "base.", "base.model."])
def test_the_prefix_of_a_base_model_makes_no_difference(checkpoint, prefix):
    stripped = {name.removeprefix("model."): tensor for name, tensor in checkpoint.tensors.items()}
    checkpoint.tensors = {prefix + name: tensor for name, tensor in stripped.items()}
    assert [layer.name for layer in checkpoint.inspect().layers] == [UP, DOWN]
    checkpoint.check()


# --- the contents of one layer


def one_kept_too_many(tensors):
    meta = tensors[f"{UP}.weight_meta"]
    meta[5, 0] = (meta[5, 0] & 0xF0) | 0b0111


def bits_in_the_padding(tensors):
    tensors[f"{UP}.weight_meta"][7, 1] |= 0b1000_0000


def not_a_number(tensors):
    tensors[f"{UP}.weight"][3, 2] = float("nan")


def infinite(tensors):
    tensors[f"{UP}.weight"][3, 2] = -float("inf")


@pytest.mark.parametrize(
    ("damage", "rule", "message"),
    [
        (one_kept_too_many, "pattern", r"weight_meta keeps 3 of 4 in row 5, group 0 .* 2:4 keeps exactly 2"),
        (bits_in_the_padding, "padding", r"weight_meta has bits set beyond in_features=12; they must be zero"),
        (not_a_number, "values", r"weight holds NaN or infinite values"),
        (infinite, "values", r"weight holds NaN or infinite values"),
    ],
)
def test_wrong_contents_are_named_with_their_layer(checkpoint, damage, rule, message):
    damage(checkpoint.tensors)
    inspection = checkpoint.inspect()
    assert [(violation.where, violation.rule) for violation in inspection.violations] == [(UP, rule)]
    assert [layer.name for layer in inspection.layers] == [DOWN]
    parts = checkpoint.tensors[f"{UP}.weight"], checkpoint.tensors[f"{UP}.weight_meta"]
    with pytest.raises(CheckpointError, match=rf"^{UP}: {message}"):
        check_packed_tensors(UP, *parts, PATTERN)


def test_sound_contents_pass():
    check_packed_tensors(UP, *pack(gaussian(4, 12), random_mask(4, 12, 2, 4), PATTERN), PATTERN)


def test_a_packed_layer_that_is_not_listed_is_named(checkpoint):
    del checkpoint.packed["pruned_modules"][UP]
    assert [(violation.where, violation.rule) for violation in checkpoint.inspect().violations] == [(UP, "not listed")]


def test_integers_that_are_not_listed_are_named(checkpoint):
    name = "model.norm"
    checkpoint.tensors[f"{name}.weight"] = torch.ones(12, dtype=torch.int8)
    (found,) = checkpoint.inspect().violations
    assert (found.where, found.rule) == (name, "not listed")
    assert found.detail == "is of I8, and config.json does not list it"
    with pytest.raises(CheckpointError, match=rf"^{name}: is of I8, and config.json does not list it; download"):
        checkpoint.check()


def test_a_promised_floor_that_does_not_hold_is_named(checkpoint):
    # All rows of one layer keep the first half of each group; the other layer keeps its floor.
    values = checkpoint.tensors[f"{UP}.weight"]
    mask = torch.tensor([True, True, False, False]).repeat(16, 3)
    _, meta = pack(mask.to(values.dtype), mask, PATTERN)
    checkpoint.tensors[f"{UP}.weight_meta"] = meta
    assert bool(unpack(values, meta, PATTERN)[:, :2].any())
    checkpoint.packed |= {"min_degree": 1, "band": 12}
    inspection = checkpoint.inspect()
    assert [(violation.where, violation.rule) for violation in inspection.violations] == [(UP, "floor")]
    assert "promises that every input keeps 1 of every 12 rows, and one keeps 0" in inspection.violations[0].detail


def test_a_promised_floor_that_holds_is_no_violation(checkpoint):
    checkpoint.packed |= {"min_degree": 1, "band": 64}  # more rows than the layers have
    assert checkpoint.inspect().ok


# --- the files


def test_a_truncated_file_is_named(checkpoint):
    file = checkpoint.write() / WEIGHTS_NAME
    file.write_bytes(file.read_bytes()[:-10])
    assert found_in(checkpoint.folder) == [(WEIGHTS_NAME, "file")]
    with pytest.raises(CheckpointError, match=rf"{WEIGHTS_NAME}: is truncated or no safetensors file \(.*\); download"):
        read_headers([file])


def test_a_file_of_something_else_is_named(checkpoint):
    file = checkpoint.write() / WEIGHTS_NAME
    file.write_bytes(b"<html>not found</html>")
    assert found_in(checkpoint.folder) == [(WEIGHTS_NAME, "file")]
    with pytest.raises(CheckpointError, match="is truncated or no safetensors file"):
        check_files([file], checkpoint.packed["pruned_modules"])


def test_a_file_that_the_index_names_and_is_not_there_is_named(checkpoint):
    folder = checkpoint.write()
    (folder / WEIGHTS_NAME).rename(folder / "first.safetensors")
    index = {"weight_map": {UP: "first.safetensors", DOWN: "model-00002-of-00002.safetensors"}}
    (folder / INDEX_NAME).write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"model-00002-of-00002\.safetensors: is missing; download it again"):
        weight_files(folder)
    [violation] = inspect_checkpoint(folder, progress=False).violations
    assert "model-00002-of-00002.safetensors: is missing" in violation.detail


def test_a_folder_without_weights_is_named(checkpoint):
    (checkpoint.write() / WEIGHTS_NAME).unlink()
    with pytest.raises(CheckpointError, match=rf"{WEIGHTS_NAME}: is missing"):
        weight_files(checkpoint.folder)


@pytest.mark.parametrize(
    ("put", "what"),
    [(Path.mkdir, "is a folder, where a file must be"), (partial(Path.symlink_to, target="gone"), "is a link to gone")],
)
def test_what_is_in_the_place_of_a_file_is_called_what_it_is(put, what, checkpoint):
    folder = checkpoint.write()
    for name in (WEIGHTS_NAME, "config.json"):
        (folder / name).unlink()
        put(folder / name)
    with pytest.raises(CheckpointError, match=f"config.json: {what}"):
        read_config(folder)
    for read in (weight_files, lambda folder: read_headers([folder / WEIGHTS_NAME])):
        with pytest.raises(CheckpointError, match=f"{WEIGHTS_NAME}: {what}"):
            read(folder)
    (folder / INDEX_NAME).write_text(json.dumps({"weight_map": {UP: "first.safetensors"}}))
    put(folder / "first.safetensors")
    with pytest.raises(CheckpointError, match=f"first.safetensors: {what}"):
        weight_files(folder)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"weight_map": []}', '{"weight_map": {"a": 1}}'])
def test_a_damaged_index_is_named(checkpoint, text):
    (checkpoint.write() / INDEX_NAME).write_text(text)
    (checkpoint.folder / WEIGHTS_NAME).unlink()
    with pytest.raises(CheckpointError, match="is not a safetensors index"):
        weight_files(checkpoint.folder)
    assert not inspect_checkpoint(checkpoint.folder, progress=False).ok


def test_an_index_cannot_lead_out_of_the_folder(checkpoint):
    folder = checkpoint.write()
    (folder / WEIGHTS_NAME).rename(folder / "first.safetensors")
    (folder / INDEX_NAME).write_text(json.dumps({"weight_map": {UP: "../../first.safetensors"}}))
    assert weight_files(folder) == [folder / "first.safetensors"]


def test_a_single_file_goes_before_an_index_as_in_transformers(checkpoint):
    checkpoint.write()
    (checkpoint.folder / INDEX_NAME).write_text(json.dumps({"weight_map": {"a": "other.safetensors"}}))
    assert [file.name for file in weight_files(checkpoint.folder)] == ["model.safetensors"]


def test_layers_may_be_spread_over_files(checkpoint):
    folder = checkpoint.write()
    second = {name: tensor for name, tensor in checkpoint.tensors.items() if name.startswith(DOWN)}
    first = {name: tensor for name, tensor in checkpoint.tensors.items() if name not in second}
    (folder / WEIGHTS_NAME).unlink()
    save_file(first, folder / "first.safetensors")
    save_file(second, folder / "second.safetensors")
    (folder / INDEX_NAME).write_text(json.dumps({"weight_map": {UP: "first.safetensors", DOWN: "second.safetensors"}}))
    inspection = inspect_checkpoint(folder, progress=False)
    assert inspection.ok
    assert len(inspection.layers) == 2


def test_headers_tell_shape_dtype_and_file(checkpoint):
    entries = read_headers(weight_files(checkpoint.write()))
    entry = entries[f"{UP}.weight"]
    assert (entry.shape, entry.dtype, entry.file.name) == ((16, 6), "BF16", WEIGHTS_NAME)
    assert entries.keys() == checkpoint.tensors.keys()


@pytest.mark.parametrize("files", [[], ["pytorch_model.bin"]])
def test_other_kinds_of_files_are_refused(files):
    with pytest.raises(CheckpointError, match="a packed checkpoint is of safetensors files only"):
        check_files(files, {UP: "2:4"})


# --- the configuration


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{not json", r"config\.json: is not valid JSON \(.*\); download it again"),
        ("{}", r"has no quantization_config of 'eggs': this model is not packed; prune it first"),
        ("[]", r"has no quantization_config of 'eggs'"),
        ('{"quantization_config": {"quant_method": "gptq"}}', r"has no quantization_config of 'eggs'"),
        (
            '{"quantization_config": {"quant_method": "eggs", "format_version": 99}}',
            r"format_version=99 is unknown to this release, which reads versions up to 2; upgrade optimum-eggs",
        ),
        ('{"quantization_config": {"quant_method": "eggs"}}', r"format_version=None is unknown"),
    ],
)
def test_a_wrong_configuration_is_named(checkpoint, text, message):
    (checkpoint.write() / "config.json").write_text(text)
    assert found_in(checkpoint.folder) == [("config.json", "config")]
    with pytest.raises(CheckpointError, match=message):
        read_config(checkpoint.folder)


def test_a_folder_without_a_configuration_is_named(tmp_path):
    assert found_in(tmp_path) == [("config.json", "config")]
    with pytest.raises(CheckpointError, match=r"there is no config\.json in it; pass the folder of a saved model"):
        read_config(tmp_path)


@pytest.mark.parametrize("listed", [None, {}, [UP], {UP: "4:2"}, {UP: 24}])
def test_a_list_of_layers_that_cannot_be_read_is_named(checkpoint, listed):
    checkpoint.packed["pruned_modules"] = listed
    assert found_in(checkpoint.write()) == [("config.json", "config")]
    with pytest.raises(CheckpointError, match=r"config\.json: pruned_modules"):
        pruned_patterns(checkpoint.packed)


def test_the_configuration_of_a_sound_checkpoint_is_read(checkpoint):
    assert read_config(checkpoint.write()) == checkpoint.packed
    assert pruned_patterns(checkpoint.packed) == {UP: PATTERN, DOWN: PATTERN}
