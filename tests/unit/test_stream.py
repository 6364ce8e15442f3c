"""Batches from plain WebDataset shards without an index."""

import io
import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dist_proxygml.config import AffineJitterConfig, ResizeConfig
from dist_proxygml.data.pipeline import Batch
from dist_proxygml.data.shards import ShardSample, shard_name, write_shard
from dist_proxygml.data.stream import StreamLoader, build_stream_loader
from dist_proxygml.data.transforms import build_transform

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
    transform = settings.pop("transform", RESIZE)
    return build_stream_loader(f"{shards}/train-{{000000..00000{NUM_SHARDS - 1}}}.tar", transform, **settings)


def numbers_of(batches: list[Batch]) -> list[int]:
    return [int(value) for batch in batches for value in batch.images[:, 0, 0, 0]]


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
    with pytest.raises(ValueError, match=r"train-000000\.tar, sample train-8: the image does not decode"):
        list(build_stream_loader(url, RESIZE, **settings))
    batches = list(build_stream_loader(url, RESIZE, **settings, max_damaged=9))
    assert [len(batch.images) for batch in batches] == [4, 4]
    damaged = [damage for batch in batches for damage in batch.damaged]
    assert {damage.image for damage in damaged} == {f"{url}, sample train-8"}

    write_shard(tmp_path / "train-000000.tar", [*good, ShardSample("train-9", "png", png(9), 3, {})])
    with pytest.raises(ValueError, match="sample train-9 has the label '3'; expected 0 to 0"):
        list(build_stream_loader(url, RESIZE, **settings))
    with pytest.raises(ValueError, match="found 1 of 1 missing: .*none.tar"):
        list(build_stream_loader(f"{tmp_path}/none.tar", RESIZE, **settings))


def test_loading_processes_without_a_shard_and_uneven_batches_are_refused(shards: Path) -> None:
    with pytest.raises(ValueError, match="5 shards for 6 loading processes"):
        stream(shards, world_size=2, num_workers=3, resampled=False)
    with pytest.raises(ValueError, match="6 does not divide into 4 ranks x 1 micro-batches; use 4"):
        stream(shards, world_size=4)


def test_streaming_leaves_the_global_random_state_alone(shards: Path) -> None:
    before = torch.get_rng_state()
    list(stream(shards))
    assert torch.equal(before, torch.get_rng_state())
