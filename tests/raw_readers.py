"""Raw data of every layout that `shard build` reads, to be built and trained on: a function a layout, in READERS.

Each writes a small data set below a folder and returns the arguments of `shard build` but for --out.
"""

import io
import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import datasets
import numpy as np
import pyarrow
from PIL import Image
from pyarrow import parquet

from dist_proxygml.data.images import ORIENTATION_TAG
from tests.drawn_fonts import strokes, write_font
from tests.face_records import face_pairs, face_records
from tests.raw_downloads import Layout, cars_one_folder, cub, msmt17, write_lines

NUM_TRAIN, NUM_TEST, NUM_IMAGES = 5, 3, 4  # classes of each side, images of each class


def photographs() -> Iterator[tuple[str, int, int, Image.Image]]:
    """Side, class, number and pixels of every image: a class is a pattern, an image its shade."""
    for label in range(NUM_TRAIN + NUM_TEST):
        generator = np.random.default_rng(label)
        pattern = generator.integers(0, 200, (4, 5, 3)).repeat(8, 0).repeat(8, 1)
        for number in range(NUM_IMAGES):
            pixels = pattern + generator.integers(0, 55, pattern.shape)
            yield (
                "train" if label < NUM_TRAIN else "test",
                label,
                number,
                Image.fromarray(pixels.astype(np.uint8)),
            )


def write(path: Path, image: Image.Image, *, turned: bool = False) -> None:
    """Write an image in the format of its suffix; `turned` as a camera does that was held upright."""
    path.parent.mkdir(parents=True, exist_ok=True)
    exif = Image.Exif()
    if turned:
        exif[ORIENTATION_TAG] = 6
        image = image.transpose(Image.Transpose.ROTATE_90)
    image.save(path, exif=exif)


def imagefolder(root: Path) -> list[str]:
    """Formats that shards hold and others, photographs turned and not, a class behind a link."""
    suffixes = ("jpg", "webp", "png", "tiff")
    for _, label, number, image in photographs():
        folder = root / ("pool" if label == 0 else "raw") / f"class {label}"
        write(folder / f"{number}.{suffixes[number]}", image, turned=number == label % 2)
    (root / "raw" / "class 0").symlink_to(root / "pool" / "class 0")
    write_lines(root / "names.csv", [f"class {label},Thing No. {label}" for label in range(NUM_TRAIN)])
    return [
        "imagefolder",
        *("--data", str(root / "raw"), "--follow-links", str(root / "pool"), "--class-names", str(root / "names.csv")),
        *("--split-classes", str(NUM_TRAIN)),
    ]


def split_folders(root: Path) -> list[str]:
    """Folders of train, query and gallery."""
    for side, label, number, image in photographs():
        split = side if side == "train" else "query" if number < 2 else "gallery"
        write(root / split / f"{label}" / f"{number}.jpg", image)
    return ["imagefolder", "--data", str(root)]


def table(root: Path) -> list[str]:
    """A catalogue in CSV."""
    rows = []
    for side, label, number, image in photographs():
        write(root / "flat" / f"{label}_{number}.jpg", image, turned=number == 1)
        rows.append(f'flat/{label}_{number}.jpg,{label},{side},"Thing, {label}",{number}.50')
    write_lines(root / "catalogue.csv", ["path,product,split,title,price", *rows])
    columns = ["image=path", "label=product", "class_name=title"]
    return ["table", "--table", str(root / "catalogue.csv"), "--columns", *columns]


def parquet_table(root: Path) -> list[str]:
    """A catalogue in Parquet, whose classes are divided by share."""
    rows = []
    for _, label, number, image in photographs():
        write(root / f"{label}_{number}.gif", image)
        rows.append({"image": f"{label}_{number}.gif", "label": f"sku-{label}", "price": number / 2})
    parquet.write_table(pyarrow.Table.from_pylist(rows), root / "catalogue.parquet")
    return ["table", "--table", str(root / "catalogue.parquet"), "--split-classes", "0.6"]


def coco_table(root: Path) -> list[str]:
    """Two lists in COCO's JSON, as iNaturalist has them."""
    documents: dict[str, dict[str, list[dict[str, object]]]] = {
        side: {"images": [], "annotations": [], "categories": []} for side in ("train", "test")
    }
    for side, label, number, image in photographs():
        write(root / side / f"{label}_{number}.jpg", image)
        document, key = documents[side], 10 * label + number
        document["images"].append({"id": key, "file_name": f"{side}/{label}_{number}.jpg"})
        document["annotations"].append({"id": key, "image_id": key, "category_id": label})
    for side, document in documents.items():
        document["categories"] = [{"id": label, "name": f"species {label}"} for label in range(NUM_TRAIN + NUM_TEST)]
        (root / f"{side}2021.json").write_text(json.dumps(document))
    return ["table", "--data", str(root), "--table", *(str(root / f"{side}2021.json") for side in documents)]


