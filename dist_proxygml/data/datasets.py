"""Raw downloads to a list of images with classes: CUB, Cars, SOP, In-Shop, folders of images.

Always the metric-learning split: training and test classes are disjoint (the first half of the
classes trains on CUB and Cars), never the classification split that some of the downloads bring.
Records are joined by id, not by line. The counts are those of the literature and are asserted, so
that a half-unpacked download is noticed; `allow_partial` leaves out what is missing instead.
Declined: downloading (licences and dead links) and reading any pixels here.
"""

import csv
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm"})

# Images and classes of each split (Wah et al. 2011; Krause et al. 2013; Oh Song et al. 2016; Liu et
# al. 2016).
PUBLISHED_COUNTS: Mapping[str, Mapping[str, tuple[int, int]]] = {
    "cub200": {"train": (5_864, 100), "test": (5_924, 100)},
    "cars196": {"train": (8_054, 98), "test": (8_131, 98)},
    "sop": {"train": (59_551, 11_318), "test": (60_502, 11_316)},
    "inshop": {"train": (25_882, 3_997), "query": (14_218, 3_985), "gallery": (12_612, 3_985)},
}


@dataclass(frozen=True)
class SourceImage:
    """One image of a raw data set."""

    split: str
    source_id: int | str  # the class's id in the source; labels follow its order
    class_name: str
    name: str  # the image's path or name in the source
    content: Path | bytes  # where the image file lies, or the file itself
    info: Mapping[str, Any] = field(default_factory=dict)  # further facts for the sample's JSON


@dataclass(frozen=True)
class SourceDataset:
    """All images of a raw data set, in the order of the source."""

    name: str
    images: list[SourceImage]
    # Groups of splits with one label space; the classes of all others must be disjoint.
    shared_classes: tuple[tuple[str, ...], ...] = ()
    num_left_out: int = 0  # listed images that were not on the disk (allow_partial)

    def label_space(self, split: str) -> tuple[str, ...]:
        """The splits that share their class table with `split`, itself among them."""
        return next((group for group in self.shared_classes if split in group), (split,))


def read_cub200(root: Path, *, allow_partial: bool = False) -> SourceDataset:
    """CUB-200-2011: `images.txt`, `image_class_labels.txt` and `classes.txt`, joined by id.

    Classes 1-100 train, 101-200 test.
    """
    root = _layout_root(root, "CUB_200_2011", ["images.txt", "image_class_labels.txt", "classes.txt", "images"])
    names, labels, classes = (
        {key: value for key, value in _rows(root / table, 2)}
        for table in ("images.txt", "image_class_labels.txt", "classes.txt")
    )
    boxes = {}
    if (root / "bounding_boxes.txt").is_file():
        rows = _rows(root / "bounding_boxes.txt", 5)
        boxes = {image_id: [float(value) for value in box] for image_id, *box in rows}
    if names.keys() != labels.keys():
        one_sided = sorted(names.keys() ^ labels.keys(), key=_as_int)
        raise ValueError(
            f"{root}: images.txt and image_class_labels.txt list different ids "
            f"({len(one_sided)} in only one of them, first {one_sided[0]}); unpack it again"
        )
    images = []
    for image_id in sorted(names, key=_as_int):
        class_id = _as_int(labels[image_id])
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
                content=root / "images" / names[image_id],
                info={"bbox_xywh": boxes[image_id]} if image_id in boxes else {},
            )
        )
    return _finish("cub200", images, root=root, allow_partial=allow_partial)


