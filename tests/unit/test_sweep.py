"""The sweep command up to the first job, and what it makes of what jobs leave; needs no SLURM and trains nothing."""

import csv
import io
import json
import os
import re
import signal
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from dist_proxygml.backbones.from_weights import fill_from_weights
from dist_proxygml.cluster import submit, sweep
from dist_proxygml.cluster.grid import (
    Cell,
    Evaluation,
    Point,
    Result,
    Status,
    failure_in_logs,
    make_points,
    merge_problems,
    parse_grid,
    results_csv,
    short_labels,
    summarize,
    summary_csv,
    summary_markdown,
)
from dist_proxygml.cluster.job import TrainingJob
from dist_proxygml.cluster.status import JobState, finished_mark, log_of
from dist_proxygml.cluster.sweep_chart import draw_sweep
from dist_proxygml.config import Config
from dist_proxygml.sweep import _parser, main

ROOT = Path(__file__).parents[2]
CONFIG = str(ROOT / "configs" / "demo_cpu.json")
SVG = "{http://www.w3.org/2000/svg}"


# ---- the grid --------------------------------------------------------------------------------------------------------


def test_values_are_read_as_set_reads_them() -> None:
    grid = parse_grid(["a.b=1,2.5,1e-3", "c=true,null", "d=adam,sgd,3", "e=[1,2],[3]", 'f="x,y",z', "g=0.10"])
    assert grid["a.b"] == [1, 2.5, 0.001]
    assert grid["c"] == [True, None]
    assert grid["d"] == ["adam", "sgd", 3]
    assert grid["e"] == [[1, 2], [3]]
    assert grid["g"] == [0.1]


def test_everything_that_is_wrong_with_a_grid_is_told_at_once() -> None:
    with pytest.raises(ValueError, match="KEY=VALUE,VALUE") as error:
        parse_grid(["ratio", "=3", "seed=1,2", "runs_dir=a,b", "a=1,1.0,1", "b=1", "b=2"])
    told = str(error.value).splitlines()
    assert len(told) == 6
    assert "seeds are varied by --seeds" in told[2]
    assert "--out" in told[3]
    assert "a=1,1.0,1: 1 is there twice" in told[4]
    assert "names b twice" in told[5]


def test_every_combination_is_a_point_with_every_seed_in_a_fixed_order() -> None:
    points = make_points({"proxies.per_class": [1, 2], "proxies.ratio": [0.05, 0.1, 1]}, 2)
    assert [(*point.values, point.seed) for point in points[:5]] == [
        (1, 0.05, 0),
        (1, 0.05, 1),
        (1, 0.1, 0),
        (1, 0.1, 1),
        (1, 1, 0),
    ]
    assert len({point.name for point in points}) == len(points) == 12
    assert points[3].name == "per_class-1_ratio-0.1_seed-1"
    assert points[3].overrides == ("proxies.per_class=1", "proxies.ratio=0.1", "seed=1")


def test_a_name_is_a_folder_and_a_run_and_stays_when_the_grid_grows() -> None:
    values = ["timm/resnet50", "timm-resnet50", "a b", [1, [2]], None, -0.5, "x" * 90, "x" * 91, "ö"]
    points = make_points({"backbone.name": values}, 1)
    assert len({point.name for point in points}) == len(values)
    pattern = next(m.pattern for m in Config.model_fields["name"].metadata if hasattr(m, "pattern"))
    for point in points:
        assert re.fullmatch(pattern, point.name)
        assert len(point.name) < 80
    grown = make_points({"backbone.name": ["new", *values]}, 3)
    assert {point.name for point in points} < {point.name for point in grown}


def test_keys_that_end_in_the_same_word_are_told_apart() -> None:
    assert short_labels(["a.name", "b.name", "c.lr"]) == {"a.name": "a.name", "b.name": "b.name", "c.lr": "lr"}


# ---- before anything starts ------------------------------------------------------------------------------------------


def arguments_of(runs: Path, *arguments: str, seeds: int = 1) -> list[str]:
    return ["--config", CONFIG, "--seeds", str(seeds), "--set", f"runs_dir={runs}", *arguments]


