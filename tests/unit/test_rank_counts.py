"""Ranks of right answers, counted in lists and by sweeps, against a full sort of exact scores in Python integers."""

import weakref
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dist_proxygml.distributed.parallel import single_process
from dist_proxygml.evaluation import rank_counts, retrieval
from dist_proxygml.evaluation.exact import error_bound, float32_products, round_rows, scores_of_block, scores_of_pairs
from dist_proxygml.evaluation.metrics import NEVER
from dist_proxygml.evaluation.rank_counts import in_tiles
from dist_proxygml.evaluation.retrieval import Images, Retrieval, SearchOptions, retrieve

TOLERANCE = 1e-6
UNIT = 1 << 26


def unit_rows(num_rows: int, width: int, seed: int = 0, *, spread: float = 1.0) -> np.ndarray:
    generator = np.random.default_rng(seed)
    rows = np.eye(1, width) + spread * generator.normal(size=(num_rows, width))
    return round_rows((rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32))


def problem(seed: int, *, num_images: int = 0) -> Images:
    """Classes of 1 to 400 images, exact copies inside and across classes, images that differ in the last bit, and for
    every third seed an embedding that has collapsed; for some a query split and a gallery split, for some cameras.
    """
    generator = np.random.default_rng(seed)
    num_images = num_images or int(generator.integers(5, 90))
    largest = min(400, num_images // 2)
    labels = np.concatenate([np.zeros(largest, int), generator.integers(1, num_images, num_images - largest)])
    _, labels = np.unique(generator.permutation(labels), return_inverse=True)
    rows = unit_rows(num_images, int(generator.integers(2, 40)), seed, spread=(1.0, 0.3, 1e-4)[seed % 3])
    copies = generator.integers(0, num_images, (num_images // 4, 2))
    rows[copies[:, 0]] = rows[copies[:, 1]]
    nudged = generator.integers(0, num_images, num_images // 8)
    rows[nudged, 0] = np.rint(rows[nudged, 0] * UNIT + generator.integers(-1, 2, len(nudged))) / UNIT
    is_query, is_gallery = np.ones(num_images, bool), np.ones(num_images, bool)
    if seed % 4 == 1:
        is_query = np.arange(num_images) < num_images // 3
        is_gallery = ~is_query
    cameras = generator.integers(0, 1 + seed % 5, num_images) if seed % 5 else None  # from one camera for all to five
    return Images(rows, labels, is_query, is_gallery, cameras)


def full_sort(images: Images, tolerance: float = TOLERANCE) -> dict[int, Any]:
    """Per query: ranks of its right answers in the exact order, at worst and at best, and the place of the first in a
    search that drops its first result; by sorting all images of the gallery.
    """
    components = np.rint(images.rows.astype(np.float64) * UNIT).astype(np.int64)
    assert (components == images.rows.astype(np.float64) * UNIT).all()
    wide = components  # sums of products stay below 2^53, by Cauchy and Schwarz
    slack = round(tolerance * 2.0**52)
    found = {}
    for query in np.flatnonzero(images.is_query):
        gallery = np.flatnonzero(images.is_gallery)
        if images.cameras is not None:  # images of the query's class by its own camera are nowhere
            own = (images.labels == images.labels[query]) & (images.cameras == images.cameras[query])
            gallery = np.flatnonzero(images.is_gallery & ~own)
        score = dict(zip(gallery.tolist(), (wide[gallery] @ wide[query]).tolist(), strict=True))
        order = sorted(score, key=lambda other: (-score[other], other))
        right = [other for other in order if other != query and images.labels[other] == images.labels[query]]
        wrong = [other for other in order if images.labels[other] != images.labels[query]]
        place = {other: i for i, other in enumerate(other for other in order if other != query)}
        wrong_scores = np.array([score[other] for other in wrong])
        ranks = [
            (
                1 + place[answer],
                1 + j + int((wrong_scores >= score[answer] - slack).sum()),
                1 + j + int((wrong_scores > score[answer] + slack).sum()),
            )
            for j, answer in enumerate(right)
        ]
        kept = [images.labels[other] == images.labels[query] for other in order[1:]]
        found[int(query)] = ranks, 1 + kept.index(True) if True in kept else None
    return found


def assert_is_full_sort(found: Retrieval, images: Images, *, check_dropped: bool = True) -> None:
    expected = full_sort(images)
    assert found.position.tolist() == [query for query, (ranks, _) in expected.items() if ranks]
    for row, query in enumerate(found.position.tolist()):
        ranks, _ = expected[query]
        num_right = len(ranks)
        for column, scores in enumerate((found.exact, found.worst, found.best)):
            of_query = [rank[column] for rank in ranks]
            precisions = [(j + 1) / rank for j, rank in enumerate(of_query)]
            within = [rank <= num_right for rank in of_query]
            # bincount adds in order, as Python's sum does here: the same float64 numbers
            assert scores.first_rank[row] == of_query[0]
            assert scores.r_precision[row] == sum(within) / num_right
            assert scores.map[row] == _in_order(precisions) / num_right
            assert (
                scores.map_at_r[row] == _in_order([p * w for p, w in zip(precisions, within, strict=True)]) / num_right
            )
    if check_dropped and found.first_column_dropped is not None:
        places = [NEVER if place is None else place for _, place in expected.values()]
        assert found.first_column_dropped.tolist() == [float(place) for place in places]


def _in_order(values: list[float]) -> float:
    total = 0.0
    for value in values:
        total += value
    return total


def retrieved(images: Images, **options: Any) -> Retrieval:
    return retrieve(
        images,
        with_self=images.cameras is None,
        tolerance=TOLERANCE,
        context=single_process(),
        options=SearchOptions(**options),
    )


@settings(max_examples=150, deadline=None)
@given(
    st.integers(0, 10**6),
    st.sampled_from(["faiss", "counter"]),
    st.sampled_from([2, 5, 64]),
    st.sampled_from([1, 6_000, 1 << 24]),
    st.sampled_from([0, 64]),
)
def test_ranks_are_those_of_a_full_sort(
    seed: int, search: str, list_length: int, memory_budget: int, most_near: int
) -> None:
    images = problem(seed)
    with patch.object(rank_counts, "MOST_NEAR", most_near):  # 0: whole rows are computed exactly
        found = retrieved(images, search=search, list_length=list_length, memory_budget=memory_budget)
    assert_is_full_sort(found, images)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_ranks_in_classes_of_hundreds_are_those_of_a_full_sort(seed: int) -> None:
    images = problem(seed, num_images=800)
    assert np.bincount(images.labels).max() == 400
    assert_is_full_sort(retrieved(images, verify=True), images)


def test_small_blocks_give_the_same_counts_as_large_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    """Columns of a sweep, columns of an exact row, and rows that are computed exactly because much is close."""
    images = problem(2, num_images=300)  # collapsed
    expected = retrieved(images, search="counter")
    monkeypatch.setattr(rank_counts, "COLUMNS", 70)
    monkeypatch.setattr(rank_counts, "EXACT_COLUMNS", 13)
    monkeypatch.setattr(rank_counts, "MOST_NEAR", 5)
    calls = []
    count_exactly = rank_counts._count_exactly
    monkeypatch.setattr(rank_counts, "_count_exactly", lambda *arguments: (calls.append(1), count_exactly(*arguments)))
    for options in ({"search": "counter"}, {"list_length": 3, "memory_budget": 40_000}):
        calls.clear()
        found = retrieved(images, **options)
        assert len(calls) > 2
        for ours, theirs in zip(found[1:4], expected[1:4], strict=True):
            for a, b in zip(ours, theirs, strict=True):
                np.testing.assert_array_equal(a, b)


def test_the_count_for_gpus_is_the_count_for_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    for seed in range(4):
        images = problem(seed, num_images=200)
        expected = retrieved(images, search="counter")
        with monkeypatch.context() as replaced:
            replaced.setattr(rank_counts, "_count_rows", rank_counts.count_rows_on_device)
            found = retrieved(images, search="counter")
        for ours, theirs in zip(found[1:4], expected[1:4], strict=True):
            for a, b in zip(ours, theirs, strict=True):
                np.testing.assert_array_equal(a, b)


def test_scores_are_exact_in_any_order() -> None:
    rows = unit_rows(50, 333)
    exact = rows.astype(np.float64) * UNIT
    wide = exact.astype(np.int64).astype(object)
    expected = (wide @ wide.T).astype(np.float64) / 2.0**52
    assert (np.abs(expected) < 1.02).all()
    np.testing.assert_array_equal(scores_of_block(rows, rows), expected)
    np.testing.assert_array_equal(torch.from_numpy(rows).double() @ torch.from_numpy(rows).double().T, expected)
    left, right = np.indices((50, 50)).reshape(2, -1)
    np.testing.assert_array_equal(scores_of_pairs(rows, rows, left, right), expected.ravel())
    np.testing.assert_array_equal(scores_of_block(rows[:, ::-1], rows[:, ::-1]), expected)


@pytest.mark.parametrize("width", [3, 512, 4096])
def test_float32_products_stay_within_the_error_bound(width: int) -> None:
    rows = unit_rows(200, width, spread=0.01)
    with float32_products(torch.device("cpu")):
        products = torch.from_numpy(rows) @ torch.from_numpy(rows).T
    worst = np.abs(products.numpy() - scores_of_block(rows, rows)).max()
    assert 0 < worst < error_bound(width)


def test_rounding_changes_a_row_by_less_than_float32_does_and_only_once() -> None:
    rows = np.random.default_rng(0).normal(size=(100, 64)).astype(np.float32)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    rounded = round_rows(rows)
    assert rounded.dtype == np.float32
    assert 0 < np.abs(rounded - rows).max() <= 2.0**-27
    np.testing.assert_array_equal(round_rows(rounded), rounded)
    with pytest.raises(ValueError, match=r"unit length.*2 in row 7"):
        round_rows(np.where(np.arange(100)[:, None] == 7, 2, 1) * rows)


def test_products_in_lower_precision_around_it_change_nothing() -> None:
    images = problem(3, num_images=200)
    expected = retrieved(images)
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = retrieved(images, search="counter")
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")
    np.testing.assert_array_equal(found.exact.map, expected.exact.map)


def test_scores_of_lower_precision_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    build = retrieval.build_searcher

    class Coarse:
        def __init__(self, rows: np.ndarray, device: torch.device) -> None:
            self.searcher = build(rows, device)

        def search(self, queries: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
            scores, rows = self.searcher.search(queries, length)
            return torch.from_numpy(scores).bfloat16().float().numpy(), rows

    monkeypatch.setattr(retrieval, "build_searcher", Coarse)
    with pytest.raises(RuntimeError, match="precision"):
        retrieved(problem(3, num_images=200))


def test_two_ways_that_disagree_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    images = problem(0, num_images=60)
    decide = rank_counts._count_in_lists

    def forgetful(*arguments: Any) -> np.ndarray:
        counted = decide(*arguments)
        arguments[5][:] += 1
        return counted

    monkeypatch.setattr(rank_counts, "_count_in_lists", forgetful)
    with pytest.raises(RuntimeError, match="faiss and counter"):
        retrieved(images, verify=True)


def failing_above(size: int, error: Exception, done: list[tuple[int, int]]) -> Callable[[int, int], None]:
    def work(start: int, stop: int) -> None:
        if stop - start > size:
            raise error
        done.append((start, stop))

    return work


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA"), RuntimeError("cudaMalloc: out of memory")])
def test_a_tile_that_does_not_fit_is_halved_until_it_does_and_says_so(error: Exception) -> None:
    done: list[tuple[int, int]] = []
    said: list[str] = []
    in_tiles(23, 16, failing_above(5, error, done), said.append)
    assert done == [(0, 4), (4, 8), (8, 12), (12, 16), (16, 20), (20, 23)]
    assert len(said) == 2
    assert "continuing with 4" in said[1]


def test_memory_is_given_back_after_the_tensors_of_the_failure_are_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[weakref.ref[torch.Tensor]] = []
    were_alive: list[bool] = []

    def work(start: int, stop: int) -> None:
        scores = torch.zeros(stop - start)
        made.append(weakref.ref(scores))
        if stop - start > 4:
            raise torch.OutOfMemoryError("CUDA")

    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: were_alive.append(made[-1]() is not None))
    in_tiles(8, 8, work)
    assert were_alive == [False]


def test_other_errors_and_a_single_query_that_does_not_fit_are_raised() -> None:
    with pytest.raises(RuntimeError, match="kernel"):
        in_tiles(8, 8, failing_above(1, RuntimeError("kernel"), []))
    with pytest.raises(torch.OutOfMemoryError):
        in_tiles(8, 8, failing_above(0, torch.OutOfMemoryError("CUDA"), []))
