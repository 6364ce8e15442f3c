"""Time and memory of an evaluation after the embedding pass, beside a bare faiss search and pytorch-metric-learning.

    python -m benchmarks.search                              sop, whole, and a sample of the queries of 1m
    python -m benchmarks.search --sizes sop --share 20       every 20th query against the whole gallery
    python -m benchmarks.search --sizes tiny --json search.jsonl

Unit rows around class centres, with noise of another strength for each image, so that Recall@1 is about 0.7 and the
worst right answers lie thousands of places behind. Each row of the table is one way in a process of its own:

    bare faiss   the flat search that Recall@K needs: K + 1 neighbours of every query, nothing counted
    faiss        all retrieval metrics with their bounds for ties: MAP and MRR from the rank of every right answer
    counter      the same by sweeps alone
    pytorch-metric-learning   its AccuracyCalculator with faiss: precision@1, R-Precision, MAP@R

One run each: a shared machine's speed varies from minute to minute, so compare the ratios. `memory` is the peak beyond
what the process held when the embeddings were loaded. `all queries` is the time times `--share`: of what was not
measured whole, an extrapolation. The ways must agree: faiss and counter on every number, the others where they can.
Prints a table, the bars that the project has set itself, then one JSON line per row.
"""

import argparse
import json
import multiprocessing
import os
import platform
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from dist_proxygml.distributed.memory import peak_memory
from dist_proxygml.distributed.parallel import single_process
from dist_proxygml.evaluation.embedding_pass import EmbeddingTable
from dist_proxygml.evaluation.evaluator import Roles, Settings, evaluate_table
from dist_proxygml.evaluation.retrieval import SearchOptions
from dist_proxygml.evaluation.search import FlatIndex

MIB = 1 << 20
BLOCK = 4096  # queries of one bare search

Row = dict[str, Any]


class Size(NamedTuple):
    """A problem."""

    num_images: int
    num_classes: int
    embedding_dim: int
    recall_at: tuple[int, ...]
    ways: tuple[str, ...]
    noise: tuple[float, float]  # its length beside a centre's of 1, from the easiest to the hardest image
    share: int = 1  # every so many images is a query


ALL_WAYS = ("bare faiss", "faiss", "counter", "pytorch-metric-learning")
SIZES = {
    "tiny": Size(600, 110, 16, (1, 10, 100), ALL_WAYS, (0.4, 1.2)),
    "sop": Size(60_502, 11_316, 512, (1, 10, 100, 1000), ALL_WAYS, (1.2, 3.4)),
    "1m": Size(1_000_000, 100_000, 128, (1,), ("bare faiss", "faiss"), (0.8, 2.0), share=500),
}


def main() -> None:
    """Measure the ways of every size."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--sizes", nargs="+", choices=SIZES, default=["sop", "1m"], metavar="SIZE", help=", ".join(SIZES)
    )
    parser.add_argument("--share", type=int, help="only every so many images is a query")
    parser.add_argument("--ways", nargs="+", choices=ALL_WAYS, help="only these")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, help="file for the JSON lines as well")
    arguments = parser.parse_args()
    rows: list[Row] = []
    for name in arguments.sizes:
        size = SIZES[name]
        size = size._replace(
            share=arguments.share or size.share, ways=tuple(w for w in size.ways if w in (arguments.ways or ALL_WAYS))
        )
        of_size = measure(name, size, threads=arguments.threads)
        check_agreement(of_size)
        print_table(name, size, of_size)
        rows += of_size
    lines = [json.dumps(row) for row in rows]
    print("\n".join(lines))
    if arguments.json is not None:
        arguments.json.write_text("\n".join(lines) + "\n")


def measure(name: str, size: Size, *, threads: int) -> list[Row]:
    """A row for each way, each in a process of its own."""
    rows = []
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["dist_proxygml.evaluation.evaluator", "faiss"])  # imported once for all
    with tempfile.TemporaryDirectory() as folder:
        rows_nD, labels_n = embeddings_of(size)
        np.save(Path(folder) / "rows.npy", rows_nD)
        np.save(Path(folder) / "labels.npy", labels_n)
        del rows_nD
        for way in size.ways:
            with ProcessPoolExecutor(1, mp_context=context) as process:
                rows.append({"size": name, "way": way, **process.submit(run, way, size, folder, threads).result()})
    for row in rows:
        row["of_bare_faiss"] = round(row["seconds"] / rows[0]["seconds"], 3) if rows[0]["way"] == "bare faiss" else None
    return rows


def embeddings_of(size: Size, *, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Unit rows, float32 [n, D], and labels; queries of a share are spread over all classes."""
    generator = np.random.default_rng(seed)
    num_images, num_classes, width = size.num_images, size.num_classes, size.embedding_dim
    every_class_twice = np.tile(np.arange(num_classes), 2)
    labels_n = generator.permutation(
        np.concatenate([every_class_twice, generator.integers(0, num_classes, num_images - 2 * num_classes)])
    )
    groups = 0.6 * generator.standard_normal((12, width), dtype=np.float32)  # of classes that are alike
    centres = generator.standard_normal((num_classes, width), dtype=np.float32)
    centres += groups[generator.integers(0, 12, num_classes)]
    centres /= np.linalg.norm(centres, axis=1, keepdims=True)
    rows_nD = np.empty((num_images, width), dtype=np.float32)
    for start in range(0, num_images, BLOCK):
        part = slice(start, start + BLOCK)
        noise = generator.standard_normal((len(labels_n[part]), width), dtype=np.float32)
        strength = generator.uniform(*size.noise, (len(noise), 1)).astype(np.float32) / np.float32(width**0.5)
        rows_nD[part] = centres[labels_n[part]] + strength * noise
        rows_nD[part] /= np.linalg.norm(rows_nD[part], axis=1, keepdims=True)
    return rows_nD, labels_n


