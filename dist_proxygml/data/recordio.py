"""Record files of face recognition to a list of images: MS1M, Glint360K, WebFace as insightface publishes them.

    train.rec   records: magic 0xced7230a u4 | 3 bits part, 29 bits length, u4 | content | zeros to a multiple of 4
    train.idx   a line per record: its number and its offset in train.rec
    property    number of classes, height, width; optional
    content     flag u4 | label f4 | id u8 | id2 u8 | `flag` labels f4, of which the first counts | the image file

Little-endian throughout (recordio.h of dmlc-core, image_recordio.h of mxnet). Where content has the magic at a multiple
of 4, it is cut there: parts 1, 2, ..., 3 instead of 0, with the magic to be put back between them, as happens to a few
images among millions. In the older form record 0 is a header without an image, whose first label says at
which number images end and records of identities begin, also without an image; the newer form has images only.

Chosen: a pass over the records' headers with NumPy on the mapped file, images read when their shard is written.
Declined: mxnet, which has ended; the ranges in the records of identities, which repeat what the images' labels say, and
which as float32 are not exact beyond 2^24.
"""

import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from dist_proxygml.data.class_split import ClassSplit, notes_of_split, split_by_class
from dist_proxygml.data.datasets import FileSlice, SourceDataset, SourceImage
from dist_proxygml.data.images import MAX_BYTES
from dist_proxygml.data.published import find_layout
from dist_proxygml.data.verification_sets import with_pairs

MAGIC = 0xCED7230A
_LENGTH = (1 << 29) - 1
_FRAME = 8  # bytes of magic and length
_HEADER = 24  # bytes of flag, label, id and id2
_EXACT = 1 << 24  # whole numbers below are exact in float32
_AT_ONCE = 1 << 18  # records of one step
_MAX_JOINED = 64 << 20  # bytes of records in parts, which are kept in memory
_AGAIN = "copy or download the record files again"


class _Records(NamedTuple):
    """The headers of n records, in the order of train.idx."""

    number: np.ndarray  # int64
    offset: np.ndarray  # int64, of the record
    in_parts: np.ndarray  # bool
    has_labels: np.ndarray  # bool: flag > 0
    label: np.ndarray  # float32: the first of several
    start: np.ndarray  # int64, of the image
    num_bytes: np.ndarray  # int64, of the image, or of what the first part has of it


def read_recordio(
    root: Path,
    *,
    allow_partial: bool = False,
    split: ClassSplit | None = None,
    pairs: Sequence[Path] = (),
    quiet: bool = False,
) -> SourceDataset:
    """Read `train.rec` and `train.idx`. All classes train, unless `split` divides them.

    `pairs` are verification sets such as `lfw.bin`, where they are or beside `train.rec`; each is a split of its own.
    `allow_partial` leaves out records without an image, and takes fewer than there should be.

    Raises ValueError naming the record if it is not where the index says, is cut, or has no image or no class.
    """
    _, folder = find_layout(root, {"record files": [("*.rec",), ("*.idx",)]})
    found = sorted(folder.glob("*.rec"))
    path = folder / "train.rec" if folder / "train.rec" in found else found[0]
    if path.name != "train.rec" and len(found) > 1:
        raise ValueError(f"{folder} has {len(found)} .rec files and no train.rec; point --data at a folder with one")
    records = _read_headers(path, *_read_index(path.with_suffix(".idx")), quiet=quiet)
    is_image_n, notes = _images_among(path, records, allow_partial=allow_partial)
    records = _Records(*(column[is_image_n] for column in records))
    label_n = _labels(path, records)
    classes, class_n = np.unique(label_n, return_inverse=True)
    notes += _compare_property(path, records, label_n, len(classes))
    labels = classes.tolist()
    split_of, record = split_by_class(labels, split or ClassSplit(len(labels)), where=f"found in {path}")
    notes += [] if pairs else notes_of_split(record)
    images = list(_source_images(path, records, labels, class_n, [split_of(label) for label in labels]))
    dataset = SourceDataset("recordio", images, notes=tuple(notes), build=record if split else {})
    return with_pairs(dataset, [one if one.exists() else folder / one for one in pairs])


