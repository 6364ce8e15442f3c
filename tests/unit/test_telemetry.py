"""The record of a run that continues: each step stands there once, in metrics.jsonl and in TensorBoard."""

import json
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

from dist_proxygml.reporting.telemetry import Telemetry
from tests.trained_runs import read_board


def write(directory: Path, steps: list[int], *, start: int) -> None:
    telemetry = Telemetry(directory, enabled=True, num_steps=9, start_step=start, progress_bar=False)
    for step in steps:
        telemetry.log_training(step, 1, {"loss": 10.0 * start + step})
    telemetry.close()


def test_a_run_that_continues_takes_back_the_steps_that_it_does_again(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write(tmp_path, [1, 2, 3, 4], start=0)
    with path.open("a") as stream:
        stream.write('{"kind": "train", "step": 5, "lo')  # a kill cut it short
    write(tmp_path, [3, 4, 5], start=2)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(line["step"], line["loss"]) for line in lines] == [(1, 1), (2, 2), (3, 23), (4, 24), (5, 25)]


def test_a_counted_histogram_comes_back_with_its_edges(tmp_path: Path) -> None:
    telemetry = Telemetry(tmp_path, enabled=True, num_steps=9, start_step=0, progress_bar=False)
    telemetry.log_counts("similarity", [0, 0, 3, 0, 1, 0], [-3, -2, -1, 0, 1, 2, 3], 4)
    telemetry.log_counts("similarity", [0] * 6, [-3, -2, -1, 0, 1, 2, 3], 5)  # nothing to draw
    telemetry.log_values("norm", torch.tensor([1.0, 4.0, torch.inf, torch.nan]), 4)
    telemetry.log_values("norm", torch.tensor([torch.nan]), 5)
    telemetry.close()
    board = read_board(tmp_path)
    (event,) = board.Histograms("similarity")
    assert event.step == 4
    histogram = event.histogram_value
    assert (histogram.min, histogram.max, histogram.num) == (-1, 2, 4)
    assert (histogram.sum, histogram.sum_squares) == (3 * -0.5 + 1.5, 3 * 0.25 + 2.25)  # of the middles
    assert dict(zip(histogram.bucket_limit, histogram.bucket, strict=True)) == {-1: 0, 0: 3, 1: 0, 2: 1}
    (norm,) = board.Histograms("norm")
    assert (norm.step, norm.histogram_value.num, norm.histogram_value.max) == (4, 2, 4)


def test_what_was_logged_before_a_checkpoint_is_not_lost_with_the_process(tmp_path: Path) -> None:
    telemetry = Telemetry(tmp_path, enabled=True, num_steps=9, start_step=0, progress_bar=False)
    telemetry.log_number("share", 0.5, 1)
    telemetry.pause()
    assert [event.value for event in read_board(tmp_path).Scalars("share")] == [0.5]
    telemetry.close()


