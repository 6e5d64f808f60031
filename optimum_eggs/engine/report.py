"""What a pruning run did, measured; `report.json`."""

from __future__ import annotations

import importlib.metadata
import json
import platform
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, shorten
from ..files import REPORT_NAME, write_durably
from ..masks.certificate import Certificate
from ..masks.shortfall import Shortfall
from .tune import BlockTuning

REPORT_VERSION = 1
_KINDS = {
    "summary": dict,
    "config": dict,
    "calibration": dict,
    "base_model": dict,
    "layers": list,
    "tuning": list,
    "left_dense": list,
    "measurements": dict,
    "evaluations": list,
    "tasks": list,
    "benchmark": dict,
    "recovery": dict,
    "files": dict,
}
"""What the parts of a report are in JSON."""
_MEASURED = ("evaluations", "tasks", "benchmark", "recovery")  # parts that other commands than `prune` put in


@dataclass(frozen=True)
class LayerReport:
    """One pruned layer.

    Attributes:
        relative_error: ‖(W − Z)X‖²/‖WX‖² on the calibration inputs that it was fitted on, before its block was tuned;
            None for a layer that was packed as it was.
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
        left_dense: Every weight matrix of the blocks, embedding or head that was left dense, with the reason.
        calibration: What the windows were: source, count, length, whether they overlap because the text was short, and
            the SHA-256 of the token ids. Empty for a model that was packed as it was.
        base_model: Id and revision of the dense model on the Hub; None for one from a folder.
        measurements: Seconds, CPU seconds and peak resident bytes, in all and by stage.
    """

    config: dict[str, Any]
    layers: list[LayerReport]
    left_dense: list[DenseLayer]
    calibration: dict[str, Any]
    tuning: list[BlockTuning] = field(default_factory=list)
    measurements: dict[str, Any] = field(default_factory=dict)
    base_model: dict[str, Any] | None = None
    versions: dict[str, str] = field(default_factory=lambda: library_versions())

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
        untuned = [str(tuned.block) for tuned in self.tuning if not tuned.best_step]
        what = "tuning found nothing better than not tuning: give more windows, or a smaller `tuning_lr`"
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
            "left_dense": [asdict(layer) for layer in self.left_dense],
            "measurements": self.measurements,
            "versions": self.versions,
        }

    def save(self, path: str | Path) -> None:
        """Write the report as JSON."""
        Path(path).write_text(json.dumps(self.to_dict(), indent=2) + "\n", encoding="utf-8")

    def __repr__(self) -> str:
        seconds = self.measurements.get("seconds", float("nan"))
        error = self.mean_relative_error
        return (
            f"PruneReport({len(self.layers)} layers at {self.config['n']}:{self.config['m']}, "
            + ("" if error is None else f"mean relative error {error:.4f}, ")
            + f"{self.starved_inputs} starved inputs, {seconds:.1f} s)"
        )


def update_report(folder: str | Path, **parts: Any) -> bool:
    """Put parts into the report of a saved model; False if the folder has none. The file is replaced in one step."""
    path = Path(folder) / REPORT_NAME
    if not path.is_file():
        return False
    report = read_report(folder) | parts
    write_durably(path, json.dumps(report, indent=2) + "\n")
    return True


def read_report(folder: str | Path) -> dict[str, Any]:
    """The report of a saved model, or an empty one.

    Raises:
        CheckpointError: the file is no JSON, or holds no report.
    """
    path = Path(folder) / REPORT_NAME
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path}: is no JSON ({error}); save the model again") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{path}: holds {shorten(found)}, no report; save the model again")
    for part, kind in _KINDS.items():
        if found.get(part) is not None and not isinstance(found[part], kind):
            raise CheckpointError(
                f"{path}: {part} is {shorten(found[part])}, where a report has a {kind.__name__}; save the model again"
            )
    return found


def without_measurements(report: dict[str, Any]) -> dict[str, Any]:
    """The report of a model whose weights have changed since: without what was measured on the old ones."""
    return {key: value for key, value in report.items() if key not in _MEASURED}


def library_versions() -> dict[str, str]:
    """Versions of Python and of the libraries that decide a result."""
    names = ("optimum-eggs", "torch", "transformers", "optimum", "safetensors", "accelerate")
    return {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in names}
