"""Search in a gallery of embeddings, exact or approximate: built once, kept in a folder, asked from anywhere.

    flat   every score is computed; exact; takes n x D products a query
    hnsw   a graph of neighbours (Malkov and Yashunin 2016); fast queries, slow to build, 256 bytes more per row
    ivf    rows in lists around k-means centres, the nearest lists are scanned (faiss IVF-Flat); quick to build

`kind="auto"` is flat below 50,000 rows, where a query takes milliseconds, hnsw below 500,000, ivf from there on, which
is built several times faster. Rows stay float32 in all of them, so scores are exact inner products; only the choice
of rows is approximate. How hard a search looks (lists probed, width of the walk) is doubled until the ten nearest of
sampled rows are found as often as wanted, and what was reached is recorded. A search never gives fewer than k rows
that are there: where an approximate one comes back short it is done again exhaustively.

Scores are cosines of unit rows; equal scores go by row number. Why this is no part of evaluation/search.py: numbers of
an evaluation are exact and go without a file; here an answer may be approximate and must outlive the process.
Declined: compressed rows (PQ), which save memory at the price of wrong scores; GPUs, since a query is a few
milliseconds on a CPU.

Dimension key: n rows, q queries, k neighbours, D embedding.
"""

import math
import os
import shutil
import struct
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple

import numpy as np
from jaxtyping import Float, Int

from dist_proxygml.data.sources import ImageRecord
from dist_proxygml.evaluation.search import load_faiss
from dist_proxygml.inference.embeddings import check_rows, read_records
from dist_proxygml.inference.score_table import ScoreTable
from dist_proxygml.storage.folder import SealedKind, check_is_free, make_empty, open_sealed, partial_path, seal

INDEX_FILE = "index.faiss"
IDS_FILE = "ids.jsonl"
SCORES_FILE = "scores.json"  # not in indexes of rows without class labels, nor in those from before there were any
KIND = SealedKind(
    "dist-proxygml-search-index",
    remedy="build it with `python -m dist_proxygml.index`, or copy it again",
    files=(INDEX_FILE, IDS_FILE),
    entries={
        "index": dict,
        "num_rows": int,
        "embedding_dim": int,
        "recall_at_10": float,
        "model": (dict, type(None)),
        "data": (dict, type(None)),
    },
)
FLAT_BELOW = 50_000  # rows
HNSW_BELOW = 500_000
_HNSW_LINKS = 32  # M: neighbours of a node, twice as many at the bottom
_HNSW_BUILD_WIDTH = 80  # efConstruction; the graphs of larger ones are hardly better
_MIN_EFFORT = {"ivf": 8, "hnsw": 32}  # lists probed, width of the walk
_POINTS_PER_LIST = 64  # of k-means' training
_NUM_SAMPLED = 256  # queries that recall is measured with
_ROWS_AT_A_TIME = 1 << 14

IndexKind = Literal["flat", "ivf", "hnsw"]


class SearchResult(NamedTuple):
    """The nearest rows of each query, nearest first."""

    scores: Float[np.ndarray, "q k"]  # cosines, float32
    ids: list[list[str]]
    rows: Int[np.ndarray, "q k"]  # int64, positions in the gallery


