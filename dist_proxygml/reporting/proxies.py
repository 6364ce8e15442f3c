"""The part of a run's page about its proxies: the share that does nothing, and how similar what images keep is.

Read from the newest proxies/step-*.json of the run's folder, which training writes at evaluations.
"""

import json
import re
from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any

from dist_proxygml.reporting.charts import Histogram, histogram_chart
from dist_proxygml.reporting.pictures import MAX_LETTERS, Section

_MAX_EXAMPLES = 20


def proxy_section(folder: Path) -> Section:
    """The section, or a sentence on why there is nothing to see.

    Args:
        folder: "proxies" of a run's folder; may be missing.
    """
    by_step = {
        int(match[1]): path for path in folder.glob("step-*.json") if (match := re.search(r"-(\d+)$", path.stem))
    }
    if not by_step:
        html = '<p class="quiet">No statistics of its proxies are stored for this run.</p>'
    else:
        newest = by_step[max(by_step)]
        try:
            html = _described(json.loads(newest.read_text(encoding="utf-8")))
        except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
            problem = f"{newest.name} cannot be read ({type(error).__name__}: {error})"
            html = f'<p class="quiet">The statistics of its proxies in {escape(problem)}.</p>'
    return Section("proxies", "What its proxies do", html)


def _described(statistics: Mapping[str, Any]) -> str:
    num_classes, per_class = int(statistics["num_classes"]), int(statistics["per_class"])
    num_proxies, num_dead = num_classes * per_class, int(statistics["num_dead"])
    window, num_images = int(statistics["window_steps"]), int(statistics["num_images"])
    parts = [
        f"<p><b>{num_dead:,} of {num_proxies:,}</b> proxies ({100 * num_dead / num_proxies:.1f}%; {num_classes:,} "
        f"classes with {per_class:,} each) are dead: {escape(str(statistics['dead_definition']))}. Counted over the "
        f"{window:,} steps before step {int(statistics['step']):,}, with {num_images:,} images.</p>"
    ]
    examples = statistics.get("dead_examples") or []
    if examples:
        names = ", ".join(_example(example, per_class) for example in examples[:_MAX_EXAMPLES])
        parts.append(f'<p class="quiet">The first of them: {names}.</p>')
    histograms = []
    for key, what in (("kept_positive", "of its class"), ("kept_negative", "of other classes")):
        counts = statistics[key]["counts"]
        histograms.append(Histogram(f"{what}, {sum(counts):,} pairs", statistics[key]["edges"], counts))
    chart = histogram_chart(
        "Similarity of images and the proxies they keep", histograms, x_label="cosine, percent of the pairs in each bin"
    )
    parts.append(f'<div class="charts">{chart}</div>' if chart else '<p class="quiet">No kept pairs were counted.</p>')
    return "\n".join(parts)


def _example(example: Mapping[str, Any], per_class: int) -> str:
    name = str(example.get("name") or f"class {example['class']}")[:MAX_LETTERS]
    return escape(name if per_class == 1 else f"{name} (proxy {int(example['proxy']) + 1})")
