import json
import shutil

import pytest
from huggingface_hub import ModelCard

from optimum_eggs.errors import ModelError
from optimum_eggs.sharing import model_card, own_card, write_card
from optimum_eggs.sharing.card import _afterwards


@pytest.fixture
def folder(packed_folder, tmp_path):
    shutil.copytree(packed_folder, tmp_path / "model")
    edit(tmp_path / "model", evaluations=[], benchmark=None)  # other tests measure the folder
    return tmp_path / "model"


def edit(folder, **values):
    path = folder / "report.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_what_was_not_measured_is_absent(folder):
    text = str(model_card(folder, "me/tiny"))
    assert "What was measured" not in text
    assert "model-index" not in text
    assert "license" not in text.split("---")[1]
    assert "base_model" not in text


def test_what_was_measured_is_stated(folder):
    entry = {
        "dataset": "wikitext2",
        "split": "test",
        "conditions": "16 windows of 1024 tokens",
        "metrics": {"perplexity": 43.21},
        "dense": {"perplexity": 22.75},
        "comparison": {"kl_divergence": {"value": 0.5, "low": 0.25, "high": 0.75}},
    }
    edit(folder, evaluations=[entry], base_model={"id": "org/dense", "revision": None})
    base = ModelCard("---\nlicense: apache-2.0\nlanguage: en\n---\n")
    card = model_card(folder, "me/tiny", base)
    assert "| perplexity | wikitext2, 16 windows of 1024 tokens | 43.21 | 22.75 |" in card.text
    assert "a token | wikitext2, 16 windows of 1024 tokens | 0.500 (0.250 to 0.750) | |" in card.text
    data = card.data.to_dict()
    assert data["base_model"] == "org/dense"
    assert data["base_model_relation"] == "quantized"
    assert data["license"] == "apache-2.0"
    assert data["language"] == "en"
    (result,) = data["model-index"][0]["results"]
    assert result["metrics"][0]["value"] == 43.21
    assert result["dataset"]["split"] == "test"
    assert "2:4" in data["tags"]


@pytest.mark.parametrize(
    ("dataset", "listed"),
    [
        ("c4", "allenai/c4"),
        ("list in memory", "list-in-memory"),
        ("me/data:part@v2", "me/data"),
        ("my text.txt", "my-text.txt"),
    ],
)
def test_the_hub_can_read_what_it_was_measured_on(dataset, listed, folder):
    edit(folder, evaluations=[{"dataset": dataset, "split": None, "conditions": "c", "metrics": {"perplexity": 2.0}}])
    (result,) = model_card(folder, "me/tiny").data.to_dict()["model-index"][0]["results"]
    assert (result["dataset"]["type"], result["dataset"]["name"]) == (listed, dataset)


@pytest.mark.parametrize(
    ("source", "listed"),
    [
        ("c4", ["allenai/c4"]),
        ("me/data.v1:plain@v2", ["me/data.v1"]),
        ({"sample": 1.0, "wikitext2": 1.0, "text.txt": 1.0}, ["Salesforce/wikitext"]),
        ("sample", None),
        (None, None),
    ],
)
def test_data_sets_are_listed_by_their_ids(folder, source, listed):
    report = json.loads((folder / "report.json").read_text())
    entry = {"dataset": "me/data:plain@v2", "conditions": "2 windows", "metrics": {"perplexity": 3.0}}
    edit(folder, config=report["config"] | {"calibration": source}, evaluations=[entry | {"split": "test"}])
    card = model_card(folder, "me/tiny")
    assert card.data.to_dict().get("datasets") == listed
    assert (f"of `{source}`." in card.text) == isinstance(source, str)
    judged = card.data.to_dict()["model-index"][0]["results"][0]["dataset"]
    assert (judged["type"], judged["config"], judged["revision"]) == ("me/data", "plain", "v2")


