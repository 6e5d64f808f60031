import argparse
import importlib.util
import json
import shutil
import struct
import subprocess
import sys
import zlib
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch

from optimum_eggs import EGGSPruner
from optimum_eggs.calibration.windows import windows_digest
from optimum_eggs.cli.main import main
from optimum_eggs.masks import expander_mask, shortfall, topn_mask
from optimum_eggs.masks.certificate import certify
from optimum_eggs.packing import pack
from optimum_eggs.update import Problem

SCRIPTS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture(scope="module")
def run(forks):
    return lambda script, *arguments: forks.run(SCRIPTS / script, *arguments, check=True)


@pytest.fixture(scope="module")
def quality(run, tmp_path_factory, dense_folder, text_file):
    """A result of quality.py, and the arguments it was made with."""
    result = tmp_path_factory.mktemp("quality") / "result.json"
    arguments = [dense_folder, "--calibration", text_file, "--text", text_file, "--patterns", "2:4", "--json", result]
    arguments += ["--num-samples", 8, "--seq-len", 16, "--test-windows", 2, "--test-seq-len", 32]
    return result, arguments, run("quality.py", *arguments, "--methods", "dense", "fast", "--draws", 0, 1)


def test_quality_prints_what_it_writes(quality):
    result, _, done = quality
    rows = json.loads(result.read_text())["rows"]
    assert [(row["method"], row["draw"]) for row in rows] == [("dense", 0), ("fast", 0), ("fast", 1)]
    assert rows[1]["calibration_sha256"] != rows[2]["calibration_sha256"]
    mean = (rows[1]["perplexity"] + rows[2]["perplexity"]) / 2
    assert f"| 2:4 | fast | 2 | {mean:.2f} ±" in done.stdout
    assert f"|  | dense | 1 | {rows[0]['perplexity']:.2f} |" in done.stdout


def test_quality_goes_on_where_it_stopped(run, quality):
    result, arguments, _ = quality
    before = json.loads(result.read_text())["rows"]
    done = run("quality.py", *arguments, "--methods", "dense", "fast", "fast:min_degree=4,refit_steps=2")
    after = json.loads(result.read_text())["rows"]
    assert after[: len(before)] == before
    assert [row["method"] for row in after[len(before) :]] == ["fast:min_degree=4,refit_steps=2"]
    assert (after[-1]["config"]["min_degree"], after[-1]["config"]["refit_steps"]) == (4, 2)
    assert "fast:min_degree=4,refit_steps=2" in done.stdout


def test_a_run_from_disk_is_known_by_all_its_settings(run, quality, tmp_path):
    in_memory, arguments, _ = quality
    shorter = [*arguments, "--json", tmp_path / "rows.json", "--methods", "fast", "--from-disk", tmp_path / "work"]
    printed = run("quality.py", *shorter).stdout
    assert "peak memory" in printed
    (row,) = json.loads((tmp_path / "rows.json").read_text())["rows"]
    same = next(each for each in json.loads(in_memory.read_text())["rows"] if each["method"] == "fast")
    assert row["perplexity"] == pytest.approx(same["perplexity"], rel=1e-5)
    assert row["memory_growth"] == row["peak_rss"] / row["dense_bytes"] > 1
    (tmp_path / "rows.json").unlink()  # cut before its row was written: nothing is pruned again
    run("quality.py", *shorter)
    assert json.loads((tmp_path / "rows.json").read_text())["rows"][0]["seconds"] == row["seconds"]
    run("quality.py", *shorter, "--seq-len", 12)
    assert len(list((tmp_path / "work").glob("*.json"))) == 2


def test_settings_are_judged_on_the_end_of_the_calibration_text(run, quality, tmp_path):
    arguments = [*quality[1][:3], "--development", "--blocks", "1", "--json", tmp_path / "rows.json"]
    sizes = ["--num-samples", 8, "--seq-len", 16, "--test-windows", 2, "--test-seq-len", 32]
    run("quality.py", *arguments, *sizes, "--methods", "best:block_tuning=4")
    (row,) = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert row["config"]["targets"] == ["layers.1"]
    assert len(row["tuning"]) == 1
    assert row["kl"] > 0


