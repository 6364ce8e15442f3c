"""The record of a run that continues: each step stands there once."""

import json
from pathlib import Path

from dist_proxygml.telemetry import Telemetry


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
