import json

import pytest

from optimum_eggs import strict_json
from optimum_eggs.engine.report import LayerReport, PruneReport, update_report
from optimum_eggs.errors import NumericalError
from optimum_eggs.masks.certificate import Certificate

NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("value", "where"), [({"layers": [{"error": 1.0}, {"error": NAN}]}, "layers.1.error"), ([1, (2.0, -INF)], "1.1")]
)
def test_what_is_no_number_is_named_and_not_written(value, where):
    with pytest.raises(NumericalError, match=f"^{where} is NaN or infinite, which is not written"):
        strict_json.dumps(value)


@pytest.mark.parametrize("text", ["NaN", "[1, -Infinity]", "{"])
def test_only_json_is_read(text):
    with pytest.raises(ValueError, match=r"is no number|Expecting"):
        strict_json.loads(text)


def test_a_report_is_left_as_it_was(tmp_path):
    layer = LayerReport("up", 0, 16, 8, "2:4", 0.5, 9, Certificate(True, 4, 8.0, 9, 0.25, 0, {16: 4}))
    windows = {"windows": 1, "seq_len": 9, "sha256": "0"}
    report = PruneReport({"n": 2, "m": 4}, [layer], [], windows, measurements={"seconds": 1.0})
    report.save(tmp_path / "report.json")
    before = (tmp_path / "report.json").read_text()
    with pytest.raises(NumericalError, match=r"evaluations.0.metrics.perplexity is NaN"):
        update_report(tmp_path, evaluations=[{"metrics": {"perplexity": NAN}}])
    report.measurements["seconds"] = INF
    with pytest.raises(NumericalError, match=r"measurements.seconds is NaN or infinite"):
        report.save(tmp_path / "report.json")
    assert (tmp_path / "report.json").read_text() == before == json.dumps(json.loads(before), indent=2) + "\n"
