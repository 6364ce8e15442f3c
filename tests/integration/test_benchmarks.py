"""The benchmarks at sizes that take no time: they run, what they compare computes the same thing, what cannot run says
why.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import baselines, elastic
from benchmarks.baselines import (
    METRIC_LEARNING_LOSSES,
    BareProduct,
    ClassSoftmax,
    PublishedProxyGML,
    metric_learning_loss,
)
from benchmarks.checkpoint import bars as bars_of_checkpoints
from benchmarks.head import SIZES, Settings, bars, measured
from benchmarks.loader import bars as bars_of_loader
from benchmarks.ranks import bars as bars_of_ranks
from benchmarks.search import bars as bars_of_search
from benchmarks.search import check_agreement
from dist_proxygml import ProxyGMLLoss
from dist_proxygml.distributed.parallel import ParallelContext
from tests.harness import run_ranks

pytestmark = pytest.mark.ci

ROOT = Path(__file__).resolve().parents[2]


def run(module: str, *arguments: str, json_file: Path, first_path: Path = ROOT) -> tuple[list[dict[str, Any]], str]:
    """The rows that a benchmark wrote, and what it printed."""
    done = subprocess.run(
        [sys.executable, "-m", module, *arguments, "--json", str(json_file)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": f"{first_path}:{ROOT}", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return [json.loads(line) for line in json_file.read_text().splitlines()], done.stdout


def test_the_benchmark_of_the_head_measures_every_row(tmp_path: Path) -> None:
    stub = tmp_path / "pytorch_metric_learning"  # as on a machine without it
    stub.mkdir()
    (stub / "__init__.py").write_text("raise ModuleNotFoundError('no', name='pytorch_metric_learning')")
    heads = ("product", "onednn_product", "published", "normalized_softmax", "sampled_softmax", "proxygml")
    arguments = ("--sizes", "tiny", "--repeats", "1", "--threads", "1", "--heads", *heads)
    rows, printed = run("benchmarks.head", *arguments, json_file=tmp_path / "rows.jsonl", first_path=tmp_path)
    found = {(row["head"], row["optimizer"]): row for row in rows}
    ours = [("proxygml", name) for name in ("adam", "sgd", "rowwise_adagrad", "sparse_adam")]
    others = [("published", "adam"), ("normalized_softmax", "adam"), ("sampled_softmax", "adam")]
    assert list(found) == [("product", None), ("onednn_product", None), *others, *ours]
    assert found.pop(("normalized_softmax", "adam"))["skipped"] == "not installed: pytorch_metric_learning"
    assert "not installed" in printed
    for (head, optimizer), row in found.items():
        assert row["step_ms"] > 0
        assert {"cpu", "device", "threads", "torch"} <= row.keys()
        if row["optimizer"] is not None:
            parts = row["forward_ms"] + row["backward_ms"] + row["optimizer_ms"]
            assert row["fastest_step_ms"] <= row["step_ms"] <= row["slowest_step_ms"]
            assert 0 < parts < 2 * row["step_ms"]
            assert row["faster"] == pytest.approx(
                found["published", "adam"]["step_over_product"] / row["step_over_product"], rel=1e-4
            )
            # 60 classes, 2 proxies each (the softmax: one), 16 numbers of 4 bytes
            bank = 60 * 16 * 4 / 2**20 * (1 if head == "sampled_softmax" else 2)
            assert row["bank_mib"] == pytest.approx(bank, rel=1e-4)
            assert row["gradient_mib"] == (0 if optimizer in ("rowwise_adagrad", "sparse_adam") else row["bank_mib"])


@pytest.mark.timeout(240)
def test_the_benchmark_of_ranks_counts_bytes_and_divides_the_bank(tmp_path: Path) -> None:
    sizes = ("--num-classes", "64", "--embedding-dim", "8", "--topk", "10", "--batch-size", "6", "--repeats", "1")
    heads = ("--heads", "candidates", "full_softmax", "--ranks", "1", "2")
    rows, printed = run("benchmarks.ranks", *sizes, *heads, json_file=tmp_path / "rows.jsonl")
    found = {(row["head"], row["ranks"]): row for row in rows}
    assert found["candidates", 1]["received_bytes"] == 0
    assert found["candidates", 2]["received_bytes"] == found["candidates", 2]["formula_bytes"] > 0
    # embeddings and their gradient, labels, MAX and SUM of two over the 6 rows: 3 come from the other rank
    assert found["full_softmax", 2]["received_bytes"] == 2 * 3 * 8 * 4 + 3 * 8 + 6 * 4 + 6 * 2 * 4
    for head in ("candidates", "full_softmax"):
        assert found[head, 1]["bank_mib"] == pytest.approx(2 * found[head, 2]["bank_mib"], rel=1e-4)
    assert "missed" not in printed


@pytest.mark.timeout(300)
def test_the_benchmark_of_other_numbers_of_ranks_compares_a_run_with_its_like(tmp_path: Path) -> None:
    settings = [*elastic.SHORT, f"runs_dir={tmp_path}", "seed=1", "training.max_steps=5", "schedule.warmup_steps=0"]
    runs = elastic.runs_of("configs/demo_cpu.json", settings, seed=1, ranks=[1, 2], stops=[3])
    assert set(runs) == {"left alone", "stopped", "elastic", "one ulp", "ulps"}
    alone = runs["left alone"]
    assert runs["stopped"] == alone  # to the bit, on the same number of ranks
    for run in runs.values():
        assert run.losses[:3] == alone.losses[:3]
        assert run.losses[3:] == pytest.approx(alone.losses[3:], rel=1e-4)
    weights = {
        name: (tmp_path / f"seed-1-{name.replace(' ', '-')}/checkpoints/step-000005/backbone.safetensors").read_bytes()
        for name in runs
    }
    assert weights["stopped"] == weights["left alone"]
    assert len(set(weights.values())) == 4  # other sums and other weights end in other bits
    rows = [{"seed": seed, "run": name, **run._asdict()} for seed in (0, 1) for name, run in runs.items()]
    printed = elastic.table(rows, stop=3)
    assert printed[2] == "| steps 1 to 3 | 0.0e+00 | 0.0e+00 | 0.0e+00 | 0.0e+00 |"
    assert printed[-1].startswith("| ulps - left alone | ")


@pytest.mark.timeout(240)
def test_the_benchmark_of_the_loader_measures_every_row(tmp_path: Path) -> None:
    arguments = ("--images", "photographs", "--num-photographs", "192", "--workers", "1", "--repeats", "1")
    rows, printed = run("benchmarks.loader", *arguments, "--num-samples", "3000", json_file=tmp_path / "rows.jsonl")
    loaders = {row["loader"]: row for row in rows if "loader" in row}
    assert list(loaders) == ["memory", "in_loader", "ours", "webdataset", "imagefolder"]
    for row in loaders.values():
        assert row["per_worker"] == row["images_per_second"] > 0  # one worker
        assert row["ours_over_it"] == pytest.approx(
            loaders["ours"]["images_per_second"] / row["images_per_second"], rel=1e-4
        )
        assert row["over_memory"] == pytest.approx(
            row["images_per_second"] / loaders["memory"]["images_per_second"], rel=1e-4
        )
        assert row["cpu_ms"] > 0
    assert "ours over webdataset" in printed
    first = [row for row in rows if "first_batch" in row]
    assert [(row["first_batch"], row["workers"]) for row in first] == [
        (place, workers) for workers in (0, 1) for place in ("of the epoch", "resumed at its end")
    ]
    for row in first:
        assert row["num_samples"] == 3000
        assert 0 < row["open_s"] < row["all_s"]
        assert ("worker_mib" in row) == (row["workers"] == 1)


@pytest.mark.timeout(240)
def test_the_benchmark_of_checkpoints_times_the_disk_the_bank_and_training(tmp_path: Path) -> None:
    arguments = ("--num-classes", "101", "--embedding-dim", "8", "--ranks", "2", "--repeats", "1", "--steps", "4")
    folder = ("--every", "2", "--folder", str(tmp_path))
    rows, printed = run("benchmarks.checkpoint", *arguments, *folder, json_file=tmp_path / "rows.jsonl")
    bank, *training = rows
    assert bank["bytes"] == 3 * 101 * 8 * 4
    assert 0 < bank["verify_s"] < bank["load_s"]
    for way, plain in (("save", "write"), ("load", "read")):
        assert bank[f"{way}_of_disk"] == pytest.approx(bank[f"{plain}_s"] / bank[f"{way}_s"], rel=1e-4)
    assert [row["way"] for row in training] == ["none", "synchronous", "asynchronous"]
    none, synchronous, asynchronous = training
    assert none["blocked"] < 0.01 < synchronous["blocked"]
    assert none["steps_beside"] == synchronous["steps_beside"] == 0 < asynchronous["steps_beside"]
    assert asynchronous["checkpoint_bytes"] > 549 * 128 * 4 * 3  # the bank with its moments
    assert "MB every 2 of 4 steps" in printed
    assert [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"]


def test_a_bar_of_checkpoints_is_met_or_missed() -> None:
    bank = {"part": "bank", "ranks": 2, "save_of_disk": 0.51, "load_of_disk": 0.49}
    training = {"part": "training", "way": "asynchronous", "blocked": 0.011, "slower": 0.008}
    rows = [bank, training | {"way": "synchronous", "blocked": 0.5}, training, training | {"slower": 0.012}]
    assert [line.split()[0] for line in bars_of_checkpoints(rows)] == ["met", "missed", "met", "missed"]


def test_a_baseline_that_does_not_fit_the_machine_is_not_run() -> None:
    settings = Settings(repeats=1, threads=1, device="cpu")
    row = measured("published", "adam", SIZES["1m"], settings)
    assert row["skipped"].startswith("needs 4,00")  # the one-hot matrix alone: 4 * (10^6)^2 bytes
    assert baselines.bytes_needed(
        "published",
        batch_size=128,
        num_classes=100_000,
        proxies_per_class=1,
        embedding_dim=512,
        regularization_weight=0.0,
    ) == pytest.approx(41e9, rel=0.01)


@pytest.mark.parametrize("regularization_weight", [0.0, 0.3])
def test_the_published_formulation_is_this_head(regularization_weight: float) -> None:
    torch.manual_seed(0)
    head = ProxyGMLLoss(
        7,
        5,
        proxies_per_class=3,
        topk=9,
        regularization_weight=regularization_weight,
        initialization="unit",
        normalize=False,
    )
    published = PublishedProxyGML(
        head.proxies.detach().flatten(0, 1), num_classes=7, topk=9, regularization_weight=regularization_weight
    )
    ours = F.normalize(torch.randn(11, 5), dim=1).requires_grad_()
    theirs = ours.detach().clone().requires_grad_()
    labels = torch.randint(0, 7, (11,))
    total = head(ours, labels).total
    loss = published(theirs, labels)
    total.backward()
    loss.backward()
    # the published epsilons are 1e-8 of sums of order 1
    torch.testing.assert_close(loss, total, rtol=1e-5, atol=0)
    torch.testing.assert_close(theirs.grad, ours.grad, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(published.proxies_DP.grad.T, head.proxies.grad.flatten(0, 1), rtol=1e-4, atol=1e-6)


def test_the_bare_product_goes_through_every_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(baselines, "_CHUNK", 4)
    proxies_PD, embeddings_BD = torch.randn(10, 3), torch.randn(2, 3)
    product = BareProduct(proxies_PD, batch_size=2, matmul_dtype=torch.float32)
    product(embeddings_BD)
    similarity_PB = proxies_PD @ embeddings_BD.T  # what is left: the third chunk over the end of the second
    torch.testing.assert_close(product.similarity_wB, torch.cat([similarity_PB[8:], similarity_PB[6:8]]))


def test_the_bare_product_of_a_gpu_is_one_of_factors_that_are_rounded_already() -> None:
    on_gpu = BareProduct(torch.empty(1 << 16, 3, device="meta"), batch_size=64, matmul_dtype=torch.bfloat16)
    assert on_gpu.proxies_PD.dtype == torch.bfloat16
    assert on_gpu.chunk == len(on_gpu.proxies_PD.split(on_gpu.chunk)[0]) * 16 == 1 << 20  # all of them at once
    assert on_gpu.similarity_wB.shape == (1 << 16, 64)


def test_the_class_softmax_is_a_cross_entropy_over_the_classes_it_looks_at() -> None:
    torch.manual_seed(0)
    embeddings, labels = F.normalize(torch.randn(4, 5), dim=1), torch.tensor([3, 6, 3, 5])
    for rate, classes in ((1.0, range(7)), (0.0, (0, 3, 5, 6))):  # a rank looks at one class at least: 0
        softmax = ClassSoftmax(7, 5, sampling_rate=rate)
        centers = F.normalize(softmax.centers_cD.detach(), dim=1)[list(classes)]
        target = torch.tensor([list(classes).index(label) for label in labels.tolist()])
        torch.testing.assert_close(
            softmax(embeddings, labels).detach(), F.cross_entropy(20 * embeddings @ centers.T, target)
        )


def test_the_class_softmax_is_the_normalised_softmax_of_pytorch_metric_learning() -> None:
    losses = pytest.importorskip("pytorch_metric_learning.losses")
    torch.manual_seed(0)
    softmax, theirs = ClassSoftmax(7, 5), losses.NormalizedSoftmaxLoss(7, 5)
    with torch.no_grad():
        theirs.W.copy_(softmax.centers_cD.T)
    embeddings, labels = F.normalize(torch.randn(4, 5), dim=1), torch.tensor([3, 6, 3, 5])
    torch.testing.assert_close(softmax(embeddings, labels), theirs(embeddings, labels))
    for name in METRIC_LEARNING_LOSSES:
        loss = metric_learning_loss(name, num_classes=7, proxies_per_class=2, embedding_dim=5)
        assert loss(embeddings, labels).isfinite()
        (parameter,) = loss.parameters()
        assert parameter.numel() == 7 * 5 * (2 if name == "soft_triple" else 1)


def test_the_class_softmax_is_the_same_over_three_ranks() -> None:
    loss, own_gradients, gradients = share_of_softmax(None)
    results = run_ranks(share_of_softmax, 3)
    for other_loss, _, _ in results:
        torch.testing.assert_close(other_loss, loss)
    torch.testing.assert_close(torch.cat([result[1] for result in results]), own_gradients)
    torch.testing.assert_close(torch.cat([result[2] for result in results]), gradients)


def share_of_softmax(context: ParallelContext | None) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, the centres' gradient and the embeddings' of this rank's share of 7 classes and 6 images."""
    generator = torch.Generator().manual_seed(0)
    centers, embeddings = torch.randn(7, 5, generator=generator), torch.randn(6, 5, generator=generator)
    labels = torch.tensor([0, 6, 3, 3, 2, 5])
    softmax = ClassSoftmax(7, 5, group=None if context is None else context.group)
    with torch.no_grad():
        softmax.centers_cD.copy_(centers[softmax.partition.start : softmax.partition.stop])
    if context is not None:
        embeddings, labels = embeddings.chunk(3)[context.rank], labels.chunk(3)[context.rank]
    embeddings.requires_grad_()
    loss = softmax(embeddings, labels)
    loss.backward()
    assert softmax.centers_cD.grad is not None
    assert embeddings.grad is not None
    return loss.detach(), softmax.centers_cD.grad, embeddings.grad


