"""Training a packed model back towards its dense teacher, or on plain text; it stays packed."""

from __future__ import annotations

import json
import math
import shutil
import sys
import time
import warnings
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, fields, replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm.auto import tqdm

from .. import strict_json
from .. import validation as check
from ..calibration.context import check_context, check_vocabulary, context_length
from ..calibration.documents import described, refuse_twice
from ..calibration.windows import check_share, windows_digest
from ..config import QUANT_METHOD
from ..devices import choose_device
from ..engine.precision import has_bfloat16_products
from ..engine.report import read_report, used_texts, without_measurements
from ..errors import ConfigError, ModelError
from ..evaluation.perplexity import perplexity
from ..files import REPORT_NAME, likeness
from ..folders import check_output, claimed, put_in_place, written
from ..hf.attach import cast_parameters
from ..hf.loading import check_weights, has_tokenizer, load_config, load_model, load_tokenizer
from ..measure import Meter
from ..memory import enough_memory
from ..names import public_name, public_names
from ..nn import packed_layers, values_kept
from ..nn.rounded import RoundedLinear, round_while_training, store_rounded
from ..packing import meta_width
from ..presets import SEQ_LEN
from ..ranks import Ranks, join_ranks
from ..runs import open_run, run_folder
from .distill import TeacherTokens, TeacherWindows, teacher_tokens
from .estimate import announcement, passes
from .windows import training_windows

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ..hf.quantizer import EGGSHfQuantizer

METHODS = ("lora", "values")
_LEARNING_RATES = {"lora": 5e-3, "values": 5e-4}  # as shares of the root mean square of what is changed
_TAUGHT, _MADE = "teacher.safetensors", "made"


@dataclass(frozen=True)
class RecoverySettings:
    """How a packed model is trained.

    Args:
        train: A text file, a file of rows or a data set, or several, mixed: their windows are shuffled together. With a
            mapping of them to shares each gives its share of the windows that the steps take, or all that it has if
            they are fewer.
        teacher: Folder or id of the dense model whose next-token probabilities are matched; without one, the text's own
            next tokens are.
        method: `"lora"` trains a masked LoRA on every packed layer and merges it; `"values"` trains the packed values.
        rank: Of the LoRA; its alpha is twice that.
        steps: Optimiser steps.
        learning_rate: At its highest, after a twentieth of the steps; it falls to zero as a cosine. A share of the root
            mean square of the weights that are changed. Default: 5e-3 for `"lora"`, 5e-4 for `"values"`.
        seq_len: Tokens in a window. Default: 512, or the model's context where that is shorter.
        batch_size: Windows in a step of each process.
        held_out: Windows that training does not see, as a share of those that it does, at least two and at most 16: the
            end of what is read of each text, which is about twice what all steps take. 0 holds none out: nothing is
            judged, all steps are taken, and the last state is kept. That is for a text that the model was calibrated
            on, since pruning has fitted it.
        evaluations: Times that they are judged during training, or a few more, since they are judged every so many
            steps; the best of these states is the one kept. So often checkpoints are written, too.
        patience: Judgements in a row, each no better than the one before, after which training ends.
        top_k: The teacher's most likely tokens that are kept.
        kd_ratio: Share of the teacher in the loss; the rest is that of the text's own next tokens, which draws the
            model to the text.
        block_matching: Weight in the loss of ‖S − T‖²/‖T‖², S and T the output of a block of the model and of the
            teacher, as a mean over the blocks. The teacher then runs beside the model at every step.
        gradient_checkpointing: Compute activations again in the backward pass, for less memory.
        seed: Of the order of the windows, of dropout and of the adapter's start.
        text_column: Column of data sets and files of rows. Default: `"input_ids"` where there is one, else `"text"`.

    Raises:
        ConfigError: a value is out of range, or a text is given twice.
        CalibrationError: a share is not a positive number.
    """

    train: str | Sequence[str] | Mapping[str, float]
    teacher: str | None = None
    method: str = "lora"
    rank: int = 16
    steps: int = 200
    learning_rate: float | None = None
    seq_len: int | None = None
    batch_size: int = 4
    held_out: float = 0.05
    evaluations: int = 8
    patience: int = 3
    top_k: int = 64
    kd_ratio: float = 1.0
    block_matching: float = 0.0
    gradient_checkpointing: bool = False
    seed: int = 0
    text_column: str | None = None

    @property
    def eval_steps(self) -> int:
        """Steps from one judgement of the windows held out to the next."""
        return max(1, self.steps // self.evaluations)

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ConfigError(f"method={self.method!r} is unknown; use one of {list(METHODS)}")
        if isinstance(self.train, str):
            object.__setattr__(self, "train", [self.train] if self.train else [])
        if not self.train:
            raise ConfigError("train=[]: name at least one text file or data set")
        refuse_twice(self.train, "train")
        if isinstance(self.train, Mapping):
            for name, share in self.train.items():
                check_share(name, share, "train")
        for name in ("rank", "steps", "batch_size", "evaluations", "patience", "top_k"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)} is not positive; use 1 or more")
        check.integer("seed", self.seed, least=0, most=check.NUMPY_SEEDS)
        if self.seq_len is not None and self.seq_len < 2:
            raise ConfigError(f"seq_len={self.seq_len} leaves nothing to predict; use 2 or more")
        if not 0 <= self.held_out < 1:
            raise ConfigError(f"held_out={self.held_out} is no share; use a number below 1, or 0 to hold none out")
        if not 0 < self.kd_ratio <= 1:
            raise ConfigError(
                f"kd_ratio={self.kd_ratio} is not above 0 and at most 1; to learn from the text alone, name no teacher"
            )
        if self.kd_ratio < 1 and self.teacher is None:
            raise ConfigError(f"kd_ratio={self.kd_ratio} needs a teacher to weigh the text against; name one")
        if not 0 <= self.block_matching < math.inf:
            raise ConfigError(f"block_matching={self.block_matching} is no weight; use 0 (off) or more")
        if self.block_matching and self.teacher is None:
            raise ConfigError(f"block_matching={self.block_matching} needs a teacher to match; name one")
        if self.learning_rate is not None and not 0 < self.learning_rate < math.inf:
            raise ConfigError(f"learning_rate={self.learning_rate} is not positive; leave it out for the default")


