"""The report's part on pairs of images: how well scores tell those of one class from those of two."""

from collections.abc import Mapping
from typing import Any

from dist_proxygml.evaluation.evaluator import EvaluationResult
from dist_proxygml.evaluation.verification import BINS_SHOWN, Verification
from dist_proxygml.protocols import far_metric, shown_far
from dist_proxygml.reporting.charts import Chart, Histogram, Series, histogram_chart, roc_chart


def verification_part(rows: Mapping[str, EvaluationResult]) -> dict[str, Any] | None:
    """Return the page's data on the pairs of the last result, beside those of the others; None if it has none."""
    found = {name: result.pairs for name, result in rows.items() if result.pairs is not None}
    last = list(rows.values())[-1] if rows else None
    if last is None or last.pairs is None:
        return None
    thresholds = {point.far: point.threshold for point in last.pairs.points}
    rates = []
    for far in sorted([*thresholds, *last.pairs.not_measurable]):
        values = [rows[name].metrics.get(far_metric(far)) for name in found]
        rates.append({"far": shown_far(far), "values": values, "threshold": thresholds.get(far)})
    return {
        "pairs": last.pairs,
        "of": (last.protocol.get("pairs") or {}).get("of"),
        "columns": list(found),
        "rates": rates,
        "accuracies": [rows[name].metrics.get("pair_accuracy") for name in found],
        "deviations": [rows[name].metrics.get("pair_accuracy_sd") for name in found],
        "charts": [chart for chart in (_roc(found), _scores(last.pairs)) if chart is not None],
    }


def _roc(found: Mapping[str, Verification]) -> Chart | None:
    lines = []
    for name, pairs in found.items():
        points = [(different / pairs.num_different, same / pairs.num_same) for _, same, different in pairs.roc]
        lines.append(Series(name, [(far, 100 * tar) for far, tar in points]))
    return roc_chart(
        "Pairs of one class accepted, percent", lines, x_label="share of pairs of different classes accepted"
    )


def _scores(pairs: Verification) -> Chart | None:
    first, same, different = pairs.histogram
    edges = [bin / BINS_SHOWN for bin in range(first, first + len(same) + 1)]
    histograms = [Histogram("same class", edges, same), Histogram("different classes", edges, different)]
    return histogram_chart("Scores of pairs", histograms, x_label="cosine, percent of the pairs in each bin")
