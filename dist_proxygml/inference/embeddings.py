"""A folder of embeddings: written by `python -m dist_proxygml.embed`, read by whoever wants rows with names.

    embeddings.npy   float32 [n, D], unit rows; numpy.load maps it
    ids.jsonl        a line per row: {"id": "birds/wren.jpg"}, with label, class_name and sample where they are known
    manifest.json    model, data, images that were skipped, versions, bytes and sha256 of both files

Rows are appended batch by batch, a line of a journal after each, so that a writer that was killed resumes after its
last whole batch, if the model, the images and the batches are the same. Before the folder is published every row is
read again: finite and of length 1.

Dimension key: n rows, D embedding.
"""

import io
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple, Self

import numpy as np
from jaxtyping import Float

from dist_proxygml.data.damage import Damage
from dist_proxygml.data.sources import ImageRecord
from dist_proxygml.storage.files import parse_json
from dist_proxygml.storage.folder import SealedKind, check_is_free, make_empty, open_sealed, partial_path, seal
from dist_proxygml.storage.lock import FolderLock

ROWS_FILE = "embeddings.npy"
IDS_FILE = "ids.jsonl"
KIND = SealedKind(
    "dist-proxygml-embeddings",
    remedy="write it with `python -m dist_proxygml.embed`, or copy it again",
    files=(ROWS_FILE, IDS_FILE),
    entries={"num_rows": int, "embedding_dim": int, "model": dict, "data": dict, "left_out": list},
)
_PLAN_FILE = "plan.json"
_JOURNAL_FILE = "done.jsonl"
_ROWS_AT_A_TIME = 1 << 16


class Embeddings(NamedTuple):
    """A folder of embeddings, opened."""

    rows: Float[np.ndarray, "n D"]  # float32, mapped
    records: list[ImageRecord]
    manifest: dict[str, Any]


def open_embeddings(path: Path) -> Embeddings:
    """Open a folder of embeddings, every byte of which is verified.

    Raises:
        ValueError: it is none, or it is damaged.
    """
    manifest = open_sealed(path, KIND)
    try:
        rows_nD = np.load(path / ROWS_FILE, mmap_mode="r", allow_pickle=False)
        records = read_records(path / IDS_FILE)
    except (OSError, ValueError, TypeError, KeyError, EOFError, OverflowError) as error:  # the last two are NumPy's
        raise ValueError(f"{path} is damaged: {error}; {KIND.remedy}") from None
    expected = (manifest["num_rows"], manifest["embedding_dim"])
    if rows_nD.shape != expected or rows_nD.dtype != np.float32 or len(rows_nD) != len(records):
        raise ValueError(
            f"{path} is damaged: {rows_nD.dtype} rows {list(rows_nD.shape)} for {len(records)} ids, expected "
            f"{list(expected)}; {KIND.remedy}"
        )
    return Embeddings(rows_nD, records, manifest)


def read_records(path: Path) -> list[ImageRecord]:
    """A file of ids. Raises ValueError, TypeError or KeyError for anything else."""
    return [ImageRecord.from_json(line) for line in path.read_bytes().splitlines()]


def check_rows(rows_nD: Float[np.ndarray, "n D"], records: Sequence[ImageRecord] | None = None) -> None:
    """Refuse rows that are not of length 1; they are read a part at a time.

    Raises:
        ValueError: naming the first of them.
    """
    for start in range(0, len(rows_nD), _ROWS_AT_A_TIME):
        part = np.asarray(rows_nD[start : start + _ROWS_AT_A_TIME], dtype=np.float32)
        lengths = np.linalg.norm(part, axis=1)
        bad = np.flatnonzero(~(np.abs(lengths - 1) < 1e-3))  # NaN compares as false
        if len(bad):
            row = start + int(bad[0])
            name = f"row {row}" if records is None else f"row {row} ({records[row].id})"
            raise ValueError(
                f"expected rows of length 1, got {lengths[bad[0]]:.4g} in {name}; normalise the embeddings, or make "
                "them again if they are zero or not finite"
            )


