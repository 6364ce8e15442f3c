"""Evaluation on one process: what is counted, what is refused, and that nothing around it changes a number."""

import json
import math
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.cluster import KMeans
from sklearn.metrics import normalized_mutual_info_score
from torch import Tensor, nn
from tqdm import tqdm

from dist_proxygml.config import ResizeConfig
from dist_proxygml.data.index import ShardIndex
from dist_proxygml.data.pipeline import Batch
from dist_proxygml.data.transforms import build_transform
from dist_proxygml.distributed.parallel import single_process
from dist_proxygml.evaluation import evaluator, search
from dist_proxygml.evaluation.embedding_pass import (
    EmbeddingTable,
    PassHooks,
    PassSettings,
    Split,
    check_table,
    embed,
    load_table,
    save_table,
)
from dist_proxygml.evaluation.evaluator import EvaluationResult, Roles, Settings, evaluate, evaluate_table
from dist_proxygml.evaluation.retrieval import SearchOptions, choose_placement
from dist_proxygml.protocols import PROTOCOLS
from tests.shards_of_noise import SIDE, Projection, write_noise_shards, write_query_and_gallery

CLASS_SIZES = [1, 9, 3, 1, 2, 5, 3, 13]  # two lone images, one class larger than the largest K
COPY_OF = {20: 3, 30: 3, 31: 7}


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> ShardIndex:
    return write_noise_shards(tmp_path_factory.mktemp("noise"), CLASS_SIZES, copy_of=COPY_OF)


def evaluated(
    model: nn.Module,
    index: ShardIndex,
    *,
    gallery: ShardIndex | None = None,
    kmeans_seeds: int = 5,
    preprocessing: dict[str, Any] | None = None,
    options: SearchOptions = SearchOptions(),  # noqa: B008
    say: Callable[[str], object] = lambda _: None,
    **settings: Any,
) -> EvaluationResult:
    transform = build_transform(ResizeConfig(name="resize", size=SIDE))
    return evaluate(
        model,
        Split(index),
        PassSettings(transform, batch_size=7, preprocessing=preprocessing),
        context=single_process(),
        gallery=None if gallery is None else Split(gallery),
        settings=Settings(kmeans_seeds=tuple(range(kmeans_seeds)), **settings),
        options=options,
        hooks=PassHooks(say=say),
    )


def table_of(embeddings: list[list[float]], labels: list[int]) -> EmbeddingTable:
    return EmbeddingTable(torch.tensor(embeddings), torch.tensor(labels), torch.arange(len(labels)))


def full_sort_metrics(table: EmbeddingTable, recall_at: tuple[int, ...]) -> dict[str, float]:
    """The definitions, query by query, in float64."""
    rows, labels = table.embeddings.numpy().astype(np.float64), table.labels.numpy()
    values: dict[str, list[float]] = {}
    for query in range(len(rows)):
        others = [other for other in range(len(rows)) if other != query]
        num_positives = sum(int(labels[other] == labels[query]) for other in others)
        if not num_positives:
            continue
        order = sorted(others, key=lambda other: (-round(float(rows[query] @ rows[other]), 7), other))
        hits = [int(labels[other] == labels[query]) for other in order]
        for k in recall_at:
            values.setdefault(f"recall@{k}", []).append(float(any(hits[:k])))
        precisions = [sum(hits[: i + 1]) / (i + 1) for i in range(num_positives) if hits[i]]
        values.setdefault("r_precision", []).append(sum(hits[:num_positives]) / num_positives)
        values.setdefault("map@r", []).append(sum(precisions) / num_positives)
    return {name: sum(numbers) / len(numbers) for name, numbers in values.items()}


def test_an_evaluation_gives_the_metrics_of_a_full_sort_and_counts_the_lone_images(
    index: ShardIndex,
) -> None:
    result = evaluated(Projection(), index, recall_at=(1, 2, 4))
    assert result.table is not None
    expected = full_sort_metrics(result.table, (1, 2, 4))
    assert 0.3 < expected["recall@1"] < 0.95  # neither hopeless nor solved
    found = {name: result.metrics[name] for name in expected}
    assert found == pytest.approx(expected, abs=1e-12)
    assert (result.num_images, result.num_classes, result.num_queries, result.num_lone) == (
        37,
        8,
        35,
        2,
    )
    assert result.recall_at_1_bounds == result.bounds["recall@1"]
    assert all(low <= result.metrics[name] <= high for name, (low, high) in result.bounds.items())