def test_windows_that_overlap_are_said_to(folder):
    report = json.loads((folder / "report.json").read_text())
    assert "overlapping windows" not in model_card(folder, "me/tiny").text
    edit(folder, calibration=report["calibration"] | {"overlapping": True})
    assert "calibrated on 8 overlapping windows of 16 tokens" in model_card(folder, "me/tiny").text


def test_windows_that_the_dense_model_wrote_are_said_to(folder):
    report = json.loads((folder / "report.json").read_text())
    assert "wrote" not in model_card(folder, "me/tiny").text
    edit(folder, calibration=report["calibration"] | {"windows": 11, "generated": 3})
    text = " ".join(model_card(folder, "me/tiny").text.split())
    assert "calibrated on 8 windows of 16 tokens of `text.txt`, and 3 that the dense model wrote behind" in text
    assert text.count(", and 3 that the dense model wrote") == 2


def test_recovery_and_speed_are_stated(folder):
    recovery = {
        "settings": {"method": "lora", "seq_len": 512, "teacher": "org/dense"},
        "steps": 200,
        "windows": 700,
        "windows_held_out": 32,
        "perplexity_before": 44.0,
        "perplexity_after": 31.5,
    }
    speed = {
        "machine": {"processor": "A processor", "threads": 2},
        "models": [{"decode_speed": 43.2, "prefill_speed": 2318.6}, {"decode_speed": 26.1, "prefill_speed": 2173.8}],
    }
    edit(folder, recovery=recovery, benchmark=speed)
    text = model_card(folder).text
    assert "| perplexity after recovery | 32 windows held out | 31.50 (before: 44.00) | |" in text
    assert "200 steps of `lora` on 700 windows of 512 tokens, towards the dense model's probabilities." in text
    recovery["settings"]["kd_ratio"] = 0.5
    edit(folder, recovery=recovery)
    assert "towards the dense model's probabilities and the text's own next tokens." in model_card(folder).text
    assert "| decode, tokens/s | A processor, 2 threads | 43.2 | 26.1 |" in text
    speed |= {"prompt": 256, "new_tokens": 128, "dtype": "bfloat16"}
    speed["models"][0]["compiled"] = True
    speed["machine"]["accelerator"] = "cuda:0, A card"
    edit(folder, benchmark=speed)
    text = model_card(folder).text
    assert "| decode of 128, tokens/s (packed: compiled) | cuda:0, A card, bfloat16 | 43.2 | 26.1 |" in text
    assert "| prefill of 256, tokens/s | cuda:0, A card, bfloat16 | 2318.6 | 2173.8 |" in text


def test_the_certificate_is_that_of_the_report(folder):
    report = json.loads((folder / "report.json").read_text())
    least = min(layer["certificate"]["floors"].get("16", 0) for layer in report["layers"])
    assert f"at least {least} of every 16 outputs" in model_card(folder).text


def test_the_users_own_text_and_metadata_stay(folder):
    (folder / "README.md").write_text("---\nlicense: mit\ntags:\n- mine\n---\n# My model\n\nMy words.\n")
    write_card(folder, "me/tiny")
    once = (folder / "README.md").read_text()
    assert "My words." in once
    card = ModelCard(once)
    assert card.data.license == "mit"
    assert {"mine", "eggs", "2:4"} <= set(card.data.tags)
    (folder / "README.md").write_text(once.replace("My words.", "Other words."))
    write_card(folder, "me/tiny")
    twice = (folder / "README.md").read_text()
    assert twice == once.replace("My words.", "Other words.")


def test_the_card_that_a_save_leaves_becomes_that_of_the_repository(folder):
    # The folder's own card is that of the save, which had another name for it.
    assert "# llama\n" in (folder / "README.md").read_text()
    for evaluations in ([], [{"dataset": "a", "conditions": "b", "metrics": {"perplexity": 2.0}}]):
        edit(folder, evaluations=evaluations)
        for name in ("tiny", "other"):  # pushed, and pushed elsewhere
            text = write_card(folder, f"me/{name}").read_text()
            assert [line for line in text.splitlines() if line.startswith("# ")] == [f"# {name}"]
            assert f'from_pretrained("me/{name}")' in text
            data = ModelCard(text).data
            assert data.model_name == name
    own = text.replace("# other\n", "# A title of my own\n").replace("name: other", "name: mine")
    (folder / "README.md").write_text(own)
    assert "# A title of my own\n" in write_card(folder, "me/tiny").read_text()