def test_quality_knows_rows_that_are_older_than_an_option(run, quality, tmp_path):
    result, arguments, _ = quality
    rows = [row for row in json.loads(result.read_text())["rows"] if row["method"] in ("dense", "fast")]
    for row in rows[1:]:
        del row["config"]["min_expert_tokens"]
    older = tmp_path / "older.json"
    older.write_text(json.dumps({"rows": rows}))
    arguments = [older if argument is result else argument for argument in arguments]
    run("quality.py", *arguments, "--methods", "dense", "fast")
    assert json.loads(older.read_text())["rows"] == rows
    run("quality.py", *arguments, "--methods", "fast:min_expert_tokens=3")
    assert len(json.loads(older.read_text())["rows"]) == len(rows) + 1


@pytest.mark.parametrize(("method", "known"), [("ria", True), ("fast", False)])
def test_quality_takes_a_value_that_a_row_lacks_for_one_that_the_method_had_not(method, known, run, quality, tmp_path):
    older = tmp_path / "older.json"
    arguments = [older if argument is quality[0] else argument for argument in quality[1]]
    run("quality.py", *arguments, "--methods", method)
    (row,) = json.loads(older.read_text())["rows"]
    del row["config"]["error_correction"]
    older.write_text(json.dumps({"rows": [row]}))
    run("quality.py", *arguments, "--methods", method)
    assert len(json.loads(older.read_text())["rows"]) == (1 if known else 2)


def test_the_picture_shows_every_method(run, quality, tmp_path):
    result, _, _ = quality
    run("draw.py", result, tmp_path / "out.svg")
    picture = (tmp_path / "out.svg").read_text()
    assert "dense" in picture
    assert "fast (ours)" in picture


def test_solvers_are_compared_on_the_layers_asked_for(run, dense_folder, text_file):
    arguments = ["--calibration", text_file, "--blocks", 1, "--num-samples", 4, "--seq-len", 16, "--repeat", 1]
    printed = run("solvers.py", dense_folder, *arguments).stdout
    for layer in ("self_attn.v_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj"):
        assert f"| model.layers.1.{layer} | ALPS |" in printed
    assert "model.layers.0" not in printed


def test_solvers_are_compared_with_published_programs(run, tmp_path):
    shutil.copy(SCRIPTS.parent / "tests" / "golden" / "solvers" / "nearly_sparse.safetensors", tmp_path)
    printed = run("golden.py", tmp_path).stdout
    for program in ("alps", "alps-float64", "sparsegpt", "wanda", "ria"):
        assert f"| nearly_sparse | 64x128 | 2:4 | {program} |" in printed


@pytest.mark.slow
def test_training_is_timed_packed_and_dense(run, packed_folder, dense_folder):
    sizes = ["--batch-size", 2, "--seq-len", 16, "--steps", 1, "--warm-up", 1]
    printed = run("training.py", packed_folder, "--against", dense_folder, *sizes).stdout
    for kind in ("dense-lora", "lora", "values"):
        assert f"| {kind} |" in printed


def test_a_merge_is_judged_beside_its_adapter(run, packed_folder, text_file, tmp_path):
    integers = tmp_path / "int8"
    assert main(["quantize", str(packed_folder), str(integers), "--values", "int8"]) == 0
    sizes = ["--steps", 2, "--seq-len", 16, "--test-windows", 2, "--test-seq-len", 32, "--learning-rate", 0.1]
    printed = run("merging.py", packed_folder, integers, "--train", text_file, "--text", text_file, *sizes).stdout
    rows = [line.split("|")[1:-1] for line in printed.splitlines() if line.startswith("| ")][1:]
    assert [row[0].strip() for row in rows] == [packed_folder.name, "int8"]
    for _, *row in rows:
        before, adapted, merged = map(float, row)
        assert abs(before - adapted) > 0.01 * before
        assert abs(merged - adapted) < 0.2 * abs(before - adapted)
    assert rows[0][2] == rows[0][3]  # what is floats loses nothing