def run(way: str, size: Size, folder: str, threads: int) -> Row:
    """One way, in this process."""
    torch.set_num_threads(threads)
    rows_nD, labels_n = (np.load(Path(folder) / f"{name}.npy") for name in ("rows", "labels"))
    warm_up = Size(300, 40, size.embedding_dim, (1,), (), size.noise)
    WAYS[way](*embeddings_of(warm_up), warm_up)  # imports, threads
    before = peak_memory()
    start = time.perf_counter()
    metrics = WAYS[way](rows_nD, labels_n, size)
    seconds = time.perf_counter() - start
    num_queries = len(range(0, size.num_images, size.share))
    return {
        "seconds": round(seconds, 3),
        "queries": num_queries,
        "queries_per_second": round(num_queries / seconds, 1),
        "all_queries_seconds": round(seconds * size.num_images / num_queries, 1),
        "memory": peak_memory() - before,
        "metrics": metrics,
        "images": size.num_images,
        "classes": size.num_classes,
        "embedding_dim": size.embedding_dim,
        "threads": threads,
        "cores": len(os.sched_getaffinity(0)),
        "machine": platform.processor() or platform.machine(),
        "torch": torch.__version__,
    }


def run_bare_faiss(rows_nD: np.ndarray, labels_n: np.ndarray, size: Size) -> dict[str, float]:
    """K + 1 neighbours of every query; the first that is not the query itself gives Recall@1 outside the search."""
    index = FlatIndex(rows_nD)
    queries = np.arange(0, len(rows_nD), size.share)
    hits = 0
    for start in range(0, len(queries), BLOCK):
        asked = queries[start : start + BLOCK]
        _, found_qK = index.search(rows_nD[asked], max(size.recall_at) + 1)
        first_q = np.where(found_qK[:, 0] == asked, found_qK[:, 1], found_qK[:, 0])
        hits += int((labels_n[first_q] == labels_n[asked]).sum())
    return {"recall@1": hits / len(queries)}


def run_evaluation(rows_nD: np.ndarray, labels_n: np.ndarray, size: Size, *, search: str) -> dict[str, float]:
    """This project's, without clustering."""
    table = EmbeddingTable(torch.from_numpy(rows_nD), torch.from_numpy(labels_n), torch.arange(len(labels_n)))
    is_query = torch.zeros(len(labels_n), dtype=torch.bool)
    is_query[:: size.share] = True
    settings = Settings(recall_at=size.recall_at, kmeans_seeds=())
    result = evaluate_table(
        table,
        context=single_process(),
        settings=settings,
        options=SearchOptions(search),
        roles=Roles(is_query, torch.ones_like(is_query)),
    )
    return result.metrics | {
        f"{name} {end}": v for name, b in result.bounds.items() for end, v in zip("<>", b, strict=True)
    }


