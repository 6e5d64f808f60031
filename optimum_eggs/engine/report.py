"""What a pruning run did, measured; `report.json`."""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

from .. import strict_json
from ..access import no_file
from ..calibration.documents import NAMED_DATASETS, DatasetName, dataset_id
from ..errors import CheckpointError
from ..files import REPORT_NAME, file_written, write_durably
from ..masks.certificate import Certificate
from ..masks.shortfall import Shortfall
from .schema import problem
from .tune import BlockTuning

_REMEDY = "see to the folder's permissions and space"

REPORT_VERSION = 1
_MEASURED = ("evaluations", "tasks", "benchmark")  # parts that other commands than `prune` put in
_SAVE_AGAIN = "save the model again, or move the file away"


@dataclass(frozen=True)
class LayerReport:
    """One pruned layer.

    Attributes:
        relative_error: ‖(T − Z)X‖²/‖TX‖² on the calibration inputs that it was fitted on, before its block was tuned,
            where T is what it was fitted to: the dense weight, or with `error_correction` that corrected. None for a
            layer that was packed as it was.
        min_degree, band: The floor that it was pruned under; `min_degree` is 0 without one.
        permutation_gain: Share of score that reordering its inputs won, if that was tried.
        scores_alone: What the mask of the largest importance scores, without the floor, would have lacked of it; None
            without a floor.
        weights_alone: An expert that too few calibration tokens reached, pruned by its weights alone; its
            `relative_error` is that of the weights.
        damping: The damping that the solver took, where that of the configuration was too small for it; else None.
        tokens: Calibration tokens that the layer saw; None for one that was packed as it was.
        zeros_kept: Of a layer that was packed as it was, zeros that the mask has taken in where a group had fewer than
            n nonzeros. The certificate counts them as kept.
        coding: Kind and group of the integers that its values are, such as `"int8:128"`; None for floats.
    """

    name: str
    block: int
    out_features: int
    in_features: int
    pattern: str
    relative_error: float | None
    tokens: int | None
    certificate: Certificate
    min_degree: int = 0
    band: int = 1
    permutation_gain: float | None = None
    scores_alone: Shortfall | None = None
    weights_alone: bool = False
    damping: float | None = None
    zeros_kept: int = 0
    coding: str | None = None


@dataclass(frozen=True)
class DenseLayer:
    """One weight left dense, and why."""

    name: str
    reason: str
    parameters: int