@pytest.mark.slow
def test_integers_are_timed_beside_floats(run):
    arguments = ["--shapes", "64x128", "--tokens", 1, 9, "--repeats", 2, "--group", 64]
    printed = run("integers.py", *arguments).stdout
    assert [line.split("|")[3].strip() for line in printed.splitlines() if line.startswith("| 64x128 | 9 ")] == [
        "packed bfloat16",
        "dense bfloat16",
        "dense bfloat16, by our kernel",
        "int8",
        "int4",
        "dense int8",
    ]


def test_values_are_judged_and_kept_as_they_come(run, packed_folder, text_file, tmp_path):
    result = tmp_path / "values.json"
    arguments = [packed_folder, "--calibration", text_file, "--text", text_file, "--json", result, "--head", "int8"]
    arguments += ["--num-samples", 4, "--seq-len", 16, "--test-windows", 2, "--test-seq-len", 32, "--single", 8]
    variants = ["floats", "int4:rounding_tuning=2", "int4:rounding=nearest"]
    printed = run("values.py", *arguments, "--variants", *variants).stdout
    rows = json.loads(result.read_text())["rows"]
    assert [row["variant"] for row in rows] == variants
    assert rows[0]["share_of_bfloat16"] == pytest.approx(2 * 9 / 16 - 1 / 16)  # float32
    assert rows[1]["share_of_bfloat16"] < 0.26
    assert rows[1]["file_bytes"] < rows[0]["file_bytes"] / 2
    assert len(rows[1]["tuning"]) == 2
    assert f"| {rows[1]['perplexity']:.2f} | {rows[1]['perplexity'] / rows[0]['perplexity']:.4f} |" in printed
    run("values.py", *arguments, "--variants", *variants)
    assert json.loads(result.read_text())["rows"] == rows


def test_quality_against_time_is_kept_as_it_comes(run, forks, dense_folder, text_file, tmp_path):
    result = tmp_path / "result.json"
    small = ["--num-samples", 8, "--seq-len", 16, "--test-windows", 2, "--test-seq-len", 32, "--kd-ratio", 0.5]
    command = [dense_folder, "--from-disk", tmp_path / "pruned", "--json", result, "--presets", "fast", *small]
    text = ["--calibration", text_file, "--text", text_file]
    assert "fast, 2 steps" in run("frontier.py", *command, *text, "--steps", 0, 2).stderr
    kept = result.read_bytes()
    rows = json.loads(kept)["rows"]
    assert [(row["steps"], row["training"].get("kd_ratio")) for row in rows] == [(0, None), (2, 0.5)]
    assert rows[0]["seconds"] == rows[0]["seconds_of_pruning"] == rows[1]["seconds_of_pruning"] < rows[1]["seconds"]
    assert all(row["kl"] > 0 and 1 < row["perplexity"] < 1e6 for row in rows)
    done = run("frontier.py", *command, *text, "--steps", 0, 2)
    assert "steps" not in done.stderr
    assert f"| {rows[1]['perplexity']:.2f} |" in done.stdout
    assert all("other_text" not in row for row in rows)
    run("frontier.py", *command, *text, "--steps", 0, "--other-text", text_file)
    (other,) = (row for row in json.loads(result.read_text())["rows"] if row not in rows)
    assert [other[f"other_{key}"] for key in ("text", "perplexity", "kl")] == [
        text_file.name,
        rows[0]["perplexity"],
        rows[0]["kl"],
    ]
    for draw in (0, 1):
        alone = run("frontier.py", *command, *text, "--steps", 2, "--same-windows", "--draw", draw)
        assert "| the same windows |" in alone.stdout
    kept = result.read_bytes()
    missing = ["--calibration", tmp_path / "no.txt", "--text", text_file, "--steps", 0]
    failed = forks.run(SCRIPTS / "frontier.py", *command, *missing)
    assert failed.returncode
    assert "no.txt" in failed.stderr
    other = [*text, "--steps", 3, "--other-text", tmp_path / "none.txt"]
    failed = forks.run(SCRIPTS / "frontier.py", *command, *other)
    assert "none.txt" in failed.stderr
    assert "3 steps" not in failed.stderr  # before the work
    assert result.read_bytes() == kept