def read_cars196(root: Path, *, allow_partial: bool = False) -> SourceDataset:
    """Cars196 in any of its three layouts. Classes 1-98 train, 99-196 test.

    The `test` flag of the download belongs to the classification split and is ignored.

    `cars_annos.mat` + `car_ims/`; `devkit/` + `cars_train/` + `cars_test/`; `names.csv` +
    `anno_{train,test}.csv` + `car_data/`.
    """
    layouts: dict[str, tuple[list[str], Callable[[Path], list[SourceImage]]]] = {
        "one folder": (["cars_annos.mat", "car_ims"], _cars_one_folder),
        "devkit": (
            [
                "devkit/cars_meta.mat",
                "devkit/cars_train_annos.mat",
                "devkit/cars_test_annos_withlabels.mat",
                "cars_train",
                "cars_test",
            ],
            _cars_devkit,
        ),
        "csv": (["names.csv", "anno_train.csv", "anno_test.csv", "car_data"], _cars_csv),
    }
    for folder in (root, root / "stanford_cars", root / "cars196"):
        for needed, read in layouts.values():
            if all((folder / name).exists() for name in needed):
                return _finish("cars196", read(folder), root=folder, allow_partial=allow_partial)
    looked_for = "; or ".join(f"{', '.join(needed)} ({name})" for name, (needed, _) in layouts.items())
    raise ValueError(
        f"{root} is not a Cars196 download: looked for {looked_for}; found {_listing(root)}; point "
        "--root at the unpacked folder"
    )


def _cars_image(class_id: int, class_names: list[str], name: str, path: Path, box: Iterable[int]) -> SourceImage:
    if not 1 <= class_id <= len(class_names):
        raise ValueError(
            f"{name} has class {class_id}, expected 1 to {len(class_names)}; unpack the Cars196 download again"
        )
    split = "train" if class_id <= 98 else "test"
    info = {"bbox_xyxy": [int(value) for value in box]}
    return SourceImage(split, class_id, class_names[class_id - 1], name, path, info)


def _cars_one_folder(root: Path) -> list[SourceImage]:
    table = _load_mat(root / "cars_annos.mat")
    names = _mat_strings(table["class_names"])
    images = []
    for row in table["annotations"].ravel():
        # Fields: relative_im_path, bbox_x1, bbox_y1, bbox_x2, bbox_y2, class, test
        path = str(row["relative_im_path"].item())
        box = [row[f"bbox_{corner}"].item() for corner in ("x1", "y1", "x2", "y2")]
        images.append(_cars_image(int(row["class"].item()), names, path, root / path, box))
    return images


def _cars_devkit(root: Path) -> list[SourceImage]:
    names = _mat_strings(_load_mat(root / "devkit" / "cars_meta.mat")["class_names"])
    images = []
    # File names repeat across the two folders, so the folder belongs to the name.
    for folder, table in (
        ("cars_train", "cars_train_annos.mat"),
        ("cars_test", "cars_test_annos_withlabels.mat"),
    ):
        for row in _load_mat(root / "devkit" / table)["annotations"].ravel():
            path = f"{folder}/{row['fname'].item()}"
            box = [row[f"bbox_{corner}"].item() for corner in ("x1", "y1", "x2", "y2")]
            images.append(_cars_image(int(row["class"].item()), names, path, root / path, box))
    return images


def _cars_csv(root: Path) -> list[SourceImage]:
    with open(root / "names.csv", newline="", encoding="utf-8") as stream:
        names = [row[0] for row in csv.reader(stream) if row]
    data = root / "car_data"
    if (data / "car_data").is_dir():
        data = data / "car_data"
    images = []
    for split in ("train", "test"):
        with open(root / f"anno_{split}.csv", newline="", encoding="utf-8") as stream:
            for file, *box, label in csv.reader(stream):
                class_id = _as_int(label)
                known = 1 <= class_id <= len(names)
                path = data / split / (names[class_id - 1].replace("/", "-") if known else "") / file
                name = str(path.relative_to(root))
                images.append(_cars_image(class_id, names, name, path, map(_as_int, box)))
    return images


def read_sop(root: Path, *, allow_partial: bool = False) -> SourceDataset:
    """Stanford Online Products: `Ebay_train.txt` and `Ebay_test.txt`; a header, 1-based ids."""
    root = _layout_root(root, "Stanford_Online_Products", ["Ebay_train.txt", "Ebay_test.txt"])
    images = []
    for split in ("train", "test"):
        rows = _rows(root / f"Ebay_{split}.txt", 4)
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
            images.append(SourceImage(split, _as_int(class_id), name, path, root / path, info))
    return _finish("sop", images, root=root, allow_partial=allow_partial)