@dataclass
class PruneReport:
    """The report of a pruning run.

    Attributes:
        config: The configuration, as JSON types.
        layers: One entry for each pruned layer.
        tuning: One entry for each block that was tuned.
        rounding: The same for blocks tuned with the rounding of their values in the loop.
        rotation: The share of the importance that a plain mask loses, as a mean over layers, `lost_before` and
            `lost_after`; or the `reason` why `rotation="auto"` left the model as it was. None if it was not asked for.
        left_dense: Every weight matrix of the blocks, embedding or head that was left dense, with the reason.
        calibration: What the windows were: source, count, length, how many of them the dense model wrote (`generated`),
            whether the others overlap because the text was short, and the SHA-256 of the token ids of all. Empty for a
            model that was packed as it was.
        base_model: Id and revision of the dense model on the Hub; None for one from a folder.
        measurements: Seconds, CPU seconds and peak resident bytes, in all and by stage; of a run that went on where
            others were cut, theirs until their last finished block too.
    """

    config: dict[str, Any]
    layers: list[LayerReport]
    left_dense: list[DenseLayer]
    calibration: dict[str, Any]
    tuning: list[BlockTuning] = field(default_factory=list)
    measurements: dict[str, Any] = field(default_factory=dict)
    base_model: dict[str, Any] | None = None
    versions: dict[str, str] = field(default_factory=lambda: library_versions())
    rounding: list[BlockTuning] = field(default_factory=list)
    rotation: dict[str, Any] | None = None

    @property
    def mean_relative_error(self) -> float | None:
        """Mean of the relative errors of the layers that were pruned on calibration inputs, or else of all.

        None where none is known.
        """
        known = [layer for layer in self.layers if layer.relative_error is not None]
        errors = [layer.relative_error for layer in known if not layer.weights_alone]
        errors = errors or [layer.relative_error for layer in known]
        return sum(errors) / len(errors) if errors else None  # type: ignore[arg-type]

    @property
    def warnings(self) -> list[str]:
        """What whoever uses the model should know."""
        untuned = [str(tuned.block) for tuned in self.tuning if not tuned.kept]
        what = "tuning did not lower the error and was undone: use a smaller `tuning_lr`, or more steps"
        return [f"blocks {', '.join(untuned)}: {what}"] if untuned else []

    @property
    def starved_inputs(self) -> int:
        """Inputs, over all layers, that no output keeps."""
        return sum(layer.certificate.starved_inputs for layer in self.layers)

    def to_dict(self) -> dict[str, Any]:
        """As JSON types."""
        layers = [asdict(layer) | {"certificate": layer.certificate.to_dict()} for layer in self.layers]
        return {
            "report_version": REPORT_VERSION,
            "summary": {
                "pattern": f"{self.config['n']}:{self.config['m']}",
                "layers_pruned": len(self.layers),
                "parameters_pruned": sum(layer.out_features * layer.in_features for layer in self.layers),
                "mean_relative_error": self.mean_relative_error,
                "starved_inputs": self.starved_inputs,
                "zeros_kept": sum(layer.zeros_kept for layer in self.layers),
                "layers_by_weights_alone": sum(layer.weights_alone for layer in self.layers),
            },
            "config": self.config,
            "warnings": self.warnings,
            "calibration": self.calibration,
            "base_model": self.base_model,
            "layers": layers,
            "tuning": [asdict(block) for block in self.tuning],
            "rounding": [asdict(block) for block in self.rounding],
            "rotation": self.rotation,
            "left_dense": [asdict(layer) for layer in self.left_dense],
            "measurements": self.measurements,
            "versions": self.versions,
        }

    def save(self, path: str | Path) -> None:
        """Write the report as JSON."""
        Path(path).write_text(strict_json.dumps(self.to_dict(), indent=2) + "\n", encoding="utf-8")

    def __repr__(self) -> str:
        seconds = self.measurements.get("seconds", float("nan"))
        error = self.mean_relative_error
        return (
            f"PruneReport({len(self.layers)} layers at {self.config['n']}:{self.config['m']}, "
            + ("" if error is None else f"mean relative error {error:.4f}, ")
            + f"{self.starved_inputs} starved inputs, {seconds:.1f} s)"
        )


def update_report(folder: str | Path, **parts: Any) -> bool:
    """Put parts into the report of a saved model; False if the folder has none. The file is replaced in one step.

    Raises:
        CheckpointError: what is there is no report.
        OutputError: it cannot be written.
        NumericalError: a number is NaN or infinite.
    """
    path = Path(folder) / REPORT_NAME
    report = read_report(folder)
    if not path.is_file():
        return False
    text = strict_json.dumps(report | parts, indent=2) + "\n"
    with file_written(path, _REMEDY):
        write_durably(path, text)
    return True


def check_recordable(folder: str | Path) -> None:
    """Raise if the report of a saved model cannot be read, or not be written; one that is not there is neither.

    Raises:
        CheckpointError: what is there is no report.
        OutputError: it cannot be replaced.
    """
    path = Path(folder) / REPORT_NAME
    read_report(folder)
    if path.is_file():
        with file_written(path, _REMEDY), TemporaryFile(dir=path.parent):
            pass


def read_report(folder: str | Path) -> dict[str, Any]:
    """The report of a saved model, or an empty one.

    Raises:
        CheckpointError: the file cannot be read, is no JSON, or holds no report.
    """
    path = Path(folder) / REPORT_NAME
    why = no_file(path)
    if why:
        raise CheckpointError(f"{path}: {why}")
    if not path.is_file():
        return {}
    try:
        found = strict_json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error}); see to its permissions") from error
    except ValueError as error:
        raise CheckpointError(f"{path}: is no JSON ({error}); {_SAVE_AGAIN}") from error
    wrong = problem(found)
    if wrong is not None:
        raise CheckpointError(f"{path}: {wrong}; {_SAVE_AGAIN}")
    return found


