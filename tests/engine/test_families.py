"""Every family of models: pruned in memory and from disk, alike; stored, and back to the bit; and said in the docs."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path

import families
import pytest
import tiny
import torch
from packaging.version import Version

from optimum_eggs import EGGSPruner, NMLinear
from optimum_eggs.inspection import inspect_checkpoint
from optimum_eggs.streaming import prune_checkpoint

DOCUMENT = Path(__file__).parents[2] / "docs" / "architectures.md"
DOCUMENTED = Version("5.24")
"""The transformers that the document was made with: before it layers may be called otherwise."""
IDS = tiny.make_windows(2, 8) % 200  # no tokens that stand for images


@pytest.fixture(params=families.BY_NAME)
def family(request):
    found = families.BY_NAME[request.param]
    if found.missing():
        pytest.skip(f"transformers {version('transformers')} has no {found.missing()}")
    return found


def outputs(model):
    more = {"decoder_input_ids": IDS} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        return model(input_ids=IDS, **more).logits


@pytest.mark.usefixtures("reference_backend")
def test_it_is_pruned_in_memory_and_from_disk_and_comes_back(family, tmp_path):
    model = family.make()
    model.save_pretrained(tmp_path / "dense")
    dense = outputs(model)
    pruner = EGGSPruner(model)
    report = pruner.prune(families.config(family), progress=False)
    expected = outputs(model)
    assert not torch.equal(expected, dense)
    assert all(0 < layer.relative_error < 1 for layer in report.layers)  # each was calibrated, and is not all zeros
    pruner.save_pretrained(tmp_path / "memory")
    prune_checkpoint(tmp_path / "dense", tmp_path / "disk", families.config(family), progress=False)
    for folder in ("memory", "disk"):
        assert inspect_checkpoint(tmp_path / folder, progress=False).ok
        again = type(model).from_pretrained(tmp_path / folder).eval()
        assert sum(isinstance(layer, NMLinear) for layer in again.modules()) == len(report.layers)
        assert torch.equal(outputs(again), expected)
    if Version(version("transformers")) >= DOCUMENTED:
        assert families.row(family, report) in DOCUMENT.read_text().splitlines()


def test_the_document_has_no_family_that_is_not_tested():
    rows = [line for line in DOCUMENT.read_text().splitlines() if line.startswith("| ") and "`" in line]
    assert len(rows) == len(families.FAMILIES) == len(families.BY_NAME)


def test_a_model_of_text_and_images_sees_as_before(tmp_path):
    family = families.BY_NAME["LlavaForConditionalGeneration"]
    model = family.make()
    pixels = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    images = torch.full((2, 16), 255)
    ids = torch.cat([images, IDS], dim=1)
    pruner = EGGSPruner(model)
    pruner.prune(families.config(family), progress=False)
    pruner.save_pretrained(tmp_path / "packed")
    with torch.no_grad():
        expected = model(input_ids=ids, pixel_values=pixels).logits
        again = type(model).from_pretrained(tmp_path / "packed").eval()
        assert torch.equal(again(input_ids=ids, pixel_values=pixels).logits, expected)
        assert not torch.equal(again(input_ids=ids, pixel_values=1 - pixels).logits, expected)
    before, after = family.make().state_dict(), again.state_dict()
    eyes = [name for name in before if "vision_tower" in name or "multi_modal_projector" in name]
    assert len(eyes) > 30
    assert all(torch.equal(before[name], after[name]) for name in eyes)
