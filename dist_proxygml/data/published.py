"""Published benchmarks as they are downloaded: CUB, Cars, SOP, In-Shop.

Always the metric-learning split: training and test classes are disjoint (the first half of the
classes trains on CUB and Cars), never the classification split that some downloads include.
Records are joined by id, not by line.

Downloads may be nested in a folder or two, with tables beside or inside that folder and the line ends and suffixes of
another system: a layout is searched in `root` and two levels below, each file at the places where copies have it.
"""

import csv
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from dist_proxygml.data.datasets import SourceDataset, SourceImage, finish, is_hidden, listing, text_lines

_ARCHIVE_SUFFIXES = (".zip", ".tgz", ".tar", ".gz", ".7z", ".rar")


def read_cub200(root: Path, *, allow_partial: bool = False) -> SourceDataset:
    """Read CUB-200-2011: `images.txt`, `image_class_labels.txt` and `classes.txt`, joined by id.

    Classes 1-100 train, 101-200 test.
    """
    _, root = find_layout(
        root, {"CUB_200_2011": [("images.txt",), ("image_class_labels.txt",), ("classes.txt",), ("images",)]}
    )
    names, labels, classes = (_table(root / table) for table in ("images.txt", "image_class_labels.txt", "classes.txt"))
    folder = _innermost(root / "images")
    boxes = {}
    if (root / "bounding_boxes.txt").is_file():
        rows = rows_of(root / "bounding_boxes.txt", 5)
        boxes = {image_id: _box(box, f"{root / 'bounding_boxes.txt'}, image {image_id}") for image_id, *box in rows}
    if names.keys() != labels.keys():
        one_sided = sorted(names.keys() ^ labels.keys(), key=lambda image_id: (len(image_id), image_id))
        raise ValueError(
            f"{root}: images.txt and image_class_labels.txt list different ids "
            f"({len(one_sided)} in only one of them, first {one_sided[0]}); unpack it again"
        )
    images = []
    for image_id in sorted(names, key=lambda image_id: _as_int(image_id, root / "images.txt")):
        class_id = _as_int(labels[image_id], f"{root / 'image_class_labels.txt'}, image {image_id}")
        if labels[image_id] not in classes:
            raise ValueError(
                f"{root}: image {image_id} has class {labels[image_id]}, which classes.txt does not list; unpack again"
            )
        images.append(
            SourceImage(
                split="train" if class_id <= 100 else "test",
                source_id=class_id,
                class_name=classes[labels[image_id]],
                name=names[image_id],
                content=folder / names[image_id],
                info={"bbox_xywh": boxes[image_id]} if image_id in boxes else {},
            )
        )
    return finish("cub200", images, root=root, allow_partial=allow_partial)


def read_cars196(root: Path, *, allow_partial: bool = False) -> SourceDataset:
    """Read Cars196 in any of its three layouts. Classes 1-98 train, 99-196 test.

    The `test` flag of the download belongs to the classification split and is ignored.

    `cars_annos.mat` + `car_ims/`; `devkit/` + `cars_train/` + `cars_test/`; `names.csv` +
    `anno_{train,test}.csv` + `car_data/`.
    """
    readers: dict[str, Callable[[Path], list[SourceImage]]] = {
        "one folder": _cars_one_folder,
        "devkit": _cars_devkit,
        "csv": _cars_csv,
    }
    layout, root = find_layout(root, _CARS_LAYOUTS)
    return finish("cars196", readers[layout](root), root=root, allow_partial=allow_partial)


_CARS_META = ("devkit/cars_meta.mat", "car_devkit/devkit/cars_meta.mat", "cars_meta.mat")
# Name of the image folder -> places of its table; the labelled test table was a separate download.
_CARS_TABLES = {
    folder: tuple(f"{place}{table}" for place in ("devkit/", "car_devkit/devkit/", ""))
    for folder, table in (
        ("cars_train", "cars_train_annos.mat"),
        ("cars_test", "cars_test_annos_withlabels*.mat"),
    )
}
_CARS_LAYOUTS: dict[str, list[tuple[str, ...]]] = {
    "one folder": [("cars_annos.mat",), ("car_ims",)],
    "devkit": [_CARS_META, *_CARS_TABLES.values(), *((folder,) for folder in _CARS_TABLES)],
    "csv": [("names.csv",), ("anno_train.csv",), ("anno_test.csv",), ("car_data",)],
}


def _cars_image(class_id: int, class_names: list[str], name: str, path: Path, box: Iterable[int]) -> SourceImage:
    if not 1 <= class_id <= len(class_names):
        raise ValueError(
            f"{name} has class {class_id}, expected 1 to {len(class_names)}; unpack the Cars196 download again"
        )
    split = "train" if class_id <= 98 else "test"
    info = {"bbox_xyxy": [int(value) for value in box]}
    return SourceImage(split, class_id, class_names[class_id - 1], name, path, info)


