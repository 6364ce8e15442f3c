"""Trackers of a whole run on two ranks: rank 0 alone has them, they get what TensorBoard gets, and end with the run."""

import json
import stat
from pathlib import Path
from typing import Any

import pytest

from dist_proxygml.distributed.parallel import ParallelContext
from dist_proxygml.reporting import trackers
from dist_proxygml.training.run import train
from tests.harness import run_ranks
from tests.shards_of_noise import write_noise_shards
from tests.trained_runs import configuration, read_board

CLASS_SIZES = [5, 4, 6]  # 15 images: three steps an epoch


def train_twice(context: ParallelContext, root: Path) -> None:
    """Train one epoch, and then another, with a program in the place of the trackers' Python that writes what it gets
    into a file of its own.
    """
    recorder = root / f"recorder-{context.rank}"
    recorder.write_text(
        f'#!/bin/sh\nwhile read -r line; do echo "$line"; [ "$line" = \'{{}}\' ] && exit; done > {root}/$$-of-$3\n'
    )
    recorder.chmod(recorder.stat().st_mode | stat.S_IXUSR)
    transform = {"name": "resize", "size": 8}
    data = {"shards": str(root / "noise"), "train_split": "test", "num_classes": 3, "num_workers": 0}
    sections: dict[str, Any] = {
        "data": data | {"train_transform": transform, "test_transform": transform},
        "proxies": {"per_class": 2, "topk": 4},
        "evaluation": {"kmeans_seeds": 0, "recall_at": [1], "allow_seen_classes": True},
        "telemetry": {
            "progress_bar": False,
            "log_every_steps": 1,
            "projector": False,
            "trackers": ["wandb", "trackio"],
            "tracker_project": "birds",
        },
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trackers.sys, "executable", str(recorder))
        for epochs in (1, 2):
            training = {"epochs": epochs, "batch_size": 6}
            train(
                configuration(
                    "tracked", root / "runs", 3, training=training, schedule={"name": "constant"}, **sections
                ),
                context,
            )


@pytest.mark.timeout(240)
def test_rank_0_sends_what_tensorboard_shows_at_each_start(tmp_path: Path) -> None:
    write_noise_shards(tmp_path / "noise", CLASS_SIZES)
    run_ranks(train_twice, 2, tmp_path, timeout=180)
    board = read_board(tmp_path / "runs" / "tracked")
    tags = {tag for tag in board.Tags()["scalars"] if not tag.startswith("hparam/")}
    shown = {(tag, event.step): event.value for tag in tags for event in board.Scalars(tag)}
    for name in ("wandb", "trackio"):
        files = sorted(tmp_path.glob(f"*-of-{name}"), key=lambda path: path.stat().st_mtime_ns)
        assert len(files) == 2  # one for each start
        sent: dict[tuple[str, int], float] = {}
        for path in files:
            first, *lines, last = (json.loads(line) for line in path.read_text().splitlines())
            assert (first["project"], first["settings"]["name"], last) == ("birds", "tracked", {})
            sent |= {(tag, line["step"]): value for line in lines for tag, value in line["numbers"].items()}
        assert sent.keys() == shown.keys()
        assert sent == pytest.approx(shown)
        assert {step for tag, step in sent if tag == "train/loss"} == {1, 2, 3, 4, 5, 6}