@pytest.mark.parametrize("draw", [0, 1])
def test_the_same_windows_are_those_that_calibrated(draw, script, dense_folder, tokenizer, text_file):
    sizes = {"num_samples": 8, "seq_len": 16, "blocks": None, "development": False}
    texts = {"calibration": str(text_file), "text": str(text_file)}
    args = argparse.Namespace(**sizes, **texts, worker="magnitude", pattern="2:4", draw=draw, same_windows=True)
    ids = script("frontier").training_ids(tokenizer, args)
    pruner = EGGSPruner.from_pretrained(dense_folder)
    report = pruner.prune(script("quality").configuration("fast", "2:4", draw, args))
    assert windows_digest(torch.tensor(ids).view(8, 16)) == report.calibration["sha256"]
    args.same_windows = False
    assert len(script("frontier").training_ids(tokenizer, args)) > 8 * 16


def test_quality_against_time_is_drawn(run, forks, tmp_path):
    pytest.importorskip("matplotlib")
    dense = {"model": "tiny", "perplexity_of_dense": 10.0, "pattern": "2:4", "threads": 3}
    share = {"same_windows": False, "kd_ratio": 0.5}
    rows = [
        dense | {"method": "fast", "steps": 0, "training": {}, "seconds": 300, "perplexity": 22.0},
        dense | {"method": "fast", "steps": 9, "training": share, "seconds": 900, "perplexity": 16.0},
        dense | {"method": "best", "steps": 0, "training": {}, "seconds": 600, "perplexity": 18.0},
        dense
        | {
            "method": "best",
            "steps": 9,
            "training": share | {"same_windows": True},
            "seconds": 900,
            "perplexity": 12.0,
        },
    ]
    drawn = drawn_of(rows, run, tmp_path)
    assert {"fast, trained by teacher (50%) and text", "tiny at 2:4, 3 threads"} <= set(drawn)
    assert {"1.6", "2.2"} <= set(drawn)
    assert "1.2" not in drawn  # that of a part of the text

    other = [row | {"other_text": "novel", "other_perplexity": 31.0, "other_perplexity_of_dense": 10.0} for row in rows]
    assert {"on novel", "1.6", "3.1"} <= set(drawn_of(other, run, tmp_path))
    assert "on novel" not in drawn_of([*other[:1], *rows[1:]], run, tmp_path)  # of which not all rows tell

    failed = forks.run(SCRIPTS / "draw_frontier.py", tmp_path / "result.json", "other", tmp_path / "none.svg")
    assert failed.returncode == 1
    assert "no row of other that was trained" in failed.stderr
    assert not (tmp_path / "none.svg").exists()


def drawn_of(rows, run, folder):
    (folder / "result.json").write_text(json.dumps({"rows": rows}))
    run("draw_frontier.py", folder / "result.json", "tiny", folder / "out.svg")
    return [text.text for text in ElementTree.parse(folder / "out.svg").iter("{http://www.w3.org/2000/svg}text")]


def test_programs_are_measured_in_turn_and_what_is_missing_is_skipped(
    run, dense_folder, packed_folder, text_file, tmp_path
):
    result = tmp_path / "peers.json"
    arguments = [
        dense_folder,
        "--text",
        text_file,
        "--ours",
        f"2:4={packed_folder}",
        "--compiled",
        f"2:4={packed_folder}",
        "--work",
        tmp_path,
        "--json",
        result,
    ]
    arguments += ["--peers", "dense", "torchao-int8", "--python", f"torchao={sys.executable}", "--marked", "dense"]
    arguments += ["--windows", 2, "--seq-len", 32, "--prompt", 16, "--new-tokens", 4, "--rounds", 2, "--repeats", 2]
    done = run("peers.py", *arguments)
    if importlib.util.find_spec("torchao") is None:
        assert "torchao-int8 is left out" in done.stderr
    found = json.loads(result.read_text())
    rows = {row["name"]: row for row in found["rows"]}
    assert {"ours 2:4", "ours 2:4, compiled", "dense"} <= rows.keys()
    assert rows["ours 2:4, compiled"]["loss"] == pytest.approx(rows["ours 2:4"]["loss"], abs=1e-3)
    assert len(rows["dense"]["decode"]) == 4
    assert rows["ours 2:4"]["bytes"] < rows["dense"]["bytes"]
    assert f"| dense \\* | {8 * rows['dense']['bytes'] / found['parameters']:.2f} |" in done.stdout
    again = run("peers.py", "--table", result).stdout
    assert again.splitlines()[-2:] == done.stdout.splitlines()[-2:]
    run("draw_peers.py", result, tmp_path / "out.svg")
    drawn = [text.text for text in ElementTree.parse(tmp_path / "out.svg").iter("{http://www.w3.org/2000/svg}text")]
    assert {"2:4", "dense"} <= set(drawn)
    assert drawn.count("2:4") == 1  # compiled it is the same model