def test_an_evaluation_is_on_disk_when_it_is_logged(tmp_path: Path) -> None:
    telemetry = Telemetry(tmp_path, enabled=True, num_steps=9, start_step=0, progress_bar=False)
    telemetry.log_evaluation(4, 1, {"recall@1": 0.5}, kind="validation")
    assert [(event.step, event.value) for event in read_board(tmp_path).Scalars("validation/recall@1")] == [(4, 0.5)]
    line = {"kind": "validation", "step": 4, "epoch": 1, "recall@1": 0.5}
    assert [json.loads(text) for text in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [line]
    telemetry.close()


def write_all_kinds(directory: Path, steps: list[int], *, start: int) -> None:
    telemetry = Telemetry(directory, enabled=True, num_steps=9, start_step=start, progress_bar=False)
    if start == 0:
        settings = {"optimizer.name": "adam", "training.epochs": 3, "proxies.topk": None, "proxies.fused": False}
        telemetry.log_settings({**settings, "evaluation.recall_at": [1, 2]}, ["evaluation/recall@1", "evaluation/nmi"])
    for step in steps:
        telemetry.log_number("share", step, step)
        telemetry.log_values("norm", torch.full((3,), float(step + start)), step)
        telemetry.log_images("picture", torch.full((1, 3, 2, 2), step + start, dtype=torch.uint8), step)
    telemetry.log_evaluation(steps[-1], 1, {"recall@1": 0.25 + start, "nmi": 0.5})
    telemetry.log_end(steps[-1])
    telemetry.close()


def test_every_kind_of_point_stands_there_once_after_a_run_went_on(tmp_path: Path) -> None:
    write_all_kinds(tmp_path, [1, 2, 3, 4], start=0)
    write_all_kinds(tmp_path, [3, 4], start=2)
    board = read_board(tmp_path)
    assert [event.step for event in board.Scalars("share")] == [1, 2, 3, 4]
    norms = [(event.step, event.histogram_value.max) for event in board.Histograms("norm")]
    assert norms == [(1, 1), (2, 2), (3, 5), (4, 6)]
    assert [event.step for event in board.Images("picture")] == [1, 2, 3, 4]
    assert [(event.step, event.value) for event in board.Scalars("evaluation/recall@1")] == [(4, 2.25)]


def test_hparams_hold_the_settings_as_they_are_and_the_metrics_of_the_end(tmp_path: Path) -> None:
    write_all_kinds(tmp_path, [1], start=0)
    board = read_board(tmp_path)
    content = board.PluginTagToContent("hparams")
    assert len(content) == 3
    told = [HParamsPluginData.FromString(part) for part in content.values()]
    experiment = next(part.experiment for part in told if part.HasField("experiment"))
    start = next(part.session_start_info for part in told if part.HasField("session_start_info"))
    values = {name: getattr(value, value.WhichOneof("kind")) for name, value in start.hparams.items()}
    assert values == {
        "optimizer.name": "adam",
        "training.epochs": 3,
        "proxies.topk": "null",
        "proxies.fused": "false",
        "evaluation.recall_at": "[1, 2]",
    }
    assert {info.name for info in experiment.hparam_infos} == values.keys()
    assert [info.name.tag for info in experiment.metric_infos] == ["evaluation/recall@1", "evaluation/nmi"]
    assert any(part.HasField("session_end_info") for part in told)
    assert [np.round(event.value, 6) for event in board.Scalars("evaluation/nmi")] == [0.5]
    assert not [tag for tag in board.Tags()["scalars"] if tag.startswith("hparam")]  # each number has one curve


def test_odd_lines_stop_nobody_and_are_told_by_the_next_start_alone(tmp_path: Path) -> None:
    write(tmp_path, [1, 2], start=0)
    with (tmp_path / "metrics.jsonl").open("ab") as stream:
        stream.write(b'\xff\n{"step": 1}{"step": 2}\n{"kind": "train"}\n')
    for told in (1, 0):
        telemetry = Telemetry(tmp_path, enabled=True, num_steps=9, start_step=2, progress_bar=False)
        telemetry.close()
        assert len(telemetry.problems) == told
    assert [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [1, 2]
    assert len((tmp_path / "metrics.jsonl.odd").read_bytes().splitlines()) == 3


def test_steps_done_again_replace_the_earlier_ones_also_when_the_clock_went_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = time.time
    for start, hours in ((0, 5), (2, 3), (3, 0)):
        monkeypatch.setattr(time, "time", lambda hours=hours: clock() + 3600 * hours)
        write(tmp_path, list(range(start + 1, 6)), start=start)
    points = read_board(tmp_path).Scalars("train/loss")
    assert [(event.step, event.value) for event in points] == [(1, 1), (2, 2), (3, 23), (4, 34), (5, 35)]


def test_no_curve_is_zero_throughout_and_none_is_drawn_twice(tmp_path: Path) -> None:
    telemetry = Telemetry(tmp_path, enabled=True, num_steps=9, start_step=0, progress_bar=False)
    for step, (regularization, damaged) in enumerate([(0.0, 0), (0.0, 2), (0.5, 2)], 1):
        values = {"loss": 1.0, "classification": 1.0 - regularization, "regularization": regularization}
        rates = {"lr_backbone": 0.1, "lr_embedding": 0.1 * step}
        telemetry.log_training(step, 1, {**values, **rates, "damaged_images": damaged})
    telemetry.log_evaluation(3, 1, {"nmi": 0.0, "nmi_sd": 0.0})
    for step, share in enumerate((0.0, 0.25, 0.0), 1):
        telemetry.log_number("proxies/dead_share", share, step)
        telemetry.log_number("proxies/none", 0.0, step)
    telemetry.close()
    board = read_board(tmp_path)
    steps = {tag: [event.step for event in board.Scalars(tag)] for tag in board.Tags()["scalars"]}
    expected = {
        "train/loss": [1, 2, 3],
        "train/epoch": [1, 2, 3],
        "train/classification": [3],
        "train/regularization": [3],
        "train/damaged_images": [2, 3],
        "train/lr_backbone": [1, 2, 3],
        "train/lr_embedding": [2, 3],
        "evaluation/nmi": [3],
        "proxies/dead_share": [2, 3],
    }
    assert {tag: steps[tag] for tag in expected} == expected
    assert not {"evaluation/nmi_sd", "proxies/none"} & steps.keys()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["regularization"] for line in lines[:3]] == [0.0, 0.0, 0.5]  # the record has all


def test_the_time_of_each_phase_adds_up_over_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    for start in (0, 4):
        telemetry = Telemetry(tmp_path, enabled=True, num_steps=9, start_step=start, progress_bar=False)
        telemetry.describe_run({"ranks": 2})
        for phase, seconds in (("data", 1.0), ("evaluation", 5.0), ("data", 2.0)):
            with telemetry.phase(phase):
                now[0] += seconds
        now[0] += 10.0
        telemetry.log_phases(start)  # of the second start, what the first has plotted
        telemetry.log_phases(start + 4)
        telemetry.close()
    stored = json.loads((tmp_path / "run.json").read_text())
    assert stored == {"ranks": 2, "seconds": {"training": 20.0, "data": 6.0, "evaluation": 10.0, "checkpoint": 0.0}}
    points = [(event.step, event.value) for event in read_board(tmp_path).Scalars("time/data_seconds")]
    assert points == [(0, 3.0), (4, 3.0), (8, 6.0)]


def test_the_bar_moves_while_an_evaluation_is_followed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    telemetry = Telemetry(tmp_path, enabled=True, num_steps=9, start_step=0, progress_bar=True)
    telemetry.follow("embedding test", 3, 1200)
    telemetry.close()
    assert "embedding test 3/1,200" in capsys.readouterr().err
