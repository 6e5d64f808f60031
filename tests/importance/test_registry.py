"""Scores of one's own: pruned with, stored by name, loaded where nobody knows them."""

import pytest
import tiny
import torch

from optimum_eggs import EGGSConfig, EGGSPruner, register_importance
from optimum_eggs.errors import ConfigError, ShapeError
from optimum_eggs.importance import IMPORTANCE, importance_score


@pytest.fixture
def registered():
    before = dict(IMPORTANCE)
    yield register_importance
    IMPORTANCE.clear()
    IMPORTANCE.update(before)


def pruned(model, tokenizer, text_file, **values):
    pruner = EGGSPruner(model, tokenizer)
    pruner.prune(EGGSConfig(preset="ria", num_samples=4, seq_len=16, **values), calibration=text_file)
    return pruner


def test_a_registered_score_decides_the_mask_and_the_model_loads_without_it(
    registered, forks, tokenizer, text_file, tmp_path
):
    registered("smallest", lambda weight, input_norm, exponent: -weight.abs())
    dense = tiny.make_model("llama")
    weight = dense.model.layers[0].mlp.up_proj.weight.detach().clone()
    pruner = pruned(dense, tokenizer, text_file, solver="score", importance="smallest")
    mask = pruner.model.model.layers[0].mlp.up_proj.mask()
    grouped, kept = weight.abs().unflatten(1, (-1, 4)), mask.unflatten(1, (-1, 4))
    assert torch.equal(kept, grouped.argsort(-1).argsort(-1) < 2)  # the two smallest of every four

    pruner.save_pretrained(tmp_path / "out")
    code = (
        "import optimum_eggs, transformers; "
        f"m = transformers.AutoModelForCausalLM.from_pretrained({str(tmp_path / 'out')!r}); "
        "print(m.config.quantization_config.importance); m.save_pretrained('again'); "
        "print(sum(1 for x in m.modules() if isinstance(x, optimum_eggs.NMLinear)))"
    )
    done = forks.run("-c", code, cwd=tmp_path)
    assert done.stdout.split() == ["smallest", "14"], done.stderr

    IMPORTANCE.pop("smallest")
    stored = pruner.model.config.quantization_config.to_dict()
    assert EGGSConfig.from_dict(stored).importance == "smallest"
    with pytest.raises(ConfigError, match="or make it known with"):
        EGGSConfig.from_dict(stored | {"pruned_modules": None})
    with pytest.raises(ConfigError, match="importance='' is unknown"):
        EGGSConfig.from_dict(stored | {"importance": ""})


@pytest.mark.parametrize(
    ("name", "score", "message"),
    [
        ("ria", torch.abs, "importance='ria' is taken"),
        ("a b", torch.abs, "importance='a b' is no identifier"),
        (3, torch.abs, "importance=3 is no identifier"),
        ("mine", 3, "score=3 for importance='mine' cannot be called"),
    ],
)
def test_bad_registrations_are_refused(registered, name, score, message):
    before = dict(IMPORTANCE)
    with pytest.raises(ConfigError, match=message):
        registered(name, score)
    assert before == IMPORTANCE


def test_a_score_of_the_wrong_shape_is_refused(registered):
    registered("flat", lambda weight, input_norm, exponent: weight.sum(0))
    with pytest.raises(
        ShapeError, match=r"importance='flat' returned a score of shape \(4,\) for a weight of \(2, 4\)"
    ):
        importance_score("flat", torch.ones(2, 4), torch.ones(4))