class Index:
    """A gallery that can be searched.

    Attributes:
        kind: flat, ivf or hnsw.
        parameters: those of the kind, by name.
        records: id of each row, with label and class where they are known.
        recall_at_10: share of the ten nearest that a search finds, measured while it was built; 1 for flat.
        model: which model made the embeddings, as `Embedder.about`; None if nobody said.
        data: where the images are, as a folder of embeddings says it; None if nobody said.
        scores: precision and recall by score; None where they were not measured.
    """

    def __init__(
        self,
        faiss_index: Any,
        records: Sequence[ImageRecord],
        *,
        kind: IndexKind,
        parameters: dict[str, int],
        recall_at_10: float,
        model: dict[str, Any] | None,
        data: dict[str, Any] | None,
    ) -> None:
        self._index = faiss_index
        self.records = records
        self.kind = kind
        self.parameters = parameters
        self.recall_at_10 = recall_at_10
        self.model = model
        self.data = data
        self.scores: ScoreTable | None = None

    def __len__(self) -> int:
        return len(self.records)

    @property
    def embedding_dim(self) -> int:
        """D."""
        return int(self._index.d)

    @classmethod
    def build(
        cls,
        embeddings: Float[np.ndarray, "n D"],
        ids: Sequence[str | ImageRecord],
        *,
        kind: Literal["auto", "flat", "ivf", "hnsw"] = "auto",
        target_recall: float = 0.95,
        model: dict[str, Any] | None = None,
        data: dict[str, Any] | None = None,
        progress: Callable[[int], object] | None = None,
    ) -> "Index":
        """An index of unit rows, which may be mapped: they are read a part at a time.

        Args:
            embeddings: unit rows.
            ids: what to call each row.
            kind: how to search; "auto" goes by the number of rows.
            target_recall: how much of the ten nearest an approximate search should find.
            model, data: where the rows come from, for the manifest.
            progress: called with the number of rows just added.

        Raises:
            ValueError: no rows, rows that are not of length 1, another number of ids, or faiss is missing.
        """
        rows_nD = np.asanyarray(embeddings)
        records = [each if isinstance(each, ImageRecord) else ImageRecord(str(each)) for each in ids]
        if rows_nD.ndim != 2 or not len(rows_nD) or len(rows_nD) != len(records):
            raise ValueError(
                f"expected embeddings [n, D] and n ids with n at least 1, got {list(rows_nD.shape)} and {len(records)} "
                "ids; name every row"
            )
        if kind not in ("auto", "flat", "ivf", "hnsw"):
            raise ValueError(f"expected a kind auto, flat, ivf or hnsw, got {kind!r}")
        if not 0 < target_recall <= 1:
            raise ValueError(f"expected a target_recall above 0 and at most 1, got {target_recall}")
        check_rows(rows_nD, records)
        chosen = choose_kind(len(rows_nD)) if kind == "auto" else kind
        faiss_index, parameters = _empty_index(rows_nD, chosen)
        for start in range(0, len(rows_nD), _ROWS_AT_A_TIME):
            part = np.ascontiguousarray(rows_nD[start : start + _ROWS_AT_A_TIME], dtype=np.float32)
            faiss_index.add(part)
            if progress is not None:
                progress(len(part))
        index = cls(faiss_index, records, kind=chosen, parameters=parameters, recall_at_10=1.0, model=model, data=data)
        if chosen != "flat":
            index._look_hard_enough(rows_nD, target_recall)
        return index

    def search(self, queries: Float[np.ndarray, "q D"], k: int = 10) -> SearchResult:
        """The k nearest rows of each query, all rows if there are fewer.

        Raises:
            ValueError: queries of another dimension or not of length 1, or k below 1.
        """
        queries_qD = np.ascontiguousarray(np.atleast_2d(queries), dtype=np.float32)
        if queries_qD.ndim != 2 or queries_qD.shape[1] != self.embedding_dim:
            raise ValueError(
                f"expected queries [q, {self.embedding_dim}], as the index holds, got {list(np.shape(queries))}; embed "
                "them with the model of the index"
            )
        if k < 1:
            raise ValueError(f"expected k of at least 1, got {k}")
        check_rows(queries_qD)
        scores_qk, rows_qk = self._nearest(queries_qD, min(k, len(self)))
        ids = [[self.records[row].id for row in rows] for rows in rows_qk.tolist()]
        return SearchResult(scores_qk, ids, rows_qk)

    def save(self, path: str | Path, *, overwrite: bool = False) -> dict[str, Any]:
        """Publish the index atomically as a folder; returns its manifest.

        Raises:
            ValueError: the place is in use.
        """
        out = Path(os.path.realpath(path))  # a link stays one
        check_is_free(out, KIND, overwrite=overwrite)
        partial = partial_path(out)
        try:
            make_empty(partial)
            load_faiss().write_index(self._index, str(partial / INDEX_FILE))
            with open(partial / IDS_FILE, "w", encoding="utf-8") as stream:
                stream.writelines(f"{record.to_json()}\n" for record in self.records)
            if self.scores is not None:
                (partial / SCORES_FILE).write_text(self.scores.to_json(), encoding="utf-8")
            about = {
                "index": {"kind": self.kind, **self.parameters},
                "num_rows": len(self),
                "embedding_dim": self.embedding_dim,
                "recall_at_10": self.recall_at_10,
                "model": self.model,
                "data": self.data,
            }
            return seal(partial, out, KIND, about=about)
        finally:
            shutil.rmtree(partial, ignore_errors=True)

    @classmethod
    def load(cls, path: str | Path, *, verify: bool = False) -> "Index":
        """Open what `save` wrote, which is read once: the sizes of its files and the structure of the index are
        checked, and with `verify` every byte first.

        Raises:
            ValueError: it is no index, or it is damaged; faiss is missing.
        """
        path = Path(path)
        manifest = open_sealed(path, KIND, deep=verify)
        faiss = load_faiss()
        try:
            parameters = dict(manifest["index"])
            kind = parameters.pop("kind")
            _check_manifest(kind, parameters, manifest)
            with open(path / INDEX_FILE, "rb") as stream:
                _FaissFile(stream).check(kind)
            faiss_index = faiss.read_index(str(path / INDEX_FILE))
            records = read_records(path / IDS_FILE)
            recall = float(manifest["recall_at_10"])
            has_scores = SCORES_FILE in manifest["files"]
            scores = ScoreTable.from_json((path / SCORES_FILE).read_bytes()) if has_scores else None
        except (OSError, RuntimeError, ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{path} is damaged: {error}; {KIND.remedy}") from None
        found, expected = (faiss_index.ntotal, faiss_index.d), (manifest["num_rows"], manifest["embedding_dim"])
        if found != expected or found[0] != len(records):
            raise ValueError(
                f"{path} is damaged: rows {list(found)} for {len(records)} ids, expected {list(expected)}; "
                f"{KIND.remedy}"
            )
        index = cls(
            faiss_index,
            records,
            kind=kind,
            parameters=parameters,
            recall_at_10=recall,
            model=manifest["model"],
            data=manifest["data"],
        )
        index.scores = scores
        if kind != "flat":
            index._set_effort(index._effort)
        return index

    # ---- inside ------------------------------------------------------------------------------------------------------

    @property
    def _effort(self) -> int:
        return self.parameters["num_probes" if self.kind == "ivf" else "search_width"]

    def _set_effort(self, effort: int) -> None:
        if self.kind == "ivf":
            self._index.nprobe = self.parameters["num_probes"] = effort
        else:
            self._index.hnsw.efSearch = self.parameters["search_width"] = effort

    @contextmanager
    def _at_effort(self, effort: int) -> Iterator[None]:
        """Search so hard for a while. faiss has parameters of a call for it, which its own `contrib.torch_utils`, once
        some other package has imported that, does not hand on.
        """
        before = self._effort
        self._set_effort(effort)
        try:
            yield
        finally:
            self._set_effort(before)

    def _nearest(self, queries_qD: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Scores and rows of the k nearest, k at most n: by score descending, then row ascending."""
        if self.kind == "hnsw" and k > self._effort:  # the walk must be as wide as what it brings
            with self._at_effort(2 * k):
                scores_qk, rows_qk = self._index.search(queries_qD, k)
        else:
            scores_qk, rows_qk = self._index.search(queries_qD, k)
        short = np.flatnonzero((rows_qk < 0).any(axis=1))
        if len(short):
            scores_qk[short], rows_qk[short] = self._exhaustive(queries_qD[short], k)
        order_qk = np.lexsort((rows_qk, -scores_qk), axis=1)
        return np.take_along_axis(scores_qk, order_qk, 1), np.take_along_axis(rows_qk, order_qk, 1)

    def _exhaustive(self, queries_qD: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        if self.kind == "hnsw":
            storage = load_faiss().downcast_index(self._index.storage)
            return storage.search(queries_qD, k)
        with self._at_effort(self._index.nlist):
            return self._index.search(queries_qD, k)

    def _look_hard_enough(self, rows_nD: np.ndarray, target_recall: float) -> None:
        """Double the effort until searches find enough of the ten nearest of sampled rows, themselves excluded."""
        most = self.parameters["num_lists"] if self.kind == "ivf" else max(64, min(len(self), 4096))
        sampled = np.sort(np.random.default_rng(0).choice(len(rows_nD), min(_NUM_SAMPLED, len(rows_nD)), replace=False))
        num_neighbours = min(10, len(rows_nD) - 1)
        if num_neighbours == 0:
            self._set_effort(1)
            return
        queries_qD = np.ascontiguousarray(rows_nD[sampled], dtype=np.float32)
        exact_qk = _exact_scores(rows_nD, queries_qD, num_neighbours + 1)
        effort = min(_MIN_EFFORT[self.kind], most)
        while True:
            self._set_effort(effort)
            scores_qk, rows_qk = self._nearest(queries_qD, num_neighbours + 1)
            own_qk = rows_qk == sampled[:, None]
            # What is as near as the tenth counts, whichever row it is.
            tenth_q1 = exact_qk[:, num_neighbours][:, None] - 1e-6
            found_q = np.minimum(((scores_qk >= tenth_q1) & ~own_qk).sum(axis=1), num_neighbours)
            self.recall_at_10 = float(found_q.mean() / num_neighbours)
            if self.recall_at_10 >= target_recall or effort >= most:
                return
            effort = min(2 * effort, most)


def _check_manifest(kind: Any, parameters: dict[str, Any], manifest: dict[str, Any]) -> None:
    """Refuse what `save` does not write. Raises ValueError."""
    needed = {"flat": (), "ivf": ("num_probes",), "hnsw": ("search_width",)}.get(kind)
    if needed is None or any(type(parameters.get(name)) is not int or parameters[name] < 1 for name in needed):
        raise ValueError(f"index is {manifest['index']!r}")
    said: dict[str, dict[str, type]] = {
        "model": {"path": str, "run": str, "step": int},
        "data": {"location": str, "split": str, "kind": str},
    }
    for entry, types in said.items():
        for name, wanted in types.items():
            found = (manifest[entry] or {}).get(name)
            if found is not None and not isinstance(found, wanted):
                raise ValueError(f"{entry}.{name} is {found!r}")


class _FaissFile:
    """Validation of a faiss file before faiss reads it: its reader follows whatever the file says, also to other files
    (lists of an IVF index that lie on a disk), and beyond the ends of arrays.
    """

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self._num_bytes = os.fstat(stream.fileno()).st_size

    def check(self, kind: IndexKind) -> None:
        """Refuse all but what is written here. Raises ValueError."""
        {"flat": self._flat, "ivf": self._ivf, "hnsw": self._hnsw}[kind]()
        self._expect(self._stream.tell() == self._num_bytes)

    def _expect(self, is_so: Any) -> None:
        if not is_so:
            raise ValueError(f"{INDEX_FILE} is no index of this kind, at byte {self._stream.tell():,}")

    def _numbers(self, layout: str) -> tuple[Any, ...]:
        content = self._stream.read(struct.calcsize(f"<{layout}"))
        self._expect(len(content) == struct.calcsize(f"<{layout}"))
        return struct.unpack(f"<{layout}", content)

    def _skip(self, num_bytes: int) -> None:
        self._expect(0 <= num_bytes <= self._num_bytes - self._stream.tell())
        self._stream.seek(num_bytes, os.SEEK_CUR)

    def _array(self, dtype: str, count: int | None = None) -> np.ndarray:
        if count is None:
            (count,) = self._numbers("Q")
        self._expect(count * np.dtype(dtype).itemsize <= self._num_bytes - self._stream.tell())
        return np.fromfile(self._stream, dtype, count)

    def _head(self, tag: bytes) -> tuple[int, int]:
        """D and n of an index of inner products."""
        found, dim, num_rows, _, _, _, metric = self._numbers("4siqqqBi")
        self._expect(found == tag and metric == 0 and dim > 0 and num_rows >= 0)
        return dim, num_rows

    def _flat(self) -> tuple[int, int]:
        dim, num_rows = self._head(b"IxFI")
        (count,) = self._numbers("Q")
        self._expect(count == dim * num_rows)
        self._skip(4 * count)
        return dim, num_rows

    def _ivf(self) -> None:
        dim, num_rows = self._head(b"IwFl")
        num_lists, _ = self._numbers("QQ")
        self._expect(self._flat() == (dim, num_lists))
        self._expect(self._numbers("BQ") == (0, 0))  # no map from rows to lists
        self._expect(self._numbers("4sQQ") == (b"ilar", num_lists, 4 * dim))  # lists in the file itself
        (layout,) = self._numbers("4s")
        self._expect(layout in (b"full", b"sprs"))
        lengths = self._array("<u8")
        if layout == b"sprs":  # pairs of a list and its length
            self._expect(len(lengths) % 2 == 0 and (lengths[::2] < num_lists).all())
            lengths = lengths[1::2]
        else:
            self._expect(len(lengths) == num_lists)
        for length in lengths.tolist():
            self._skip(4 * dim * length)
            rows = self._array("<i8", length)
            self._expect(((rows >= 0) & (rows < num_rows)).all())

    def _hnsw(self) -> None:
        dim, num_rows = self._head(b"IHNf")
        self._array("<f8")
        ends, levels, starts, links = self._array("<i4"), self._array("<i4"), self._array("<u8"), self._array("<i4")
        entry, top, *_ = self._numbers("5i")
        self._expect(len(levels) == num_rows and len(starts) == num_rows + 1 and 0 <= entry < num_rows)
        self._expect(ends[:1] == 0 and (np.diff(ends) >= 0).all() and levels.min() >= 1 and levels.max() < len(ends))
        self._expect(starts[0] == 0 and starts[-1] == len(links) and (np.diff(starts) == ends[levels]).all())
        self._expect(links.min() >= -1 and links.max() < num_rows and 0 <= top < levels[entry])
        for level in range(1, top + 1):  # who is linked on a level is there
            nodes = np.flatnonzero(levels > level)
            places = starts[nodes, None].astype(np.int64) + np.arange(ends[level], ends[level + 1])
            linked = links[places]
            self._expect((levels[linked[linked >= 0]] > level).all())
        self._expect(self._flat() == (dim, num_rows))


def choose_kind(num_rows: int) -> IndexKind:
    """The kind that "auto" means for so many rows."""
    if num_rows < FLAT_BELOW:
        return "flat"
    return "hnsw" if num_rows < HNSW_BELOW else "ivf"


def count_lists(num_rows: int) -> int:
    """Lists of an ivf index: four times the square root of n, and points enough for each."""
    return max(1, min(round(4 * math.sqrt(num_rows)), num_rows // _POINTS_PER_LIST))


def _empty_index(rows_nD: np.ndarray, kind: IndexKind) -> tuple[Any, dict[str, int]]:
    """A faiss index that rows can be added to, and its parameters."""
    faiss = load_faiss()
    num_rows, dim = rows_nD.shape
    if kind == "flat":
        return faiss.IndexFlatIP(dim), {}
    if kind == "hnsw":
        index = faiss.IndexHNSWFlat(dim, _HNSW_LINKS, faiss.METRIC_INNER_PRODUCT)
        index.hnsw.efConstruction = _HNSW_BUILD_WIDTH
        return index, {"links": _HNSW_LINKS, "build_width": _HNSW_BUILD_WIDTH}
    num_lists = count_lists(num_rows)
    index = faiss.IndexIVFFlat(faiss.IndexFlatIP(dim), dim, num_lists, faiss.METRIC_INNER_PRODUCT)
    index.cp.spherical = True  # centres of unit rows are compared by inner product
    index.cp.min_points_per_centroid = 1
    chosen = np.random.default_rng(0).choice(num_rows, min(num_rows, num_lists * _POINTS_PER_LIST), replace=False)
    index.train(np.ascontiguousarray(rows_nD[np.sort(chosen)], dtype=np.float32))
    return index, {"num_lists": num_lists}


def _exact_scores(rows_nD: np.ndarray, queries_qD: np.ndarray, k: int) -> np.ndarray:
    """The k best scores of each query, descending; rows are read a part at a time."""
    faiss = load_faiss()
    best_qk = np.full((len(queries_qD), 0), -np.inf, dtype=np.float32)
    for start in range(0, len(rows_nD), _ROWS_AT_A_TIME):
        part = np.ascontiguousarray(rows_nD[start : start + _ROWS_AT_A_TIME], dtype=np.float32)
        scores, _ = faiss.knn(queries_qD, part, min(k, len(part)), metric=faiss.METRIC_INNER_PRODUCT)
        best_qk = -np.sort(-np.concatenate([best_qk, scores], axis=1), axis=1)[:, :k]
    return best_qk