def test_a_bar_is_met_or_missed() -> None:
    shape = {"num_classes": 1_000_000, "embedding_dim": 128, "step_ms": 100.0}
    larger = {"num_classes": 10_000_000, "embedding_dim": 64, "step_ms": 600.0}
    rows = [
        row("sop", "published", "adam", forward_backward_over_product=100, extra_mib=700),
        row("sop", "proxygml", "adam", forward_backward_over_product=5, extra_mib=100),
        row("1m", "proxygml", "rowwise_adagrad", step_over_product=1.5, extra_mib=401, **shape),
        row("10m", "proxygml", "rowwise_adagrad", step_over_product=1.5, extra_mib=100, **larger),
    ]
    assert [[*line.split(": ")[0].split(), line.split(": ")[-1]] for line in bars(rows)] == [
        ["met", "sop", "20.00, bar >= 20"],
        ["missed", "sop", "7.00, bar >= 8"],
        ["met", "1m", "1.50, bar <= 2"],
        ["missed", "1m", "401.00, bar <= 400"],
        ["met", "10m", "1.20, bar <= 1.5"],
    ]


def test_a_bar_of_the_loader_is_met_or_missed() -> None:
    rows: list[dict[str, Any]] = [
        {"images": "photographs", "loader": loader, "workers": 2, "ours_over_it": ratio}
        for loader, ratio in (
            ("memory", 0.951),
            ("in_loader", 0.949),
            ("ours", 1.0),
            ("webdataset", 1.01),
            ("imagefolder", 0.99),
        )
    ]
    first = {"num_samples": 10, "workers": 1, "all_s": 2.1, "worker_mib": 49.0}
    rows += [first | {"first_batch": "of the epoch"}, first | {"first_batch": "at its end", "over_start": 1.11}]
    assert [line.split()[0] for line in bars_of_loader(rows)] == [
        *("met", "missed", "met", "missed"),
        *("missed", "met"),
        *("missed", "missed", "met"),
    ]


