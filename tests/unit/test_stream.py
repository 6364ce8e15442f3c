"""Batches from plain WebDataset shards without an index."""

import dataclasses
import io
import itertools
import multiprocessing
import os
import signal
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from dist_proxygml.config import AffineJitterConfig, RandomResizedCropConfig, ResizeConfig
from dist_proxygml.data.damage import Damage
from dist_proxygml.data.images import ORIENTATION_TAG
from dist_proxygml.data.pipeline import Batch, EpochOrder, RankShare
from dist_proxygml.data.shards import ShardSample, shard_name, write_shard
from dist_proxygml.data.stream import StreamLoader, build_stream_loader
from dist_proxygml.data.transforms import Transform, build_transform

RESIZE = build_transform(ResizeConfig(name="resize", size=4))
JITTER = build_transform(AffineJitterConfig(name="affine_jitter", size=4, brightness=0.5))
NUM_SHARDS, PER_SHARD = 5, 6


def png(value: int) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(np.full((4, 4, 3), value, dtype=np.uint8)).save(stream, "PNG")
    return stream.getvalue()


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """30 images in 5 shards; an image's grey level is its number, its label the number modulo 7."""
    for shard in range(NUM_SHARDS):
        numbers = range(shard * PER_SHARD, (shard + 1) * PER_SHARD)
        samples = [ShardSample(f"train-{number}", "png", png(number), number % 7, {}) for number in numbers]
        write_shard(tmp_path / shard_name("train", shard), samples)
    return tmp_path


def stream(shards: Path, **settings: object) -> StreamLoader:
    settings = {"num_classes": 7, "batch_size": 6, "num_images": 30, "shuffle_buffer": 8, **settings}
    return loader_of(f"{shards}/train-{{000000..00000{NUM_SHARDS - 1}}}.tar", **settings)


def loader_of(urls: str, *, transform: Transform = RESIZE, **settings: Any) -> StreamLoader:
    """`build_stream_loader` with the settings of its two objects by name."""
    order, share = (
        kind(**{field.name: settings.pop(field.name) for field in dataclasses.fields(kind) if field.name in settings})
        for kind in (EpochOrder, RankShare)
    )
    return build_stream_loader(urls, transform, order, share, **settings)


def numbers_of(batches: list[Batch]) -> list[int]:
    return [int(value) for batch in batches for value in batch.images[:, 0, 0, 0]]


