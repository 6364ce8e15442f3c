"""The faiss part: exact scores, no subsampling in k-means, and one clear error when faiss is not usable."""

import ctypes
import importlib
import importlib.metadata
from typing import Any

import numpy as np
import pytest
import torch

from dist_proxygml.evaluation import search


def unit_rows(num_rows: int, width: int, seed: int = 0) -> np.ndarray:
    rows = np.random.default_rng(seed).normal(size=(num_rows, width)).astype(np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def test_search_returns_the_largest_inner_products_in_order() -> None:
    gallery, queries = unit_rows(57, 9), unit_rows(5, 9, seed=1)
    scores, ids = search.FlatIndex(gallery).search(queries, 7)
    exact = queries.astype(np.float64) @ gallery.astype(np.float64).T
    assert ids.tolist() == np.argsort(-exact, axis=1)[:, :7].tolist()
    np.testing.assert_allclose(scores, -np.sort(-exact, axis=1)[:, :7], atol=1e-6)  # float32 products of 9 terms


def test_search_never_returns_more_rows_than_there_are() -> None:
    scores, ids = search.FlatIndex(unit_rows(4, 3)).search(unit_rows(2, 3), 100)
    assert scores.shape == ids.shape == (2, 4)
    assert sorted(ids[0].tolist()) == [0, 1, 2, 3]


def numbers_at(pointer: Any, *shape: int, of: Any = ctypes.c_float) -> np.ndarray:
    return np.ctypeslib.as_array(ctypes.cast(int(pointer), ctypes.POINTER(of)), shape=shape)


def test_a_gallery_on_a_gpu_is_searched_where_it_lies(monkeypatch: pytest.MonkeyPatch) -> None:
    """What takes faiss's place reads the memory that it is shown, here the host's."""
    faiss, gallery = search.load_faiss(), torch.from_numpy(unit_rows(57, 9))
    shown: list[int] = []

    def compute(resources: Any, task: Any) -> None:
        assert task.vectorsRowMajor
        assert task.queriesRowMajor
        assert task.metric == faiss.METRIC_INNER_PRODUCT
        shown.append(int(task.vectors))
        rows = numbers_at(task.vectors, task.numVectors, task.dims)
        scores, ids = search.FlatIndex(rows).search(numbers_at(task.queries, task.numQueries, task.dims), task.k)
        numbers_at(task.outDistances, task.numQueries, task.k)[:] = scores
        numbers_at(task.outIndices, task.numQueries, task.k, of=ctypes.c_int64)[:] = ids

    monkeypatch.setattr(faiss, "bfKnn", compute, raising=False)
    monkeypatch.setattr(search, "_gpu_resources", object)
    monkeypatch.setattr(search, "searches_on_gpu", lambda device: True)
    searcher = search.build_searcher(gallery.numpy(), gallery)
    for queries in (unit_rows(5, 9, seed=1), unit_rows(9, 5, seed=1).T):
        on_host = search.FlatIndex(gallery.numpy()).search(queries, 7)
        for found, expected in zip(searcher.search(queries, 7), on_host, strict=True):
            np.testing.assert_array_equal(found, expected)
    assert set(shown) == {gallery.data_ptr()}
    assert searcher.search(unit_rows(2, 9), 100)[1].shape == (2, 57)


def test_clustering_finds_well_separated_groups_of_very_different_sizes() -> None:
    sizes = [1870, 20, 10]
    centres = np.eye(3, dtype=np.float32) * 100
    groups = np.repeat(np.arange(3), sizes)
    points = centres[groups] + np.random.default_rng(0).normal(size=(1900, 3)).astype(np.float32)
    clusters = [search.cluster(points, num_clusters=3, seed=seed, num_iterations=25) for seed in range(8)]
    found = [len(np.unique(groups * 10 + cluster)) for cluster in clusters]
    assert all(len(cluster) == 1900 for cluster in clusters)
    assert min(found) == 3  # some start finds exactly the groups


def test_clustering_depends_on_the_seed_alone() -> None:
    points = unit_rows(300, 8)
    first, again, other = (search.cluster(points, num_clusters=40, seed=seed, num_iterations=5) for seed in (3, 3, 4))
    assert first.tolist() == again.tolist()
    assert first.tolist() != other.tolist()


def test_clustering_uses_every_point(monkeypatch: pytest.MonkeyPatch) -> None:
    import faiss

    trained_on = []
    train = faiss.Clustering.train

    def counting_train(self, points, *rest):  # type: ignore[no-untyped-def]
        trained_on.append((len(points), self.max_points_per_centroid * self.k))
        return train(self, points, *rest)

    monkeypatch.setattr(faiss.Clustering, "train", counting_train)
    search.cluster(unit_rows(600, 4), num_clusters=2, seed=0, num_iterations=1)
    assert trained_on == [(600, 1200)]  # at faiss's default of 256 points a centroid only 512 would be used


def installed(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    def version(name: str) -> str:
        if name in names:
            return "1.15.1"
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", version)


def test_two_faiss_packages_are_refused_with_the_commands_that_help(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    installed(monkeypatch, "faiss-cpu", "faiss-gpu")
    with pytest.raises(ValueError, match=r"\b2: faiss-cpu 1\.15\.1, faiss-gpu 1\.15\.1") as error:
        search.load_faiss()
    assert "pip uninstall faiss-cpu faiss-gpu" in str(error.value)


def without_module(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def refuse(name: str) -> None:
        raise error

    monkeypatch.setattr(importlib, "import_module", refuse)


def test_no_faiss_package_is_refused_with_the_command_that_helps(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    installed(monkeypatch)
    without_module(monkeypatch, ImportError("No module named 'faiss'"))
    with pytest.raises(ValueError, match=r"pip install faiss-(cpu|gpu)"):
        search.load_faiss()


def test_a_faiss_package_that_does_not_start_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    installed(monkeypatch, "faiss-gpu")
    without_module(monkeypatch, RuntimeError("libcublas.so.12 not found"))
    with pytest.raises(ValueError, match=r"faiss-gpu 1\.15\.1.*libcublas"):
        search.load_faiss()
