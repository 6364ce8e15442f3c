"""Building, verifying, indexing and describing shards, through the command line."""

import csv
import hashlib
import io
import json
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset
from PIL import Image
from scipy.io import savemat

from dist_proxygml.data import datasets
from dist_proxygml.data.datasets import SourceDataset, SourceImage
from dist_proxygml.data.emoji import EMOJI_SETS, NUM_CLASSES, NUM_IMAGES, is_plain_emoji
from dist_proxygml.data.index import open_index
from dist_proxygml.data.shards import split_of_shard
from dist_proxygml.shard import build_shards, main

ROOT = Path(__file__).parents[2]
DEMO = ROOT / "shards" / "demo"
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


# ---- the layouts of the raw downloads, with a few images each --------------------------------


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
]


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    return tmp_path / "raw"


@pytest.mark.parametrize(("name", "layout", "expected"), LAYOUTS, ids=[layout.__name__ for _, layout, _ in LAYOUTS])
def test_a_raw_layout_becomes_the_metric_learning_split_with_its_own_bytes(
    name: str,
    layout: Layout,
    expected: dict[str, list[tuple[int | str, int]]],
    raw: Path,
    tmp_path: Path,
) -> None:
    layout(raw)
    out = tmp_path / "out"
    arguments = ["build", name, "--root", str(raw), "--out", str(out), "--allow-partial"]
    assert main([*arguments, "--samples-per-shard", "2"]) == 0
    assert main(["verify", "--deep", str(out)]) == 0
    originals = {path.read_bytes() for path in raw.rglob("*.[jJ]*")}
    found = set()
    for split, classes in expected.items():
        index = open_index(out, split)
        assert [(entry.source_id, entry.count) for entry in index.classes] == classes
        assert [entry.label for entry in index.classes] == list(range(len(classes)))
        for sample in samples_of(out, split):
            entry = index.classes[int(sample["cls"])]
            info = json.loads(sample["json"])
            assert (info["class_name"], info["source_id"]) == (entry.name, entry.source_id)
            assert (info["split"], info["width"], info["height"]) == (split, 6, 5)
            # The image is the one that the source lists under this class.
            source = next(raw.rglob(Path(info["source"]).name)) if name != "cars196" else None
            assert source is None or source.read_bytes() == sample["jpg"]
            found.add(sample["jpg"])
    assert found == originals


def samples_of(root: Path, split: str) -> list[dict[str, Any]]:
    shards = sorted(str(path) for path in root.glob(f"{split}-*.tar"))
    return list(webdataset.WebDataset(shards, shardshuffle=False, empty_check=False))


@pytest.mark.parametrize(
    ("name", "layout"),
    [(name, layout) for name, layout, _ in LAYOUTS],
    ids=[layout.__name__ for _, layout, _ in LAYOUTS],
)
def test_published_counts_are_asserted(
    name: str, layout: Layout, raw: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    layout(raw)
    assert main(["build", name, "--root", str(raw), "--out", str(tmp_path / "out")]) == 2
    images, classes = datasets.PUBLISHED_COUNTS[name]["train"]
    error = capsys.readouterr().err
    assert f"{name} train: expected {images} images of {classes} classes as published" in error
    assert "--allow-partial" in error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["cub200", "cars196", "sop", "inshop"])
