"""Everything `evaluate` says of saved models."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ..calibration.documents import documents
from ..calibration.windows import token_stream, windows_digest
from ..errors import CalibrationError, ConfigError, ModelError
from ..hf.attach import packed_layers
from ..hf.loading import load_model, load_tokenizer
from ..packing.checkpoint import read_headers, weight_files
from .paired import Comparison, compare
from .perplexity import Perplexity, perplexity_of
from .reading import read
from .size import ModelSize, model_size


@dataclass(frozen=True)
class Evaluation:
    """Perplexity and size of the model in `folder`."""

    folder: str
    dtype: str
    perplexity: Perplexity
    size: ModelSize
    pruned_layers: list[str]
    token_digest: str


def evaluation_windows(
    text: Any,
    tokenizer: Any,
    seq_len: int,
    num_windows: int | None = None,
    split: str | None = None,
    text_column: str | None = None,
    stride: int | None = None,
) -> Tensor:
    """Windows (windows, seq_len) of a text, each `stride` tokens after the one before.

    They are the first `num_windows`, or all that are whole. Without `stride` they lie end to end.

    Raises:
        CalibrationError: the text is too short for the windows asked for, or for one.
        ConfigError: `seq_len`, `num_windows` or `stride` is not a positive number, or `stride` is more than `seq_len`.
    """
    step = seq_len if stride is None else stride
    if not 1 <= step <= seq_len:
        raise ConfigError(f"stride={stride} must be between 1 and seq_len={seq_len}")
    if seq_len < 2 or (num_windows is not None and num_windows < 1):
        raise ConfigError(f"seq_len={seq_len} must be 2 or more, and num_windows={num_windows} 1 or more")
    pool = None if num_windows is None else (num_windows - 1) * step + seq_len
    ids = token_stream(documents(text, split, text_column), tokenizer, pool)
    wanted = max(1, 1 + (len(ids) - seq_len) // step) if num_windows is None else num_windows
    needed = (wanted - 1) * step + seq_len
    if len(ids) < needed:
        raise CalibrationError(
            f"text={text!r} has {len(ids)} tokens, and {wanted} windows of seq_len={seq_len} need {needed}; "
            "give more text, or lower num_windows or seq_len"
        )
    return ids[:needed].unfold(0, seq_len, step)


def evaluate(folders: Sequence[str], args: Any) -> tuple[list[Evaluation], Comparison | None]:
    """Load one or two models, and measure them on the same windows as the command-line `args` say.

    Args:
        folders: Saved models; with two, both are in memory at once, and the first is compared with the second.
        args: With text, split, text_column, seq_len, stride, num_windows, batch_size and dtype.

    Raises:
        EGGSError: a model or the text cannot be used, or the two models' tokenizers differ.
    """
    stride = args.seq_len if args.stride is None else args.stride
    for folder in folders:
        if not Path(folder).is_dir():
            raise ModelError(f"{folder}: there is no such folder; save the model first, its files are measured too")
        read_headers(weight_files(folder))
    models, windows, digest, text_bytes = [], None, "", None
    for folder in folders:
        tokenizer = load_tokenizer(folder)
        cut = evaluation_windows(
            args.text, tokenizer, args.seq_len, args.num_windows, args.split, args.text_column, stride
        )
        if windows is None:
            windows, digest, text_bytes = cut, windows_digest(cut), predicted_bytes(cut, tokenizer, stride)
        elif windows_digest(cut) != digest:
            raise ModelError(f"{folder}: its tokenizer cuts the text differently, so the two cannot be compared")
        model = load_model(folder, dtype=args.dtype).eval()
        context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        if isinstance(context, int) and args.seq_len > context:
            raise CalibrationError(
                f"seq_len={args.seq_len} is more than the model's context of {context}; lower seq_len"
            )
        models.append(model)
    assert windows is not None
    reading = read(models, windows, args.batch_size, args.seq_len - stride)
    packed = list(packed_layers(models[0]))
    evaluations = [
        Evaluation(
            folder,
            str(model.dtype).removeprefix("torch."),
            perplexity_of(reading, index, windows, text_bytes),
            model_size(model, folder, packed if index else None),
            list(packed_layers(model)),
            digest,
        )
        for index, (folder, model) in enumerate(zip(folders, models, strict=True))
    ]
    return evaluations, compare(reading) if len(models) == 2 else None


def predicted_bytes(windows: Tensor, tokenizer: Any, stride: int) -> int | None:
    """Bytes of text, in UTF-8, that the tokens predicted in windows (windows, tokens) stand for.

    None for a tokenizer that does not give back the text that it was given.
    """
    total = 0
    for index, window in enumerate(windows.tolist()):
        text = tokenizer.decode(window, clean_up_tokenization_spaces=False)
        if index == 0 and tokenizer(text, add_special_tokens=False)["input_ids"][:-1] != window[:-1]:
            return None  # the last token may have been cut from a longer one
        first = 1 if index == 0 else max(1, windows.shape[1] - stride)
        read_before = tokenizer.decode(window[:first], clean_up_tokenization_spaces=False)
        total += len(text.encode()) - len(read_before.encode())
    return total
