"""What a run trains on: how long an epoch is, where a stopped run goes on, and what is refused before it starts."""

import tarfile
from pathlib import Path
from typing import Any

import pytest

from dist_proxygml.checkpoint.folder import RunState
from dist_proxygml.config import Config, parse_config
from dist_proxygml.distributed.collectives import AgreedError
from dist_proxygml.distributed.parallel import ParallelContext, run_together, single_process
from dist_proxygml.training.data import open_split, open_training_data
from dist_proxygml.training.loop import _next_step, continue_at
from dist_proxygml.training.run import _check_same_data
from dist_proxygml.training.step import build_train_state
from tests.harness import run_ranks
from tests.shards_of_noise import write_noise_shards

CLASS_SIZES = [5, 1, 7, 4, 6]  # 23 images


def configuration(shards: str | Path, *, batch_size: int = 6, **data: Any) -> Config:
    raw = {
        "name": "data",
        "data": {
            "shards": str(shards),
            "train_split": "test",  # the only one that the noise shards have
            "num_classes": len(CLASS_SIZES),
            "num_workers": 0,
            "train_transform": {"name": "random_resized_crop", "size": 8},
            "test_transform": {"name": "resize", "size": 8},
            **data,
        },
        "backbone": {"name": "small_cnn", "embedding_dim": 4, "options": {"width": 4}},
        "proxies": {"ratio": 0.5},
        "optimizer": {"name": "adam", "backbone_lr": 1e-3, "proxies_lr": 1e-2},
        "training": {"epochs": 3, "batch_size": batch_size},
    }
    return parse_config(raw, source="the test")


@pytest.mark.parametrize(
    ("batch_size", "settings", "epoch_size", "num_steps"),
    [
        (6, {}, 23, 4),
        (6, {"drop_last": True}, 23, 3),
        (11, {}, 23, 3),  # 11, 6, 6
        (6, {"images_per_class": 2}, 18, 3),
        (40, {"images_per_class": 8}, 40, 1),  # one batch, although it holds more images than there are
        (6, {"repeated_augmentation": 3}, 21, 4),  # 7 of 23 images, thrice
        (6, {"sampling_power": 0.5}, 23, 4),
        (6, {"sampling_power": 0, "repeated_augmentation": 2}, 22, 4),
    ],
)
def test_an_epoch_is_as_long_as_its_loader(
    tmp_path: Path, batch_size: int, settings: dict[str, Any], epoch_size: int, num_steps: int
) -> None:
    write_noise_shards(tmp_path, CLASS_SIZES)
    data = open_training_data(configuration(tmp_path, batch_size=batch_size, **settings))
    assert (data.epoch_size, data.count_steps()) == (epoch_size, num_steps)
    assert data.loader(single_process(), epoch=1, start=0).num_steps == num_steps
    assert data.index is not None
    assert len(data.order(1).of(data.index)) == epoch_size
    names = ("images_per_class", "sampling_power", "repeated_augmentation")
    assert ("the first epoch visits" in str(data)) == any(name in settings for name in names)


# Stopped in the third epoch of 23 images after 12 of them: steps 1 to 10 were of 6 images (6, 6, 6, 5).
@pytest.mark.parametrize(
    ("batch_size", "settings", "schedule_step", "consumed"),
    [
        (6, {}, 2 * 4 + 2, 12),
        (4, {}, 2 * 6 + 3, 12),  # 11 images are left: 3 of the epoch's 6 steps
        (23, {}, 2 * 1 + 0, 12),  # the rest is the epoch's only step
        (12, {"drop_last": True}, 2 * 1 + 1, 0),  # too few are left for a step: the fourth epoch begins
        (6, {"repeated_augmentation": 3}, 2 * 4 + 2, 12),  # 9 of 21 are left: 6 and 3
        (6, {"sampling_power": 0.5}, 2 * 4 + 2, 12),
    ],
)
def test_a_stopped_run_goes_on_at_its_image_and_its_place_in_the_schedule(
    tmp_path: Path, batch_size: int, settings: dict[str, Any], schedule_step: int, consumed: int
) -> None:
    write_noise_shards(tmp_path, CLASS_SIZES)
    config = configuration(tmp_path, batch_size=batch_size, **settings)
    data = open_training_data(config)
    assert run_ranks(continued, 1, config) == [(10, schedule_step, consumed)]
    left = data.loader(single_process(), epoch=2, start=consumed).num_steps
    assert left == 3 * data.count_steps() - schedule_step if consumed else left == data.count_steps()


