"""Everything `evaluate` says of one saved model."""

from __future__ import annotations

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
from .perplexity import Perplexity, perplexity
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
) -> Tensor:
    """Consecutive windows (windows, seq_len) of a text: the first `num_windows`, or all that are whole.

    Raises:
        CalibrationError: the text is too short for the windows asked for, or for one.
        ConfigError: `seq_len` or `num_windows` is not a positive number.
    """
    if seq_len < 2 or (num_windows is not None and num_windows < 1):
        raise ConfigError(f"seq_len={seq_len} must be 2 or more, and num_windows={num_windows} 1 or more")
    pool = None if num_windows is None else num_windows * seq_len
    ids = token_stream(documents(text, split, text_column), tokenizer, pool)
    wanted = max(1, len(ids) // seq_len) if num_windows is None else num_windows
    if len(ids) < wanted * seq_len:
        raise CalibrationError(
            f"text={text!r} has {len(ids)} tokens, and {wanted} windows of seq_len={seq_len} need {wanted * seq_len}; "
            "give more text, or lower num_windows or seq_len"
        )
    return ids[: wanted * seq_len].view(wanted, seq_len)


def evaluate_folder(folder: str, args: Any, names: list[str] | None = None, digest: str | None = None) -> Evaluation:
    """Load the model in `folder`, and measure it as the command-line `args` say.

    Args:
        folder: A saved model.
        args: With text, split, text_column, seq_len, num_windows, batch_size and dtype.
        names: Layers to count as pruned; default: those that are packed.
        digest: The windows' digest must be this one.

    Raises:
        EGGSError: the model or the text cannot be used, or the digest differs.
    """
    if not Path(folder).is_dir():
        raise ModelError(f"{folder}: there is no such folder; save the model first, its files are measured too")
    read_headers(weight_files(folder))
    tokenizer = load_tokenizer(folder)
    windows = evaluation_windows(args.text, tokenizer, args.seq_len, args.num_windows, args.split, args.text_column)
    if digest is not None and windows_digest(windows) != digest:
        raise ModelError(f"{folder}: its tokenizer cuts the text differently, so the two cannot be compared")
    model = load_model(folder, dtype=args.dtype)
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if isinstance(context, int) and args.seq_len > context:
        raise CalibrationError(f"seq_len={args.seq_len} is more than the model's context of {context}; lower seq_len")
    packed = list(packed_layers(model))
    return Evaluation(
        folder,
        str(model.dtype).removeprefix("torch."),
        perplexity(model.eval(), windows, args.batch_size),
        model_size(model, folder, names),
        packed,
        windows_digest(windows),
    )
