"""Tables of images: a row names a file, its class and perhaps its split; any other column goes to the sample's JSON.

    table.csv           image,label,split          paths are relative to the table, or to `root`
    train.csv test.csv  image,label                a table for each split, told by the names
    root/*/metadata.csv file_name,label            folders as Hugging Face's `imagefolder` has them

Covers split lists (`path label`), Products-10K, Google Landmarks (with a template of its paths), iNaturalist (COCO's
JSON) and what people keep of their catalogues. Labels are whole numbers if all are, otherwise texts.

Chosen: paths may lead anywhere the user may read unless `root` is given, which then holds them all: a catalogue has its
images where they are. Rows are kept as texts, so a million of them fit (measured in docs/data.md).
Declined: images inside a table, addresses on the web.
"""

import math
import os
import re
from array import array
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from dist_proxygml.data.class_split import HALF, ClassSplit, notes_of_split, split_by_class
from dist_proxygml.data.datasets import USUAL_SPLITS, SourceDataset, SourceImage, finish, listing
from dist_proxygml.data.rows import TABLE_SUFFIXES, Rows, plain

# What each part of a row is called, if `columns` does not say.
USUAL_COLUMNS: Mapping[str, tuple[str, ...]] = {
    "image": ("image", "file_name", "path", "image_path", "filename"),
    "label": ("label", "class", "class_id"),
    "split": ("split",),
    "class_name": ("class_name",),
}


def read_table(
    tables: Sequence[str],
    root: Path | None = None,
    *,
    columns: Mapping[str, str] | None = None,
    template: str | None = None,
    several: bool = False,
    allow_partial: bool = False,
    allow_seen_classes: bool = False,
    split: ClassSplit = HALF,
) -> SourceDataset:
    """Read the tables `PATH` or `SPLIT=PATH`; none are the `metadata.*` in `root` and its folders.

    Args:
        tables: of the formats of `rows`.
        root: folder that paths are relative to, and lie in; None: the table's own folder, and anywhere.
        columns: names of the columns image, label, split and class_name; numbers, from 1, for tables without a header.
        template: path of an image, with the row's values in braces: `train/{id[0]}/{id}.jpg`.
        several: whether the image column names several images of a class, separated by blanks.
        allow_partial: leave out rows whose image is not there.
        allow_seen_classes: let splits share classes; query and gallery always may.
        split: division of the classes where no split is named; if it says how many train, splits are not looked at.

    Raises ValueError naming table and line.
    """
    columns = columns or {}
    unknown = sorted(set(columns) - set(USUAL_COLUMNS))
    if unknown:
        raise ValueError(f"--columns: expected {', '.join(USUAL_COLUMNS)}, got {unknown[0]!r}; write image=COLUMN")
    found = [_table_of(text) for text in tables] or [(None, path) for path in _metadata(root)]
    folders = [path.parent for _, path in found]
    top = root or Path(os.path.commonpath([os.path.realpath(folder) for folder in folders]))
    places = _Places(top, template, is_confined=root is not None, several=several)
    rows: list[_Row] = []
    line_of: array[int] = array("Q")
    starts: list[int] = []  # of each table's rows
    for (given, path), folder in zip(found, folders, strict=True):
        starts.append(len(rows))
        of_name = given or (_split_of_name(path) if len(found) > 1 else None) or ""
        # Hugging Face's paths are those from the table; `root` is where the tables are.
        base = root if root is not None and tables else folder
        for line, row in _read(path, base, columns, of_name, places):
            rows.append(row)
            line_of.append(line)

    def place(number: int) -> str:
        table = max(i for i, start in enumerate(starts) if start <= number)
        return f"{found[table][1]}, line {line_of[number]}"

    if not rows:
        raise ValueError(f"{', '.join(str(path) for _, path in found)}: expected rows, found none; name another table")
    labels = _labels({row.label for row in rows})
    without = next((number for number, row in enumerate(rows) if not row.split), None)
    split_of_class, record = None, dict[str, Any]()
    if split.train is not None or not any(row.split for row in rows):
        where = "name other tables, or add a column split"
        split_of_class, record = split_by_class(labels.values(), split, where=where)
    elif without is not None:
        raise ValueError(
            f"{place(without)}: expected a split, as other rows have one; add it, name the table's split with "
            "--table SPLIT=FILE, or divide all classes with --split-classes"
        )
    images = [
        SourceImage(
            split_of_class(labels[row.label]) if split_of_class else row.split,
            labels[row.label],
            row.class_name,
            row.name,
            row.path,
            row.info,
        )
        for row in rows
    ]
    del rows
    dataset = finish(
        "table",
        images,
        root=top,
        allow_partial=allow_partial,
        allow_seen_classes=allow_seen_classes,
        shared_classes=(("query", "gallery"),),
        place=place,
    )
    return replace(dataset, notes=(*dataset.notes, *notes_of_split(record)), build=record, is_upright=True)


def _table_of(text: str) -> tuple[str | None, Path]:
    """Return split and path of `PATH` or `SPLIT=PATH`."""
    split, equals, path = text.partition("=")
    if equals and not os.path.exists(text) and re.fullmatch(r"[^./\s]{1,60}", split):
        return split, Path(path)
    return None, Path(text)


