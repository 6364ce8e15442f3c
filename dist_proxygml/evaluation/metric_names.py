"""Names and meanings of metrics, in display order.

A result names its metrics by key ("recall@1", "map@r"); a key that is not known here is shown as it is, at the end.
`KEY_sd` is the deviation of KEY over seeds, not a metric of its own.
"""

import re
from collections.abc import Iterable
from typing import NamedTuple

_CLUSTERS = "k-means clusters, as many as classes, against the classes"


class MetricName(NamedTuple):
    """A metric for people."""

    key: str
    label: str
    meaning: str


_NAMES = (
    MetricName("recall@", "Recall@{}", "queries with a right answer among the first {}"),
    MetricName("precision@1_macro", "Precision@1, classes", "Recall@1 with every class counting the same"),
    MetricName("r_precision", "R-Precision", "right answers among the first R, where a query has R of them"),
    MetricName("map@r", "MAP@R", "as R-Precision, earlier right answers counting more"),
    MetricName("map", "MAP", "precision at each right answer, wherever it comes, averaged"),
    MetricName("mrr", "MRR", "1 over the position of the first right answer"),
    MetricName("nmi", "NMI", f"mutual information of {_CLUSTERS}"),
    MetricName("ami", "AMI", f"as NMI, less what chance gives: {_CLUSTERS}"),
    MetricName("f1", "F1", f"pairs of images that are together in both: {_CLUSTERS}"),
    MetricName("legacy_recall@", "Recall@{} as published", "what the authors' evaluation gives for Recall@{}"),
    MetricName("legacy_nmi", "NMI as published", "what the authors' evaluation gives for NMI"),
)


def name_metrics(keys: Iterable[str]) -> list[MetricName]:
    """The metrics among these keys, each once, in reading order."""
    found = set(keys)
    named = []
    for name in _NAMES:
        if name.key.endswith("@"):
            cuts = sorted(int(match[1]) for key in found if (match := re.fullmatch(rf"{name.key}(\d+)", key)))
            named += [MetricName(f"{name.key}{k}", name.label.format(k), name.meaning.format(k)) for k in cuts]
        elif name.key in found:
            named.append(name)
    known = {name.key for name in named}
    others = [key for key in sorted(found - known) if not (key.endswith("_sd") and key.removesuffix("_sd") in found)]
    return named + [MetricName(key, key, "") for key in others]