def read_inshop(root: Path, *, allow_partial: bool = False) -> SourceDataset:
    """In-Shop Clothes Retrieval of DeepFashion: `Eval/list_eval_partition.txt`.

    The splits are train, query and gallery; the last two share one label space and are scored
    against each other.
    """
    lists = [folder / "list_eval_partition.txt" for folder in (root / "Eval", root)]
    table = next((path for path in lists if path.is_file()), None)
    bases = [folder for folder in (root / "Img", root) if (folder / "img").is_dir()]
    if table is None or not bases:
        raise ValueError(
            f"{root} is not an In-Shop download: looked for Eval/list_eval_partition.txt and "
            f"Img/img; found {_listing(root)}; point --root at the unpacked folder"
        )
    with open(table, encoding="utf-8") as stream:
        announced = stream.readline().strip()
    if not announced.isdigit():
        raise ValueError(
            f"{table}: expected the number of images in line 1, got {announced[:80]!r}; unpack the download again"
        )
    rows = _rows(table, 3, skip_lines=1)
    header = next(rows, ())
    if header != ("image_name", "item_id", "evaluation_status"):
        raise ValueError(
            f"{table}: expected the header 'image_name item_id evaluation_status', got {' '.join(header)!r}"
        )
    images = []
    for name, item, status in rows:
        if status not in ("train", "query", "gallery"):
            raise ValueError(f"{table}: {name} has the status {status!r}, expected train, query or gallery")
        info = {"category": "/".join(name.split("/")[1:3])}
        images.append(SourceImage(status, item, item, name, bases[0] / name, info))
    if len(images) != int(announced) and not allow_partial:
        raise ValueError(
            f"{table} announces {announced} images and lists {len(images)}; unpack it again, or pass --allow-partial"
        )
    return _finish(
        "inshop",
        images,
        root=root,
        allow_partial=allow_partial,
        shared_classes=(("query", "gallery"),),
    )


def read_imagefolder(root: Path, *, allow_partial: bool = False, num_train_classes: int | None = None) -> SourceDataset:
    """Folders of images: `root/SPLIT/CLASS/*` with a split named train, or `root/CLASS/*`.

    Without splits the first `num_train_classes` classes in sorted order train and the others test;
    None means half of them. Symbolic links out of `root` are refused; files that are no images are
    skipped.
    """
    root = root.resolve()
    if not root.is_dir():
        raise ValueError(f"{root} does not exist; point --root at a folder of class folders")
    images = []
    if (root / "train").is_dir():
        if num_train_classes is not None:
            raise ValueError(
                f"{root} has its own split (a folder train), so --split-classes cannot be given; leave it out"
            )
        for split in sorted(folder.name for folder in root.iterdir() if folder.is_dir()):
            images += [_folder_image(split, path, root) for path in _class_files(root / split)]
    else:
        files = _class_files(root)
        classes = sorted({path.parent.name for path in files})
        num_train = len(classes) // 2 if num_train_classes is None else num_train_classes
        if not 0 < num_train < len(classes):
            raise ValueError(
                f"{root} has {len(classes)} classes with images, of which {num_train} would train; "
                f"both sides need at least one. Found {_listing(root)}; expected "
                "SPLIT/CLASS/image or CLASS/image"
            )
        train = set(classes[:num_train])
        images = [_folder_image("train" if path.parent.name in train else "test", path, root) for path in files]
    return _finish("imagefolder", images, root=root, allow_partial=allow_partial)


def _folder_image(split: str, path: Path, root: Path) -> SourceImage:
    if not path.resolve().is_relative_to(root):
        raise ValueError(f"{path} is a link out of {root}; copy the file, or point --root higher up")
    return SourceImage(split, path.parent.name, path.parent.name, str(path.relative_to(root)), path)


def _class_files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("*/*") if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file())


