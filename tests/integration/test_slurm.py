"""Jobs of the submit command really train: in this process, on this machine, and in a SLURM of several nodes.

In SLURM what takes time is SLURM: half a minute until it looks at a time limit, as long until it believes that a node
has failed, ten seconds until what went back into the queue may start again. Chosen: the runs wait for that together.
The fixture `jobs` starts them and makes something happen to each but one; the tests look at what has become of them.
All train alike, so what every one must come to is what that one comes to: the loss of every step, once, to the last
digit.
"""

import json
import re
import signal
import subprocess
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import NamedTuple

import pytest

from dist_proxygml.cluster.status import JobState, ask_job
from tests.slurm_jobs import Slurm, start_launcher, training_losses, wait_for

pytestmark = pytest.mark.ci

SUBMIT = ("launchers/submit.py", "--config", "configs/demo_cpu.json")
TWO_NODES = ("--nodes", "2", "--tasks-per-node", "1", "--cpus-per-task", "1")
SETTINGS = (
    "training.batch_size=32",
    "telemetry.log_every_steps=1",
    "telemetry.progress_bar=false",
    "evaluation.kmeans_seeds=0",
    "evaluation.at_start=false",
    "evaluation.raw_pixels=false",
    "schedule.warmup_steps=0",
)
NUM_STEPS = 60


class Job:
    """A job in SLURM's queue that trains on two nodes, and the submit command that follows it."""

    def __init__(self, slurm: Slurm, runs: Path, name: str, *options: str, every_steps: int, slow_from: int) -> None:
        """From its step `slow_from` on each start takes two seconds for a step: something can happen to it there."""
        self.slurm, self.name = slurm, name
        self.run_directory = runs / name
        faults = [f"step.begin@0:{step}:sleep=2" for step in range(slow_from, NUM_STEPS + 1)]
        settings = (f"name={name}", f"runs_dir={runs}", f"checkpoint.every_steps={every_steps}", *SETTINGS)
        self.process = slurm.launch(
            *(*SUBMIT, *TWO_NODES, "--wait", *options, "--set", f"training.max_steps={NUM_STEPS}", *settings),
            DIST_PROXYGML_FAULT=",".join(faults),
        )
        assert self.process.stdout is not None
        words = self.process.stdout.readline().split()
        assert words[:1] == ["job"], self.process.communicate()[1]
        self.id = words[1]

    @property
    def num_steps(self) -> int:
        return len(training_losses(self.run_directory))

    @property
    def log(self) -> str:
        path = self.run_directory.with_name(f"{self.name}.jobs") / f"{self.id}_0_log.out"
        return path.read_text() if path.exists() else ""

    def wait_for_steps(self, num_steps: int) -> None:
        wait_for(
            lambda: self.num_steps >= num_steps or self.process.poll() is not None,
            seconds=120,
            what=f"step {num_steps} of {self.name}: {self.log}",
        )
        assert self.process.poll() is None, f"{self.name} has ended early: {self.log}"

    def end(self) -> str:
        """What the submit command has printed when the job has come to a good end."""
        output, errors = self.process.communicate(timeout=150)
        assert self.process.returncode == 0, output + errors
        return output

    def history(self) -> list[str]:
        """How each start of the job has ended, by SLURM's accounting."""
        options = ("--noheader", "--allocations", "--parsable2", "--format=State", f"--jobs={self.id}")
        return [line.split()[0] for line in self.slurm.ask("sacct", "--duplicates", *options).splitlines()]

    def interruptions(self) -> tuple[list[int], list[int]]:
        """The steps after which the run has saved because it was told to stop, and those that it has gone on from."""
        saved = re.findall(r"^stopped by SIG.*: saved after step (\d+);", self.log, flags=re.MULTILINE)
        continued = re.findall(r"; resuming \S+/step-(\d+) ", self.log)
        return [int(step) for step in saved], [int(step) for step in continued]


class Jobs(NamedTuple):
    left_alone: Job
    limited: Job
    requeued: Job
    preempted: Job
    preempting: str
    deprived: Job
    killed: subprocess.Popen[str]
    mistaken: subprocess.Popen[str]
    runs: Path


