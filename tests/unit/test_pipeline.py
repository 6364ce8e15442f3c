"""From shards to batches."""

import dataclasses
import io
import os
import signal
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from dist_proxygml.config import AffineJitterConfig, RandomResizedCropConfig, ResizeConfig
from dist_proxygml.data.index import ShardIndex, open_index, write_index
from dist_proxygml.data.pipeline import (
    Batch,
    BatchLoader,
    EpochOrder,
    ImageCache,
    Loading,
    RankShare,
    ShardImages,
    build_evaluation_loader,
    build_train_loader,
    sample_generators,
)
from dist_proxygml.data.shards import ShardSample, list_shard, sample_key, write_shard
from dist_proxygml.data.transforms import Transform, build_transform
from tests.shards_of_noise import write_noise_shards

PLAIN = build_transform(ResizeConfig(name="resize", size=8))
JITTER = build_transform(
    AffineJitterConfig(name="affine_jitter", size=6, degrees=20, shift=0.1, brightness=0.2, hue=0.3, flip=True)
)
AUGMENT = build_transform(
    RandomResizedCropConfig.model_validate(
        {
            "name": "random_resized_crop",
            "size": 6,
            "augment": [{"name": "RandAugment"}, {"name": "ColorJitter", "hue": 0.2}, {"name": "RandomErasing"}],
        }
    )
)


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> ShardIndex:
    return write_noise_shards(tmp_path_factory.mktemp("shards"), [5, 1, 7, 4, 6], num_shards=4)


def train_loader(index: ShardIndex, transform: Transform, **settings: Any) -> BatchLoader:
    """`build_train_loader` with the settings of its three objects by name."""
    order, share, loading = (
        kind(**{field.name: settings.pop(field.name) for field in dataclasses.fields(kind) if field.name in settings})
        for kind in (EpochOrder, RankShare, Loading)
    )
    assert not settings
    return build_train_loader(index, transform, order, share, loading)


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
    for batch in train_loader(index, PLAIN, batch_size=6):
        assert batch.images.dtype == torch.uint8
        assert batch.labels.dtype == batch.ids.dtype == torch.int64
        assert batch.labels.tolist() == index.labels[batch.ids].tolist()
        for image, sample in zip(batch.images, batch.ids, strict=True):
            assert torch.equal(image, images.image(int(sample)))


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_images_are_the_same_bit_for_bit_for_0_1_and_3_workers(index: ShardIndex) -> None:
    def batches(num_workers: int) -> list[Batch]:
        loader = train_loader(index, JITTER, batch_size=6, accumulation=2, seed=4, epoch=1, num_workers=num_workers)
        return list(loader)

    alone = batches(0)
    assert same(alone, batches(1))
    assert same(alone, batches(3))
    assert not same(alone, train_loader(index, JITTER, batch_size=6, accumulation=2, seed=5))


@pytest.mark.parametrize(("world_size", "accumulation"), [(1, 2), (2, 1), (3, 1), (3, 2)])
def test_ranks_and_micro_batches_see_the_images_of_one_process(
    index: ShardIndex, world_size: int, accumulation: int
) -> None:
    drop_last = world_size * accumulation == 6  # 5 images cannot fill 6 slots
    alone = list(train_loader(index, JITTER, batch_size=6, seed=1, drop_last=drop_last))
    assert [len(batch.ids) for batch in alone] == [6, 6, 6, 5][: 3 if drop_last else 4]
    loaders = [
        train_loader(
            index,
            JITTER,
            batch_size=6,
            accumulation=accumulation,
            rank=rank,
            world_size=world_size,
            seed=1,
            drop_last=drop_last,
        )
        for rank in range(world_size)
    ]
    slots = world_size * accumulation
    assert {loader.num_steps for loader in loaders} == {len(alone)}
    ranks = [list(loader) for loader in loaders]
    for step, expected in enumerate(alone):
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
    whole = list(train_loader(index, JITTER, batch_size=6, accumulation=2, epoch=2))
    for num_done in range(4):
        rest = train_loader(index, JITTER, batch_size=6, accumulation=2, epoch=2, start=6 * num_done)
        assert same(rest, whole[2 * num_done :])
        assert rest.num_steps == 4 - num_done
        assert len(rest) == 2 * (4 - num_done)
    assert list(train_loader(index, JITTER, batch_size=6, start=23)) == []
    with pytest.raises(ValueError, match=r"\bstart\b.*\[0, 23\].*\b24$"):
        train_loader(index, JITTER, batch_size=6, start=24)