def test_processes_are_compared(run, dense_folder, text_file, tmp_path):
    sizes = ["--num-samples", 8, "--seq-len", 16, "--num-windows", 2, "--test-seq-len", 32]
    texts = ["--calibration", text_file, "--text", text_file]
    printed = run("ranks.py", dense_folder, tmp_path, *texts, *sizes).stdout
    assert "the same positions in" in printed
    assert [line.split("|")[1].strip() for line in printed.splitlines()[-2:]] == ["1", "2"]


def test_costs_are_counted_and_checked(run, dense_folder, text_file):
    rates = ["--gflops", 100, 200]
    lines = run("cost_model.py", "--shapes", "8B", "--processes", 1, 2, *rates).stdout.splitlines()
    # 32 blocks of 218 M weights and two passes' attention, 262144 tokens: by hand from the shapes.
    hidden, intermediate, keys, tokens = 4096, 14336, 1024, 128 * 2048
    attention, mlp = 2 * hidden * (hidden + keys), 3 * hidden * intermediate
    behind = [hidden * (hidden + 2 * keys), attention, 2 * hidden * intermediate, mlp]  # attention is kept
    operations = 2 * 32 * tokens * (2 * sum(behind) + 2 * 4 * 2048 * hidden)  # and the dense model's
    assert float(lines[-2].split("|")[3]) == pytest.approx(operations / 200e9 / 3600, abs=0.06)
    assert float(lines[-1].split("|")[3]) == pytest.approx(operations / 400e9 / 3600, abs=0.06)
    sizes = ["--num-samples", 4, "--seq-len", 16]
    printed = run("cost_model.py", "--check", dense_folder, "--calibration", text_file, *sizes, *rates).stdout
    assert [line.split("|")[2].strip() for line in printed.splitlines()[2:]] == [
        "forward",
        "statistics",
        "update",
        "all",
    ]


def test_kinds_of_the_sample_follow_each_other_in_turns():
    spec = importlib.util.spec_from_file_location("make_sample", SCRIPTS / "make_sample.py")
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    parts = list(made.in_turns([["a" * 2000] * 8, ["b" * 4000] * 2]))
    assert [part[0] for part in parts] == ["a", "b", "a", "a", "b", "a"]
    assert "".join(parts).count("a") == 16000
    assert made.first(["abc", "de", "f"], 6) == ["abc", "de"]
    country = {"People": {"Climate": {"text": "Hot. Dry. ++ Windy."}, "Ports": {"text": "One, Two"}, "Area": {}}}
    assert list(made.sections(country)) == ["Climate: Hot. Dry. Windy."]


def test_books_are_read_from_their_package(run, tmp_path):
    lines = ["EMMA", "", "A line", "and another.", "", "The end — of it."]
    encoded = b"".join(struct.pack(">ii", 0x9, len(line.encode())) + line.encode() for line in lines)
    chunk = b"X\n" + struct.pack(">iii", 3, 0, 0) + struct.pack(">i", 5) + b"UTF-8" + struct.pack(">ii", 16, len(lines))
    chunk += encoded
    database = struct.pack(">I", len(chunk)) + zlib.compress(chunk)
    (tmp_path / "Rdata.rdb").write_bytes(database * 2)
    run("make_books.py", tmp_path / "Rdata.rdb", tmp_path / "books")
    assert (tmp_path / "books" / "emma.txt").read_text() == "EMMA\nA line and another.\nThe end — of it.\n"