def test_all_mistakes_of_all_points_are_told_at_once_and_nothing_is_started(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    runs = tmp_path / "runs"
    wrong = arguments_of(runs, "training.epochs=many", "seed=3", "--tasks-per-node", "1", "--time", "soon", seeds=0)
    wrong += ["--parallel", "0", "--grid", "proxies.ratio=0.1,2,3", "optimizer.name=adam,sgd", "proxies.rato=1"]
    assert main(wrong) == 2
    errors = capsys.readouterr().err
    assert errors.count("error: ") == 1
    assert errors.count("  training.epochs: input should be a valid integer") == 1
    assert errors.count("expected --time in minutes") == 1, "what holds for all points is told once"
    assert "did you mean 'ratio'?" in errors
    assert "proxies.ratio: input should be less than or equal to 1, got 2 (in ratio-2_name-adam" in errors
    assert "got 3 (in ratio-3_name-adam_rato-1_seed-0, ratio-3_name-sgd_rato-1_seed-0)" in errors
    assert "got 'sgd' (in ratio-0.1_name-sgd_rato-1_seed-0, " in errors
    assert "ratio-3_name-sgd_rato-1_seed-0)" in errors
    assert "--seeds of at least 1, got 0" in errors
    assert "--parallel of at least 1, got 0" in errors
    assert "seeds are varied by --seeds" in errors
    assert not runs.exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--grid", "proxies.scale=1,1.0"], "scale-1_seed-0 and scale-1.0_seed-0 are the same run"),
        (["--grid", "proxies.ratio=0.1", "--metric", "recall@3"], "expected --metric of ami, f1, map, map@r"),
        (["--grid", "training.batch_size=64,63", "--nodes", "2"], "63 does not divide over 2 ranks"),
    ],
)
def test_a_mistake_is_refused(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert main(arguments_of(tmp_path / "runs", "--tasks-per-node", "1", *arguments)) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_messages_of_points_are_merged_by_line() -> None:
    problems = {"a": "bad file:\n  x: 1\nno time", "b": "bad file:\n  x: 1\n  y: 2\nno time", "c": "no time"}
    merged = merge_problems(problems, 3)
    assert merged == "bad file:\n  x: 1 (in a, b)\n  y: 2 (in b)\nno time"
    many = merge_problems({str(number): "no" for number in range(5)}, 6)
    assert many == "no (in 0, 1, 2 and 2 more)"


def test_the_batch_script_is_an_array_with_a_limit_and_a_dry_run_writes_nothing(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    runs = tmp_path / "runs"
    options = ["--gpus-per-node", "2", "--parallel", "4", "--partition", "long", "--sbatch", "mem=64G", "--dry-run"]
    grid = ["--grid", "proxies.ratio=0.05,0.1,0.2"]
    assert main(arguments_of(runs, "name=wide", *options, *grid, seeds=3)) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"9 runs in {runs}/wide.sweep, 9 of them to do"
    assert "  ratio-0.1_seed-2: to do" in lines
    scripted = {line.removeprefix("#SBATCH ") for line in lines if line.startswith("#SBATCH")}
    assert {"--array=0-8%4", "--gpus-per-node=2", "--partition=long", "--mem=64G", "--requeue"} <= scripted
    assert f"--output={runs}/wide.sweep/jobs/%A_%a_0_log.out" in scripted
    assert not runs.exists()


def test_a_mistake_is_told_before_torch_is_there() -> None:
    program = """
import runpy, sys
sys.argv = ["launchers/sweep.py", "--config", "configs/demo_cpu.json", "--gpus-per-node", "8", "--dry-run",
            "--grid", "proxies.ratio=0.1,2"]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
except SystemExit as ending:
    assert ending.code == 2
assert not {"torch", "deepspeed", "faiss", "webdataset", "numpy"} & sys.modules.keys()
"""
    command = [sys.executable, "-c", program]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=180, check=False)
    assert done.returncode == 0, done.stderr
    assert "got 2 (in ratio-2_seed-0)" in done.stderr


@pytest.mark.parametrize("how", [["--dry-run"], [], ["--cluster", "local"]])
def test_what_the_start_of_a_point_would_refuse_is_told_once_before_any_point_starts(
    how: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    grid = ["--tasks-per-node", "1", "--grid", "data.test_split=test,train"]
    shards = f"data.shards={ROOT / 'shards' / 'demo'}"
    assert main(arguments_of(tmp_path / "runs", shards, *grid, *how, seeds=2)) == 2
    told = capsys.readouterr().err
    assert told.startswith("error: expected classes in data.test_split 'train' that are not trained")
    assert told.endswith("(in test_split-train_seed-0)\n")
    assert told.count("\n") == 1
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("options", "threads"),
    [
        (["--cluster", "local", "--tasks-per-node", "2", "--parallel", "2"], 2),
        (["--cluster", "local", "--tasks-per-node", "2", "--parallel", "9"], 1),
        (["--cluster", "local", "--tasks-per-node", "2", "--cpus-per-task", "5"], 5),
        (["--cluster", "local", "--gpus-per-node", "2", "--parallel", "2"], None),
        (["--cluster", "slurm", "--tasks-per-node", "2", "--parallel", "2"], None),
    ],
)
def test_runs_on_one_machine_share_its_cores(
    options: list[str], threads: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(8)))
    arguments = _parser().parse_args(arguments_of(tmp_path, *options))
    sweep.share_cores(arguments)
    assert sweep.build_sweep(arguments).runs[0].job.cpus_per_task == threads


