"""Building shards: the same bytes from any number of processes, after any interruption; nothing lost in silence."""

import errno
import io
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
import webdataset
from PIL import Image, ImageOps
from torch.utils.data import DataLoader

from dist_proxygml.data import builder
from dist_proxygml.data.builder import BuildResult, build_shards, default_workers
from dist_proxygml.data.class_split import ClassSplit
from dist_proxygml.data.datasets import PUBLISHED_COUNTS, SourceDataset, SourceImage
from dist_proxygml.data.imagefolder import read_imagefolder
from dist_proxygml.data.images import ORIENTATION_TAG, rgb_pixels
from dist_proxygml.data.index import JOURNAL_FILE, open_index
from dist_proxygml.data.pipeline import ShardImages
from dist_proxygml.data.shards import ShardSample, list_shard, write_shard
from dist_proxygml.data.transforms import Resize
from dist_proxygml.shard import main
from tests.raw_downloads import digests, picture, samples_of, small_dataset, write_image

ROOT = Path(__file__).parents[2]
TIMEOUT = 100  # seconds, of what should take two


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    """Two classes that train and two that do not, 6 images each."""
    for i in range(24):
        write_image(tmp_path / "raw" / f"class {i % 4}" / f"{i}.jpg", i, size=(30, 20))
    return tmp_path / "raw"


def build(raw: Path, out: Path, **options: Any) -> BuildResult:
    dataset = read_imagefolder(raw, split=ClassSplit(by="name"))
    return build_shards(dataset, out, **{"samples_per_shard": 5, "quiet": True, **options})


# ---- the bytes -------------------------------------------------------------------------------------------------------


def test_two_builds_give_the_same_bytes_and_another_seed_others(tmp_path: Path) -> None:
    for name, seed in (("one", 0), ("two", 0), ("three", 1)):
        build_shards(small_dataset(), tmp_path / name, samples_per_shard=5, seed=seed, quiet=True)
    one, two, three = (digests(tmp_path / name) for name in ("one", "two", "three"))
    assert one == two
    assert len(one) == 1 + 4 + 3 + 2  # index, tables, shards
    tables = {"index.classes.train.jsonl", "index.classes.test.jsonl"}  # the order does not matter to classes
    assert {name for name in one if one[name] == three[name]} == tables


def test_any_number_of_processes_writes_the_same_bytes(raw: Path, tmp_path: Path) -> None:
    for workers in (1, 2, 3):
        build(raw, tmp_path / str(workers), workers=workers, samples_per_shard=2)
    assert digests(tmp_path / "1") == digests(tmp_path / "2") == digests(tmp_path / "3")


def test_a_handful_of_images_needs_no_processes() -> None:
    assert default_workers(10) == default_workers(1999) == 1
    assert default_workers(10**6) == min(8, len(os.sched_getaffinity(0)))


def test_a_build_shuffles_over_the_whole_split(tmp_path: Path) -> None:
    build_shards(small_dataset(), tmp_path, samples_per_shard=5, quiet=True)
    sources = [int(json.loads(s["json"])["source"][:-4]) for s in samples_of(tmp_path, "train")]
    assert sorted(sources) == list(range(13))
    assert sources != sorted(sources)
    assert any(source >= 5 for source in sources[:5])


def test_a_shard_has_the_bytes_of_webdatasets_writer_and_is_listed_as_it_was_written(tmp_path: Path) -> None:
    payloads = [b"", b"\xff" * 511, b"\xff" * 512, b"\xff" * 7000]
    samples = [
        ShardSample(f"train-{i:08d}", extension, payload, 10**i, {"class_name": f"Ünï {i}", "source_id": i})
        for extension in ("jpg", "png")
        for i, payload in enumerate(payloads)
    ][2:6]
    written = write_shard(tmp_path / "ours.tar", samples)
    owner = {"user": "root", "group": "root", "mode": 0o644, "mtime": 0}
    with webdataset.TarWriter(str(tmp_path / "theirs.tar"), encoder=False, format="USTAR_FORMAT", **owner) as writer:
        for s in samples:
            info = json.dumps(s.info, ensure_ascii=False, sort_keys=True, separators=(",", ":")).encode()
            writer.write({"__key__": s.key, s.extension: s.image, "cls": str(s.label).encode(), "json": info})
    assert (tmp_path / "ours.tar").read_bytes() == (tmp_path / "theirs.tar").read_bytes()
    listed = list_shard(tmp_path / "ours.tar")
    assert listed._replace(rows=None) == written._replace(rows=None)
    assert listed.rows.tolist() == written.rows.tolist()
    assert listed.classes[100] == ("Ünï 2", 2)