@pytest.fixture
def script(monkeypatch):
    """A script as a module: what it imports beside it is found."""
    monkeypatch.syspath_prepend(str(SCRIPTS))
    return importlib.import_module


@pytest.mark.slow
def test_what_is_for_gpus_runs_on_small_shapes(run, tmp_path):
    # a process of its own, since it begins pytest in another
    command = [sys.executable, SCRIPTS / "gpu.py", "--tiny", "--device", "cpu", "--json", tmp_path / "gpu.json"]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert found["machine"]["device"].startswith("cpu")
    assert found["machine"]["versions"]["torch"]
    rows = {(row["part"], row["name"]): row for row in found["rows"]}
    assert rows["tests", "tests/cuda"]["passed"] == 3
    assert rows["prune", "best"]["whole_seconds"] == pytest.approx(rows["prune", "best"]["whole"]["all"])
    for solver in ("topn_mask", "expander_mask", "sparsegpt", "admm", "masked_refit", "channel_order"):
        assert rows["solver", f"{solver} 64x192"]["seconds"]
    assert rows["solver", "admm 64x192"]["factorisations"] > 1
    assert rows["layer", "reference 192x64, 8 tokens"]["ratio"] > 0
    assert not any(row.get("failed") for row in found["rows"])
    assert f"{len(rows)} rows" in printed
    # the rates found are those that a prediction can be made from
    assert "| tuning |" in run("gpu_cost.py", "--card", tmp_path / "gpu.json", "--presets", "best").stdout


def test_rows_are_kept_as_they_come_and_what_fails_or_does_not_fit_is_named(script, tmp_path):
    path, gpu = tmp_path / "rows.json", script("gpu")
    record = gpu.Record(path, {}, budget=100)

    def rows():
        return json.loads(path.read_text())["rows"]

    record.attempt("a", "good", 1, lambda: {"seconds": 2.0}, counted=1.5)
    assert (rows()[0]["seconds"], rows()[0]["counted"]) == (2.0, 1.5)
    record.attempt("a", "wrong", 1, lambda: gpu.require(False, "what must hold"))
    assert rows()[1]["failed"] == "NumericalError: what must hold does not hold"
    record.attempt("a", "long", 1000, lambda: pytest.fail("there is no time for it"))
    assert rows()[2]["left_out"].startswith("takes about 1000 s")


def test_tests_are_counted_where_their_run_was_cut(script):
    printed = "tests/a.py::test_x[1-a b] PASSED [ 10%]\ntests/a.py::test_y FAILED   [ 20%]\ntests/a.py::test_z"
    found = script("gpu").outcomes(printed)
    assert (found["passed"], found["failed"], found["failures"]) == (1, 1, ["tests/a.py::test_y"])


def test_a_whole_model_is_estimated_by_one_block(script):
    ran = {"seconds": 20.0, "one_pass": 0.5, "stages": {"forward": 1.5, "update": 13.0}}
    assert script("gpu").whole(ran, blocks=2) == {"forward": 4.0, "update": 26.0, "other": 11.0, "all": 41.0}


