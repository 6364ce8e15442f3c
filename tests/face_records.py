"""Record files and verification sets of face recognition, written from the description of their formats."""

import io
import pickle
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.raw_downloads import picture

MAGIC = struct.pack("<I", 0xCED7230A)


def jpeg(seed: int) -> bytes:
    stream = io.BytesIO()
    picture(seed, (12, 10)).save(stream, "JPEG")
    return stream.getvalue()


def content(label: float | Sequence[float], image: bytes, *, number: int = 0) -> bytes:
    """What a record holds: one label in the header, several behind it."""
    if isinstance(label, Sequence):
        return struct.pack(f"<IfQQ{len(label)}f", len(label), 0.0, number, 0, *label) + image
    return struct.pack("<IfQQ", 0, label, number, 0) + image


def framed(record: bytes) -> bytes:
    """A record as a writer stores it: cut at each magic that begins at a multiple of 4."""
    pieces, start = [], 0
    for at in range(0, len(record) - len(record) % 4, 4):
        if record[at : at + 4] == MAGIC:
            pieces.append(record[start:at])
            start = at + 4
    pieces.append(record[start:])
    parts = [0] if len(pieces) == 1 else [1, *[2] * (len(pieces) - 2), 3]
    return b"".join(
        MAGIC + struct.pack("<I", part << 29 | len(piece)) + piece + bytes(-len(piece) % 4)
        for part, piece in zip(parts, pieces, strict=True)
    )


def write_records(root: Path, records: Mapping[int, bytes], *, prop: str | None = None) -> dict[int, int]:
    """train.rec, train.idx and property; the offset of each record by number."""
    root.mkdir(parents=True, exist_ok=True)
    offsets, whole = {}, b""
    for number, record in records.items():
        offsets[number] = len(whole)
        whole += framed(record)
    (root / "train.rec").write_bytes(whole)
    (root / "train.idx").write_text("".join(f"{number}\t{offset}\n" for number, offset in offsets.items()))
    if prop is not None:
        (root / "property").write_text(prop)
    return offsets


def face_records(
    root: Path,
    labels: Sequence[int],
    *,
    labels_of: int = 1,
    header: bool = True,
    images: Sequence[bytes] | None = None,
) -> dict[int, int]:
    """Images of these classes, in the older form with a header and a record for each class, or in the newer one."""
    files = images or [jpeg(number) for number in range(int(header), len(labels) + int(header))]
    records = {
        number: content(label if labels_of == 1 else [label, *[7.0] * (labels_of - 1)], file, number=number)
        for number, (label, file) in enumerate(zip(labels, files, strict=True), start=int(header))
    }
    classes = sorted(set(labels))
    if not header:
        return write_records(root, records)
    stop = len(labels) + 1
    places = {label: [i for i, other in enumerate(labels, start=1) if other == label] for label in classes}
    identities = {
        stop + i: content([min(places[label]), max(places[label]) + 1], b"") for i, label in enumerate(classes)
    }
    records = {0: content([stop, stop + len(classes)], b""), **records, **identities}
    return write_records(root, records, prop=f"{max(classes) + 1},112,112")


def write_pairs(path: Path, images: Sequence[Any], flags: Any, *, protocol: int = 2) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(pickle.dumps((images, flags), protocol=protocol))


def face_pairs(path: Path, *, num_pairs: int = 23) -> tuple[list[bytes], list[bool]]:
    """Every third pair is of one person; the images of the fourth pair are those of the first, crosswise."""
    images = [jpeg(1000 + i) for i in range(2 * num_pairs)]
    images[6:8] = images[1], images[0]
    flags = [i % 3 == 0 for i in range(num_pairs)]
    write_pairs(path, images, flags)
    return images, flags
