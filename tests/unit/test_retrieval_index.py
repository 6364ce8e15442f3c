"""An index finds what a full sort finds, says how much of it, and comes back from disk the same or not at all."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dist_proxygml import Index
from dist_proxygml.data.sources import ImageRecord
from dist_proxygml.evaluation.search import load_faiss
from dist_proxygml.index import main
from dist_proxygml.inference.retrieval_index import FLAT_BELOW, HNSW_BELOW, choose_kind, count_lists
from dist_proxygml.storage import folder as folder_module

ROOT = Path(__file__).parents[2]
KINDS = ("flat", "ivf", "hnsw")


def unit_rows(num_rows: int, dim: int, *, seed: int = 0, num_centres: int = 40) -> np.ndarray:
    """Rows around centres, as the embeddings of classes lie."""
    generator = np.random.default_rng(seed)
    centres = generator.normal(size=(num_centres, dim))
    rows = centres[generator.integers(0, num_centres, num_rows)] + 0.5 * generator.normal(size=(num_rows, dim))
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def full_sort(rows: np.ndarray, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    scores = queries.astype(np.float64) @ rows.T.astype(np.float64)
    order = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(scores, order, 1), order


ROWS = unit_rows(3000, 16)
NAMES = [f"images/{number}.jpg" for number in range(len(ROWS))]
QUERIES = unit_rows(50, 16, seed=1)


@pytest.fixture(scope="module", params=KINDS)
def index(request: pytest.FixtureRequest) -> Index:
    return Index.build(ROWS, NAMES, kind=request.param)


def test_the_nearest_are_those_of_a_full_sort(index: Index) -> None:
    scores, order = full_sort(ROWS, QUERIES, 10)
    result = index.search(QUERIES, 10)
    assert result.scores.shape == result.rows.shape == (50, 10)
    assert (np.diff(result.scores, axis=1) <= 0).all()
    assert result.ids == [[NAMES[row] for row in rows] for rows in result.rows.tolist()]
    exact_scores = np.einsum("qkd,qd->qk", ROWS[result.rows], QUERIES)
    np.testing.assert_allclose(result.scores, exact_scores, atol=1e-6)  # those of the rows, whatever the kind
    if index.kind == "flat":
        np.testing.assert_array_equal(result.rows, order)
        np.testing.assert_allclose(result.scores, scores, atol=1e-6)
    else:
        found = np.mean([len(set(a) & set(b)) / 10 for a, b in zip(result.rows.tolist(), order.tolist(), strict=True)])
        assert found > 0.9


def test_a_search_never_comes_back_short(index: Index) -> None:
    result = index.search(QUERIES[:3], 5000)
    assert result.rows.shape == (3, 3000)
    for rows in result.rows.tolist():
        assert sorted(rows) == list(range(3000))
    assert index.search(QUERIES[0], 1).rows.shape == (1, 1)  # one query needs no further dimension


def test_a_wide_search_leaves_the_effort_of_the_next_one_as_it_was(index: Index) -> None:
    before = dict(index.parameters)
    narrow = index.search(QUERIES[:3], 5)
    index.search(QUERIES[:3], 5000)
    assert index.parameters == before
    np.testing.assert_array_equal(index.search(QUERIES[:3], 5).rows, narrow.rows)


def test_an_index_works_beside_a_package_that_teaches_faiss_tensors() -> None:
    """It replaces methods of all indexes, in its own process here."""
    program = "import faiss.contrib.torch_utils, tests.unit.test_retrieval_index as t; t.search_far()"
    command = [sys.executable, "-c", program]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=180, check=False)
    assert (done.returncode, done.stdout) == (0, "".join(f"{kind} 3000\n" for kind in KINDS)), done.stderr


def search_far() -> None:
    rows = unit_rows(3000, 16)
    for kind in KINDS:
        found = Index.build(rows, [str(number) for number in range(3000)], kind=kind).search(rows[:2], 3000)
        print(kind, len(set(found.rows[0].tolist())))


def test_equal_scores_go_by_row_number() -> None:
    rows = np.repeat(np.eye(4, dtype=np.float32), 5, axis=0)
    for kind in KINDS:
        result = Index.build(rows, [str(number) for number in range(20)], kind=kind).search(rows[5:6], 7)
        assert result.rows[0, :5].tolist() == [5, 6, 7, 8, 9], kind
        np.testing.assert_allclose(result.scores[0], [1, 1, 1, 1, 1, 0, 0], atol=1e-6)


@pytest.mark.parametrize("kind", ["ivf", "hnsw"])
def test_the_recall_that_is_told_is_what_a_count_gives(kind: str) -> None:
    rows = unit_rows(2000, 24, num_centres=2000)  # without clusters: hard for lists
    low = Index.build(rows, map_names(rows), kind=kind, target_recall=0.01)
    high = Index.build(rows, map_names(rows), kind=kind, target_recall=0.99)
    for index in (low, high):
        sampled = np.sort(np.random.default_rng(0).choice(2000, 256, replace=False))
        _, exact = full_sort(rows, rows[sampled], 11)
        found = index.search(rows[sampled], 11).rows
        counted = []
        for query, a, b in zip(sampled.tolist(), exact.tolist(), found.tolist(), strict=True):
            counted.append(len(({*a} - {query}) & ({*b} - {query})) / 10)
        assert index.recall_at_10 == pytest.approx(np.mean(counted), abs=1e-9)
    effort = {"ivf": "num_probes", "hnsw": "search_width"}[kind]
    assert high.recall_at_10 >= 0.99
    assert high.parameters[effort] >= low.parameters[effort]
    if kind == "ivf":
        assert low.recall_at_10 < 0.9  # so the number can be low
        assert high.parameters[effort] > low.parameters[effort]


def map_names(rows: np.ndarray) -> list[str]:
    return [str(number) for number in range(len(rows))]


def test_what_is_saved_comes_back_the_same(index: Index, tmp_path: Path) -> None:
    saved = Index.build(
        ROWS,
        [ImageRecord(name, 3, "é") for name in NAMES],
        kind=index.kind,
        model={"run": "r"},
        data={"kind": "folder"},
    )
    manifest = saved.save(tmp_path / "i")
    assert sorted(path.name for path in (tmp_path / "i").iterdir()) == ["ids.jsonl", "index.faiss", "manifest.json"]
    assert manifest["index"]["kind"] == index.kind
    loaded = Index.load(tmp_path / "i")
    assert (loaded.kind, loaded.parameters, loaded.recall_at_10) == (index.kind, index.parameters, index.recall_at_10)
    assert (loaded.model, loaded.data, loaded.records[5]) == (
        {"run": "r"}, {"kind": "folder"}, ImageRecord("images/5.jpg", 3, "é"),
    )  # fmt: skip
    for expected, got in zip(index.search(QUERIES, 7), loaded.search(QUERIES, 7), strict=True):
        np.testing.assert_array_equal(got, expected)
    with pytest.raises(ValueError, match="--overwrite"):
        saved.save(tmp_path / "i")
    saved.save(tmp_path / "i", overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["i"]


def test_an_index_of_other_rows_than_its_manifest_says_is_refused(tmp_path: Path) -> None:
    Index.build(ROWS[:50], NAMES[:50]).save(tmp_path / "i")
    path = tmp_path / "i" / "manifest.json"
    manifest = json.loads(path.read_text())
    for name in ("num_rows", "embedding_dim"):
        path.write_text(json.dumps(manifest | {name: 3}))
        with pytest.raises(ValueError, match=r"\bi is damaged.*\[50, .*\b3\b"):
            Index.load(tmp_path / "i")


@pytest.mark.parametrize("recall", [0, 1.5, float("nan")])
def test_a_recall_that_no_search_can_have_is_refused(recall: float) -> None:
    with pytest.raises(ValueError, match="target_recall"):
        Index.build(ROWS[:50], NAMES[:50], kind="ivf", target_recall=recall)


def test_a_damaged_index_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Index.build(ROWS[:50], NAMES[:50]).save(tmp_path / "i")
    verify = ["--verify", "--out", str(tmp_path / "i")]
    for name in ("index.faiss", "ids.jsonl"):
        path = tmp_path / "i" / name
        content = path.read_bytes()
        path.write_bytes(content[:-1])
        with pytest.raises(ValueError, match=rf"\bi is damaged.*{name}.* bytes"):
            Index.load(tmp_path / "i")
        place = content.rindex(b"9.jpg") if name == "ids.jsonl" else len(content) - 1
        path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        assert len(Index.load(tmp_path / "i")) == 50  # of the size that it had: only a look at every byte sees it
        with pytest.raises(ValueError, match=rf"\bi is damaged.*{name}.*sha256"):
            Index.load(tmp_path / "i", verify=True)
        assert main(verify) == 2
        assert f"i is damaged: {name} has sha256" in capsys.readouterr().err
        path.write_bytes(content)
    assert main(verify) == 0
    assert "flat index of 50 rows, every byte as it was written" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"dist-proxygml-search-index.*none\b"):
        Index.load(tmp_path / "none")
    (tmp_path / "i" / "manifest.json").unlink()
    with pytest.raises(ValueError, match=r"manifest\.json"):
        Index.load(tmp_path / "i")


def test_opening_an_index_hashes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Index.build(ROWS[:50], NAMES[:50]).save(tmp_path / "i")
    monkeypatch.setattr(folder_module, "sha256_of", lambda path: pytest.fail(f"{path} is hashed"))
    assert len(Index.load(tmp_path / "i")) == 50


def put_into(folder: Path, faiss_index: Any) -> None:
    """Take a faiss index in the place of an index's own, and mend the manifest."""
    load_faiss().write_index(faiss_index, str(folder / "index.faiss"))
    content = (folder / "index.faiss").read_bytes()
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"]["index.faiss"] = {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
    (folder / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize("kind", KINDS)
def test_a_faiss_file_of_another_kind_is_refused_before_faiss_reads_it(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    faiss = load_faiss()
    rows, dim = ROWS[:200], 16
    Index.build(rows, NAMES[:200], kind=kind).save(tmp_path / "i")
    lists_on_disk = faiss.IndexIVFFlat(faiss.IndexFlatIP(dim), dim, 4, faiss.METRIC_INNER_PRODUCT)
    lists_on_disk.train(rows)
    lists = faiss.OnDiskInvertedLists(4, 4 * dim, str(tmp_path / "elsewhere"))
    lists_on_disk.replace_invlists(lists)
    lists_on_disk.add(rows)
    graph = faiss.IndexHNSWFlat(dim, 32, faiss.METRIC_INNER_PRODUCT)
    graph.add(rows)
    beyond = faiss.vector_to_array(graph.hnsw.neighbors)
    beyond[0] = 200
    faiss.copy_array_to_vector(beyond, graph.hnsw.neighbors)
    distances = faiss.IndexFlatL2(dim)
    distances.add(rows)
    hidden = faiss.IndexIVFFlat(lists_on_disk, dim, 200, faiss.METRIC_INNER_PRODUCT)
    read = faiss.read_index
    monkeypatch.setattr(faiss, "read_index", lambda path: pytest.fail("faiss reads it"))
    for other in (lists_on_disk, hidden, graph, distances):
        put_into(tmp_path / "i", other)
        with pytest.raises(ValueError, match=r"index\.faiss.*byte"):
            Index.load(tmp_path / "i")
    monkeypatch.setattr(faiss, "read_index", read)
    Index.build(rows, NAMES[:200], kind=kind).save(tmp_path / "i", overwrite=True)
    assert len(Index.load(tmp_path / "i")) == 200


@pytest.mark.parametrize(
    ("rows", "ids", "message"),
    [
        (ROWS[:3], ["a", "b"], r"\[n, D\].*\[3, 16\].*\b2 ids"),
        (ROWS[:0], [], r"\[0, 16\].*\b0 ids"),
        (ROWS[0], ["a"], r" \[16\].*\b1 ids"),
        (2 * ROWS[:3], ["a", "b", "c"], r"\b2 in row 0 \(a\)"),
        (np.full((1, 4), np.nan, np.float32), ["a"], r"\bnan in row 0"),
    ],
)
def test_rows_that_cannot_be_searched_are_refused(rows: np.ndarray, ids: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Index.build(rows, ids)


def test_queries_that_do_not_fit_are_refused(index: Index) -> None:
    with pytest.raises(ValueError, match=r"queries \[q, 16\].*\[2, 8\]"):
        index.search(ROWS[:2, :8])
    with pytest.raises(ValueError, match=r"\bk\b.*\b0$"):
        index.search(QUERIES, 0)
    with pytest.raises(ValueError, match=r"\b3 in row 1\b"):
        index.search(QUERIES[:2] * np.array([[1], [3]]))
    assert index.search(QUERIES[:0], 3).scores.shape == (0, 3)


def test_the_kind_goes_by_the_number_of_rows() -> None:
    assert [choose_kind(n) for n in (1, FLAT_BELOW - 1, FLAT_BELOW, HNSW_BELOW - 1, HNSW_BELOW)] == [
        "flat", "flat", "hnsw", "hnsw", "ivf",
    ]  # fmt: skip
    assert count_lists(1) == 1
    assert count_lists(1_000_000) == 4000
    assert count_lists(6400) == 100  # 64 points a list
    with pytest.raises(ValueError, match=r"kind.*'pq'"):
        Index.build(ROWS, NAMES, kind="pq")  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", KINDS)
def test_a_single_row_is_a_gallery_too(kind: str) -> None:
    index = Index.build(ROWS[:1], ["only.png"], kind=kind)
    assert index.search(ROWS[:1], 3).ids == [["only.png"]]


def test_the_command_builds_and_tells_its_recall(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from dist_proxygml.inference.embeddings import write_embeddings

    about = {"model": {"run": "r", "step": 3}, "data": {"kind": "folder", "location": "/photos"}}
    rows = (ROWS, [ImageRecord(name) for name in NAMES], [])
    write_embeddings(tmp_path / "new", tmp_path / "e", [rows], embedding_dim=16, about=about)
    options = ["--embeddings", str(tmp_path / "e"), "--out", str(tmp_path / "i")]
    assert main(options) == 0
    assert capsys.readouterr().out == (
        f"flat index of 3,000 rows of dimension 16, written to {tmp_path / 'i'}\n"
        "recall@10 against an exact search: 1.0000\n"
        "scores: not measured, 3,000 of 3,000 rows have no class label\n"
    )
    assert main(options) == 2
    assert "add --overwrite" in capsys.readouterr().err
    assert main([*options, "--overwrite", "--kind", "ivf"]) == 0
    assert (
        f"ivf index of 3,000 rows of dimension 16, num_lists {count_lists(3000)}, num_probes" in capsys.readouterr().out
    )
    manifest = json.loads((tmp_path / "i" / "manifest.json").read_text())
    assert manifest["model"] == {"run": "r", "step": 3}
    assert 0.95 <= manifest["recall_at_10"] <= 1
    assert main(["--embeddings", str(tmp_path), "--out", str(tmp_path / "j")]) == 2
    assert "error: expected dist-proxygml-embeddings of version 1" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main([*options, "--target-recall", "95"])