def _metadata(root: Path | None) -> list[Path]:
    """Return the tables that Hugging Face's `imagefolder` would read."""
    if root is None:
        raise ValueError("expected tables (--table), or --data with a folder that has metadata.csv; got neither")
    paths = [*root.glob("metadata.*"), *root.glob("*/metadata.*")]
    found = sorted(path for path in paths if path.suffix in TABLE_SUFFIXES)
    if not found:
        raise ValueError(
            f"{root}: expected metadata.csv, metadata.jsonl or metadata.parquet there or in its folders, found "
            f"{listing(root)}; name tables with --table"
        )
    return found


def _split_of_name(path: Path) -> str | None:
    """Return the split that a table's name, or else its folder's, has among its words."""
    for name in (path.stem, path.parent.name):
        words = USUAL_SPLITS.intersection(re.split(r"[^a-z]+", name.lower()))
        if len(words) == 1:
            return next(iter(words))
    return None


class _Row(NamedTuple):
    split: str  # "": none
    label: str
    class_name: str
    name: str
    path: str
    info: Mapping[str, Any]


def _read(
    path: Path, base: Path, columns: Mapping[str, str], split_of_table: str, places: "_Places"
) -> Iterator[tuple[int, _Row]]:
    """Yield every image of a table with its line."""
    has_header = not (columns and all(name.isdigit() for name in columns.values()))
    folder = os.path.join(os.path.realpath(base), "")
    names: dict[str, str] | None = None
    used: frozenset[str] = frozenset()
    for line, row in Rows(path, has_header=has_header).read():
        if names is None:
            names = _names(path, row, columns, needs_image=places.template is None)
            used = frozenset(names.values())
        label = _text(row.get(names["label"]))
        if not label:
            raise ValueError(
                f"{path}, line {line}: expected a label in the column {names['label']!r}, found none; fill it in, or "
                "remove the row"
            )
        split = (_text(row.get(names["split"])) if "split" in names else "") or split_of_table
        split = split.lower() if split.lower() in USUAL_SPLITS else split
        class_name = _text(row.get(names["class_name"])) if "class_name" in names else ""
        info = {
            f"table.{name}" if name in _OWN else name: value if isinstance(value, str) else plain(value)
            for name, value in row.items()
            if name not in used
        }
        for name, image in places.of_row(f"{path}, line {line}", row, names.get("image"), folder):
            yield line, _Row(split, label, class_name or label, name, image, info)


def _names(path: Path, row: Mapping[str, Any], columns: Mapping[str, str], *, needs_image: bool) -> dict[str, str]:
    """Return the column of each part of a row. Raises ValueError if one is missing."""
    names = {}
    for part, usual in USUAL_COLUMNS.items():
        asked = columns.get(part)
        name = next((name for name in ((asked,) if asked else usual) if name in row), None)
        if name is not None:
            names[part] = name
        elif asked or part == "label" or (part == "image" and needs_image):
            raise ValueError(
                f"{path}: expected a column {asked or ' or '.join(usual)}, found {', '.join(list(row)[:12])}; name it "
                f"with --columns {part}=COLUMN"
            )
    return names


class _Places:
    """Where images lie, and what they are called: their paths below `top`, or whole ones without the first slash."""

    def __init__(self, top: Path, template: str | None, *, is_confined: bool, several: bool) -> None:
        self.top = os.path.join(os.path.realpath(top), "")
        self.template = template
        self.is_confined = is_confined
        self.several = several

    def of_row(self, where: str, row: Mapping[str, Any], column: str | None, folder: str) -> Iterator[tuple[str, str]]:
        """Yield name and path of each image of a row. Raises ValueError saying `where`."""
        given = "" if column is None else row.get(column)
        if not isinstance(given, str):
            raise ValueError(
                f"{where}: expected a path in the column {column!r}, got {type(given).__name__}; write the images into "
                "files of their own"
            )
        for image in given.split() if self.several else (given,):
            if self.template is not None:
                try:
                    image = self.template.format_map(row if column is None else {**row, column: image})
                except (KeyError, IndexError, AttributeError, ValueError, TypeError) as problem:
                    raise ValueError(
                        f"{where}: --image-path {self.template!r} cannot be filled in ({problem!r}); it may name "
                        f"{', '.join(list(row)[:12])}"
                    ) from problem
            if not image:
                raise ValueError(f"{where}: expected a path, found none; fill it in, or remove the row")
            path = folder + image
            if image[0] in "/." or "/." in image or "//" in image:
                path = os.path.normpath(os.path.join(folder, image))
            if path.startswith(self.top):
                yield path[len(self.top) :], path
            elif self.is_confined:
                raise ValueError(f"{where}: {image} lies outside {self.top}; point --data higher up, or leave it out")
            else:
                yield path.lstrip("/"), path


# Fields of a sample's JSON that are not the table's.
_OWN = frozenset({"source", "source_id", "class_name", "split", "width", "height", "orientation", "exif", "reencoded"})


def _text(value: Any) -> str:
    """A cell as text; empty where the value is missing, which pandas writes as NaN in a column of numbers."""
    return "" if value is None or (isinstance(value, float) and math.isnan(value)) else str(value).strip()


def _labels(texts: Collection[str]) -> dict[str, int | str]:
    """Return the class ids of labels: whole numbers if all are written like one."""
    if all(re.fullmatch(r"-?(0|[1-9]\d{0,17})", text) for text in texts):
        return {text: int(text) for text in texts}
    return {text: text for text in texts}
