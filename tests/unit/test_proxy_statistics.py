"""What is written about proxies: hand-worked pairs, and the file that others read."""

import json
from pathlib import Path

import torch

from dist_proxygml.head.bank import Pairs
from dist_proxygml.head.classification import KeptPairs
from dist_proxygml.head.partition import ClassPartition
from dist_proxygml.head.statistics import DEAD_DEFINITION, ProxyStatistics, bin_edges, write_proxy_use


def pairs(*entries: tuple[int, int, float]) -> Pairs:
    row, proxy, similarity = zip(*entries, strict=True)
    return Pairs(torch.tensor(row), torch.tensor(proxy), torch.tensor(similarity))


def test_similarities_beyond_the_ends_by_rounding_are_in_the_outer_bins_and_edges_open_a_bin() -> None:
    partition = ClassPartition(num_classes=30)
    statistics = ProxyStatistics(partition, 2, device=torch.device("cpu"), group=None)
    statistics.begin_step(is_logged=True)
    # class 4 has the proxies 8 and 9; of two equal ones the first is the nearest
    positives = pairs((0, 8, 1.0000001), (0, 9, -1.0000001), (1, 8, 0.5), (1, 9, 0.5))
    statistics.observe(KeptPairs(pairs((0, 3, 0.25), (1, 3, -0.25), (1, 5, 0.0)), positives, partition))
    use = statistics.close_window()
    filled = {edge: n for edge, n in zip(bin_edges(), use.similarities.positive, strict=False) if n}
    assert filled == {-1.0: 1, 0.5: 2, 0.98: 1}
    assert {e: n for e, n in zip(bin_edges(), use.similarities.negative, strict=False) if n} == {
        -0.26: 1,
        0.0: 1,
        0.24: 1,
    }
    assert use.num_dead == 60 - 3
    assert use.dead_examples[:4] == [(0, 0), (0, 1), (1, 0), (2, 0)]  # 3 and 5 were kept
    assert len(use.dead_examples) == 20
    assert (4, 0) not in use.dead_examples
    assert (4, 1) in use.dead_examples


def test_the_file_has_every_field_that_the_report_reads(tmp_path: Path) -> None:
    partition = ClassPartition(num_classes=3)
    statistics = ProxyStatistics(partition, 1, device=torch.device("cpu"), group=None)
    for is_logged in (True, False):
        statistics.begin_step(is_logged=is_logged)
        statistics.observe(KeptPairs(pairs((0, 0, 0.1)), pairs((0, 1, 0.9)), partition))
    path = tmp_path / "proxies" / "step-000040.json"
    write_proxy_use(path, statistics.close_window(), step=40, names_of=lambda labels: [f"no. {n}" for n in labels])
    document = json.loads(path.read_text())
    edges = document["kept_positive"].pop("edges")
    assert (len(edges), edges[0], edges[50], edges[57], edges[-1]) == (101, -1.0, 0.0, 0.14, 1.0)
    assert document["kept_negative"].pop("edges") == edges
    positive, negative = (document.pop(f"kept_{kind}")["counts"] for kind in ("positive", "negative"))
    assert (positive[95], sum(positive)) == (1, 1)  # of the logged step
    assert (negative[55], sum(negative)) == (1, 1)
    assert document == {
        "step": 40,
        "num_classes": 3,
        "per_class": 1,
        "window_steps": 2,
        "num_images": 2,
        "num_dead": 1,
        "dead_definition": DEAD_DEFINITION,
        "dead_examples": [{"class": 2, "proxy": 0, "name": "no. 2"}],
    }
    assert [file.name for file in path.parent.iterdir()] == ["step-000040.json"]
