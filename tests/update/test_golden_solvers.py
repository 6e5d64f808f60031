"""Results of the published programs, on layers of a real model: see tests/golden/make_solvers.py."""

import importlib.util
import sys
from pathlib import Path

import pytest

from optimum_eggs.presets import preset
from optimum_eggs.update import Problem, masked_refit

_spec = importlib.util.spec_from_file_location("golden", Path(__file__).parents[2] / "benchmarks" / "golden.py")
golden = sys.modules["golden"] = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(golden)

CASES = {(case.layer, str(case.pattern), case.program): case for case in golden.cases()}
ALPS = [(layer, pattern) for layer, pattern, program in CASES if program == "alps"]


def test_every_program_is_there():
    assert {program for _, _, program in CASES} == {"alps", "alps-float64", "sparsegpt", "wanda", "ria"}
    assert len(ALPS) == 5
    # Both of its ends, and the rules of a penalty that was too large.
    assert {CASES[(*of, "alps")].steps for of in ALPS} == {33, 162}


@pytest.mark.parametrize("key", CASES, ids="-".join)
def test_the_preset_gives_what_the_published_program_gives(key):
    case = CASES[key]
    ours = golden.compare(case)
    assert ours.steps == case.steps
    assert ours.error == pytest.approx(case.error, rel=1e-3)
    least = 0.999
    if case.program == "alps":
        # Its products with the Gram matrix round so much in float32 that it does not find its own mask of float64.
        least = golden.same_groups(case.mask, CASES[(*key[:2], "alps-float64")].mask, case.pattern) - 0.001
    assert ours.agreement >= least


@pytest.mark.parametrize("of", ALPS, ids="-".join)
def test_in_float64_alps_is_the_published_program_with_its_refit(of):
    case = CASES[(*of, "alps-float64")]
    inputs = case.inputs.double()
    gram = inputs.T @ inputs
    mask, values, steps = golden.alps(case, gram)
    assert steps == case.steps
    assert mask.equal(case.mask)
    values = masked_refit(case.weight.double(), mask, Problem(gram), steps=preset("alps")["refit_steps"], start=values)
    assert golden.error_of(case, values) == pytest.approx(case.error, rel=1e-9)
