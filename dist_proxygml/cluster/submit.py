"""Training jobs through submitit: one task per GPU (or per CPU rank, --tasks-per-node), on SLURM or on this machine.

What the user may have got wrong is refused here, before anything waits in a queue; the settings travel with the job as
they were validated, so a configuration edited meanwhile changes nothing. torch is imported when the settings alone are
right, so that a login node answers mistakes at once, and what else a start would refuse in seconds. docs/slurm.md says
what to expect of each.
"""

import argparse
import math
import os
import re
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import submitit

from dist_proxygml.cluster.job import TrainingJob
from dist_proxygml.cluster.status import (
    first_verdict,
    follow_local,
    follow_slurm,
    hopeless_message,
    log_of,
)
from dist_proxygml.config import Config, load_config, parse_config

# Most seconds between the signal that announces the end of the time limit and the end itself.
_SIGNAL_DELAY = 120
# How often the time limit may be reached. What stops a job that gets nowhere is _MAX_FRUITLESS.
_MAX_TIME_LIMITS = 1000
# Options of sbatch that are decided here, and what to use instead where the user has a say.
_RANKS = "--gpus-per-node or --tasks-per-node"
_OWNED_OPTIONS = {
    **{name: f"--{name}" for name in ("nodes", "time", "partition", "constraint", "gpus-per-node", "cpus-per-task")},
    **dict.fromkeys(("ntasks", "ntasks-per-node", "ntasks-per-gpu", "gpus", "gpus-per-task"), _RANKS),
    **dict.fromkeys(("array", "error", "no-requeue", "open-mode", "output", "requeue", "signal", "wrap"), ""),
    **{"job-name": "--set name=", "wait": "--wait"},
}


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
    if days:  # hours come first, whatever is omitted
        hours, minutes, seconds = (*numbers, 0, 0)[:3]
    else:  # one or two numbers begin with minutes
        hours, minutes, seconds = numbers if len(numbers) == 3 else (0, *numbers, 0)[:3]
    total = (int(days or 0) * 24 + hours) * 60 + minutes + math.ceil(seconds / 60)
    if total == 0:
        raise ValueError(f"expected --time of at least one minute, got {limit!r}")
    return total


def jobs_directory(config: Config) -> Path:
    """Folder of a run's logs and submission files: beside that of the run, which a new run of its name moves aside."""
    return config.run_directory.with_name(f"{config.name}.jobs").absolute()


def cores_of_rank(given: int | None, configs: Sequence[Config]) -> int:
    """The cores to ask SLURM for, for each rank: `given`, or one for each data worker of the run and two for the rank
    itself. A warning where fewer are given.
    """
    num_workers = max(config.data.num_workers for config in configs)
    if given is not None and given < num_workers + 2:
        print(
            f"warning: --cpus-per-task {given} is less than data.num_workers + 2 = {num_workers + 2}: a rank and its "
            f"{num_workers} data workers will wait for each other; leave it out, or lower data.num_workers",
            file=sys.stderr,
        )
    return given or num_workers + 2


def slurm_executor(
    arguments: argparse.Namespace, folder: Path, name: str, configs: Sequence[Config]
) -> submitit.SlurmExecutor:
    """submitit's executor with what the command line asks for, and enough cores for these runs. SLURM need not be
    there.
    """

    class Executor(submitit.SlurmExecutor):
        @classmethod
        def affinity(cls) -> int:
            return 1  # or the constructor refuses a machine without srun, where --dry-run should work

    minutes = parse_minutes(arguments.time)
    num_cores = cores_of_rank(arguments.cpus_per_task, configs)
    # Since SLURM 22.05 srun does not take the cores over from the batch script.
    srun_arguments = ["--kill-on-bad-exit=1", f"--cpus-per-task={num_cores}"]
    parameters = {
        "job_name": name,
        "nodes": arguments.nodes,
        "ntasks_per_node": arguments.gpus_per_node or arguments.tasks_per_node,
        "gpus_per_node": arguments.gpus_per_node,
        "cpus_per_task": num_cores,
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
        cores = executor.parameters["cpus_per_task"]
        raise ValueError(
            f"SLURM does not take the job:\n{reason}\n(it asks for {cores} cores of each rank; --cpus-per-task)"
        ) from None


def submit(arguments: argparse.Namespace) -> int:
    """Start what the command line describes, and follow it where that is asked for.

    Returns:
        Exit status: 0; 1 if the job failed or will never start; with --wait, the job's.
    """
    job = build_job(arguments)
    if arguments.cluster == "debug":
        job.run(device="cuda" if arguments.gpus_per_node else "auto")
    config = parse_config(job.settings, source=arguments.config)
    num_ranks = arguments.nodes * (arguments.gpus_per_node or arguments.tasks_per_node)
    check_start(config, num_ranks=num_ranks, uses_gpus=job.uses_gpus)
    folder = jobs_directory(config)
    if arguments.cluster == "local":
        return _start_here(arguments, job, folder)
    executor = slurm_executor(arguments, folder, config.name, [config])
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
    """Find mistakes that the job's start would find, before it waits in a queue.

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