def test_a_cache_changes_nothing_but_the_reads(tmp_path: Path) -> None:
    index = write_noise_shards(tmp_path, [5, 6])
    cache = ImageCache()
    plain = list(train_loader(index, JITTER, batch_size=4))
    assert same(plain, train_loader(index, JITTER, batch_size=4, cache=cache))
    assert len(cache) == 11
    for path in index.shard_paths:
        path.unlink()
    assert same(plain, train_loader(index, JITTER, batch_size=4, cache=cache))
    with pytest.raises(ValueError, match="cannot be opened"):
        list(train_loader(index, JITTER, batch_size=4))


def test_each_image_draws_from_a_stream_of_its_own_whatever_was_drawn_before_it() -> None:
    for sample_id, generator in zip([7, 2**40, 7], sample_generators([7, 2**40, 7], seed=3, epoch=5), strict=True):
        alone = np.random.Generator(np.random.Philox(key=[3, 5], counter=[0, 0, 0, sample_id]))
        assert generator.random(3).tolist() == alone.random(3).tolist()
        assert generator.integers(0, 9, 5, dtype=np.uint8).tolist() == alone.integers(0, 9, 5, dtype=np.uint8).tolist()
        assert generator.permutation(6).tolist() == alone.permutation(6).tolist()


def test_loading_leaves_the_global_random_state_alone(index: ShardIndex) -> None:
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    list(train_loader(index, JITTER, batch_size=6))
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
        list(train_loader(index, PLAIN, batch_size=4, num_workers=num_workers))
    message = str(caught.value)
    assert message.startswith(f"{path}, sample test-00000007 (label {row['label']}): crc32 is ")
    assert "verify --deep" in message
    assert "Traceback" not in message


def png() -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (4, 3), (200, 100, 50)).save(stream, "PNG")
    return stream.getvalue()


def test_an_undecodable_image_stops_the_epoch_naming_the_sample(tmp_path: Path) -> None:
    samples = [
        ShardSample(sample_key("train", i), "png", content, 0, {})
        for i, content in enumerate([png(), b"\x89PNG\r\n\x1a\n and no more"])
    ]
    write_shard(tmp_path / "train-000000.tar", samples)
    listed = ("train-000000.tar", list_shard(tmp_path / "train-000000.tar"))
    write_index(tmp_path, dataset="x", build={}, shards={"train": [listed]}, classes={"train": [("a", 1)]})
    loader = build_evaluation_loader(open_index(tmp_path, "train"), PLAIN, batch_size=2)
    with pytest.raises(ValueError, match=r"train-000000\.tar, sample train-00000001\b.*decode"):
        list(loader)