def test_prefixes_of_an_embedding_are_evaluated_as_embeddings(index: ShardIndex) -> None:
    result = evaluated(Projection(), index, recall_at=(2,), prefixes=(2, 5))
    assert result.table is not None
    for dim in (2, 5):
        cut = F.normalize(result.table.embeddings[:, :dim], dim=1)
        wanted = full_sort_metrics(result.table._replace(embeddings=cut), (1,))
        for name in ("recall@1", "map@r"):
            assert result.metrics[f"{name}_dim{dim}"] == pytest.approx(wanted[name], abs=1e-12)
    whole = evaluated(Projection(), index, recall_at=(2,))
    assert {k: v for k, v in result.metrics.items() if "_dim" not in k} == whole.metrics
    assert result.metrics["recall@1_dim2"] != result.metrics["recall@1_dim5"]
    assert result.fingerprint != whole.fingerprint


def test_hand_worked_example() -> None:
    # On a circle: a at 0 and 10 degrees, b at 12 and 90, one lone c at 1.
    angles = torch.deg2rad(torch.tensor([0.0, 10.0, 12.0, 90.0, 1.0]))
    table = EmbeddingTable(torch.stack([angles.cos(), angles.sin()], 1), torch.tensor([4, 4, 2, 2, 9]), torch.arange(5))
    result = evaluate_table(table, context=single_process(), settings=Settings(recall_at=(1, 2, 3), kmeans_seeds=()))
    # First right answers: image 0 at 2 (behind the lone image), 1 at 3, 2 at 4, 3 at 1. R = 1
    # everywhere.
    mean_of_inverses = math.fsum([1 / 2, 1 / 3, 1 / 4, 1]) / 4
    assert result.metrics == {
        "recall@1": 0.25,
        "recall@2": 0.5,
        "recall@3": 0.75,
        "r_precision": 0.25,
        "map@r": 0.25,
        "map": mean_of_inverses,
        "mrr": mean_of_inverses,
        "precision@1_macro": 0.25,
    }
    assert (result.num_queries, result.num_lone) == (4, 1)


def test_copies_of_an_image_under_another_label_are_not_taken_for_the_query_itself() -> None:
    # Images 0 and 1 are the same picture under two labels; 2 belongs to 0 and 3 to 1. The search
    # may return 0 before 1 for the query 1: who drops the first column as "self" then counts 1 as
    # its own right answer, and gets 0.5.
    rows = [[1.0, 0.0], [1.0, 0.0], [0.8, 0.6], [0.8, -0.6]]
    result = evaluate_table(
        table_of(rows, [0, 1, 0, 1]),
        context=single_process(),
        settings=Settings(recall_at=(1, 2), kmeans_seeds=()),
    )
    assert result.metrics["recall@1"] == 0.25  # 2 and 3 both find 0 before 1, its equal: right for 2, wrong for 3
    assert result.recall_at_1_bounds == (0.0, 0.5)


def at(*degrees: float) -> list[list[float]]:
    return [[math.cos(math.radians(one)), math.sin(math.radians(one))] for one in degrees]