def test_keys_that_webdataset_would_cut_and_names_beyond_ustar_are_refused(tmp_path: Path) -> None:
    for key, message in (("im.v1", "dot"), ("a/b", "slash"), ("k" * 97, "101 bytes")):
        with pytest.raises(ValueError, match=message):
            write_shard(tmp_path / "train-000000.tar", [ShardSample(key, "jpg", b"x", 0, {})])
    image = SourceImage("val.v2", "a", "a", "a.png", b"")
    with pytest.raises(ValueError, match=r"'val\.v2'"):
        build_shards(SourceDataset("dotted", [image]), tmp_path / "out")
    assert not list(tmp_path.iterdir())


# ---- read by others --------------------------------------------------------------------------------------------------


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


def test_torchvision_transforms_in_a_webdataset_pipeline_make_batches(raw: Path, tmp_path: Path) -> None:
    from torchvision.transforms import v2

    build(raw, tmp_path / "out")
    transform = v2.Compose([v2.ToImage(), v2.RandomResizedCrop(8), v2.ToDtype(torch.float32, scale=True)])
    shards = sorted(str(path) for path in (tmp_path / "out").glob("train-*.tar"))
    pipeline = webdataset.WebDataset(shards, shardshuffle=False, nodesplitter=None, empty_check=False)
    decoded = pipeline.decode("pil").to_tuple("jpg", "cls").map_tuple(transform, int)
    batches = list(DataLoader(decoded, batch_size=4))
    assert [tuple(images.shape) for images, _ in batches] == [(4, 3, 8, 8)] * 3
    assert (
        torch.cat([labels for _, labels in batches]).tolist() == open_index(tmp_path / "out", "train").labels.tolist()
    )


def test_timms_reader_reads_the_shards(raw: Path, tmp_path: Path) -> None:
    from timm.data.readers.reader_wds import ReaderWds

    build(raw, tmp_path / "out")
    reader = ReaderWds(str(tmp_path / "out"), split="train-{000000..000002}.tar|12", is_training=False)
    found = [(image.size, label) for image, label in reader]
    assert found == [((30, 20), label) for label in open_index(tmp_path / "out", "train").labels.tolist()]


# ---- images that cannot be used --------------------------------------------------------------------------------------


def small_build(raw: Path, out: Path) -> list[str]:
    """The command that builds a folder in shards of five images."""
    where = ["--data", str(raw), "--out", str(out)]
    return ["build", "imagefolder", "--split-by=name", *where, "--samples-per-shard", "5"]


def damage(raw: Path) -> dict[str, str]:
    """Spoil five images; returns what is said of each."""
    write_image(raw / "class 0" / "4.jpg", 4, size=(90, 90))
    cut(raw / "class 0" / "4.jpg")
    (raw / "class 1" / "5.jpg").write_bytes(b"")
    (raw / "class 2" / "6.jpg").write_bytes(b"<html>404</html>")
    (raw / "class 3" / "photo.heic.png").write_bytes(b"\0\0\0\x18ftypheic")
    write_image(raw / "class 3" / "7.png", 7, size=(90, 90))
    cut(raw / "class 3" / "7.png")
    return {
        "class 0/4.jpg": "the image does not decode: OSError: image file is truncated",
        "class 1/5.jpg": "the image file is empty (0 bytes)",
        "class 2/6.jpg": "the image does not decode: expected JPEG, PNG, BMP, GIF, TIFF, WebP or PPM",
        "class 3/photo.heic.png": "the image does not decode: expected JPEG, PNG, BMP, GIF, TIFF, WebP or PPM",
        "class 3/7.png": "the image does not decode: ",
    }


