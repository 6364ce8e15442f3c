"""The status of a job: its state in SLURM, its logs, the marks that its ranks leave, and following them."""

import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import submitit

# Reasons of a pending job that no waiting resolves; others of the kind end in "PerJob" or "PerJobLimit".
_HOPELESS_REASONS = {
    "AccountNotAllowed",
    "BadConstraints",
    "DependencyNeverSatisfied",
    "InvalidAccount",
    "InvalidQOS",
    "JobHeldAdmin",
    "JobHeldUser",
    "PartitionConfig",
    "PartitionNodeLimit",
    "PartitionTimeLimit",
    "QOSNotAllowed",
    "launch_failed_requeued_held",
}
_FINISHED_STATES = {
    "BOOT_FAIL",
    "CANCELLED",
    "COMPLETED",
    "DEADLINE",
    "FAILED",
    "NODE_FAIL",
    "OUT_OF_MEMORY",
    "PREEMPTED",
    "TIMEOUT",
}


class JobState(NamedTuple):
    """State of a job in SLURM."""

    name: str  # PENDING, RUNNING, COMPLETED, ...
    reason: str
    status: int  # exit status as a shell would give it
    preempted: bool = False

    @property
    def is_hopeless(self) -> bool:
        """Whether the job waits for what will never come."""
        known = self.reason in _HOPELESS_REASONS or re.search(r"PerJob(Limit)?$", self.reason) is not None
        return self.name == "PENDING" and known


def ask_job(job_id: str) -> JobState | None:
    """The state of a job by the controller, later by accounting; None once neither knows it."""
    answer = subprocess.run(
        ["scontrol", "show", "job", job_id], capture_output=True, text=True, timeout=60, check=False
    )
    if answer.returncode == 0:
        fields = dict(word.split("=", 1) for word in answer.stdout.split() if "=" in word)
        preempted = fields.get("PreemptTime", "None") not in ("None", "Unknown")
        return JobState(fields["JobState"], fields["Reason"], exit_status(fields["ExitCode"]), preempted)
    command = ["sacct", "--noheader", "--allocations", "--parsable2", "--format=State,ExitCode", f"--jobs={job_id}"]
    answer = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    if answer.returncode or not answer.stdout.strip():
        return None
    state, code = answer.stdout.split("\n")[0].split("|")
    return JobState(state.split()[0], "None", exit_status(code))


def is_preempted(job_id: str) -> bool:
    """Whether SLURM is about to take the nodes of this running job for another one."""
    state = ask_job(job_id)
    return state is not None and state.name == "RUNNING" and state.preempted


def exit_status(code: str) -> int:
    """SLURM's "status:signal" as a shell gives it: "2:0" -> 2, "0:9" -> 137."""
    status, number = (int(part) for part in code.split(":"))
    return 128 + number if number else status


def hopeless_message(job_id: str, state: JobState) -> str:
    """Message about a job that will never start, with the remedy."""
    return (
        f"job {job_id} will never start: its reason is {state.reason}. Compare --nodes, --gpus-per-node, --time and "
        f"--constraint with what `scontrol show partition` allows, then `scancel {job_id}` and submit again"
    )


def first_verdict(job_id: str) -> JobState | None:
    """The job's state as soon as it has started or SLURM has said why not; as it is after five seconds."""
    deadline = time.monotonic() + 5
    while True:
        state = ask_job(job_id)
        if state is None or state.name != "PENDING" or state.reason != "None" or time.monotonic() > deadline:
            return state
        time.sleep(0.5)


class LogReader:
    """Copies what is new in a log to stdout."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.position = 0

    def copy(self) -> None:
        """Print what has come since the last call."""
        if self.path.exists():
            with open(self.path, "rb") as log:
                log.seek(self.position)
                text = log.read()
            self.position += len(text)
            sys.stdout.write(text.decode(errors="replace"))
            sys.stdout.flush()


def log_of(folder: Path, job_id: str, rank: int) -> Path:
    """The log of one rank."""
    return Path(submitit.core.utils.JobPaths(folder, job_id, rank).stdout)


def finished_mark(folder: Path, job_id: str, rank: int) -> Path:
    """The file that a rank leaves with its status when it ends as it should."""
    return folder / f"{job_id}_{rank}_finished"


def follow_slurm(job_id: str, folder: Path, num_ranks: int) -> int:
    """Print rank 0's log and the job's states until the job has ended.

    Returns:
        0 when it has completed; 2 after a user's mistake; otherwise its exit status, at least 1.
    """
    reader = LogReader(log_of(folder, job_id, 0))
    started, before = time.monotonic(), None
    while True:
        state = ask_job(job_id)
        reader.copy()
        if state is None:
            print(f"error: SLURM knows job {job_id} no more; see {reader.path}", file=sys.stderr)
            return 1
        if state[:2] != (before[:2] if before else None):
            print(f"job {job_id}: {state.name} {'' if state.reason == 'None' else state.reason}", file=sys.stderr)
        elif state.name in _FINISHED_STATES:  # seen twice: a job whose node fails is put back into the queue
            break
        if state.is_hopeless:
            print(f"error: {hopeless_message(job_id, state)}", file=sys.stderr)
            return 1
        before = state
        time.sleep(min(15.0, 1 + (time.monotonic() - started) / 20))
    if state.name == "COMPLETED":
        return 0
    return report_mistakes(folder, job_id, num_ranks) or state.status or 1


def follow_local(job: Any, folder: Path, num_ranks: int) -> int:
    """Follow a job on this machine, as `follow_slurm` does one on SLURM."""
    reader = LogReader(log_of(folder, job.job_id, 0))
    while not job.done():
        reader.copy()
        time.sleep(0.5)
    reader.copy()
    marks = [finished_mark(folder, job.job_id, rank) for rank in range(num_ranks)]
    if all(mark.exists() for mark in marks):
        return max(int(mark.read_text(encoding="utf-8")) for mark in marks)
    return report_mistakes(folder, job.job_id, num_ranks) or 1


def report_mistakes(folder: Path, job_id: str, num_ranks: int) -> int:
    """Say which logs to read, and repeat the messages in them; 2 if there are any, else 0.

    Exit statuses alone do not show it: ranks that end because one of them has found a mistake end by a signal, whose
    number is larger.
    """
    logs = [path for rank in range(num_ranks) if (path := log_of(folder, job_id, rank)).exists()]
    messages = []
    for path in logs:
        found = re.search(
            r"^error: .*(?:\n  .*)*", path.read_text(encoding="utf-8", errors="replace"), flags=re.MULTILINE
        )
        if found:
            messages.append(f"{found[0]}\n  (in {path})")
    print("\n".join(messages) or f"the job has failed; see {folder}/{job_id}_*_log.out", file=sys.stderr)
    return 2 if messages else 0