@dataclass
class RecoveryReport:
    """What recovery did. Perplexities are on the windows held out; `held_out_loss` is what was minimised, there.

    Where no window was held out, both perplexities are None.

    `kept` is `"after"`, or `"before"` where training made the perplexity worse: the values are then those of before.
    `texts` are what the values kept were trained on, in this recovery and in earlier ones, as `described`.
    """

    settings: dict[str, Any]
    steps: int
    perplexity_before: float | None
    perplexity_after: float | None
    held_out_loss: list[float]
    windows: int
    windows_held_out: int
    windows_sha256: str
    measurements: dict[str, Any] = field(default_factory=dict)
    kept: str = "after"
    texts: list[dict[str, Any]] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """As JSON types."""
        return asdict(self)


@enough_memory("batch_size", "seq_len")
def recover(
    model_id: str | Path,
    output: str | Path,
    settings: RecoverySettings,
    *,
    overwrite: bool = False,
    trust_remote_code: bool = False,
    device: str | torch.device = "auto",
) -> RecoveryReport:
    """Train the packed model in `model_id` and write it to `output`, packed under the same mask.

    Values that are integers are trained with their rounding in the loop, and are integers again. Of the values before
    and after training those are written that predict the windows held out better.

    Runs `transformers.Trainer` over float32 weights, in bfloat16 autocast where the device has instructions for
    products in bfloat16. Its checkpoints lie in a hidden folder beside the output (in it, where it is an empty folder
    that is there already); the same call after an interruption goes on from the last of them. A run of other settings
    that was cut is not in the way: its checkpoints stay until a run ends. Under `torchrun` or `accelerate launch` every
    process takes its share of the steps' windows: `batch_size` is then that of each. Code that comes with the model,
    its tokenizer or the teacher is run with `trust_remote_code` alone.

    Args:
        model_id: A packed model.
        output: Folder to make.
        settings: How it is trained.
        overwrite: Replace a model that this package saved at `output`, and what runs of other settings that were cut
            have left.
        trust_remote_code: Run code that comes with the models.
        device: Where, for one process alone. Default: an accelerator if there is one.

    Raises:
        ConfigError: PEFT is missing, the teacher is the model itself, or there is no such device.
        ModelError: the model has no packed layer, or cannot be loaded; the teacher is packed, or has another tokenizer.
        CalibrationError: the texts are too short, or the windows too long for the model's context.
        CheckpointError: the model's report cannot be read.
        NumericalError: a loss or a gradient is not finite; the first such layer is named.
        OutputError: the output may not be written, before the work begins; or the disk is full.
        OutOfMemoryError: there is not enough memory.
    """
    from ..sharing import own_card, put_card

    path = check_output(output, overwrite, sources=[model_id, settings.teacher])
    if settings.method == "lora" and find_spec("peft") is None:
        raise ConfigError("method='lora' needs PEFT: pip install 'peft>=0.21', or use method='values'")
    pruned, own = read_report(model_id), own_card(path)
    config = load_config(model_id, trust_remote_code)
    stored = config.dtype or torch.float32
    settings = _with_seq_len(settings, config)
    if settings.teacher is not None:
        _check_teacher(settings.teacher, model_id, config, trust_remote_code)
        _check_same_basis(settings, config, pruned)
    where = choose_device(device)
    if where.type == "cuda" and where.index is not None:
        torch.cuda.set_device(where)  # which the Trainer goes by
    ranks = join_ranks(cpu=where.type == "cpu")
    where = where if ranks.size == 1 else torch.device(ranks.device)
    with ExitStack() as stack:
        with Meter([where]) as meter:
            with ranks.together():
                tokenizer = load_tokenizer(model_id, trust_remote_code=trust_remote_code)
                train, held_out = training_windows(settings, tokenizer, ranks.size)
                windows = torch.cat([train, held_out])
                check_vocabulary(config, windows)
                digest = windows_digest(windows)
                if settings.teacher is not None:
                    _check_tokenizer(settings, digest, ranks.size, trust_remote_code)
                texts = described(settings.train)
                model = _on(where, load_model(model_id, dtype="float32", trust_remote_code=trust_remote_code))
                if not packed_layers(model):
                    raise ModelError(f"{model_id}: no packed layer is in it; prune it first")
            run = {
                "model": likeness(model_id),
                "taught by": None if settings.teacher is None else likeness(settings.teacher),
                "windows": digest,
                "processes": ranks.size,
            } | asdict(settings)
            needs = _bytes_to_write(model, settings, windows, stored)
            work, folder = _claim(stack, ranks, path, run, overwrite, needs)
            with meter.stage("judging"):
                began = time.perf_counter()
                judged = held_out if len(held_out) else train[:2]
                found = perplexity(model, judged).perplexity
                of_window = (time.perf_counter() - began) / len(judged)
                before = found if len(held_out) else None
            start = _last_checkpoint(folder, ranks)
            done = _step_of(start) if start else 0
            if ranks.first:
                dtype = torch.bfloat16 if _in_bfloat16(where) else torch.float32
                left = passes(settings, len(windows), len(held_out), dtype, done, (folder / _TAUGHT).is_file())
                told = announcement(model, settings, dtype, ranks.size, done, left * of_window)
                tqdm.write(told, file=sys.stderr)
            taught = teacher = None
            if settings.teacher is not None:
                with ranks.together():
                    if ranks.first or settings.block_matching:  # else one reads all windows, for all processes
                        teacher = _on(where, load_model(settings.teacher, trust_remote_code=trust_remote_code).eval())
                with meter.stage("teacher"):
                    taught = _taught(folder / _TAUGHT, teacher, windows, settings.top_k, ranks)
                if not settings.block_matching:
                    teacher = None
            round_while_training(model)
            _quantizer_of(model).rounds_in_training = True
            with meter.stage("training"):
                trained, losses, steps = _train(model, train, held_out, teacher, taught, settings, folder, start)
            store_rounded(trained)
            _quantizer_of(trained).rounds_in_training = False
            with meter.stage("judging"):
                after = perplexity(trained, held_out).perplexity if len(held_out) else None
            worse = before is not None and after is not None and after > before
            if worse:
                trained = load_model(model_id, dtype="float32", trust_remote_code=trust_remote_code)
        shared = isinstance(settings.train, Mapping)
        trained_on = public_name(settings.train) if shared else public_names(list(settings.train))
        public = {"train": trained_on, "teacher": public_name(settings.teacher)}
        report = RecoveryReport(
            asdict(settings) | public, steps, before, after, losses, len(train), len(held_out), digest, meter.summary()
        )
        earlier = used_texts(pruned)["trained"]
        report.kept, report.texts = ("before", earlier) if worse else ("after", [*earlier, *texts])
        cast_parameters(trained, stored)
        trained.config.dtype = stored
        with ranks.together():
            if ranks.first:
                made = folder / _MADE
                shutil.rmtree(made, ignore_errors=True)
                made.mkdir()
                put_card(own, made)
                _save(made, trained, tokenizer, pruned if worse else without_measurements(pruned), report, path.name)
                check_output(path, overwrite)
                put_in_place(made, path, work, clear=True)
    return report


