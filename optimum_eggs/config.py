"""`EGGSConfig`: everything that decides how a model is pruned."""

from __future__ import annotations

import copy
import difflib
import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers.utils.quantization_config import QuantizationConfigMixin

from . import validation as check
from .dtypes import BITS, GROUP
from .errors import ConfigError
from .importance import IMPORTANCE, unknown_importance
from .packing import FLOAT_VERSION, FORMAT_VERSION
from .packing.codes import Coding
from .pattern import NMPattern
from .presets import METHOD, NUM_SAMPLES, PRESETS, preset

QUANT_METHOD = "eggs"
SOLVERS = ("score", "admm", "sparsegpt")
SELECTIONS = ("optimal", "diagonal", "none")
UPDATES = ("refit", "none")
SAMPLINGS = ("random", "sequential")
ROUNDINGS = ("gptq", "nearest")
DENSE_BITS = ("int8",)
RETIRED = ("allocation", "descent_sweeps", "floor_tolerance", "tuning_target")
"""Keys of earlier releases, that packed models may hold; no measurement supported what they did."""


class _NotInherited:
    """Takes the place of an inherited attribute that a class is not to have."""

    def __get__(self, instance: object, owner: type) -> Any:
        raise AttributeError


class EGGSConfig(QuantizationConfigMixin):
    """How to prune a model to N:M sparsity.

    Args:
        pattern: `"n:m"`, n the number **kept** of every m inputs; or pass `n` and `m`. Default `"2:4"`.
        preset: A name that stands for the values of the method: `"fast"` (the default), `"best"`, `"paper"`, and the
            baselines `"alps"`, `"sparsegpt"`, `"ria"`, `"wanda"`, `"magnitude"`. What is passed besides it wins. `None`
            once the values are not those of a preset.
        solver: How a layer's mask is found: `"score"` (by importance), `"admm"` (together with the values) or
            `"sparsegpt"` (from left to right, with the published updates).
        importance: The score of a weight: `"ria"`, `"wanda"`, `"magnitude"`, or one that you made known with
            `register_importance`. For `solver="score"` and `permutation`.
        exponent: RIA's power of the input's norm.
        selection: How the floor on the inputs' degrees is kept: `"optimal"` (the best mask there is under the floor),
            `"diagonal"` (whole wrapped diagonals of m x m tiles, as published) or `"none"`.
        min_degree: The floor: outputs that every input keeps in every `band` rows. 0 without a floor.
        band: Rows over which the floor holds. Default: 16, or four times the rows that the floor needs at least if
            that is more; m for `"diagonal"`, which knows no other.
        swaps: Rounds of swaps that improve the mask for weights that stay as they are. For `solver="score"`.
        weight_update: What becomes of the weights that stay: `"refit"` (masked least squares) or `"none"` (as the
            solver leaves them; a score leaves them as they were).
        refit_steps: Conjugate gradient steps of the refit.
        damping: Ridge of every solver, relative to the mean diagonal of the Gram matrix.
        permutation: Reorder channels before they are cut into groups, where the order folds into the layer before.
        rotation: Turn the residual stream, and each value head, into the basis in which a mask loses least, before
            pruning; the rotation folds into the weights. Of models whose norms are RMS norms in front of the layers:
            True refuses others, `"auto"` leaves them as they are.
        error_correction: How far, from 0 to 1, each layer makes up for what pruning the layers before it has done to
            its inputs: what it is to come near to is that share of the way from what it gives on them to what the dense
            model's gives.
        block_tuning: Adam steps on each block once it is pruned, on the weights kept, the biases beside them and the
            norms, so that its output comes near the dense model's; each on `batch_size` windows. 0 for none.
        tuning_lr: Peak learning rate of block tuning, as a share of the root mean square of what is not zero in each
            tensor.
        values: How the values that stay are stored: `"int8"` or `"int4"`, integers with a scale for every
            `value_group` inputs of a row; or None, as floats. A layer with an odd number of values in a row has
            `"int8"` in place of `"int4"`.
        value_group: Inputs that share a scale, a multiple of 64 up to 65536. Default: 128.
        rounding: How values become integers: `"nearest"` (each to the nearest) or `"gptq"` (the error of each is passed
            on to those after it, on the calibration inputs). Default: `"nearest"` for `"int8"`, `"gptq"` for `"int4"`.
        rounding_tuning: As `block_tuning`, once the values are rounded, with the rounding in the loop. Default: half of
            `block_tuning` for `"int4"`, else 0.
        head: `"int8"` to store the input embeddings and the output head so too, tied or not; or None, as floats.
        ignored: `"int8"` to store linear layers of the blocks that `ignore` or `targets` leave dense so too, or None.
        calibration: A text file, the name of a data set, a list of texts, token ids, a `datasets.Dataset` of texts or
            of token ids, or a mapping of files and names to the share of the windows that each gives. A data set is
            named `"wikitext2"`, `"c4"`, or by any id on the Hub, with its configuration and revision behind it if need
            be: `"Salesforce/wikitext:wikitext-2-raw-v1@main"`. `"sample"` is a text of mixed kinds that is shipped with
            this package, for a first try; a file of that name is written `"./sample"`. Data itself is never stored in
            the configuration.
        split: Of a data set. Default: `"train"`.
        text_column: Where to find the text in a data set. Default: `"input_ids"` where there is such a column, else
            `"text"`.
        dataset_config_name: Configuration of a data set from the Hub whose name in `calibration` says none.
        dataset_revision: Branch, tag or commit, likewise.
        num_samples: Number of calibration windows. They overlap, with a warning, where the text has fewer tokens than
            all of them together; with less than an eighth of those it is refused.
        seq_len: Tokens in each. Default: 512, or the model's context where that is shorter.
        generated_samples: Windows that the dense model writes besides, for use on texts of other kinds than calibrate:
            half of them behind 32 tokens from random places in the windows of the text, half behind one. Default: 0.
        short_share: Tokens in short windows, of 8 tokens each, that are cut from the others at random places and
            calibrate besides, as a share of the others' tokens: a text's first tokens settle where attention rests, and
            a window shows those of one text alone. Default: 0.125 with `block_tuning` or `rounding_tuning`, which else
            unlearn what they are not shown, and 0 without.
        sampling: `"random"` windows, or `"sequential"`: the first ones, end to end.
        seed: Seed of everything random.
        batch_size: Windows run through a block at a time, and in a step of tuning. Default: 4, and 1 with
            `block_tuning` or `rounding_tuning`, where many small steps take less time than few large ones for the same
            result.
        min_expert_tokens: Calibration tokens that an expert of a mixture must see; one that sees fewer is pruned by its
            weights alone.
        targets: Name patterns of the linear layers to prune. Default: all within the blocks. Routers of experts, and
            gates (layers of fewer than 16 outputs), are pruned only where a pattern ends in their own name.
        ignore: Name patterns of layers to leave dense. Default: `["lm_head"]`. A pattern is a shell-style glob on the
            dotted name; it may leave out leading and trailing parts (`"down_proj"`, `"layers.0"`, `"*.mlp.*"`).
        block_list: Name of the list of blocks (`"model.layers"`), if it cannot be found by structure; of an
            encoder-decoder, that of the half to prune (`"encoder.block"`, `"model.decoder.layers"`). Its decoder is
            calibrated on the text that the encoder reads.
        tokenizer: Tokenizer for the calibration text when pruning on load; by default the model's own. Not stored.
        token: For data sets on the Hub that are private or gated and, when pruning on load, for the tokenizer. Default:
            that of `hf auth login`, or HF_TOKEN. Never stored.
        pruned_modules: The layers pruned: name -> `"n:m"`. Written by the pruner; it is what a loader goes by.
        coded_modules: The modules whose values are integers: name -> their kind and group, such as `"int8:128"`.
            Written as `pruned_modules` is.
        matrix_norms: Norms whose gains are a matrix, as `rotation` leaves the last one where the head shares the
            embeddings' weight. Written as `pruned_modules` is.
        format_version: Version of the packed format: 2 where anything is stored in integers, else 1.

    Raises:
        ConfigError: an unknown key, or a value out of its range.

    >>> config = EGGSConfig("2:4", num_samples=32, seq_len=512)
    >>> config.preset, config.selection, config.band
    ('fast', 'optimal', 16)
    >>> EGGSConfig.from_dict(config.to_dict()) == config
    True
    """

    # transformers' class is a dataclass of one field: `dataclasses.replace` would drop all other values without a word.
    __dataclass_fields__ = _NotInherited()

    def __init__(
        self,
        pattern: str | NMPattern | None = None,
        *,
        n: int | None = None,
        m: int | None = None,
        preset: str | None = None,
        solver: str | None = None,
        importance: str | None = None,
        exponent: float | None = None,
        selection: str | None = None,
        min_degree: int | None = None,
        band: int | None = None,
        swaps: int | None = None,
        weight_update: str | None = None,
        refit_steps: int | None = None,
        damping: float | None = None,
        permutation: bool | None = None,
        rotation: bool | str | None = None,
        error_correction: float | None = None,
        block_tuning: int | None = None,
        tuning_lr: float | None = None,
        values: str | None = None,
        value_group: int | None = None,
        rounding: str | None = None,
        rounding_tuning: int | None = None,
        head: str | None = None,
        ignored: str | None = None,
        calibration: Any = None,
        split: str | None = None,
        text_column: str | None = None,
        dataset_config_name: str | None = None,
        dataset_revision: str | None = None,
        num_samples: int = NUM_SAMPLES,
        generated_samples: int = 0,
        seq_len: int | None = None,
        short_share: float | None = None,
        sampling: str = "random",
        seed: int = 0,
        batch_size: int | None = None,
        min_expert_tokens: int = 16,
        targets: Sequence[str] | None = None,
        ignore: Sequence[str] | None = ("lm_head",),
        block_list: str | None = None,
        tokenizer: Any = None,
        token: str | None = None,
        pruned_modules: Mapping[str, str] | None = None,
        coded_modules: Mapping[str, str] | None = None,
        matrix_norms: Sequence[str] | None = None,
        format_version: int | None = None,
        quant_method: str = QUANT_METHOD,
        **unknown: Any,
    ) -> None:
        stored = pruned_modules is not None
        if stored:
            unknown = {key: value for key, value in unknown.items() if key not in RETIRED}
            min_degree = 0 if min_degree == "auto" else min_degree  # an earlier release chose it layer by layer
        _refuse_unknown(unknown)
        if quant_method != QUANT_METHOD:
            raise ConfigError(f"quant_method={quant_method!r} is not this package's; it must be {QUANT_METHOD!r}")
        self.quant_method = QUANT_METHOD  # type: ignore[assignment]
        chosen = _pattern(pattern, n, m)
        self.n, self.m = chosen.n, chosen.m

        given = {key: value for key, value in locals().items() if key in METHOD and value is not None}
        self._set_method(_preset_values(preset), given, band, chosen, stored)

        self._set_coding(values, value_group, rounding, rounding_tuning, head, ignored)
        self.coded_modules = check.modules("coded_modules", coded_modules, Coding.parse, "codings such as 'int8:128'")
        self.pruned_modules = check.modules("pruned_modules", pruned_modules, NMPattern.parse, "patterns such as '2:4'")
        self.matrix_norms = check.names("matrix_norms", matrix_norms)
        self.format_version = self._version(format_version)

        self.calibration = calibration
        self.split = check.text("split", split)
        self.text_column = check.text("text_column", text_column)
        self.dataset_config_name = check.text("dataset_config_name", dataset_config_name)
        self.dataset_revision = check.text("dataset_revision", dataset_revision)
        self.num_samples = check.integer("num_samples", num_samples, least=1)
        self.generated_samples = check.integer("generated_samples", generated_samples, least=0)
        self.seq_len = None if seq_len is None else check.integer("seq_len", seq_len, least=2)
        self.sampling = check.one_of("sampling", sampling, SAMPLINGS)
        self.seed = check.integer("seed", seed, least=0, most=check.TORCH_SEEDS)
        tuning = self.block_tuning or self.rounding_tuning
        share = _short_share(tuning) if short_share is None else short_share
        self.short_share = check.number("short_share", share, least=0, most=1)
        size = _batch_size(tuning) if batch_size is None else batch_size
        self.batch_size = check.integer("batch_size", size, least=1)
        self.min_expert_tokens = check.integer("min_expert_tokens", min_expert_tokens, least=0)

        self.targets = check.names("targets", targets)
        self.ignore = check.names("ignore", ignore) or []
        self.block_list = check.text("block_list", block_list)
        self.tokenizer = tokenizer
        self.token = token
        self.preset = self._matching_preset(preset)

    @property
    def pattern(self) -> NMPattern:
        """The pattern asked for, n kept of every m."""
        return NMPattern(self.n, self.m)

    @property
    def follows_dense(self) -> bool:
        """Whether the dense model's hidden states are taken along beside the pruned one's."""
        return bool(self.block_tuning or self.rounding_tuning or self.error_correction)

    def _set_method(
        self, base: Mapping[str, Any], given: Mapping[str, Any], band: int | None, pattern: NMPattern, stored: bool
    ) -> None:
        value = {**base, **given}
        self.solver = check.one_of("solver", value["solver"], SOLVERS)
        self.importance = _importance(value["importance"], stored)
        self.exponent = check.number("exponent", value["exponent"], least=0)
        self.selection = check.one_of("selection", value["selection"], SELECTIONS)
        self.min_degree = _min_degree(given.get("min_degree"), base["min_degree"], self.selection, pattern)
        self.band = _band(band, self.min_degree, self.selection, pattern)
        self.swaps = check.integer("swaps", value["swaps"], least=0)
        self.weight_update = check.one_of("weight_update", value["weight_update"], UPDATES)
        self.refit_steps = check.integer("refit_steps", value["refit_steps"], least=1)
        self.damping = check.number("damping", value["damping"], least=0)
        self.permutation = check.flag("permutation", value["permutation"])
        self.rotation = _rotation(value["rotation"])
        self.error_correction = check.number("error_correction", value["error_correction"], least=0, most=1)
        self.block_tuning = check.integer("block_tuning", value["block_tuning"], least=0)
        self.tuning_lr = check.number("tuning_lr", value["tuning_lr"], least=0)
        if not stored:
            _check_combination(self)

    def coding(self, kept: int) -> Coding:
        """The coding of the values of a layer that keeps so many in a row; `values` must not be None."""
        assert self.values is not None
        assert self.value_group is not None
        return Coding("int8" if kept % 2 else self.values, self.value_group)

    def dense_coding(self) -> Coding:
        """The coding of what is left dense; `head` or `ignored` must not be None."""
        kind = self.head or self.ignored
        assert kind is not None
        assert self.value_group is not None
        return Coding(kind, self.value_group)

    def _set_coding(
        self,
        values: str | None,
        group: int | None,
        rounding: str | None,
        tuning: int | None,
        head: str | None,
        ignored: str | None,
    ) -> None:
        self.values = None if values is None else check.one_of("values", values, BITS)
        self.head = None if head is None else check.one_of("head", head, DENSE_BITS)
        self.ignored = None if ignored is None else check.one_of("ignored", ignored, DENSE_BITS)
        if values is None:
            for name, value in {"rounding": rounding, "rounding_tuning": tuning}.items():
                if value:
                    raise ConfigError(f"{name}={value!r} without `values`: no value is rounded; add values='int8'")
            if group is not None and head is None and ignored is None:
                raise ConfigError(f"value_group={group!r} without `values`: there is no scale; add values='int8'")
        coded = values is not None or head is not None or ignored is not None
        self.value_group = Coding("int8", GROUP if group is None else group).group if coded else None
        self.rounding, self.rounding_tuning = None, 0
        if values is not None:
            by_default = "gptq" if values == "int4" else "nearest"
            self.rounding = by_default if rounding is None else check.one_of("rounding", rounding, ROUNDINGS)
            steps = _rounding_tuning(self.values, self.block_tuning) if tuning is None else tuning
            self.rounding_tuning = check.integer("rounding_tuning", steps, least=0)
            if self.rounding_tuning and not self.tuning_lr:
                raise ConfigError(f"tuning_lr={self.tuning_lr} with rounding_tuning={steps} would tune nothing")

    def list_modules(self, pruned: Mapping[str, str], coded: Mapping[str, str], norms: Sequence[str]) -> None:
        """Take what a model's modules are, in place, in the place of what was listed."""
        self.pruned_modules, self.coded_modules = dict(pruned), dict(coded) or None
        self.matrix_norms = list(norms) or None
        self.format_version = self._version(None)

    def _version(self, stored: int | None) -> int:
        """Of the format; `stored` must be it. Where it is listed what a model holds, that counts, and not the wish."""
        integers = self.coded_modules if self.pruned_modules is not None else self.values or self.head or self.ignored
        needed = FORMAT_VERSION if integers else FLOAT_VERSION
        if stored not in (None, FLOAT_VERSION, FORMAT_VERSION):
            raise ConfigError(
                f"format_version={stored!r} is unknown to this release, which reads versions up to {FORMAT_VERSION}; "
                "upgrade optimum-eggs, or prune the model again"
            )
        if stored not in (None, needed):
            raise ConfigError(
                f"format_version={stored!r} with values={self.values!r}, head={self.head!r} and "
                f"ignored={self.ignored!r}: what holds integers is of version {FORMAT_VERSION}, what does not of "
                f"{FLOAT_VERSION}; leave it out"
            )
        return needed

    def _matching_preset(self, asked: str | None) -> str | None:
        """The preset that stands for the values held, `asked` first."""
        names = list(PRESETS) if asked is None else [asked, *PRESETS]
        values = {field: getattr(self, field) for field in METHOD}
        for name in names:
            base = preset(name)
            band = _band(None, base["min_degree"], base["selection"], self.pattern)
            if base == values and band == self.band:
                return name
        return None

    def replace(self, **changes: Any) -> EGGSConfig:
        """A configuration with other values; `copy.replace` of Python 3.13 does the same.

        What follows from other values follows again: `min_degree`, `band`, `short_share`, `batch_size`, `value_group`,
        `rounding` and `rounding_tuning`, where they are what they would be by default, and `format_version`. A preset
        brings its own values for the whole method, `band` included.

        Args:
            changes: As for a new configuration.

        Raises:
            ConfigError: as for a new configuration.

        >>> config = EGGSConfig("4:8", preset="best", seed=3).replace(pattern="1:8", min_degree=2)
        >>> config.pattern, config.solver, config.seed, config.band
        (NMPattern(n=1, m=8), 'admm', 3, 64)
        >>> config.replace(preset="fast").solver
        'sparsegpt'
        """
        by_default = {
            "min_degree": _min_degree(None, _preset_values(self.preset)["min_degree"], self.selection, self.pattern),
            "band": _band(None, self.min_degree, self.selection, self.pattern),
            "short_share": _short_share(self.block_tuning or self.rounding_tuning),
            "batch_size": _batch_size(self.block_tuning or self.rounding_tuning),
            "value_group": GROUP,
            "rounding": "gptq" if self.values == "int4" else "nearest",
            "rounding_tuning": _rounding_tuning(self.values, self.block_tuning),
        }
        dropped = {key for key, value in by_default.items() if getattr(self, key) == value} | {"format_version"}
        if "pattern" in changes:
            dropped |= {"n", "m"}
        if "preset" in changes:
            dropped |= {*METHOD, "band"}
        kinds = {key: changes.get(key, getattr(self, key)) for key in ("values", "head", "ignored")}
        if kinds["values"] is None:
            dropped |= {"rounding", "rounding_tuning"}
        if not any(kinds.values()):
            dropped |= {"value_group", "coded_modules"}
        kept = {key: value for key, value in vars(self).items() if key not in dropped}
        return type(self)(**kept | changes)

    __replace__ = replace

    @classmethod
    def from_dict(cls, config_dict: Mapping[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """A configuration from its stored form, with the values in `kwargs` in place of those stored, as [`replace`].

        Args:
            config_dict: As of [`to_dict`].
            return_unused_kwargs: Return those of `kwargs` that are no keys too, in place of refusing them.
            kwargs: Other values.

        Raises:
            ConfigError: as for a new configuration.

        >>> stored = EGGSConfig("2:4").to_dict()
        >>> config, unused = EGGSConfig.from_dict(stored, return_unused_kwargs=True, pattern="1:4", other=3)
        >>> config.n, unused
        (1, {'other': 3})
        """
        changes, unused = _split_known(kwargs)
        if not return_unused_kwargs:
            _refuse_unknown(unused)
        none_made = {} if config_dict.get("pruned_modules") is None else {"short_share": 0.0}  # by earlier releases
        config = cls(**none_made | dict(config_dict))
        if changes:
            config = config.replace(**changes)
        return (config, unused) if return_unused_kwargs else config

    def update(self, **kwargs: Any) -> dict[str, Any]:
        """Take other values in place, as [`replace`]; returns those of `kwargs` that are no keys.

        Raises:
            ConfigError: as for a new configuration; nothing has changed then.
        """
        changes, unused = _split_known(kwargs)
        if changes:
            self.__dict__ = vars(self.replace(**changes))
        return unused

    def to_dict(self) -> dict[str, Any]:
        """As JSON types, without data, tokenizer and token: `calibration` stays only where it names its sources."""
        fields = {key: value for key, value in self.__dict__.items() if key not in ("tokenizer", "token")}
        fields["calibration"] = _calibration_names(self.calibration)
        return copy.deepcopy(fields)

    def get(self, key: str, default: Any = None) -> Any:
        """The value of a key; transformers asks so, of a model's configuration as of the one in its file."""
        return self.to_dict().get(key, default)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, EGGSConfig) and self.to_dict() == other.to_dict()

    __hash__ = None  # type: ignore[assignment]

    def __iter__(self):
        yield from self.to_dict().items()

    def __deepcopy__(self, memo: dict[int, Any]) -> EGGSConfig:
        # transformers copies the configuration on the way in; data and tokenizer are shared, not copied.
        twin = copy.copy(self)
        for name in ("targets", "ignore", "pruned_modules", "coded_modules", "matrix_norms"):
            setattr(twin, name, copy.copy(getattr(self, name)))
        return twin


def _rotation(value: Any) -> bool | str:
    if not isinstance(value, bool) and value != "auto":
        raise ConfigError(f"rotation={value!r} must be True, False or 'auto'")
    return value


def _keys() -> list[str]:
    return [name for name in inspect.signature(EGGSConfig).parameters if name != "unknown"]


def _split_known(values: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """What is for keys of the configuration, and what is not."""
    known = _keys()
    return (
        {key: value for key, value in values.items() if key in known},
        {key: value for key, value in values.items() if key not in known},
    )


def _refuse_unknown(unknown: Mapping[str, Any]) -> None:
    if not unknown:
        return
    known = _keys()
    key = next(iter(unknown))
    if key in RETIRED:
        raise ConfigError(f"{key}={unknown[key]!r}: this key is gone, it improved no model measured; leave it out")
    near = difflib.get_close_matches(key, known, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"the keys are {known}"
    raise ConfigError(f"{key}={unknown[key]!r}: EGGSConfig has no such key; {hint}")


def _pattern(pattern: str | NMPattern | None, n: int | None, m: int | None) -> NMPattern:
    if n is None and m is None:
        return NMPattern.parse("2:4" if pattern is None else pattern)
    if n is None or m is None:
        raise ConfigError(f"n={n!r}, m={m!r}: both are needed; write n=2, m=4 or pattern='2:4'")
    chosen = NMPattern(n, m)
    if pattern is not None and NMPattern.parse(pattern) != chosen:
        raise ConfigError(f"pattern={pattern!r} contradicts n={n}, m={m}; pass one of the two")
    return chosen


def _importance(name: Any, stored: bool) -> str:
    """The name of a score; of a model already pruned, one that was registered elsewhere too: loading needs no score."""
    if not isinstance(name, str) or not (name in IMPORTANCE or (stored and name.isidentifier())):
        raise ConfigError(unknown_importance(name))
    return name


def _check_combination(config: EGGSConfig) -> None:
    """Refuse values that contradict each other."""
    solver, selection = config.solver, config.selection
    if solver != "score" and selection == "diagonal":
        raise ConfigError(
            f"selection='diagonal' with solver={solver!r}: diagonals are for solver='score', as in preset='ria'; use "
            "selection='optimal' or 'none'"
        )
    if solver != "score" and not config.permutation and config.importance != METHOD["importance"]:
        raise ConfigError(
            f"importance={config.importance!r} with solver={solver!r}: no score is asked for; use solver='score', as "
            "in preset='ria'"
        )
    if config.swaps and solver != "score":
        raise ConfigError(f"swaps={config.swaps} with solver={solver!r}: swaps are for solver='score'; use swaps=0")
    if config.error_correction and solver == "score" and config.weight_update == "none":
        raise ConfigError(
            f"error_correction={config.error_correction} with solver='score' and weight_update='none': no weight would "
            "change; use weight_update='refit', or error_correction=0"
        )
    if config.block_tuning and not config.tuning_lr:
        raise ConfigError(f"tuning_lr={config.tuning_lr} with block_tuning={config.block_tuning} would tune nothing")


def _preset_values(name: str | None) -> dict[str, Any]:
    return preset("fast" if name is None else name)


def _min_degree(given: Any, of_preset: int, selection: str, pattern: NMPattern) -> int:
    if selection == "none":
        if given:
            raise ConfigError(
                f"min_degree={given} with selection='none': nothing would keep that floor; use selection='optimal', or "
                "min_degree=0"
            )
        return 0
    degree = check.integer("min_degree", (of_preset or 1) if given is None else given, least=0)
    if selection == "diagonal" and degree > pattern.n:
        raise ConfigError(
            f"min_degree={degree} with selection='diagonal' at {pattern}: a row keeps one weight of each diagonal, so "
            f"use {pattern.n} or less"
        )
    return degree


def _band(given: int | None, min_degree: int, selection: str, pattern: NMPattern) -> int:
    if selection == "diagonal":
        if given not in (None, pattern.m):
            raise ConfigError(
                f"band={given} with selection='diagonal': diagonals live in tiles of m={pattern.m} rows; leave `band` "
                "out, or use selection='optimal'"
            )
        return pattern.m
    need = -(-min_degree * pattern.m // pattern.n)
    band = max(16, 4 * need) if given is None else check.integer("band", given, least=1)
    if band < need:
        raise ConfigError(
            f"band={band} with min_degree={min_degree} at {pattern}: {band} rows keep {band * pattern.n} weights a "
            f"group and the floor takes {min_degree * pattern.m}; use a band of {need} or more, or a smaller min_degree"
        )
    return band


def _rounding_tuning(values: str | None, block_tuning: int) -> int:
    return block_tuning // 2 if values == "int4" else 0


def _short_share(block_tuning: int) -> float:
    return 0.125 if block_tuning else 0.0


def _batch_size(block_tuning: int) -> int:
    return 1 if block_tuning else 4


def _calibration_names(source: Any) -> str | dict[str, float] | None:
    if isinstance(source, str | Path):
        return str(source)
    if isinstance(source, Mapping) and all(
        isinstance(name, str | Path) and isinstance(share, int | float) for name, share in source.items()
    ):
        return {str(name): float(share) for name, share in source.items()}
    return None
