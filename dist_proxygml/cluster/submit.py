"""Submit a training run: `python launchers/submit.py --config configs/sop_8gpu.json --nodes 2 --gpus-per-node 8`.

A thin shell around submitit: one task per GPU (or per CPU rank, --tasks-per-node), each of which finds its peers by
what SLURM tells it and then does what launchers/train.py does. What the user may have got wrong is refused here, before
anything waits in a queue; the settings travel with the job as they were validated, so a configuration edited meanwhile
changes nothing. Before the time limit and at preemption all ranks stop between two steps and save, then the job puts
itself back into the queue and continues there.

--cluster local starts the same tasks on this machine, --cluster debug one rank in this process. torch is imported
when the settings alone are right, so that a login node answers mistakes at once, and what else a start would refuse in
seconds. docs/slurm.md says what to expect of each.
"""

import argparse
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import submitit

from dist_proxygml.cli import refuse, run_command
from dist_proxygml.config import Config, load_config, parse_config
from dist_proxygml.distributed.slurm import rendezvous_port
from dist_proxygml.storage.run_folder import RunFolder

EXAMPLES = """examples:
  python launchers/submit.py --config configs/sop_8gpu.json --gpus-per-node 8 --partition gpu --time 12:00:00
  python launchers/submit.py --config configs/sop_8gpu.json --nodes 2 --gpus-per-node 4 --dry-run
  python launchers/submit.py --config configs/demo_cpu.json --nodes 2 --tasks-per-node 1 --cpus-per-task 8 --wait
  python launchers/submit.py --config configs/demo_cpu.json --cluster local --tasks-per-node 2 --wait
"""