def _quantizer_of(model: Any) -> EGGSHfQuantizer:
    return model.hf_quantizer


def _on(device: torch.device, model: PreTrainedModel) -> PreTrainedModel:
    """The model, moved there in place."""
    torch.nn.Module.to(model, device)
    return model


def _claim(
    stack: ExitStack, ranks: Ranks, path: Path, run: dict[str, Any], overwrite: bool, needs: int
) -> tuple[Path, Path]:
    """The hidden folder of the output, claimed as long as `stack` is open, and that of the run in it."""
    work: Path | None = None
    with ranks.together():
        if ranks.first:
            work = stack.enter_context(claimed(path))
        stack.enter_context(written(path, "once it can be, the same command goes on from the last checkpoint"))
    (work, *_) = ranks.gather(work)
    assert work is not None
    folder = run_folder(work, run)
    with ranks.together():
        if ranks.first:
            stack.callback(_remove_without_work, folder)
            open_run(work, run, overwrite)
            there = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
            check_output(path, overwrite, needs=max(0, needs - there))
    return work, folder


def _save(made: Path, model: Any, tokenizer: Any, pruned: dict[str, Any], report: RecoveryReport, name: str) -> None:
    from ..sharing import write_card

    model.save_pretrained(made)
    tokenizer.save_pretrained(made)
    text = strict_json.dumps(pruned | {"recovery": report.to_dict()}, indent=2)
    (made / REPORT_NAME).write_text(text + "\n", encoding="utf-8")
    if "layers" in pruned:  # else there is nothing to make a card of
        write_card(made, name)


