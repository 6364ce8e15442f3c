"""A search index that images are added to and removed from while it is asked, without a rebuild.

The index itself stays as it was written. Changes are lines of a log in a folder of their own, each written to the disk
before it counts: an addition with its embedding, beside the image's file; a removal by id. The next start reads them
again. Added rows are compared one by one, so their scores are exact; where removed rows were found, more are asked for.

Chosen: a log, since additions by hand are few; a thousand of them cost less than a millisecond a query. Many images
belong into a new index.

Dimension key: m added rows, q queries, k neighbours, D embedding.
"""

import base64
import errno
import hashlib
import json
import os
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
from jaxtyping import Float

from dist_proxygml.data.sources import ImageRecord
from dist_proxygml.inference.retrieval_index import IDS_FILE, Index
from dist_proxygml.storage.files import flush, mend_log, publish, read_log, sha256_of
from dist_proxygml.storage.lock import FolderLock

LOG_FILE = "changes.jsonl"
_IMAGES = "images"


class Found(NamedTuple):
    """An image near a query."""

    score: float  # cosine
    record: ImageRecord


class LiveIndex:
    """An index with its changes. One thread at a time.

    Args:
        index: what the changes are changes of.
        path: the folder that it was loaded from.
        changes: the folder of the changes, made by the first of them; only one process may have it open.

    Raises:
        ValueError: the changes are those of another index, or another process has them open.
    """

    def __init__(self, index: Index, path: Path, changes: Path) -> None:
        self.index = index
        self.changes = changes
        self._identity = {"index": sha256_of(path / IDS_FILE), "model": (index.model or {}).get("weights_sha256")}
        self._rows_of: dict[str, int] | None = None
        self._removed: set[int] = set()  # rows of the index
        self._added: dict[str, tuple[ImageRecord, np.ndarray]] = {}  # by id: record, row
        self._added_mD: np.ndarray | None = None  # their rows together, from the first search after a change on
        self._log: BinaryIO | None = None
        self._lock = FolderLock(changes, elsewhere="name another folder with --changes")
        self.notes = self._replay() if (changes / LOG_FILE).exists() else []

    def __len__(self) -> int:
        return len(self.index) - len(self._removed) + len(self._added)

    def search(self, query_D: Float[np.ndarray, " D"], k: int, *, without: str | None = None) -> list[Found]:
        """The k nearest images, nearest first, or all there are; `without` the one of this id.

        Raises:
            ValueError: as `Index.search`.
        """
        hidden = {self._row(without)} | self._removed if without is not None else self._removed
        found: list[Found] = []
        wanted = k
        while True:
            result = self.index.search(query_D, wanted)
            pairs = zip(result.scores[0].tolist(), result.rows[0].tolist(), strict=True)
            found = [Found(score, self.index.records[row]) for score, row in pairs if row not in hidden]
            if len(found) >= k or wanted >= len(self.index):
                break
            wanted = min(2 * wanted + k - len(found), len(self.index))
        if self._added_mD is None:
            self._added_mD = np.array([row_D for _, row_D in self._added.values()], dtype=np.float32)
        if len(self._added_mD):
            scores_m = self._added_mD @ np.asarray(query_D, dtype=np.float32).reshape(-1)
            added = zip(scores_m.tolist(), self._added.values(), strict=True)
            found += [Found(score, record) for score, (record, _) in added if record.id != without]
        return sorted(found, key=lambda each: -each.score)[:k]  # stable: equal scores stay in the order of the gallery

    def record(self, id: str) -> ImageRecord:
        """The image of an id. Raises KeyError if there is none, or no more."""
        if id in self._added:
            return self._added[id][0]
        row = self._row(id)
        if row is None or row in self._removed:
            raise KeyError(id)
        return self.index.records[row]

    def added_file(self, id: str) -> Path | None:
        """The image's file, if it was added here."""
        return self._file(id) if id in self._added else None

    def add(self, record: ImageRecord, row_D: Float[np.ndarray, " D"], payload: bytes) -> None:
        """Add an image: its record, its unit row and its file. It is on the disk when this returns.

        Raises:
            ValueError: there is an image of this id.
        """
        try:
            self.record(record.id)
        except KeyError:
            pass
        else:
            raise ValueError(f"expected a new id, got {record.id!r}, which the index has; choose another")
        file = self._file(record.id)
        file.parent.mkdir(parents=True, exist_ok=True)
        with publish(file) as stream:
            stream.write(payload)
        row_D = np.ascontiguousarray(row_D, dtype="<f4").reshape(-1)
        self._write({"add": record._asdict(), "row": base64.b64encode(row_D.tobytes()).decode()})
        self._insert(record, row_D)

    def remove(self, id: str) -> None:
        """Remove an image. It is on the disk when this returns. Raises KeyError if there is none of this id."""
        file = self.added_file(self.record(id).id)
        self._write({"remove": id})
        self._delete(id)
        if file is not None:
            file.unlink(missing_ok=True)

    def close(self) -> None:
        """Let another process open the changes."""
        if self._log is not None:
            self._log.close()
        self._lock.release(is_done=True)

    # ---- inside ------------------------------------------------------------------------------------------------------

    def _row(self, id: str) -> int | None:
        if self._rows_of is None:
            self._rows_of = {record.id: row for row, record in enumerate(self.index.records)}
        return self._rows_of.get(id)

    def _file(self, id: str) -> Path:
        return self.changes / _IMAGES / hashlib.sha256(id.encode()).hexdigest()

    def _insert(self, record: ImageRecord, row_D: np.ndarray) -> None:
        self._added[record.id] = (record, row_D)
        self._added_mD = None

    def _delete(self, id: str) -> None:
        if id in self._added:
            del self._added[id]
            self._added_mD = None
        elif (row := self._row(id)) is not None:
            self._removed.add(row)

    def _write(self, change: dict[str, object]) -> None:
        """Append a line that is on the disk afterwards, or, where that fails, none of it."""
        if self._log is None:
            self.changes.mkdir(parents=True, exist_ok=True)
            self._log = (self.changes / LOG_FILE).open("ab", buffering=0)
        size = self._log.seek(0, os.SEEK_END)
        lines = [change] if size else [self._identity, change]  # new, or a kill came before the first line
        content = "".join(json.dumps(line) + "\n" for line in lines).encode()
        try:
            written = self._log.write(content)
            if written < len(content):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.fsync(self._log.fileno())
        except OSError:
            self._log.truncate(size)
            raise
        if not size:
            flush(self.changes)

    def _replay(self) -> list[str]:
        """Apply the changes that are there; returns what to say of lines that cannot be used."""
        log = self.changes / LOG_FILE
        notes = mend_log(log, {})
        records = [record for _, record in read_log(log, {}).records]
        if not records and not notes:
            return []
        if not records or self._identity | records[0] != self._identity:  # earlier versions did not write the model
            raise ValueError(
                f"expected changes of this index in {self.changes}, found those of another, or of another model; name "
                "another folder with --changes, or remove this one"
            )
        try:
            for change in records[1:]:
                if "remove" in change:
                    self._delete(str(change["remove"]))
                    continue
                row_D = np.frombuffer(base64.b64decode(change["row"], validate=True), dtype="<f4")
                if row_D.shape != (self.index.embedding_dim,) or not abs(np.linalg.norm(row_D) - 1) < 1e-3:
                    raise ValueError(f"the row of {change['add']['id']!r} has {row_D.size} numbers, or is no unit row")
                self._insert(ImageRecord.from_json(json.dumps(change["add"])), row_D)
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(
                f"{log} is damaged: {error}; copy it again, or remove {self.changes} to begin without changes"
            ) from None
        return notes