def test_a_persons_images_by_the_querys_own_camera_are_no_answers() -> None:
    """Worked by hand. Person 1 asks from camera 1 at 0 degrees, person 2 from cameras 1 and 2; label 0 is a distractor.

    Ranking of person 1 without its image by camera 1 at 5 degrees: distractor, 1, 2, 1; AP (1/2 + 2/4) / 2.
    Person 2 from camera 1: right at once, AP 1. From camera 2 it has no other image, so it is not counted.
    """
    labels = [1, 2, 2, 1, 0, 1, 2, 1]
    cameras = np.array([1, 1, 2, 1, 1, 2, 2, 3])
    table = table_of(at(0, 31, 29, 5, 10, 20, 30, 40), labels)
    roles = Roles(torch.arange(8) < 3, torch.arange(8) >= 3)

    def measured(exclude_same: str | None, cameras_n: np.ndarray | None) -> EvaluationResult:
        settings = Settings(recall_at=(1, 2, 5), kmeans_seeds=(), exclude_same=exclude_same)
        return evaluate_table(table, context=single_process(), settings=settings, roles=roles, cameras_n=cameras_n)

    result = measured("camera", cameras)
    assert [result.metrics[f"recall@{k}"] for k in (1, 2, 5)] == [0.5, 1.0, 1.0]
    assert result.metrics["map"] == 0.75
    assert result.metrics["mrr"] == 0.75
    assert (result.num_queries, result.num_lone) == (2, 1)
    assert result.protocol["self"] == "left out by id, and images of its class by its own camera"
    without = measured(None, cameras)
    assert without.metrics["recall@1"] == 1.0
    assert (without.num_queries, without.protocol["self"]) == (3, "left out by id")
    assert without.fingerprint != result.fingerprint
    with pytest.raises(ValueError, match="the camera of every image, got none"):
        measured("camera", None)
    with pytest.raises(ValueError, match="one in the gallery by two cameras"):
        measured("camera", np.ones(8, int))


def test_images_that_search_each_other_leave_out_those_by_their_own_camera() -> None:
    # Without a gallery: each finds its copy by the same camera first, which does not count.
    table = table_of(at(0, 1, 40, 30), [0, 0, 0, 1])
    settings = Settings(recall_at=(1, 2), kmeans_seeds=(), exclude_same="camera")
    result = evaluate_table(table, context=single_process(), settings=settings, cameras_n=np.array([7, 7, 8, 7]))
    assert (result.num_queries, result.num_lone) == (3, 1)
    assert result.metrics["recall@1"] == 0.0  # the image at 30 degrees is nearer to all of them
    assert result.metrics["map"] == pytest.approx((1 / 2 + 1 / 2 + (1 / 2 + 2 / 3) / 2) / 3)  # rounding of a sum


@pytest.fixture(scope="module")
def query_and_gallery(tmp_path_factory: pytest.TempPathFactory) -> tuple[ShardIndex, ShardIndex]:
    return write_query_and_gallery(tmp_path_factory.mktemp("divided"), CLASS_SIZES)


def test_queries_are_searched_in_a_gallery_of_their_own(query_and_gallery: tuple[ShardIndex, ShardIndex]) -> None:
    query, gallery = query_and_gallery
    result = evaluated(Projection(), query, gallery=gallery, recall_at=(1, 3), kmeans_seeds=1)
    assert result.table is not None
    rows, labels = result.table.embeddings.double().numpy(), result.table.labels.numpy()
    assert labels.tolist() == [*query.labels.tolist(), *gallery.labels.tolist()]
    assert result.table.ids.tolist() == list(range(37))  # of both, so that no query leaves a gallery image out
    first_ranks = []
    for row, label in zip(rows[:13], labels[:13], strict=True):
        order = np.argsort(-(rows[13:] @ row), kind="stable")
        right = labels[13:][order] == label
        if right.any():
            first_ranks.append(1 + int(right.argmax()))
    assert result.metrics["recall@1"] == sum(rank == 1 for rank in first_ranks) / len(first_ranks)
    assert result.metrics["mrr"] == math.fsum(1 / rank for rank in first_ranks) / len(first_ranks)
    assert (result.num_images, result.num_queries, result.num_lone) == (37, len(first_ranks), 13 - len(first_ranks))
    assert result.protocol["num"]["gallery"] == 24
    assert result.protocol["data"]["gallery_split"] == "gallery"
    assert 0 < result.metrics["nmi"] < 1  # of queries and gallery together
    as_many = evaluated(Projection(), query, gallery=gallery, recall_at=(24,), kmeans_seeds=0)
    assert as_many.metrics == as_many.metrics | {"recall@24": 1.0}
    with pytest.raises(ValueError, match=r"1 to 24\b"):
        evaluated(Projection(), query, gallery=gallery, recall_at=(25,))