def _with_seq_len(settings: RecoverySettings, config: Any) -> RecoverySettings:
    """The settings with the `seq_len` that they stand for, if none was given; one that is too long is refused."""
    if settings.seq_len is None:
        return replace(settings, seq_len=min(SEQ_LEN, context_length(config) or SEQ_LEN))
    check_context(config, settings.seq_len)
    return settings


def _check_same_basis(settings: RecoverySettings, config: Any, report: Mapping[str, Any]) -> None:
    """Raise if blocks are to be matched whose outputs are in another basis than the teacher's."""
    asked = getattr(config, "quantization_config", {}).get("rotation")
    turned = bool(asked) and "reason" not in (report.get("rotation") or {})
    if settings.block_matching and turned:
        raise ConfigError(
            f"block_matching={settings.block_matching}: the model was pruned with rotation={asked!r}, so its blocks "
            "give nothing in the teacher's basis; leave it out"
        )


def _check_teacher(teacher_id: str, model_id: str | Path, config: Any, trust_remote_code: bool) -> None:
    """Raise unless the teacher is there, is another model than the student, is dense and has its vocabulary."""
    folders = [Path(teacher_id), Path(model_id)]
    if teacher_id == str(model_id) or (all(map(Path.is_dir, folders)) and folders[0].samefile(folders[1])):
        raise ConfigError(f"teacher={teacher_id!r} is the model that is trained; name the dense model")
    try:
        theirs = load_config(teacher_id, trust_remote_code)
    except ModelError as error:
        raise ModelError(f"teacher={teacher_id!r}: {error}") from error
    if (getattr(theirs, "quantization_config", None) or {}).get("quant_method") == QUANT_METHOD:
        raise ModelError(f"teacher={teacher_id!r} is a packed model; name the dense one that was pruned")
    sizes = [each.get_text_config().vocab_size for each in (theirs, config)]
    if sizes[0] != sizes[1]:
        raise ModelError(
            f"teacher={teacher_id!r} has a vocabulary of {sizes[0]}, the model one of {sizes[1]}; they must agree"
        )
    check_weights(teacher_id)


