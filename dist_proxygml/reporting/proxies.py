"""The proxy section of a run's page: the share of dead proxies, and the similarity of kept ones.

Read from the newest proxies/step-*.json of the run's folder, which training writes at evaluations.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dist_proxygml.reporting.charts import Histogram, histogram_chart
from dist_proxygml.reporting.pictures import MAX_LETTERS
from dist_proxygml.storage.files import read_document
from dist_proxygml.storage.run_folder import by_step

_MAX_EXAMPLES = 20


def proxy_statistics(folder: Path) -> dict[str, Any]:
    """Return the page's data, or under "problem" the reason why there is none.

    Args:
        folder: "proxies" of a run's folder; may be missing.
    """
    stored = list(by_step(folder, ".json").values())
    if not stored:
        return {"problem": "No statistics of its proxies are stored for this run."}
    newest = stored[-1]
    try:
        return _shown(read_document(newest))
    except (KeyError, TypeError, ValueError, ZeroDivisionError, OSError) as error:
        problem = f"{newest.name} cannot be read ({type(error).__name__}: {error})"
        return {"problem": f"The statistics of its proxies in {problem}."}


def _shown(statistics: Mapping[str, Any]) -> dict[str, Any]:
    counts = ("num_classes", "per_class", "num_dead", "window_steps", "num_images", "step")
    shown: dict[str, Any] = {"problem": None} | {name: int(statistics[name]) for name in counts}
    shown["num_proxies"] = shown["num_classes"] * shown["per_class"]
    if shown["num_proxies"] <= 0:
        raise ValueError("it has no proxies")
    histograms = []
    for key, what in (("kept_positive", "of its class"), ("kept_negative", "of other classes")):
        counted = statistics[key]["counts"]
        histograms.append(Histogram(f"{what}, {sum(counted):,} pairs", statistics[key]["edges"], counted))
    chart = histogram_chart(
        "Similarity of images and the proxies they keep", histograms, x_label="cosine, percent of the pairs in each bin"
    )
    examples = (statistics.get("dead_examples") or [])[:_MAX_EXAMPLES]
    names = [_example(example, shown["per_class"]) for example in examples]
    return shown | {"chart": chart, "dead_names": names, "dead_definition": statistics["dead_definition"]}


def _example(example: Mapping[str, Any], per_class: int) -> str:
    name = str(example.get("name") or f"class {example['class']}")[:MAX_LETTERS]
    return name if per_class == 1 else f"{name} (proxy {int(example['proxy']) + 1})"
