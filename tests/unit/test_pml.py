"""Losses of pytorch-metric-learning by name: every one can be, mistakes are refused before a run, state is kept."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from pytorch_metric_learning import distances, losses, miners
from torch import Tensor

from dist_proxygml.config import Config, load_config
from dist_proxygml.head.pml import PmlLoss, names, try_pml_loss
from dist_proxygml.training.checks import check_run
from dist_proxygml.training.head_plan import check_fits, plan_head

ROOT = Path(__file__).parents[2]
NUM_CLASSES, DIM = 6, 8
NEEDED: dict[str, dict[str, Any]] = {"RankedListLoss": {"margin": 0.4, "Tn": 1.0}}


def batch(seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    rows_BD = F.normalize(torch.randn(18, DIM, generator=generator, dtype=torch.float64))
    return rows_BD.requires_grad_(), torch.arange(18) % NUM_CLASSES


def build(name: str, **arguments: Any) -> PmlLoss:
    return PmlLoss(name, NUM_CLASSES, DIM, dtype=torch.float64, **arguments)


def configuration(*overrides: str, loss: str = "pml/MultiSimilarityLoss") -> Config:
    return load_config(ROOT / "configs" / "demo_cpu.json", ["proxies={}", f"loss.name={loss}", *overrides])


@pytest.mark.filterwarnings("ignore")  # of the library
def test_every_loss_and_miner_that_may_be_named_can_be_computed() -> None:
    assert {"MultiSimilarityLoss", "ProxyAnchorLoss", "SoftTripleLoss", "TripletMarginLoss"} < names("loss").keys()
    for name in names("loss"):
        try_pml_loss({"name": name, "options": NEEDED.get(name, {})}, 100, DIM)
    for name in names("miner"):
        try_pml_loss({"name": "TripletMarginLoss", "miner": (name, {})}, 100, DIM)
    for name in losses.CrossBatchMemory.supported_losses():
        try_pml_loss({"name": name, "memory_size": 7}, 100, DIM)


def test_no_name_reaches_what_needs_other_arguments() -> None:
    for name in ("CrossBatchMemory", "MultipleLosses", "BaseMetricLossFunction", "torch", "VICRegLoss"):
        with pytest.raises(ValueError, match=r"loss\.name"):
            build(name)


def test_loss_and_gradient_are_the_library_s() -> None:
    rows_BD, labels_B = batch()
    distance = {"distance": {"name": "LpDistance", "options": {"power": 2}}}
    total = build("TripletMarginLoss", options=distance, miner=("TripletMarginMiner", {"margin": 0.3})).forward(
        rows_BD, labels_B
    )
    pairs = miners.TripletMarginMiner(margin=0.3)(rows_BD, labels_B)
    wanted = losses.TripletMarginLoss(distance=distances.LpDistance(power=2))(rows_BD, labels_B, pairs)
    assert total.total.item() == total.classification.item() == wanted.item() > 0
    ours, theirs = (torch.autograd.grad(value, rows_BD)[0] for value in (total.total, wanted))
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=0)


def test_what_a_loss_draws_depends_on_the_step_alone_and_leaves_other_draws_as_they_are() -> None:
    rows_BD, labels_B = batch()
    loss = build("TripletMarginLoss", options={"triplets_per_anchor": 1})
    torch.manual_seed(1)
    first, second = (loss(rows_BD, labels_B).total.item() for _ in range(2))
    drawn = torch.rand(3)
    torch.manual_seed(1)
    assert torch.equal(torch.rand(3), drawn)
    loss.draw = 0
    assert loss(rows_BD, labels_B).total.item() == first != second


@pytest.mark.parametrize(
    "arguments",
    [
        {"name": "NTXentLoss", "memory_size": 40},
        {"name": "DynamicSoftMarginLoss", "options": {"min_val": -2.5}},
        {"name": "ProxyNCALoss"},
    ],
    ids=lambda arguments: arguments["name"],
)
def test_a_loss_that_takes_over_the_state_of_another_gives_the_same(arguments: dict[str, Any]) -> None:
    one, other = build(**arguments, seed=1), build(**arguments, seed=2)
    optimizers = [torch.optim.Adam([{"params": list(loss.parameters())}], 0.1) for loss in (one, other)]
    for seed in range(3):
        one(*batch(seed)).total.backward()
        optimizers[0].step()
    stored = {name: value.clone() for name, value in one.stored_tensors(optimizers[0]).items()}
    other.restore(stored, optimizers[1])
    other.draw = one.draw
    for loss, optimizer in zip((one, other), optimizers, strict=True):
        loss.zero_grad()
        loss(*batch(3)).total.backward()
        optimizer.step()
    assert torch.equal(one(*batch(4)).total, other(*batch(4)).total)


def test_the_size_for_many_classes_is_known_without_building_it() -> None:
    arguments = {"name": "SoftTripleLoss", "options": {"centers_per_class": 3}}
    built = PmlLoss(num_classes=50, embedding_dim=DIM, **arguments)
    assert try_pml_loss(arguments, 50, DIM).parameters == sum(p.numel() for p in built.parameters()) == 50 * 3 * DIM
    before = torch.get_rng_state()
    assert try_pml_loss(arguments, 1 << 40, 512).parameters == (1 << 40) * 3 * 512
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("key", "overrides"),
    [
        (r"MultiSimilarityLoss", ["loss.name=pml/MultiSimilarityLos"]),
        (r"loss\.name", ["loss.name=MultiSimilarityLoss"]),
        (r"alpa", ['loss.options={"alpa": 2}']),
        (r"loss\.options", ['loss.options={"alpha": "two"}']),
        (r"num_classes", ["loss.name=pml/ArcFaceLoss", "loss.options.num_classes=5"]),
        (r"loss\.options\.distance", ['loss.options.distance="CosineSimilarity"']),
        (r"CosineSimilarity", ['loss.options.distance={"name": "CosinSimilarity"}']),
        (r"loss\.miner\.name", ["loss.miner.name=MultiSimilarityLoss"]),
        (r"cross_batch_memory", ["loss.name=pml/ProxyAnchorLoss", "loss.cross_batch_memory.memory_size=100"]),
        (r"memory_size", ["loss.cross_batch_memory.memory_size=63"]),
        (r"proxies\.ratio", ["proxies.ratio=0.1"]),
        (r"proxies\.initialization", ["proxies.initialization=class_mean"]),
        (r"proxies\.scale", ["proxies.scale=2"]),
        (r"proxies_name", ["optimizer.proxies_name=rowwise_adagrad"]),
        (r"init_proxies", ["checkpoint.init_from=runs/other"]),
        (r"proxies\.ratio and proxies\.topk", ["loss=null"]),
    ],
)
def test_a_mistake_is_refused_before_a_run(key: str, overrides: list[str]) -> None:
    with pytest.raises(ValueError, match=key):
        check_run(configuration(*overrides), world_size=1, device="cpu", is_what_if=True)


def test_a_loss_that_does_not_fit_is_refused_with_numbers() -> None:
    config = configuration("data.num_classes=10000000", loss="pml/ProxyAnchorLoss")
    plan = plan_head(config, world_size=8)
    bank = 4 * 10_000_000 * 128
    assert (plan.bank_bytes, plan.gradient_bytes, plan.optimizer_bytes) == (bank, 2 * bank, 2 * bank)
    assert plan_head(config, world_size=64).bank_bytes == bank  # more ranks do not help
    with pytest.raises(ValueError, match=r"4\.8 GiB.*proxies"):
        check_fits(config, plan, memory=8 << 30)
    assert "loss optimizer state" in str(plan)


def test_the_loss_is_described_with_all_that_was_chosen() -> None:
    loss = build(
        "ContrastiveLoss",
        options={"neg_margin": 0.5, "distance": {"name": "CosineSimilarity"}},
        miner=("PairMarginMiner", {}),
        memory_size=1000,
        memory_after=20,
    )
    assert loss.described == (
        "pml/ContrastiveLoss: neg_margin 0.5, distance CosineSimilarity; PairMarginMiner; memory of 1,000 embeddings "
        "after 20 batches"
    )


def test_configurations_without_a_loss_are_compared_as_before() -> None:
    from dist_proxygml.training.prepare import comparable_settings

    plain = load_config(ROOT / "configs" / "demo_cpu.json")
    assert not any(name.startswith("loss") for name in comparable_settings(plain))
    named = comparable_settings(configuration('loss.options={"alpha": 3}'))
    assert (named["loss.name"], named["loss.options.alpha"]) == ("pml/MultiSimilarityLoss", 3)
    assert json.dumps(named)
    assert "training.batch_size" in named  # it decides about the pairs
