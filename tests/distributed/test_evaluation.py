"""Evaluation gives the same result, to the last digit, for any number of ranks, and fails on all of
them together.

Starting ranks is what takes time here, so each number of ranks is started once and goes through all
scenes.
"""

import json
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from dist_proxygml.config import ResizeConfig
from dist_proxygml.data.damage import DamageLog
from dist_proxygml.data.index import open_index
from dist_proxygml.data.transforms import build_transform
from dist_proxygml.distributed.parallel import ParallelContext, single_process
from dist_proxygml.evaluation.embedding_pass import EmbeddingTable, PassSettings, Split
from dist_proxygml.evaluation.evaluator import EvaluationResult, Settings, evaluate, evaluate_table
from dist_proxygml.evaluation.retrieval import SearchOptions
from tests.harness import run_ranks
from tests.shards_of_noise import SIDE, Projection, write_noise_shards

CLASS_SIZES = [1, 9, 3, 1, 2, 5, 3, 13]  # 37 images
COPY_OF = {20: 3, 30: 3, 31: 7}
SPOILT = [4, 5, 6, 7, 36]


class Outcome(NamedTuple):
    """What one rank saw."""

    uneven: str  # 3 batches: two ranks share them unevenly
    idle: str  # 1 batch: the other ranks have none
    table: list[Tensor]
    close: str  # neighbours so close that the last bits of their scores decide
    not_finite: str  # the error, when the last rank's embeddings are not finite
    damaged: str  # the error, when the last rank cannot read an image
    left_out: str  # when damaged images of the first and the last rank are left out
    rest: str  # the metrics of the sound images alone
    too_many: str  # the error, when more are damaged than allowed


class Spoiling(Projection):
    """Embeds, and gives no number at all when told to."""

    def __init__(self, *, spoil: bool) -> None:
        super().__init__()
        self.spoil = spoil

    def forward(self, images: Tensor) -> Tensor:
        embeddings = super().forward(images)
        return embeddings * float("nan") if self.spoil else embeddings


def close_neighbours() -> EmbeddingTable:
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 90, (700,), generator=generator)
    rows = 1 + 1e-3 * torch.randn(700, 96, generator=generator)
    return EmbeddingTable(torch.nn.functional.normalize(rows, dim=1), labels, torch.arange(700))


def go_through_all_scenes(context: ParallelContext, directory: Path) -> Outcome:
    index = open_index(directory, "test")
    resize = build_transform(ResizeConfig(name="resize", size=SIDE))
    last = context.rank == context.world_size - 1

    def failing(images: list[Tensor], generators: object) -> Tensor:
        if last:
            raise ValueError("this image is damaged")
        return resize(images, ())

    uneven, idle = (
        evaluate(
            Projection(),
            Split(index),
            PassSettings(resize, batch_size=size),
            context=context,
            settings=Settings(recall_at=(1, 2, 4), kmeans_seeds=(0, 1, 2, 3)),
        )
        for size in (16, 100)
    )
    assert uneven.table is not None
    settings = Settings(recall_at=(1, 5), kmeans_seeds=(7, 3))
    options = SearchOptions(memory_budget=64_000, placement=("replicated", "sharded")[context.world_size % 2])
    close = evaluate_table(close_neighbours(), context=context, settings=settings, options=options)
    with pytest.raises(ValueError, match="finite") as not_finite:
        evaluate(Spoiling(spoil=last), Split(index), PassSettings(resize, batch_size=16), context=context)
    with pytest.raises(ValueError, match="damaged") as damaged:
        evaluate(Projection(), Split(index), PassSettings(failing, batch_size=16), context=context)

    # Every image of one batch is damaged, and one of the last.
    spoilt = open_index(directory / "spoilt", "test")

    def evaluate_spoilt(max_share: float) -> EvaluationResult:
        path = directory / f"damaged-{context.world_size}-{max_share}.jsonl"
        log = DamageLog(path, split="test", num_images=37, max_share=max_share, context=context)
        settings = Settings(recall_at=(1, 2, 4))
        how = PassSettings(resize, batch_size=4)
        return evaluate(Projection(), Split(spoilt, log), how, context=context, settings=settings)

    left_out = evaluate_spoilt(0.2)
    with pytest.raises(ValueError, match="damaged") as too_many:
        evaluate_spoilt(0.1)
    sound = torch.tensor([i for i in range(37) if i not in SPOILT])
    embeddings, labels, _ = (part[sound] for part in uneven.table)
    sound_rows = EmbeddingTable(embeddings, labels, torch.arange(len(sound)))
    rest = evaluate_table(sound_rows, context=context, settings=Settings(recall_at=(1, 2, 4)))
    assert left_out.table is not None
    assert left_out.table.ids.tolist() == sound.tolist()
    return Outcome(
        uneven.to_json(),
        idle.to_json(),
        list(uneven.table),
        close.to_json(),
        str(not_finite.value),
        str(damaged.value),
        left_out.to_json(),
        json.dumps(rest.metrics),
        str(too_many.value),
    )


