"""Losses of pytorch-metric-learning on 1, 2 and 3 ranks: the same steps, and runs that resume where they were."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dist_proxygml.checkpoint.model import open_trained
from dist_proxygml.config import Config, parse_config
from dist_proxygml.distributed.collectives import all_reduce_sum, count_bytes
from dist_proxygml.distributed.parallel import ParallelContext
from dist_proxygml.head.pml import PmlLoss
from dist_proxygml.training.head_plan import plan_head
from tests.harness import run_ranks
from tests.shards_of_noise import write_noise_shards

NUM_CLASSES, DIM, NUM_INPUTS, NUM_IMAGES = 5, 4, 3, 12
ROWS = {1: [12], 2: [7, 5], 3: [6, 0, 6]}
LOSSES: dict[str, dict[str, Any]] = {
    "pairs": {"name": "MultiSimilarityLoss", "miner": ("MultiSimilarityMiner", {"epsilon": 0.2})},
    "drawn triplets": {
        "name": "TripletMarginLoss",
        "options": {"triplets_per_anchor": 2, "distance": {"name": "CosineSimilarity"}},
    },
    "memory": {"name": "ContrastiveLoss", "miner": ("PairMarginMiner", {}), "memory_size": 31, "memory_after": 1},
    "running histogram": {"name": "DynamicSoftMarginLoss", "options": {"min_val": -2.5}},
    "a parameter per class": {"name": "ProxyAnchorLoss"},
    "several": {"name": "SoftTripleLoss", "options": {"centers_per_class": 3}},
    "one parameter": {"name": "MarginLoss", "options": {"learn_beta": True}},
}


def batch(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    rows_BI = torch.randn(NUM_IMAGES, NUM_INPUTS, generator=generator, dtype=torch.float64)
    return rows_BI, torch.randint(NUM_CLASSES, (NUM_IMAGES,), generator=generator)


def steps_of(context: ParallelContext, arguments: dict[str, Any]) -> tuple[list[float], dict[str, Tensor]]:
    """Losses of five steps, and the layer, the loss and its optimizer after them."""
    torch.manual_seed(context.rank + 7)  # ranks' own generators differ, as for dropout
    loss = PmlLoss(
        num_classes=NUM_CLASSES, embedding_dim=DIM, group=context.group, dtype=torch.float64, seed=3, **arguments
    )
    generator = torch.Generator().manual_seed(0)
    layer_ID = torch.randn(NUM_INPUTS, DIM, generator=generator, dtype=torch.float64).requires_grad_()
    optimizer = torch.optim.Adam([{"params": list(loss.parameters())}], 0.05)
    of_layer = torch.optim.SGD([layer_ID], 0.5)
    counts = ROWS[context.world_size]
    first = sum(counts[: context.rank])
    losses = []
    for step in range(5):
        rows_BI, labels_B = batch(step)
        own = slice(first, first + counts[context.rank])
        total = loss(rows_BI[own] @ layer_ID, labels_B[own]).total
        total.backward()
        assert layer_ID.grad is not None
        layer_ID.grad = all_reduce_sum(layer_ID.grad, group=context.group) / context.world_size  # as DeepSpeed
        loss.average_gradients_()
        for one in (optimizer, of_layer):
            one.step()
            one.zero_grad()
        losses.append(float(total.detach()))
    state = {name: value.clone() for name, value in loss.stored_tensors(optimizer).items()}
    return losses, state | {"layer": layer_ID.detach()}


def steps_of_all(context: ParallelContext) -> dict[str, tuple[list[float], dict[str, Tensor]]]:
    return {name: steps_of(context, arguments) for name, arguments in LOSSES.items()}


def test_any_number_of_ranks_takes_the_same_steps() -> None:
    expected = run_ranks(steps_of_all, 1)[0]
    assert expected["memory"][1]["queue"].tolist() == [4 * NUM_IMAGES % 31, 1]
    assert {len(set(losses)) for losses, _ in expected.values()} == {5}
    for world_size in (2, 3):
        ranks = run_ranks(steps_of_all, world_size)
        for name, (losses, state) in expected.items():
            for rank in ranks:
                assert rank[name][0] == pytest.approx(losses, rel=1e-11), name
                assert rank[name][1].keys() == state.keys()
                for key, value in state.items():
                    torch.testing.assert_close(rank[name][1][key], value, rtol=1e-8, atol=1e-11, msg=f"{name}: {key}")
                    assert torch.equal(rank[name][1][key], ranks[0][name][1][key]), (name, key)  # replicas are equal


# ---- runs ------------------------------------------------------------------------------------------------------------

RUNS: dict[str, dict[str, Any]] = {
    "pairs": {
        "name": "pml/MultiSimilarityLoss",
        "miner": {"name": "MultiSimilarityMiner"},
        "cross_batch_memory": {"memory_size": 30, "start_step": 2},
    },
    "proxies": {"name": "pml/ProxyAnchorLoss", "options": {"alpha": 16}},
}


def configuration(root: Path, loss: str, name: str, *, epochs: int, **changes: Any) -> Config:
    raw: dict[str, Any] = {
        "name": f"{loss}-{name}",
        "runs_dir": str(root / "runs"),
        "data": {
            "shards": str(root / "shards"),
            "train_split": "test",  # the only one that the noise shards have
            "test_split": None,
            "num_workers": 0,
            "train_transform": {"name": "resize", "size": 16},
            "test_transform": {"name": "resize", "size": 16},
        },
        "backbone": {"name": "small_cnn", "embedding_dim": 6, "options": {"width": 4}},
        "loss": RUNS[loss],
        "optimizer": {"backbone_lr": 1e-3, "proxies_lr": 0.05, "eps": 0.01, "proxies_clip_norm": 0.5},
        "training": {"epochs": epochs, "batch_size": 12},
        "checkpoint": {"asynchronous": loss == "pairs"},
        "telemetry": {"progress_bar": False, "log_every_steps": 1, "projector": False},
    }
    return parse_config(raw | changes, source="the test")


def train_runs(context: ParallelContext, root: Path, names: dict[str, int]) -> None:
    from dist_proxygml.training.run import train

    for loss in RUNS:
        for name, epochs in names.items():
            train(configuration(root, loss, name.partition("/")[0], epochs=epochs), context)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three epochs at once; two and one more; two on two ranks and one more on one."""
    root = tmp_path_factory.mktemp("pml")
    write_noise_shards(root / "shards", [5, 4, 6, 3, 5, 4, 5, 4])
    run_ranks(train_runs, 2, root, {"moved": 2}, timeout=180)
    run_ranks(train_runs, 1, root, {"whole": 3, "parts": 2, "parts/": 3, "moved": 3}, timeout=180)
    return root / "runs"