def _finish(
    name: str,
    images: list[SourceImage],
    *,
    root: Path,
    allow_partial: bool,
    shared_classes: tuple[tuple[str, ...], ...] = (),
) -> SourceDataset:
    """Check files, counts and the disjointness of classes."""
    missing = [image for image in images if isinstance(image.content, Path) and not image.content.is_file()]
    if missing and not allow_partial:
        raise ValueError(
            f"{len(missing)} of the {len(images)} images that {root} lists are missing, first "
            f"{missing[0].name}; unpack it again, or pass --allow-partial to leave them out"
        )
    left_out = set(map(id, missing))
    dataset = SourceDataset(
        name, [image for image in images if id(image) not in left_out], shared_classes, len(missing)
    )
    if not dataset.images:
        raise ValueError(
            f"{root} has no image of {name}; found {_listing(root)}; point --root at the unpacked download"
        )
    counts = count_images(dataset)
    if not allow_partial:
        for split, expected in PUBLISHED_COUNTS.get(name, {}).items():
            found = counts.get(split, (0, 0))
            if found != expected:
                raise ValueError(
                    f"{name} {split}: expected {expected[0]} images of {expected[1]} classes as "
                    f"published, got {found[0]} of {found[1]} in {root}; unpack it again, "
                    "or pass --allow-partial"
                )
    check_disjoint(dataset)
    return dataset


def count_images(dataset: SourceDataset) -> dict[str, tuple[int, int]]:
    """Images and classes of every split."""
    images: dict[str, int] = {}
    classes: dict[str, set[int | str]] = {}
    for image in dataset.images:
        images[image.split] = images.get(image.split, 0) + 1
        classes.setdefault(image.split, set()).add(image.source_id)
    return {split: (images[split], len(classes[split])) for split in images}


def check_disjoint(dataset: SourceDataset) -> None:
    """Raise ValueError when a class is on both sides of the split, or one id has two names."""
    home: dict[int | str, tuple[tuple[str, ...], str]] = {}
    for image in dataset.images:
        space = dataset.label_space(image.split)
        known_space, known_name = home.setdefault(image.source_id, (space, image.class_name))
        if known_space != space:
            raise ValueError(
                f"class {image.source_id} ({image.class_name}) is in {'/'.join(known_space)} and "
                f"in {image.split}; retrieval needs classes that training never saw, so move all "
                "its images to one side"
            )
        if known_name != image.class_name:
            raise ValueError(
                f"class {image.source_id} has two names, {known_name!r} and {image.class_name!r}; rename one"
            )


def _layout_root(root: Path, folder: str, needed: list[str]) -> Path:
    for candidate in (root, root / folder):
        if all((candidate / name).exists() for name in needed):
            return candidate
    raise ValueError(
        f"{root} is not the unpacked {folder}: looked for {', '.join(needed)} there and in "
        f"{folder}/; found {_listing(root)}; point --root at the unpacked download"
    )


def _listing(folder: Path) -> str:
    if not folder.is_dir():
        return "no such folder"
    names = sorted(entry.name + ("/" if entry.is_dir() else "") for entry in folder.iterdir())
    more = f" and {len(names) - 12} more" if len(names) > 12 else ""
    return ", ".join(names[:12]) + more if names else "an empty folder"


def _rows(path: Path, num_fields: int, *, skip_lines: int = 0) -> Iterator[tuple[str, ...]]:
    """The lines of a text table, cut at white space; the last field may hold blanks."""
    with open(path, encoding="utf-8") as stream:
        for number, line in enumerate(stream, start=1):
            if number <= skip_lines or not line.strip():
                continue
            fields = tuple(line.split(maxsplit=num_fields - 1))
            if len(fields) != num_fields:
                raise ValueError(
                    f"{path}, line {number}: expected {num_fields} fields, got {line.strip()!r}; "
                    "unpack the download again"
                )
            yield (*fields[:-1], fields[-1].strip())


def _as_int(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise ValueError(f"expected a whole number, got {text!r}; unpack the download again") from None


def _load_mat(path: Path) -> Mapping[str, Any]:
    try:
        from scipy.io import loadmat
    except ImportError as problem:
        raise ValueError("reading Cars196's .mat files needs scipy; run `pip install scipy`") from problem
    try:
        return dict(loadmat(str(path)))
    except Exception as problem:  # scipy raises ValueError, TypeError, zlib.error ... on damaged files
        raise ValueError(f"{path} is not a readable MATLAB file ({problem}); unpack the download again") from problem


def _mat_strings(cells: Any) -> list[str]:
    return [str(cell.item()) for cell in cells.ravel()]