@pytest.fixture(scope="module")
def jobs(slurm: Slurm, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Jobs]:
    """Jobs to which everything has happened; they need not have ended yet."""
    runs = tmp_path_factory.mktemp("runs")
    whole_nodes = ("--sbatch", "exclude=node3")

    def start(name: str, *options: str, every_steps: int = 1000, slow_from: int = 35) -> Job:
        return Job(slurm, runs, name, *options, every_steps=every_steps, slow_from=slow_from)

    def start_to_fail(name: str, *changes: str, fault: str = "") -> subprocess.Popen[str]:
        settings = ("--set", f"name={name}", f"runs_dir={runs}", *SETTINGS, *changes)
        return slurm.launch(*SUBMIT, *TWO_NODES, "--wait", *whole_nodes, *settings, DIST_PROXYGML_FAULT=fault)

    try:
        # 1. The one whose time is short, by itself: SLURM tells it 30 to 60 seconds after its start.
        limited = start("limited", *whole_nodes, "--time", "2")
        limited.wait_for_steps(34)
        # 2. Others, until they have come to where they are slow.
        preempted = start("preempted", *whole_nodes, "gres=slot:1")
        requeued = start("requeued", *whole_nodes, slow_from=20)
        deprived = start("deprived", "--sbatch", "nodelist=node1,node3", every_steps=10)
        requeued.wait_for_steps(19)
        for job in (preempted, deprived):
            job.wait_for_steps(34)
        # 3. What happens to them.
        slurm.control("fail", "node3")
        slurm.ask("scancel", f"--signal={signal.SIGUSR2.value}", requeued.id)
        request = ("--partition=urgent", "--nodes=2", "--gres=slot:1", "--exclude=node3", "--output=/dev/null")
        preempting = slurm.ask("sbatch", "--parsable", *request, "--wrap=hostname").strip()
        left_alone = start("left_alone", *whole_nodes, slow_from=NUM_STEPS)
        killed = start_to_fail("killed", fault="step.begin@1:9:kill9,step.begin@0:9:sleep=300")
        mistaken = start_to_fail("mistaken", "data.num_classes=500")
        # 4. One of them is put back a second time, by other means, when it has moved on; the node comes back.
        wait_for(lambda: slurm.field(requeued.id, "Restarts") == "1", seconds=60, what="the first restart")
        requeued.wait_for_steps(39)
        slurm.ask("scontrol", "requeue", requeued.id)
        wait_for(lambda: slurm.field(deprived.id, "JobState") != "RUNNING", seconds=60, what="the end of node3")
        slurm.control("start")
        yield Jobs(left_alone, limited, requeued, preempted, preempting, deprived, killed, mistaken, runs)
    finally:
        slurm.ask("scancel", "--full", "--user=root")


@pytest.mark.timeout(300)
def test_a_run_that_is_preempted_saves_once_and_continues_exactly(slurm: Slurm, jobs: Jobs) -> None:
    job = jobs.preempted
    job.end()
    assert slurm.field(jobs.preempting, "JobState") == "COMPLETED"
    assert slurm.field(jobs.preempting, "StartTime") < slurm.field(job.id, "StartTime"), "it has not made room"
    assert job.history() == ["REQUEUED", "COMPLETED"]
    saved, continued = job.interruptions()
    assert len(saved) == 1
    assert saved == continued
    check_run(job, jobs)


@pytest.mark.timeout(300)
def test_a_run_that_comes_to_its_time_limit_continues_exactly(slurm: Slurm, jobs: Jobs) -> None:
    job = jobs.limited
    job.end()
    *stops, end = job.history()
    assert end == "COMPLETED"
    assert set(stops) == {"REQUEUED"}
    saved, continued = job.interruptions()
    assert len(saved) == len(stops)
    assert saved == continued
    assert "this job is timed-out" in job.log
    check_run(job, jobs)


@pytest.mark.timeout(300)
def test_a_run_that_is_requeued_by_its_signal_and_by_scontrol_continues_exactly(slurm: Slurm, jobs: Jobs) -> None:
    job = jobs.requeued
    output = job.end()
    assert "report.html" in output  # the log of rank 0 was shown
    assert job.history() == ["REQUEUED", "REQUEUED", "COMPLETED"]
    assert job.log.count("starting anew") == 1
    assert "2 rank(s)" in job.log
    saved, continued = job.interruptions()
    assert len(continued) == 2
    assert saved == continued
    check_run(job, jobs)


@pytest.mark.timeout(300)
def test_a_run_whose_node_fails_goes_on_from_its_newest_checkpoint(slurm: Slurm, jobs: Jobs) -> None:
    job = jobs.deprived
    job.end()
    assert job.history() == ["NODE_FAIL", "COMPLETED"]
    assert job.interruptions() == ([], [30])
    check_run(job, jobs)


def check_run(job: Job, jobs: Jobs) -> None:
    """The run has done every step once, and has come to what the one comes to that was left alone."""
    if jobs.left_alone.process.returncode is None:
        jobs.left_alone.end()
    expected = training_losses(jobs.left_alone.run_directory)
    assert [step for step, _ in expected] == list(range(1, NUM_STEPS + 1))
    assert training_losses(job.run_directory) == expected
    results = [evaluation_lines(each.run_directory) for each in (job, jobs.left_alone)]
    assert len(results[0]) == 1
    assert results[0] == results[1]
    assert not job.run_directory.with_name(f"{job.name}.1").exists(), "a restart has started anew"


def evaluation_lines(run_directory: Path) -> list[str]:
    lines = (run_directory / "metrics.jsonl").read_text().splitlines()
    return [line for line in lines if json.loads(line)["kind"] == "evaluation"]


