"""From shards to batches."""

import io
import struct
import zlib
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dist_proxygml.config import AffineJitterConfig, ResizeConfig
from dist_proxygml.data.images import decode_image
from dist_proxygml.data.index import ShardIndex, open_index, write_index
from dist_proxygml.data.pipeline import (
    Batch,
    ImageCache,
    ShardImages,
    build_evaluation_loader,
    build_train_loader,
)
from dist_proxygml.data.shards import ShardSample, list_shard, sample_key, write_shard
from dist_proxygml.data.transforms import build_transform
from tests.shards_of_noise import write_noise_shards

PLAIN = build_transform(ResizeConfig(name="resize", size=8))
JITTER = build_transform(
    AffineJitterConfig(name="affine_jitter", size=6, degrees=20, shift=0.1, brightness=0.2, hue=0.3, flip=True)
)


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> ShardIndex:
    return write_noise_shards(tmp_path_factory.mktemp("shards"), [5, 1, 7, 4, 6], num_shards=4)


def same(left: Iterable[Batch], right: Iterable[Batch]) -> bool:
    pairs = list(zip(left, right, strict=True))
    return bool(pairs) and all(
        torch.equal(a.images, b.images)
        and torch.equal(a.labels, b.labels)
        and torch.equal(a.ids, b.ids)
        and a[3:] == b[3:]
        for a, b in pairs
    )


def test_batches_carry_the_right_images_labels_and_ids(index: ShardIndex) -> None:
    images = ShardImages(index, PLAIN)
    for batch in build_train_loader(index, PLAIN, batch_size=6):
        assert batch.images.dtype == torch.uint8
        assert batch.labels.dtype == batch.ids.dtype == torch.int64
        assert batch.labels.tolist() == index.labels[batch.ids].tolist()
        for image, sample in zip(batch.images, batch.ids, strict=True):
            assert torch.equal(image, images.image(int(sample)))


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_images_are_the_same_bit_for_bit_for_0_1_and_3_workers(index: ShardIndex) -> None:
    def batches(num_workers: int) -> list[Batch]:
        loader = build_train_loader(
            index, JITTER, batch_size=6, accumulation=2, seed=4, epoch=1, num_workers=num_workers
        )
        return list(loader)

    alone = batches(0)
    assert same(alone, batches(1))
    assert same(alone, batches(3))
    assert not same(alone, build_train_loader(index, JITTER, batch_size=6, accumulation=2, seed=5))


@pytest.mark.parametrize(("world_size", "accumulation"), [(1, 2), (2, 1), (3, 1), (3, 2)])
def test_ranks_and_micro_batches_see_the_images_of_one_process(
    index: ShardIndex, world_size: int, accumulation: int
) -> None:
    alone = list(build_train_loader(index, JITTER, batch_size=6, seed=1))
    assert [len(batch.ids) for batch in alone] == [6, 6, 6, 5]
    loaders = [
        build_train_loader(
            index,
            JITTER,
            batch_size=6,
            accumulation=accumulation,
            rank=rank,
            world_size=world_size,
            seed=1,
        )
        for rank in range(world_size)
    ]
    slots = world_size * accumulation
    whole = alone if 5 >= slots else alone[:3]  # 5 images cannot fill 6 slots
    assert {loader.num_steps for loader in loaders} == {len(whole)}
    ranks = [list(loader) for loader in loaders]
    for step, expected in enumerate(whole):
        parts = [
            ranks[rank][step * accumulation + micro_step]
            for micro_step in range(accumulation)
            for rank in range(world_size)
        ]
        assert torch.equal(torch.cat([part.images for part in parts]), expected.images)
        assert torch.equal(torch.cat([part.labels for part in parts]), expected.labels)
        weight = sum(parts[i].loss_weight(accumulation) for i in range(0, slots, world_size))
        assert weight == pytest.approx(accumulation)


def test_resuming_at_a_step_gives_exactly_what_was_left(index: ShardIndex) -> None:
    whole = list(build_train_loader(index, JITTER, batch_size=6, accumulation=2, epoch=2))
    for start_step in range(4):
        rest = build_train_loader(index, JITTER, batch_size=6, accumulation=2, epoch=2, start_step=start_step)
        assert same(rest, whole[2 * start_step :])
        assert rest.num_steps == 4
        assert len(rest) == 2 * (4 - start_step)
    assert list(build_train_loader(index, JITTER, batch_size=6, start_step=4)) == []
    with pytest.raises(ValueError, match=r"start_step must lie in \[0, 4\], got 5"):
        build_train_loader(index, JITTER, batch_size=6, start_step=5)


def test_a_cache_changes_nothing_but_the_reads(tmp_path: Path) -> None:
    index = write_noise_shards(tmp_path, [5, 6])
    cache = ImageCache()
    plain = list(build_train_loader(index, JITTER, batch_size=4))
    assert same(plain, build_train_loader(index, JITTER, batch_size=4, cache=cache))
    assert len(cache) == 11
    for path in index.shard_paths:
        path.unlink()
    assert same(plain, build_train_loader(index, JITTER, batch_size=4, cache=cache))
    with pytest.raises(ValueError, match="cannot be opened"):
        list(build_train_loader(index, JITTER, batch_size=4))


def test_a_cache_with_workers_is_refused(index: ShardIndex) -> None:
    with pytest.raises(ValueError, match="image cache needs num_workers 0, got 2"):
        build_train_loader(index, PLAIN, batch_size=4, cache=ImageCache(), num_workers=2)


