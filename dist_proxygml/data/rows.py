"""Rows of a table: CSV, TSV and other delimited text, Parquet, JSON lines, COCO's JSON.

    for line, row in Rows(path): ...      row maps a column's name to its value; line says where, for messages

Text is UTF-8 with or without a byte-order mark, quoted as RFC 4180 says; what separates columns is read off the first
line: a tab, a comma, a semicolon, otherwise blanks. Without a header columns are numbered from 1. COCO's JSON
(iNaturalist) is joined to a row an annotation. Declined: guessing encodings and headers, and pandas, whose types turn
the label 007 into 7.
"""

import csv
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from dist_proxygml.storage.files import parse_json, read_file

TABLE_SUFFIXES = (".csv", ".tsv", ".tab", ".txt", ".parquet", ".jsonl", ".ndjson", ".json")
_ROWS_AT_A_TIME = 10_000


class Rows(NamedTuple):
    """The rows of a table file.

    Attributes:
        path: of the file; its suffix tells the format, one of TABLE_SUFFIXES.
        has_header: whether the first line of a text table names its columns.
    """

    path: Path
    has_header: bool = True

    def read(self) -> Iterator[tuple[int, Mapping[str, Any]]]:
        """Yield the line (or row of Parquet, from 1) and the values of every row; text tables have texts only.

        Raises ValueError, naming file and line, for anything that is no table.
        """
        suffix = self.path.suffix.lower()
        if suffix not in TABLE_SUFFIXES:
            raise ValueError(f"{self.path}: expected a table ({', '.join(TABLE_SUFFIXES)}); name another file")
        if not self.path.is_file():  # a pipe would be waited for
            raise ValueError(f"{self.path} is no file, expected a table; correct the path")
        if suffix == ".parquet":
            return self._parquet()
        if suffix == ".json":
            return self._coco()
        return self._json_lines() if suffix in (".jsonl", ".ndjson") else self._text()

    def _text(self) -> Iterator[tuple[int, Mapping[str, Any]]]:
        try:
            with open(self.path, encoding="utf-8-sig", newline="") as stream:
                first = stream.readline()
                stream.seek(0)
                blanks = not any(sign in first for sign in "\t,;")
                delimiter = next((sign for sign in "\t,;" if sign in first), " ")
                reader = csv.reader(stream, delimiter=delimiter, strict=True, skipinitialspace=blanks)
                columns: Sequence[str] | None = None
                line = 0
                for values in reader:
                    line, start = reader.line_num, line + 1
                    if blanks:
                        values = [value for value in values if value]
                    if not any(values):
                        continue
                    if columns is None:
                        columns = self._columns(values)
                        if self.has_header:
                            continue
                    if len(values) != len(columns):
                        raise ValueError(
                            f"{self.path}, line {start}: expected {len(columns)} columns ({', '.join(columns[:9])}), "
                            f"got {len(values)}; quote values that contain {delimiter!r}"
                        )
                    yield start, dict(zip(columns, values, strict=True))
        except csv.Error as problem:
            raise ValueError(
                f"{self.path}, line {reader.line_num}: {problem}; correct the quotes (RFC 4180)"
            ) from problem
        except UnicodeDecodeError as problem:
            raise ValueError(f"{self.path} is not a text file in UTF-8 ({problem}); convert it") from problem

    def _columns(self, values: Sequence[str]) -> list[str]:
        names = [value.strip() for value in values] if self.has_header else [str(i + 1) for i in range(len(values))]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise ValueError(f"{self.path} has two columns called {twice!r}; rename one")
        return names

    def _json_lines(self) -> Iterator[tuple[int, Mapping[str, Any]]]:
        with open(self.path, "rb") as stream:
            for line, text in enumerate(stream, start=1):
                if not text.strip():
                    continue
                try:
                    row = parse_json(text.removeprefix(b"\xef\xbb\xbf"))
                except ValueError as problem:
                    raise ValueError(f"{self.path}, line {line}: no JSON ({problem}); write it again") from problem
                if not isinstance(row, dict):
                    raise ValueError(f"{self.path}, line {line}: expected an object, got {text[:40]!r}; write it again")
                yield line, row

    def _parquet(self) -> Iterator[tuple[int, Mapping[str, Any]]]:
        try:
            from pyarrow import ArrowException
            from pyarrow.parquet import ParquetFile
        except ImportError as problem:
            raise ValueError("reading Parquet needs pyarrow; run `pip install pyarrow`") from problem
        try:
            with ParquetFile(self.path) as table:
                batches = table.iter_batches(_ROWS_AT_A_TIME)
                yield from enumerate((row for batch in batches for row in batch.to_pylist()), start=1)
        except (ArrowException, OSError) as problem:
            raise ValueError(f"{self.path} is not a readable Parquet file ({problem}); copy it again") from problem

    def _coco(self) -> Iterator[tuple[int, Mapping[str, Any]]]:
        expected = f"{self.path}: expected COCO's JSON (images, annotations, categories)"
        try:
            document = parse_json(read_file(self.path))
            images = {image["id"]: image for image in document["images"]}
            names = {category["id"]: category["name"] for category in document.get("categories", ())}
            annotations = list(document["annotations"])
        except KeyError as problem:
            raise ValueError(f"{expected}, got one without {problem}; name another file") from problem
        except (ValueError, TypeError, AttributeError) as problem:
            raise ValueError(f"{expected}, got: {problem!r}; name another file") from problem
        for number, annotation in enumerate(annotations, start=1):
            where = f"{self.path}, annotation {number}"
            try:
                image_id, label = annotation["image_id"], annotation["category_id"]
                image, is_known = images.get(image_id), not names or label in names
            except (KeyError, TypeError) as problem:  # also ids that are lists
                raise ValueError(
                    f"{where}: expected image_id and category_id, got {str(annotation)[:80]}; remove it, or add them"
                ) from problem
            if image is None:
                raise ValueError(
                    f"{where}: expected an id of images, got image_id {image_id!r}; add the image, or remove it"
                )
            if not is_known:
                raise ValueError(
                    f"{where}: expected an id of categories, got category_id {label!r}; add the category, or remove it"
                )
            yield number, {**image, "label": label, **({"class_name": names[label]} if names else {})}


def plain(value: Any) -> Any:
    """Return a value as JSON has it: what JSON has not as a text, bytes and what is no number as null."""
    if isinstance(value, dict):
        return {str(name): plain(part) for name, part in value.items()}
    if isinstance(value, list):
        return [plain(part) for part in value]
    if isinstance(value, bytes):
        return None
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, str | int) else str(value)
