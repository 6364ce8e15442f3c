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
        telemetry.log_settings({**settings, "evaluation.recall_at": [1, 2]}, ["recall@1", "nmi"])
    for step in steps:
        telemetry.log_number("share", step, step)
        telemetry.log_values("norm", torch.full((3,), float(step + start)), step)
        telemetry.log_images("picture", torch.full((1, 3, 2, 2), step + start, dtype=torch.uint8), step)
    telemetry.log_results(steps[-1], {"recall@1": 0.25 + start, "nmi": 0.5})
    telemetry.close()


def test_every_kind_of_point_stands_there_once_after_a_run_went_on(tmp_path: Path) -> None:
    write_all_kinds(tmp_path, [1, 2, 3, 4], start=0)
    write_all_kinds(tmp_path, [3, 4], start=2)
    board = read_board(tmp_path)
    assert [event.step for event in board.Scalars("share")] == [1, 2, 3, 4]
    norms = [(event.step, event.histogram_value.max) for event in board.Histograms("norm")]
    assert norms == [(1, 1), (2, 2), (3, 5), (4, 6)]
    assert [event.step for event in board.Images("picture")] == [1, 2, 3, 4]
    assert [(event.step, event.value) for event in board.Scalars("hparam/recall@1")] == [(4, 2.25)]


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
    assert [info.name.tag for info in experiment.metric_infos] == ["hparam/recall@1", "hparam/nmi"]
    assert any(part.HasField("session_end_info") for part in told)
    assert [np.round(event.value, 6) for event in board.Scalars("hparam/nmi")] == [0.5]


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
