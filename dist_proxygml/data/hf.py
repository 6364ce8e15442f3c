"""Data sets of Hugging Face's `datasets` to a list of images: a folder of `save_to_disk`, or a name on the hub.

Each row has an image, kept as the bytes of its file, and a class: a ClassLabel with its names, a number or a text.
Splits keep their names where train shares no class with the others; the usual division of classification sets, where
each class trains and tests, takes `allow_seen_classes`, or a `split` of the classes of all of them.

Chosen: `datasets` opens, downloads and describes; the bytes of an image are then found in its mapped Arrow file by the
address of their buffer, so that every writing process reads them there by offset, without `datasets` and without a
copy in memory.
Declined: images that a row names by a path only, which may lead anywhere (`save_to_disk` puts their bytes into its
files); decoding and encoding anew; data sets that run code of their own, which `datasets` from 4 on refuses.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dist_proxygml.data.class_split import HALF, ClassSplit, notes_of_split, split_by_class
from dist_proxygml.data.datasets import FileSlice, SourceDataset, SourceImage, check_classes

_SAVED = ("dataset_dict.json", "state.json")  # of a folder of save_to_disk
_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?(:[\w.-]+)?")
_SAVE = "save it with `datasets.load_dataset(...).save_to_disk(FOLDER)` and build from FOLDER"
_USUAL_COLUMNS: Mapping[str, tuple[str, ...]] = {
    "image": ("image", "img", "jpg", "png"),
    "label": ("label", "labels", "fine_label", "cls", "class"),
}


def read_hf(
    root: str,
    *,
    columns: Mapping[str, str] | None = None,
    allow_partial: bool = False,
    allow_seen_classes: bool = False,
    split: ClassSplit = HALF,
) -> SourceDataset:
    """Read a folder of `save_to_disk`, or the data set `NAME` or `NAME:CONFIGURATION` of the hub.

    Args:
        root: folder or name.
        columns: names of the columns image and label.
        allow_partial: leave out rows without an image or a class.
        allow_seen_classes: let splits share classes.
        split: division of the classes of a data set with one split; if it says how many train, of all splits together.

    Raises ValueError if there is no such data set or column, or naming the row that cannot be used.
    """
    columns = columns or {}
    unknown = sorted(set(columns) - set(_USUAL_COLUMNS))
    if unknown:
        raise ValueError(f"--columns: expected {', '.join(_USUAL_COLUMNS)}, got {unknown[0]!r}; write image=COLUMN")
    images: list[SourceImage] = []
    num_left_out = 0
    tables = _open(root)
    for name, table in tables.items():
        for image in _images(root, name, table, columns):
            if not isinstance(image, str):
                images.append(image)
            elif not allow_partial:
                raise ValueError(f"{image}; pass --allow-partial to leave such rows out")
            else:
                num_left_out += 1
    if not images:
        raise ValueError(f"{root} has no rows with an image and a class; name another data set")
    notes = [f"{num_left_out} rows without an image or a class were left out"] if num_left_out else []
    record: dict[str, Any] = {}
    if split.train is not None or len(tables) == 1:
        split_of, record = split_by_class((image.source_id for image in images), split, where=f"found in {root}")
        images = [replace(image, split=split_of(image.source_id)) for image in images]
        notes += notes_of_split(record)
    dataset = SourceDataset("hf", images, (("query", "gallery"),), tuple(notes), build=record, is_upright=True)
    try:
        check_classes(dataset, allow_seen=allow_seen_classes)
    except ValueError as problem:
        raise ValueError(
            f"{root}: {problem}; or divide the classes of all splits anew with --split-classes N"
        ) from None
    return dataset


def _open(root: str) -> dict[str, Any]:
    """The splits of a data set by name."""
    try:
        import datasets
    except ImportError as problem:
        raise ValueError("reading these data sets needs `datasets`; run `pip install 'dist_proxygml[hf]'`") from problem
    is_folder = Path(root).is_dir()
    if is_folder and not any((Path(root) / name).is_file() for name in _SAVED):
        raise ValueError(f"{root} is not a folder of `save_to_disk`: expected {' or '.join(_SAVED)}; {_SAVE}")
    if not is_folder and not _NAME.fullmatch(root):
        raise ValueError(f"{root} is neither a folder nor the name of a data set such as user/name; correct it")
    try:
        if is_folder:
            found = datasets.load_from_disk(root)
        else:
            name, _, configuration = root.partition(":")
            found = datasets.load_dataset(name, configuration or None)
    except Exception as problem:  # of the network, the hub, the files
        reason = f"{type(problem).__name__}: {str(problem)[:400]}"
        where = "it cannot be read" if is_folder else "it is no folder here, and the hub gives no such data set"
        raise ValueError(f"{root}: {where} ({reason}); correct the path or the name") from problem
    return dict(found) if isinstance(found, dict) else {str(found.split or "train"): found}


class _File(NamedTuple):
    """A mapped Arrow file: its rows, and where in memory it lies."""

    path: Path
    rows: Any  # pyarrow.Table
    first: int  # address
    num_bytes: int


def _files(where: str, table: Any) -> Iterator[_File]:
    import pyarrow

    num_rows = 0
    for cached in table.cache_files:
        path = Path(cached["filename"])
        content = pyarrow.memory_map(str(path))
        buffer = content.read_buffer(content.size())
        rows = pyarrow.ipc.open_stream(buffer).read_all()
        num_rows += len(rows)
        yield _File(path, rows, buffer.address, buffer.size)
    if num_rows != len(table):  # a selection of rows, or rows in memory
        raise ValueError(f"{where} has {len(table)} rows, its files {num_rows}; {_SAVE}")


def _images(root: str, split: str, table: Any, columns: Mapping[str, str]) -> Iterator[SourceImage | str]:
    """Yield the image of every row, or what is wrong with it."""
    where = f"{root}, split {split}"
    names = {}
    for part, usual in _USUAL_COLUMNS.items():
        names[part] = columns.get(part) or next((name for name in usual if name in table.features), "")
        if names[part] not in table.features:
            raise ValueError(
                f"{where}: expected a column {names[part] or part!r}, got {', '.join(table.features)}; name it with "
                f"--columns {part}=COLUMN"
            )
    import pyarrow

    class_names = getattr(table.features[names["label"]], "names", None)
    known: dict[int | str, str] = {}  # shared: there are millions of images
    info: dict[str, Any] = {}
    number = -1
    for file in _files(where, table):
        for batch in file.rows.to_batches():
            try:
                batch.validate()
                batch.column(names["label"]).validate(full=True)  # somebody else's offsets
            except pyarrow.ArrowInvalid as problem:
                raise ValueError(f"{where}: {file.path} is damaged ({problem}); {_SAVE}") from problem
            places = _places(where, file, batch.column(names["image"]))
            for place, label in zip(places, batch.column(names["label"]).to_pylist(), strict=True):
                number += 1
                name = f"{split}/{number}"
                if place is None:
                    yield f"{where}: row {number} has no image"
                elif label is None or label == -1:
                    yield f"{where}: row {number} has no class"
                elif type(label) not in (int, str) or (class_names is not None and not 0 <= label < len(class_names)):
                    raise ValueError(
                        f"{where}: row {number} has class {str(label)[:40]!r}; expected a number or a text"
                    )
                else:
                    class_name = known.setdefault(label, str(label if class_names is None else class_names[label]))
                    yield SourceImage(split, label, class_name, name, FileSlice(file.path, *place), info)


def _places(where: str, file: _File, column: Any) -> list[tuple[int, int] | None]:
    """Offset and length of every image of a batch in its file; None for a row without one."""
    import pyarrow

    of_type, path_is_there = column.type, np.zeros(len(column), bool)
    if pyarrow.types.is_struct(of_type):  # the feature Image: bytes and path
        fields = dict(zip((field.name for field in of_type), column.flatten(), strict=True))
        column = fields.get("bytes", pyarrow.nulls(len(column)))
        if "path" in fields:
            path_is_there = fields["path"].is_valid().to_numpy(zero_copy_only=False)
    is_there = column.is_valid().to_numpy(zero_copy_only=False)
    if (path_is_there & ~is_there).any():
        raise ValueError(f"{where}: images are named by their paths, expected their bytes; {_SAVE}")
    if not is_there.any():
        return [None] * len(column)
    is_large = pyarrow.types.is_large_binary(column.type)
    if not is_large and not pyarrow.types.is_binary(column.type):
        raise ValueError(
            f"{where}: expected a column of image files, got {of_type}; name another with --columns image="
        )
    _, offsets, content = column.buffers()
    ends = np.frombuffer(offsets, np.int64 if is_large else np.int32)[column.offset : column.offset + len(column) + 1]
    ends = ends.astype(np.int64) + (content.address - file.first)
    if ends.min() < 0 or ends.max() > file.num_bytes or (np.diff(ends) < 0).any():
        raise ValueError(f"{where}: {file.path} is compressed or damaged; {_SAVE}")
    starts = ends.tolist()
    return [
        (start, end - start) if one else None
        for start, end, one in zip(starts[:-1], starts[1:], is_there.tolist(), strict=True)
    ]
