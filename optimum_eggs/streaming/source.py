"""A dense checkpoint on disk, of which one block at a time is in memory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedModel
from transformers.utils import logging

from ..calibration import BlockList, find_block_list
from ..calibration.context import text_inputs
from ..config import QUANT_METHOD
from ..devices import choose_device
from ..engine.inputs import wave_bytes
from ..engine.rotate import Turn
from ..errors import CheckpointError, ModelError, NumericalError
from ..hf.loading import model_class, parse_dtype, translated
from ..names import hub_id
from ..nn.experts import SplitExperts, keep_names
from ..packing.checkpoint import read_headers, weight_files
from .fetch import fetch
from .internals import conversions_of, fill_buffers, load_keys, name_of, one_key_fills_several
from .stored import DTYPES, stored_tensors


class DenseSource:
    """A dense checkpoint as an empty model, of which blocks are loaded and let go: a provider of blocks for a walk.

    Weights are read as transformers' `from_pretrained` reads them, with the same names, conversions and dtypes, only
    later. Buffers that are not stored, such as rotary tables, are there all the time.

    Args:
        model: Folder, or id on the Hub, of a model in safetensors files.
        dtype: Dtype to load in; default: the checkpoint's own.
        device: Where to, as of [`choose_device`][optimum_eggs.devices.choose_device].
        block_list: Dotted name of the list of blocks, if it is known.
        revision: Branch, tag or commit on the Hub.
        token: For a model on the Hub that is private or gated.
        trust_remote_code: Run code that comes with the model.

    Attributes:
        model: The model; its weights are on the meta device, but for what is loaded at the moment.
        block_list: Its blocks.
        turn: The rotation that its weights are turned by as they are loaded, if there is one.

    Raises:
        ModelError: there is no such model, or it cannot be built.
        CheckpointError: a file is damaged, or a weight is missing.
        NumericalError: once it is loaded: a weight is NaN or infinite.
    """

    def __init__(
        self,
        model: str | Path,
        dtype: str | torch.dtype | None = None,
        device: str | torch.device = "auto",
        block_list: str | None = None,
        *,
        revision: str | None = None,
        token: str | bool | None = None,
        trust_remote_code: bool = False,
    ) -> None:
        self.folder, self.device = fetch(model, revision, token), choose_device(device)
        folder = self.folder
        self.files = weight_files(folder)
        entries = read_headers(self.files)
        with translated(str(folder), "model"):
            config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
            self.dtype = _settled_dtype(parse_dtype(dtype), config, [entry.dtype for entry in entries.values()])
            with torch.device("meta"):
                self.model: Any = _empty_model(config, self.dtype, trust_remote_code)
            if (self.folder / "generation_config.json").is_file():
                self.model.generation_config = GenerationConfig.from_pretrained(folder)
        quantized = getattr(config, "quantization_config", None)
        if quantized is not None:
            method = quantized.get("quant_method") if isinstance(quantized, dict) else quantized.quant_method
            how = "packed" if method == QUANT_METHOD else f"quantized ({method})"
            raise ModelError(f"{folder}: is {how} already; start from the dense model")
        self.model.config.name_or_path = str(model)
        if hub_id(str(model)):
            self.model.config._commit_hash = folder.name  # as the cache names its folders
        self.model.eval()
        self.turn: Turn | None = None
        self._found_finite: set[int | None] = set()
        self._conversions = conversions_of(self.model)
        fill_buffers(self.model, self.device)
        self.block_list: BlockList = find_block_list(self.model, block_list)
        self._keys = self._by_block({key: entry.file for key, entry in entries.items()})

    def __len__(self) -> int:
        return len(self.block_list.blocks)

    def block_of(self, name: str) -> int | None:
        """The block that a weight is in, by its name in the model; None for one outside of all."""
        prefix = f"{self.block_list.name}."
        block = name.removeprefix(prefix).split(".")[0]
        inside = name.startswith(prefix) and block.isdecimal() and int(block) < len(self)
        return int(block) if inside else None

    def skeleton(self, index: int) -> nn.Module:
        """Block `index`, mostly without weights."""
        return self.block_list.blocks[index]

    def materialise(self, index: int) -> nn.Module:
        """Block `index` with its weights."""
        self._load(index)
        block = self.block_list.blocks[index]
        if self.turn is not None:
            self.turn.fold_block(block, index)
        return block

    def release(self, index: int) -> None:
        """Let the weights of block `index` go. Buffers that no file holds stay."""
        for module in self.block_list.blocks[index].modules():
            stored = {name for name, _ in module.named_buffers(recurse=False)} - module._non_persistent_buffers_set
            for name, value in module.named_parameters(recurse=False):
                setattr(module, name, nn.Parameter(value.to("meta"), requires_grad=value.requires_grad))
            for name in stored:
                module.register_buffer(name, module.get_buffer(name).to("meta"))

    def run(self, window: Tensor) -> None:
        """Run the model on windows (batch, tokens), which must end in a block.

        What is outside the blocks is loaded where it is not yet; the head only to find that it is whole.
        """
        head = self._of_the_head()
        before = {name: value for name, value in self._outside().items() if name not in head}
        if any(value.is_meta for value in before.values()):
            if head:
                self._load(None, head)
                self.entered()
            self._load(None, set(before))
            self._turn_entry()
        self.model(**text_inputs(self.model, window.to(self.device)))

    def generate(self, prompts: Tensor, **options: Any) -> Tensor:
        """What transformers' `generate` makes of prompts (batch, tokens), with the model as it is in its files.

        The first blocks stay in memory meanwhile, as many as take no more than a wave of experts may; each of the rest
        is loaded for every token anew.
        """
        assert self.turn is None
        ids = prompts.to(self.device)
        handles = []
        left = wave_bytes(self.device)
        for index, block in enumerate(self.block_list.blocks):
            left -= sum(parameter.nbytes for parameter in block.parameters())
            handles.append(block.register_forward_pre_hook(lambda *_, index=index: self._load_once(index)))
            if left < 0:
                handles.append(block.register_forward_hook(lambda *_, index=index: self.release(index)))
        try:
            self._load(None)
            return self.model.generate(ids, attention_mask=torch.ones_like(ids), **options)
        finally:
            for handle in handles:
                handle.remove()
            for index in range(len(self)):  # one that was interrupted
                self.release(index)
            self.entered()

    def entered(self) -> None:
        """Let the weights outside the blocks go."""
        blocks = {id(module) for block in self.block_list.blocks for module in block.modules()}
        for module in self.model.modules():
            if id(module) not in blocks:
                for name, value in module.named_parameters(recurse=False):
                    setattr(module, name, nn.Parameter(value.to("meta"), requires_grad=value.requires_grad))
        self.model.tie_weights()

    def outside(self) -> Iterator[dict[str, Tensor]]:
        """Load what is outside the blocks, tied ones once, one weight at a time where it can be: name -> weight."""
        names = list(self._outside())
        together = one_key_fills_several(self._conversions)
        for part in [set(names)] if together else [{name} for name in names]:
            self._load(None, part)
            found = {name: value for name, value in self._outside().items() if name in part}
            turn = self.turn
            yield found if turn is None else {name: turn.outside_weight(name, value) for name, value in found.items()}
            self.entered()

    def _turn_entry(self) -> None:
        """Turn the embeddings that are loaded; nothing else outside the blocks runs before them."""
        if self.turn is not None:
            name = f"{self.turn.outside.embedding}.weight"
            weight = self._outside()[name]
            weight.data = self.turn.outside_weight(name, weight.detach())

    def _outside(self) -> dict[str, Tensor]:
        prefix, tied = f"{self.block_list.name}.", self.model.all_tied_weights_keys
        return {
            name: value
            for name, value in self.model.state_dict(keep_vars=True).items()
            if not name.startswith(prefix) and name not in tied
        }

    def _of_the_head(self) -> set[str]:
        """The weights of the head, but for what is tied."""
        head = self.model.get_output_embeddings()
        paths = [path for path, module in self.model.named_modules() if module is head]
        outside = self._outside()
        return {f"{path}.{name}" for path in paths for name in head.state_dict() if f"{path}.{name}" in outside}

    def _inside(self, index: int) -> dict[str, Tensor]:
        prefix = f"{self.block_list.block_name(index)}."
        return self.block_list.blocks[index].state_dict(prefix=prefix, keep_vars=True)

    def _load_once(self, index: int) -> None:
        """Load block `index`, if it is not loaded."""
        if any(parameter.is_meta for parameter in self.block_list.blocks[index].parameters()):
            self._load(index)

    def _load(self, index: int | None, only: set[str] | None = None) -> None:
        """Load block `index`, or what is outside the blocks, into the model, in memory of its own; or `only` these."""
        keys = {key: file for key, file in self._keys[index].items() if only is None or self._names[key] in only}
        try:
            with _no_progress_bar(), self._fused():
                slices: dict[str, Any] = {}
                for file in sorted(set(keys.values())):
                    slices |= stored_tensors(file, [key for key in keys if keys[key] == file])
                bad = load_keys(self.model, slices, self._conversions, self.dtype, self.device)
                if bad:
                    raise CheckpointError(f"{self.folder}: {bad[0]} does not fit the model; download it again")
                loaded = self._outside() if index is None else self._inside(index)
                loaded = {name: value for name, value in loaded.items() if only is None or name in only}
                for name, value in loaded.items():
                    if value.is_meta:
                        raise CheckpointError(f"{self.folder}: {name} is missing; download the model again")
                    if value.untyped_storage().nbytes() > value.nbytes:
                        value.data = value.data.clone()  # a part of what was stored
                if only is not None or index not in self._found_finite:
                    _check_finite(loaded)
                    self._found_finite |= {index} if only is None else set()
        except OSError as error:
            raise CheckpointError(
                f"{self.folder}: a weight file is damaged or cannot be read ({error}); download it again"
            ) from error
        if index is None:
            self.model.tie_weights()

    @contextmanager
    def _fused(self) -> Iterator[None]:
        """Experts that are split, as the one module that a checkpoint is loaded into."""
        split = {name: module for name, module in self.model.named_modules() if isinstance(module, SplitExperts)}
        for name, module in split.items():
            self.model.set_submodule(name, module.hollow())
        try:
            yield
        finally:
            for name, module in split.items():
                fused = self.model.get_submodule(name)
                if not any(value.is_meta for value in fused.parameters()):
                    module.take(fused)
                self.model.set_submodule(name, module)
            if split:
                keep_names(self.model)

    def _by_block(self, files: dict[str, Path]) -> dict[int | None, dict[str, Path]]:
        """The checkpoint's keys and their files, by the block that they go to; None: outside of all."""
        known = self.model.state_dict()
        found: dict[int | None, dict[str, Path]] = {index: {} for index in (None, *range(len(self)))}
        self._names = {key: name_of(key, self.model, self._conversions, known) for key in files}
        for key, name in self._names.items():
            found[self.block_of(name)][key] = files[key]
        missing = sorted(known.keys() - set(self._names.values()) - self.model.all_tied_weights_keys.keys())
        if missing and not one_key_fills_several(self._conversions):  # else `_load` sees to it
            raise CheckpointError(f"{self.folder}: {missing[0]} is missing; download the model again")
        return found