def test_loading_leaves_the_global_random_state_alone(index: ShardIndex) -> None:
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    list(build_train_loader(index, JITTER, batch_size=6))
    assert torch.equal(before[0], torch.get_rng_state())
    assert np.array_equal(before[1], np.random.get_state()[1])


def test_an_evaluation_sees_every_image_once_in_the_same_batches_on_any_ranks(
    index: ShardIndex,
) -> None:
    alone = list(build_evaluation_loader(index, PLAIN, batch_size=4))
    assert torch.cat([batch.ids for batch in alone]).tolist() == list(range(23))
    assert {batch.loss_weight(1) for batch in alone} == {1.0}
    for world_size in (2, 3, 7):
        loaders = [
            build_evaluation_loader(index, PLAIN, batch_size=4, rank=rank, world_size=world_size)
            for rank in range(world_size)
        ]
        assert same(alone, [batch for loader in loaders for batch in loader])
    assert list(loaders[0]) == []  # 6 batches over 7 ranks


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_changed_byte_stops_the_epoch_naming_shard_sample_and_reason(tmp_path: Path, num_workers: int) -> None:
    index = write_noise_shards(tmp_path, [5, 6])
    row = index.samples[7]
    path = index.shard_paths[row["shard"]]
    content = bytearray(path.read_bytes())
    content[int(row["offset"]) + 60] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"crc32") as caught:
        list(build_train_loader(index, PLAIN, batch_size=4, num_workers=num_workers))
    message = str(caught.value)
    assert message.startswith(f"{path}, test sample 7 (label {row['label']}): crc32 is ")
    assert "verify --deep" in message
    assert "Traceback" not in message


def test_an_undecodable_image_stops_the_epoch_naming_the_sample(tmp_path: Path) -> None:
    samples = [
        ShardSample(sample_key("train", i), "png", content, 0, {})
        for i, content in enumerate([encode("RGB"), b"\x89PNG\r\n\x1a\n and no more"])
    ]
    write_shard(tmp_path / "train-000000.tar", samples)
    listed = ("train-000000.tar", list_shard(tmp_path / "train-000000.tar"))
    write_index(tmp_path, dataset="x", build={}, shards={"train": [listed]}, classes={"train": [("a", 1)]})
    loader = build_evaluation_loader(open_index(tmp_path, "train"), PLAIN, batch_size=2)
    with pytest.raises(ValueError, match=r"train-000000\.tar, train sample 1 .*does not decode"):
        list(loader)


def encode(mode: str, format: str = "PNG", **options: object) -> bytes:
    stream = io.BytesIO()
    picture = Image.new("RGB", (4, 3), (200, 100, 50))
    if mode == "I;16":
        picture = Image.fromarray(np.full((3, 4), 200 * 256 + 7, dtype=np.uint16))
    elif mode == "P":
        picture = picture.quantize(4)
    elif mode != "RGB":
        picture = picture.convert(mode)
    picture.save(stream, format, **options)
    return stream.getvalue()


@pytest.mark.parametrize(
    ("payload", "expected"),
    [
        (encode("RGB"), (200, 100, 50)),
        (encode("P"), (200, 100, 50)),
        (encode("L"), (124, 124, 124)),
        (encode("I;16"), (200, 200, 200)),
        (encode("1"), (255, 255, 255)),
        (encode("CMYK", "JPEG", quality=100), (200, 100, 50)),
        (encode("L", "JPEG", quality=100), (124, 124, 124)),
    ],
    ids=["rgb", "palette", "grey", "16-bit", "bilevel", "cmyk", "grey-jpeg"],
)
def test_every_image_mode_becomes_rgb(payload: bytes, expected: tuple[int, int, int]) -> None:
    image = decode_image(payload)
    assert (image.dtype, tuple(image.shape)) == (torch.uint8, (3, 3, 4))
    if len(set(expected)) == 1 and expected[0] == 255:
        assert set(image.unique().tolist()) <= {0, 255}  # dithered
        return
    assert (image.int() - torch.tensor(expected)[:, None, None]).abs().max() <= 2


def test_transparent_pixels_become_white() -> None:
    stream = io.BytesIO()
    picture = Image.new("RGBA", (2, 1), (10, 20, 30, 0))
    picture.putpixel((1, 0), (10, 20, 30, 255))
    picture.save(stream, "PNG")
    assert decode_image(stream.getvalue())[:, 0].T.tolist() == [[255, 255, 255], [10, 20, 30]]
    stream = io.BytesIO()
    Image.new("RGB", (1, 1), (1, 2, 3)).save(stream, "PNG", transparency=(1, 2, 3))
    assert decode_image(stream.getvalue()).flatten().tolist() == [255, 255, 255]


@pytest.mark.parametrize(
    "payload",
    [b"", b"<html></html>", encode("RGB")[:50], encode("RGB", "JPEG")[:-40]],
    ids=["empty", "html", "cut-png", "cut-jpeg"],
)
def test_what_is_no_whole_image_is_refused(payload: bytes) -> None:
    with pytest.raises(ValueError, match=r"does not decode|is empty"):
        decode_image(payload)


def test_a_decompression_bomb_is_refused_before_it_takes_memory() -> None:
    def chunk(kind: bytes, content: bytes) -> bytes:
        checksum = zlib.crc32(kind + content).to_bytes(4, "big")
        return len(content).to_bytes(4, "big") + kind + content + checksum

    header = struct.pack(">IIBBBBB", 20_000, 20_000, 1, 0, 0, 0, 0)
    bomb = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b""))
    with pytest.raises(ValueError, match="DecompressionBomb"):
        decode_image(bomb)