def damaged_copy(root: Path, class_sizes: list[int], ids: list[int]) -> ShardIndex:
    """Shards of noise in which the images of these ids have a changed byte."""
    index = write_noise_shards(root, class_sizes)
    for sample_id in ids:
        row = index.samples[sample_id]
        path = index.shard_paths[row["shard"]]
        content = bytearray(path.read_bytes())
        content[int(row["offset"]) + 60] ^= 1
        path.write_bytes(content)
    return index


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("world_size", [1, 2])
def test_a_skipped_image_is_replaced_by_one_of_its_class_and_no_position_shifts(
    tmp_path: Path, num_workers: int, world_size: int
) -> None:
    sound = write_noise_shards(tmp_path / "sound", [5, 6, 1])
    lone = int(np.flatnonzero(sound.labels == 2)[0])
    bad = sorted({3, 7, lone})
    index = damaged_copy(tmp_path / "damaged", [5, 6, 1], bad)
    expected = list(train_loader(sound, JITTER, batch_size=4, seed=3))
    parts = [
        list(
            train_loader(
                index,
                JITTER,
                batch_size=4,
                seed=3,
                rank=rank,
                world_size=world_size,
                num_workers=num_workers,
                skip_damaged=True,
            )
        )
        for rank in range(world_size)
    ]
    found = []
    for step, whole in enumerate(expected):
        got = [rank[step] for rank in parts]
        ids = torch.cat([batch.ids for batch in got])
        images = torch.cat([batch.images for batch in got])
        assert torch.cat([batch.labels for batch in got]).tolist() == index.labels[ids].tolist()
        for position, wanted in enumerate(whole.ids.tolist()):
            if wanted in bad:
                assert ids[position] not in bad
                assert wanted == lone or index.labels[ids[position]] == index.labels[wanted]
                # the replacement depends on seed, epoch and the damaged image alone
                alone = ShardImages(index, JITTER, seed=3, damaged="replace")._replacement(wanted, "x")[1]
                assert ids[position] == alone
            else:
                assert ids[position] == wanted
                assert torch.equal(images[position], whole.images[position])
        found += [damage for batch in got for damage in batch.damaged]
    assert sorted(damage.image for damage in found) == sorted(index.describe(wanted) for wanted in bad)
    assert all("crc32" in damage.reason for damage in found)


def test_an_evaluation_leaves_damaged_images_out_and_says_which(tmp_path: Path) -> None:
    index = damaged_copy(tmp_path, [5, 6], [2, 8, 9])
    batches = list(build_evaluation_loader(index, PLAIN, batch_size=2, skip_damaged=True))
    assert [batch.ids.tolist() for batch in batches] == [[0, 1], [3], [4, 5], [6, 7], [], [10]]
    assert [len(batch.images) for batch in batches] == [2, 1, 2, 2, 0, 1]
    named = [damage.image for batch in batches for damage in batch.damaged]
    assert named == [index.describe(sample_id) for sample_id in (2, 8, 9)]


def test_a_split_without_a_readable_image_ends_the_epoch_even_when_damage_is_skipped(tmp_path: Path) -> None:
    index = damaged_copy(tmp_path, [2, 1], [0, 1, 2])
    with pytest.raises(ValueError, match=r"\b100 others"):
        list(train_loader(index, PLAIN, batch_size=3, skip_damaged=True))


@pytest.mark.parametrize("skip_damaged", [False, True])
def test_a_shard_that_cannot_be_had_ends_the_epoch_under_any_policy(tmp_path: Path, skip_damaged: bool) -> None:
    write_noise_shards(tmp_path / "shards", [5, 6])
    log = tmp_path / "fetched"
    location = f"pipe:echo {{}} >> {log}; cat {tmp_path}/shards/{{}}"
    index = open_index(location, "test", cache_directory=tmp_path / "cache", is_typed=True)
    index = dataclasses.replace(index, remote=dataclasses.replace(index.remote, num_attempts=2, backoff_seconds=0.01))
    index.shard_paths[0].unlink(missing_ok=True)
    (tmp_path / "shards" / "test-000001.tar").unlink()
    with pytest.raises(ValueError, match=r"test-000001\.tar.*attempt 2 of 2"):
        list(train_loader(index, PLAIN, batch_size=11, skip_damaged=skip_damaged))
    assert log.read_text().split().count("test-000001.tar") == 2  # and not again for each of its images


