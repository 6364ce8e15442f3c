"""Experiment trackers, each with its own library and no network: what it stores, and that it cannot hold up a run."""

import json
import sqlite3
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from mlflow import MlflowClient
from wandb.proto import wandb_internal_pb2

from dist_proxygml.config import load_config
from dist_proxygml.reporting import trackers as module
from dist_proxygml.reporting.telemetry import Telemetry
from dist_proxygml.reporting.trackers import Trackers, check_trackers
from dist_proxygml.training.checks import check_run

SETTINGS: dict[str, object] = {"seed": 3, "optimizer.name": "adam", "proxies.topk": None}
MANY = {f"recall@{k}": 1 / k for k in range(2, 122)}
"""More than a pipe takes in one piece."""
Points = dict[str, list[tuple[int, float]]]


def write(run: Path, name: str, steps: list[int], *, start: int, say: Callable[[str], object]) -> None:
    """What a start of a run logs; `start` marks its numbers."""
    telemetry = Telemetry(run, enabled=True, num_steps=9, start_step=0, progress_bar=False)
    telemetry.trackers = Trackers([name], run, project="birds", settings=SETTINGS, say=say)
    for step in steps:
        telemetry.log_training(step, 1, {"loss": 10.0 * start + step, "norm": float("inf")})
    telemetry.log_evaluation(steps[-1], 1, {"recall@1": 0.5 + start, **MANY})
    telemetry.log_number("proxies/dead_share", 0.25, steps[-1])
    telemetry.close()


def records(log: bytes) -> Iterator[bytes]:
    """The records of a log in LevelDB's format: blocks of 32 KiB with pieces of (checksum, length, type, bytes)."""
    at, pieces = 0, b""
    while at + 7 <= len(log):
        length, kind = int.from_bytes(log[at + 4 : at + 6], "little"), log[at + 6]
        pieces += log[at + 7 : at + 7 + length]
        if kind in (1, 4):  # whole, or the last piece
            yield pieces
            pieces = b""
        at += 7 + length
        left = 32768 - (at + 7) % 32768  # the file's own header of 7 bytes counts
        at += left if left < 7 else 0


def read_wandb(run: Path) -> tuple[str, Points, dict[str, object]]:
    points: Points = {}
    config: dict[str, object] = {}
    names = set()
    for path in sorted(run.glob("wandb/offline-run-*/*.wandb")):
        for data in records(path.read_bytes()[7:]):
            record = wandb_internal_pb2.Record.FromString(data)
            if record.HasField("run"):
                names.add((record.run.project, record.run.display_name, record.run.run_id))
                config |= {item.key: json.loads(item.value_json) for item in record.run.config.update}
            if record.HasField("history"):
                row = {(item.key or item.nested_key[0]): json.loads(item.value_json) for item in record.history.item}
                for tag in row.keys() - {"step", "_step", "_timestamp", "_runtime", "_wandb"}:
                    points.setdefault(tag, []).append((row["step"], row[tag]))
    ((project, name, run_id),) = names  # every start has the same
    assert (project, name) == ("birds", run.name)
    return run_id, points, config


