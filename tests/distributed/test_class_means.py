"""Proxies that start at the mean embeddings of their classes: against a plain loop, on one rank and on several."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dist_proxygml.config import Config, parse_config
from dist_proxygml.distributed.parallel import ParallelContext
from dist_proxygml.head.partition import ClassPartition
from dist_proxygml.head.proxies import initial_proxies, replace_by_class_means_
from dist_proxygml.training.class_means import some_of_each_class
from tests.harness import run_ranks
from tests.shards_of_noise import write_noise_shards

NUM_CLASSES, DIM = 7, 5
# Class 2 has no image, class 4 one, and those of class 6 cancel out.
LABELS = [0, 5, 1, 0, 3, 3, 5, 0, 1, 4, 0, 5, 6, 6]
# The images of each batch of each rank: ranks have other numbers of batches, one has none.
CUTS: dict[int, list[list[range]]] = {
    1: [[range(0, 6), range(6, 12), range(12, 14)]],
    3: [[], [range(0, 4), range(4, 5), range(5, 9)], [range(9, 14)]],
}


def images() -> tuple[Tensor, Tensor]:
    """Unit embeddings and labels."""
    embeddings = F.normalize(torch.randn(len(LABELS), DIM, generator=torch.Generator().manual_seed(0)), dim=1)
    embeddings[13] = -embeddings[12]
    return embeddings, torch.tensor(LABELS)


def looped(embeddings: Tensor, labels: Tensor, unit_proxies_CND: Tensor) -> Tensor:
    """The class means of one process, class by class in float64."""
    num_classes, proxies_per_class, _ = unit_proxies_CND.shape
    result = unit_proxies_CND.double()
    for c in range(num_classes):
        mean = sum((e.double() for e, label in zip(embeddings, labels, strict=True) if label == c), torch.zeros(()))
        if not mean.any():
            continue
        mean = mean / mean.norm()
        for n in range(proxies_per_class):
            proxy = mean if proxies_per_class == 1 else mean + 0.1 * unit_proxies_CND[c, n].double()
            result[c, n] = proxy / proxy.norm()
    return result.float()


def class_means_on_rank(context: ParallelContext, proxies_per_class: int) -> Tensor:
    embeddings, labels = images()
    partition = ClassPartition(NUM_CLASSES, context.world_size, context.rank)
    proxies = initial_proxies(partition, proxies_per_class, DIM, seed=3, initialization="unit")
    batches = CUTS[context.world_size][context.rank]
    replace_by_class_means_(
        proxies,
        ((embeddings[list(ids)], labels[list(ids)]) for ids in batches),
        num_batches=len(batches),
        partition=partition,
        context=context,
    )
    return proxies


@pytest.mark.parametrize("proxies_per_class", [1, 3])
@pytest.mark.parametrize("world_size", [1, 3])
def test_class_means_are_those_of_a_plain_loop(world_size: int, proxies_per_class: int) -> None:
    unit = initial_proxies(ClassPartition(NUM_CLASSES), proxies_per_class, DIM, seed=3, initialization="unit")
    expected = looped(*images(), unit)
    got = torch.cat(run_ranks(class_means_on_rank, world_size, proxies_per_class))
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(got.norm(dim=2), torch.ones(NUM_CLASSES, proxies_per_class))
    assert torch.equal(got[2], unit[2])
    assert torch.equal(got[6], unit[6])
    if proxies_per_class == 1:
        torch.testing.assert_close(got[4, 0], images()[0][9])
    else:  # apart from each other, near the mean
        assert len(got.flatten(0, 1).unique(dim=0)) == NUM_CLASSES * proxies_per_class
        cosine = F.cosine_similarity(got[4], images()[0][9].expand(3, -1), dim=1)
        assert (0.99 < cosine).all()


def fail_on_rank_one(context: ParallelContext, problem: str) -> None:
    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        yield torch.ones(2, DIM), torch.zeros(2, dtype=torch.int64)
        if context.rank == 1:
            if problem == "damaged":
                raise ValueError("image 17 is damaged")
            yield torch.full((2, DIM), torch.nan), torch.zeros(2, dtype=torch.int64)

    proxies = torch.zeros(ClassPartition(4, 3, context.rank).num_local, 1, DIM)
    replace_by_class_means_(
        proxies,
        batches(),
        num_batches=2 if context.rank == 1 else 1,
        partition=ClassPartition(4, 3, context.rank),
        context=context,
    )


def errors_of(context: ParallelContext, problem: str) -> str:
    with pytest.raises(ValueError) as caught:  # noqa: PT011 (the test compares the messages of all ranks)
        fail_on_rank_one(context, problem)
    return str(caught.value)


@pytest.mark.parametrize(
    ("problem", "message"),
    [
        ("damaged", "image 17 is damaged (on rank 1)"),
        ("not finite", "expected finite embeddings to take class means of, got NaN or infinity"),
    ],
)
def test_what_goes_wrong_on_one_rank_is_raised_on_all(problem: str, message: str) -> None:
    errors = run_ranks(errors_of, 3, problem)
    assert len(set(errors)) == 1
    assert errors[0].startswith(message)


# Within a run

CLASS_SIZES = [3, 1, 4, 0, 2, 5, 2]


def test_class_means_are_taken_of_some_images_of_each_class_drawn_at_random() -> None:
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(7), [20, 1, 4, 0, 2, 5, 2]))
    ids = [some_of_each_class(labels, 4, seed=seed) for seed in range(200)]
    assert np.array_equal(ids[0], some_of_each_class(labels, 4, seed=0))
    for drawn in ids:
        assert (np.diff(drawn) > 0).all()
        assert np.bincount(labels[drawn], minlength=7).tolist() == [4, 1, 4, 0, 2, 4, 2]
    counts = np.bincount(np.concatenate(ids), minlength=len(labels))
    assert (counts[np.isin(labels, [1, 2, 4, 6])] == 200).all()
    assert (np.abs(counts[labels == 0] - 40) < 4 * np.sqrt(200 * 0.2 * 0.8)).all()
    assert (np.abs(counts[labels == 5] - 160) < 4 * np.sqrt(200 * 0.2 * 0.8)).all()


def configuration(root: Path, **changes: Any) -> Config:
    raw = {
        "name": "means",
        "runs_dir": str(root / "runs"),
        "data": {
            "shards": str(root / "shards"),
            "train_split": "test",  # the only one that the noise shards have
            "num_classes": len(CLASS_SIZES),
            "num_workers": 0,
            "train_transform": {"name": "affine_jitter", "size": 16, "degrees": 90.0, "contrast": 0.9},
            "test_transform": {"name": "resize", "size": 16},
        },
        "backbone": {"name": "small_cnn", "embedding_dim": 6, "options": {"width": 4}},
        "proxies": {"per_class": 2, "topk": 5, "initialization": "class_mean", "class_mean_images": 3},
        "optimizer": {"backbone_lr": 1e-3, "proxies_lr": 0.05, "proxies_name": "rowwise_adagrad"},
        "training": {"epochs": 1, "batch_size": 6, "max_steps": 1},
        "evaluation": {
            "batch_size": 2,
            "recall_at": [1],
            "kmeans_seeds": 0,
            "at_start": False,
            "allow_seen_classes": True,
        },
        "telemetry": {"progress_bar": False},
    }
    return parse_config(raw | changes, source="the test")


class Told:
    """Telemetry that keeps what it is told."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def say(self, text: str) -> None:
        self.said.append(text)


