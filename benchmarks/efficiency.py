"""What a step of a head costs as classes grow: a table and two pictures of docs/, from what benchmarks/head.py wrote.

    python -m benchmarks.head --threads 2 --sizes 1k 10k 100k 1m 10m \\
        --heads published full_softmax sampled_softmax proxygml proxygml_5_percent all sampled \\
        --json benchmarks/results/head.jsonl
    python -m benchmarks.retrieval --figures

The sizes differ in dimension and batch too, so that the pictures show ratios: the step's time over that of the bare
product X @ P.T, measured beside it, and the process's peak memory over that of the proxies alone. The table has the
milliseconds and MiB. A head that was not measured at a size, or has no room there, has no point.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.figures import Curve, Shown, growth, markdown, write_page
from dist_proxygml.storage.files import read_log

RESULTS = Path("benchmarks/results/head.jsonl")
PAGE, NAME = "docs/results.md", "efficiency"
SIZES = ("1k", "10k", "100k", "1m", "10m")  # with one proxy a class
MIB = 1 << 20

Record = dict[str, Any]


class Shape(NamedTuple):
    """A head with an optimizer, and how it is drawn."""

    head: str
    optimizer: str
    name: str
    colour: int
    dashed: bool = False


SHAPES = (
    Shape("proxygml_5_percent", "rowwise_adagrad", "ProxyGML 5 %, row-wise", 5),
    Shape("proxygml", "rowwise_adagrad", "ProxyGML, row-wise", 0),
    Shape("proxygml", "adam", "ProxyGML, Adam", 0, dashed=True),
    Shape("sampled", "rowwise_adagrad", "a tenth, row-wise", 4),
    Shape("sampled_softmax", "adam", "a tenth as PartialFC, Adam", 4, dashed=True),
    Shape("all", "adam", "softmax, streamed, Adam", 3),
    Shape("full_softmax", "adam", "softmax, all logits, Adam", 2),
    Shape("published", "adam", "authors' formulas, Adam", 1),
)


def read_records(path: Path) -> list[Record]:
    """Rows of benchmarks/head.py.

    Raises:
        ValueError: they are of several machines, whose times cannot be compared.
    """
    records = [record for _, record in read_log(path, {"size": str, "head": str}).records]
    machines = {(record["device"], record["cpu"], record["threads"], record["torch"]) for record in records}
    if len(machines) > 1:
        raise ValueError(f"expected rows of one machine in {path}, got {sorted(machines)}; measure all of them again")
    return records


def write(root: Path) -> list[Path]:
    """Put the table and the pictures into docs/; returns the files that changed."""
    return write_page(root / PAGE, NAME, show(read_records(root / RESULTS)), root)


def show(records: Sequence[Record]) -> Shown:
    """Milliseconds and MiB by head and size, and the two pictures."""
    found = {(row["size"], row["head"], row["optimizer"]): row for row in records if "skipped" not in row}
    declined = {(row["size"], row["head"], row["optimizer"]) for row in records if "skipped" in row}
    sizes = [size for size in SIZES if any((size, shape.head, shape.optimizer) in found for shape in SHAPES)]
    header, body = ["a step of the head"], []
    for size in sizes:
        row = next(found[size, s.head, s.optimizer] for s in SHAPES if (size, s.head, s.optimizer) in found)
        header.append(f"{row['num_classes']:,} classes, D {row['embedding_dim']}, batch {row['batch_size']}")
    for shape in SHAPES:
        keys = [(size, shape.head, shape.optimizer) for size in sizes]
        cells = [_cell(found[key]) if key in found else "no room" if key in declined else "" for key in keys]
        body.append([shape.name, *(cells if any(cells) else ["not measured yet", *cells[1:]])])
    machine = f"{records[0]['cpu']}, {records[0]['threads']} threads, torch {records[0]['torch']}" if records else ""
    pictures = {
        "efficiency_time.svg": ("Time of a step, times the bare product X · Pᵀ", "step_over_product"),
        "efficiency_memory.svg": ("Peak memory of a step, times that of the proxies", "peak_over_bank"),
    }
    drawn = {}
    for file, (title, number) in pictures.items():
        curves = []
        for shape in SHAPES:
            rows = [found[size, shape.head, shape.optimizer] for size in sizes if (size, *shape[:2]) in found]
            points = [(row["num_classes"], _numbers(row)[number]) for row in rows]
            curves.append(Curve(shape.name, sorted(points), shape.colour, shape.dashed))
        drawn[file] = growth(title, machine, curves, x_label="classes")
    return Shown(markdown(header, body), drawn)


def _cell(row: Record) -> str:
    return f"{row['step_ms']:,.{0 if row['step_ms'] >= 100 else 1}f} ms, {row['peak_mib']:,.0f} MiB"


def _numbers(row: Record) -> dict[str, float]:
    """Those that are drawn."""
    bank_mib = 4 * row["num_classes"] * row["proxies_per_class"] * row["embedding_dim"] / MIB
    return {"step_over_product": row["step_over_product"], "peak_over_bank": row["peak_mib"] / bank_mib}
