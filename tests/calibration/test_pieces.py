from __future__ import annotations

import random

import pytest
import tiny
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from optimum_eggs.calibration.pieces import token_pieces

ROWS = [
    "",
    " = A title = \n",
    "",
    " First words , of a row . \n",
    " 12 345 more ... \n",
    "",
    "",
    "plain",
    "\tx  y\n\n",
    "",
]
LLAMA3 = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
CHINESE = "人们在寂静的夜里走过长长的桥。他说，明天会更好！" * 400


def trained(pre_tokenizer, normalizer=None):
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=False))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizer, decoders.ByteLevel()
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    alphabet = [] if normalizer else pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=["<unk>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([joined(seed) for seed in range(4)] + ["\n\n\n\n\n\n" * 20, CHINESE], trainer)
    return tokenizer


def rows(seed, count=3000):
    draw = random.Random(seed)
    words = tiny.make_text(400, seed).split()
    made = draw.choices(ROWS, k=count)
    return [row.replace("words", draw.choice(words)).replace("plain", draw.choice(words)) for row in made]


def joined(seed):
    return "\n\n".join(rows(seed))


KINDS = {
    "gpt2": lambda: trained(pre_tokenizers.ByteLevel(add_prefix_space=False)),
    "prefixed": lambda: trained(pre_tokenizers.ByteLevel(add_prefix_space=True)),
    "llama3": lambda: trained(
        pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(LLAMA3), "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
    ),
    "llama2": lambda: trained(  # as SentencePiece: a space in front, words not parted before merges are made
        pre_tokenizers.Split(Regex(r"\n"), "isolated"),
        normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]),
    ),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [4096, 5001, 1 << 14])
def test_the_ids_are_those_of_the_whole(kind, size):
    tokenizer = KINDS[kind]()
    encode = lambda text: tokenizer.encode(text, add_special_tokens=False).ids  # noqa: E731
    for texts in (rows(9), [joined(8)], [CHINESE], ["", ""], ["\n" * 9000, "a" * 9000, " " * 9000]):
        whole = encode("\n\n".join(texts))
        pieces = list(token_pieces(texts, encode, size))
        assert [token for piece in pieces for token in piece] == whole
        if len("\n\n".join(texts)) > 4 * size and "a" * 9000 not in texts:
            assert len(pieces) > 1


def test_texts_are_read_as_they_are_needed():
    read = []

    def texts():
        for number in range(1000):
            read.append(number)
            yield "word " * 100

    next(token_pieces(texts(), lambda text: list(text.encode()), 4096))
    assert len(read) < 12


def test_nothing_is_no_piece():
    assert list(token_pieces([], lambda text: list(text.encode()))) == []
