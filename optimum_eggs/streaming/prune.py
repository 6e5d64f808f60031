"""From a dense checkpoint on disk to a packed one, with one block of it in memory, going on where a run was cut."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Mapping, MutableSequence, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.dynamic_module_utils import custom_object_save

from .. import validation as check
from ..calibration.batches import short_batch, short_count
from ..calibration.states import StatesOnDisk, states_in_memory
from ..calibration.windows import check_calibration, windows_digest
from ..config import EGGSConfig
from ..engine.block import BlockResult
from ..engine.estimate import lists_held
from ..engine.generate import generated_windows
from ..engine.inputs import kept_parts
from ..engine.left_dense import code_tensors, left_dense_codings
from ..engine.plan import PrunePlan, make_plan
from ..engine.prune import check_run, evaluation_mode, make_report, prune_blocks
from ..engine.report import PruneReport
from ..engine.rotate import Turn, choose_turn
from ..engine.run import calibration_windows, name_sources, with_seq_len
from ..errors import ConfigError, OutputError
from ..files import REPORT_NAME, sample
from ..folders import check_output, claimed, put_in_place, written
from ..hf.attach import attach_quantizer
from ..hf.loading import has_tokenizer, load_tokenizer, parse_dtype
from ..measure import Meter
from ..memory import enough_memory
from ..nn import dense_weight
from ..packing import packed_width, unpack
from ..packing.codes import Coding, decode
from ..pattern import NMPattern
from ..ranks import ALONE, Ranks
from ..runs import open_run, run_folder
from ..version import __version__
from .journal import JOURNAL_NAME, Journal
from .shards import JOINED, Shards
from .source import DenseSource
from .turned import read_turn, write_turn
from .written import read_windows, write_windows

_ASSEMBLED = "assembled"


@enough_memory("batch_size", "seq_len", "num_samples", "memory_budget")
def prune_checkpoint(
    model: str | Path,
    output: str | Path,
    config: EGGSConfig,
    *,
    dtype: str | torch.dtype | None = None,
    save_dtype: str | torch.dtype | None = None,
    device: str | torch.device = "auto",
    memory_budget: int | str | None = None,
    max_shard_size: int | str = "50GB",
    overwrite: bool = False,
    progress: bool | None = None,
    ranks: Ranks = ALONE,
    revision: str | None = None,
    token: str | bool | None = None,
    trust_remote_code: bool = False,
) -> PruneReport:
    """Prune a dense checkpoint into a packed one, without ever holding the model.

    Blocks are loaded one at a time, pruned as [`EGGSPruner.prune`][optimum_eggs.EGGSPruner.prune] prunes them, and
    written, each to a file of its own, before the next one is loaded. `output` appears when all is there. A run that
    is cut goes on behind its last finished block when it is started again, and ends with the same weights, on the same
    machine and installation; until then the blocks are in a hidden folder beside `output` (in it, where it is an empty
    folder that is there already). A run of other options that was cut is not in the way: its blocks stay until a run
    ends.

    Memory: the largest block or what is outside the blocks (without a head that is not tied), whichever is more; the
    buffers of its largest layer, as `prune_model` says; and the windows' hidden states, unless they are on disk. While
    a rotation is chosen, what that is chosen by, of all blocks. While the model writes windows, what is outside the
    blocks, up to 1 GiB of blocks (on a GPU a quarter of what is free), and keys and values of 32 windows.

    Args:
        model: A dense model in safetensors files: a folder, or an id on the Hub.
        output: Folder to make.
        config: What to do, with `calibration`.
        dtype: Dtype to load and prune in. Default: the checkpoint's own.
        save_dtype: Dtype to save in. Default: as loaded.
        device: Where blocks are pruned. Default: an accelerator if there is one.
        memory_budget: The most bytes that the hidden states of a process may take in memory, a GPU's or the host's,
            such as `"8GiB"`; if they would take more, all of them are on disk. Default: no limit.
        max_shard_size: As for transformers; but blocks share a file only up to 256 MiB, so that joining them takes
            little memory.
        overwrite: Replace a model that this package saved at `output`, and what runs of other settings that were cut
            have left.
        progress: Show a progress bar on stderr; False for silence. Default: if it is a terminal.
        ranks: The processes that do it together, of `optimum_eggs.ranks.join_ranks()`. All of them call this with the
            same arguments, and must see the same files of `model` and beside `output`; the first of them writes.
        revision: Branch, tag or commit of a model on the Hub.
        token: For a model on the Hub that is private or gated; that of data sets is in `config`. Default: that of
            `hf auth login`, or HF_TOKEN.
        trust_remote_code: Run code that comes with the model or its tokenizer.

    Raises:
        EGGSError: bad input, or an output that may not be written, before the work begins, but for weights that are
            damaged, which are seen when their block is loaded; another process at work on the same output; a disk that
            is full.
        KeyboardInterrupt: with what is finished in its message.
    """
    from ..sharing import own_card, put_card, write_card

    with ranks.together():
        path = check_output(output, overwrite, sources=[model])
        own = own_card(path)
        target = parse_dtype(save_dtype)
        cast = target if isinstance(target, torch.dtype) else None
        budget = None if memory_budget is None else check.size("memory_budget", memory_budget, least=0)
        shard_size = check.size("max_shard_size", max_shard_size)
        trust: dict[str, Any] = {"trust_remote_code": trust_remote_code}
        check_calibration(config.calibration)
        source = DenseSource(model, dtype, device, config.block_list, revision=revision, token=token, **trust)
        tokenizer = config.tokenizer
        if tokenizer is None and has_tokenizer(source.folder):
            tokenizer = load_tokenizer(source.folder, **trust)
        config = with_seq_len(config, source.model)
        drawn = calibration_windows(config.calibration, tokenizer, config)
        windows = drawn.ids
        check_run(source.model, config, windows, ranks)
        plan = make_plan(source.model, config, loaded=False)

        described = _run(source, config, windows, ranks)
    run = _same_run(ranks.gather(described))

    remedy = "once it can be, the same command goes on behind the last finished block"
    with ExitStack() as stack:
        work: Path | None = None
        with ranks.together():
            if ranks.first:
                work = stack.enter_context(claimed(path))
            stack.enter_context(written(path, remedy))
        (work, *_) = ranks.gather(work)
        assert work is not None
        with ranks.together():
            if ranks.first:
                check_output(path, overwrite)  # another process may just have finished it
                stack.callback(_remove_without_blocks, run_folder(work, run))
                _clear(open_run(work, run, overwrite))
        with ranks.together():
            found = read_turn(run_folder(work, run)) if config.rotation else None
            journal = Journal(run_folder(work, run))
            if config.rotation and found is None:
                journal.forget()  # its blocks are in a basis that is not known any more
            keeper = _Keeper(journal, source, ranks, found)
            stream = _stream_bytes(source, plan, config, *windows.shape)
            on_disk = budget is not None and stream > budget * ranks.size
            if ranks.first:
                needs = _bytes_to_write(source, plan, config, len(keeper), cast) + (stream if on_disk else 0)
                check_output(path, overwrite, needs=needs)
        begun = ranks.gather(len(keeper))
        if len(set(begun)) > 1:
            raise OutputError(f"{work}: processes see {begun} finished blocks in it; use a disk that all of them share")
        try:
            with Meter([source.device]) as meter:
                keeper.meter, turn = meter, None
                windows = _with_generated(source, config, windows, meter, keeper, ranks, progress)
                states = (lambda size, device: StatesOnDisk(keeper.journal.folder)) if on_disk else states_in_memory
                if config.rotation:
                    turn = _turn(source, plan, config, windows, meter, states, keeper, ranks, progress)
                    source.turn = turn if isinstance(turn, Turn) else None
                done = prune_blocks(
                    source.model,
                    source,
                    plan,
                    config,
                    windows,
                    meter,
                    progress,
                    states,
                    keeper,
                    ranks,
                )
            coded = left_dense_codings(source.model, config)
            report = make_report(plan, config, windows, done, meter, coded, turn)
            report.measurements |= keeper.earlier | {"blocks_of_earlier_runs": begun[0], "processes": ranks.size}
            name_sources(report, config.calibration, drawn, source.model)
            with ranks.together():  # and the others end when the output is there
                if ranks.first:
                    made = keeper.journal.folder / _ASSEMBLED
                    made.mkdir()
                    _assemble(made, source, keeper.journal, report, coded, cast, shard_size)
                    if tokenizer is not None:
                        tokenizer.save_pretrained(made)
                    report.save(made / REPORT_NAME)
                    put_card(own, made)
                    write_card(made, path.name)
                    check_output(path, overwrite)  # something may have been put there meanwhile
                    put_in_place(made, path, work, clear=True)
        except KeyboardInterrupt as error:
            finished = f"{len(keeper)} of {len(source)} blocks are finished; the same command goes on behind them"
            raise KeyboardInterrupt(str(error) or finished) from None
    return report


def _with_generated(
    source: DenseSource,
    config: EGGSConfig,
    windows: Tensor,
    meter: Meter,
    keeper: _Keeper,
    ranks: Ranks,
    progress: bool | None,
) -> Tensor:
    """The windows, and those that the model writes: of an earlier run that was cut, or written now and kept."""
    if not config.generated_samples:
        return windows
    (made, *_) = ranks.gather(read_windows(keeper.journal.folder))
    if made is None:
        with evaluation_mode(source.model), meter.stage("generation"):
            count = config.generated_samples
            made = generated_windows(source.model, source, windows, count, config.seed, ranks, progress)
        with ranks.together():
            if ranks.first:
                write_windows(keeper.journal.folder, made)
    return torch.cat([windows, made])


def _turn(
    source: DenseSource,
    plan: PrunePlan,
    config: EGGSConfig,
    windows: Tensor,
    meter: Meter,
    states: Callable[[int, torch.device], MutableSequence[Tensor]],
    keeper: _Keeper,
    ranks: Ranks,
    progress: bool | None,
) -> Turn | str:
    """As of `choose_turn`: of an earlier run that was cut; without one, it is chosen, and kept."""
    (turn, *_) = ranks.gather(keeper.turn)
    if turn is None:
        with evaluation_mode(source.model):
            turn = choose_turn(source.model, source, plan, config, windows, meter, states, ranks, progress)
        with ranks.together():
            if ranks.first:
                write_turn(keeper.journal.folder, turn)
    return turn


class _Keeper:
    """Writes finished blocks to files of their own, and reads them back."""

    def __init__(self, journal: Journal, source: DenseSource, ranks: Ranks, turn: Turn | str | None) -> None:
        self.journal, self.source, self.ranks, self.turn = journal, source, ranks, turn
        self.meter: Meter | None = None
        self.kept_by_first, self.seconds_before = 0, 0.0
        self.earlier = {
            "seconds_of_earlier_runs": sum(block.seconds for block in journal.finished),
            "peak_rss_of_earlier_runs": max((block.peak_rss for block in journal.finished), default=0),
        }

    def __len__(self) -> int:
        return len(self.journal.finished) + self.kept_by_first

    @property
    def results(self) -> list[BlockResult]:
        return [block.result for block in self.journal.finished]

    def keep(self, block: nn.Module, index: int, result: BlockResult) -> None:
        with self.ranks.together():
            if self.ranks.first:
                self._write(block, index, result)
            else:
                self.kept_by_first += 1

    def _write(self, block: nn.Module, index: int, result: BlockResult) -> None:
        prefix = f"{self.source.block_list.block_name(index)}."
        tensors = {f"{prefix}{name}": value.detach().contiguous() for name, value in block.state_dict().items()}
        name = f"block-{index:05d}.safetensors"
        begun = self.journal.folder / f"{name}.partial"
        save_file(tensors, begun, metadata={"format": "pt"})
        begun.replace(self.journal.folder / name)
        assert self.meter is not None
        seconds, peak_rss = self.meter.so_far()
        self.journal.add(name, result, seconds - self.seconds_before, peak_rss)
        self.seconds_before = seconds

    @torch.no_grad()
    def restore(self, block: nn.Module, index: int) -> None:
        finished, prefix = self.journal.finished[index], f"{self.source.block_list.block_name(index)}."
        stored = load_file(self.journal.folder / finished.file)
        for layer in finished.result.layers:
            name, pattern = layer.name, NMPattern.parse(layer.pattern)
            weight = dense_weight(block.get_submodule(name.removeprefix(prefix)))
            values, meta = stored.pop(f"{name}.weight"), stored.pop(f"{name}.weight_meta")
            if layer.coding is not None:
                coding, width = Coding.parse(layer.coding), packed_width(layer.in_features, pattern)
                scale = stored.pop(f"{name}.weight_scale")
                values = decode(values, scale, width, coding, coding.per_scale(pattern), weight.dtype)
            weight.copy_(unpack(values, meta, pattern))
        own = block.state_dict()
        for name, value in stored.items():
            own[name.removeprefix(prefix)].copy_(value)


def _assemble(
    made: Path,
    source: DenseSource,
    journal: Journal,
    report: PruneReport,
    coded: Mapping[str, str],
    dtype: torch.dtype | None,
    max_shard_size: int,
) -> None:
    """Put the finished blocks, and what is outside them, together as a checkpoint of transformers.

    `coded`: what of what is left dense is stored in integers, and how.
    """
    shards = Shards(made, min(max_shard_size, JOINED))
    buffers = {name for name, _ in source.model.named_buffers()}

    def final(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        if dtype is None:
            return tensors
        cast = {
            key
            for key, value in tensors.items()
            if value.is_floating_point() and key not in buffers and not key.endswith(".weight_scale")
        }
        return {key: value.to(dtype) if key in cast else value for key, value in tensors.items()}

    for block in journal.finished:
        shards.add(final(code_tensors(load_file(journal.folder / block.file), coded, source.model)))
    for part in source.outside():
        shards.add(final(code_tensors(part, coded, source.model)))
    shards.close()

    attach_quantizer(source.model, EGGSConfig.from_dict(report.config), report)
    source.model.config.architectures = [type(source.model).__name__]
    source.model.config.dtype = dtype or source.dtype
    if source.model._auto_class is not None:  # as transformers saves code that came with the model
        custom_object_save(source.model, made, config=source.model.config)
    source.model.config.save_pretrained(made)
    if source.model.can_generate():
        source.model.generation_config.save_pretrained(made)


def _run(source: DenseSource, config: EGGSConfig, windows: Tensor, ranks: Ranks) -> dict[str, Any]:
    """What decides the bytes of a finished block."""
    files = {file.name: [file.stat().st_size, file.stat().st_mtime_ns, sample(file)] for file in source.files}
    text = (source.folder / "config.json").read_bytes()
    return {
        "model": files | {"config.json": hashlib.sha256(text).hexdigest()},
        "dtype": str(source.dtype),
        "device": source.device.type,
        "config": {key: value for key, value in config.to_dict().items() if key != "calibration"},
        "calibration": windows_digest(windows),
        "versions": {"optimum-eggs": __version__, "torch": torch.__version__},
        "processes": ranks.size,
    }


def _same_run(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """That of the first process, if all agree. When files were written may differ from machine to machine."""
    first, *others = [
        run | {"model": {name: what[::2] if isinstance(what, list) else what for name, what in run["model"].items()}}
        for run in runs
    ]
    for rank, other in enumerate(others, 1):
        differing = [key for key in first if first[key] != other.get(key)]
        if differing:
            raise ConfigError(
                f"{differing[0]} is not the same in process {rank} as in process 0; give all of them the same command, "
                "model and texts"
            )
    return runs[0]


def _stream_bytes(source: DenseSource, plan: PrunePlan, config: EGGSConfig, windows: int, seq_len: int) -> int:
    """Bytes of the hidden states that a walk holds at the most, on so many windows, and those that are made besides."""
    blocks = enumerate(zip(plan.block_list.blocks, plan.layers, strict=True))
    kept = max(kept_parts(block, f"{plan.block_list.block_name(at)}.", layers) for at, (block, layers) in blocks)
    copies = lists_held(kept, config)
    hidden = source.model.config.get_text_config().hidden_size
    of_batch = config.batch_size * seq_len * hidden * source.dtype.itemsize
    if source.device.type == "cuda":  # what torch pins on the host, it rounds up to a power of two
        of_batch = 1 << (of_batch - 1).bit_length()
    count = windows + config.generated_samples
    together, _ = short_batch(config.batch_size, seq_len)
    short = short_count(count, seq_len, config.batch_size, config.short_share)
    batches = -(-count // config.batch_size) + -(-short // together)
    return copies * batches * of_batch


def _bytes_to_write(
    source: DenseSource, plan: PrunePlan, config: EGGSConfig, finished: int, dtype: torch.dtype | None
) -> int:
    """Bytes of the blocks that are not finished, and of the output, which lie beside each other at the end."""
    pattern, kept, total = config.pattern, 0, 0
    planned = [{f"{name}.weight" for name in layers} for layers in plan.layers]
    size = dtype.itemsize if dtype is not None else source.dtype.itemsize
    tied = source.model.all_tied_weights_keys
    of_code = None if config.values is None else Coding(config.values).bits / 8
    for name, value in source.model.state_dict().items():
        if name in tied:
            continue
        block = source.block_of(name)
        packed = block is not None and name in planned[block]
        values = value.numel() * pattern.n // pattern.m if packed else value.numel()
        bits = value.numel() // 8 if packed else 0
        element, final = value.element_size(), size if value.is_floating_point() else value.element_size()
        if packed and of_code is not None:
            bits += 2 * values // 32  # scales, of 32 values at the least
            element = final = of_code
        total += int(values * final) + bits
        if block is not None and block >= finished:
            kept += int(values * element) + bits
    return kept + total


def _remove_without_blocks(folder: Path) -> None:
    kept = (folder / JOURNAL_NAME).is_file() or read_turn(folder) is not None or read_windows(folder) is not None
    if not kept:
        shutil.rmtree(folder, ignore_errors=True)


def _clear(folder: Path) -> None:
    """Remove what a run that was killed has left and cannot be used."""
    for left in (folder / _ASSEMBLED, *folder.glob("states-*")):
        shutil.rmtree(left, ignore_errors=True)
