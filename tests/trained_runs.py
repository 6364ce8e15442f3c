"""Folders of runs with one checkpoint, of a tiny backbone and of classes with given names; nothing is trained."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dist_proxygml.backbones.build import build_backbone
from dist_proxygml.checkpoint.folder import Retention, RunState, write_checkpoint_manifest
from dist_proxygml.checkpoint.model import BACKBONE_FILE, write_class_table
from dist_proxygml.checkpoint.writer import save_checkpoint
from dist_proxygml.config import Config, flattened, parse_config
from dist_proxygml.data.index import ClassEntry, ShardIndex, class_table_name, class_table_sha256
from dist_proxygml.distributed.parallel import ParallelContext, run_on_rank_zero
from dist_proxygml.storage.folder import files_below, hash_files
from dist_proxygml.storage.run_folder import step_name
from dist_proxygml.training.step import build_train_state

STEP = 30


def configuration(name: str, runs_dir: Path, num_classes: int, **changes: Any) -> Config:
    """A run of `small_cnn` with D 4; `changes` are whole sections."""
    raw = {
        "name": name,
        "runs_dir": str(runs_dir),
        "data": {
            "shards": "unused",
            "num_classes": num_classes,
            "train_transform": {"name": "resize", "size": 16},
            "test_transform": {"name": "resize", "size": 16},
        },
        "backbone": {"name": "small_cnn", "embedding_dim": 4, "options": {"width": 4}},
        "proxies": {"per_class": 2, "topk": 2 * num_classes},
        "optimizer": {"backbone_lr": 1e-3, "proxies_lr": 1e-2},
        "training": {"epochs": 1, "batch_size": 6},
    }
    return parse_config(raw | changes, source="the test")


def write_class_names(folder: Path, classes: Sequence[tuple[str, int | str]]) -> None:
    """The class table of shards whose index is not needed; (name, source id) of each class."""
    folder.mkdir(parents=True)
    lines = [json.dumps([name, source_id, 5]) + "\n" for name, source_id in classes]
    (folder / class_table_name("train")).write_text("".join(lines))


def read_class_names(folder: Path) -> ShardIndex:
    """An index of what `write_class_names` wrote, without samples."""
    lines = (folder / class_table_name("train")).read_text().splitlines()
    classes = [ClassEntry(label, *json.loads(line)) for label, line in enumerate(lines)]
    return ShardIndex(
        folder,
        "train",
        "names",
        num_classes=len(classes),
        shards=(),
        class_table_sha256=class_table_sha256(classes),
        sha256=f"of {folder.name}",
        samples=np.zeros(0),
    )


def write_run(context: ParallelContext, config: Config, shards: Path | None) -> dict[str, np.ndarray]:
    """Write the folder of a run with the checkpoint of its first moment, as training on `shards` (None: on a stream)
    would leave it. Called on all ranks.

    Returns:
        This rank's proxies, and the backbone's weights by name.
    """
    state = build_train_state(config, context, steps_per_epoch=1)
    index = None if shards is None else read_class_names(shards)
    settings: dict[str, Any] = {"seed": config.seed} | dict(flattened(config.model_dump(mode="json")))
    if index is not None:
        settings |= {"class table": index.class_table_sha256, "shards": index.sha256}

    def prepare() -> None:
        config.run_directory.mkdir(parents=True)
        (config.run_directory / "config.json").write_text(json.dumps(config.model_dump()))
        write_class_table(config.run_directory, index)

    run_on_rank_zero(context, prepare)
    save_checkpoint(
        config.run_directory / "checkpoints",
        state=RunState(STEP, 0, 0, context.world_size, settings),
        engine=state.engine,
        loss=state.loss,
        bank_optimizer=state.bank_optimizer,
        context=context,
        retention=Retention(keep_last=1),
    )
    weights = {  # numpy has no bfloat16
        name: (value.float() if value.dtype == torch.bfloat16 else value).numpy()
        for name, value in state.engine.full_state_dict().items()
    }
    return weights | {"proxies": state.loss.proxies.detach().numpy()}


def write_finished_run(runs_dir: Path, name: str = "small", *, seed: int = 0, **changes: Any) -> Path:
    """The folder of a run whose checkpoint holds a backbone with the random weights of a seed, and nothing that only
    training reads; without DeepSpeed, in no time.
    """
    config = configuration(name, runs_dir, 3, **changes)
    checkpoint = config.run_directory / "checkpoints" / step_name(STEP)
    checkpoint.mkdir(parents=True)
    (config.run_directory / "config.json").write_text(json.dumps(config.model_dump()))
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        save_file(build_backbone(config.backbone).state_dict(), checkpoint / BACKBONE_FILE)
    settings = dict(flattened(config.model_dump(mode="json"))) | {"seed": seed}
    state = RunState(STEP, 0, 0, 1, settings)
    (checkpoint / "state.json").write_text(json.dumps(asdict(state)))
    names = files_below(checkpoint)
    write_checkpoint_manifest(checkpoint, state, hash_files(checkpoint, names, num_threads=1))
    return config.run_directory


def read_board(directory: Path) -> EventAccumulator:
    """Everything that TensorBoard reads of the run."""
    everything = {"scalars": 0, "histograms": 0, "images": 0, "tensors": 0}
    return EventAccumulator(str(directory / "tensorboard"), size_guidance=everything).Reload()
