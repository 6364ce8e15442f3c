"""Display names of classes from a table: a folder's name or a label in the first column, its name in the second.

Two classes of one name would be taken for one class in training and test, so each of them keeps its label beside it.
"""

from collections import Counter
from dataclasses import replace
from pathlib import Path

from dist_proxygml.data.datasets import SourceDataset
from dist_proxygml.data.rows import Rows


def with_class_names(dataset: SourceDataset, path: Path) -> SourceDataset:
    """Name the classes of a data set by a table (see `rows`), with or without a header; others keep their names.

    Raises ValueError if none of its rows is for one of the classes, or two are for the same.
    """
    names: dict[str, str] = {}
    labels = {str(image.source_id): image.source_id for image in dataset.images}
    for line, row in Rows(path, has_header=False).read():
        label, name, *_ = (*(str(value).strip() for value in row.values()), "")
        if label not in labels or not name:
            continue
        if names.setdefault(label, name) != name:
            raise ValueError(f"{path}, line {line}: {label} is named {name!r}, above {names[label]!r}; remove one")
    if not names:
        raise ValueError(
            f"{path}: expected a class in the first column and its name in the second, found none of the "
            f"{len(labels)} classes, such as {next(iter(labels))!r}; name another table"
        )
    uses = Counter(names.values())
    named = {labels[label]: name if uses[name] == 1 else f"{name} ({label})" for label, name in names.items()}
    images = [replace(image, class_name=named.get(image.source_id, image.class_name)) for image in dataset.images]
    note = f"{len(named)} of {len(labels)} classes are named by {path}"
    return replace(dataset, images=images, notes=(*dataset.notes, note))
