"""The page and its pictures: what is there, what is not, and that nothing is fetched."""

from __future__ import annotations

import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from optimum_eggs import EGGSPruner
from optimum_eggs.cli.main import main
from optimum_eggs.engine.report import update_report
from optimum_eggs.errors import CheckpointError, ModelError
from optimum_eggs.files import listed_files
from optimum_eggs.hf.loading import load_model
from optimum_eggs.inspection import inspect_checkpoint
from optimum_eggs.packing import pack_mask, unpack_mask
from optimum_eggs.report import report_page
from optimum_eggs.report.figures import perplexities
from optimum_eggs.report.tile import shown_tile
from optimum_eggs.sharing import model_card

pytest.importorskip("matplotlib")
GOLDEN = Path(__file__).parents[1] / "golden" / "v1" / "packed"


@pytest.fixture
def folder(packed_folder, tmp_path):
    shutil.copytree(packed_folder, tmp_path / "model")
    report = json.loads((tmp_path / "model" / "report.json").read_text())
    for key in ("evaluations", "tasks", "benchmark", "recovery"):
        report.pop(key, None)  # other tests measure the folder
    (tmp_path / "model" / "report.json").write_text(json.dumps(report))
    return tmp_path / "model"


def edit(folder, **values):
    path = folder / "report.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def captions(page):
    return re.findall(r"<figcaption>(.*?)</figcaption>", page)


class Addresses(HTMLParser):
    def __init__(self):
        super().__init__()
        self.found, self.open = [], []

    def handle_starttag(self, tag, attributes):
        self.found += [value for name, value in attributes if name in ("src", "href", "xlink:href", "action")]
        if tag not in ("meta", "link", "use", "path", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag in self.open:
            self.open.remove(tag)


def test_the_page_holds_everything_and_asks_for_nothing(folder):
    page = report_page(folder)
    reader = Addresses()
    reader.feed(page)
    assert all(address.startswith(("#", "data:")) for address in reader.found)
    assert not re.search(r"url\(\s*['\"]?https?:", page)
    assert "<script" not in page
    names = [layer["name"] for layer in json.loads((folder / "report.json").read_text())["layers"]]
    assert all(f"<td>{name}</td>" in page for name in names)
    assert "#123457" not in page  # all ink is the page's own
    ids = re.findall(r'\bid="([^"]+)"', page)
    clips = [one for one in ids if re.fullmatch(r"[pm][0-9a-f]{10}", one)]
    assert len(clips) == len(set(clips))  # else one picture would be cut by another's frame


def test_what_was_not_measured_is_not_drawn(folder):
    before = captions(report_page(folder))
    evaluation = {
        "dataset": "some.txt",
        "conditions": "2 windows",
        "metrics": {"perplexity": 12.5},
        "dense": {"perplexity": 11.25},
    }
    score = {"value": 0.625, "stderr": 0.03125}
    task = {"task": "choice", "version": "1", "conditions": "9 documents", "metrics": {"acc": score}}
    ungraded = {
        "task": "other",
        "version": "1",
        "conditions": "9 documents",
        "metrics": {"words": score | {"value": 40}},
    }
    row = {"out_features": 8, "in_features": 4, "tokens": 1, "ratio": 1.5}
    speeds = [{"decode_speed": speed, "prefill_speed": 9.0} for speed in (20.0, 10.0)]
    machine = {"processor": "a <processor>", "threads": 2}
    benchmark = {"machine": machine, "layers": [row], "models": speeds}
    edit(folder, evaluations=[evaluation], tasks=[task, ungraded], benchmark=benchmark)
    page = report_page(folder)
    assert len(captions(page)) == len(before) + 3
    assert "choice, acc: this model" in page
    assert "0.625" in page
    assert "other, words" not in page  # no share: it would not fit the axis
    assert "12.50" in page
    assert "some.txt: dense" in page
    assert "Decodes 20.0 tokens/s, dense 10.0, on a &lt;processor&gt;, 2 threads." in page
    edit(folder, benchmark=benchmark | {"models": [speeds[0] | {"compiled": True}, speeds[1]]})
    assert "Decodes 20.0 tokens/s compiled, dense 10.0, on" in report_page(folder)
    edit(folder, benchmark=benchmark | {"machine": machine | {"accelerator": "cuda:0, a <card>"}})
    assert "dense 10.0, on cuda:0, a &lt;card&gt;." in report_page(folder)


def test_values_that_were_not_kept_are_said_to_be_none(folder):
    numbers = {"steps": 4, "windows": 8, "windows_held_out": 2, "perplexity_before": 5.0, "perplexity_after": 6.5}
    recovery = numbers | {"settings": {"method": "lora", "seq_len": 16}, "measurements": {"seconds": 1.0}}
    for kept in ("after", "before"):
        edit(folder, recovery=recovery | {"kept": kept})
        page = report_page(folder)
        assert ("held out: after recovery, not kept" in page) is (kept == "before")
        assert ("so the values are those of before." in page) is (kept == "before")


def test_a_text_judged_twice_has_bars_that_say_under_which_conditions():
    def bars(*conditions):
        entries = [{"dataset": "t", "conditions": c, "metrics": {"perplexity": 9.0}} for c in conditions]
        (axes,) = perplexities({"evaluations": entries}).axes
        return [label.get_text() for label in axes.get_yticklabels()]

    assert bars("2 windows") == ["t: this model"]
    assert bars("2 windows", "4 windows") == ["t, 2 windows: this model", "t, 4 windows: this model"]


def test_names_with_dollar_signs_are_shown_as_they_are(folder):
    entry = {"dataset": r"a$\frac$.txt", "conditions": "2 windows", "metrics": {"perplexity": 12.5}}
    edit(folder, evaluations=[entry])
    assert r"a$\frac$.txt: this model" in report_page(folder, folder / "figures")


@pytest.mark.slow
def test_gaps_are_shown_where_they_are_asked_for(folder, capsys):
    assert "eighted gap" not in report_page(folder)
    assert main(["report", str(folder), "--spectra", "--json"]) == 0
    page = (folder / "report.html").read_text()
    assert "<th>weighted gap</th>" in page
    assert "Spectral gap, weighted by magnitude" in page
    assert "spectra" not in (folder / "report.json").read_text()
    capsys.readouterr()
    assert main(["inspect", str(folder), "--spectra", "--json"]) == 0
    first = json.loads(capsys.readouterr().out)["layers"][0]
    row = page[page.index(f"<td>{first['name']}</td>") :]
    gaps = (1 - first["spectra"]["sigma2"], 1 - first["spectra"]["sigma2_weighted"])
    assert row[: row.index("</tr>")].endswith(f"<td>{gaps[0]:.3f}</td><td>{gaps[1]:.3f}</td>")
    assert main(["inspect", str(folder), "--spectra"]) == 0
    assert f"{gaps[0]:>7.4f} {gaps[1]:>8.4f}\n" in capsys.readouterr().out


def test_damaged_weights_have_no_spectra(folder):
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight_meta"][0, 0] = 255
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"weight_meta keeps .* `inspect` lists all"):
        report_page(folder, with_spectra=True)