def _cars_one_folder(root: Path) -> list[SourceImage]:
    names = _mat_strings(root / "cars_annos.mat", "class_names")
    folder = _innermost(root / "car_ims")
    images = []
    for row in _mat_records(root / "cars_annos.mat", "annotations", "relative_im_path", "class", *_CARS_BOX):
        path = str(row["relative_im_path"].item())
        box = [row[side].item() for side in _CARS_BOX]
        where = folder / path.removeprefix("car_ims/")
        images.append(_cars_image(int(row["class"].item()), names, path, where, box))
    return images


_CARS_BOX = ("bbox_x1", "bbox_y1", "bbox_x2", "bbox_y2")


def _cars_devkit(root: Path) -> list[SourceImage]:
    names = _mat_strings(_need(root, _CARS_META), "class_names")
    images = []
    # File names repeat across the two folders, so the folder belongs to the name.
    for folder, places in _CARS_TABLES.items():
        where = _innermost(root / folder)
        for row in _mat_records(_need(root, places), "annotations", "fname", "class", *_CARS_BOX):
            file = str(row["fname"].item())
            box = [row[side].item() for side in _CARS_BOX]
            images.append(_cars_image(int(row["class"].item()), names, f"{folder}/{file}", where / file, box))
    return images


def _cars_csv(root: Path) -> list[SourceImage]:
    names = [row[0].strip() for row in _csv_rows(root / "names.csv")]
    data = _innermost(root / "car_data")
    images = []
    for split in ("train", "test"):
        table = root / f"anno_{split}.csv"
        for row in _csv_rows(table):
            if len(row) != 6:
                raise ValueError(f"{table}: expected 6 columns, got {','.join(row)!r}; unpack the download again")
            file, *sides, label = row
            class_id, *box = (_as_int(text, f"{table}, image {file}") for text in (label, *sides))
            known = 1 <= class_id <= len(names)
            path = data / split / (names[class_id - 1].replace("/", "-") if known else "") / file
            images.append(_cars_image(class_id, names, str(path.relative_to(root)), path, box))
    return images


def _csv_rows(path: Path) -> list[list[str]]:
    return [row for row in csv.reader(text_lines(path)) if row]


def read_sop(root: Path, *, allow_partial: bool = False) -> SourceDataset:
    """Read Stanford Online Products: `Ebay_train.txt` and `Ebay_test.txt`; a header, 1-based ids."""
    _, root = find_layout(root, {"Stanford_Online_Products": [("Ebay_train.txt",), ("Ebay_test.txt",)]})
    images = []
    for split in ("train", "test"):
        rows = rows_of(root / f"Ebay_{split}.txt", 4)
        header = next(rows, ())
        if header != ("image_id", "class_id", "super_class_id", "path"):
            raise ValueError(
                f"{root}/Ebay_{split}.txt: expected the header 'image_id class_id super_class_id "
                f"path', got {' '.join(header)!r}"
            )
        for _, class_id, _, path in rows:
            category = path.split("/")[0].removesuffix("_final")
            name = f"{category}_{class_id}"
            info = {"category": category}
            number = _as_int(class_id, f"{root}/Ebay_{split}.txt, image {path}")
            images.append(SourceImage(split, number, name, path, root / path, info))
    return finish("sop", images, root=root, allow_partial=allow_partial)


_INSHOP_LISTS = tuple(f"{place}list_eval_partition.txt" for place in ("Eval/", "Anno/", ""))
_INSHOP_FOLDERS = ("Img/img", "img", "Img/img_highres", "img_highres")


def read_inshop(root: Path, *, allow_partial: bool = False) -> SourceDataset:
    """Read In-Shop Clothes Retrieval of DeepFashion: `Eval/list_eval_partition.txt`, with `img` or, if that is
    missing, `img_highres`.

    The splits are train, query and gallery; the last two share one label space and are scored
    against each other.
    """
    _, root = find_layout(root, {"In-shop Clothes Retrieval Benchmark": [_INSHOP_LISTS, _INSHOP_FOLDERS]})
    table = _need(root, _INSHOP_LISTS)
    announced = next(iter(text_lines(table)), "").strip()
    if not announced.isdigit():
        raise ValueError(
            f"{table}: expected the number of images in line 1, got {announced[:80]!r}; unpack the download again"
        )
    rows = rows_of(table, 3, skip_lines=1)
    header = next(rows, ())
    if header != ("image_name", "item_id", "evaluation_status"):
        raise ValueError(
            f"{table}: expected the header 'image_name item_id evaluation_status', got {' '.join(header)!r}"
        )
    listed = list(rows)
    # Of the existing folders, the one with the listed images.
    tops = {name.removeprefix("img/").split("/")[0] for name, _, _ in listed}
    folders = [_innermost(root / place) for place in _INSHOP_FOLDERS if (root / place).is_dir()]
    folder = next((folder for folder in folders if any((folder / top).is_dir() for top in tops)), folders[0])
    images = []
    for name, item, status in listed:
        if status not in ("train", "query", "gallery"):
            raise ValueError(f"{table}: {name} has the status {status!r}, expected train, query or gallery")
        info = {"category": "/".join(name.split("/")[1:3])}
        images.append(SourceImage(status, item, item, name, folder / name.removeprefix("img/"), info))
    if len(images) != int(announced) and not allow_partial:
        raise ValueError(
            f"{table} announces {announced} images and lists {len(images)}; unpack it again, or pass --allow-partial"
        )
    return finish(
        "inshop",
        images,
        root=root,
        allow_partial=allow_partial,
        shared_classes=(("query", "gallery"),),
    )


