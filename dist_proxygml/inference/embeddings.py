"""A folder of embeddings: written by `python -m dist_proxygml.embed`, read by whoever wants rows with names.

    embeddings.npy   float32 [n, D], unit rows; numpy.load maps it
    ids.jsonl        a line per row: {"id": "birds/wren.jpg"}, with label, class_name and sample where they are known
    manifest.json    model, data, images that were skipped, versions, bytes and sha256 of both files

The folder is written from what `embed` has kept (evaluation/blocks.py). Before it is published every row is read again:
finite and of length 1.

Dimension key: n rows, D embedding.
"""

import io
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from dist_proxygml.data.damage import Damage
from dist_proxygml.data.sources import ImageRecord
from dist_proxygml.storage.folder import SealedKind, make_empty, open_sealed, seal

ROWS_FILE = "embeddings.npy"
IDS_FILE = "ids.jsonl"
KIND = SealedKind(
    "dist-proxygml-embeddings",
    remedy="write it with `python -m dist_proxygml.embed`, or copy it again",
    files=(ROWS_FILE, IDS_FILE),
    entries={"num_rows": int, "embedding_dim": int, "model": dict, "data": dict, "left_out": list},
)
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


def write_embeddings(
    partial: Path,
    out: Path,
    parts: Iterable[tuple[Float[np.ndarray, "b D"], Sequence[ImageRecord], Sequence[Damage]]],
    *,
    embedding_dim: int,
    about: Mapping[str, Any],
) -> dict[str, Any]:
    """Write a folder of embeddings in `partial`, check every row, and publish it as `out`; return its manifest.

    Args:
        partial: a folder that may be emptied.
        out: where embeddings that are there are replaced.
        parts: rows in order, one record for each, and images that cannot be used.
        embedding_dim: D.
        about: model and data, for the manifest.

    Raises:
        ValueError: there is no row, or one is not of length 1.
    """
    make_empty(partial)
    num_rows, left_out = 0, list[Damage]()
    with open(partial / ROWS_FILE, "wb") as rows, open(partial / IDS_FILE, "wb") as ids:
        rows.write(_header(0, embedding_dim))
        for rows_bD, records, damaged in parts:
            assert rows_bD.shape == (len(records), embedding_dim)
            rows.write(np.ascontiguousarray(rows_bD, dtype="<f4").data)
            ids.writelines(f"{record.to_json()}\n".encode() for record in records)
            num_rows += len(records)
            left_out += damaged
        rows.seek(0)
        rows.write(_header(num_rows, embedding_dim))
    if not num_rows:
        raise ValueError(f"none of the {len(left_out)} images can be used, the first is {left_out[0]}")
    records = read_records(partial / IDS_FILE)
    check_rows(np.load(partial / ROWS_FILE, mmap_mode="r"), records)
    whole = {
        "num_rows": num_rows,
        "embedding_dim": embedding_dim,
        "num_ids": len({record.id for record in records}),
        "rows": "float32, finite, unit length",
        **about,
        "left_out": [damage._asdict() for damage in left_out],
    }
    return seal(partial, out, KIND, about=whole)


def _header(num_rows: int, embedding_dim: int) -> bytes:
    """The head of a .npy file; as long for any number of rows, since numpy leaves room for it to grow."""
    stream = io.BytesIO()
    contents = {"descr": "<f4", "fortran_order": False, "shape": (num_rows, embedding_dim)}
    np.lib.format.write_array_header_1_0(stream, contents)
    return stream.getvalue()
