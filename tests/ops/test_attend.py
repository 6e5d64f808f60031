"""Attention of one new token a sequence, against softmax in double precision."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import gaussian
from torch.library import opcheck

from optimum_eggs.ops import attend


def expected(q, k, v, mask, scale):
    groups = q.shape[1] // k.shape[1]
    k, v = (states.double().repeat_interleave(groups, 1) for states in (k, v))
    scores = q.double() @ k.transpose(2, 3) * scale
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    weights = scores.softmax(-1).nan_to_num(0)  # nothing may be seen
    return (weights @ v).transpose(1, 2)


@given(
    batch=st.integers(1, 3),
    kv_heads=st.integers(1, 3),
    group=st.integers(1, 7),
    length=st.integers(1, 70),
    dim=st.sampled_from([8, 16, 48, 64, 128, 256, 272]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    masked=st.sampled_from(["", "batch", "heads", "one"]),
    seed=st.integers(0, 99),
)
@settings(max_examples=150, deadline=None)
def test_any_shape(batch, kv_heads, group, length, dim, dtype, masked, seed):
    heads = kv_heads * group
    q = gaussian(batch, 1, heads, dim, seed=seed, dtype=dtype).transpose(1, 2)
    k, v = (gaussian(batch, kv_heads, length, dim, seed=seed + i, dtype=dtype) for i in (1, 2))
    shape = (batch if masked == "batch" else 1, heads if masked == "heads" else 1, 1, length)
    mask = gaussian(*shape, seed=seed) > -0.5 if masked else None
    found = attend(q, k, v, mask, dim**-0.5)
    assert found.shape == (batch, 1, heads, dim)
    assert found.is_contiguous()
    tolerance = {torch.float32: 2e-6, torch.bfloat16: 2e-2, torch.float16: 3e-3}[dtype]
    torch.testing.assert_close(found.double(), expected(q, k, v, mask, dim**-0.5), rtol=tolerance, atol=tolerance)


def test_a_part_of_a_longer_cache_is_read_right():
    cache = gaussian(2, 3, 40, 32, dtype=torch.bfloat16)
    q = gaussian(2, 3, 1, 32, dtype=torch.bfloat16, seed=1)
    part = cache[:, :, 5:25]
    torch.testing.assert_close(attend(q, part, part, None, 0.2), attend(q, part.clone(), part.clone(), None, 0.2))


@pytest.mark.parametrize("queries", [1, 4])
def test_the_operation_is_well_formed(queries):
    q, k, v = gaussian(2, 4, queries, 32), gaussian(2, 2, 9, 32, seed=1), gaussian(2, 2, 9, 32, seed=2)
    opcheck(torch.ops.optimum_eggs.attend.default, (q, k, v, None, 0.2))
    opcheck(torch.ops.optimum_eggs.attend.default, (q, k, v, torch.ones(2, 1, queries, 9, dtype=torch.bool), 0.2))


def test_a_mask_that_is_added_and_several_queries_are_those_of_torch():
    q, k = gaussian(2, 4, 3, 32), gaussian(2, 2, 9, 32, seed=1)
    mask = torch.ones(3, 9, dtype=torch.bool).tril(6).expand(2, 1, 3, 9)
    torch.testing.assert_close(attend(q, k, k, mask, 0.2).double(), expected(q, k, k, mask, 0.2), rtol=1e-5, atol=1e-6)
    added = torch.where(mask, 0.0, -torch.inf)
    torch.testing.assert_close(attend(q, k, k, added, 0.2), attend(q, k, k, mask, 0.2))


def test_what_is_not_a_number_stays_so():
    q, k = gaussian(1, 2, 1, 32), gaussian(1, 2, 9, 32, seed=1)
    q[0, 0, 0, 3] = torch.nan
    found = attend(q, k, k, None, 0.2)
    assert found[0, 0, 0].isnan().all()
    assert found[0, 0, 1].isfinite().all()


def test_scores_of_minus_infinity_are_not_seen():
    q, k = torch.ones(1, 1, 1, 16), gaussian(1, 1, 5, 16)
    k[0, 0, 2:, 0] = -torch.inf
    torch.testing.assert_close(attend(q, k, k.clamp(-9), None, 0.2), attend(q, k[:, :, :2], k[:, :, :2], None, 0.2))
    assert not attend(q, k[:, :, 2:], k[:, :, 2:].clamp(-9), None, 0.2).any()


def test_values_may_have_another_size():
    q, k, v = gaussian(2, 4, 1, 48), gaussian(2, 2, 9, 48, seed=1), gaussian(2, 2, 9, 32, seed=2)
    torch.testing.assert_close(attend(q, k, v, None, 0.2).double(), expected(q, k, v, None, 0.2), rtol=1e-5, atol=1e-6)
    assert attend(q.to("meta"), k.to("meta"), v.to("meta"), None, 0.2).shape == (2, 1, 4, 32)


@pytest.mark.parametrize("wrong", ["heads", "dim", "length", "mask"])
def test_what_does_not_belong_together_is_an_error(wrong):
    q, k, v = gaussian(1, 4, 1, 32), gaussian(1, 2, 9, 32, seed=1), gaussian(1, 2, 9, 32, seed=2)
    mask = torch.ones(1, 1, 1, 9, dtype=torch.bool)
    if wrong == "heads":
        k = v = gaussian(1, 3, 9, 32)
    elif wrong == "dim":
        k = gaussian(1, 2, 9, 48)
    elif wrong == "length":
        v = gaussian(1, 2, 8, 32)
    else:
        mask = mask[..., :8]
    with pytest.raises(RuntimeError):
        attend(q, k, v, mask, 0.2)