# Most seconds between the signal that announces the end of the time limit and the end itself.
_SIGNAL_DELAY = 120
# How often the time limit may be reached. What stops a job that gets nowhere is _MAX_FRUITLESS.
_MAX_TIME_LIMITS = 1000
# Restarts without a newer checkpoint, after which a job does not requeue itself again.
_MAX_FRUITLESS = 3
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
# Options of sbatch that are decided here, and what to use instead where the user has a say.
_RANKS = "--gpus-per-node or --tasks-per-node"
_OWNED_OPTIONS = {
    **{name: f"--{name}" for name in ("nodes", "time", "partition", "constraint", "gpus-per-node", "cpus-per-task")},
    **dict.fromkeys(("ntasks", "ntasks-per-node", "ntasks-per-gpu", "gpus", "gpus-per-task"), _RANKS),
    **dict.fromkeys(("array", "error", "no-requeue", "open-mode", "output", "requeue", "signal", "wrap"), ""),
    **{"job-name": "--set name=", "wait": "--wait"},
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


# ---- in the job ------------------------------------------------------------------------------------------------------


class TrainingJob:
    """What every task of a job does. submitit pickles it, and calls it again when the job starts again."""

    def __init__(
        self, config: Config, *, source: str, resume: str, uses_gpus: bool, cpus_per_task: int | None, grace: float
    ) -> None:
        self.settings = config.model_dump(mode="json")
        self.source = source
        self.resume = resume
        self.uses_gpus = uses_gpus
        self.cpus_per_task = cpus_per_task
        self.grace = grace
        self.submitted_at = time.time()
        self.newest_checkpoint: Path | None = None
        self.num_fruitless = 0

    def __call__(self) -> NoReturn:
        """Run one task and end its process, with the statuses of launchers/train.py."""
        task = submitit.JobEnvironment()
        requeue = signal.getsignal(getattr(signal, f"SIG{task.USR_SIG}"))
        # Until the libraries are there nothing can be lost by ending, and submitit's own handler, which needs them to
        # requeue the job, cannot do its work: signals that ask for that are kept.
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        early: list[int] = []
        for number in (signal.SIGUSR1, signal.SIGUSR2):
            signal.signal(number, lambda received, frame: early.append(received))
        restarts = int(os.environ.get("SLURM_RESTART_COUNT", "0"))
        os.environ.update(
            RANK=str(task.global_rank),
            WORLD_SIZE=str(task.num_tasks),
            LOCAL_RANK=str(task.local_rank),
            LOCAL_WORLD_SIZE=str(task.num_tasks // task.num_nodes),
            MASTER_ADDR=task.hostnames[0] if task.num_nodes > 1 else "127.0.0.1",
            MASTER_PORT=str(rendezvous_port(int(task.raw_job_id), restarts)),
        )
        if not self.uses_gpus:
            os.environ["CUDA_VISIBLE_DEVICES"] = ""  # a node may show GPUs to a job that asked for none
            if self.cpus_per_task:
                os.environ["OMP_NUM_THREADS"] = str(self.cpus_per_task)
        self.run(Requeue(task, requeue, grace=self.grace), early)

    def run(self, requeue: "Requeue | None" = None, early: Sequence[int] = ()) -> NoReturn:
        """Train in this process, whose rank stands in the environment, and end it. `early` came before it listened."""
        from dist_proxygml.distributed.parallel import join_world, run_launcher
        from dist_proxygml.distributed.preemption import StopRequested, StopSignals

        def main() -> None:
            config = parse_config(self.settings, source=self.source)
            resume = "auto" if self.has_started(config) else self.resume
            signals = StopSignals(grace=requeue.grace, on_grace_over=requeue.give_up) if requeue else StopSignals()
            signals.listen()
            for number in early:
                os.kill(os.getpid(), number)
            context = join_world(start_timeout=config.training.start_timeout)
            from dist_proxygml.training.run import train

            try:
                train(config, context, resume=resume, signals=signals)
            except StopRequested as stop:
                if requeue:
                    requeue.after(set(stop.signals.values()))
                raise
            if requeue:
                requeue.leave_mark(0)

        run_launcher(main)

    def has_started(self, config: Config) -> bool:
        """Whether the run has a checkpoint of this job: then a restart continues there, whatever --resume said."""
        from dist_proxygml.checkpoint.writer import MANIFEST_FILE, published_checkpoints

        found = published_checkpoints(RunFolder(config.run_directory).checkpoints)
        return any((path / MANIFEST_FILE).stat().st_mtime > self.submitted_at for path in found)

    def checkpoint(self) -> submitit.helpers.DelayedSubmission | None:
        """The job to put into the queue again, or None to give up. Called by submitit's handler, on rank 0."""
        from dist_proxygml.checkpoint.writer import published_checkpoints

        config = parse_config(self.settings, source=self.source)
        found = published_checkpoints(RunFolder(config.run_directory).checkpoints)
        newest = found[-1] if found else None
        self.num_fruitless = self.num_fruitless + 1 if newest == self.newest_checkpoint else 0
        self.newest_checkpoint = newest
        if self.num_fruitless >= _MAX_FRUITLESS:
            message = f"error: {self.num_fruitless} restarts without a newer checkpoint; lower checkpoint.every_steps\n"
            os.write(2, message.encode())
            return None
        return submitit.helpers.DelayedSubmission(self)


class Requeue:
    """Puts a job back into the queue when its ranks have stopped, by the handler that submitit has for its signal.

    That handler would do so in the middle of a step; here it is called when everything is saved. On rank 0 it ends the
    job; the other ranks end by themselves, with status 0, since a failure would end rank 0 before it is done.
    """

    def __init__(self, task: Any, handler: Any, *, grace: float) -> None:
        self.grace = grace
        self._task, self._handler = task, handler

    def after(self, received: set[signal.Signals]) -> None:
        """Requeue the job if the signals that its ranks have received ask for it; returns if they do not.

        SIGTERM alone is what scancel and a peer's failure send: then the job must not come back. But it is also all
        that a preempted job gets where SLURM does not send the job's own signal.
        """
        if received == {signal.SIGTERM} and not (self._task.cluster == "slurm" and is_preempted(self._task.job_id)):
            self.leave_mark(75)
            return
        self._requeue()

    def give_up(self) -> None:
        """The time that SLURM gives is nearly over and the ranks have not stopped, because one of them hangs."""
        os.write(2, b"not stopped in time: nothing is saved, the job goes on from its newest checkpoint\n")
        self._requeue()

    def leave_mark(self, status: int) -> None:
        """Note how this rank has ended: submitit does not keep it, and SLURM forgets it."""
        path = finished_mark(self._task.paths.folder, self._task.job_id, self._task.global_rank)
        path.write_text(str(status), encoding="utf-8")

    def _requeue(self) -> NoReturn:
        status = 0
        if self._task.global_rank == 0:
            try:
                self._handler(getattr(signal, f"SIG{self._task.USR_SIG}"), None)
            except SystemExit as ending:
                status = ending.code & 0xFF if isinstance(ending.code, int) else 1
            except submitit.core.utils.UncompletedJobError as error:
                os.write(2, f"error: {error}\n".encode())
                status = 75
                self.leave_mark(status)
        sys.stdout.flush()
        os._exit(status)  # the interpreter's own end could still abort in a thread of gloo's


def is_preempted(job_id: str) -> bool:
    """Whether SLURM is about to take the nodes of this running job for another one."""
    state = ask_job(job_id)
    return state is not None and state.name == "RUNNING" and state.preempted


# ---- before the job --------------------------------------------------------------------------------------------------


def build_job(arguments: argparse.Namespace) -> TrainingJob:
    """The job that the command line describes.

    Raises:
        ValueError: with everything that is wrong: settings, ranks against batch, options against each other.
    """
    problems = []
    config = None
    try:
        config = load_config(arguments.config, arguments.set)
    except ValueError as error:
        problems.append(str(error))
    positive = {"nodes": arguments.nodes, "cpus-per-task": arguments.cpus_per_task}
    positive |= {"gpus-per-node": arguments.gpus_per_node, "tasks-per-node": arguments.tasks_per_node}
    wrong = {name: number for name, number in positive.items() if number is not None and number < 1}
    problems += [f"expected --{name} of at least 1, got {number}" for name, number in wrong.items()]
    ranks_per_node = arguments.gpus_per_node or arguments.tasks_per_node
    if arguments.cluster == "debug":
        if arguments.nodes > 1 or (ranks_per_node or 1) > 1:
            problems.append("--cluster debug is one rank in this process; use --cluster local for several")
        ranks_per_node = 1
    elif arguments.cluster == "local" and arguments.nodes > 1:
        problems.append(f"--cluster local is this machine alone, got --nodes {arguments.nodes}")
    if arguments.gpus_per_node and arguments.tasks_per_node:
        problems.append("expected --gpus-per-node (a rank per GPU) or --tasks-per-node (ranks on CPUs), got both")
    elif not ranks_per_node and not wrong:
        problems.append("expected --gpus-per-node (a rank per GPU) or --tasks-per-node (ranks on CPUs), got neither")
    elif config and not wrong and ranks_per_node:
        try:
            config.micro_batch_size(arguments.nodes * ranks_per_node)
        except ValueError as error:
            problems.append(str(error))
    if arguments.resume not in ("auto", "never") and not Path(arguments.resume).exists():
        problems.append(f"expected --resume auto, never or a checkpoint, found nothing at {arguments.resume}")
    if arguments.dry_run and arguments.cluster != "slurm":
        problems.append("--dry-run prints a batch script, which only --cluster slurm has; remove one of them")
    for check, given in ((sbatch_options, arguments.sbatch), (parse_minutes, arguments.time)):
        try:
            check(given)
        except ValueError as error:
            problems.append(str(error))
    if problems or config is None:
        raise ValueError("\n".join(problems))
    return TrainingJob(
        config,
        source=arguments.config,
        resume=arguments.resume,
        uses_gpus=arguments.gpus_per_node is not None or arguments.cluster == "debug",
        cpus_per_task=arguments.cpus_per_task,
        grace=grace_of(signal_delay(parse_minutes(arguments.time))),
    )


def sbatch_options(given: Sequence[str]) -> dict[str, str | bool]:
    """Options of --sbatch as submitit takes them: "mem=64G" -> {"mem": "64G"}, "exclusive" -> {"exclusive": True}.

    Raises:
        ValueError: with all that are no options, or are decided here.
    """
    options: dict[str, str | bool] = {}
    problems = []
    for text in given:
        name, separator, value = text.partition("=")
        name = name.removeprefix("--").replace("_", "-")
        if re.fullmatch(r"[a-z][a-z0-9-]+", name) is None or (separator and not value):
            problems.append(f"--sbatch expects NAME=VALUE such as mem=64G, or NAME such as exclusive, got {text!r}")
        elif name in _OWNED_OPTIONS:
            instead = _OWNED_OPTIONS[name]
            problems.append(
                f"expected --sbatch without {name}, which is decided here, got {text!r}; "
                + (f"use {instead}" if instead else "remove it")
            )
        else:
            options[name] = value if separator else True
    if problems:
        raise ValueError("\n".join(problems))
    return options


def signal_delay(minutes: int) -> int:
    """Seconds between the signal that announces the end of a time limit and the end itself."""
    return min(_SIGNAL_DELAY, 30 * minutes)


def grace_of(delay: int) -> float:
    """Seconds of that delay that stopping may take; the rest is for putting the job back into the queue."""
    return max(delay - 20, delay / 2)


def parse_minutes(limit: str) -> int:
    """A time limit as SLURM writes it, in whole minutes: "90", "MM:SS", "HH:MM:SS", "D-HH", "D-HH:MM", "D-HH:MM:SS".

    Raises:
        ValueError: no such time, or none at all.
    """
    if re.fullmatch(r"(\d+-)?\d+(:\d+){0,2}", limit) is None:
        raise ValueError(f"expected --time in minutes, HH:MM:SS or D-HH:MM:SS, got {limit!r}")
    days, _, clock = limit.rpartition("-")
    numbers = [int(number) for number in clock.split(":")]
    if days:  # hours come first, whatever is left out
        hours, minutes, seconds = (*numbers, 0, 0)[:3]
    else:  # one or two numbers begin with minutes
        hours, minutes, seconds = numbers if len(numbers) == 3 else (0, *numbers, 0)[:3]
    total = (int(days or 0) * 24 + hours) * 60 + minutes + math.ceil(seconds / 60)
    if total == 0:
        raise ValueError(f"expected --time of at least one minute, got {limit!r}")
    return total


def jobs_directory(config: Config) -> Path:
    """Where logs and submission files of a run lie: beside its folder, which a new run of its name moves aside."""
    return config.run_directory.with_name(f"{config.name}.jobs").absolute()


def slurm_executor(arguments: argparse.Namespace, folder: Path, name: str) -> submitit.SlurmExecutor:
    """submitit's executor with what the command line asks for. SLURM need not be there."""

    class Executor(submitit.SlurmExecutor):
        @classmethod
        def affinity(cls) -> int:
            return 1  # or the constructor refuses a machine without srun, where --dry-run should work

    minutes = parse_minutes(arguments.time)
    srun_arguments = ["--kill-on-bad-exit=1"]
    if arguments.cpus_per_task:  # since SLURM 22.05 srun does not take it over from the batch script
        srun_arguments.append(f"--cpus-per-task={arguments.cpus_per_task}")
    parameters = {
        "job_name": name,
        "nodes": arguments.nodes,
        "ntasks_per_node": arguments.gpus_per_node or arguments.tasks_per_node,
        "gpus_per_node": arguments.gpus_per_node,
        "cpus_per_task": arguments.cpus_per_task,
        "partition": arguments.partition,
        "constraint": arguments.constraint,
        "time": minutes,
        "signal_delay_s": signal_delay(minutes),
        "stderr_to_stdout": True,
        "srun_args": srun_arguments,
        "additional_parameters": {"requeue": True} | sbatch_options(arguments.sbatch),
    }
    executor = Executor(folder, max_num_timeout=_MAX_TIME_LIMITS)
    executor.update_parameters(**{key: value for key, value in parameters.items() if value is not None})
    return executor


def start_here(arguments: argparse.Namespace, job: TrainingJob, folder: Path, *, first_gpu: int = 0) -> Any:
    """Start a job on this machine, on its GPUs from number `first_gpu` on; submitit's handle of it."""
    num_gpus, minutes = arguments.gpus_per_node or 0, parse_minutes(arguments.time)
    executor = submitit.LocalExecutor(folder, max_num_timeout=_MAX_TIME_LIMITS)
    executor.update_parameters(
        tasks_per_node=arguments.gpus_per_node or arguments.tasks_per_node,
        gpus_per_node=num_gpus,
        visible_gpus=list(range(first_gpu, first_gpu + num_gpus)),
        timeout_min=minutes,
        signal_delay_s=signal_delay(minutes),
        stderr_to_stdout=True,
    )
    with submitit.helpers.clean_env():  # what a surrounding job or launcher has set is not meant for this one
        return executor.submit(job)


def submit_to_slurm(executor: submitit.SlurmExecutor, *jobs: TrainingJob) -> list[str]:
    """Put a job into SLURM's queue; several as one job array.

    Returns:
        The number of each: "12", or "12_0", "12_1", ... in an array.

    Raises:
        ValueError: no SLURM here, or it refuses the job.
    """
    if shutil.which("sbatch") is None:
        raise ValueError(
            "expected SLURM on this machine, found no sbatch; submit from a login node, or use --cluster local or debug"
        )
    settings = {name: os.environ[name] for name in ("SLURM_CONF",) if name in os.environ}
    try:
        with submitit.helpers.clean_env():  # what a surrounding job or launcher has set is not meant for this one
            os.environ.update(settings)
            with executor.batch():
                submitted = [executor.submit(job) for job in jobs]
            return [str(job.job_id) for job in submitted]
    except submitit.core.utils.FailedJobError as error:
        said = [line for line in str(error).splitlines() if "sbatch: error:" in line]
        reason = "\n".join(line[line.index("sbatch: error:") :] for line in said) or str(error)
        raise ValueError(f"SLURM does not take the job:\n{reason}") from None


# ---- after submission ------------------------------------------------------------------------------------------------


class JobState(NamedTuple):
    """What SLURM says of a job."""

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


def exit_status(code: str) -> int:
    """SLURM's "status:signal" as a shell gives it: "2:0" -> 2, "0:9" -> 137."""
    status, number = (int(part) for part in code.split(":"))
    return 128 + number if number else status


def hopeless_message(job_id: str, state: JobState) -> str:
    """What to do about a job that will never start."""
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
    """As `follow_slurm`, for a job on this machine."""
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

    Exit statuses alone do not tell: the ranks that end because one of them has found a mistake end by a signal, whose
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


# ---- command line ----------------------------------------------------------------------------------------------------


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_arguments(parser)
    parser.add_argument(
        "--resume",
        default="auto",
        metavar="auto|never|PATH",
        help="as for train.py, for the first start; a restart continues from what the job itself has saved",
    )
    parser.add_argument(
        "--cluster",
        choices=("slurm", "local", "debug"),
        default="slurm",
        help="slurm: a batch job (default); local: the same tasks on this machine; debug: one rank in this process",
    )
    parser.add_argument("--dry-run", action="store_true", help="print the batch script and submit nothing")
    parser.add_argument("--wait", action="store_true", help="follow the job, and end with its status")
    return parser


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options that say what to train and on which machines; launchers/sweep.py has the same."""
    parser.add_argument("--config", required=True, help="JSON configuration, see configs/")
    parser.add_argument("--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="override settings")
    parser.add_argument("--nodes", type=int, default=1, help="machines (default 1)")
    parser.add_argument("--gpus-per-node", type=int, help="GPUs of each machine; one rank each")
    parser.add_argument("--tasks-per-node", type=int, help="ranks of each machine on CPUs, instead of GPUs")
    parser.add_argument("--cpus-per-task", type=int, help="CPU cores of each rank, data workers included")
    parser.add_argument("--partition", help="SLURM partition (default: the cluster's)")
    parser.add_argument(
        "--time", default="1-00:00:00", help="limit of one start: minutes, HH:MM:SS or D-HH:MM:SS (default: a day)"
    )
    parser.add_argument("--constraint", help="features that nodes must have, for instance a100")
    parser.add_argument(
        "--sbatch",
        nargs="+",
        action="extend",
        default=[],
        metavar="NAME[=VALUE]",
        help="further options of sbatch: account=vision mem=64G exclusive",
    )


def run(command_line: list[str]) -> int:
    """Do what the command line says.

    Returns:
        Exit status: 0; 1 if the job failed or will never start; 2 after a user's mistake; with --wait, the job's.
    """
    arguments = build_parser().parse_args(command_line)
    try:
        return _submit(arguments, build_job(arguments))
    except (ValueError, OSError) as error:
        return refuse(error)
    except KeyboardInterrupt:
        print("not followed any more; a job in the queue goes on", file=sys.stderr)
        return 128 + signal.SIGINT


def _submit(arguments: argparse.Namespace, job: TrainingJob) -> int:
    if arguments.cluster == "debug":
        job.run()
    config = parse_config(job.settings, source=arguments.config)
    num_ranks = arguments.nodes * (arguments.gpus_per_node or arguments.tasks_per_node)
    check_start(config, num_ranks=num_ranks, uses_gpus=job.uses_gpus)
    folder = jobs_directory(config)
    if arguments.cluster == "local":
        return _start_here(arguments, job, folder)
    executor = slurm_executor(arguments, folder, config.name)
    if arguments.dry_run:
        print(executor._make_submission_file_text(executor._submitit_command_str, "dry-run"), end="")
        return 0
    (job_id,) = submit_to_slurm(executor, job)
    print(f"job {job_id} of {num_ranks} ranks\n  log:    tail -F {log_of(folder, job_id, 0)}")
    print(f"  state:  squeue --job {job_id}\n  end it: scancel {job_id}", flush=True)
    if arguments.wait:
        return follow_slurm(job_id, folder, num_ranks)
    state = first_verdict(job_id)
    if state and state.is_hopeless:
        print(f"error: {hopeless_message(job_id, state)}", file=sys.stderr)
        return 1
    return 0


def check_start(config: Config, *, num_ranks: int, uses_gpus: bool) -> None:
    """Find what the job's start would find, before it waits in a queue.

    Raises:
        ValueError: as `check_run`.
    """
    from dist_proxygml.training.checks import (
        check_run,  # torch comes with it: only now, when the settings alone are right
    )

    check_run(config, world_size=num_ranks, device="cuda" if uses_gpus else "cpu")


def _start_here(arguments: argparse.Namespace, job: TrainingJob, folder: Path) -> int:
    num_ranks = arguments.gpus_per_node or arguments.tasks_per_node
    started = start_here(arguments, job, folder)
    print(f"job {started.job_id} of {num_ranks} ranks\n  log:    tail -F {log_of(folder, started.job_id, 0)}")
    print(f"  end it: kill {started.job_id}", flush=True)
    return follow_local(started, folder, num_ranks) if arguments.wait else 0


if __name__ == "__main__":
    run_command(lambda: run(sys.argv[1:]))