def run_metric_learning(rows_nD: np.ndarray, labels_n: np.ndarray, size: Size) -> dict[str, float]:
    """Musgrave's library, whose queries must be the first rows of the gallery."""
    from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator

    is_query = np.zeros(len(labels_n), dtype=bool)
    is_query[:: size.share] = True
    order = np.concatenate([np.flatnonzero(is_query), np.flatnonzero(~is_query)])
    names = {"precision_at_1": "recall@1", "r_precision": "r_precision", "mean_average_precision_at_r": "map@r"}
    calculator = AccuracyCalculator(include=tuple(names), k="max_bin_count", device=torch.device("cpu"))
    rows, labels = torch.from_numpy(rows_nD[order]), torch.from_numpy(labels_n[order])
    num_queries = int(is_query.sum())
    found = calculator.get_accuracy(rows[:num_queries], labels[:num_queries], rows, labels, ref_includes_query=True)
    return {name: float(found[theirs]) for theirs, name in names.items()}


WAYS: dict[str, Callable[[np.ndarray, np.ndarray, Size], dict[str, float]]] = {
    "bare faiss": run_bare_faiss,
    "faiss": lambda *problem: run_evaluation(*problem, search="faiss"),
    "counter": lambda *problem: run_evaluation(*problem, search="counter"),
    "pytorch-metric-learning": run_metric_learning,
}


def check_agreement(rows: list[Row]) -> None:
    """Raise where two ways do not give the same numbers: exactly for ours, to 1e-4 for those without exact ties."""
    ours = [row["metrics"] for row in rows if row["way"] in ("faiss", "counter")]
    for row in rows:
        for metrics in ours:
            is_exact = row["metrics"] in ours
            for name in set(metrics) & set(row["metrics"]):
                difference = abs(metrics[name] - row["metrics"][name])
                if difference > (0 if is_exact else 1e-4 + 1 / row["queries"]):
                    raise RuntimeError(f"{row['way']} and this project differ in {name} by {difference}")


def bars(rows: list[Row]) -> list[str]:
    """The bars that the project has set itself, as far as their rows are there."""
    seconds = {(row["size"], row["way"]): row["seconds"] for row in rows}
    lines = []
    for way in ("faiss", "counter"):
        if ("sop", way) in seconds and ("sop", "bare faiss") in seconds:
            ratio = seconds["sop", way] / seconds["sop", "bare faiss"]
            lines.append(
                f"all metrics by {way} at most 1.2 times a bare faiss search: {verdict(ratio <= 1.2)} ({ratio:.2f})"
            )
    if ("sop", "faiss") in seconds and ("sop", "pytorch-metric-learning") in seconds:
        ratio = seconds["sop", "faiss"] / seconds["sop", "pytorch-metric-learning"]
        lines.append(f"all metrics faster than pytorch-metric-learning has its own: {verdict(ratio < 1)} ({ratio:.2f})")
    for row in rows:
        if row["size"] == "1m" and row["way"] == "faiss":
            memory = row["memory"] / 1e9
            lines.append(
                f"a million rows in less than 2 GB beyond the embeddings: {verdict(memory < 2)} ({memory:.2f} GB)"
            )
    return lines


def verdict(is_met: bool) -> str:
    """A word for it."""
    return "met" if is_met else "MISSED"


def print_table(name: str, size: Size, rows: list[Row]) -> None:
    """The rows of one size, and its bars."""
    sample = "" if size.share == 1 else f"; every {size.share}th image is a query, `all queries` is extrapolated"
    print(f"\n{name}: {size.num_images:,} x {size.embedding_dim}, {size.num_classes:,} classes{sample}\n")
    print(f"{'':<26}{'seconds':>10}{'queries/s':>11}{'all queries':>13}{'of bare':>9}{'memory':>11}{'recall@1':>10}")
    for row in rows:
        ratio = "" if row["of_bare_faiss"] is None else f"{row['of_bare_faiss']:.2f}"
        print(
            f"{row['way']:<26}{row['seconds']:>10.1f}{row['queries_per_second']:>11,.0f}"
            f"{row['all_queries_seconds']:>11,.0f} s{ratio:>9}{row['memory'] / MIB:>7,.0f} MiB"
            f"{row['metrics']['recall@1']:>10.4f}"
        )
    for line in bars(rows):
        print(line)
    print()


if __name__ == "__main__":
    main()