def test_a_report_of_the_first_version_is_read(tmp_path):
    shutil.copytree(GOLDEN, tmp_path / "old")
    assert "sigma2" in json.loads((tmp_path / "old" / "report.json").read_text())["layers"][0]["certificate"]
    page = report_page(tmp_path / "old")
    assert "<th>weighted gap</th>" in page  # since the report has it
    assert "every 16 outputs" in str(model_card(tmp_path / "old"))


def test_the_tile_shown_is_where_the_scores_alone_lack_most_of_the_floor(folder):
    report = json.loads((folder / "report.json").read_text())
    layer = report["layers"][3]
    mask = unpack_mask(load_file(folder / "model.safetensors")[f"{layer['name']}.weight_meta"], layer["in_features"])
    layer["scores_alone"] |= {"short": 9, "pairs": 10, "row": 16, "column": 8, "tile": ["1100"] * 15 + ["0101"]}
    tile = shown_tile(folder, report)
    assert (tile.name, tile.row, tile.column) == (layer["name"], 16, 8)
    assert torch.equal(tile.mask, mask[16:32, 8:12])
    assert tile.scores_alone.int().tolist() == [[1, 1, 0, 0]] * 15 + [[0, 1, 0, 1]]


def test_without_a_floor_the_tile_shown_is_the_weakest(folder):
    report = json.loads((folder / "report.json").read_text())
    layer = report["layers"][3]
    for each in report["layers"]:
        each["scores_alone"] = None
    tensors = load_file(folder / "model.safetensors")
    mask = torch.ones(layer["out_features"], layer["in_features"], dtype=torch.bool)
    mask[16:32, 9] = False
    mask[20, 9] = True
    tensors[f"{layer['name']}.weight_meta"] = pack_mask(mask)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    layer["certificate"]["input_degree_min"] = 0
    tile = shown_tile(folder, report)
    assert (tile.name, tile.row, tile.column) == (layer["name"], 16, 8)
    assert torch.equal(tile.mask, mask[16:32, 8:12])
    assert tile.scores_alone is None
    (folder / "report.json").write_text(json.dumps(report))
    page = report_page(folder)
    assert "By the scores alone" not in page
    assert "The weakest input of" in page