# ---- what is there ---------------------------------------------------------------------------------------------------


class Folder:
    """A sweep's folder that pretends to have been worked in."""

    def __init__(self, tmp_path: Path, *arguments: str, seeds: int = 2) -> None:
        self.command = arguments_of(tmp_path, "--grid", "proxies.ratio=0.05,0.1", *arguments, seeds=seeds)
        self.command += [] if "--gpus-per-node" in arguments else ["--tasks-per-node", "1"]
        self.plan = sweep.build_sweep(_parser().parse_args(self.command))
        self.jobs = sweep.StartedJobs(self.plan)

    def run(self, name: str) -> sweep.Run:
        return next(run for run in self.plan.runs if run.point.name == name)

    def start(self, name: str, job: str, *, cluster: str = "slurm", log: str | None = None, rank: int = 0) -> Path:
        self.jobs.add(cluster, {name: job})
        folder = self.plan.jobs_folder / name if cluster == "local" else self.plan.jobs_folder
        folder.mkdir(parents=True, exist_ok=True)
        if log is not None:
            log_of(folder, job, rank).write_text(log)
        return folder

    def end(self, name: str, job: str, *, recall: float = 0.5, status: int = 0, cluster: str = "slurm") -> None:
        folder = self.start(name, job, cluster=cluster)
        run = self.run(name)
        for step, value in ((0, 0.01), (4, recall), (10, recall), (9, 0.02)):
            path = run.config.run_directory / "evaluation" / f"step-{step:06d}.json"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps({"metrics": {"recall@1": value}, "fingerprint": "f"}))
        elsewhere = run.config.run_directory / "evaluation" / "step-000011-on-other-test.json"
        elsewhere.write_text(json.dumps({"metrics": {"recall@1": 0.99}, "fingerprint": "f"}))
        (run.config.run_directory / "config.json").write_text(json.dumps(run.config.model_dump()))
        finished_mark(folder, job, 0).write_text(str(status))

    def result(self, name: str) -> Result:
        jobs = sweep.StartedJobs(self.plan)  # by what is on disk
        jobs.look()
        return jobs.result(self.run(name))


def answer(folder: Path, program: str, text: str, *, status: int = 0) -> None:
    """Put a program into `folder` that prints `text`."""
    path = folder / program
    path.write_text(f"#!/bin/sh\ncat <<'END'\n{text}\nEND\nexit {status}\n")
    path.chmod(0o755)