def _check_tokenizer(settings: RecoverySettings, digest: str, processes: int, trust_remote_code: bool) -> None:
    """Raise unless the teacher's tokenizer, if it has one, cuts the texts into the windows of this digest."""
    teacher = settings.teacher
    assert teacher is not None
    if Path(teacher).is_dir() and not has_tokenizer(teacher):
        return
    theirs = load_tokenizer(teacher, trust_remote_code=trust_remote_code)
    if windows_digest(torch.cat(training_windows(settings, theirs, processes))) != digest:
        raise ModelError(
            f"teacher={teacher!r}: its tokenizer cuts the text differently; name the model that was pruned, or another "
            "with its tokenizer"
        )


def _taught(file: Path, teacher: PreTrainedModel | None, windows: Tensor, top_k: int, ranks: Ranks) -> TeacherTokens:
    """The teacher's tokens: from the file that an interrupted run wrote; else made and written by the first process."""
    with ranks.together():
        if ranks.first and teacher is not None and not file.is_file():
            device = next(teacher.parameters()).device
            found = teacher_tokens(teacher, windows, top_k, autocast=_in_bfloat16(device))
            part = file.with_suffix(".part")
            save_file({"ids": found.ids, "log_probs": found.log_probs}, part)
            part.replace(file)
    with ranks.together():
        return TeacherTokens(**load_file(file))


def _in_bfloat16(device: torch.device) -> bool:
    """Whether training multiplies in bfloat16: not where that is known to be slow."""
    return device.type not in ("cpu", "cuda") or has_bfloat16_products(device)


def _bytes_to_write(model: PreTrainedModel, settings: RecoverySettings, windows: Tensor, stored: torch.dtype) -> int:
    """Bytes of the output, of three checkpoints, which is how many there are while one is written, and of `_TAUGHT`."""
    layers = packed_layers(model).values()
    everything = sum(value.numel() for value in model.parameters())
    everything += sum(values_kept(layer) - layer.weight.numel() for layer in layers)  # two integers may be one byte
    if settings.method == "lora":
        trained = sum(settings.rank * (layer.in_features + layer.out_features) for layer in layers)
        checkpoint = 12 * trained  # the values and Adam's two moments, in float32
    else:
        trained = sum(map(values_kept, layers))
        checkpoint = 4 * everything + 8 * trained
    bits = sum(layer.out_features * meta_width(layer.in_features) for layer in layers)
    taught = 0 if settings.teacher is None else windows.numel() * settings.top_k * 6
    return everything * stored.itemsize + bits + 3 * checkpoint + taught


def _remove_without_work(folder: Path) -> None:
    if not (folder / _TAUGHT).is_file() and not any(folder.glob("checkpoint-*")):
        shutil.rmtree(folder, ignore_errors=True)


def _last_checkpoint(folder: Path, ranks: Ranks) -> str | None:
    """The last checkpoint that was written to its end; the first process removes what was cut off."""
    last = None
    with ranks.together():
        for path in _checkpoints(folder) if ranks.first else ():
            try:
                json.loads((path / "trainer_state.json").read_text(encoding="utf-8"))  # the Trainer writes it last
            except (OSError, ValueError):
                shutil.rmtree(path)
            else:
                last = str(path)
                break
    return ranks.gather(last)[0]