def test_a_heading_that_is_appended_is_text_of_ones_own(folder):
    card = write_card(folder)
    assert own_card(folder) is None
    with card.open("a") as opened:
        opened.write("# Mine\n")
    assert "\n# Mine\n" in own_card(folder)


def test_a_card_in_another_encoding_is_named(folder, tmp_path):
    (folder / "README.md").write_bytes("# My model\n\nCaf\xe9.\n".encode("latin-1"))
    for read in (lambda: model_card(folder), lambda: own_card(folder)):
        with pytest.raises(ModelError, match=r"README.md: is no UTF-8 text \(.*\); save it as UTF-8"):
            read()


def test_the_card_makes_the_model_again(folder):
    text = model_card(folder, "me/tiny").text
    code = text[text.index("EGGSConfig.from_dict(") : text.index("pruner = EGGSPruner")]
    from optimum_eggs import EGGSConfig

    config = eval(code, {"EGGSConfig": EGGSConfig})
    stored = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert config.to_dict() == EGGSConfig.from_dict(stored | {"pruned_modules": None}).to_dict()


def test_the_card_of_a_model_packed_as_it_was_claims_no_more(packed_folder, tmp_path):
    from optimum_eggs import EGGSPruner
    from optimum_eggs.hf.loading import load_model

    pruner = EGGSPruner(load_model(packed_folder).dequantize())
    pruner.pack("3:4", ignore=["lm_head", "layers.0"])
    pruner.save_pretrained(tmp_path / "out")
    text = str(model_card(tmp_path / "out", "me/tiny"))
    filled = pruner.report.to_dict()["summary"]["zeros_kept"]
    assert filled > 0
    assert f"{filled:,} of the positions that count as kept hold a zero" in text
    assert "without a change of any value" in text
    assert "pruner.pack(pattern='3:4', ignore=['lm_head', 'layers.0'])" in text
    for claim in ("calibrated", "preset", "windows", "were pruned", "None windows"):
        assert claim not in text


def test_a_dense_folder_has_no_card(dense_folder):
    with pytest.raises(ModelError, match=r"report.json"):
        model_card(dense_folder)


@pytest.mark.parametrize("first", ["recover", "quantize"])
def test_the_commands_after_pruning_are_in_the_order_in_which_they_ran(first):
    # rounding leaves out what recovery had measured before it
    figures = dict.fromkeys(("perplexity_before", "perplexity_after"), None if first == "recover" else 9.0)
    report = {
        "recovery": {"settings": {"method": "values", "teacher": "dense"}, "steps": 3} | figures,
        "quantization": {"values": "int8", "rounding": "nearest", "calibration": None},
    }
    commands = _afterwards(report)
    assert [command.split(" eggs ")[1].split(" --")[0] for command in commands] == (
        ["recover out recovered", "quantize recovered rounded"]
        if first == "recover"
        else ["quantize out rounded", "recover rounded recovered"]
    )
    assert "--method values --steps 3 --train ... --teacher ..." in "".join(commands)
    assert [command for command in commands if command.endswith("--values int8 --rounding nearest")]
    read = report | {"quantization": report["quantization"] | {"rounding": "gptq", "calibration": {"source": "a.txt"}}}
    assert "--values int8 --rounding gptq --calibration ..." in "".join(_afterwards(read))
    kept = report | {"recovery": report["recovery"] | {"kept": "before"}}
    assert [command.split()[5] for command in _afterwards(kept)] == ["quantize"]
    assert _afterwards({}) == []
