"""Sweeps really train: on this machine, interrupted and called again; and as a job array of a SLURM."""

import csv
import json
import os
import re
import signal
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from tests.slurm_jobs import ROOT, Slurm, training_losses, wait_for

pytestmark = pytest.mark.ci

NUM_STEPS = 20
SETTINGS = (
    "training.batch_size=16",
    "telemetry.log_every_steps=1",
    "telemetry.progress_bar=false",
    "evaluation.kmeans_seeds=0",
    "evaluation.at_start=false",
    "evaluation.raw_pixels=false",
    "schedule.warmup_steps=0",
)


def start(runs: Path, *arguments: str, **variables: str) -> subprocess.Popen[str]:
    """Two points in a terminal's process group. One names weights that are not there, which only its start finds out,
    for they may lie where the job runs.
    """
    command = [sys.executable, "launchers/sweep.py", "--config", "configs/demo_cpu.json", "--cluster", "local"]
    command += ["--tasks-per-node", "1", "--parallel", "2", "--grid", "backbone.pretrained=nowhere.pt,null", *arguments]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.Popen(
        [*command, "--set", f"runs_dir={runs}", f"training.max_steps={NUM_STEPS}", *SETTINGS],
        cwd=ROOT,
        env={**environment, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", **variables},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def steps(run_directory: Path) -> list[int]:
    """The training steps that a run has logged."""
    return [step for step, _ in training_losses(run_directory)]


@pytest.mark.timeout(240)
def test_a_sweep_that_is_interrupted_goes_on_names_what_failed_and_trains_nothing_twice(tmp_path: Path) -> None:
    folder = tmp_path / "demo_cpu.sweep"
    trained = folder / "pretrained-null_seed-0"

    # 1. Ctrl-C, which a terminal sends to every process, lets the run save and leaves nothing running.
    slow = [f"step.begin@0:{step}:sleep=2" for step in range(4, NUM_STEPS)]
    process = start(tmp_path, DIST_PROXYGML_FAULT=",".join(slow))
    wait_for(lambda: len(steps(trained)) > 2, seconds=90, what="three steps")
    os.killpg(process.pid, signal.SIGINT)
    output, _ = process.communicate(timeout=180)
    assert process.returncode == 130, output
    assert "the same command resumes where the runs have saved" in output
    done = steps(trained)
    assert 2 < len(done) < NUM_STEPS
    assert (trained / "checkpoints" / "latest").read_text().strip() == f"step-{len(done):06d}"
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)

    # 2. The same command goes on; what failed is named and does not stop the other.
    process = start(tmp_path)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 1, output
    assert steps(trained) == list(range(1, NUM_STEPS + 1)), "every step once"
    assert "error: 1 of 2 runs have failed" in output
    failed, finished = csv.DictReader((folder / "results.csv").read_text().splitlines())
    assert (failed["status"], finished["status"]) == ("failed", "finished")
    assert "correct backbone.pretrained" in failed["reason"]
    assert "correct backbone.pretrained" in (folder / failed["log"]).read_text()
    evaluation = json.loads((trained / "evaluation" / f"step-{NUM_STEPS:06d}.json").read_text())
    assert float(finished["recall@1"]) == evaluation["metrics"]["recall@1"]
    assert f"pretrained-null_seed-0 finished: recall@1 {100 * evaluation['metrics']['recall@1']:.2f}" in output
    assert "correct backbone.pretrained" in (folder / "summary.md").read_text()
    assert "failed" in [text.text for text in ElementTree.parse(folder / "sweep.svg").iter() if text.text]

    # 3. Nothing is left to do for the one that is finished.
    process = start(tmp_path, "--dry-run")
    output, _ = process.communicate(timeout=180)
    assert output.splitlines() == [
        f"2 runs in {folder}, 1 of them to do",
        "  pretrained-nowhere.pt_seed-0: failed",
        "  pretrained-null_seed-0: finished",
    ]


@pytest.mark.timeout(240)
def test_a_job_array_is_submitted_once_and_followed_to_its_end(slurm: Slurm, tmp_path: Path) -> None:
    folder = tmp_path / "demo_cpu.sweep"
    command = ["launchers/sweep.py", "--config", "configs/demo_cpu.json", "--tasks-per-node", "1"]
    command += ["--cpus-per-task", "1", "--parallel", "2"]
    command += ["--grid", "proxies.ratio=0.05,0.1", "backbone.pretrained=null,nowhere.pt"]
    settings = ["--set", f"runs_dir={tmp_path}", "training.max_steps=2", *SETTINGS]
    options = ["--sbatch", "begin=now+3600", "exclude=node3"]

    # 1. It waits in the queue, and is not submitted again.
    process = slurm.launch(*command, *options, *settings)
    output, errors = process.communicate(timeout=180)
    assert process.returncode == 0, output + errors
    array = re.findall(r"job array (\d+) of 4 runs", output)[0]
    assert slurm.field(array, "ArrayTaskThrottle") == "2"
    process = slurm.launch(*command, *settings)
    output, errors = process.communicate(timeout=180)
    assert process.returncode == 1, output + errors
    assert "In the queue or running:" in output
    assert "job array" not in output
    queued = slurm.ask("squeue", "--noheader", "--array", "--format=%i", "--name=demo_cpu.sweep").split()
    assert sorted(queued) == [f"{array}_{number}" for number in range(4)]

    # 2. It starts; the element that fails is named and the others finish.
    slurm.ask("scontrol", "update", f"JobId={array}", "StartTime=now")
    process = slurm.launch(*command, "--wait", *settings)
    output, errors = process.communicate(timeout=180)
    assert process.returncode == 1, output + errors
    assert "error: 2 of 4 runs have failed" in errors
    rows = list(csv.DictReader((folder / "results.csv").read_text().splitlines()))
    assert [row["status"] for row in rows] == ["finished", "failed"] * 2
    assert "correct backbone.pretrained" in rows[1]["reason"]
    assert rows[1]["log"] == f"jobs/{array}_1_0_log.out"
    for row in rows[::2]:
        assert steps(folder / row["name"]) == [1, 2]
        assert json.loads((folder / row["name"] / "config.json").read_text())["proxies"]["ratio"] == float(
            row["proxies.ratio"]
        )