def test_a_wrong_layout_says_what_was_looked_for_and_found(
    name: str, raw: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_image(raw / "pictures" / "a.jpg", 1)
    assert main(["build", name, "--root", str(raw), "--out", str(raw / "out")]) == 2
    error = capsys.readouterr().err
    assert "looked for" in error
    assert "found pictures/" in error
    assert "--root" in error


def test_missing_images_are_counted_or_left_out(raw: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sop(raw)
    next(raw.rglob("*_3.JPG")).unlink()
    arguments = ["build", "sop", "--root", str(raw), "--out", str(tmp_path / "out")]
    assert main(arguments) == 2
    assert "1 of the 5 images" in capsys.readouterr().err
    assert main([*arguments, "--allow-partial"]) == 0
    assert "1 listed images are not there" in capsys.readouterr().err
    assert open_index(tmp_path / "out", "train").num_samples == 2


@pytest.mark.parametrize(
    ("file", "old", "new", "message"),
    [
        ("CUB_200_2011/image_class_labels.txt", "7 1\n", "", "list different ids"),
        ("CUB_200_2011/classes.txt", "100 ", "102 ", "which classes.txt does not list"),
        ("CUB_200_2011/images.txt", "7 ", "seven ", "expected a whole number"),
        ("CUB_200_2011/image_class_labels.txt", "7 1\n", "7\n", "expected 2 fields"),
    ],
)
def test_garbled_tables_are_refused(
    file: str, old: str, new: str, message: str, raw: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cub(raw)
    text = (raw / file).read_text()
    assert old in text
    (raw / file).write_text(text.replace(old, new, 1))
    if "seven" in new:
        labels = raw / "CUB_200_2011" / "image_class_labels.txt"
        labels.write_text(labels.read_text().replace("7 1\n", "seven 1\n"))
    assert main(["build", "cub200", "--root", str(raw), "--out", str(raw / "out")]) == 2
    assert message in capsys.readouterr().err


# ---- folders of images -----------------------------------------------------------------------


def folder_of_classes(root: Path, names: Iterable[str] = "abcde") -> None:
    for number, name in enumerate(names):
        for i in range(number + 1):
            write_image(root / name / f"im.v{i}.png", 10 * number + i)  # dots in names are harmless
    (root / next(iter(names)) / "notes.txt").write_text("not an image")


@pytest.mark.parametrize(("option", "num_train"), [([], 2), (["--split-classes", "4"], 4)])
def test_class_folders_are_split_by_class(option: list[str], num_train: int, raw: Path, tmp_path: Path) -> None:
    folder_of_classes(raw)
    out = str(tmp_path / "out")
    assert main(["build", "imagefolder", "--root", str(raw), "--out", out, *option]) == 0
    train, test = open_index(out, "train"), open_index(out, "test")
    assert [entry.name for entry in train.classes] == list("abcde")[:num_train]
    assert [entry.name for entry in test.classes] == list("abcde")[num_train:]
    assert [entry.count for entry in train.classes] == [1, 2, 3, 4][:num_train]


def test_a_folders_own_split_is_kept_and_must_not_share_classes(
    raw: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder_of_classes(raw / "train", "ab")
    folder_of_classes(raw / "val", "cd")
    arguments = ["build", "imagefolder", "--root", str(raw), "--out", str(tmp_path / "out")]
    assert main(arguments) == 0
    assert open_index(tmp_path / "out", "val").num_samples == 3
    assert main([*arguments, "--overwrite", "--split-classes", "1"]) == 2
    assert "has its own split" in capsys.readouterr().err
    folder_of_classes(raw / "test", "a")
    assert main([*arguments, "--overwrite"]) == 2
    assert "class a (a) is in test and in train" in capsys.readouterr().err


def test_links_out_of_the_root_are_refused(raw: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder_of_classes(raw)
    write_image(tmp_path / "private.png", 1)
    (raw / "a" / "link.png").symlink_to(tmp_path / "private.png")
    assert main(["build", "imagefolder", "--root", str(raw), "--out", str(tmp_path / "out")]) == 2
    assert "is a link out of" in capsys.readouterr().err


def test_resize_reencodes_large_images_only_and_says_so(raw: Path, tmp_path: Path) -> None:
    write_image(raw / "a" / "large.png", 1, size=(40, 30))
    write_image(raw / "b" / "small.png", 2, size=(40, 10))
    write_image(raw / "b" / "other.bmp", 3, size=(4, 4))
    out = tmp_path / "out"
    arguments = ["build", "imagefolder", "--root", str(raw), "--out", str(out)]
    assert main([*arguments, "--resize", "15"]) == 0
    (large,) = samples_of(out, "train")
    assert Image.open(io.BytesIO(large["jpg"])).size == (20, 15)
    assert json.loads(large["json"])["width"] == 20
    small = {json.loads(s["json"])["source"]: s for s in samples_of(out, "test")}
    assert small["b/small.png"]["png"] == (raw / "b" / "small.png").read_bytes()
    assert Image.open(io.BytesIO(small["b/other.bmp"]["jpg"])).size == (4, 4)
    assert json.loads((out / "index.json").read_text())["build"]["resize"] == 15


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.bmp", None, "is neither JPEG nor PNG"),
        ("x.jpg", b"", "cannot be read as an image"),
        ("x.jpg", b"<html>", "cannot be read as an image"),
    ],
)
def test_an_unusable_source_image_is_named(
    name: str,
    content: bytes | None,
    message: str,
    raw: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder_of_classes(raw)
    write_image(raw / "b" / name, 3)
    if content is not None:
        (raw / "b" / name).write_bytes(content)
    out = tmp_path / "out"
    assert main(["build", "imagefolder", "--root", str(raw), "--out", str(out)]) == 2
    error = capsys.readouterr().err
    assert f"b/{name}" in error
    assert message in error
    assert not (out / "index.json").exists()


# ---- the shards themselves -------------------------------------------------------------------


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


def test_two_builds_give_the_same_bytes_and_another_seed_others(tmp_path: Path) -> None:
    for name, seed in (("one", 0), ("two", 0), ("three", 1)):
        build_shards(small_dataset(), tmp_path / name, samples_per_shard=5, seed=seed, quiet=True)
    one, two, three = (digests(tmp_path / name) for name in ("one", "two", "three"))
    assert one == two
    assert len(one) == 1 + 2 + 3 + 2  # index, tables, shards
    assert [name for name in one if one[name] == three[name]] == []


def test_a_build_shuffles_over_the_whole_split(tmp_path: Path) -> None:
    build_shards(small_dataset(), tmp_path, samples_per_shard=5, quiet=True)
    sources = [int(json.loads(s["json"])["source"][:-4]) for s in samples_of(tmp_path, "train")]
    assert sorted(sources) == list(range(13))
    assert sources != sorted(sources)
    assert any(source >= 5 for source in sources[:5])


def test_plain_webdataset_and_tar_read_the_shards(tmp_path: Path) -> None:
    build_shards(small_dataset(), tmp_path, samples_per_shard=5, quiet=True)
    index = open_index(tmp_path, "train")
    samples = samples_of(tmp_path, "train")
    assert [sample["__key__"] for sample in samples] == [f"train-{i:08d}" for i in range(13)]
    assert [int(sample["cls"]) for sample in samples] == index.labels.tolist()
    for row, sample in zip(index.samples, samples, strict=True):
        tar = index.shard_paths[row["shard"]].read_bytes()
        assert tar[int(row["offset"]) :][: int(row["nbytes"])] == sample["png"]
    listing = subprocess.run(
        ["tar", "tvf", str(index.shard_paths[2]), "--numeric-owner", "--utc"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()
    assert [line.split()[-1] for line in listing] == [
        f"train-{i:08d}.{extension}" for i in (10, 11, 12) for extension in ("cls", "json", "png")
    ]
    assert all("0/0" in line and "1970-01-01" in line for line in listing)
    assert index.shard_paths[0].read_bytes()[257:265] == b"ustar\x0000"


def test_finished_shards_are_only_replaced_when_told_so(tmp_path: Path) -> None:
    build_shards(small_dataset(), tmp_path, samples_per_shard=3, quiet=True)
    with pytest.raises(ValueError, match="already holds finished shards; pass --overwrite"):
        build_shards(small_dataset(), tmp_path, quiet=True)
    (tmp_path / "ATTRIBUTION.md").write_text("kept")
    build_shards(small_dataset(), tmp_path, samples_per_shard=20, overwrite=True, quiet=True)
    assert sorted(digests(tmp_path)) == [
        "ATTRIBUTION.md",
        "index.json",
        "index.samples.test.npy",
        "index.samples.train.npy",
        "test-000000.tar",
        "train-000000.tar",
    ]


def test_a_build_that_stops_leaves_no_index_and_can_be_run_again(tmp_path: Path) -> None:
    dataset = small_dataset()
    bad = SourceImage("train", "c0-train", "Ünï 0", "bad.png", b"not an image")
    broken = SourceDataset("small", [*dataset.images, bad])
    with pytest.raises(ValueError, match=r"bad\.png"):
        build_shards(broken, tmp_path / "out", samples_per_shard=5, quiet=True)
    (tmp_path / "out" / "train-000009.tar.tmp-123").write_bytes(b"left by a killed build")
    with pytest.raises(ValueError, match=r"no index\.json; an unfinished build"):
        open_index(tmp_path / "out", "train")
    for name in ("out", "clean"):
        build_shards(dataset, tmp_path / name, samples_per_shard=5, quiet=True)
    assert digests(tmp_path / "out") == digests(tmp_path / "clean")


def test_indexing_again_gives_the_same_index(tmp_path: Path) -> None:
    build_shards(small_dataset(), tmp_path, samples_per_shard=5, quiet=True)
    before = {split: open_index(tmp_path, split) for split in ("train", "test")}
    (tmp_path / "index.samples.train.npy").unlink()
    assert main(["index", str(tmp_path)]) == 0
    for split, index in before.items():
        again = open_index(tmp_path, split)
        assert again.classes == index.classes
        assert again.shards == index.shards
        assert again.samples.tobytes() == index.samples.tobytes()


def test_shards_of_others_get_an_index(tmp_path: Path) -> None:
    path = tmp_path / "photos-0003.tar"
    with webdataset.TarWriter(str(path)) as writer:
        for i, label in enumerate([0, 2, 2]):
            writer.write({"__key__": f"a/b/{i}", "jpg": picture(i), "cls": label, "txt": "caption"})
    assert main(["index", str(tmp_path)]) == 0
    index = open_index(tmp_path, "photos")
    assert index.labels.tolist() == [0, 2, 2]
    assert [(entry.name, entry.count) for entry in index.classes] == [("0", 1), ("1", 0), ("2", 2)]
    assert main(["verify", "--deep", str(tmp_path)]) == 0


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"jpg": b"x"}, "has members ['jpg']; expected one of"),
        ({"jpg": b"x", "png": b"x", "cls": b"1"}, "expected one of"),
        ({"jpg": b"x", "cls": b"-1"}, "has the label '-1'; expected a non-negative integer"),
        ({"jpg": b"x", "cls": b"1", "json": b"{"}, "is damaged"),
    ],
)
def test_samples_that_cannot_be_indexed_are_named(
    members: dict[str, bytes], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with webdataset.TarWriter(str(tmp_path / "train-0.tar"), encoder=False) as writer:
        writer.write({"__key__": "k", **members})
    assert main(["index", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert "sample k" in error
    assert message in error


def test_verify_finds_each_kind_of_damage(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def fresh(name: str) -> Path:
        build_shards(small_dataset(), tmp_path / name, samples_per_shard=5, quiet=True)
        return tmp_path / name / "train-000001.tar"

    def verify(shard: Path, *options: str) -> tuple[int, str]:
        code = main(["verify", *options, str(shard.parent)])
        return code, capsys.readouterr().err

    whole = fresh("whole")
    assert verify(whole, "--deep")[0] == 0

    cut = fresh("cut")
    cut.write_bytes(cut.read_bytes()[:-1024])
    assert verify(cut)[0] == 1

    flipped = fresh("flipped")
    content = bytearray(flipped.read_bytes())
    offset = int(open_index(flipped.parent, "train").samples[6]["offset"])
    content[offset + 50] ^= 4
    flipped.write_bytes(content)
    assert verify(flipped)[0] == 0  # the size is right; only reading tells
    code, error = verify(flipped, "--deep")
    assert code == 1
    assert "train-000001.tar: sha256 is" in error
    assert "sample train-00000006 has (label, offset, bytes, crc32)" in error

    swapped = fresh("swapped")
    other = swapped.with_name("train-000000.tar")
    first, second = other.read_bytes(), swapped.read_bytes()
    other.write_bytes(second)
    swapped.write_bytes(first)
    assert verify(swapped, "--deep")[0] == 1

    assert verify(tmp_path / "nowhere" / "x.tar")[0] == 2


def test_info_tells_counts_and_class_sizes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    build_shards(small_dataset(), tmp_path, samples_per_shard=5, quiet=True)
    assert main(["info", str(tmp_path)]) == 0
    output = capsys.readouterr().out
    assert "train: 13 images, 5 classes, 3 shards" in output
    assert "images a class: 2 to 3, median 3" in output
    assert output.count("#") > 0


@pytest.mark.parametrize("command", ["build", "verify", "index", "info"])
def test_help_shows_an_example(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main([command, "--help"])
    assert caught.value.code == 0
    assert "example: python -m dist_proxygml.shard " in capsys.readouterr().out


def test_mistakes_on_the_command_line_exit_with_2(raw: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["build", "sop", "--out", str(raw)]) == 2
    assert "needs --root" in capsys.readouterr().err
    sop(raw)
    arguments = ["build", "sop", "--root", str(raw), "--out", str(raw / "out"), "--allow-partial"]
    assert main([*arguments, "--split-classes", "3"]) == 2
    assert "--split-classes is for imagefolder" in capsys.readouterr().err
    assert main([*arguments, "--samples-per-shard", "0"]) == 2
    assert "at least 1 sample per shard" in capsys.readouterr().err
    with pytest.raises(SystemExit) as caught:
        main(["build", "mnist", "--out", "x"])
    assert caught.value.code == 2


def test_the_module_runs_as_a_command(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "dist_proxygml.shard", "info", str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
    )
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: shard folder {tmp_path} has 0 tar files")
    assert done.stderr.count("\n") == 1


def test_a_shards_name_says_its_split() -> None:
    names = ["train-000012.tar", "00001.tar", "my-set_7.tar", "train.tar", "train-1.tar.tmp-2"]
    assert [split_of_shard(name) for name in names] == ["train", "train", "my-set", None, None]


# ---- the demo --------------------------------------------------------------------------------


def test_the_embedded_demo_is_sound_and_complete() -> None:
    assert main(["verify", "--deep", str(DEMO)]) == 0
    train, test = open_index(DEMO, "train"), open_index(DEMO, "test")
    assert train.num_samples + test.num_samples == NUM_IMAGES
    assert train.num_classes + test.num_classes == NUM_CLASSES
    assert not {entry.source_id for entry in train.classes} & {entry.source_id for entry in test.classes}
    assert min(entry.count for entry in (*train.classes, *test.classes)) >= 4


@pytest.fixture(scope="module")
def demo_infos() -> dict[str, list[dict[str, Any]]]:
    """The JSON of every demo sample by split."""
    return {split: [json.loads(sample["json"]) for sample in samples_of(DEMO, split)] for split in ("train", "test")}


def test_the_demos_split_is_that_of_the_classes_hashes(
    demo_infos: dict[str, list[dict[str, Any]]],
) -> None:
    keys = {split: {info["source"].split("/")[0] for info in infos} for split, infos in demo_infos.items()}
    ordered = sorted(keys["train"] | keys["test"], key=lambda key: hashlib.sha1(key.encode()).hexdigest())
    assert set(ordered[: len(ordered) // 2]) == keys["train"]


def test_every_demo_image_has_its_set_and_licence_and_the_texts_are_there(
    demo_infos: dict[str, list[dict[str, Any]]],
) -> None:
    used = {(info["set"], info["license"]) for infos in demo_infos.values() for info in infos}
    assert used == {(emoji_set.name, emoji_set.license) for emoji_set in EMOJI_SETS}
    attribution = (DEMO / "ATTRIBUTION.md").read_text()
    for emoji_set in EMOJI_SETS:
        for fact in (emoji_set.author, emoji_set.license, emoji_set.package, emoji_set.url):
            assert fact in attribution
        assert (DEMO / "LICENSES" / f"{emoji_set.license}.txt").stat().st_size > 1000


def test_variants_of_an_emoji_are_left_out() -> None:
    assert is_plain_emoji("1f600", "grinning-face")
    assert is_plain_emoji("1f43b-200d-2744", "polar-bear")
    for codepoints, name in [
        ("1f44d-1f3fd", "thumbs-up-medium-skin-tone"),
        ("1f3c3-200d-2640", "woman-running"),
        ("1f468-200d-1f373", "man-cook"),
        ("1f1e6", "regional-indicator-a"),
        ("e001", "private"),
        ("1f4f6", "signal-low"),
    ]:
        assert not is_plain_emoji(codepoints, name)


def test_a_folder_without_the_demos_sources_names_what_it_lacks(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("resvg_py")
    arguments = ["build", "demo", "--root", str(tmp_path), "--out", str(tmp_path / "out")]
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert "npm pack @iconify-json/noto@1.2.9" in error
    for emoji_set in EMOJI_SETS:
        (tmp_path / emoji_set.tarball).write_bytes(b"another file")
    assert main(arguments) == 2
    assert f"expected {EMOJI_SETS[0].sha256}" in capsys.readouterr().err
