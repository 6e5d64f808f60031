"""Two models on the same windows, against sums written out."""

import math

import pytest
import tiny
import torch
import transformers
from scipy import stats
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from optimum_eggs.errors import ConfigError, ModelError, NumericalError
from optimum_eggs.evaluation import compare, perplexity, read
from optimum_eggs.evaluation.paired import estimate
from optimum_eggs.evaluation.windows import evaluation_windows, predicted_bytes

WINDOWS = tiny.make_windows(5, 12)


@torch.no_grad()
def log_chances(model, window):
    return model(input_ids=window[None]).logits[0, :-1].double().log_softmax(-1)


def other_model():
    model = tiny.make_model("llama")
    for parameter in model.parameters():
        parameter.data += 0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    return model


@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_divergence_agreement_and_difference_are_those_of_the_definition(batch_size):
    ours, theirs = tiny.make_model("llama"), other_model()
    kl, same, difference = [], [], []
    for window in WINDOWS:
        p, q = log_chances(theirs, window), log_chances(ours, window)
        kl.append(float((p.exp() * (p - q)).sum(-1).mean()))
        same.append(float((p.argmax(-1) == q.argmax(-1)).double().mean()))
        targets = window[1:, None]
        difference.append(float((p.gather(1, targets) - q.gather(1, targets)).mean()))
    found = compare(read([ours, theirs], WINDOWS, batch_size, progress=False))
    for estimated, values in (
        (found.kl_divergence, kl),
        (found.top1_agreement, same),
        (found.nats_difference, difference),
    ):
        # Windows of one length: the usual interval of a mean.
        low, high = stats.t.interval(0.95, 4, loc=sum(values) / 5, scale=stats.sem(values))
        assert estimated.value == pytest.approx(sum(values) / 5, rel=1e-4, abs=1e-6)
        assert (estimated.low, estimated.high) == pytest.approx((low, high), rel=1e-3, abs=1e-5)
    ratio = perplexity(ours, WINDOWS).perplexity / perplexity(theirs, WINDOWS).perplexity
    assert found.perplexity_ratio.value == pytest.approx(ratio, rel=1e-6)
    assert found.perplexity_ratio.low == pytest.approx(math.exp(found.nats_difference.low))


def test_a_model_agrees_with_itself():
    model = tiny.make_model("llama")
    found = compare(read([model, model], WINDOWS, progress=False))
    assert found.top1_agreement.value == 1
    assert found.nats_difference.value == found.kl_divergence.value == 0


class Masking(torch.nn.Module):
    """A model that gives the logits of another, with -inf in some slots."""

    def __init__(self, model, slots):
        super().__init__()
        self.model, self.slots = model, slots

    def forward(self, input_ids, **options):
        found = self.model(input_ids=input_ids, **options)
        found.logits[..., self.slots] = -torch.inf
        return found


def test_slots_that_both_models_mask_add_nothing():
    slots = [token for token in range(tiny.VOCABULARY) if token not in WINDOWS]
    kept = [token for token in range(tiny.VOCABULARY) if token not in slots]
    models = [tiny.make_model("llama"), other_model()]
    masking = [Masking(model, slots) for model in models]
    by_hand = []
    for window in WINDOWS:
        p, q = (log_chances(model, window)[:, kept] for model in masking[::-1])
        by_hand.append((p.exp() * (p - q)).sum(-1).mean())
    found = compare(read(masking, WINDOWS, progress=False))
    assert found.kl_divergence.value == pytest.approx(float(sum(by_hand)) / len(WINDOWS), rel=1e-4)
    with pytest.raises(NumericalError, match="divergence from the other model is NaN or infinite"):
        read([masking[0], models[1]], WINDOWS, progress=False)


def test_one_window_has_no_interval():
    found = estimate(torch.tensor([3.0]), torch.tensor([2]))
    assert (found.value, found.low, found.high) == (1.5, None, None)


def test_models_of_different_vocabularies_are_refused():
    models = [tiny.make_model("llama"), tiny.make_model("llama")]
    models[1].resize_token_embeddings(300)
    with pytest.raises(ModelError, match="vocabularies of 256 and 300"):
        read(models, WINDOWS)


def test_with_a_stride_every_token_is_predicted_once_with_the_context_before_it(tokenizer, text_file):
    model = tiny.make_model("llama")
    windows = evaluation_windows(text_file, tokenizer, 16, 4, stride=6)
    ids = torch.tensor(tokenizer(text_file.read_text(), add_special_tokens=False)["input_ids"][: 16 + 3 * 6])
    assert windows.tolist() == [ids[start : start + 16].tolist() for start in (0, 6, 12, 18)]
    total, predicted = 0.0, []
    for start in (0, 6, 12, 18):
        chances = log_chances(model, ids[start : start + 16])
        for target in range(start + (1 if start == 0 else 10), start + 16):
            total -= float(chances[target - start - 1, ids[target]])
            predicted.append(target)
    assert predicted == list(range(1, len(ids)))
    found = perplexity(model, windows, batch_size=3, context=10)
    assert found.tokens == len(predicted)
    assert found.nats_per_token == pytest.approx(total / len(predicted), rel=1e-5)


@pytest.mark.parametrize("stride", [0, 17])
def test_a_stride_that_skips_or_stands_still_is_refused(stride, tokenizer, text_file):
    with pytest.raises(ConfigError, match=f"stride={stride} must be between 1 and seq_len=16"):
        evaluation_windows(text_file, tokenizer, 16, 2, stride=stride)


@pytest.mark.parametrize("stride", [16, 6])
def test_bytes_are_those_of_the_text_predicted(stride, tokenizer, text_file):
    windows = evaluation_windows(text_file, tokenizer, 16, 4, stride=stride)
    ids = tokenizer(text_file.read_text(), add_special_tokens=False)["input_ids"]
    last = 3 * stride + 16
    skipped = (0, 16, 32, 48) if stride == 16 else (0,)
    length = sum(len(tokenizer.decode([ids[at]]).encode()) for at in range(last) if at not in skipped)
    assert predicted_bytes(windows, tokenizer, stride) == length


def test_bytes_are_known_where_a_window_ends_within_a_character():
    byte = pre_tokenizers.ByteLevel.alphabet()
    of_bytes = Tokenizer(models.BPE({each: place for place, each in enumerate(sorted(byte))}, []))
    of_bytes.pre_tokenizer, of_bytes.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=of_bytes)
    ids = tokenizer("word " * 4 + "\N{SAUROPOD}")["input_ids"]
    assert len(ids) == 24
    for kept, length in ((24, 19 + 4), (23, 19 + 3), (22, 19 + 3), (21, 19 + 3), (20, 19)):
        assert predicted_bytes(torch.tensor([ids[:kept]]), tokenizer, kept) == length


def test_bytes_are_not_guessed_where_the_tokenizer_loses_some(tokenizer, text_file):
    class Lossy:
        def decode(self, ids, **options):
            return tokenizer.decode(ids).replace(" ", "")

        def __call__(self, text, **options):
            return tokenizer(text, **options)

    assert predicted_bytes(evaluation_windows(text_file, tokenizer, 16, 4), Lossy(), 16) is None
