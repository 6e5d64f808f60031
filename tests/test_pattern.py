import pytest
from hypothesis import given
from hypothesis import strategies as st
from oracles import PATTERNS, checked

from optimum_eggs.errors import ConfigError
from optimum_eggs.pattern import NMPattern


@checked
@given(st.sampled_from(PATTERNS))
def test_every_legal_pattern_survives_text(legal):
    pattern = NMPattern(*legal)
    assert (pattern.n, pattern.m) == legal
    assert NMPattern.parse(str(pattern)) == pattern


@checked
@given(st.integers(-2, 40), st.integers(-2, 40))
def test_exactly_the_legal_patterns_are_accepted(n, m):
    if (n, m) in PATTERNS:
        assert NMPattern(n, m).density == n / m
    else:
        with pytest.raises(ConfigError):
            NMPattern(n, m)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("4:2", r"pattern 4:2: n=4 is the number kept of every m=2 and must be between 1 and 1; write for example 2:4"),
        ("4:4", r"pattern 4:4: n=4 .* between 1 and 3"),
        ("0:4", r"pattern 0:4: n=0 .* between 1 and 3"),
        ("2:5", r"pattern 2:5: m=5 is not a supported group size; use one of \[2, 4, 8, 16, 32\]"),
        ("2:64", r"pattern 2:64: m=64 is not a supported"),
        ("two:four", r"pattern='two:four' is not of the form 'n:m' \(n kept of every m\); write for example '2:4'"),
        ("2", r"pattern='2' is not of the form"),
        ("2:4:8", r"pattern='2:4:8' is not of the form"),
        ("-1:4", r"pattern='-1:4' is not of the form"),
        ("", r"pattern='' is not of the form"),
        (None, r"pattern=None is not of the form"),
        (24, r"pattern=24 is not of the form"),
    ],
)
def test_a_bad_pattern_is_refused_with_its_reason(text, message):
    with pytest.raises(ConfigError, match=message):
        NMPattern.parse(text)


@pytest.mark.parametrize(("n", "m", "named"), [(2.0, 4, "n=2.0"), (2, "4", "m='4'"), (True, 4, "n=True")])
def test_what_is_no_integer_is_refused(n, m, named):
    with pytest.raises(ConfigError, match=f"{named} is not an integer; write for example NMPattern"):
        NMPattern(n, m)


def test_parse_takes_blanks_and_patterns():
    assert NMPattern.parse(" 2 : 4 ") == NMPattern.parse(NMPattern(2, 4)) == NMPattern(n=2, m=4)


def test_patterns_are_values():
    assert len({NMPattern(2, 4), NMPattern.parse("2:4"), NMPattern(4, 8)}) == 2
    with pytest.raises(AttributeError):
        NMPattern(2, 4).n = 1