def row(size: str, head: str, optimizer: str, **values: float) -> dict[str, Any]:
    return {"size": size, "head": head, "optimizer": optimizer, **values}


def test_a_bar_of_ranks_is_met_or_missed() -> None:
    rows = [
        {"head": "candidates", "num_classes": classes, "ranks": ranks, "bank_mib": bank, "state_mib": bank}
        | {"received_bytes": received, "formula_bytes": 100 * (ranks - 1)}
        for classes, ranks, bank, received in ((10, 1, 8.0, 0), (10, 2, 4.0, 100), (90, 1, 72.0, 0), (90, 2, 72.0, 102))
    ]
    assert [line.split()[0] for line in bars_of_ranks(rows)] == ["missed", "missed", "missed"]
    rows[3].update(bank_mib=36.0, state_mib=36.0, received_bytes=100)
    assert [line.split()[0] for line in bars_of_ranks(rows)] == ["met", "met", "met"]


@pytest.mark.timeout(240)
def test_the_benchmark_of_the_search_measures_every_way_and_they_agree(tmp_path: Path) -> None:
    pytest.importorskip("pytorch_metric_learning")
    arguments = ("--sizes", "tiny", "--threads", "1", "--share", "3")
    rows, printed = run("benchmarks.search", *arguments, json_file=tmp_path / "rows.jsonl")
    found = {row["way"]: row for row in rows}
    assert list(found) == ["bare faiss", "faiss", "counter", "pytorch-metric-learning"]
    assert found["faiss"]["metrics"] == found["counter"]["metrics"]
    assert {row["queries"] for row in rows} == {200}
    assert 0.2 < found["faiss"]["metrics"]["recall@1"] < 0.99
    assert found["bare faiss"]["of_bare_faiss"] == 1
    assert "every 3th image is a query, `all queries` is extrapolated" in printed


def test_the_benchmark_of_the_search_says_which_bars_are_missed_and_refuses_ways_that_differ() -> None:
    seconds = {"bare faiss": 10.0, "faiss": 12.1, "counter": 11.9, "pytorch-metric-learning": 13.0}
    rows = [{"size": "sop", "way": way, "seconds": value} for way, value in seconds.items()]
    rows.append({"size": "1m", "way": "faiss", "seconds": 1.0, "memory": 2_100_000_000})
    assert [line.rsplit(": ", 1)[1] for line in bars_of_search(rows)] == [
        "MISSED (1.21)",
        "met (1.19)",
        "met (0.93)",
        "MISSED (2.10 GB)",
    ]
    differ = [
        {"way": way, "queries": 10, "metrics": {"map": value}} for way, value in (("faiss", 0.5), ("counter", 0.5001))
    ]
    with pytest.raises(RuntimeError, match=r"\bmap\b"):
        check_agreement(differ)