def find_layout(root: Path, layouts: Mapping[str, Sequence[tuple[str, ...]]]) -> tuple[str, Path]:
    """Find the first layout that `root`, or a folder at most two levels below, contains completely.

    A layout is a list of required files, each with the places (patterns) where it may be.
    """
    level = [root]
    archives: list[str] = []
    for _ in range(3):
        found = [
            (layout, folder)
            for folder in level
            for layout, needed in layouts.items()
            if all(_place(folder, places) for places in needed)
        ]
        if len({folder for _, folder in found}) > 1:
            folders = ", ".join(str(folder) for _, folder in found)
            raise ValueError(f"{root} has several downloads: {folders}; point --data at one of them")
        if found:
            return found[0]
        entries = [entry for folder in level if folder.is_dir() for entry in sorted(folder.iterdir())]
        archives += [str(e.relative_to(root)) for e in entries if e.name.lower().endswith(_ARCHIVE_SUFFIXES)]
        level = [entry for entry in entries if not is_hidden(entry.name) and entry.is_dir()]
    looked_for = "; or ".join(
        f"{', '.join(' or '.join(places) for places in needed)} ({layout})" for layout, needed in layouts.items()
    )
    unpack = f"unpack {', '.join(archives[:5])}" if archives else "point --data at the unpacked download"
    raise ValueError(
        f"{root} is not a download that is known: looked for {looked_for}, there and two levels below; "
        f"found {listing(root)}; {unpack}"
    )


def _place(folder: Path, places: Sequence[str]) -> Path | None:
    return next((path for place in places for path in sorted(folder.glob(place))), None)


def _need(folder: Path, places: Sequence[str]) -> Path:
    path = _place(folder, places)
    assert path is not None, "the layout was found with it"
    return path


def _innermost(folder: Path) -> Path:
    """Return `images/images/` of an archive unpacked into a folder of its own name; otherwise the folder itself."""
    while (folder / folder.name).is_dir():
        folder = folder / folder.name
    return folder


def rows_of(path: Path, num_fields: int, *, skip_lines: int = 0) -> Iterator[tuple[str, ...]]:
    """Read the lines of a text table, split at white space; the last field may contain blanks."""
    for number, line in enumerate(text_lines(path), start=1):
        if number <= skip_lines or not line.strip():
            continue
        fields = tuple(line.split(maxsplit=num_fields - 1))
        if len(fields) != num_fields:
            raise ValueError(
                f"{path}, line {number}: expected {num_fields} fields, got {line.strip()!r}; unpack the download again"
            )
        yield (*fields[:-1], fields[-1].strip())


def _table(path: Path) -> dict[str, str]:
    """Read a text table of two fields, the first of which is the key."""
    table: dict[str, str] = {}
    for key, value in rows_of(path, 2):
        if key in table:
            raise ValueError(f"{path} has the id {key} twice; unpack the download again")
        table[key] = value
    return table


def _as_int(text: str, where: str | Path) -> int:
    try:
        return int(text)
    except ValueError:
        raise ValueError(f"{where}: expected a whole number, got {text[:40]!r}; unpack the download again") from None


def _box(sides: Sequence[str], where: str) -> list[float]:
    try:
        return [float(side) for side in sides]
    except ValueError:
        raise ValueError(f"{where}: expected numbers, got {' '.join(sides)!r}; unpack the download again") from None


def _load_mat(path: Path, variable: str) -> np.ndarray:
    try:
        from scipy.io import loadmat
    except ImportError as problem:
        raise ValueError("reading Cars196's .mat files needs scipy; run `pip install scipy`") from problem
    try:
        if not path.is_file():  # a pipe would be waited for
            raise ValueError("it is no regular file")
        content = loadmat(str(path))
    except Exception as problem:  # scipy raises ValueError, TypeError, zlib.error ... on damaged files
        raise ValueError(f"{path} is not a readable MATLAB file ({problem}); unpack the download again") from problem
    if variable not in content:
        raise ValueError(f"{path} has no variable {variable!r}; unpack the download again")
    return np.asarray(content[variable]).ravel()


def _mat_strings(path: Path, variable: str) -> list[str]:
    return [str(cell.item()) for cell in _load_mat(path, variable)]


def _mat_records(path: Path, variable: str, *fields: str) -> np.ndarray:
    records = _load_mat(path, variable)
    missing = set(fields) - set(records.dtype.names or ())
    if missing:
        raise ValueError(f"{path}: {variable} lacks {', '.join(sorted(missing))}; it is another table of Cars196")
    return records