@pytest.mark.parametrize("num_workers", [0, 1])
def test_steps_of_torchvision_draw_from_a_streams_own_seeds(shards: Path, num_workers: int) -> None:
    step = {"name": "ColorJitter", "brightness": 0.9}
    config = RandomResizedCropConfig.model_validate({"name": "random_resized_crop", "size": 4, "augment": [step]})
    transform = build_transform(config)
    first, again, other = (
        torch.cat([batch.images for batch in stream(shards, transform=transform, seed=seed, num_workers=num_workers)])
        for seed in (1, 1, 2)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("resampled", [True, False])
def test_every_rank_gets_full_steps_of_images_with_their_labels(
    shards: Path, num_workers: int, resampled: bool
) -> None:
    for rank in range(2):
        loader = stream(shards, accumulation=3, world_size=2, rank=rank, num_workers=num_workers, resampled=resampled)
        batches = list(loader)
        assert (loader.num_steps, len(loader), len(batches)) == (5, 15, 15)
        for batch in batches:
            assert (len(batch.images), batch.global_size, batch.step_size) == (1, 2, 6)
            assert batch.loss_weight(3) == 1.0
            assert batch.ids.tolist() == [-1]
        assert [number % 7 for number in numbers_of(batches)] == [int(batch.labels[0]) for batch in batches]


def test_fixed_parts_of_two_ranks_are_disjoint_and_each_goes_round_its_own(shards: Path) -> None:
    seen = [
        numbers_of(list(stream(shards, batch_size=2, num_images=80, world_size=2, rank=rank, resampled=False)))
        for rank in range(2)
    ]
    assert not set(seen[0]) & set(seen[1])
    assert set(seen[0]) | set(seen[1]) == set(range(30))
    assert len(seen[1]) == 40 > len(set(seen[1]))


def test_streams_differ_by_rank_epoch_start_and_seed_and_repeat_otherwise(shards: Path) -> None:
    def numbers(**settings: int) -> list[int]:
        return numbers_of(list(stream(shards, world_size=2, batch_size=2, **settings)))

    first = numbers(rank=0)
    assert first == numbers(rank=0)
    for other in ({"rank": 1}, {"rank": 0, "epoch": 1}, {"rank": 0, "start": 6}, {"rank": 0, "seed": 1}):
        assert numbers(**other) != first


def test_each_image_is_augmented_by_draws_of_its_own(shards: Path) -> None:
    batches = list(itertools.islice(stream(shards, transform=JITTER, num_images=6), 1))
    plain = list(itertools.islice(stream(shards, num_images=6), 1))
    factors = batches[0].images[:, 0, 0, 0].float() / plain[0].images[:, 0, 0, 0].float().clamp(min=1)
    assert len(factors.round(decimals=1).unique()) > 2


def test_what_is_no_sample_or_has_a_wrong_label_ends_a_stream_by_name_or_is_skipped_and_counted(
    tmp_path: Path,
) -> None:
    good = [ShardSample(f"train-{number}", "png", png(number), 0, {}) for number in range(4)]
    bad = [ShardSample("train-8", "png", b"\x89PNG\r\n\x1a\n and no more", 0, {})]
    write_shard(tmp_path / "train-000000.tar", good[:2] + bad + good[2:])
    settings = {"num_classes": 1, "batch_size": 4, "num_images": 8, "shuffle_buffer": 1}
    url = f"{tmp_path}/train-000000.tar"
    with pytest.raises(ValueError, match=r"train-000000\.tar, sample train-8\b.*decode"):
        list(loader_of(url, **settings))
    batches = list(loader_of(url, **settings, max_damaged=9))
    assert [len(batch.images) for batch in batches] == [4, 4]
    damaged = [damage for batch in batches for damage in batch.damaged]
    assert {damage.image for damage in damaged} == {f"{url}, sample train-8"}

    write_shard(tmp_path / "train-000000.tar", [*good, ShardSample("train-9", "png", png(9), 3, {})])
    with pytest.raises(ValueError, match=r"sample train-9\b.*'3'.*\b0 to 0\b"):
        list(loader_of(url, **settings))
    with pytest.raises(ValueError, match=r"\b1 shards.*none\.tar"):
        list(loader_of(f"{tmp_path}/none.tar", **settings))


def test_an_image_that_its_json_says_to_turn_is_turned(tmp_path: Path) -> None:
    pixels = np.full((4, 4, 3), 200, dtype=np.uint8)
    pixels[:2] = 9
    exif = Image.Exif()
    exif[ORIENTATION_TAG] = 3  # by half a circle
    data = io.BytesIO()
    Image.fromarray(pixels).save(data, "PNG", exif=exif)
    infos = [{"orientation": 3}, {"orientation": 3, "exif": "applied"}, {"exif": {"Orientation": 3}}]
    samples = [ShardSample(f"train-{number}", "png", data.getvalue(), 0, info) for number, info in enumerate(infos)]
    write_shard(tmp_path / "train-000000.tar", samples)
    settings = {"num_classes": 1, "batch_size": 3, "num_images": 3, "shuffle_buffer": 1, "resampled": False}
    assert sorted(numbers_of(list(loader_of(f"{tmp_path}/train-000000.tar", **settings)))) == [9, 9, 200]


def write_members(path: Path, *members: tuple[str, bytes]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


def write_cut(path: Path) -> None:
    write_members(path, ("a.png", png(1)), ("a.cls", b"0"))
    path.write_bytes(path.read_bytes()[:520])


UNUSABLE: dict[str, tuple[Callable[[Path], object], str]] = {
    "empty": (lambda p: write_members(p), "no samples"),
    "notes only": (lambda p: write_members(p, ("README", b"x")), "no samples"),
    "without images": (lambda p: write_members(p, ("a.cls", b"0")), "1 without an image that is read"),
    "of a type that is not read": (
        lambda p: write_members(p, ("a.heic", b"x"), ("a.cls", b"0")),
        "1 without an image that is read",
    ),
    "without labels": (lambda p: write_members(p, ("a.png", png(1))), "1 without a label"),
    "of a label that is none": (
        lambda p: write_members(p, ("a.png", png(1)), ("a.cls", b"9" * 5000)),
        "1 with a wrong label",
    ),
    "of damaged images": (
        lambda p: write_members(p, ("a.png", png(1)[:40]), ("a.cls", b"0"), ("b.png", b""), ("b.cls", b"0")),
        "2 that cannot be decoded",
    ),
    "cut": (write_cut, "1 place that is damaged"),
    "HTML": (lambda p: p.write_text("<html>404 not found</html>" * 99), "1 place that is damaged"),
}


@pytest.mark.parametrize("kind", UNUSABLE)
@pytest.mark.parametrize(
    "settings",
    [{}, {"shuffle_buffer": 1}, {"resampled": False}, {"resampled": False, "num_workers": 2}],
    ids=["resampled", "unbuffered", "fixed parts", "two processes"],
)
def test_a_stream_without_a_usable_sample_ends_after_a_round_with_the_counts_of_each_shard(
    tmp_path: Path, kind: str, settings: dict[str, object]
) -> None:
    write, counts = UNUSABLE[kind]
    for shard in range(NUM_SHARDS):
        write(tmp_path / shard_name("train", shard))
    loader = stream(tmp_path, max_damaged=0, **settings)
    for read in (lambda: list(loader), loader.check):
        with pytest.raises(ValueError, match="samples") as refusal:
            read()
        assert f"train-000000.tar: {counts}; train-" in str(refusal.value)
        assert "\n" not in str(refusal.value)


def test_a_large_stream_is_given_up_after_a_hundred_unusable_samples_and_tells_them_in_a_short_line(
    tmp_path: Path,
) -> None:
    members = [(f"photo.v2.{number:04d}.{extension}", b"0") for number in range(300) for extension in ("png", "cls")]
    for shard in range(NUM_SHARDS):  # keys end at the first dot: one sample
        write_members(tmp_path / shard_name("train", shard), *members)
    with pytest.raises(ValueError, match="first dot") as refusal:
        list(stream(tmp_path, max_damaged=1))
    assert len(str(refusal.value)) < 2000
    many = [ShardSample(f"train-{number}", "png", b"", 0, {}) for number in range(300)]
    for shard in range(NUM_SHARDS):
        write_shard(tmp_path / shard_name("train", shard), many)
    with pytest.raises(ValueError, match=r"\b101\b.*data\.max_damaged.*\b1\b"):
        list(stream(tmp_path, max_damaged=1))


def test_a_stream_that_becomes_empty_ends(shards: Path) -> None:
    batches = iter(stream(shards, num_images=6 * 999, resampled=False, shuffle_buffer=1))
    next(batches)
    for path in shards.glob("*.tar"):
        write_members(path)
    with pytest.raises(ValueError, match=r"\b5 shard.*train-000000\.tar"):
        list(batches)


@pytest.mark.parametrize("max_damaged", [None, 9])
def test_a_shard_that_is_not_there_ends_a_stream_whatever_is_skipped(shards: Path, max_damaged: int | None) -> None:
    def message(urls: str) -> str:
        with pytest.raises(ValueError, match=r"\w") as refusal:
            list(loader_of(urls, num_classes=7, batch_size=6, num_images=30, max_damaged=max_damaged))
        return str(refusal.value)

    os.mkfifo(shards / "fifo.tar")
    for name in ("typo-{0..1}.tar", "train-*.tar", "fifo.tar", "", "train-{000000..}.tar"):
        assert "shards, expected plain files, got none at" in message(f"{shards}/{name}")
    assert "cannot be expanded: Unbalanced braces" in message(f"{shards}/train-{{0..1.tar")
    assert "cannot be fetched: the program that gives it ended with status 3" in message(
        f"pipe:cat {shards}/train-000000.tar; exit 3"
    )
    assert "cannot be opened" in message("gopher://host/train-000000.tar")
    vanishing = iter(stream(shards, num_images=6 * 999, max_damaged=max_damaged))
    next(vanishing)
    for path in shards.glob("train-*.tar"):
        path.unlink()
    with pytest.raises(ValueError, match="No such file"):
        list(vanishing)


def test_a_program_that_gives_a_shard_may_give_more_than_the_tar(shards: Path) -> None:
    url = f"pipe:cat {shards}/train-000000.tar; head -c 300000 /dev/zero"
    loader = loader_of(url, num_classes=7, batch_size=6, num_images=30, shuffle_buffer=8)
    loader.check()
    assert set(numbers_of(list(loader))) == set(range(6))


def test_what_a_cut_shard_lacks_is_counted_and_named(shards: Path) -> None:
    path = shards / "train-000001.tar"
    path.write_bytes(path.read_bytes()[:5000])
    batches = list(stream(shards, max_damaged=9, resampled=False))
    assert {damage for batch in batches for damage in batch.damaged} == {Damage(str(path), "unexpected end of data")}
    with pytest.raises(ValueError, match=r"train-000001\.tar"):
        list(stream(shards, resampled=False, num_images=300))


def test_a_loading_process_that_dies_ends_a_stream_with_a_sentence_and_not_before_it_is_missed(shards: Path) -> None:
    handler = signal.getsignal(signal.SIGCHLD)
    batches = iter(stream(shards, num_workers=1, num_images=6 * 99999))
    next(batches)
    (process,) = multiprocessing.active_children()
    process.kill()
    process.join()
    assert signal.getsignal(signal.SIGCHLD) is handler
    with pytest.raises(ValueError, match=r"data\.num_workers"):
        list(batches)


def test_loading_processes_without_a_shard_are_refused(shards: Path) -> None:
    with pytest.raises(ValueError, match=r"5 shards.*6 loading processes"):
        stream(shards, world_size=2, num_workers=3, resampled=False)


def test_streaming_leaves_the_global_random_state_alone(shards: Path) -> None:
    before = torch.get_rng_state()
    list(stream(shards))
    assert torch.equal(before, torch.get_rng_state())