def test_the_command_writes_the_page_and_pictures_for_the_card(folder, tmp_path, capsys):
    assert main(["report", str(folder), "-o", str(tmp_path / "page.html"), "--figures"]) == 0
    assert "wrote" in capsys.readouterr().out
    assert (tmp_path / "page.html").read_text().startswith("<!doctype html>")
    assert (folder / "figures" / "errors.png").read_bytes().startswith(b"\x89PNG")
    assert "![errors](figures/errors.png)" in model_card(folder).text
    assert "perplexities.png" not in model_card(folder).text  # not measured
    assert main(["report", str(folder), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"page": str(folder / "report.html")}
    for _ in range(2):  # the second finds its own page in the model's list
        assert main(["report", str(folder), "-o", str(folder / "other.html")]) == 0
    assert "other.html" in listed_files(folder)
    (tmp_path / "link.html").symlink_to("page.html")
    (tmp_path / "page.html").write_text("of before")
    assert main(["report", str(folder), "-o", str(tmp_path / "link.html")]) == 0
    assert (tmp_path / "link.html").is_symlink()
    assert (tmp_path / "page.html").read_text().startswith("<!doctype html>")


def test_that_a_page_cannot_be_written_is_found_before_it_is_drawn(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("optimum_eggs.report.report_page", None)
    for output, why in (
        (tmp_path / "no" / "page.html", "No such file"),
        (tmp_path, "it is no file"),
        (Path("/dev/null"), "it is no file"),
    ):
        assert main(["report", str(folder), "-o", str(output)]) == 2
        said = capsys.readouterr().err
        assert f"{output}: cannot be written (" in said
        assert why in said


def test_the_page_of_a_model_packed_as_it_was_shows_no_error(packed_folder, tmp_path):
    pruner = EGGSPruner(load_model(packed_folder).dequantize())
    pruner.pack()
    pruner.save_pretrained(tmp_path / "out")
    page = report_page(tmp_path / "out", tmp_path / "out" / "figures")
    assert "Packed as they were" in page
    assert "alibrated on" not in page
    assert "Error of each layer" not in page
    assert "What the weakest input keeps" in page
    assert not (tmp_path / "out" / "figures" / "errors.png").exists()


def test_bad_input_is_refused(dense_folder, folder, tmp_path, capsys):
    with pytest.raises(ModelError, match="has no report of a pruned model"):
        report_page(dense_folder)
    (tmp_path / "cut").mkdir()
    (tmp_path / "cut" / "report.json").write_text((folder / "report.json").read_text()[:-20])
    with pytest.raises(CheckpointError, match="is no JSON"):
        report_page(tmp_path / "cut")
    assert main(["report", str(tmp_path / "nowhere")]) == 2
    assert main(["report", str(folder), "-o", str(tmp_path / "no" / "page.html")]) == 2
    assert "cannot be written" in capsys.readouterr().err


def test_pictures_that_cannot_be_written_are_an_output_error(packed_folder, tmp_path, capsys):
    folder = shutil.copytree(packed_folder, tmp_path / "packed")
    (folder / "figures").write_text("in the way")
    assert main(["report", str(folder), "--figures", "-o", str(tmp_path / "page.html")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "/figures/" in line
    assert "cannot be written" in line
    assert "leave the pictures (--figures) out" in line
    assert main(["report", str(folder), "-o", str(tmp_path / "page.html")]) == 0


@pytest.mark.parametrize("held", ["[]", "3", "{", '{"layers": {}}', '{"layers": [], "summary": 3}'])
def test_a_report_of_another_kind_is_named(held, packed_folder, tmp_path):
    folder = shutil.copytree(packed_folder, tmp_path / "packed")
    (folder / "report.json").write_text(held)
    with pytest.raises(CheckpointError, match=r"report.json: .*; save the model again"):
        report_page(folder)
    with pytest.raises(CheckpointError, match=r"report.json: .*; save the model again"):
        update_report(folder, benchmark={})
    (violation,) = inspect_checkpoint(folder).violations
    assert (violation.where, violation.rule) == ("report.json", "report")