def test_whoever_looks_sees_how_far_the_embedding_pass_is(
    index: ShardIndex, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    at_once = {"delay": 0, "mininterval": 0, "disable": False}
    monkeypatch.setattr("dist_proxygml.evaluation.progress.tqdm", lambda **options: tqdm(**(options | at_once)))
    evaluated(Projection(), index, kmeans_seeds=0)
    assert re.search(r"embedding test: 100%.* 6/6 ", capsys.readouterr().err)  # 37 images in batches of 7


def test_a_gallery_of_other_classes_is_refused(
    index: ShardIndex, query_and_gallery: tuple[ShardIndex, ShardIndex], tmp_path: Path
) -> None:
    other = write_noise_shards(tmp_path, [3, 4])
    with pytest.raises(ValueError, match=r"'query' and 'test'.*classes"):
        evaluated(Projection(), query_and_gallery[0], gallery=other)
    with pytest.raises(ValueError, match=r"gallery .*'test'"):
        evaluated(Projection(), index, gallery=index.open_sibling("test"))


def test_a_published_protocol_insists_on_its_images(
    index: ShardIndex, query_and_gallery: tuple[ShardIndex, ShardIndex], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match=r"100 classes, 5,924 images.*\b8 classes, 37 images"):
        evaluated(Projection(), index, protocol="cub")
    query, gallery = query_and_gallery
    with pytest.raises(ValueError, match=r"12,612 gallery images.*\b8 classes, 13 images, 24 gallery images"):
        evaluated(Projection(), query, gallery=gallery, protocol="inshop")
    counts = PROTOCOLS["inshop"]._replace(num_classes=8, num_images=13, num_gallery=24)
    monkeypatch.setitem(PROTOCOLS, "inshop", counts)
    assert evaluated(Projection(), query, gallery=gallery, protocol="inshop").protocol["name"] == "inshop"


def legacy(rows: list[list[float]], labels: list[int], protocol: str, **options: Any) -> dict[str, float]:
    settings = Settings(recall_at=(1, 2), protocol=protocol, legacy_proxygml=True, **options)
    result = evaluate_table(table_of(rows, labels), context=single_process(), settings=settings)
    return {name: value for name, value in result.metrics.items() if name.startswith("legacy")}


def test_the_published_evaluation_counts_lone_images_as_misses_and_may_take_a_copy_for_the_query() -> None:
    # Images 0 and 1 are the same picture under two labels, 2 belongs to 0, 3 to 1, and 4 is alone.
    rows, labels = [[1.0, 0.0], [1.0, 0.0], [0.8, 0.6], [0.8, -0.6], [0.0, -1.0]], [0, 1, 0, 1, 2]
    # By id: first right answers of 0 to 3 at 2, 3, 1 and 2; the lone image has none.
    assert legacy(rows, labels, "cub", kmeans_seeds=()) == {"legacy_recall@1": 1 / 5, "legacy_recall@2": 3 / 5}
    # First of K + 1 dropped: query 1 loses its copy 0, stays itself, and counts as its own right answer.
    assert legacy(rows, labels, "sop", kmeans_seeds=()) == {"legacy_recall@1": 2 / 5, "legacy_recall@2": 4 / 5}


def test_the_published_nmi_is_that_of_its_own_k_means(index: ShardIndex) -> None:
    table = evaluated(Projection(), index).table
    assert table is not None
    rows, labels = table.embeddings.tolist(), table.labels.tolist()
    cub, sop = (legacy(rows, labels, protocol, kmeans_seeds=(0,))["legacy_nmi"] for protocol in ("cub", "sop"))
    clusters = search.cluster(table.embeddings.numpy(), num_clusters=8, seed=1234, num_iterations=20)
    expected = normalized_mutual_info_score(labels, clusters, average_method="geometric")
    assert sop == pytest.approx(expected, abs=1e-12)
    best = KMeans(8, n_init=10, random_state=0).fit(table.embeddings.numpy())
    assert cub == pytest.approx(normalized_mutual_info_score(labels, best.labels_), abs=1e-12)


def test_rows_that_are_not_of_unit_length_are_refused() -> None:
    with pytest.raises(ValueError, match=r"unit length.*2 in row 1"):
        evaluate_table(
            table_of([[1.0, 0.0], [2.0, 0.0]], [0, 0]),
            context=single_process(),
            settings=Settings(recall_at=(1,), kmeans_seeds=()),
        )


def test_every_way_to_search_gives_the_same_document(index: ShardIndex) -> None:
    said: list[str] = []
    expected = evaluated(Projection(), index, kmeans_seeds=1, say=said.append).to_json()
    assert len(said) == 1
    assert said[0].startswith("evaluation: a gallery of 37 x 6 float32 is searched where it lies")
    for options in (
        SearchOptions("counter"),
        SearchOptions(memory_budget=1),
        SearchOptions(placement="sharded", verify=True),
        SearchOptions(list_length=2),
    ):
        assert evaluated(Projection(), index, kmeans_seeds=1, options=options).to_json() == expected


def test_the_number_of_threads_changes_nothing(index: ShardIndex) -> None:
    threads = torch.get_num_threads()
    documents = set()
    for number in (1, 2, 3):
        torch.set_num_threads(number)
        documents.add(evaluated(Projection(), index, kmeans_seeds=2).to_json())
    torch.set_num_threads(threads)
    assert len(documents) == 1


@pytest.mark.parametrize(
    ("needed", "world_size", "choice"), [(50, 8, "replicated"), (51, 8, "sharded"), (90, 1, "replicated")]
)
def test_a_gallery_is_divided_when_it_does_not_fit_half_of_what_is_free(
    needed: int, world_size: int, choice: str
) -> None:
    assert choose_placement(needed, available=100, world_size=world_size) == choice


def test_kmeans_on_a_gpu_is_that_of_the_cpu_with_another_index(monkeypatch: pytest.MonkeyPatch) -> None:
    faiss = search.load_faiss()
    asked: list[tuple[int, int]] = []

    def on_gpu(kind: str, width: int, device: torch.device) -> tuple[object, Any]:
        assert kind == "GpuIndexFlatL2"
        asked.append((width, device.index))
        return object(), faiss.IndexFlatL2(width)

    points_nD = np.random.default_rng(0).standard_normal((200, 16), dtype=np.float32)
    cluster = partial(search.cluster, points_nD, num_clusters=8, seed=3, num_iterations=5)
    expected_n = cluster()
    monkeypatch.setattr(search, "_flat_on_gpu", on_gpu)
    assert np.array_equal(cluster(), expected_n)
    assert asked == []
    assert np.array_equal(cluster(device=torch.device("cuda", 3)), expected_n)
    assert asked == [(16, 3)]


def test_kmeans_on_a_gpu_is_named_in_the_protocol_where_there_is_one(
    index: ShardIndex, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = evaluated(Projection(), index, kmeans_seeds=1)
    assert evaluated(Projection(), index, kmeans_seeds=1, kmeans_on_gpu=True).to_json() == plain.to_json()
    monkeypatch.setattr(evaluator, "searches_on_gpu", lambda device: True)
    monkeypatch.setattr(search, "_flat_on_gpu", lambda _, width, device: ((), search.load_faiss().IndexFlatL2(width)))
    found = evaluated(Projection(), index, kmeans_seeds=1, kmeans_on_gpu=True)
    assert found.metrics == plain.metrics
    assert found.protocol["clustering"]["algorithm"].endswith(", points assigned on a GPU")


def test_clustering_reports_the_mean_and_the_deviation_over_the_seeds(index: ShardIndex) -> None:
    one, three, none = (evaluated(Projection(), index, kmeans_seeds=seeds) for seeds in (1, 3, 0))
    assert "nmi" not in none.metrics
    assert none.protocol["clustering"] is None
    assert one.metrics["nmi_sd"] == 0.0
    assert three.metrics["nmi_sd"] > 0.0
    assert 0.3 < three.metrics["nmi"] < 1.0
    assert {"ami", "ami_sd", "f1", "f1_sd"} < set(three.metrics)
    assert three.protocol["clustering"]["seeds"] == [0, 1, 2]


def test_the_modes_of_all_modules_are_restored(index: ShardIndex) -> None:
    model = Projection().train()
    model.frozen.eval()
    modes: list[tuple[bool, bool]] = []
    model.register_forward_pre_hook(lambda module, _: modes.append((module.training, torch.is_grad_enabled())))
    evaluated(model, index)
    assert set(modes) == {(False, False)}
    assert model.training
    assert not model.frozen.training


def test_autocast_around_it_changes_nothing(index: ShardIndex) -> None:
    plain = evaluated(Projection(), index)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = evaluated(Projection(), index)
    assert inside.to_json() == plain.to_json()


def test_scaled_outputs_are_brought_to_unit_length(index: ShardIndex) -> None:
    class Scaled(Projection):
        def forward(self, images: Tensor) -> Tensor:
            brightness_b1 = images.flatten(1).float().mean(dim=1, keepdim=True)
            return super().forward(images) * 2 ** (brightness_b1.round() % 5)  # powers of two round nothing

    assert evaluated(Scaled(), index).metrics == evaluated(Projection(), index).metrics


@pytest.mark.parametrize(
    ("value", "problem"),
    [(float("nan"), "not finite"), (float("inf"), "not finite"), (0.0, "zero")],
)
def test_unusable_embeddings_are_refused_with_the_ids_of_their_images(
    index: ShardIndex, value: float, problem: str
) -> None:
    class Spoiling(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.projection, self.seen = Projection(), 0

        def forward(self, images: Tensor) -> Tensor:
            embeddings = self.projection(images)
            for bad in (11, 36):
                if self.seen <= bad < self.seen + len(images):
                    embeddings[bad - self.seen] = value
            self.seen += len(images)
            return embeddings

    with pytest.raises(
        ValueError,
        match=rf"2 of 37 .*{problem}.*ids 11, 36.*test-000000\.tar",
    ):
        evaluated(Spoiling(), index)


def test_an_unusable_embedding_is_named_by_its_image_where_others_were_left_out() -> None:
    rows = torch.nn.functional.normalize(torch.ones(3, 2), dim=1)
    rows[1] = torch.nan
    table = EmbeddingTable(rows, torch.zeros(3, dtype=torch.int64), torch.tensor([1, 2, 3]))
    with pytest.raises(ValueError, match=r"1 of 4 .*finite.*ids 2\b.*image 2\b"):
        check_table(table, num_samples=4, num_left_out=1, describe=lambda number: f"image {number}")


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([0, 1, 1, 2], "missing ids: 3.*repeated ids: 1"),
        ([0, 1, 2], "3 rows.*missing ids: 3"),
        ([0, 1, 2, 3, 9], "unknown ids: 9"),
    ],
)
def test_a_loader_that_repeats_or_misses_images_is_refused(ids: list[int], message: str) -> None:
    images = torch.randint(0, 256, (len(ids), 3, SIDE, SIDE), dtype=torch.uint8)
    batch = Batch(images, torch.zeros(len(ids), dtype=torch.int64), torch.tensor(ids), len(ids), len(ids))
    with pytest.raises(ValueError, match=message):
        embed(Projection(), [batch], context=single_process(), num_samples=4)


def test_the_table_is_in_the_order_of_the_ids_whatever_the_order_of_the_batches() -> None:
    images = torch.randint(0, 256, (5, 3, SIDE, SIDE), dtype=torch.uint8)
    ids = [torch.tensor([3, 1]), torch.tensor([4, 0, 2])]
    batches = [Batch(images[part], part * 10, part, len(part), len(part)) for part in ids]
    table = embed(Projection(), batches, context=single_process(), num_samples=5)
    assert table.ids.tolist() == [0, 1, 2, 3, 4]
    assert table.labels.tolist() == [0, 10, 20, 30, 40]
    expected = torch.nn.functional.normalize(Projection()(images), dim=1)
    torch.testing.assert_close(table.embeddings, expected.detach())


@pytest.mark.parametrize("recall_at", [(1, 37), (0,), ()])
def test_a_recall_that_the_split_cannot_give_is_refused_before_embedding(
    index: ShardIndex, recall_at: tuple[int, ...]
) -> None:
    class NeverCalled(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            raise AssertionError("embedded before checking")

    with pytest.raises(ValueError, match=r"recall_at.*1 to 36\b"):
        evaluated(NeverCalled(), index, recall_at=recall_at)


def test_a_split_without_pairs_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="two images"):
        evaluated(Projection(), write_noise_shards(tmp_path, [1, 1, 1]), recall_at=(1,))


def test_the_result_comes_back_from_json_to_the_last_digit(index: ShardIndex) -> None:
    result = evaluated(Projection(), index, preprocessing={"name": "resize", "size": SIDE})
    again = EvaluationResult.from_json(result.to_json())
    assert again == result
    assert again.fingerprint == result.fingerprint
    assert json.loads(result.to_json())["protocol"]["data"]["index_sha256"] == index.sha256
    assert again.protocol["data"]["preprocessing"] == {"name": "resize", "size": SIDE}
    document = json.loads(result.to_json())
    document["recall_at_1_bounds"] = document.pop("bounds")["recall@1"]  # as earlier versions wrote it
    assert EvaluationResult.from_json(json.dumps(document)).recall_at_1_bounds == result.recall_at_1_bounds
    with pytest.raises(ValueError, match="JSON of an evaluation"):
        EvaluationResult.from_json('{"metrics": {}}')


def test_the_fingerprint_follows_the_protocol_and_not_the_numbers(index: ShardIndex) -> None:
    first, second, other = (
        evaluated(Projection(width), index, recall_at=k) for width, k in ((6, [1]), (5, [1]), (6, [2]))
    )
    assert first.metrics != second.metrics
    assert first.fingerprint == second.fingerprint != other.fingerprint


def test_a_table_survives_its_file(tmp_path: Path) -> None:
    table = table_of([[1.0, 0.0], [0.6, 0.8]], [3, 3])
    path = save_table(table, tmp_path / "embeddings" / "step-000800.npz")
    again = load_table(path)
    assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(again, table, strict=True))
    assert [file.name for file in path.parent.iterdir()] == ["step-000800.npz"]
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match="table of embeddings"):
        load_table(path)