def test_a_cached_copy_that_rots_is_fetched_again_and_a_damaged_original_is_not_blamed_on_it(tmp_path: Path) -> None:
    sound = write_noise_shards(tmp_path / "shards", [5, 6])
    location = f"pipe:cat {tmp_path}/shards/{{}}"
    index = open_index(location, "test", cache_directory=tmp_path / "cache", is_typed=True)
    expected = list(train_loader(sound, PLAIN, batch_size=4))
    assert same(expected, train_loader(index, PLAIN, batch_size=4))
    for copy in (tmp_path / "cache" / "shards").glob("*.tar"):
        copy.write_bytes(copy.read_bytes()[:600] + bytes(copy.stat().st_size - 600))
    assert same(expected, train_loader(index, PLAIN, batch_size=4))
    # Index and shard agree that this one's checksum is wrong, so another copy would not help.
    rows = index.samples.copy()
    rows["crc32"][3] += 1
    with pytest.raises(ValueError, match=r"sample test-00000003\b.*crc32"):
        ShardImages(dataclasses.replace(index, samples=rows), PLAIN).image(3)


@pytest.mark.timeout(240)
@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_a_killed_loading_process_ends_the_epoch_with_a_sentence(index: ShardIndex) -> None:
    class Deadly:
        def __call__(self, images: object, generators: object) -> torch.Tensor:
            os.kill(os.getpid(), signal.SIGKILL)
            raise AssertionError

    with pytest.raises(ValueError, match=r"data\.num_workers"):
        list(train_loader(index, Deadly(), batch_size=6, num_workers=1))


def test_class_balanced_batches_come_through_the_loader_on_any_ranks(index: ShardIndex) -> None:
    balanced = {"batch_size": 8, "images_per_class": 2, "seed": 5}
    alone = list(train_loader(index, JITTER, **balanced))
    for batch in alone:
        assert np.bincount(batch.labels, minlength=5).max() == 2
        assert len(batch.labels.unique()) == 4
    ranks = [list(train_loader(index, JITTER, **balanced, rank=rank, world_size=4)) for rank in range(4)]
    for step, expected in enumerate(alone):
        assert torch.equal(torch.cat([rank[step].images for rank in ranks]), expected.images)
    rest = train_loader(index, JITTER, **balanced, start=8)
    assert same(rest, alone[1:])