def text_uses(report: dict[str, Any], text: Mapping[str, Any]) -> list[str]:
    """What was done on a text before, by the report: "calibrated", "trained".

    Texts are told apart by the SHA-256 of their files where both are known, else by their names, or the data sets that
    these stand for, and their splits.

    Args:
        report: Of a saved model.
        text: `name`, `split` and `sha256`, as [`described`][optimum_eggs.calibration.documents.described].
    """
    return [what for what, texts in used_texts(report).items() if any(_is_same_text(text, other) for other in texts)]


def used_texts(report: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """What the values of a saved model were "calibrated" and "trained" on, by its report, as `described`."""
    calibration, recovery = report.get("calibration") or {}, report.get("recovery") or {}
    rounded = (report.get("quantization") or {}).get("calibration") or {}
    source, train = (report.get("config") or {}).get("calibration"), recovery.get("settings", {}).get("train")
    return {
        "calibrated": [*calibration.get("texts", _by_name(source)), *rounded.get("texts", [])],
        "trained": recovery.get("texts", _by_name(train)),
    }


def _by_name(names: str | Iterable[str] | None) -> list[dict[str, Any]]:
    """Texts of the reports of earlier releases, which give no more than names."""
    return [{"name": name} for name in ([names] if isinstance(names, str) else names or [])]


def _is_same_text(text: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    if text.get("sha256") and other.get("sha256"):
        return text["sha256"] == other["sha256"]
    return _is_same_name(text.get("name"), other.get("name")) and _may_overlap(text.get("split"), other.get("split"))


def _is_same_name(name: Any, other: Any) -> bool:
    """Whether two names are of one text: equal, or of one data set and configuration, if both say which.

    >>> _is_same_name("wikitext2", "Salesforce/wikitext:wikitext-2-raw-v1@main"), _is_same_name("me/a:en", "me/a:de")
    (True, False)
    """
    if name is None or other is None:
        return False
    ids = {dataset_id(name), dataset_id(other)}
    if None in ids:
        return bool(name == other)
    configurations = {_configuration(name), _configuration(other)} - {None}
    return len(ids) == 1 and len(configurations) < 2


def _configuration(name: str) -> str | None:
    asked = DatasetName.parse(name)
    return NAMED_DATASETS.get(asked.path, {}).get("name", asked.config_name)


def _may_overlap(split: str | None, other: str | None) -> bool:
    """Whether two splits may have rows in common, as slices of one have; one that is unknown may.

    >>> _may_overlap("train[:1000]", "train"), _may_overlap("train[:80%]", "test+validation")
    (True, False)
    """
    parts, others = ({part.partition("[")[0] for part in (each or "").split("+")} for each in (split, other))
    return not (split and other) or not parts.isdisjoint(others)


def timed_on(machine: Mapping[str, Any]) -> str:
    """Where a benchmark was run, as in a line of text.

    >>> timed_on({"processor": "A processor", "threads": 2, "accelerator": None})
    'A processor, 2 threads'
    """
    return machine.get("accelerator") or f"{machine['processor']}, {machine['threads']} threads"


def without_measurements(report: dict[str, Any]) -> dict[str, Any]:
    """The report of a model whose weights have changed since: without what was measured on the old ones.

    How they were trained, and on what, stays.
    """
    kept = {key: value for key, value in report.items() if key not in _MEASURED}
    if kept.get("recovery"):
        kept["recovery"] = kept["recovery"] | {"perplexity_before": None, "perplexity_after": None, "held_out_loss": []}
    return kept


def library_versions() -> dict[str, str]:
    """Versions of Python and of the libraries that decide a result."""
    names = ("optimum-eggs", "torch", "transformers", "optimum", "safetensors", "accelerate")
    return {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in names}