def losses_of(run: Path) -> list[float]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 10))  # 36 images in batches of 12
    return [line["loss"] for line in lines]


@pytest.mark.timeout(300)
@pytest.mark.parametrize("loss", RUNS)
def test_a_run_resumes_exactly_and_on_another_number_of_ranks(runs: Path, loss: str) -> None:
    whole = losses_of(runs / f"{loss}-whole")
    assert losses_of(runs / f"{loss}-parts") == whole
    assert losses_of(runs / f"{loss}-moved") == pytest.approx(whole, rel=1e-4)
    page = (runs / f"{loss}-whole" / "report.html").read_text()
    assert RUNS[loss]["name"] in page


@pytest.mark.timeout(300)
def test_its_checkpoint_has_no_bank_to_start_from_but_can_be_exported(runs: Path, tmp_path: Path) -> None:
    from dist_proxygml.inference.embedder import Embedder
    from dist_proxygml.inference.export_folder import export

    run = runs / "proxies-whole"
    with pytest.raises(ValueError, match=r"pml/ProxyAnchorLoss.*init_proxies"):
        open_trained(run).bank()
    assert "pml/ProxyAnchorLoss" in export(run, tmp_path / "exported")
    assert not (tmp_path / "exported" / "bank.safetensors").exists()
    assert "pml/ProxyAnchorLoss" in (tmp_path / "exported" / "README.md").read_text()
    assert Embedder.from_pretrained(tmp_path / "exported") is not None


def traffic(context: ParallelContext) -> int:
    config = configuration(Path("unused"), "proxies", "plan", epochs=1)
    loss = PmlLoss("ProxyAnchorLoss", 8, 6, options={}, group=context.group)
    with count_bytes() as counted:
        total = loss(torch.randn(6, 6).requires_grad_(), torch.arange(6)).total
        total.backward()
        loss.average_gradients_()
    assert config.micro_batch_size(2) == 6
    return counted.received


def test_the_plan_counts_the_bytes_of_a_step() -> None:
    config = configuration(Path("unused"), "proxies", "plan", epochs=1)
    config = config.model_copy(update={"data": config.data.model_copy(update={"num_classes": 8})})
    plan = plan_head(config, world_size=2)
    assert run_ranks(traffic, 2) == [plan.received_bytes_per_step] * 2
    assert plan.bank_bytes == 4 * 8 * 6
