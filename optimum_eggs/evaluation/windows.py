"""The windows of a text that models are judged on, and what is predicted in them."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..calibration.documents import documents, shown
from ..calibration.windows import token_stream
from ..errors import CalibrationError, ConfigError

_CUT = 8  # tokens that a character of several may be cut to, as the character that stands for it is again


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
    ids = token_stream(documents(text, split, text_column, argument="text"), tokenizer, pool)
    wanted = max(1, 1 + (len(ids) - seq_len) // step) if num_windows is None else num_windows
    needed = (wanted - 1) * step + seq_len
    if len(ids) < needed:
        raise CalibrationError(
            f"text={shown(text)} has {len(ids)} tokens, and {wanted} windows of seq_len={seq_len} need {needed}; "
            "give more text, or lower num_windows or seq_len"
        )
    return ids[:needed].unfold(0, seq_len, step)


def predicted_bytes(windows: Tensor, tokenizer: Any, stride: int) -> int | None:
    """Bytes of text, in UTF-8, that the tokens predicted in windows (windows, tokens) stand for.

    A character of which a window holds some tokens alone counts as three bytes. None for a tokenizer that does not give
    back the text that it was given.
    """
    total = 0
    for index, window in enumerate(windows.tolist()):
        text = tokenizer.decode(window, clean_up_tokenization_spaces=False)
        # the last token may have been cut from a longer one, and the last character from its other tokens
        whole = max(1, len(window) - (_CUT if text.endswith("\ufffd") else 1))
        if index == 0 and tokenizer(text, add_special_tokens=False)["input_ids"][:whole] != window[:whole]:
            return None
        first = 1 if index == 0 else max(1, windows.shape[1] - stride)
        read_before = tokenizer.decode(window[:first], clean_up_tokenization_spaces=False)
        total += len(text.encode()) - len(read_before.encode())
    return total