def published(name: str, layout: Layout, root: Path) -> list[str]:
    """A few images of a published set, in the format of its download."""
    layout(root)
    return [name, "--data", str(root), "--allow-partial"]


def sop(root: Path) -> list[str]:
    """Stanford Online Products in small."""
    lines: dict[str, list[str]] = {side: ["image_id class_id super_class_id path"] for side in ("train", "test")}
    for side, label, number, image in photographs():
        write(root / "bicycle_final" / f"{label}_{number}.JPG", image)
        lines[side].append(f"{10 * label + number} {label} 1 bicycle_final/{label}_{number}.JPG")
    for side, listed in lines.items():
        write_lines(root / f"Ebay_{side}.txt", listed)
    return ["sop", "--data", str(root), "--allow-partial"]


def inshop(root: Path) -> list[str]:
    """In-Shop Clothes Retrieval in small."""
    lines = []
    for side, label, number, image in photographs():
        name = f"img/WOMEN/Dresses/id_{label:08d}/{number:02d}_1_front.jpg"
        write(root / "Img" / name, image)
        status = side if side == "train" else "query" if number < 2 else "gallery"
        lines.append(f"{name} id_{label:08d} {status}")
    header = "image_name item_id evaluation_status"
    write_lines(root / "Eval" / "list_eval_partition.txt", [str(len(lines)), header, *lines])
    return ["inshop", "--data", str(root), "--allow-partial"]


def recordio(root: Path) -> list[str]:
    """Record files in their older form, with a verification set beside them."""
    labels, images = [], []
    for _, label, _, image in photographs():
        stream = io.BytesIO()
        image.save(stream, "JPEG")
        labels.append(label)
        images.append(stream.getvalue())
    face_records(root / "faces", labels, images=images)
    face_pairs(root / "faces" / "lfw.bin")
    divided = ["--split-classes", str(NUM_TRAIN), "--pairs", "lfw.bin"]
    return ["recordio", "--data", str(root / "faces"), *divided]


def hf(root: Path) -> list[str]:
    """A folder of `save_to_disk` with a split for each side."""
    names = [f"thing {label}" for label in range(NUM_TRAIN + NUM_TEST)]
    features = datasets.Features({"photo": datasets.Image(), "label": datasets.ClassLabel(names=names)})
    splits = {}
    for wanted in ("train", "test"):
        rows = [(image, label) for side, label, _, image in photographs() if side == wanted]
        columns = {"photo": [image for image, _ in rows], "label": [label for _, label in rows]}
        splits[wanted] = datasets.Dataset.from_dict(columns, features=features)
    datasets.DatasetDict(splits).save_to_disk(str(root / "saved"))
    return ["hf", "--data", str(root / "saved"), "--columns", "image=photo"]


def people(root: Path) -> list[str]:
    """Market-1501 in small: a camera a photograph, junk and a distractor."""
    for side, label, number, image in photographs():
        folder = "bounding_box_train" if side == "train" else "query" if number < 2 else "bounding_box_test"
        write(root / folder / f"{label + 1:04d}_c{number + 1}s1_{number:06d}_00.jpg", image)
        if label == 0:
            write(root / "bounding_box_test" / f"{('-1', '0000')[number % 2]}_c1s1_{number:06d}_00.jpg", image)
    return ["market1501", "--data", str(root), "--allow-partial"]


def glyphs(root: Path) -> list[str]:
    """Fonts of rectangles."""
    for name in "ABCD":
        write_font(root / "fonts" / f"{name}.ttf", {c: strokes(f"{name}/{c}") for c in "abcdefghijkl"}, name)
    return ["glyphs", "--fonts", str(root / "fonts")]


READERS: dict[str, Callable[[Path], list[str]]] = {
    "imagefolder": imagefolder,
    "split folders": split_folders,
    "table": table,
    "Parquet": parquet_table,
    "COCO": coco_table,
    "cub200": partial(published, "cub200", cub),
    "cars196": partial(published, "cars196", cars_one_folder),
    "sop": sop,
    "inshop": inshop,
    "market1501": people,
    "msmt17": partial(published, "msmt17", msmt17),
    "recordio": recordio,
    "hf": hf,
    "glyphs": glyphs,
}
