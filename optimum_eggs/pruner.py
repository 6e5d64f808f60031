"""`EGGSPruner`: load, prune, save, the Optimum way."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from optimum.quantization_base import OptimumQuantizer

from . import validation as check
from .config import EGGSConfig
from .engine import PruneReport, calibrate_and_prune, pack_model
from .errors import ConfigError, ModelError, with_article
from .files import REPORT_NAME
from .folders import new_folder
from .hf.attach import attach_quantizer, cast_parameters
from .hf.loading import hub_options, load_config, load_model, load_tokenizer, own_memory, parse_dtype
from .names import hub_id
from .pattern import NMPattern

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class EGGSPruner(OptimumQuantizer):
    """Prunes a transformers model to N:M and saves it packed.

    Args:
        model: A dense model in memory. It is pruned in place.
        tokenizer: Its tokenizer; not needed if the calibration data are token ids.

    Attributes:
        model, tokenizer: As given.
        report: The report of the last pruning, or None.

    Example:
        ```python
        pruner = EGGSPruner.from_pretrained("HuggingFaceTB/SmolLM2-135M")
        report = pruner.prune(EGGSConfig("2:4"), calibration="wiki.valid.raw")
        pruner.save_pretrained("smollm2-2-4")
        ```
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None = None) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.report: PruneReport | None = None
        self._broken = False

    @classmethod
    def from_pretrained(
        cls,
        model_or_path: PreTrainedModel | str | Path,
        tokenizer: PreTrainedTokenizerBase | None = None,
        *,
        gguf_file: str | None = None,
        dtype: str | torch.dtype | None = None,
        **kwargs: Any,
    ) -> EGGSPruner:
        """Load a dense model and its tokenizer.

        Args:
            model_or_path: A model, a folder, an id on the Hub, or the path of a GGUF file.
            tokenizer: In place of the model's own.
            gguf_file: Name of a GGUF file in the folder or repository.
            dtype: Dtype to load the weights in; default `"auto"`, the checkpoint's own.
            kwargs: Passed to transformers' `from_pretrained` (`revision`, `token`, `device_map`, …). Code that comes
                with the model or its tokenizer is run with `trust_remote_code=True` alone.

        Raises:
            ModelError: the model or its tokenizer cannot be found or loaded.
        """
        if not isinstance(model_or_path, str | Path):
            return cls(model_or_path, tokenizer)
        if hub_id(str(model_or_path)):  # one that is nowhere is missed as a model, and not as a tokenizer
            load_config(model_or_path, gguf_file=gguf_file, **hub_options(kwargs))
        if tokenizer is None:
            tokenizer = load_tokenizer(model_or_path, gguf_file=gguf_file, **hub_options(kwargs))
        model = load_model(model_or_path, gguf_file=gguf_file, dtype=dtype, **kwargs)
        own_memory(model)
        return cls(model, tokenizer)

    def prune(
        self, config: EGGSConfig | str | None = None, calibration: Any = None, *, progress: bool | None = None
    ) -> PruneReport:
        """Prune the model in place.

        Args:
            config: What to do; a pattern such as `"2:4"` stands for `EGGSConfig("2:4")`, which is the default.
            calibration: Calibration data, in place of `config.calibration`; the same kinds are known.
            progress: Show a progress bar on stderr; False for silence. Default: if it is a terminal.

        Returns:
            The report, which is also kept as `report` and saved with the model.

        Raises:
            EGGSError: bad input. Before the work begins the model is untouched; if it fails within (an activation
                that is NaN, an interrupt), the model is half pruned and will not be saved.
        """
        if self._broken:
            raise ModelError("the last prune() did not finish, so the model is half pruned; load it again")
        if config is None or isinstance(config, str):
            config = EGGSConfig(config)
        if not isinstance(config, EGGSConfig):
            raise ConfigError(
                f"config={config!r} is {with_article(type(config).__name__)}; pass an EGGSConfig or a pattern"
            )
        untouched = _weight_versions(self.model)
        try:
            report = calibrate_and_prune(self.model, config.tokenizer or self.tokenizer, config, calibration, progress)
        except BaseException:
            self._broken = _weight_versions(self.model) != untouched
            raise
        attach_quantizer(self.model, EGGSConfig.from_dict(report.config), report)
        self.report = report
        return report

    quantize = prune

    def pack(
        self,
        pattern: str | NMPattern | None = None,
        *,
        targets: Sequence[str] | None = None,
        ignore: Sequence[str] | None = ("lm_head",),
        block_list: str | None = None,
        progress: bool | None = None,
    ) -> PruneReport:
        """Pack the model in place as it is, where its weights are N:M already: no value changes.

        For a dense model whose zeros another method has put there: Wanda, SparseGPT, Model Optimizer, llm-compressor,
        or a training of your own. No calibration text is needed.

        Args:
            pattern: What to pack; the layers that do not follow it stay dense. Default: in each layer the tightest of
                the usual patterns that it follows. A group may have fewer than n nonzeros.
            targets: Name patterns of the layers to look at. Default: all in the blocks.
            ignore: Name patterns of layers to leave dense.
            block_list: Name of the list of blocks (`"model.layers"`), if it cannot be found by structure.
            progress: Show a progress bar on stderr; False for silence. Default: if it is a terminal.

        Returns:
            The report, which is also kept as `report` and saved with the model. What only a pruning knows is None.

        Raises:
            EGGSError: no layer is N:M, or bad input; the model is untouched.
        """
        if self._broken:
            raise ModelError("the last prune() did not finish, so the model is half pruned; load it again")
        chosen = None if pattern is None else NMPattern.parse(pattern)
        report = pack_model(
            self.model, chosen, targets=targets, ignore=ignore, block_list=block_list, progress=progress
        )
        attach_quantizer(self.model, EGGSConfig.from_dict(report.config), report)
        self.report = report
        return report

    def save_pretrained(
        self,
        save_directory: str | Path,
        *,
        overwrite: bool = False,
        dtype: str | torch.dtype | None = None,
        max_shard_size: int | str = "50GB",
    ) -> None:
        """Save the packed model, its config, its tokenizer, `report.json` and a model card (README.md) made of it.

        The folder appears when it is complete; nothing is left behind otherwise.

        Args:
            save_directory: Folder to make, or an empty one to fill.
            overwrite: Replace what this package saved there. Text of your own in its README.md stays.
            dtype: Cast the model to this dtype first. Default: as it is.
            max_shard_size: Bytes of the largest weight file, or such as `"5GB"` or `"4GiB"`.

        Raises:
            ConfigError: `dtype` is unknown, or `max_shard_size` no size.
            ModelError: the model is not pruned, or the last `prune` did not finish.
            OutputError: the folder may not be replaced, or cannot be written: before anything is.
        """
        from .sharing import own_card, put_card, write_card

        if self._broken:
            raise ModelError("the last prune() did not finish, so the model is half pruned; load it again")
        if self.report is None:
            raise ModelError("the model is not pruned yet; call prune() first, or pack() if it has its zeros already")
        shard_size = check.size("max_shard_size", max_shard_size)
        target = parse_dtype(dtype)
        cast = target if isinstance(target, torch.dtype) else None
        tensors = {id(value): value for value in self.model.state_dict(keep_vars=True).values()}.values()
        needs = sum(
            value.numel() * (cast.itemsize if cast and value.is_floating_point() else value.element_size())
            for value in tensors
        )
        read = getattr(self.model.config, "_name_or_path", None)
        path = Path(save_directory).resolve()
        own = own_card(path)
        with new_folder(save_directory, overwrite, sources=[read], needs=needs) as folder:
            if cast is not None:
                cast_parameters(self.model, cast)
            self.model.save_pretrained(folder, max_shard_size=shard_size)
            if self.tokenizer is not None:
                self.tokenizer.save_pretrained(folder)
            self.report.save(folder / REPORT_NAME)
            put_card(own, folder)
            write_card(folder, path.name)

    def push_to_hub(
        self: EGGSPruner | str | Path, repo_id: str, *, max_shard_size: int | str = "50GB", **options: Any
    ) -> str:
        """Push the packed model, its tokenizer, its report and its card to the Hub, in one commit.

        Called on the class, it pushes a model that is saved: `EGGSPruner.push_to_hub("out", "me/model-2-4")`.

        Args:
            repo_id: Where to; it is created if it is not there.
            max_shard_size: As for [`save_pretrained`]. The files of a folder are pushed as they are.
            options: `private`, `token`, `revision`, `create_pr`, `commit_message`, `commit_description` and `tags`, as
                for transformers.

        Returns:
            The address of the commit, or of the pull request.

        Raises:
            ConfigError: `repo_id` is no name of a repository.
            ModelError: as [`save_pretrained`].
            HubError: the Hub refused, or could not be reached; nothing was published.
        """
        from .sharing import push_folder, save_and_push

        if isinstance(self, str | Path):
            info = push_folder(self, repo_id, **options)
            return info.pr_url or info.commit_url
        return save_and_push(partial(self.save_pretrained, max_shard_size=max_shard_size), repo_id, **options)


def _weight_versions(model: torch.nn.Module) -> list[tuple[int, int]]:
    """Changes when a weight is written in place or a layer replaced."""
    return [(id(parameter), parameter._version) for parameter in model.parameters()]