# Of a stream of 23 images an epoch, stopped likewise after 12 of the third.
@pytest.mark.parametrize(
    ("batch_size", "schedule_step", "consumed"),
    [
        (6, 2 * 3 + 2, 12),
        (4, 2 * 5 + 3, 12),  # 11 images are left: 2 full steps
        (9, 2 * 2 + 1, 12),  # more than half of a third step is no step
        (12, 2 * 1 + 1, 0),  # too few are left: the fourth epoch begins
        (23, 2 * 1 + 1, 0),
    ],
)
def test_a_stopped_stream_goes_on_with_full_steps_of_any_batch_size(
    tmp_path: Path, batch_size: int, schedule_step: int, consumed: int
) -> None:
    write_noise_shards(tmp_path, CLASS_SIZES)
    stream = {"urls": f"{tmp_path}/test-000000.tar", "samples_per_epoch": 23, "shuffle_buffer": 2}
    config = configuration(tmp_path, batch_size=batch_size, mode="stream", stream=stream)
    data, context = open_training_data(config), single_process()
    assert run_ranks(continued, 1, config) == [(10, schedule_step, consumed)]
    epoch, steps_done = divmod(schedule_step, data.count_steps())
    batches = iter(data.loader(context, epoch=epoch, start=consumed))
    for _ in range(steps_done, data.count_steps()):
        assert [len(batch.labels) for batch in _next_step(data, batches, context)] == [batch_size]
    with pytest.raises(AssertionError, match="expected 1 micro-batches of a step, got 0"):
        _next_step(data, batches, context)


def continued(context: ParallelContext, config: Config) -> tuple[int, int, int]:
    data = open_training_data(config)
    state = build_train_state(config, context, steps_per_epoch=data.count_steps())
    continue_at(state, RunState(step=10, epoch=2, consumed=12, world_size=3, settings={}), data)
    return state.step, state.schedule_step, state.consumed


def test_ranks_that_see_other_shards_are_refused_on_all_of_them(tmp_path: Path) -> None:
    write_noise_shards(tmp_path / "rank-0", CLASS_SIZES)
    write_noise_shards(tmp_path / "rank-1", CLASS_SIZES, copy_of={3: 4})
    messages = run_ranks(look_at_data, 2, tmp_path)
    assert len(set(messages)) == 1
    assert "ranks 0 and 1 found different shards at" in messages[0]


def look_at_data(context: ParallelContext, folder: Path) -> str:
    config = configuration(folder / f"rank-{context.rank}")
    data, test_index = open_training_data(config), open_split(config, "test")
    try:
        _check_same_data(data, test_index, context)
    except ValueError as error:
        return str(error).replace(f"rank-{context.rank}", "rank")
    raise AssertionError


def test_a_stream_whose_shards_are_bad_on_one_rank_alone_ends_on_all_of_them(tmp_path: Path) -> None:
    index = write_noise_shards(tmp_path, CLASS_SIZES, num_shards=2)
    with tarfile.open(index.shard_paths[1], "w"):  # rank 1's
        pass
    messages = run_ranks(start_and_read, 2, tmp_path)
    assert messages[0] == messages[1]
    for message in messages[0]:
        assert "got none in a round of 1 shard(s): test-000001.tar: no samples; correct" in message
        assert message.endswith("(on rank 1)")


def start_and_read(context: ParallelContext, folder: Path) -> list[str]:
    """What the start of a run says, and what its first step would say."""
    urls = f"{folder}/test-{{000000..000001}}.tar"
    stream = {"urls": urls, "samples_per_epoch": 12, "resampled": False, "shuffle_buffer": 2}
    data = open_training_data(configuration(folder, mode="stream", stream=stream))
    messages = []
    batches = iter(data.loader(context, epoch=0, start=0))
    for read in (lambda: run_together(context, data.check, context), lambda: _next_step(data, batches, context)):
        try:
            read()
        except AgreedError as error:
            messages.append(str(error))
    return messages


def test_a_cache_that_the_shuffle_would_empty_again_and_again_is_refused(tmp_path: Path) -> None:
    index = write_noise_shards(tmp_path / "shards", CLASS_SIZES, num_shards=5)
    largest = max(shard.bytes for shard in index.shards)
    settings = {
        "cache_directory": str(tmp_path / "cache"),
        "cache_limit": f"{2 * largest} B",
    }
    location = f"pipe:cat {index.root}/{{}}"
    with pytest.raises(ValueError, match=r"data\.cache_limit.*data\.shuffle_window.* 2$"):
        open_training_data(configuration(location, **settings))
    with pytest.raises(ValueError, match=r"data\.cache_limit[^_]*$"):
        open_training_data(configuration(location, **settings, images_per_class=2))
    with pytest.raises(ValueError, match=r"data\.cache_limit[^_]*$"):
        open_training_data(configuration(location, **settings, sampling_power=0.5))
    data = open_training_data(configuration(location, **settings, shuffle_window=2))
    assert sum(len(batch.ids) for batch in data.loader(single_process(), epoch=0, start=0)) == 23
    assert len(list((tmp_path / "cache" / "shards").glob("*.tar"))) <= 2


def test_another_number_of_classes_is_refused(tmp_path: Path) -> None:
    write_noise_shards(tmp_path, CLASS_SIZES[:4])
    with pytest.raises(ValueError, match=r"data\.num_classes.*\b5\b.*'test'.*\b4\b"):
        open_training_data(configuration(tmp_path))