def test_the_rest_of_an_epoch_is_the_same_images_in_order_on_other_ranks_batch_sizes_and_workers(
    index: ShardIndex,
) -> None:
    """Stopped after 2 steps of 6, gone on with 4 images a step on 2 ranks, then 3 on 3 ranks with a worker."""
    whole = next(iter(train_loader(index, JITTER, batch_size=23, epoch=3, shuffle_window=2)))
    taken = [batch.images for batch in list(train_loader(index, JITTER, batch_size=6, epoch=3, shuffle_window=2))[:2]]
    for batch_size, world_size, start, num_steps in ((4, 2, 12, 1), (3, 1, 16, 99)):
        ranks = [
            list(
                train_loader(
                    index,
                    JITTER,
                    batch_size=batch_size,
                    rank=rank,
                    world_size=world_size,
                    epoch=3,
                    start=start,
                    shuffle_window=2,
                    num_workers=rank,
                )
            )[:num_steps]
            for rank in range(world_size)
        ]
        taken += [part.images for step in zip(*ranks, strict=True) for part in step]
    assert torch.equal(torch.cat(taken), whole.images)


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize("settings", [{}, {"num_copies": 3}, {"sampling_power": 0.5, "num_copies": 2}])
def test_augmented_repeated_and_long_tailed_epochs_are_the_same_on_any_ranks_and_workers_and_when_resumed(
    index: ShardIndex, settings: dict[str, Any]
) -> None:
    of_epoch = {"seed": 4, "epoch": 5, "drop_last": True, **settings}
    alone = list(train_loader(index, AUGMENT, batch_size=6, **of_epoch))
    assert len(alone) == 3
    for world_size, num_workers in ((1, 4), (2, 0), (3, 0)):
        for start in (0, 6):
            share = {"world_size": world_size, "start": start, "num_workers": num_workers}
            ranks = [
                list(train_loader(index, AUGMENT, batch_size=6, rank=rank, **share, **of_epoch))
                for rank in range(world_size)
            ]
            for parts, expected in zip(zip(*ranks, strict=True), alone[start // 6 :], strict=True):
                assert torch.equal(torch.cat([part.images for part in parts]), expected.images)
                assert torch.equal(torch.cat([part.ids for part in parts]), expected.ids)
    other_batches = list(train_loader(index, AUGMENT, batch_size=12, **of_epoch))
    assert torch.equal(other_batches[0].images, torch.cat([batch.images for batch in alone[:2]]))


def test_copies_and_later_visits_of_an_image_are_augmented_anew_and_first_visits_as_ever(index: ShardIndex) -> None:
    plain = {
        int(image): pixels
        for batch in train_loader(index, JITTER, batch_size=6, epoch=5)
        for image, pixels in zip(batch.ids, batch.images, strict=True)
    }
    for settings in ({"num_copies": 3}, {"sampling_power": 0.0}):
        visits: dict[int, list[torch.Tensor]] = {}
        for batch in train_loader(index, JITTER, batch_size=6, epoch=5, **settings):
            for image, pixels in zip(batch.ids.tolist(), batch.images, strict=True):
                visits.setdefault(image, []).append(pixels)
        assert max(map(len, visits.values())) >= 3
        for image, seen in visits.items():
            assert torch.equal(seen[0], plain[image])
            assert len(torch.stack(seen).unique(dim=0)) == len(seen)


def test_a_damaged_image_is_replaced_by_one_image_in_all_its_copies_which_are_augmented_apart(tmp_path: Path) -> None:
    sound = write_noise_shards(tmp_path / "sound", [5, 6, 1])
    bad = 3
    index = damaged_copy(tmp_path / "damaged", [5, 6, 1], [bad])
    num_replaced = 0
    for epoch in range(2):
        settings = {"batch_size": 4, "seed": 3, "epoch": epoch, "num_copies": 2}
        pairs = zip(
            train_loader(sound, AUGMENT, **settings),
            train_loader(index, AUGMENT, **settings, skip_damaged=True, num_workers=1),
            strict=True,
        )
        for expected, found in pairs:
            is_bad = expected.ids == bad
            assert torch.equal(found.images[~is_bad], expected.images[~is_bad])
            if is_bad.any():
                first, second = found.ids[is_bad].tolist()
                assert first == second != bad
                assert not torch.equal(*found.images[is_bad])
                num_replaced += 1
    assert num_replaced == 1  # the two epochs together visit every image


FRESH_PROCESS = """
import hashlib, sys
from dist_proxygml.config import AffineJitterConfig
from dist_proxygml.data.index import open_index
from dist_proxygml.data.pipeline import EpochOrder, Loading, build_train_loader
from dist_proxygml.data.transforms import build_transform

jitter = build_transform(AffineJitterConfig(name="affine_jitter", size=6, degrees=20, hue=0.3, flip=True))
index = open_index(sys.argv[1], "test")
for num_workers in map(int, sys.argv[2:]):
    digest = hashlib.sha256()
    for images_per_class in (None, 2):
        order = EpochOrder(batch_size=6, seed=7, epoch=2, images_per_class=images_per_class)
        for batch in build_train_loader(index, jitter, order, loading=Loading(num_workers)):
            digest.update(batch.ids.numpy().tobytes() + batch.images.numpy().tobytes())
    print(digest.hexdigest())
"""


@pytest.mark.timeout(240)
def test_an_epoch_is_the_same_bytes_in_any_process(index: ShardIndex) -> None:
    digests = []
    for hash_seed, nums_workers in (("0", ("0",)), ("3", ("1", "3"))):
        environment = {**os.environ, "PYTHONHASHSEED": hash_seed, "PYTHONWARNINGS": "ignore"}
        done = subprocess.run(
            [sys.executable, "-c", FRESH_PROCESS, str(index.root), *nums_workers],
            env=environment,
            capture_output=True,
            text=True,
            timeout=180,
            check=True,
        )
        digests += done.stdout.split()
    assert len(digests) == 3
    assert len(set(digests)) == 1
