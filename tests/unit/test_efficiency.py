"""What a head costs by classes: docs/ shows the measurements that lie beside it, and only those of one machine."""

import json
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import pytest

from benchmarks import efficiency, figures

ROOT = Path(__file__).parents[2]
MACHINE = {"device": "cpu", "cpu": "A", "threads": 2, "torch": "2"}


def record(size: str, num_classes: int, head: str, optimizer: str, **numbers: Any) -> dict[str, Any]:
    shape = {"num_classes": num_classes, "proxies_per_class": 1, "embedding_dim": 256, "batch_size": 64}
    return {"size": size, "head": head, "optimizer": optimizer, **shape, **MACHINE, **numbers}


def spoken(svg: str) -> str:
    return str(ElementTree.fromstring(svg).get("aria-label"))


def test_the_page_shows_what_was_measured() -> None:
    made = efficiency.show(efficiency.read_records(ROOT / efficiency.RESULTS))
    page = (ROOT / efficiency.PAGE).read_text()
    assert figures.with_table(page, efficiency.NAME, made.markdown) == page, "python -m benchmarks.retrieval --figures"
    for file, text in made.pictures.items():
        assert text == (ROOT / figures.IMAGES / file).read_text(), "python -m benchmarks.retrieval --figures"
        assert file in page


def test_ratios_are_drawn_and_what_is_missing_is_left_out() -> None:
    made = efficiency.show(
        [
            record("1m", 1 << 20, "all", "adam", step_ms=1234.5, step_over_product=6.5, peak_mib=5120),
            record("1k", 1 << 10, "all", "adam", step_ms=1.26, step_over_product=10.5, peak_mib=3),
            record("1k", 1 << 10, "published", "adam", step_ms=20.0, step_over_product=50, peak_mib=40),
            {"size": "1m", "head": "published", "optimizer": "adam", "skipped": "needs more", **MACHINE},
        ]
    )
    lines = made.markdown.splitlines()
    assert lines[0] == "| a step of the head | 1,024 classes, D 256, batch 64 | 1,048,576 classes, D 256, batch 64 |"
    assert "| softmax, streamed, Adam | 1.3 ms, 3 MiB | 1,234 ms, 5,120 MiB |" in lines
    assert "| authors' formulas, Adam | 20.0 ms, 40 MiB | no room |" in lines
    assert "| ProxyGML, row-wise | not measured yet |  |" in lines
    time, memory = (spoken(text).partition(". ")[2] for text in made.pictures.values())
    assert time == "softmax, streamed, Adam: 1,024 10.5, 1,048,576 6.5; authors' formulas, Adam: 1,024 50"
    assert (
        memory == "softmax, streamed, Adam: 1,024 3, 1,048,576 5; authors' formulas, Adam: 1,024 40"
    )  # of 1, 1024 MiB


def test_times_of_several_machines_are_refused(tmp_path: Path) -> None:
    rows = [record("1k", 1000, "all", "adam"), record("1k", 1000, "sampled", "adam") | {"cpu": "B"}]
    path = tmp_path / "head.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(ValueError, match="one machine"):
        efficiency.read_records(path)
