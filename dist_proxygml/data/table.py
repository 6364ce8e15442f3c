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

import os
import re
from array import array
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from dist_proxygml.data.class_split import HALF, ClassSplit, split_by_class
from dist_proxygml.data.datasets import USUAL_SPLITS, SourceDataset, SourceImage, finish, listing
from dist_proxygml.data.rows import TABLE_SUFFIXES, Rows, plain

# What each part of a row is called, if `columns` does not say.
USUAL_COLUMNS: Mapping[str, tuple[str, ...]] = {
    "image": ("image", "file_name", "path", "image_path", "filename"),
    "label": ("label", "class", "class_id"),
    "split": ("split",),
    "class_name": ("class_name",),
}
_OPTIONAL = ("split", "class_name")


def read_table(
    tables: Sequence[str],
    root: Path | None = None,
    *,
    columns: Mapping[str, str] | None = None,
    template: str | None = None,
    several: bool = False,
    allow_partial: bool = False,
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
        split: division of the classes where no split is named; if it says how many train, splits are not looked at.

    Raises ValueError naming table and line.
    """
    columns = columns or {}
    unknown = sorted(set(columns) - set(USUAL_COLUMNS))
    if unknown:
        raise ValueError(f"--columns: expected {', '.join(USUAL_COLUMNS)}, got {unknown[0]!r}; write image=COLUMN")
    found = [_table_of(text) for text in tables] or [(None, path) for path in _metadata(root)]
    rows: list[_Row] = []
    line_of: array[int] = array("Q")
    starts: list[int] = []  # of each table's rows
    for given, path in found:
        starts.append(len(rows))
        of_name = given or (_split_of_name(path) if len(found) > 1 else None) or ""
        for line, row in _TableReader(path, root, columns, template, of_name, several=several).rows():
            rows.append(row)
            line_of.append(line)

    def place(number: int) -> str:
        table = max(i for i, start in enumerate(starts) if start <= number)
        return f"{found[table][1]}, line {line_of[number]}"

    if not rows:
        raise ValueError(f"{', '.join(str(path) for _, path in found)}: expected rows, found none; name another table")
    labels = _labels({row.label for row in rows})
    without = next((number for number, row in enumerate(rows) if not row.split), None)
    split_of_class, record = None, {}
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
        root=root or found[0][1].parent,
        allow_partial=allow_partial,
        shared_classes=(("query", "gallery"),),
        place=place,
    )
    return replace(dataset, build=record)


def _table_of(text: str) -> tuple[str | None, Path]:
    """Return split and path of `PATH` or `SPLIT=PATH`."""
    split, equals, path = text.partition("=")
    if equals and not os.path.exists(text) and re.fullmatch(r"[^./\s]{1,60}", split):
        return split, Path(path)
    return None, Path(text)


def _metadata(root: Path | None) -> list[Path]:
    """Return the tables that Hugging Face's `imagefolder` would read."""
    if root is None:
        raise ValueError("expected tables (--table), or --root with a folder that has metadata.csv; got neither")
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


class _TableReader:
    """Rows of one table; `split` is that of those which say none."""

    def __init__(
        self,
        path: Path,
        root: Path | None,
        columns: Mapping[str, str],
        template: str | None,
        split: str,
        *,
        several: bool,
    ) -> None:
        self.path = path
        self.columns = columns
        self.template = template
        self.split = split
        self.several = several
        self.confined = root is not None
        self.base = os.path.join(os.path.realpath(path.parent if root is None else root), "")

    def rows(self) -> Iterator[tuple[int, _Row]]:
        """Yield every image with its line."""
        has_header = not (self.columns and all(name.isdigit() for name in self.columns.values()))
        names: dict[str, str] | None = None
        used: frozenset[str] = frozenset()
        for line, row in Rows(self.path, has_header=has_header).read():
            if names is None:
                names = self._names(row)
                # A column that makes part of a path only through the template is kept.
                used = frozenset(names.values())
            label = _text(row.get(names["label"]))
            if not label:
                raise ValueError(
                    f"{self.path}, line {line}: expected a label in the column {names['label']!r}, found none; fill "
                    "it in, or remove the row"
                )
            split = (_text(row.get(names["split"])) if "split" in names else "") or self.split
            split = split.lower() if split.lower() in USUAL_SPLITS else split
            class_name = _text(row.get(names["class_name"])) if "class_name" in names else ""
            info = {
                f"table.{name}" if name in _OWN else name: value if isinstance(value, str) else plain(value)
                for name, value in row.items()
                if name not in used
            }
            given = row.get(names["image"]) if "image" in names else ""
            if not isinstance(given, str):
                raise ValueError(
                    f"{self.path}, line {line}: expected a path in the column {names['image']!r}, got "
                    f"{type(given).__name__}; write the images into files of their own"
                )
            for image in given.split() if self.several else (given,):
                name, content = self._place(line, image, row, names)
                yield line, _Row(split, label, class_name or label, name, content, info)

    def _names(self, row: Mapping[str, Any]) -> dict[str, str]:
        """Return the column of each part of a row."""
        names = {}
        for part, usual in USUAL_COLUMNS.items():
            asked = self.columns.get(part)
            name = next((name for name in ((asked,) if asked else usual) if name in row), None)
            if name is not None:
                names[part] = name
            elif asked or not (part in _OPTIONAL or (part == "image" and self.template)):
                raise ValueError(
                    f"{self.path}: expected a column {asked or ' or '.join(usual)}, found "
                    f"{', '.join(list(row)[:12])}; name it with --columns {part}=COLUMN"
                )
        return names

    def _place(self, line: int, image: str, row: Mapping[str, Any], names: Mapping[str, str]) -> tuple[str, str]:
        """Return the name and the path of an image."""
        if self.template is not None:
            try:
                image = self.template.format_map({**row, names["image"]: image} if "image" in names else row)
            except (KeyError, IndexError, AttributeError, ValueError, TypeError) as problem:
                raise ValueError(
                    f"{self.path}, line {line}: --image-path {self.template!r} cannot be filled in ({problem!r}); it "
                    f"may name {', '.join(list(row)[:12])}"
                ) from problem
        if not image:
            raise ValueError(f"{self.path}, line {line}: expected a path, found none; fill it in, or remove the row")
        if image[0] not in "/." and "/." not in image and "//" not in image:  # nothing to normalise
            return image, self.base + image
        path = os.path.normpath(os.path.join(self.base, image))
        if path.startswith(self.base):
            return path[len(self.base) :], path
        if self.confined:
            raise ValueError(
                f"{self.path}, line {line}: {image} lies outside {self.base}; point --root higher up, or leave it out"
            )
        return path.lstrip("/"), path


# Fields of a sample's JSON that are not the table's.
_OWN = frozenset({"source", "source_id", "class_name", "split", "width", "height", "orientation", "exif", "reencoded"})


def _text(value: Any) -> str:
    return "" if value is None else str(value).strip()


def _labels(texts: Collection[str]) -> dict[str, int | str]:
    """Return the class ids of labels: whole numbers if all are written like one."""
    if all(re.fullmatch(r"-?(0|[1-9]\d{0,17})", text) for text in texts):
        return {text: int(text) for text in texts}
    return {text: text for text in texts}
