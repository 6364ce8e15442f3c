"""Numbers that documents quote are those of benchmarks/results: means over seeds with deviations, and what heads cost.

A mean has to be that of some row of some table; which row a sentence speaks of is left to its reader. It is rounded
once: 51.946, which the page of results shows as 51.95, is 51.9.
"""

import re
import statistics
from pathlib import Path

import pytest

from benchmarks import efficiency
from benchmarks.retrieval import finished
from benchmarks.tables import TABLES
from benchmarks.tables.negatives import every_other

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def means() -> set[str]:
    """All that may be quoted of the tables: Recall@1 and MAP@R of test classes, over the seeds that are finished."""
    said = set()
    for table in TABLES.values():
        lines = finished(table)
        if table.name == "negatives":
            lines = {key: every_other(line, 1) for key, line in lines.items()}  # without the characters of the trials
        for row in table.rows:
            tests = [lines[row.name, seed]["test"] for seed in row.seeds if (row.name, seed) in lines]
            for name in ("recall@1", "map@r"):
                values = [100 * test[name] for test in tests if name in test]
                if len(values) > 1:
                    said.add(f"{statistics.fmean(values):.1f} ± {statistics.stdev(values):.1f}")
    return said


@pytest.mark.parametrize("document", ["README.md", "docs/coming_from_partialfc.md"])
def test_means_and_deviations_are_those_of_finished_seeds(document: str, means: set[str]) -> None:
    text = (ROOT / document).read_text()
    quoted = re.findall(r"\d+\.\d ± \d+\.\d\b", text.replace("**", ""))
    assert quoted
    assert len(quoted) == text.count("±"), "with one digit: a difference with its interval belongs to the results"
    assert set(quoted) - means == set()


def test_the_cost_of_heads_is_what_was_measured() -> None:
    heads = {
        "ProxyGML, exact top-k, row-wise Adagrad": ("proxygml", "rowwise_adagrad"),
        "a random tenth, row-wise Adagrad": ("sampled", "rowwise_adagrad"),
        "softmax, streamed, Adam": ("all", "adam"),
        "softmax, all logits, Adam": ("full_softmax", "adam"),
    }
    exact, sampled, *_ = heads.values()
    records = efficiency.read_records(ROOT / efficiency.RESULTS)
    found = {(record["size"], record["head"], record["optimizer"]): record for record in records}
    assert {(record["device"], record["threads"]) for record in records} == {("cpu", 2)}

    def row(size: str, *shown: tuple[str, str], label: str = "") -> list[str]:
        """The bare product is the one that was measured beside the first head."""
        of_heads = [found[size, *head] for head in shown]
        first = of_heads[0]
        shape = f"{first['num_classes']:,} classes, D {first['embedding_dim']}, batch {first['batch_size']}"
        costs = [f"{record['step_ms']:,.0f} ms, {record['extra_mib']:,.0f} MiB" for record in of_heads]
        costs += [""] * (len(heads) - len(costs))
        return [label or f"{shape}, k {first['topk']}", f"{first['product_ms']:,.0f} ms", *costs]

    page = (ROOT / "README.md").read_text().replace("**", "")
    (table,) = re.findall(r"^\| one CPU, two threads: .*(?:\n\|.*)+", page, flags=re.MULTILINE)
    header, _, *body = ([cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines())
    assert header[1:] == ["bare product `X @ P.T`", *heads]
    assert body == [
        row("1m", *heads.values()),
        row("1m", ("proxygml_5_percent", "rowwise_adagrad"), label="the same, k 50,000 (5 %)"),
        row("10m", exact, sampled),
    ]