@pytest.mark.timeout(300)
def test_a_rank_that_is_killed_ends_one_that_does_not_notice_within_seconds(slurm: Slurm, jobs: Jobs) -> None:
    output, errors = jobs.killed.communicate(timeout=120)
    assert jobs.killed.returncode not in (0, 2), output + errors
    assert f"the job has failed; see {jobs.runs}/killed.jobs/" in errors
    assert len(training_losses(jobs.runs / "killed")) == 8
    job_id = output.split()[1]
    assert slurm.field(job_id, "JobState") == "FAILED"
    assert slurm.field(job_id, "Restarts") == "0"
    ended_at = datetime.fromisoformat(slurm.field(job_id, "EndTime")).timestamp()
    assert ended_at - (jobs.runs / "killed" / "metrics.jsonl").stat().st_mtime < 20


@pytest.mark.timeout(300)
def test_a_mistake_that_only_a_job_in_slurm_can_find_gives_its_message_and_status_two(jobs: Jobs) -> None:
    output, errors = jobs.mistaken.communicate(timeout=120)
    assert jobs.mistaken.returncode == 2, output + errors
    assert errors.count("error: data.num_classes is 500, but the split 'train'") == 1
    assert "Traceback" not in output + errors


@pytest.mark.timeout(240)
def test_what_can_never_start_is_reported_and_what_slurm_refuses_is_passed_on(slurm: Slurm, tmp_path: Path) -> None:
    settings = ("--set", f"runs_dir={tmp_path}", "training.batch_size=99", "data.drop_last=true")
    waiting = slurm.launch(*SUBMIT, "--nodes", "99", "--tasks-per-node", "1", *settings)
    output, errors = waiting.communicate(timeout=180)
    assert waiting.returncode == 1, output + errors
    assert "will never start: its reason is PartitionConfig" in errors
    slurm.ask("scancel", output.split()[1])
    refused = slurm.launch(*SUBMIT, "--partition", "nowhere", "--tasks-per-node", "1", *settings)
    output, errors = refused.communicate(timeout=180)
    assert refused.returncode == 2, output + errors
    assert "invalid partition specified: nowhere" in errors
    assert "Traceback" not in errors


def test_accounting_knows_how_a_job_has_ended_that_the_controller_has_forgotten(
    slurm: Slurm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def end_of(*options: str, cancel: bool = False) -> JobState | None:
        job_id = slurm.ask("sbatch", "--parsable", "--output=/dev/null", *options).strip()
        if cancel:
            slurm.ask("scancel", job_id)
        accounting = ("sacct", "--noheader", "--allocations", "--format=End", f"--jobs={job_id}")
        wait_for(lambda: slurm.ask(*accounting).strip() not in ("", "Unknown"), seconds=30, what="accounting")
        return ask_job(job_id)

    monkeypatch.setenv("SLURM_CONF", str(slurm.configuration))
    (tmp_path / "scontrol").write_text("#!/bin/sh\necho slurm_load_jobs error: Invalid job id specified >&2\nexit 1\n")
    (tmp_path / "scontrol").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    assert end_of("--wrap=exit 3") == ("FAILED", "None", 3, False)
    assert end_of("--wrap=kill -KILL $$") == ("FAILED", "None", 137, False)
    assert end_of("--wrap=true") == ("COMPLETED", "None", 0, False)
    assert end_of("--hold", "--wrap=true", cancel=True) == ("CANCELLED", "None", 0, False)
    assert ask_job("999999") is None


# ---- without SLURM ---------------------------------------------------------------------------------------------------


def short(runs: Path, *changes: str) -> tuple[str, ...]:
    return (f"runs_dir={runs}", *SETTINGS, "training.max_steps=2", *changes)


def run_here(*arguments: str) -> subprocess.CompletedProcess[str]:
    process = start_launcher(*SUBMIT, *arguments)
    output, errors = process.communicate(timeout=150)
    return subprocess.CompletedProcess(arguments, process.returncode, output, errors)


@pytest.mark.timeout(240)
def test_a_local_job_trains_on_two_ranks_and_leaves_a_log_of_each(tmp_path: Path) -> None:
    options = ("--cluster", "local", "--tasks-per-node", "2", "--cpus-per-task", "1", "--wait")
    done = run_here(*options, "--set", *short(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 rank(s) on cpu" in done.stdout
    assert len(training_losses(tmp_path / "demo_cpu")) == 2
    assert (tmp_path / "demo_cpu" / "report.html").exists()
    assert len(list((tmp_path / "demo_cpu.jobs").glob("*_log.out"))) == 2


@pytest.mark.timeout(240)
def test_a_debug_job_trains_in_the_process_that_was_called(tmp_path: Path) -> None:
    done = run_here("--cluster", "debug", "--set", *short(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 rank(s)" in done.stdout
    assert len(training_losses(tmp_path / "demo_cpu")) == 2
    assert not (tmp_path / "demo_cpu.jobs").exists()


@pytest.mark.timeout(240)
def test_a_mistake_that_only_the_job_can_find_gives_its_message_and_status_two(tmp_path: Path) -> None:
    options = ("--cluster", "local", "--tasks-per-node", "1", "--wait")
    done = run_here(*options, "--set", *short(tmp_path, "data.num_classes=500"))
    assert done.returncode == 2, done.stdout + done.stderr
    assert done.stderr.count("error: data.num_classes is 500, but the split 'train'") == 1
    assert "Traceback" not in done.stdout + done.stderr
    assert not (tmp_path / "demo_cpu").exists()