def test_costs_on_a_gpu_are_counted_from_the_shapes(script, monkeypatch):
    cost = script("gpu_cost")
    monkeypatch.setattr(cost, "counts", lambda: cost.Counts(*[cost.Work()] * 6))
    shape = cost.SHAPES["8B"]
    found = cost.block_work(shape, 128, 2048, "best")
    # eleven factors each of q, k, v, o, gate, up and down; those of down in float64 while the penalty is below 0.17
    narrow, wide = (found[f"ADMM: factorisations in {dtype}"] for dtype in ("float32", "float64"))
    assert narrow.factor32 == pytest.approx((11 * 6 * 4096**3 + 8 * 14336**3) / 3)
    assert wide.factor == pytest.approx(3 * 14336**3 / 3)
    # k, v and down have too few rows for an inverse
    assert (narrow.float32, wide.float64) == (pytest.approx(11 * 2 * 4 * 4096**3), 0)
    assert (narrow.wait, wide.wait) == (2 * (11 * 6 + 8), 2 * 3)
    assert found["report and packing"].wait == 7 * 26
    weights, attention = 2 * 4096 * (4096 + 1024) + 3 * 4096 * 14336, 4 * 2048 * 4096
    tuning = found["tuning"]
    assert tuning.half == pytest.approx(2048 * 2 * weights * 3 * 200)
    assert tuning.float32 == pytest.approx(2048 * ((2 * weights + attention) * 2 * 16 + attention * 3 * 200))
    alone = cost.block_work(shape, 128, 2048, "best", float32=True)["tuning"]
    assert (alone.half, alone.float32) == (0, pytest.approx(tuning.half + tuning.float32))
    turned = cost.block_work(shape, 128, 2048, "best", rotation=True)
    # 1024 rows of k and v, 4096 rows or columns of each other layer
    assert turned["rotation"].float32 == pytest.approx(60 * 4 * (2 * 1024 + 5 * 4096) * 4096**2 + 4 * 4096**3)
    assert turned["rotation: factors in float64"].factor == pytest.approx((3 * 4096**3 + 14336**3) / 3)
    assert turned["statistics"].half == 2 * found["statistics"].half
    h100, consumer = (sum(found.values(), cost.Work()).seconds(card) for card in cost.CARDS.values())
    assert consumer > h100


def test_what_would_be_otherwise_is_counted_anew(script):
    cost = script("gpu_cost")
    printed = cost.what_if(cost.SHAPES["8B"], 128, 2048, cost.CARDS).splitlines()[2:]
    minutes = {row.split("|")[1].strip(): int(row.split("|")[2]) for row in printed}
    assert minutes["as above"] < minutes["ADMM does 90 steps a layer in place of 33"]
    assert 4 * minutes["as above"] < minutes["ADMM never settles, and does 300"]
    assert minutes["windows of 512 tokens"] < minutes["as above"] < minutes["tuning and statistics multiply in float32"]
    assert cost.ADMM_STEPS == 33


def test_factorisations_are_counted_by_their_dtype(script):
    problem = Problem(torch.eye(4))
    with script("gpu").factorisations() as found:
        for penalty in (0.1, 0.2, 1e-6):
            problem.penalised(penalty)
    problem.penalised(0.1)
    assert found == {torch.float32: 2, torch.float64: 1}


@pytest.mark.slow
def test_launches_waits_and_bytes_are_counted_in_the_code(script):
    cost = script("gpu_cost")
    counted = cost.counted(lambda: torch.ones(4)[torch.ones(4) > 0].sum().item())
    assert (counted.wait, counted.launch) == (2, 6)  # ones, ones, >, [], sum, item
    found = cost.counts()
    # whether the score is finite, and whether a tile is short
    assert found.project.wait == 2
    assert found.chunk.wait > 5
    assert found.refit.wait == 0
    score = cost.even(512, 32)
    mask = expander_mask(score, cost.PATTERN)
    after = [
        cost.counted(lambda: shortfall(topn_mask(score, cost.PATTERN), cost.PATTERN, 1, 16)),
        cost.counted(lambda: certify(mask, cost.PATTERN)),
        cost.counted(lambda: pack(score, mask, cost.PATTERN)),
    ]
    # and what only a GPU waits for: `tolist`, the copy of a mask to pack by, two of `cpu`; two more in the engine
    assert sum(work.wait for work in after) + 6 == cost.AFTER_LAYER
    # at least: the score read twice, written and read once as groups; all by torch
    assert found.project.bandwidth > 16


def test_what_is_handed_on_is_judged_on_the_same_tokens(run, packed_folder, text_file):
    sizes = ["--windows", 2, "--seq-len", 32]
    printed = run("handing_on.py", packed_folder, "--text", text_file, *sizes).stdout.splitlines()
    assert [line.split("  ")[0] for line in printed[1:]] == ["packed, here", "dense, transformers"]
    assert abs(float(printed[2].split()[-1]) - 1) < 1e-3