@pytest.fixture
def queue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Says what squeue answers from now on."""
    programs = tmp_path / "programs"
    programs.mkdir()
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")

    def say(*job_ids: str, status: int = 0) -> None:
        answer(programs, "squeue", "\n".join(job_ids), status=status)

    say()
    return say


def test_a_run_is_finished_when_its_job_ended_well_and_its_last_evaluation_counts(
    tmp_path: Path, queue: Callable[..., None]
) -> None:
    folder = Folder(tmp_path)
    assert folder.result("ratio-0.05_seed-0").status == "open"
    folder.end("ratio-0.05_seed-0", "12_0", recall=0.7)
    result = folder.result("ratio-0.05_seed-0")
    assert result.status == "finished"
    assert result.evaluation == Evaluation({"recall@1": 0.7}, "f")
    # an interrupted run has evaluations too
    finished_mark(folder.plan.jobs_folder, "12_0", 0).unlink()
    assert folder.result("ratio-0.05_seed-0").status == "failed"


def test_a_run_that_evaluates_nothing_is_finished_without_a_number(tmp_path: Path, queue: Callable[..., None]) -> None:
    folder = Folder(tmp_path, "--set", "data.test_split=null")
    folder.end("ratio-0.05_seed-0", "12_0")
    for path in (folder.run("ratio-0.05_seed-0").config.run_directory / "evaluation").iterdir():
        path.unlink()
    result = folder.result("ratio-0.05_seed-0")
    assert (result.status, result.evaluation) == ("finished", None)


def test_a_run_under_other_settings_is_not_finished_and_of_free_ones_it_is(
    tmp_path: Path, queue: Callable[..., None]
) -> None:
    Folder(tmp_path).end("ratio-0.05_seed-0", "12_0")
    free = Folder(tmp_path, "--set", "telemetry.log_every_steps=7", "checkpoint.every_steps=3")
    assert free.result("ratio-0.05_seed-0").status == "finished"
    other = Folder(tmp_path, "--set", "training.epochs=41").result("ratio-0.05_seed-0")
    assert other.status == "open"
    assert "trained under other settings" in other.reason


def test_a_number_of_classes_that_is_left_to_the_shards_is_the_one_that_they_said(
    tmp_path: Path, queue: Callable[..., None]
) -> None:
    folder = Folder(tmp_path, "--set", "data.num_classes=null")
    folder.end("ratio-0.05_seed-0", "12_0")
    stored = folder.run("ratio-0.05_seed-0").config.run_directory / "config.json"
    settings = json.loads(stored.read_text())
    settings["data"]["num_classes"] = 549  # as a run stores what its shards say
    stored.write_text(json.dumps(settings))
    assert folder.result("ratio-0.05_seed-0").status == "finished"
    other = Folder(tmp_path, "--set", "data.num_classes=548")
    assert other.result("ratio-0.05_seed-0").status == "open"


@pytest.mark.parametrize("name", ["timm/test_resnet", "torchvision/resnet18", "timm/local-dir:{}"])
def test_what_is_left_to_the_weights_is_what_they_said(name: str, tmp_path: Path, queue: Callable[..., None]) -> None:
    about = {"architecture": "test_vit", "pretrained_cfg": {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]}}
    (tmp_path / "config.json").write_text(json.dumps(about))
    backbone = json.dumps({"name": name.format(tmp_path), "embedding_dim": 8})
    images = ["data.test_transform=" + json.dumps({"name": "center_crop", "size": 32, "resize": None})]
    asked = ["--set", f"backbone={backbone}", *images]
    folder = Folder(tmp_path, *asked)
    folder.end("ratio-0.05_seed-0", "12_0")
    run = folder.run("ratio-0.05_seed-0")
    trained = fill_from_weights(run.config)  # as a run stores it
    assert trained != run.config
    (run.config.run_directory / "config.json").write_text(json.dumps(trained.model_dump()))
    assert folder.result("ratio-0.05_seed-0").status == "finished"
    other = Folder(tmp_path, *asked, "backbone.mean=[0.1,0.2,0.4]", "backbone.std=[0.4,0.5,0.6]")
    assert other.result("ratio-0.05_seed-0").status == "open"


def test_a_job_in_the_queue_is_running_whatever_its_folder_says(tmp_path: Path, queue: Callable[..., None]) -> None:
    folder = Folder(tmp_path)
    folder.start("ratio-0.05_seed-0", "12_0", log="error: of an earlier start\n")
    queue("12_1", "12_0")
    assert folder.result("ratio-0.05_seed-0").status == "running"
    queue("12_1", "112_0", "12_00")
    assert folder.result("ratio-0.05_seed-0").status == "failed"


def test_a_failed_run_names_its_reason_and_its_log(tmp_path: Path, queue: Callable[..., None]) -> None:
    folder = Folder(tmp_path)
    folder.start("ratio-0.05_seed-0", "12_0", log="Traceback:\nConnectionError: a peer has gone\n")
    folder.start("ratio-0.05_seed-0", "12_0", log="error: first\nmore\nerror: shards are\n  damaged\nend\n", rank=1)
    folder.start("ratio-0.1_seed-0", "12_10", log="error: not mine\n")
    result = folder.result("ratio-0.05_seed-0")
    assert (result.status, result.reason) == ("failed", "shards are damaged")
    assert result.log == "jobs/12_0_1_log.out"
    assert (folder.plan.folder / result.log).exists()
    folder.start("ratio-0.05_seed-1", "12_1")
    result = folder.result("ratio-0.05_seed-1")
    assert (result.status, result.reason, result.log) == ("failed", "it left no log", "jobs/12_1_0_log.out")


def test_a_run_that_was_told_to_stop_is_open_and_not_failed(tmp_path: Path, queue: Callable[..., None]) -> None:
    folder = Folder(tmp_path)
    where = folder.start("ratio-0.05_seed-0", "7", log="stopped by SIGTERM: saved after step 3\n", cluster="local")
    finished_mark(where, "7", 0).write_text("75")
    result = folder.result("ratio-0.05_seed-0")
    assert (result.status, result.reason) == ("open", "stopped by SIGTERM: saved after step 3")


def test_a_local_job_is_known_by_its_number_and_its_folder(tmp_path: Path) -> None:
    program = "import sys; print(flush=True); sys.stdin.read()"
    command = [sys.executable, "-c", program, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()  # it has become what it shall be
        assert sweep.is_local_job(str(process.pid), tmp_path)
        assert not sweep.is_local_job(str(process.pid), tmp_path / "other"), "the number was given to another program"
        assert process.stdin is not None
        process.stdin.close()
        process.wait(timeout=20)
        assert not sweep.is_local_job(str(process.pid), tmp_path)


@pytest.mark.parametrize(
    ("logs", "reason", "told_in"),
    [
        (["x\nerror: one\nerror: two\n  and more\nafter\n"], "two and more", 0),
        (["ValueError: peer\n", "error: mine\n"], "mine", 1),
        (
            ["torch.cuda.OutOfMemoryError: no memory\nlast\n", "RuntimeError: gloo\n"],
            "torch.cuda.OutOfMemoryError: no memory",
            0,
        ),
        (["", "", "srun: error: node1: task 2: Killed\n"], "srun: error: node1: task 2: Killed", 2),
        (["", ""], "it left no log", None),
    ],
)
def test_why_a_job_failed_is_read_from_the_logs_of_its_ranks(
    logs: list[str], reason: str, told_in: int | None, tmp_path: Path
) -> None:
    paths = [tmp_path / str(rank) for rank in range(len(logs))]
    for path, text in zip(paths, logs, strict=True):
        path.write_text(text)
    assert failure_in_logs([*paths, tmp_path / "missing"]) == (reason, None if told_in is None else paths[told_in])


# ---- what is started -------------------------------------------------------------------------------------------------


@pytest.fixture
def submitted(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The arrays that would have been submitted: (executor, jobs) each."""
    arrays: list[Any] = []

    def submit_to_slurm(executor: Any, *jobs: TrainingJob) -> list[str]:
        arrays.append((executor, jobs))
        return [f"{30 + len(arrays)}_{number}" for number in range(len(jobs))]

    monkeypatch.setattr(submit, "submit_to_slurm", submit_to_slurm)
    monkeypatch.setattr(sweep, "first_verdict", lambda job_id: None)
    return arrays