class EmbeddingWriter:
    """Writer of a folder of embeddings; `num_done` batches were there already.

    Args:
        out: where it will be.
        plan: what must be the same for an interrupted folder to be resumed.
        embedding_dim: D.
        overwrite: replace embeddings that are there.

    Raises:
        ValueError: `out` is in use, or another process writes there.
    """

    def __init__(self, out: Path, *, plan: dict[str, Any], embedding_dim: int, overwrite: bool = False) -> None:
        self.out = Path(os.path.realpath(out))  # a link stays one
        check_is_free(self.out, KIND, overwrite=overwrite)
        self._partial = partial_path(self.out)
        self._lock = FolderLock(self.out, elsewhere="name another folder")
        self._dim = embedding_dim
        self.num_done = self.num_rows = 0
        self.left_out: list[Damage] = []
        self.differing: list[str] = []
        """The parts of the plan in which an interrupted folder differs, so that it is written anew."""
        text = json.dumps(plan, sort_keys=True)
        if not self._may_resume(plan):
            make_empty(self._partial)
            (self._partial / ROWS_FILE).write_bytes(_header(0, embedding_dim))
            (self._partial / IDS_FILE).touch()
            (self._partial / _JOURNAL_FILE).touch()
            (self._partial / _PLAN_FILE).write_text(text, encoding="utf-8")
        self._rows: IO[bytes] = open(self._partial / ROWS_FILE, "ab")
        self._ids: IO[bytes] = open(self._partial / IDS_FILE, "ab")
        self._journal: IO[bytes] = open(self._partial / _JOURNAL_FILE, "ab")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._close()
        self._lock.release()

    def add(
        self, rows_bD: Float[np.ndarray, "b D"], records: Sequence[ImageRecord], left_out: Sequence[Damage]
    ) -> None:
        """Append a batch, and the images of it that cannot be used."""
        assert rows_bD.shape == (len(records), self._dim)
        self._rows.write(np.ascontiguousarray(rows_bD, dtype="<f4").tobytes())
        self._ids.writelines(f"{record.to_json()}\n".encode() for record in records)
        self._rows.flush()
        self._ids.flush()
        self.num_rows += len(records)
        self.num_done += 1
        self.left_out += left_out
        line = json.dumps([self.num_rows, self._ids.tell(), [list(damage) for damage in left_out]])
        self._journal.write(f"{line}\n".encode())
        self._journal.flush()

    def finish(self, about: dict[str, Any]) -> dict[str, Any]:
        """Check every row, publish the folder; returns its manifest.

        Raises:
            ValueError: there is no row, or one is not of length 1.
        """
        self._close()
        if not self.num_rows:
            raise ValueError(f"none of the {len(self.left_out)} images can be used, the first is {self.left_out[0]}")
        with open(self._partial / ROWS_FILE, "r+b") as stream:
            stream.write(_header(self.num_rows, self._dim))
        records = read_records(self._partial / IDS_FILE)
        check_rows(np.load(self._partial / ROWS_FILE, mmap_mode="r"), records)
        about = {
            "num_rows": self.num_rows,
            "embedding_dim": self._dim,
            "num_ids": len({record.id for record in records}),
            "rows": "float32, finite, unit length",
            **about,
            "left_out": [damage._asdict() for damage in self.left_out],
        }
        manifest = seal(self._partial, self.out, KIND, about=about, notes=(_PLAN_FILE, _JOURNAL_FILE))
        self._lock.release(is_done=True)
        return manifest

    def _close(self) -> None:
        for stream in (self._rows, self._ids, self._journal):
            stream.close()

    def _may_resume(self, plan: dict[str, Any]) -> bool:
        """Whether an interrupted folder of the same plan is there; it is cut after its last whole batch."""
        rows, ids, journal = (self._partial / name for name in (ROWS_FILE, IDS_FILE, _JOURNAL_FILE))
        try:
            earlier = parse_json((self._partial / _PLAN_FILE).read_bytes())
            ours = json.loads(json.dumps(plan))
            self.differing = [name.replace("_", " ") for name in ours if earlier.get(name) != ours[name]]
            if self.differing:
                return False
            header, num_bytes = len(_header(0, self._dim)), (rows.stat().st_size, ids.stat().st_size)
            whole, ids_end = [], 0
            for line in journal.read_bytes().splitlines(keepends=True):
                if not line.endswith(b"\n"):  # cut by a kill
                    break
                num_rows, end, left_out = parse_json(line)
                if header + num_rows * 4 * self._dim > num_bytes[0] or end > num_bytes[1]:
                    break
                whole.append(line)
                self.num_rows, ids_end = num_rows, end
                self.left_out += [Damage(*damage) for damage in left_out]
            self.num_done = len(whole)
            os.truncate(rows, header + self.num_rows * 4 * self._dim)
            os.truncate(ids, ids_end)
            journal.write_bytes(b"".join(whole))
        except (OSError, ValueError, TypeError, AttributeError):
            self.num_done = self.num_rows = 0
            self.left_out = []
            return False
        return True


def _header(num_rows: int, embedding_dim: int) -> bytes:
    """The head of a .npy file; as long for any number of rows, since numpy leaves room for it to grow."""
    stream = io.BytesIO()
    contents = {"descr": "<f4", "fortran_order": False, "shape": (num_rows, embedding_dim)}
    np.lib.format.write_array_header_1_0(stream, contents)
    return stream.getvalue()
