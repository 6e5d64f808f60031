import pytest
import torch
from oracles import gaussian

from optimum_eggs.recovery import loss
from optimum_eggs.recovery.loss import distillation_loss


def plain(logits, ids, log_probs, labels=None, kd_ratio=1.0):
    """By torch's own operations on everything at once."""
    student = logits.log_softmax(-1)
    ours, share = student.gather(-1, ids), log_probs.exp()
    rest, left = (1 - share.sum(-1)).clamp_min(1e-6), (1 - ours.exp().sum(-1)).clamp_min(1e-6)
    apart = ((share * (log_probs - ours)).sum(-1) + rest * (rest.log() - left.log())).mean()
    if labels is None:
        return apart
    text = torch.nn.functional.nll_loss(student, labels, ignore_index=-1)
    return kd_ratio * apart + (1 - kd_ratio) * text


def problem(tokens=23, vocabulary=37, k=5, dtype=torch.float64):
    """Logits, the teacher's most likely tokens, and labels of which one is missing."""
    best = (3 * gaussian(tokens, vocabulary, seed=1)).to(dtype).log_softmax(-1).topk(k)
    labels = torch.arange(tokens) % vocabulary
    labels[-1] = -1
    labels[0] = best.indices[0, 2]  # one that the teacher has too
    logits = (3 * gaussian(tokens, vocabulary)).to(dtype).requires_grad_()
    return logits, best.indices, best.values, labels


@pytest.fixture(autouse=True)
def _several_parts(monkeypatch):
    monkeypatch.setitem(loss._NUMBERS, "cpu", 37 * 4)


def test_it_is_the_divergence_over_the_whole_vocabulary_where_all_of_it_is_kept():
    teacher, student = gaussian(7, 11), gaussian(7, 11, seed=1)
    best = teacher.log_softmax(-1).topk(11)
    exact = torch.nn.functional.kl_div(
        student.log_softmax(-1), teacher.log_softmax(-1), log_target=True, reduction="batchmean"
    )
    torch.testing.assert_close(distillation_loss(student, best.indices, best.values), exact)


def test_fewer_tokens_give_a_lower_bound_and_none_where_both_agree():
    teacher, student = gaussian(300, 40), gaussian(300, 40, seed=1)
    exact = torch.nn.functional.kl_div(
        student.log_softmax(-1), teacher.log_softmax(-1), log_target=True, reduction="batchmean"
    )
    best = teacher.log_softmax(-1).topk(5)
    assert 0 < distillation_loss(student, best.indices, best.values) < exact
    assert abs(float(distillation_loss(teacher, best.indices, best.values))) < 1e-5


@pytest.mark.parametrize("vocabulary", [5, 37])  # all tokens are the teacher's, or some
@pytest.mark.parametrize("kd_ratio", [1.0, 0.4, 0.0])
def test_value_and_gradient_are_those_of_torchs_own_operations(kd_ratio, vocabulary):
    logits, ids, log_probs, labels = problem(vocabulary=vocabulary)
    wanted = plain(logits, ids, log_probs, labels, kd_ratio)
    found = distillation_loss(logits, ids, log_probs, labels, kd_ratio)
    torch.testing.assert_close(found, wanted)
    of = [torch.autograd.grad(2 * each, logits)[0] for each in (found, wanted)]
    torch.testing.assert_close(*of, atol=1e-9, rtol=1e-5)
    with torch.no_grad():
        assert torch.equal(distillation_loss(logits, ids, log_probs, labels, kd_ratio), found)


def test_the_gradient_has_the_dtype_of_the_logits_and_is_that_of_float32_rounded():
    logits, ids, log_probs, labels = problem()
    half = logits.detach().bfloat16().requires_grad_()
    exact = half.detach().float().requires_grad_()
    for each in (half, exact):
        value = distillation_loss(each, ids.int(), log_probs.half(), labels, 0.5)
        assert value.dtype is torch.float32
        value.backward()
    assert torch.equal(half.grad, exact.grad.bfloat16())


def test_a_second_backward_pass_is_refused():
    value = distillation_loss(*problem())
    value.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        value.backward()


def test_a_logit_that_is_not_finite_shows():
    logits, ids, log_probs, _ = problem()
    with torch.no_grad():
        logits[3, 4] = float("nan")
    assert distillation_loss(logits, ids, log_probs).isnan()