def _read_index(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Numbers and offsets of the records, int64 [n] each."""
    if not path.is_file():
        raise ValueError(f"{path} is missing: the record files need their index; {_AGAIN}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a file without a line
            table_n2 = np.loadtxt(path, dtype=np.int64, ndmin=2, comments=None)
        if table_n2.shape[1] != 2 or not len(table_n2):
            raise ValueError(f"{len(table_n2)} lines of {table_n2.shape[1]} numbers")
    except (ValueError, OverflowError) as problem:
        raise ValueError(f"{path}: expected lines of a record's number and offset, got {problem}; {_AGAIN}") from None
    number_n, offset_n = table_n2.T
    values, counts = np.unique(number_n, return_counts=True)
    if len(values) < len(number_n):
        raise ValueError(f"{path} has record {values[counts.argmax()]} twice; {_AGAIN}")
    return number_n, offset_n


def _read_headers(path: Path, number_n: np.ndarray, offset_n: np.ndarray, *, quiet: bool) -> _Records:
    size = path.stat().st_size if path.is_file() else 0
    if size < _FRAME + _HEADER:
        raise ValueError(f"{path}: expected records, got {size} bytes; {_AGAIN}")
    words = np.memmap(path, "<u4", mode="r", shape=(size // 4,))
    parts = []
    with tqdm(total=len(number_n), desc=f"reading {path.name}", unit=" records", disable=quiet, mininterval=0.5) as bar:
        for first in range(0, len(number_n), _AT_ONCE):
            some = slice(first, first + _AT_ONCE)
            parts.append(_check_headers(path, words, size, number_n[some], offset_n[some]))
            bar.update(len(parts[-1].number))
    return _Records(*map(np.concatenate, zip(*parts, strict=True)))


def _check_headers(path: Path, words: np.ndarray, size: int, number_n: np.ndarray, offset_n: np.ndarray) -> _Records:
    def refuse(is_wrong_n: np.ndarray, problem: str) -> None:
        if is_wrong_n.any():
            first = int(is_wrong_n.argmax())
            where = f"{path}, record {number_n[first]} at byte {offset_n[first]}"
            raise ValueError(f"{where} {problem} ({int(is_wrong_n.sum())} such records here); {_AGAIN}")

    refuse((offset_n < 0) | (offset_n > size - _FRAME - _HEADER), f"is not inside the file of {size} bytes")
    at_n = offset_n // 4
    refuse((offset_n % 4 != 0) | (words[at_n] != MAGIC), "is none: its index points elsewhere")
    length_n = (words[at_n + 1] & _LENGTH).astype(np.int64)
    part_n = words[at_n + 1] >> 29
    refuse(part_n > 1, "is a later part of one: its index points elsewhere")
    refuse(offset_n + _FRAME + length_n > size, f"is cut: the file ends at byte {size}")
    flag_n = words[at_n + 2].astype(np.int64)
    before_n = _HEADER + 4 * flag_n  # bytes before the image
    refuse(before_n > length_n, "is shorter than its header")
    has_labels_n = flag_n > 0
    label_n = words[np.where(has_labels_n, at_n + (_FRAME + _HEADER) // 4, at_n + 3)].view("<f4")
    start_n = offset_n + _FRAME + before_n
    return _Records(number_n, offset_n, part_n == 1, has_labels_n, label_n, start_n, length_n - before_n)


def _images_among(path: Path, records: _Records, *, allow_partial: bool) -> tuple[np.ndarray, list[str]]:
    """Which records are images, bool [n], and what was left out."""
    has_image_n = (records.num_bytes > 0) | records.in_parts
    is_header_n = (records.number == 0) & records.has_labels & ~has_image_n
    is_empty_n = ~has_image_n & ~is_header_n
    notes = []
    if is_header_n.any():  # the older form
        stop = records.label[is_header_n][0]
        says = f"{path}: record 0 says that images are records 1 to {float(stop) - 1:.0f}"
        rounded_n = records.number.astype(np.float32)
        is_behind_n = has_image_n & (rounded_n > stop if stop >= _EXACT else rounded_n >= stop)
        if is_behind_n.any():
            raise ValueError(f"{says}, but record {records.number[is_behind_n.argmax()]} is one, too; {_AGAIN}")
        num_listed = int(((records.number > 0) & (records.number < stop)).sum())
        if np.float32(num_listed + 1) != stop:
            if not allow_partial:
                raise ValueError(f"{says}, the index lists {num_listed}; {_AGAIN}, or pass --allow-partial")
            notes.append(f"{says}, the index lists {num_listed}")
        is_empty_n &= rounded_n < stop  # those behind are identities
    num_empty = int(is_empty_n.sum())
    if num_empty and not allow_partial:
        raise ValueError(
            f"{path}: record {records.number[is_empty_n.argmax()]} has no image, one of {num_empty}; {_AGAIN}, or pass "
            "--allow-partial to leave them out"
        )
    if num_empty:
        notes.append(f"{num_empty} records without an image were left out, first {records.number[is_empty_n.argmax()]}")
    if not has_image_n.any():
        raise ValueError(f"{path} has no images; {_AGAIN}")
    return has_image_n, notes


def _labels(path: Path, records: _Records) -> np.ndarray:
    """The class of every image, int64 [n]."""
    is_class_n = (records.label >= 0) & (records.label < _EXACT) & (records.label == np.trunc(records.label))
    if not is_class_n.all():
        first = int((~is_class_n).argmax())
        raise ValueError(
            f"{path}, record {records.number[first]}: expected a whole number from 0 to {_EXACT - 1} as class, got "
            f"{records.label[first]}; write the records again"
        )
    return records.label.astype(np.int64)


def _compare_property(path: Path, records: _Records, label_n: np.ndarray, num_classes: int) -> list[str]:
    """Compare the classes with the file `property`; a line if it has more of them."""
    file = path.with_name("property")
    if not file.is_file():
        return []
    with open(file, "rb") as stream:
        text = stream.read(200).decode("ascii", "replace").strip()
    try:
        announced, _, _ = map(int, text.split(","))
    except ValueError:
        raise ValueError(f"{file}: expected CLASSES,HEIGHT,WIDTH, got {text[:40]!r}; {_AGAIN}") from None
    if (label_n >= announced).any():
        first = int((label_n >= announced).argmax())
        raise ValueError(
            f"{path}, record {records.number[first]} has class {label_n[first]}, {file} announces {announced} classes; "
            f"{_AGAIN}"
        )
    return [] if announced == num_classes else [f"{file} announces {announced} classes, {num_classes} have images"]


def _source_images(
    path: Path, records: _Records, classes: list[int], class_n: np.ndarray, splits: list[str]
) -> Iterator[SourceImage]:
    names = [str(one) for one in classes]  # shared: there are millions of images
    info: dict[str, object] = {}
    joined = 0
    # Columns to lists a block at a time, whose numbers take a multiple of the arrays' memory.
    for first in range(0, len(class_n), _AT_ONCE):
        some = slice(first, first + _AT_ONCE)
        columns = (records.number, class_n, records.offset, records.start, records.num_bytes, records.in_parts)
        for number, label, offset, start, num_bytes, in_parts in zip(*(c[some].tolist() for c in columns), strict=True):
            content: FileSlice | bytes = FileSlice(path, start, num_bytes)
            if in_parts:
                content = _join_parts(path, number, offset)[start - offset - _FRAME :]
                joined += len(content)
                if joined > _MAX_JOINED:
                    raise ValueError(
                        f"{path}, record {number}: the records in several parts have more than {_MAX_JOINED:,} bytes, "
                        "expected a few images; write the records again"
                    )
            yield SourceImage(splits[label], classes[label], names[label], f"{path.name}#{number}", content, info)


def _join_parts(path: Path, number: int, offset: int) -> bytes:
    """The content of a record that its writer cut at every aligned magic."""
    content, part = b"", 0
    with open(path, "rb") as stream:
        stream.seek(offset)
        while part != 3:
            expected = (2, 3) if part else (1,)
            frame = np.frombuffer(stream.read(_FRAME).ljust(_FRAME, b"\0"), "<u4").tolist()
            part, length = frame[1] >> 29, frame[1] & _LENGTH
            piece = stream.read(length + -length % 4)[:length] if len(content) + length <= MAX_BYTES else b""
            if frame[0] != MAGIC or part not in expected or len(piece) != length:
                raise ValueError(
                    f"{path}, record {number} at byte {offset} is cut after {len(content)} bytes: its next part is not "
                    f"there; {_AGAIN}"
                )
            content += (MAGIC.to_bytes(4, "little") if part > 1 else b"") + piece
    return content