def _checkpoints(folder: Path) -> list[Path]:
    return sorted(folder.glob("checkpoint-*"), key=_step_of, reverse=True)


def _step_of(checkpoint: str | Path) -> int:
    return int(Path(checkpoint).name.rpartition("-")[2])


def _train(
    model: PreTrainedModel,
    train: Tensor,
    held_out: Tensor,
    teacher: PreTrainedModel | None,
    taught: TeacherTokens | None,
    settings: RecoverySettings,
    work: Path,
    start: str | None,
) -> tuple[PreTrainedModel, list[float], int]:
    """The trained model (merged, packed), the losses on the windows held out, and the steps done."""
    from transformers import TrainingArguments

    from .trainer import RecoveryTrainer, StopWhenWorse

    def part(rows: slice) -> TeacherTokens | None:
        return None if taught is None else TeacherTokens(taught.ids[rows], taught.log_probs[rows])

    wrapped: Any = model
    torch.manual_seed(settings.seed)
    if settings.method == "lora":
        from peft import LoraConfig, get_peft_model

        names = list(packed_layers(model))
        lora = LoraConfig(r=settings.rank, lora_alpha=2 * settings.rank, target_modules=names, task_type="CAUSAL_LM")
        with warnings.catch_warnings():
            # PEFT asks the model by a name that newer versions of transformers warn of
            warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
            wrapped = get_peft_model(model, lora)
        if settings.gradient_checkpointing:
            wrapped.enable_input_require_grads()
    else:
        for parameter in model.parameters():
            parameter.requires_grad_(parameter.dim() < 2 and parameter.is_floating_point())  # norms and biases
        for layer in packed_layers(model).values():
            layer.weight.requires_grad_(True)
            if isinstance(layer, RoundedLinear):
                layer.weight_scale.requires_grad_(True)
    device = next(model.parameters()).device
    names_of_it = ("activation_checkpointing", "gradient_checkpointing")  # newer versions of transformers, and older
    known = {each.name for each in fields(TrainingArguments)}
    saving_memory: dict[str, Any] = {
        next(name for name in names_of_it if name in known): settings.gradient_checkpointing
    }
    arguments = TrainingArguments(
        output_dir=str(work),
        max_steps=settings.steps,
        per_device_train_batch_size=settings.batch_size,
        per_device_eval_batch_size=1,
        learning_rate=settings.learning_rate or _LEARNING_RATES[settings.method],
        lr_scheduler_type="cosine",
        warmup_steps=max(1, settings.steps // 20),
        eval_strategy="steps" if len(held_out) else "no",
        eval_steps=settings.eval_steps,
        save_strategy="steps",
        save_steps=settings.eval_steps,
        save_total_limit=2,
        load_best_model_at_end=len(held_out) > 0,
        metric_for_best_model="loss",
        prediction_loss_only=True,
        remove_unused_columns=False,
        **saving_memory,
        use_cpu=device.type == "cpu",
        seed=settings.seed,
        report_to=[],
        logging_steps=max(1, settings.eval_steps // 4),
    )
    arguments.mixed_precision = "no"  # whatever `accelerate launch` says: it would copy all logits to float32
    arguments._n_gpu = min(1, arguments.n_gpu)  # several take a process each; threads would not know of the autocast
    trainer = RecoveryTrainer(
        model=wrapped,
        args=arguments,
        train_dataset=TeacherWindows(train, part(slice(0, len(train)))),
        eval_dataset=TeacherWindows(held_out, part(slice(len(train), None))),
        callbacks=[StopWhenWorse(settings.patience)],
        teacher=teacher,
        kd_ratio=settings.kd_ratio,
        block_matching=settings.block_matching,
        autocast=_in_bfloat16(device),
    )
    trainer.train(resume_from_checkpoint=start)
    losses = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    if settings.method == "lora":
        wrapped = wrapped.merge_and_unload(safe_merge=True)
    for parameter in wrapped.parameters():
        parameter.requires_grad_(False)
    return wrapped.eval(), losses, trainer.state.global_step
