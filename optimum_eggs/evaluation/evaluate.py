"""`evaluate`: everything there is to say of a model, or of two on the same text and tasks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..calibration.context import check_context, check_vocabulary, context_length
from ..calibration.documents import described
from ..calibration.windows import windows_digest
from ..devices import choose_device, device_map
from ..engine.report import read_report, text_uses
from ..errors import ConfigError, ModelError
from ..folders import check_folder
from ..hf.loading import load_config, load_model, load_tokenizer
from ..masks.recognise import follows
from ..memory import enough_memory
from ..nn import PackedLinear, dense_weight, is_dense_linear, packed_layers, pattern_of
from ..packing.checkpoint import read_headers, weight_files
from .paired import compare
from .perplexity import perplexity_of
from .reading import read
from .result import Conditions, Evaluation, EvaluationResult
from .size import model_size
from .tasks import TaskRunner, task_differences
from .windows import evaluation_windows, predicted_bytes

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_SEQ_LEN = 1024


@enough_memory("batch_size", "seq_len")
def evaluate(
    model: PreTrainedModel | str | Path,
    against: PreTrainedModel | str | Path | None = None,
    *,
    text: Any = None,
    split: str | None = "test",
    text_column: str | None = None,
    seq_len: int | None = None,
    stride: int | None = None,
    num_windows: int | None = None,
    tasks: Sequence[str] | None = None,
    include_path: str | Path | None = None,
    num_fewshot: int | None = None,
    limit: int | None = None,
    apply_chat_template: bool = False,
    batch_size: int = 1,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device = "auto",
    tokenizer: PreTrainedTokenizerBase | None = None,
    trust_remote_code: bool = False,
) -> EvaluationResult:
    """Measure a model on a text, on tasks, or both; and against another model, on the same windows and documents.

    Models are read from folders, or are in memory already, which leaves them as they are. With `against`, both are in
    memory at once.

    Args:
        model: Folder of a saved model, packed or dense, or a model of transformers.
        against: Another one, usually the dense model.
        text: Text to predict: a text file, a file of rows, the name of a data set, a list of texts, or a
            `datasets.Dataset`.
        split: Split of a data set from the Hub.
        text_column: Column of a data set or a file of rows. Default: `"input_ids"` where there is such a column, else
            `"text"`.
        seq_len: Tokens in a window. Default: 1024, or the models' context where that is shorter.
        stride: Tokens from one window to the next; those that overlap are read, not predicted. Default: `seq_len`.
        num_windows: Use only the first windows. Default: all.
        tasks: Tasks, groups or tags of lm-evaluation-harness.
        include_path: Folder with YAML files of further tasks.
        num_fewshot: Examples before each question. Default: as the task says.
        limit: Only the first documents of each task, to try things out.
        apply_chat_template: Ask as the tokenizer's chat template says.
        batch_size: Windows or requests run at a time.
        dtype: Dtype to load folders in. Default: the checkpoint's.
        device: Where models in folders are loaded to. Default: an accelerator if there is one.
        tokenizer: Tokenizer of models in memory; a folder has its own.
        trust_remote_code: Run code that comes with the models in folders.

    Returns:
        The result. [`record`][optimum_eggs.evaluation.record] puts it into the model's report, for its card.

    Raises:
        EGGSError: a model, the text or a task cannot be used, or the two models' tokenizers differ.
        NumericalError: a model predicts the text with a loss that is not finite; the first such layer is named.
        OutOfMemoryError: there is not enough memory.

    Example:
        ```python
        found = evaluate("out", "path/or/dense", text="other.txt")
        print(found.model.perplexity, found.comparison.kl_divergence)
        ```
    """
    if text is None and not tasks:
        raise ConfigError("there is nothing to judge on; give text (--text), tasks (--tasks) or both")
    where = choose_device(device)
    sources = [_Source(each, tokenizer, trust_remote_code) for each in (model, against) if each is not None]
    report = {} if sources[0].folder is None else read_report(sources[0].folder)
    contexts = [context for source in sources if (context := context_length(source.config)) is not None]
    seq_len = min([_SEQ_LEN, *contexts]) if seq_len is None else seq_len
    if text is not None:
        for source in sources:
            check_context(source.config, seq_len)
    runner = None
    if tasks:
        runner = TaskRunner.create(
            tasks,
            include_path=include_path,
            num_fewshot=num_fewshot,
            limit=limit,
            apply_chat_template=apply_chat_template,
            batch_size=batch_size,
        )
    step = seq_len if stride is None else stride
    tokenizers = [source.load_tokenizer() for source in sources]
    for source, own in zip(sources, tokenizers, strict=True):
        if tasks and apply_chat_template and not own.chat_template:
            raise ConfigError(
                f"apply_chat_template=True: the tokenizer of {source.name} has no chat template; leave it out"
            )
    windows = None
    if text is not None:
        cuts = [evaluation_windows(text, each, seq_len, num_windows, split, text_column, stride) for each in tokenizers]
        windows = _same(cuts, sources)
        for source in sources:
            check_vocabulary(source.config, windows)
    conditions = _conditions(text, split, seq_len, step, apply_chat_template)
    with ExitStack() as stack:
        models = [stack.enter_context(_evaluating(source.load(dtype, where))) for source in sources]
        packed = packed_layers(models[0])
        found = [
            Evaluation(
                source.folder,
                str(loaded.dtype).removeprefix("torch."),
                model_size(loaded, source.folder, packed if index else None),
                list(packed_layers(loaded)),
                _is_pruned(loaded, packed),
            )
            for index, (source, loaded) in enumerate(zip(sources, models, strict=True))
        ]
        comparison = None
        if windows is not None:
            reading = read(models, windows, batch_size, seq_len - step)
            text_bytes, digest = predicted_bytes(windows, tokenizers[0], step), windows_digest(windows)
            found = [
                replace(each, perplexity=perplexity_of(reading, index, windows, text_bytes), token_digest=digest)
                for index, each in enumerate(found)
            ]
            comparison = compare(reading) if len(models) == 2 else None
        if runner is not None:
            found = [
                replace(each, tasks=runner.run(loaded, own))
                for each, loaded, own in zip(found, models, tokenizers, strict=True)
            ]
    if text is not None:
        found[0] = replace(found[0], text_uses=text_uses(report, conditions.described))
    first, second = found[0], found[1] if len(found) == 2 else None
    pairs = zip(first.tasks, second.tasks, strict=True) if second is not None else ()
    differences = {ours.task: task_differences(ours, theirs) for ours, theirs in pairs}
    return EvaluationResult(first, conditions, second, comparison, differences)


@dataclass(frozen=True)
class _Source:
    """A model to be judged: in memory, or in a folder whose files are whole.

    Raises:
        ModelError: there is no such folder, or it is a file.
        CheckpointError: its weight files are damaged.
    """

    given: Any
    tokenizer: Any
    trust_remote_code: bool

    def __post_init__(self) -> None:
        if self.folder is None:
            return
        check_folder(self.folder)
        read_headers(weight_files(self.folder))

    @cached_property
    def config(self) -> Any:
        """Its configuration, read before its weights are."""
        if self.folder is None:
            return getattr(self.given, "config", None)
        return load_config(self.folder, self.trust_remote_code)

    @property
    def folder(self) -> str | None:
        return str(self.given) if isinstance(self.given, str | Path) else None

    @property
    def name(self) -> str:
        return self.folder or type(self.given).__name__

    def load_tokenizer(self) -> Any:
        if self.folder is not None:
            return load_tokenizer(self.folder, trust_remote_code=self.trust_remote_code)
        if self.tokenizer is None:
            raise ConfigError(f"tokenizer=None with a {self.name} in memory: pass the model's tokenizer")
        return self.tokenizer

    def load(self, dtype: Any, device: torch.device) -> Any:
        if self.folder is None:
            return self.given
        return load_model(
            self.folder, dtype=dtype, device_map=device_map(device), trust_remote_code=self.trust_remote_code
        )


@contextmanager
def _evaluating(model: Any) -> Iterator[Any]:
    """Evaluation mode while within."""
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield model
    finally:
        for module, mode in training.items():
            module.training = mode


def _same(cuts: Sequence[Tensor], sources: Sequence[_Source]) -> Tensor:
    """The windows, if all tokenizers cut the text into the same."""
    for source, cut in zip(sources, cuts, strict=True):
        if windows_digest(cut) != windows_digest(cuts[0]):
            raise ModelError(f"{source.name}: its tokenizer cuts the text differently, so the two cannot be compared")
    return cuts[0]


def _conditions(text: Any, split: str | None, seq_len: int, stride: int, apply_chat_template: bool) -> Conditions:
    if text is None:
        return Conditions(None, None, seq_len, stride, apply_chat_template)
    known = described([text], split)
    named = known[0] if known else {"name": f"{type(text).__name__} in memory", "split": None, "sha256": None}
    return Conditions(named["name"], named["split"], seq_len, stride, apply_chat_template, named["sha256"])


def _is_pruned(model: nn.Module, packed: Mapping[str, PackedLinear]) -> bool:
    """Whether `model` has packed layers, or else stores the zeros of those that are `packed` in another model."""
    modules = dict(model.named_modules())
    dense = {name: modules[name] for name in packed if name in modules and is_dense_linear(modules[name])}
    return bool(packed_layers(model)) or (
        bool(dense) and all(follows(dense_weight(dense[name]), pattern_of(packed[name])) for name in dense)
    )