def read_mlflow(run: Path) -> tuple[str, Points, dict[str, object]]:
    client = MlflowClient(tracking_uri=f"sqlite:///{run.parent / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("birds")
    (found,) = client.search_runs([experiment.experiment_id])
    assert (found.info.run_name, found.info.status) == (run.name, "FINISHED")
    points = {}
    for tag in found.data.metrics:
        history = client.get_metric_history(found.info.run_id, tag)
        points[tag.replace("_at_", "@")] = sorted((point.step, point.value) for point in history)
    return found.info.run_id, points, dict(found.data.params)


def read_trackio(run: Path) -> tuple[str, Points, dict[str, object]]:
    (path,) = (run.parent / "trackio").glob("birds.db")
    points: Points = {}
    with sqlite3.connect(path) as connection:
        rows = connection.execute("select run_name, step, metrics from metrics order by id").fetchall()
    for _, step, metrics in rows:
        for tag, value in json.loads(metrics).items():
            points.setdefault(tag, []).append((step, value))
    ((name),) = {name for name, *_ in rows}
    assert name.startswith(f"{run.name}-")
    return name, points, {}


READERS = {"wandb": read_wandb, "mlflow": read_mlflow, "trackio": read_trackio}


@pytest.fixture
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No account, no network, nothing in the home directory."""
    for name in ("WANDB_MODE", "WANDB_API_KEY", "MLFLOW_TRACKING_URI", "TRACKIO_SPACE_ID", "TRACKIO_SERVER_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    monkeypatch.setattr(module, "_SECONDS_TO_END", 120.0)


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize("name", READERS)
def test_a_run_that_continues_is_one_run_of_the_tracker_with_each_step_once(tmp_path: Path, name: str) -> None:
    run, said = tmp_path / "finches", []
    run.mkdir()
    write(run, name, [2, 4, 6], start=0, say=said.append)
    write(run, name, [4, 6, 8], start=1, say=said.append)  # its last checkpoint was at 2
    assert said == []
    run_id, points, settings = READERS[name](run)
    assert points["train/loss"] == [(2, 2), (4, 4), (6, 6), (8, 18)]
    assert points["evaluation/recall@1"] == [(6, 0.5), (8, 1.5)]
    assert {tag: points[f"evaluation/{tag}"] for tag in MANY} == {tag: [(6, v), (8, v)] for tag, v in MANY.items()}
    assert points["proxies/dead_share"] == [(6, 0.25), (8, 0.25)]
    assert "train/images_per_second" in points
    assert "train/norm" not in points  # infinite
    assert name == "trackio" or str(settings["optimizer.name"]) == "adam"
    assert json.loads((run / "trackers" / f"{name}.json").read_text())["id"] == run_id


def test_what_is_not_installed_is_refused_before_the_start_with_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    there = module.find_spec
    monkeypatch.setattr(module, "find_spec", lambda name: None if name == "wandb" else there(name))
    check_trackers(["mlflow", "trackio"])
    config = load_config("configs/demo_cpu.json", ['telemetry.trackers=["wandb"]'])
    with pytest.raises(ValueError, match=r'pip install "dist_proxygml\[wandb\]"'):
        check_run(config, world_size=1)


def test_a_tracker_of_another_name_is_refused_with_those_there_are() -> None:
    with pytest.raises(ValueError, match=r"telemetry\.trackers"):
        load_config("configs/demo_cpu.json", ['telemetry.trackers=["neptune"]'])


def stand_in(folder: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    """A shell script in the place of the trackers' Python."""
    path = folder / "python"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setattr(module.sys, "executable", str(path))


def test_a_tracker_that_fails_is_reported_once_and_the_run_continues(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in(tmp_path, monkeypatch, 'read line; echo "no route to host" >&2; exit 1')
    said: list[str] = []
    trackers = Trackers(["wandb"], tmp_path, project="p", settings={}, say=said.append)
    trackers._processes["wandb"].wait()
    for step in range(5):
        trackers.log(step, {"loss": 1.0})
    trackers.close()
    assert len(said) == 1
    assert said[0].startswith("wandb gets no more numbers: no route to host (all of it in ")


def test_a_tracker_that_hangs_costs_no_step_and_is_left_to_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in(tmp_path, monkeypatch, "exec sleep 60")  # reads nothing: its pipe fills up
    monkeypatch.setattr(module, "_SECONDS_TO_END", 0.1)
    said: list[str] = []
    trackers = Trackers(["mlflow"], tmp_path, project="p", settings={}, say=said.append)
    process = trackers._processes["mlflow"]
    try:
        for step in range(1000):
            trackers.log(step, {f"train/number {i}": 1.0 for i in range(10)})
        trackers.close()
        assert process.poll() is None
        assert "still sending" in said[0]
        dropped = int(said[1].split()[-3])
        assert 0 < dropped < 1000
    finally:
        process.kill()
        process.wait()


def test_a_tracker_that_cannot_start_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.sys, "executable", str(tmp_path / "nothing"))
    said: list[str] = []
    trackers = Trackers(["wandb"], tmp_path, project="p", settings={}, say=said.append)
    trackers.log(1, {"loss": 1.0})
    trackers.close()
    assert len(said) == 1
    assert "wandb could not start" in said[0]