def _check_finite(weights: Mapping[str, Tensor]) -> None:
    """Raise unless all weights, by name, are finite. A GPU is waited for once.

    Raises:
        NumericalError: one is not.
    """
    floating = [name for name, value in weights.items() if value.is_floating_point() and value.numel()]
    # NaN goes through aminmax, which takes no memory; isfinite takes more than the largest tensor.
    ends = [torch.stack(torch.aminmax(weights[name].detach())) for name in floating]
    finite = torch.stack([torch.isfinite(pair).all() for pair in ends]).tolist() if ends else []
    bad = next((name for name, fine in zip(floating, finite, strict=True) if not fine), None)
    if bad is not None:
        raise NumericalError(f"{bad}: the weight holds NaN or infinite values; the checkpoint may be damaged")


@contextmanager
def _no_progress_bar() -> Iterator[None]:
    """Keep transformers from showing a bar for every block."""
    if not logging.is_progress_bar_enabled():
        yield
        return
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.enable_progress_bar()


def _settled_dtype(dtype: str | torch.dtype, config: Any, stored: list[str]) -> torch.dtype:
    if isinstance(dtype, torch.dtype):
        return dtype
    named = config.dtype
    if isinstance(named, torch.dtype):
        return named
    return next((DTYPES[name] for name in stored if name in ("F64", "F32", "F16", "BF16")), torch.float32)


def _empty_model(config: Any, dtype: torch.dtype, trust_remote_code: bool) -> PreTrainedModel:
    kind = model_class(config, trust_remote_code)
    if kind is None:
        return AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=trust_remote_code)
    return kind._from_config(config, dtype=dtype)