@pytest.mark.parametrize(
    ("seen", "kind", "shown", "parts"),
    [
        ([], None, None, {}),
        ([False, False, False], "open", "3 unseen classes (open set)", {}),
        ([True, True, True], "closed", "3 seen classes (closed set)", {}),
        # Label 1 is trained; its images 0 and 1 find theirs at 2 and 3, the others at 4 and 1.
        ([False, True, True], "mixed", "2 seen and 1 unseen classes (mixed set)", {"seen": 0.0, "unseen": 0.5}),
    ],
)
def test_trained_classes_are_counted_and_of_mixed_ones_recall_is_given_apart(
    seen: list[bool], kind: str | None, shown: str | None, parts: dict[str, float]
) -> None:
    angles = torch.deg2rad(torch.tensor([0.0, 10.0, 12.0, 90.0, 1.0]))
    table = EmbeddingTable(torch.stack([angles.cos(), angles.sin()], 1), torch.tensor([1, 1, 0, 0, 2]), torch.arange(5))
    result = evaluate_table(
        table,
        context=single_process(),
        settings=Settings(recall_at=(1,), kmeans_seeds=()),
        seen_C=np.array(seen) if seen else None,
    )
    found = {name.removeprefix("recall@1_"): value for name, value in result.metrics.items() if "seen" in name}
    assert found == parts
    class_set = EvaluationResult.from_json(result.to_json()).class_set
    assert (class_set and class_set.kind) == kind
    assert (class_set and str(class_set)) == shown
    assert ("classes" in result.protocol) == bool(seen)
    assert (result.fingerprint == evaluate_unknown(table).fingerprint) == (not seen)


def evaluate_unknown(table: EmbeddingTable) -> EvaluationResult:
    return evaluate_table(table, context=single_process(), settings=Settings(recall_at=(1,), kmeans_seeds=()))


def test_whoever_follows_an_evaluation_hears_of_every_part_of_it(index: ShardIndex) -> None:
    heard: list[tuple[str, int, int]] = []
    evaluate(
        Projection(),
        Split(index),
        PassSettings(build_transform(ResizeConfig(name="resize", size=SIDE)), batch_size=7),
        context=single_process(),
        settings=Settings(recall_at=(1,), kmeans_seeds=(0, 1)),
        hooks=PassHooks(follower=lambda what, done, total: heard.append((what, done, total))),
    )
    assert heard[:7] == [("embedding test", done, 6) for done in range(7)]  # 37 images in batches of 7
    assert heard[-3:] == [("clustering", done, 2) for done in range(3)]
    assert ("searching", 35, 35) in heard
