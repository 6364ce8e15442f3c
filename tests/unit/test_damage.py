"""Every kind of damage to a folder of shards is found before a wrong sample is used, and named; plain WebDataset, for
comparison, is silent about most of it.
"""

import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import webdataset

from dist_proxygml.config import ResizeConfig
from dist_proxygml.data.index import ShardIndex, open_index
from dist_proxygml.data.pipeline import EpochOrder, ShardImages, build_train_loader
from dist_proxygml.data.transforms import build_transform
from tests.shards_of_noise import SIDE, write_noise_shards

RESIZE = build_transform(ResizeConfig(name="resize", size=SIDE))
CLASS_SIZES = [3, 4, 2]


def members(path: Path) -> list[tarfile.TarInfo]:
    with tarfile.open(path) as tar:
        return tar.getmembers()


def image(path: Path) -> tarfile.TarInfo:
    """The image of the second sample."""
    return [member for member in members(path) if member.name.endswith(".png")][1]


def cut(path: Path, size: int) -> None:
    path.write_bytes(path.read_bytes()[:size])


def overwrite(path: Path, offset: int, content: bytes) -> None:
    with open(path, "r+b") as file:
        file.seek(offset)
        file.write(content)


def flip(path: Path, offset: int) -> None:
    overwrite(path, offset, bytes([path.read_bytes()[offset] ^ 1]))


def swap(path: Path) -> None:
    other = path.with_name("test-000000.tar")
    content = path.read_bytes()
    path.write_bytes(other.read_bytes())
    other.write_bytes(content)


def rebuild_without_index(path: Path) -> None:
    """Other shards under the old index: same names, other images and sizes."""
    table, index = (path.with_name(name) for name in ("index.samples.test.npy", "index.json"))
    kept = {file: file.read_bytes() for file in (table, index)}
    write_noise_shards(path.parent, [2, 4, 3])
    for file, content in kept.items():
        file.write_bytes(content)


# What is done to the second of two shards, where it is found, and what plain WebDataset makes of it.
DAMAGE: dict[str, tuple[Callable[[Path], object], str, str]] = {
    "cut inside an image": (lambda p: cut(p, image(p).offset_data + 5), "opening", "an error"),
    "cut inside a header": (lambda p: cut(p, image(p).offset + 100), "opening", "silent"),
    "cut between samples": (lambda p: cut(p, members(p)[3].offset), "opening", "silent"),
    "second half zeroed": (
        lambda p: overwrite(p, members(p)[6].offset, bytes(p.stat().st_size - members(p)[6].offset)),
        "reading",
        "silent",
    ),
    "bit flipped in a header": (lambda p: flip(p, image(p).offset + 3), "harmless", "silent"),
    "bit flipped in an image": (lambda p: flip(p, image(p).offset_data + 45), "reading", "silent"),
    "empty": (lambda p: cut(p, 0), "opening", "an error"),
    "HTML": (lambda p: p.write_text("<html>404 not found</html>" * 99), "opening", "an error"),
    "HTML of the same size": (lambda p: p.write_bytes(b"<html>".ljust(p.stat().st_size)), "reading", "an error"),
    "missing": (lambda p: p.unlink(), "opening", "an error"),
    "two shards swapped": (swap, "reading or opening", "silent"),
    "index of other shards": (rebuild_without_index, "opening", "silent"),
}


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> ShardIndex:
    return write_noise_shards(tmp_path_factory.mktemp("sound"), CLASS_SIZES)


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_found_before_a_wrong_sample_is_used(sound: ShardIndex, tmp_path: Path, kind: str) -> None:
    do_damage, where, _ = DAMAGE[kind]
    folder = shutil.copytree(sound.root, tmp_path / "shards")
    do_damage(folder / "test-000001.tar")
    originals = ShardImages(sound, RESIZE)
    found = "harmless"
    try:
        index = open_index(folder, "test")
    except ValueError as error:
        found, message = "opening", str(error)
    else:
        try:
            for batch in build_train_loader(index, RESIZE, EpochOrder(batch_size=1)):
                (sample_id,) = batch.ids.tolist()
                assert torch.equal(batch.images[0], originals.image(sample_id))
                assert batch.labels.tolist() == [sound.labels[sample_id]]
        except ValueError as error:
            found, message = "reading", str(error)
    assert found in where
    if found != "harmless":
        assert "test-00000" in message or "index.samples.test.npy" in message or "index.classes.test.jsonl" in message
        assert "copy" in message or "again" in message  # what to do


@pytest.mark.parametrize("kind", DAMAGE)
def test_plain_webdataset_is_silent_about_most_of_it(sound: ShardIndex, tmp_path: Path, kind: str) -> None:
    """Not ours to mend, but docs/data.md says so, and should stop saying so when it changes."""
    do_damage, _, expected = DAMAGE[kind]
    folder = shutil.copytree(sound.root, tmp_path / "shards")
    do_damage(folder / "test-000001.tar")
    pipeline = webdataset.WebDataset(f"{folder}/test-{{000000..000001}}.tar", shardshuffle=False)
    try:
        list(pipeline)
        outcome = "silent"
    except Exception:  # tarfile's, the system's, or a ValueError
        outcome = "an error"
    assert outcome == expected


def test_a_shard_that_is_replaced_while_it_is_read_is_noticed(tmp_path: Path) -> None:
    index = write_noise_shards(tmp_path, CLASS_SIZES)
    images = ShardImages(index, RESIZE)
    last = int(np.flatnonzero(index.samples["shard"] == 1)[-1])
    cut(index.shard_paths[1], int(index.samples["offset"][last]) + 3)
    with pytest.raises(ValueError, match=r"got 3: "):
        images.image(last)