@pytest.fixture(scope="module")
def alone_and_ranks(
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Outcome, dict[int, list[Outcome]]]:
    directory = tmp_path_factory.mktemp("noise")
    write_noise_shards(directory, CLASS_SIZES, copy_of=COPY_OF)
    spoilt = write_noise_shards(directory / "spoilt", CLASS_SIZES, copy_of=COPY_OF)
    for sample_id in SPOILT:
        row = spoilt.samples[sample_id]
        with open(spoilt.shard_paths[row["shard"]], "r+b") as shard:
            shard.seek(int(row["offset"]) + 30)
            shard.write(b"?!")
    ranks = {size: run_ranks(go_through_all_scenes, size, directory) for size in (1, 2, 3)}
    return go_through_all_scenes(single_process(), directory), ranks


Runs = tuple[Outcome, dict[int, list[Outcome]]]


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("scene", ["uneven", "idle", "close", "left_out"])
def test_the_result_is_the_same_for_any_number_of_ranks(alone_and_ranks: Runs, scene: str, world_size: int) -> None:
    alone, ranks = alone_and_ranks
    assert [getattr(outcome, scene) for outcome in ranks[world_size]] == [getattr(alone, scene)] * world_size


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_every_rank_ends_with_the_whole_table(alone_and_ranks: Runs, world_size: int) -> None:
    alone, ranks = alone_and_ranks
    assert alone.table[0].shape == (37, 6)
    for outcome in ranks[world_size]:
        assert all(torch.equal(a, b) for a, b in zip(outcome.table, alone.table, strict=True))


@pytest.mark.parametrize(("world_size", "ids"), [(2, "ids 16, 17, 18"), (3, "ids 32, 33, 34")])
def test_embeddings_that_are_not_finite_stop_all_ranks_with_the_same_words(
    alone_and_ranks: Runs, world_size: int, ids: str
) -> None:
    messages = {outcome.not_finite for outcome in alone_and_ranks[1][world_size]}
    assert len(messages) == 1
    assert ids in messages.pop()


@pytest.mark.parametrize("world_size", [2, 3])
def test_a_damaged_image_stops_all_ranks_with_the_same_words(alone_and_ranks: Runs, world_size: int) -> None:
    messages = {outcome.damaged for outcome in alone_and_ranks[1][world_size]}
    assert len(messages) == 1
    assert f"on rank {world_size - 1}" in messages.pop()


@pytest.mark.parametrize("world_size", [1, 3])
def test_damaged_images_that_are_left_out_are_counted_and_change_nothing_else(
    alone_and_ranks: Runs, world_size: int
) -> None:
    for outcome in alone_and_ranks[1][world_size]:
        result = json.loads(outcome.left_out)
        assert (result["num_images"], result["num_damaged"]) == (32, 5)
        assert result["protocol"]["data"]["left_out"] == SPOILT
        assert result["metrics"] == json.loads(outcome.rest)
        assert result["fingerprint"] != json.loads(outcome.uneven)["fingerprint"]


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_too_many_damaged_images_stop_all_ranks_with_the_same_words(alone_and_ranks: Runs, world_size: int) -> None:
    messages = {outcome.too_many for outcome in alone_and_ranks[1][world_size]}
    assert len(messages) == 1
    assert "5 of 37 images are damaged" in messages.pop()


def search_in_every_way(context: ParallelContext) -> list[tuple[str, ...]]:
    """Documents of one table, which must all be one: with copies, lone images, tiny tiles, and by both searches; as
    published and without the query's own camera.
    """
    table = close_neighbours()
    table.embeddings[100:140] = table.embeddings[7]
    cameras_n = np.arange(700) % 3
    published = Settings(recall_at=(1, 5, 400), kmeans_seeds=(), protocol="sop", legacy_proxygml=True)
    by_camera = Settings(recall_at=(1, 5), kmeans_seeds=(), exclude_same="camera")
    ways = [
        SearchOptions(search, placement, memory_budget, list_length=list_length)
        for search, placement, memory_budget, list_length in (
            ("faiss", "sharded", 1 << 28, 5),
            ("faiss", "replicated", 100_000, 5),
            ("counter", "sharded", 100_000, 64),
        )
    ]
    return [
        tuple(
            evaluate_table(table, context=context, settings=settings, cameras_n=cameras_n, options=way).to_json()
            for settings in (published, by_camera)
        )
        for way in ways
    ]


def test_no_way_to_share_out_the_search_changes_the_result() -> None:
    expected = search_in_every_way(single_process())
    assert len(set(expected)) == 1
    metrics, by_camera = (json.loads(document)["metrics"] for document in expected[0])
    assert 0 < by_camera["map"] < metrics["map"]
    assert 0 < metrics["map"] < 1
    assert 0 < metrics["legacy_recall@1"] < 1
    for world_size in (2, 3, 7):
        assert run_ranks(search_in_every_way, world_size) == [expected] * world_size