def test_what_is_finished_or_queued_is_not_submitted_again(
    tmp_path: Path, queue: Callable[..., None], submitted: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Folder(tmp_path, "--parallel", "2", seeds=3)
    folder.end("ratio-0.05_seed-0", "12_0")
    folder.start("ratio-0.05_seed-1", "12_1", log="error: damaged\n")
    folder.start("ratio-0.05_seed-2", "12_2")
    queue("12_2")
    assert main(folder.command) == 0
    ((executor, jobs),) = submitted
    assert [job.settings["name"] for job in jobs] == [
        "ratio-0.05_seed-1",
        "ratio-0.1_seed-0",
        "ratio-0.1_seed-1",
        "ratio-0.1_seed-2",
    ]
    assert [(job.settings["seed"], job.settings["proxies"]["ratio"]) for job in jobs[:2]] == [(1, 0.05), (0, 0.1)]
    assert {job.settings["runs_dir"] for job in jobs} == {f"{tmp_path}/demo_cpu.sweep"}
    assert executor.parameters["array_parallelism"] == 2
    queue("12_2", *(f"31_{number}" for number in range(4)))
    capsys.readouterr()
    assert main(folder.command) == 1
    assert len(submitted) == 1, "all of it is finished or queued"
    assert "In the queue or running:" in capsys.readouterr().out
    # an element that has left the queue without being finished is submitted alone
    queue("12_2", "31_0", "31_1", "31_3")
    assert main(folder.command) == 0
    assert [job.settings["name"] for job in submitted[1][1]] == ["ratio-0.1_seed-1"]


def test_what_another_call_submits_meanwhile_is_not_submitted_again(
    tmp_path: Path, queue: Callable[..., None], submitted: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Folder(tmp_path)
    check_starts, stored = sweep.check_starts, folder.plan.folder / "jobs.json"

    def slow_check(*given: Any) -> None:  # both calls have seen that nothing is started
        monkeypatch.setattr(sweep, "check_starts", check_starts)
        assert main(folder.command) == 0
        queue(*(f"31_{number}" for number in range(4)))

    monkeypatch.setattr(sweep, "check_starts", slow_check)
    assert main(folder.command) == 1
    assert len(submitted) == 1
    assert [job["job"] for job in json.loads(stored.read_text()).values()] == ["31_0", "31_1", "31_2", "31_3"]


def test_nothing_is_submitted_while_nobody_knows_the_queue(
    tmp_path: Path, queue: Callable[..., None], submitted: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Folder(tmp_path)
    folder.start("ratio-0.05_seed-0", "12_0")
    queue(status=1)
    assert main(folder.command) == 2
    assert "expected the queue from squeue" in capsys.readouterr().err
    assert not submitted


def test_waiting_ends_when_the_queue_is_empty_for_good_and_reports(
    tmp_path: Path, submitted: list[Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Folder(tmp_path, "--wait", seeds=1)
    rounds = iter([{"31_0", "31_1"}, {"31_1"}, set(), {"31_1"}, set(), set()])  # one element is requeued
    monkeypatch.setattr(sweep.time, "sleep", lambda seconds: None)
    monkeypatch.setattr(sweep, "ask_job", lambda job_id: JobState("RUNNING", "None", 0))

    def queued() -> set[str]:
        answer = next(rounds)
        if "31_0" not in answer:
            folder.end("ratio-0.05_seed-0", "31_0", recall=0.25)
        return answer

    monkeypatch.setattr(sweep.StartedJobs, "look", lambda self: setattr(self, "_queue", queued() if self._jobs else []))
    assert main(folder.command) == 1
    assert next(rounds, None) is None
    output = capsys.readouterr()
    assert "[1 finished, 1 running, 0 failed, 0 to do] ratio-0.05_seed-0 finished: recall@1 25.00" in output.out
    assert output.out.count("ratio-0.1_seed-0 failed") == 1, "between two starts it has not failed"
    assert "error: 1 of 2 runs have failed" in output.err
    assert (folder.plan.folder / "sweep.svg").exists()


@pytest.mark.parametrize("wait", [True, False])
def test_an_array_that_can_never_start_is_reported(
    wait: bool,
    tmp_path: Path,
    queue: Callable[..., None],
    submitted: list[Any],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = Folder(tmp_path, *(["--wait"] if wait else []))
    queue("31_0", "31_1", "31_2", "31_3")
    state = JobState("PENDING", "PartitionConfig", 0)
    monkeypatch.setattr(sweep, "ask_job" if wait else "first_verdict", lambda job_id: state)
    assert main(folder.command) == 1
    assert "job 31 will never start: its reason is PartitionConfig" in capsys.readouterr().err


def test_jobs_of_one_machine_get_gpus_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kept_signals: None
) -> None:
    seen = []
    monkeypatch.setattr(
        submit.submitit.LocalExecutor, "submit", lambda self, job: seen.append(self.parameters) or Ended()
    )

    class Ended:
        job_id = "999999999"

        def done(self) -> bool:
            return True

    command = [*Folder(tmp_path, "--gpus-per-node", "2").command, "--cluster", "local", "--parallel", "3"]
    assert main(command) == 1
    assert [parameters["visible_gpus"] for parameters in seen] == [[0, 1], [2, 3], [4, 5], [0, 1]]


def test_what_still_runs_here_from_an_earlier_call_is_not_started_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Folder(tmp_path, "--cluster", "local")
    folder.start("ratio-0.1_seed-1", "7", cluster="local")
    monkeypatch.setattr(sweep, "is_local_job", lambda job_id, folder: job_id == "7")
    monkeypatch.setattr(submit, "start_here", lambda *_, **__: pytest.fail("a job was started"))
    assert main(folder.command) == 2
    assert "or end them first: kill 7 (ratio-0.1_seed-1)" in capsys.readouterr().err


@pytest.fixture
def kept_signals() -> Iterator[None]:
    """Puts back what the command installs."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


def test_ctrl_c_starts_nothing_more_and_a_second_one_tells_the_jobs_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], kept_signals: None
) -> None:
    folder = Folder(tmp_path, "--cluster", "local", "--parallel", "3")
    told: list[str] = []

    class Stubborn:
        """Ends when it is told to for the second time."""

        def __init__(self, job_id: str) -> None:
            self.job_id = job_id

        def done(self) -> bool:
            return told.count(self.job_id) == 2

    started = []

    def start_here(arguments: Any, job: TrainingJob, folder: Path, *, first_gpu: int) -> Stubborn:
        assert signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, []), "a terminal's Ctrl-C would end the job"
        started.append(job.settings["name"])
        if len(started) == 2:  # of three
            signal.raise_signal(signal.SIGINT)  # blocked here, so that the job is known when it arrives
        return Stubborn(str(4_000_000_000 + len(started)))

    monkeypatch.setattr(submit, "start_here", start_here)
    monkeypatch.setattr(sweep.os, "kill", lambda process, number: told.append(str(process)))
    monkeypatch.setattr(sweep.time, "sleep", lambda seconds: signal.raise_signal(signal.SIGTERM) if told else None)
    assert main(folder.command) == 130
    assert len(started) == 2
    assert sorted(told) == ["4000000001"] * 2 + ["4000000002"] * 2
    assert "failed" not in capsys.readouterr().out.split("ending 2 runs")[1], "they were ended before they could save"
    assert folder.result("ratio-0.05_seed-0").status == "open"


# ---- tables ----------------------------------------------------------------------------------------------------------


def result_of(values: tuple[Any, ...], seed: int, status: Status = "finished", **metrics: float) -> Result:
    evaluation = Evaluation({k.replace("_at_", "@"): v for k, v in metrics.items()}, "f") if metrics else None
    return Result(Point(f"{values}-{seed}", values, seed, ()), status, evaluation)


GRID = {"proxies.ratio": [0.1, 0.2, 0.3, "x,<y>"]}
RESULTS = [
    result_of((0.1,), 0, recall_at_1=0.50, nmi=0.8, nmi_sd=0.01),
    result_of((0.1,), 1, recall_at_1=0.54, nmi=0.8, nmi_sd=0.02),
    result_of((0.1,), 2, recall_at_1=0.61, nmi=0.8, nmi_sd=0.03),
    result_of((0.2,), 0, recall_at_1=0.4, nmi=0.7, nmi_sd=0.0),
    result_of((0.2,), 1, "failed")._replace(reason="no <memory>", log="jobs/7_0_log.out"),
    result_of((0.2,), 2, "running"),
    *(result_of((0.3,), seed, "failed")._replace(reason="no negatives", log=f"jobs/{seed}.out") for seed in range(3)),
    *(result_of(("x,<y>",), seed, "open") for seed in range(3)),
]


def test_mean_and_deviation_over_seeds_are_those_worked_out_by_hand() -> None:
    first, second, third, fourth = summarize(RESULTS)
    spread = first.spreads["recall@1"]
    assert spread.mean == pytest.approx(0.55)
    assert spread.deviation == pytest.approx(((0.05**2 + 0.01**2 + 0.06**2) / 2) ** 0.5)  # n - 1
    assert first.spreads["nmi"].deviation == 0
    assert "nmi_sd" not in first.spreads, "of the k-means runs of one evaluation"
    assert (second.spreads["recall@1"].mean, second.spreads["recall@1"].deviation) == (0.4, None)
    assert (second.num_finished, second.word) == (1, "failed")
    assert (third.spreads, third.word, fourth.word) == ({}, "failed", "open")


def test_the_table_of_runs_has_every_run_and_all_of_its_numbers() -> None:
    rows = list(csv.DictReader(io.StringIO(results_csv(GRID, RESULTS))))
    assert len(rows) == len(RESULTS)
    assert (rows[1]["proxies.ratio"], rows[1]["seed"], rows[1]["recall@1"], rows[1]["nmi_sd"]) == (
        "0.1",
        "1",
        "0.54",
        "0.02",
    )
    assert (rows[4]["status"], rows[4]["recall@1"], rows[4]["reason"]) == ("failed", "", "no <memory>")
    assert (rows[4]["log"], rows[9]["proxies.ratio"], rows[9]["status"]) == ("jobs/7_0_log.out", "x,<y>", "open")


def test_the_summary_has_every_point_and_says_what_is_missing() -> None:
    rows = list(csv.DictReader(io.StringIO(summary_csv(GRID, summarize(RESULTS)))))
    assert [row["finished"] for row in rows] == ["3", "1", "0", "0"]
    assert [row["failed"] for row in rows] == ["0", "1", "3", "0"]
    assert float(rows[0]["recall@1_mean"]) == pytest.approx(0.55)
    assert (rows[1]["recall@1_sd"], rows[2]["recall@1_mean"]) == ("n/a", "")


def test_the_summary_for_people_is_in_percent_and_names_what_failed_with_the_reason() -> None:
    text = summary_markdown("demo", GRID, RESULTS)
    lines = [re.sub(" +", " ", line) for line in text.splitlines()]
    assert "| `proxies.ratio` | seeds | recall@1 | nmi |" in lines
    assert "| 0.1 | 3 | 55.00 ± 5.57 | 80.00 ± 0.00 |" in lines
    assert "| 0.2 | 1 of 3, failed | 40.00 ± n/a | 70.00 ± n/a |" in lines
    assert "| 0.3 | 0 of 3, failed | failed | failed |" in lines
    assert "- (0.2,)-1: no <memory> (`jobs/7_0_log.out`)" in lines
    assert "- (0.3,)-0, (0.3,)-1, (0.3,)-2: no negatives (`jobs/0.out`)" in lines
    assert "protocol" not in text
    other = RESULTS[0]._replace(evaluation=Evaluation({"recall@1": 0.5}, "another"))
    assert "Not all runs were evaluated by the same protocol" in summary_markdown("demo", GRID, [other, *RESULTS[1:]])


# ---- the picture -----------------------------------------------------------------------------------------------------


def texts(picture: str) -> list[str]:
    return [element.text or "" for element in ElementTree.fromstring(picture).iter(f"{SVG}text")]


def paths(picture: str, style: str) -> list[list[tuple[float, float]]]:
    """The corners of all drawn paths with some text in their style; y grows downwards."""
    drawn = ElementTree.fromstring(picture).iter(f"{SVG}path")
    found = [(path.get("d", ""), path.get("style", "")) for path in drawn]
    return [
        [(float(x), float(y)) for x, y in re.findall(r"[ML] ([-\d.]+) ([-\d.]+)", path)]
        for path, styled in found
        if style in styled
    ]


def test_one_key_is_a_curve_with_error_bars_and_the_seeds_and_no_line_over_a_gap() -> None:
    results = [*RESULTS[6:9], *RESULTS[:3], *RESULTS[3:6]]
    picture = draw_sweep("demo", {"proxies.ratio": [0.3, 0.1, 0.2]}, summarize(results), "recall@1")
    (curve,) = paths(picture, "stroke-width: 1.8")
    assert len(curve) == 2, "between the two that have numbers, which are neighbours"
    assert curve[0][1] < curve[1][1], "55 stands above 40"
    (bar,) = filter(None, paths(picture, "stroke-width: 1.4"))
    assert bar[0][0] == curve[0][0], "one error bar: the other point has one seed"
    assert picture.count("<use ") == 2 + 3 + 1 + 2  # means, seeds, the ends of the bar
    shown = texts(picture)
    assert shown[:2] == ["recall@1, percent", "demo: mean ± standard deviation of 3 seeds"]
    assert {"0.1", "0.2", "0.3", "proxies.ratio", "failed", "1 of 3, failed"} <= set(shown)
    apart = summarize([*RESULTS[:3], *RESULTS[6:9], *RESULTS[3:6]])
    gap = draw_sweep("demo", {"proxies.ratio": [0.1, 0.3, 0.2]}, apart, "recall@1")
    assert re.findall(r'd="([^"]+)"[^>]*stroke-width: 1.8', gap)
    assert not re.search(r'd="[^"]*L[^"]*"[^>]*stroke-width: 1.8', gap), "moved to both places, drawn to neither"


def grid_of(num_panels: int) -> tuple[dict[str, list[Any]], list[Cell]]:
    grid: dict[str, list[Any]] = {"a.rows": [1, 2], "b.columns": [0.1, 0.2, "a<b"]}
    grid |= {"c.other": list(range(num_panels))} if num_panels > 1 else {}
    points = make_points(grid, 1)
    results = [
        Result(point, "finished", Evaluation({"recall@1": 0.5 + 0.01 * number}, "f"))
        for number, point in enumerate(points)
    ]
    results[1] = Result(points[1], "failed")
    return grid, summarize(results)


def test_two_keys_are_a_heat_map_with_its_numbers_where_they_belong() -> None:
    grid, cells = grid_of(1)
    picture = draw_sweep("demo", grid, cells, "recall@1")
    inside = {element.text: element.attrib for element in ElementTree.fromstring(picture).iter(f"{SVG}text")}

    def place(text: str) -> tuple[float, float]:
        return float(inside[text]["x"]), float(inside[text]["y"])

    # The scale beside it has narrower boxes of these colours.
    least, most = (
        max(paths(picture, f"fill: {colour}"), key=lambda box: max(box)[0] - min(box)[0])
        for colour in ("#e9f1fb", "#104287")
    )
    for text, box in (("50.00", least), ("55.00", most)):
        x, y = place(text)
        assert min(box)[0] < x < max(box)[0]
        assert min(y for _, y in box) < y < max(y for _, y in box)
    assert place("0.1")[0] < place("0.2")[0] < place("a<b")[0] == place("55.00")[0]
    assert place("1")[1] < place("2")[1]
    assert "fill: #ffffff" in inside["55.00"]["style"]
    assert place("0.2")[0] == place("failed")[0]
    assert {"a<b", "a.rows", "b.columns", "55.0", "50.0"} <= inside.keys()


def test_its_words_follow_the_light_and_dark_of_whoever_looks_and_are_text_whatever_they_say() -> None:
    grid, _ = grid_of(1)
    grid["b.columns"] = ["</text><script>", "$x$ & $y$", "漢"]
    points = make_points(grid, 1)
    cells = summarize([Result(point, "finished", Evaluation({"recall@1": 0.5}, "f")) for point in points])
    picture = draw_sweep("<sweep> $a$ $b$", grid, cells, "recall@1")
    assert {*grid["b.columns"], "<sweep> $a$ $b$: one seed"} <= set(texts(picture))
    assert "currentColor" in picture
    assert "prefers-color-scheme: dark" in picture
    assert draw_sweep("<sweep> $a$ $b$", grid, cells, "recall@1") == picture


def test_more_keys_are_a_heat_map_for_each_of_their_values() -> None:
    grid, cells = grid_of(4)
    shown = texts(draw_sweep("demo", grid, cells, "recall@1"))
    assert [text for text in shown if text.startswith("c.other")] == [f"c.other {number}" for number in range(4)]
    assert shown.count("a<b") == 4
    numbers = [text for text in shown if re.fullmatch(r"\d\d\.\d\d", text)]
    assert sorted(numbers) == [f"{50 + number}.00" for number in range(24) if number != 1]


def test_no_key_at_all_is_a_point_and_a_metric_nobody_has_is_no_number() -> None:
    cells = summarize([result_of((), seed, recall_at_1=0.5 + 0.01 * seed) for seed in range(2)])
    assert draw_sweep("demo", {}, cells, "recall@1").count("<use ") == 3 + 2  # and the ends of the bar
    grid, cells = grid_of(1)
    assert "nan" not in draw_sweep("demo", grid, cells, "map@r")
