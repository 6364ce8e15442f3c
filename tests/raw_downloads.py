"""The layouts of the raw downloads with a few images each, and what tests of built shards share."""

import csv
import hashlib
import io
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import webdataset
from PIL import Image
from scipy.io import savemat

from dist_proxygml.data.datasets import SourceDataset, SourceImage
from dist_proxygml.shard import main

Layout = Callable[[Path], None]


def picture(seed: int, size: tuple[int, int] = (6, 5)) -> Image.Image:
    generator = np.random.default_rng(seed)
    return Image.fromarray(generator.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))


def write_image(path: Path, seed: int, *, size: tuple[int, int] = (6, 5)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    picture(seed, size).save(path)


def write_lines(path: Path, lines: Iterable[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n")


def cub(root: Path) -> None:
    root = root / "CUB_200_2011"
    classes = {1: "001.Black_footed_Albatross", 100: "100.Brown_Pelican", 101: "101.White_Pelican"}
    images = {7: 1, 3: 100, 10: 101, 11: 101, 2: 1}
    # The tables are in different orders, so that joining by line would give wrong classes.
    write_lines(root / "images.txt", [f"{i} {classes[c]}/Bird_{i}.jpg" for i, c in images.items()])
    write_lines(root / "image_class_labels.txt", [f"{i} {images[i]}" for i in sorted(images)])
    write_lines(root / "classes.txt", [f"{c} {name}" for c, name in classes.items()])
    write_lines(root / "bounding_boxes.txt", [f"{i} 1.0 2.0 3.0 4.0" for i in images])
    write_lines(root / "train_test_split.txt", [f"{i} {i % 2}" for i in images])
    for i, c in images.items():
        write_image(root / "images" / classes[c] / f"Bird_{i}.jpg", i)


CAR_CLASSES = [f"Make Model {number}" for number in range(1, 196)] + ["Ram C/V Cargo Van 2012"]


def mat_strings(values: list[str]) -> np.ndarray:
    cells = np.empty((1, len(values)), dtype=object)
    cells[0, :] = values
    return cells


def mat_struct(rows: list[dict[str, Any]]) -> np.ndarray:
    table = np.zeros((1, len(rows)), dtype=[(name, object) for name in rows[0]])
    for i, row in enumerate(rows):
        for name, value in row.items():
            table[0, i][name] = value
    return table


BOX = {"bbox_x1": 112, "bbox_y1": 7, "bbox_x2": 853, "bbox_y2": 717}


def cars_one_folder(root: Path) -> None:
    rows = []
    for i, label in enumerate([1, 98, 99, 196, 196], start=1):
        path = f"car_ims/{i:06d}.jpg"
        rows.append({"relative_im_path": path, **BOX, "class": label, "test": i % 2})
        write_image(root / path, i)
    savemat(
        root / "cars_annos.mat",
        {"annotations": mat_struct(rows), "class_names": mat_strings(CAR_CLASSES)},
    )


def cars_devkit(root: Path) -> None:
    (root / "devkit").mkdir(parents=True)
    savemat(root / "devkit" / "cars_meta.mat", {"class_names": mat_strings(CAR_CLASSES)})
    for folder, table, labels in (
        ("cars_train", "cars_train_annos.mat", [1, 99]),
        ("cars_test", "cars_test_annos_withlabels.mat", [98, 196, 196]),
    ):
        rows = []
        for i, label in enumerate(labels, start=1):  # file names repeat across the folders
            rows.append({**BOX, "class": label, "fname": f"{i:05d}.jpg"})
            write_image(root / folder / f"{i:05d}.jpg", 10 * label + i)
        savemat(root / "devkit" / table, {"annotations": mat_struct(rows)})


def cars_csv(root: Path) -> None:
    root.mkdir(parents=True, exist_ok=True)
    write_csv(root / "names.csv", [[name] for name in CAR_CLASSES])
    for split, labels in (("train", [1, 99]), ("test", [98, 196, 196])):
        rows = [[f"{i:05d}.jpg", 1, 2, 3, 4, label] for i, label in enumerate(labels, start=1)]
        write_csv(root / f"anno_{split}.csv", rows)
        for file, *_, label in rows:
            folder = CAR_CLASSES[label - 1].replace("/", "-")
            write_image(root / "car_data" / "car_data" / split / folder / file, label)


def write_csv(path: Path, rows: list[list[Any]]) -> None:
    with open(path, "w", newline="") as stream:
        csv.writer(stream).writerows(rows)


def sop(root: Path) -> None:
    root = root / "Stanford_Online_Products"
    number = 0
    for split, classes in (("train", [1, 2, 2]), ("test", [11319, 11320])):
        lines = ["image_id class_id super_class_id path"]
        for label in classes:
            number += 1
            path = f"bicycle_final/1110{label}_{number}.JPG"
            lines.append(f"{number} {label} 1 {path}")
            write_image(root / path, number)
        write_lines(root / f"Ebay_{split}.txt", lines)


def inshop(root: Path) -> None:
    lines, rows = [], [(2, "train"), (2, "train"), (5, "query"), (5, "gallery"), (7, "gallery")]
    for number, (item, status) in enumerate(rows):
        name = f"img/WOMEN/Dresses/id_{item:08d}/{number:02d}_1_front.jpg"
        lines.append(f"{name}     id_{item:08d}       {status}")
        write_image(root / "Img" / name, number)
    header = "image_name item_id evaluation_status"
    write_lines(root / "Eval" / "list_eval_partition.txt", [str(len(rows)), header, *lines])


def market1501(root: Path) -> None:
    names = {
        "bounding_box_train": ["0002_c1s1_000451_03.jpg", "0002_c2s1_000451_01.jpg", "0007_c6s3_070000_01.jpg"],
        "query": ["0001_c1s1_001051_00.jpg", "0003_c3s3_064744_00.jpg"],
        "bounding_box_test": [
            "0001_c1s1_001051_03.jpg",
            "0001_c2s1_001976_01.jpg",
            "0003_c5s1_000551_01.jpg",
            "0000_c1s1_000151_01.jpg",
            "0000_c4s2_000301_02.jpg",
        ],
    }
    for number, (folder, files) in enumerate(names.items()):
        for i, file in enumerate(files):
            write_image(root / "Market-1501-v15.09.15" / folder / file, 100 * number + i)
        (root / "Market-1501-v15.09.15" / folder / "Thumbs.db").write_bytes(b"x")


def msmt17(root: Path, *, folders: tuple[str, str] = ("train", "test")) -> None:
    lists = {
        "train": ["0000/0000_000_01_0303morning_0008_0.jpg 0", "0001/0001_000_15_0303noon_0008_0.jpg 1"],
        "val": ["0001/0001_001_02_0303noon_0010_0.jpg 1"],
        "query": ["0000/0000_000_04_0113morning_1157_0.jpg 0", "0001/0001_000_05_0113noon_0003_0.jpg 1"],
        "gallery": ["0000/0000_002_12_0114morning_0008_0.jpg 0", "0001/0001_002_05_0114noon_0008_0.jpg 1"],
    }
    for number, (name, lines) in enumerate(lists.items()):
        write_lines(root / "MSMT17_V1" / f"list_{name}.txt", lines)
        for i, line in enumerate(lines):
            folder = folders[name in ("query", "gallery")]
            write_image(root / "MSMT17_V1" / folder / line.split()[0], 100 * number + i)


LAYOUTS: list[tuple[str, Layout, dict[str, list[tuple[int | str, int]]]]] = [
    ("cub200", cub, {"train": [(1, 2), (100, 1)], "test": [(101, 2)]}),
    ("cars196", cars_one_folder, {"train": [(1, 1), (98, 1)], "test": [(99, 1), (196, 2)]}),
    ("cars196", cars_devkit, {"train": [(1, 1), (98, 1)], "test": [(99, 1), (196, 2)]}),
    ("cars196", cars_csv, {"train": [(1, 1), (98, 1)], "test": [(99, 1), (196, 2)]}),
    ("sop", sop, {"train": [(1, 1), (2, 2)], "test": [(11319, 1), (11320, 1)]}),
    (
        "inshop",
        inshop,
        {
            "train": [("id_00000002", 2)],
            "query": [("id_00000005", 1), ("id_00000007", 0)],
            "gallery": [("id_00000005", 1), ("id_00000007", 1)],
        },
    ),
    (
        "market1501",
        market1501,
        {
            "train": [(2, 2), (7, 1)],
            "query": [(0, 0), (1, 1), (3, 1)],
            "gallery": [(0, 2), (1, 2), (3, 1)],
        },
    ),
    (
        "msmt17",
        msmt17,
        {
            "train": [("train/0000", 1), ("train/0001", 2)],
            "query": [("test/0000", 1), ("test/0001", 1)],
            "gallery": [("test/0000", 1), ("test/0001", 1)],
        },
    ),
]


def small_dataset() -> SourceDataset:
    images = []
    for i in range(23):
        stream = io.BytesIO()
        picture(i).save(stream, "PNG")
        split = "train" if i < 13 else "test"
        images.append(SourceImage(split, f"c{i % 5}-{split}", f"Ünï {i % 5}", f"{i}.png", stream.getvalue()))
    return SourceDataset("small", images)


def digests(root: Path) -> dict[str, str]:
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(root.iterdir()) if path.is_file()
    }


def samples_of(root: Path, split: str) -> list[dict[str, Any]]:
    """What plain WebDataset reads."""
    shards = sorted(str(path) for path in root.glob(f"{split}-*.tar"))
    return list(webdataset.WebDataset(shards, shardshuffle=False, empty_check=False))


def content_of(raw: Path, name: str, out: Path, *options: str) -> set[tuple[str, str, str, str, bytes]]:
    """Split, class id and name, label and image of every sample of a build."""
    assert main(["build", name, "--data", str(raw), "--out", str(out), "--allow-partial", *options]) == 0
    found = set()
    for split in json.loads((out / "index.json").read_text())["splits"]:
        for sample in samples_of(out, split):
            info = json.loads(sample["json"])
            image = next(sample[kind] for kind in ("jpg", "png", "webp") if kind in sample)
            found.add((split, str(info["source_id"]), info["class_name"], sample["cls"].decode(), image))
    return found
