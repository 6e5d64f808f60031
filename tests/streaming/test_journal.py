"""The record of finished blocks: whole at any moment, and each block written down once."""

from __future__ import annotations

import json

from optimum_eggs.engine.block import BlockResult
from optimum_eggs.engine.report import DenseLayer
from optimum_eggs.engine.tune import BlockTuning
from optimum_eggs.streaming import journal
from optimum_eggs.streaming.journal import JOURNAL_NAME, Journal


def result(block):
    return BlockResult([], BlockTuning(block, 0.5, 0.25, 4, 2), [DenseLayer(f"layers.{block}.gate", "a gate", 8)])


def test_a_block_is_recorded_once_and_read_again(tmp_path, monkeypatch):
    recorded, as_json = [], journal._as_json
    monkeypatch.setattr(journal, "_as_json", lambda found: recorded.append(found) or as_json(found))
    own = Journal(tmp_path)
    for block in range(3):
        (tmp_path / f"block-{block}").write_bytes(bytes([block]))
        own.add(f"block-{block}", result(block), 1.5, 2**30)
        entries = json.loads((tmp_path / JOURNAL_NAME).read_text())
        assert [entry["file"] for entry in entries] == [f"block-{each}" for each in range(block + 1)]
    assert recorded == [result(block) for block in range(3)]  # not all of them again with every block
    again = Journal(tmp_path)
    assert again.finished == own.finished
    (tmp_path / "block-3").write_bytes(b"3")
    again.add("block-3", result(3), 0.5, 2**20)
    assert [block.result for block in Journal(tmp_path).finished] == [result(block) for block in range(4)]