def cut(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: 2 * len(content) // 3])


@pytest.mark.parametrize("workers", [1, 2])
def test_all_images_that_cannot_be_used_are_listed_and_there_is_no_index(
    workers: int, raw: Path, tmp_path: Path
) -> None:
    reasons = damage(raw)
    with pytest.raises(ValueError, match="5 of 26") as caught:
        build(raw, tmp_path / "out", workers=workers, samples_per_shard=20)  # several in one shard
    for name, reason in reasons.items():
        assert f"raw/{name}: {reason}" in str(caught.value)
    assert "--on-bad skip" in str(caught.value)
    assert set(digests(tmp_path / "out")) == {JOURNAL_FILE}


def test_a_long_list_of_unusable_images_is_cut(tmp_path: Path) -> None:
    images = [SourceImage("train", f"c{i % 2}", "c", f"{i:02d}.jpg", b"no image") for i in range(23)]
    with pytest.raises(ValueError, match=r"\b3 more") as caught:
        build_shards(SourceDataset("bad", images), tmp_path, quiet=True)
    assert str(caught.value).count("\n") == 20 + 1 + 1


def test_skipping_gives_what_a_folder_without_those_images_gives_and_names_them(
    raw: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    reasons = damage(raw)
    command = small_build(raw, tmp_path / "out")
    assert main([*command, "--on-bad", "skip"]) == 0
    captured = capsys.readouterr()
    assert "5 images cannot be used and were skipped" in captured.err
    assert "5 images could not be used and were skipped" in captured.out
    skipped = json.loads((tmp_path / "out" / "index.json").read_text())["build"]["skipped"]
    assert {record["name"] for record in skipped} == set(reasons)
    assert all(record["reason"].startswith(reasons[record["name"]]) for record in skipped)
    assert str(tmp_path) not in json.dumps(skipped)  # the same bytes wherever the raw images lie
    assert main(["verify", "--deep", str(tmp_path / "out")]) == 0
    for name in reasons:
        (raw / name).unlink()
    build(raw, tmp_path / "clean")
    ours, clean = digests(tmp_path / "out"), digests(tmp_path / "clean")
    assert ours.pop("index.json") != clean.pop("index.json")
    assert ours == clean


def test_what_is_kept_when_bad_images_are_skipped_decodes(
    raw: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_image(raw / "class 2" / "wrong.png", 4, size=(90, 90))
    content = bytearray((raw / "class 2" / "wrong.png").read_bytes())
    content[60] ^= 255
    (raw / "class 2" / "wrong.png").write_bytes(content)
    (raw / "class 9").mkdir()
    (raw / "class 9" / "only.jpg").write_bytes(b"<html>")
    command = [
        "build",
        "imagefolder",
        "--split-by=name",
        "--data",
        str(raw),
        "--out",
        str(tmp_path / "out"),
        "--on-bad",
        "skip",
    ]
    assert main(command) == 0
    error = capsys.readouterr().err
    assert f"{raw}/class 2/wrong.png: the image does not decode" in error
    assert "1 classes have no image left and are skipped: 'class 9'" in error
    assert main(["verify", "--deep", str(tmp_path / "out")]) == 0
    (raw / "class 9" / "only.jpg").unlink()
    (raw / "class 9").rmdir()
    build(raw, tmp_path / "trusting")  # looks at headers and last bytes alone
    index = open_index(tmp_path / "trusting", "test")
    images = ShardImages(index, Resize(8))
    found = []
    for sample_id in range(index.num_samples):
        try:
            images.image(sample_id)
        except ValueError as problem:
            found.append(str(problem))
    assert len(found) == 1
    assert "made of class 2/wrong.png): the image does not decode" in found[0]
    assert "build with `--on-bad skip`" in found[0]
    capsys.readouterr()
    assert main(["verify", "--deep", str(tmp_path / "trusting")]) == 1
    assert "(made of class 2/wrong.png): the image does not decode" in capsys.readouterr().err


@pytest.mark.parametrize("resize", [None, 10])
def test_photographs_that_a_camera_stored_turned_are_counted_keep_their_bytes_and_are_seen_upright(
    resize: int | None, raw: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    exif = Image.Exif()
    exif[ORIENTATION_TAG] = 6
    picture(3, size=(30, 20)).save(raw / "class 0" / "turned.jpg", exif=exif)
    picture(5, size=(30, 20)).save(raw / "class 0" / "turned.webp", exif=exif, lossless=True)
    exif[ORIENTATION_TAG] = 1
    picture(4, size=(30, 20)).save(raw / "class 0" / "upright.jpg", exif=exif)
    out = tmp_path / "out"
    command = ["build", "imagefolder", "--split-by=name", "--data", str(raw), "--out", str(out)]
    assert main([*command, *([] if resize is None else ["--resize", str(resize)])]) == 0
    assert "2 of the images are stored turned or mirrored (EXIF orientation)" in capsys.readouterr().err
    document = json.loads((out / "index.json").read_text())
    assert (document["build"]["num_turned"], document["build"]["exif"], document["version"]) == (2, "applied", 3)
    assert main(["verify", "--deep", str(out)]) == 0
    index = open_index(out, "train")
    images = ShardImages(index, Resize(8))
    infos = {}
    for number, sample in enumerate(samples_of(out, "train")):
        info = json.loads(sample["json"])
        infos[info["source"]] = info
        image = images.image(number)
        assert (image.shape[2], image.shape[1]) == (info["width"], info["height"])
        if resize is None:
            shown = ImageOps.exif_transpose(Image.open(raw / info["source"])).convert("RGB")
            difference = np.abs(np.asarray(shown).astype(int) - image.permute(1, 2, 0).numpy().astype(int))
            assert difference.max() <= 1  # two JPEG decoders
            kept = sample.get("jpg", sample.get("webp"))
            assert kept == (raw / info["source"]).read_bytes()
    for name in ("turned.jpg", "turned.webp"):
        info = infos[f"class 0/{name}"]
        assert (info["orientation"], info["exif"]) == (6, "applied")
        assert (info["width"], info["height"]) == ((20, 30) if resize is None else (10, 15))
    assert not {"orientation", "exif"} & infos["class 0/upright.jpg"].keys()
    assert main([*command, *([] if resize is None else ["--resize", str(resize)])]) == 0
    assert "nothing to do" in capsys.readouterr().out
    # The index can be made again, with or without the one that was there.
    before = (out / "index.json").read_bytes()
    assert main(["index", str(out)]) == 0
    assert (out / "index.json").read_bytes() == before
    (out / "index.json").unlink()
    assert main(["index", str(out)]) == 0
    assert open_index(out, "train").upright


def test_published_sets_and_earlier_shards_are_seen_as_they_are_stored(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[ORIENTATION_TAG] = 6
    stream = io.BytesIO()
    picture(3, size=(30, 20)).save(stream, "JPEG", exif=exif)
    images = [SourceImage(split, split, split, f"{split}.jpg", stream.getvalue()) for split in ("train", "test")]
    for name in PUBLISHED_COUNTS:
        result = build_shards(SourceDataset(name, images), tmp_path / name, quiet=True)
        assert (result.num_turned, result.is_upright) == (2, False)
        build = json.loads((tmp_path / name / "index.json").read_text())
        assert (build["version"], "exif" in build["build"], build["build"]["num_turned"]) == (2, False, 2)
        index = open_index(tmp_path / name, "train")
        assert ShardImages(index, Resize(8)).image(0).shape == (3, 20, 30)
        # With a field of earlier shards: an orientation, and nobody who applies it.
        assert main(["index", str(tmp_path / name)]) == 0
        assert not open_index(tmp_path / name, "train").upright


def test_what_shards_do_not_hold_is_stored_as_png_of_the_same_pixels_and_counted(
    raw: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shown = {}
    for number, (kind, options) in enumerate(
        {
            "bmp": {},
            "gif": {"save_all": True, "append_images": [picture(9, size=(30, 20))]},
            "tif": {},
            "ppm": {},
            "avif": {},
            "webp": {"lossless": True},
        }.items()
    ):
        path = raw / "class 0" / f"x.{kind}"
        picture(number, size=(30, 20)).save(path, **options)
        shown[f"class 0/x.{kind}"] = np.asarray(Image.open(path).convert("RGB"))
    wide = raw / "class 0" / "wide.tiff"
    Image.fromarray((np.arange(600).reshape(20, 30) * 100).astype(np.uint16)).save(wide, tiffinfo={ORIENTATION_TAG: 6})
    shown["class 0/wide.tiff"] = rgb_pixels(Image.open(io.BytesIO(wide.read_bytes())))
    out = tmp_path / "out"
    command = ["build", "imagefolder", "--split-by=name", "--data", str(raw), "--out", str(out)]
    assert main([*command, "--on-bad", "skip"]) == 0
    assert "1 AVIF, 1 BMP, 1 GIF, 1 PPM, 2 TIFF files are stored as PNG" in capsys.readouterr().err
    document = json.loads((out / "index.json").read_text())
    assert document["build"]["reencoded"] == {"AVIF": 1, "BMP": 1, "GIF": 1, "PPM": 1, "TIFF": 2}
    images = ShardImages(open_index(out, "train"), Resize(8))
    for number, sample in enumerate(samples_of(out, "train")):
        source = json.loads(sample["json"])["source"]
        if source in shown:
            assert ("webp" if source.endswith("webp") else "png") in sample
            assert np.array_equal(images.image(number).permute(1, 2, 0), shown.pop(source))
    assert not shown
    assert main([*command, "--on-bad", "skip"]) == 0
    assert "1 AVIF, " in capsys.readouterr().err


def test_a_jpeg_with_bytes_after_its_end_is_whole(raw: Path, tmp_path: Path) -> None:
    with open(raw / "class 0" / "0.jpg", "ab") as stream:
        stream.write(b"trailer of a camera")
    build(raw, tmp_path / "out")
    assert main(["verify", "--deep", str(tmp_path / "out")]) == 0


# ---- interrupted builds ----------------------------------------------------------------------------------------------


def build_and_die(raw: Path, out: Path, moment: int) -> None:
    """A build that is killed as by `kill -9`: at a rename, counted from 0, before it (even) or after it (odd)."""
    num_renames, replace = 0, os.replace

    def replace_or_die(source: Path, target: Path) -> None:
        nonlocal num_renames
        if moment == 2 * num_renames:
            os.kill(os.getpid(), signal.SIGKILL)
        replace(source, target)
        if moment == 2 * num_renames + 1:
            os.kill(os.getpid(), signal.SIGKILL)
        num_renames += 1

    os.replace = replace_or_die
    build(raw, out)


# 3 shards each of train and test, 4 tables, the index.
MOMENTS = {0: 0, 1: 0, 2: 1, 5: 2, 11: 5, 12: 6, 15: 6, 20: 6}


@pytest.mark.parametrize(("moment", "num_kept"), MOMENTS.items())
def test_a_build_killed_at_a_rename_goes_on_and_ends_with_the_same_bytes(
    moment: int, num_kept: int, raw: Path, tmp_path: Path
) -> None:
    build(raw, tmp_path / "undisturbed")
    out = tmp_path / "out"
    process = multiprocessing.get_context("forkserver").Process(target=build_and_die, args=(raw, out, moment))
    process.start()
    process.join(TIMEOUT)
    assert process.exitcode == -signal.SIGKILL
    assert not (out / "index.json").exists()
    assert [path for path in out.iterdir() if ".tmp-" in path.name] or moment % 2
    result = build(raw, out, workers=1 + moment % 2)
    assert (result.num_kept, result.num_shards, result.already_there) == (num_kept, 6, False)
    assert digests(out) == digests(tmp_path / "undisturbed")


def test_a_build_killed_after_its_index_is_finished(raw: Path, tmp_path: Path) -> None:
    build(raw, tmp_path / "undisturbed")
    process = multiprocessing.get_context("forkserver").Process(target=build_and_die, args=(raw, tmp_path / "out", 21))
    process.start()
    process.join(TIMEOUT)
    assert (tmp_path / "out" / "index.json").exists()
    assert (tmp_path / "out" / JOURNAL_FILE).exists()
    assert build(raw, tmp_path / "out").already_there
    assert digests(tmp_path / "out") == digests(tmp_path / "undisturbed")


@pytest.fixture
def interrupted(raw: Path, tmp_path: Path) -> Path:
    """A folder with all six shards and their journal, whose build was killed before its tables."""
    process = multiprocessing.get_context("forkserver").Process(target=build_and_die, args=(raw, tmp_path / "out", 12))
    process.start()
    process.join(TIMEOUT)
    return tmp_path / "out"


@pytest.mark.parametrize(
    ("change", "num_kept"),
    [
        (lambda raw, out: (out / "train-000001.tar").unlink(), 5),
        (lambda raw, out: (out / "train-000001.tar").write_bytes(b"cut"), 5),
        (lambda raw, out: flip(out / "train-000001.tar", 600), 5),
        (lambda raw, out: write_image(raw / "class 0" / "0.jpg", 99, size=(30, 20)), 5),
        (lambda raw, out: os.utime(raw / "class 0" / "0.jpg", ns=(1, 1)), 5),
        (lambda raw, out: (raw / "class 1" / "1.jpg").rename(raw / "class 1" / "1-.jpg"), 5),
        (lambda raw, out: (raw / "class 1").rename(raw / "class 0b"), 3),
        (lambda raw, out: cut_last_line(out / JOURNAL_FILE), 5),
        (lambda raw, out: (out / JOURNAL_FILE).write_bytes(b"\x00garbage\n" + (out / JOURNAL_FILE).read_bytes()), 6),
        (lambda raw, out: (out / JOURNAL_FILE).write_bytes(b""), 0),
    ],
    ids="missing cut flipped pixels time renamed class torn garbled empty_journal".split(),
)
def test_only_what_still_fits_is_kept(
    change: Callable[[Path, Path], None], num_kept: int, raw: Path, interrupted: Path, tmp_path: Path
) -> None:
    change(raw, interrupted)
    assert build(raw, interrupted).num_kept == num_kept
    build(raw, tmp_path / "clean")
    assert digests(interrupted) == digests(tmp_path / "clean")


def flip(path: Path, position: int) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


def cut_last_line(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-20])


def test_a_build_killed_twice_knows_all_shards_of_both(raw: Path, interrupted: Path, tmp_path: Path) -> None:
    cut_last_line(interrupted / JOURNAL_FILE)
    process = multiprocessing.get_context("forkserver").Process(target=build_and_die, args=(raw, interrupted, 2))
    process.start()
    process.join(TIMEOUT)
    assert process.exitcode == -signal.SIGKILL
    assert build(raw, interrupted).num_kept == 6


def test_a_shard_whose_labels_moved_is_not_kept(tmp_path: Path) -> None:
    def image(split: str, name: str, content: Path) -> SourceImage:
        return SourceImage(split, name[0], name[0], name, content)

    write_image(tmp_path / "x.png", 1)
    gallery = [image("gallery", name, tmp_path / "x.png") for name in ("b1", "c1")]
    query = [image("query", "b2", tmp_path / "x.png"), image("query", "a1", tmp_path / "no image")]
    with pytest.raises(ValueError, match="No such file"):
        build_shards(SourceDataset("pairs", query + gallery, (("query", "gallery"),)), tmp_path / "out", quiet=True)
    assert (tmp_path / "out" / "gallery-000000.tar").exists()
    without_a = SourceDataset("pairs", query[:1] + gallery, (("query", "gallery"),))
    assert build_shards(without_a, tmp_path / "out", quiet=True).num_kept == 0
    build_shards(without_a, tmp_path / "clean", quiet=True)
    assert digests(tmp_path / "out") == digests(tmp_path / "clean")


@pytest.mark.parametrize("options", [{"samples_per_shard": 7}, {"seed": 1}, {"resize": 10}])
def test_shards_of_other_settings_are_not_kept(
    options: dict[str, int], raw: Path, interrupted: Path, tmp_path: Path
) -> None:
    assert build(raw, interrupted, **options).num_kept == 0
    build(raw, tmp_path / "clean", **options)
    assert digests(interrupted) == digests(tmp_path / "clean")


# ---- the command in its own processes --------------------------------------------------------------------------------


@pytest.fixture
def many(tmp_path: Path) -> Path:
    for i in range(60):
        write_image(tmp_path / "many" / f"{i % 4}" / f"{i}.jpg", i, size=(700, 500))
    return tmp_path / "many"


def command(raw: Path, out: Path) -> list[str]:
    options = [
        "--data",
        str(raw),
        "--out",
        str(out),
        "--samples-per-shard",
        "1",
        "--resize",
        "150",
        "--num-workers",
        "2",
    ]
    return ["build", "imagefolder", "--split-by=name", *options]


@pytest.fixture
def running(many: Path, tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """The command, once it has written a few of its 60 shards."""
    process = subprocess.Popen(
        [sys.executable, "-m", "dist_proxygml.shard", *command(many, tmp_path / "out")],
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=partial(
            signal.signal, signal.SIGINT, signal.SIG_DFL
        ),  # tests in the background of a shell ignore it
    )
    journal = tmp_path / "out" / JOURNAL_FILE
    end = time.monotonic() + TIMEOUT
    while not journal.exists() or journal.read_bytes().count(b"\n") < 3:
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < end
        time.sleep(0.002)  # leaves the core to the command
    yield process
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


def goes_on(many: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The same command ends with the bytes of an undisturbed build."""
    assert not (tmp_path / "out" / "index.json").exists()
    assert main(command(many, tmp_path / "out")) == 0
    assert "of 60 shards were kept from a build that was interrupted" in capsys.readouterr().out
    build(many, tmp_path / "clean", samples_per_shard=1, resize=150)
    assert digests(tmp_path / "out") == digests(tmp_path / "clean")


def test_a_killed_command_takes_its_workers_along_and_goes_on(
    running: subprocess.Popen[str], many: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    helpers = psutil.Process(running.pid).children(recursive=True)
    assert len(helpers) >= 3  # the fork server and two workers
    running.kill()
    _, alive = psutil.wait_procs(helpers, timeout=TIMEOUT)
    assert not alive
    goes_on(many, tmp_path, capsys)


def test_a_killed_worker_ends_the_build_with_a_message(
    running: subprocess.Popen[str], many: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    workers = [p for p in psutil.Process(running.pid).children(recursive=True) if p.ppid() != running.pid]
    assert len(workers) == 2
    workers[0].kill()
    _, error = running.communicate(timeout=TIMEOUT)
    assert running.returncode == 2
    assert "error: one of the 2 worker processes was killed" in error
    assert "the same command" in error
    assert not [path for path in (tmp_path / "out").iterdir() if ".tmp-" in path.name]
    goes_on(many, tmp_path, capsys)


def test_ctrl_c_ends_the_build_without_a_traceback(
    running: subprocess.Popen[str], many: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    os.killpg(running.pid, signal.SIGINT)
    _, error = running.communicate(timeout=TIMEOUT)
    assert running.returncode == 130
    assert "stopped; the same command resumes" in error
    assert "Traceback" not in error
    assert not [path for path in (tmp_path / "out").iterdir() if ".tmp-" in path.name]
    goes_on(many, tmp_path, capsys)


def test_two_builds_do_not_write_into_one_folder(raw: Path, tmp_path: Path) -> None:
    first, second = threading.Event(), threading.Event()

    class Slow(SourceDataset):
        def label_space(self, split: str) -> tuple[str, ...]:
            first.set()
            assert second.wait(TIMEOUT)
            return super().label_space(split)

    dataset = read_imagefolder(raw)
    slow = partial(build_shards, Slow(dataset.name, dataset.images), tmp_path / "out", quiet=True)
    thread = threading.Thread(target=slow)
    thread.start()
    try:
        assert first.wait(TIMEOUT)
        with pytest.raises(ValueError, match="another process"):
            build_shards(dataset, tmp_path / "out", quiet=True)
    finally:
        second.set()
        thread.join(TIMEOUT)
    assert open_index(tmp_path / "out", "train").num_samples == 12


# ---- finished builds -------------------------------------------------------------------------------------------------


def test_a_finished_build_of_the_same_images_is_left_alone(
    raw: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["build", "imagefolder", "--split-by=name", "--data", str(raw), "--out", str(tmp_path / "out")]
    assert main(arguments) == 0
    before = digests(tmp_path / "out")
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    capsys.readouterr()
    assert main(arguments) == 0
    assert "nothing to do" in capsys.readouterr().out
    assert times == {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    assert main([*arguments, "--overwrite"]) == 0
    assert digests(tmp_path / "out") == before
    assert times != {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    # Other settings, other images, or a shard that is gone.
    for more in (["--seed", "1"], ["--samples-per-shard", "9"], ["--resize", "9"]):
        assert main([*arguments, *more]) == 2
        assert "already holds finished shards" in capsys.readouterr().err
    write_image(raw / "class 0" / "new.jpg", 1)
    assert main(arguments) == 2
    assert "finished shards of other images; pass --overwrite" in capsys.readouterr().err
    (raw / "class 0" / "new.jpg").unlink()
    (tmp_path / "out" / "train-000000.tar").unlink()
    assert main(arguments) == 2
    assert "train-000000.tar is missing" in capsys.readouterr().err
    assert main([*arguments, "--overwrite"]) == 0
    assert digests(tmp_path / "out") == before


def test_finished_shards_are_only_replaced_when_told_so(tmp_path: Path) -> None:
    build_shards(small_dataset(), tmp_path, samples_per_shard=3, quiet=True)
    with pytest.raises(ValueError, match="--overwrite"):
        build_shards(small_dataset(), tmp_path, quiet=True)
    (tmp_path / "ATTRIBUTION.md").write_text("kept")
    build_shards(small_dataset(), tmp_path, samples_per_shard=20, overwrite=True, quiet=True)
    assert sorted(digests(tmp_path)) == [
        "ATTRIBUTION.md",
        "index.classes.test.jsonl",
        "index.classes.train.jsonl",
        "index.json",
        "index.samples.test.npy",
        "index.samples.train.npy",
        "test-000000.tar",
        "train-000000.tar",
    ]


def test_what_is_replaced_loses_its_index_first(raw: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build(raw, tmp_path / "out")
    removed = []
    unlink = Path.unlink

    def note(path: Path, missing_ok: bool = False) -> None:
        removed.append(path.name)
        unlink(path, missing_ok)

    monkeypatch.setattr(Path, "unlink", note)
    build(raw, tmp_path / "out", samples_per_shard=20, overwrite=True)
    assert removed[0] == "index.json"
    assert "train-000001.tar" in removed


@pytest.mark.parametrize("name", ["photos-000000.tar", "train-000000.tar"])
def test_tars_of_another_origin_are_not_deleted(name: str, raw: Path, tmp_path: Path) -> None:
    theirs = tmp_path / "out" / name
    theirs.parent.mkdir()
    theirs.write_bytes(b"theirs")
    for _ in range(2):  # a refused build is not one that goes on
        with pytest.raises(ValueError, match=rf"\b1 tars.*{name}.*--overwrite"):
            build(raw, tmp_path / "out")
    assert [path.name for path in theirs.parent.iterdir()] == [name]
    build(raw, tmp_path / "out", overwrite=True)
    assert not theirs.exists() or theirs.read_bytes() != b"theirs"


def test_a_tar_of_another_origin_beside_an_unfinished_build_is_not_deleted(raw: Path, interrupted: Path) -> None:
    (interrupted / "photos-000000.tar").write_bytes(b"theirs")
    with pytest.raises(ValueError, match=r"\b1 tars.*photos-000000\.tar.*--overwrite"):
        build(raw, interrupted)
    assert (interrupted / "photos-000000.tar").read_bytes() == b"theirs"


@pytest.mark.parametrize("name", ["manifest.json", "export.json", "config.json"])
def test_a_folder_of_something_else_takes_no_shards(raw: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / name).write_text("{}")
    for overwrite in (False, True):
        with pytest.raises(ValueError, match=rf"\b{name}: "):
            build(raw, tmp_path / "out", overwrite=overwrite)
    assert [path.name for path in (tmp_path / "out").iterdir()] == [name]


def test_a_build_that_stops_leaves_no_index_and_can_be_run_again(tmp_path: Path) -> None:
    dataset = small_dataset()
    bad = SourceImage("train", "c0-train", "Ünï 0", "bad.png", b"not an image")
    broken = SourceDataset("small", [*dataset.images, bad])
    with pytest.raises(ValueError, match=r"bad\.png"):
        build_shards(broken, tmp_path / "out", samples_per_shard=5, quiet=True)
    (tmp_path / "out" / "train-000009.tar.tmp-123").write_bytes(b"left by a killed build")
    with pytest.raises(ValueError, match=r"index\.json.*unfinished"):
        open_index(tmp_path / "out", "train")
    for name in ("out", "clean"):
        build_shards(dataset, tmp_path / name, samples_per_shard=5, quiet=True)
    assert digests(tmp_path / "out") == digests(tmp_path / "clean")


def test_resized_shards_say_so_and_grey_images_stay_grey(raw: Path, tmp_path: Path) -> None:
    Image.new("L", (12, 40), 7).save(raw / "class 0" / "grey.jpg")
    build(raw, tmp_path / "out", resize=20)
    grey = next(s for s in samples_of(tmp_path / "out", "train") if "grey" in json.loads(s["json"])["source"])
    assert grey["jpg"] == (raw / "class 0" / "grey.jpg").read_bytes()
    assert json.loads((tmp_path / "out" / "index.json").read_text())["build"]["resize"] == 20


def test_a_build_that_finishes_while_another_waits_for_the_folder_is_not_deleted(
    raw: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    look = builder._already_there

    def look_and_be_overtaken(*arguments: Any, **options: Any) -> BuildResult | None:
        found = look(*arguments, **options)
        monkeypatch.setattr(builder, "_already_there", look)
        build_shards(small_dataset(), tmp_path / "out", samples_per_shard=5, quiet=True)
        return found

    monkeypatch.setattr(builder, "_already_there", look_and_be_overtaken)
    with pytest.raises(ValueError, match=r"\bsmall\b"):
        build(raw, tmp_path / "out")
    build_shards(small_dataset(), tmp_path / "clean", samples_per_shard=5, quiet=True)
    assert digests(tmp_path / "out") == digests(tmp_path / "clean")


def test_a_lock_on_a_journal_that_has_gone_is_none(raw: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flock = builder.fcntl.flock

    def overtaken(stream: Any, operation: int) -> None:
        flock(stream, operation)
        (tmp_path / "out" / JOURNAL_FILE).unlink()

    monkeypatch.setattr(builder.fcntl, "flock", overtaken)
    with pytest.raises(ValueError, match="run the command again"):
        build(raw, tmp_path / "out")


@pytest.mark.parametrize("on_bad", ["fail", "skip"])
def test_finished_shards_are_only_deleted_for_images_that_can_be_used(on_bad: str, raw: Path, tmp_path: Path) -> None:
    build(raw, tmp_path / "out")
    before = digests(tmp_path / "out")
    spoilt = sorted(raw.rglob("*.jpg"))[: 24 if on_bad == "skip" else 1]
    for path in spoilt:
        path.write_bytes(b"no image")
    with pytest.raises(ValueError, match="JPEG, PNG"):
        build(raw, tmp_path / "out", overwrite=True, on_bad=on_bad)
    assert digests(tmp_path / "out") == before


@pytest.mark.parametrize("place", ["file", "file/below", "n" * 300])
def test_a_place_that_cannot_be_a_folder_is_named(
    place: str, raw: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("theirs")
    assert main(["build", "imagefolder", "--split-by=name", "--data", str(raw), "--out", str(tmp_path / place)]) == 2
    assert f"{place} cannot be a folder to write shards to: " in capsys.readouterr().err


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EFBIG])
def test_a_full_disk_is_named_with_its_folder_and_the_same_command_goes_on(
    number: int, raw: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = small_build(raw, tmp_path / "out")
    rename = os.replace

    def full(source: Path, target: Path) -> None:
        if Path(target).name == "train-000002.tar":
            raise OSError(number, os.strerror(number))
        rename(source, target)

    monkeypatch.setattr(os, "replace", full)
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert f"no room to write on in {tmp_path / 'out'}: " in error
    assert os.strerror(number) in error
    assert "the same command" in error
    monkeypatch.undo()
    assert main(arguments) == 0
    assert "2 of 6 shards were kept" in capsys.readouterr().out