def class_means_of_a_run(context: ParallelContext, root: Path, zero_stage: int) -> tuple[Tensor, Tensor, list[str]]:
    """This rank's proxies, the whole bank by a plain loop, and what was said."""
    from dist_proxygml.data.index import open_index
    from dist_proxygml.data.pipeline import build_evaluation_loader
    from dist_proxygml.data.transforms import build_transform
    from dist_proxygml.evaluation.run import build_evaluation_model
    from dist_proxygml.training.class_means import start_from_class_means
    from dist_proxygml.training.step import build_train_state

    # threshold 0: ZeRO 3 partitions small parameters too, and so gathers them in every forward pass
    zero = {"stage": zero_stage, "stage3_param_persistence_threshold": 0}
    config = configuration(root, deepspeed={"zero_optimization": zero})
    index = open_index(config.data.shards, "test")
    state = build_train_state(config, context, steps_per_epoch=3)
    state.engine.module.train()
    weights = {name: value.clone() for name, value in state.engine.full_state_dict().items()}
    told = Told()
    start_from_class_means(state, index, told)  # type: ignore[arg-type]
    assert state.engine.module.training
    for name, value in state.engine.full_state_dict().items():  # neither weights nor running statistics
        assert torch.equal(value, weights[name]), name

    model = build_evaluation_model(config)
    model.load_state_dict(weights)
    model.eval()
    (whole,) = build_evaluation_loader(index, build_transform(config.data.test_transform), batch_size=100)
    with torch.no_grad():
        embeddings = model(whole.images)
    unit = initial_proxies(ClassPartition(len(CLASS_SIZES)), 2, 6, seed=config.seed, initialization="unit")
    ids = some_of_each_class(index.labels, 3, seed=config.seed)
    return state.loss.proxies.detach(), looped(embeddings[ids], whole.labels[ids], unit), told.said


@pytest.mark.timeout(240)
@pytest.mark.parametrize(("world_size", "zero_stage"), [(1, 0), (3, 0), (2, 3)])
def test_a_run_starts_from_the_class_means_of_its_training_images(
    tmp_path: Path, world_size: int, zero_stage: int
) -> None:
    write_noise_shards(tmp_path / "shards", CLASS_SIZES)  # 14 images, 7 batches: uneven over 2 ranks
    results = run_ranks(class_means_of_a_run, world_size, tmp_path, zero_stage, timeout=180)
    got, (_, expected, said) = torch.cat([proxies for proxies, _, _ in results]), results[0]
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-6)
    assert said == ["class means: 14 of 17 images of 7 classes through the initial backbone"]


def train_and_continue(context: ParallelContext, root: Path) -> list[int]:
    """The step at which each of three runs asked for class means."""
    from dist_proxygml.training import run as training

    asked: list[int] = []
    training.start_from_class_means = lambda state, *_: asked.append(state.step)  # type: ignore[assignment]
    training.train(configuration(root), context)
    assert asked == [0]
    training.train(configuration(root, training={"epochs": 1, "batch_size": 6, "max_steps": 2}), context)
    assert asked == [0]  # continued
    proxies = {"per_class": 2, "topk": 5, "initialization": "unit"}
    training.train(configuration(root, name="unit", proxies=proxies), context)
    return asked


@pytest.mark.timeout(240)
def test_only_a_new_run_that_asks_for_class_means_computes_them(tmp_path: Path) -> None:
    write_noise_shards(tmp_path / "shards", CLASS_SIZES)
    assert run_ranks(train_and_continue, 1, tmp_path, timeout=180) == [[0]]
    lines = (tmp_path / "runs" / "means" / "metrics.jsonl").read_text().splitlines()
    assert {json.loads(line)["step"] for line in lines} == {1, 2}
