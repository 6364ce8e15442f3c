"""The task of a SLURM job: train as launchers/train.py does, with the peers that SLURM names.

Before the time limit and at preemption all ranks stop between two steps and save; then rank 0 puts the job back into
the queue, and its next start continues from there. submitit pickles a TrainingJob by the name of this module.
"""

import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import submitit

from dist_proxygml.cluster.status import finished_mark, is_preempted
from dist_proxygml.config import Config, parse_config
from dist_proxygml.distributed.slurm import rendezvous_port
from dist_proxygml.storage.run_folder import RunFolder

# Restarts without a newer checkpoint, after which a job does not requeue itself again.
_MAX_FRUITLESS = 3


class TrainingJob:
    """Callable of every task of a job. submitit pickles it, and calls it again when the job starts again."""

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
        device = "cuda" if self.uses_gpus else "cpu"
        self.run(Requeue(task, requeue, grace=self.grace), early, device=device)

    def run(self, requeue: "Requeue | None" = None, early: Sequence[int] = (), *, device: str = "auto") -> NoReturn:
        """Train in this process, whose rank stands in the environment, and end it. `early` came before it listened;
        `device` as in `join_world`: "cuda" insists on the GPUs that were asked for.
        """
        from dist_proxygml.distributed.parallel import join_world, run_launcher
        from dist_proxygml.distributed.preemption import StopRequested, StopSignals

        def main() -> None:
            config = parse_config(self.settings, source=self.source)
            resume = "auto" if self.has_started(config) else self.resume
            signals = StopSignals(grace=requeue.grace, on_grace_over=requeue.give_up) if requeue else StopSignals()
            signals.listen()
            for number in early:
                os.kill(os.getpid(), number)
            context = join_world(start_timeout=config.training.start_timeout, device=device)
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
        from dist_proxygml.checkpoint.folder import MANIFEST_FILE, published_checkpoints

        found = published_checkpoints(RunFolder(config.run_directory).checkpoints)
        return any((path / MANIFEST_FILE).stat().st_mtime > self.submitted_at for path in found)

    def checkpoint(self) -> submitit.helpers.DelayedSubmission | None:
        """The job to put into the queue again, or None to give up. Called by submitit's handler, on rank 0."""
        from dist_proxygml.checkpoint.folder import published_checkpoints

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
    """Return of a job to the queue when its ranks have stopped, by the handler that submitit has for its signal.

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
        os.write(2, b"not stopped in time: nothing is saved, the job resumes from its newest checkpoint\n")
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
