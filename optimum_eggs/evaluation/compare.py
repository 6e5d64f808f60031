"""Everything `evaluate` says of saved models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..calibration.documents import documents
from ..calibration.windows import token_stream, windows_digest
from ..errors import CalibrationError, ConfigError, ModelError
from ..hf.attach import packed_layers
from ..hf.loading import load_model, load_tokenizer
from ..masks.recognise import follows
from ..nn import NMLinear, dense_weight, is_dense_linear
from ..packing.checkpoint import read_headers, weight_files
from .paired import Comparison, compare
from .perplexity import Perplexity, perplexity_of
from .reading import read
from .size import ModelSize, model_size
from .tasks import TaskRunner, TaskScore


@dataclass(frozen=True)
class Evaluation:
    """What was measured of the model in `folder`: its size, whether it is pruned, and what was asked for."""

    folder: str
    dtype: str
    size: ModelSize
    pruned_layers: list[str]
    pruned: bool
    perplexity: Perplexity | None = None
    token_digest: str | None = None
    tasks: list[TaskScore] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """As JSON types, without the single answers of the tasks."""
        found = asdict(self)
        for task in found["tasks"]:
            del task["by_document"]
        return found


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
    """Load one or two models, and measure them on the same windows and tasks as the command-line `args` say.

    Args:
        folders: Saved models; with two, both are in memory at once, and the first is compared with the second.
        args: With text, split, text_column, seq_len, stride, num_windows, batch_size and dtype; with tasks,
            include_path, num_fewshot, limit and apply_chat_template. `text` or `tasks` may be None.

    Raises:
        EGGSError: a model, the text or a task cannot be used, or the two models' tokenizers differ.
    """
    if args.text is None and not args.tasks:
        raise ConfigError("there is nothing to judge on; give --text, --tasks or both")
    for folder in folders:
        if not Path(folder).is_dir():
            raise ModelError(f"{folder}: there is no such folder; save the model first, its files are measured too")
        read_headers(weight_files(folder))
    runner = _task_runner(args) if args.tasks else None
    tokenizers = [load_tokenizer(folder) for folder in folders]
    windows = None if args.text is None else _common_windows(folders, tokenizers, args)
    models = [load_model(folder, dtype=args.dtype).eval() for folder in folders]
    packed = packed_layers(models[0])
    evaluations = [
        Evaluation(
            folder,
            str(model.dtype).removeprefix("torch."),
            model_size(model, folder, list(packed) if index else None),
            list(packed_layers(model)),
            _is_pruned(model, packed),
        )
        for index, (folder, model) in enumerate(zip(folders, models, strict=True))
    ]
    comparison = None
    if windows is not None:
        stride = args.seq_len if args.stride is None else args.stride
        for model in models:
            _check_context(model, args.seq_len)
        reading = read(models, windows, args.batch_size, args.seq_len - stride)
        text_bytes, digest = predicted_bytes(windows, tokenizers[0], stride), windows_digest(windows)
        evaluations = [
            replace(found, perplexity=perplexity_of(reading, index, windows, text_bytes), token_digest=digest)
            for index, found in enumerate(evaluations)
        ]
        comparison = compare(reading) if len(models) == 2 else None
    if runner is not None:
        evaluations = [
            replace(found, tasks=runner.run(model, tokenizer))
            for found, model, tokenizer in zip(evaluations, models, tokenizers, strict=True)
        ]
    return evaluations, comparison


def _is_pruned(model: nn.Module, packed: Mapping[str, NMLinear]) -> bool:
    """Whether `model` has packed layers, or else stores the zeros of those that are `packed` in another model."""
    modules = dict(model.named_modules())
    dense = {name: modules[name] for name in packed if name in modules and is_dense_linear(modules[name])}
    return bool(packed_layers(model)) or (
        bool(dense) and all(follows(dense_weight(dense[name]), packed[name].pattern) for name in dense)
    )


def _task_runner(args: Any) -> TaskRunner:
    return TaskRunner.create(
        args.tasks,
        include_path=args.include_path,
        num_fewshot=args.num_fewshot,
        limit=args.limit,
        apply_chat_template=args.apply_chat_template,
        batch_size=args.batch_size,
    )


def _common_windows(folders: Sequence[str], tokenizers: Sequence[Any], args: Any) -> Tensor:
    """The windows of the text, if all tokenizers cut it into the same."""
    cuts = [
        evaluation_windows(args.text, each, args.seq_len, args.num_windows, args.split, args.text_column, args.stride)
        for each in tokenizers
    ]
    for folder, cut in zip(folders, cuts, strict=True):
        if windows_digest(cut) != windows_digest(cuts[0]):
            raise ModelError(f"{folder}: its tokenizer cuts the text differently, so the two cannot be compared")
    return cuts[0]


def _check_context(model: Any, seq_len: int) -> None:
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if isinstance(context, int) and seq_len > context:
        raise CalibrationError(f"seq_len={seq_len} is more than the model's context of {context}; lower seq_len")


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
