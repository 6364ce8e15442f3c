"""Experiment trackers: Weights & Biases, MLflow and trackio get the numbers that TensorBoard gets.

Each tracker is a process of its own, which rank 0 writes lines to without ever waiting. So no network, prompt, crash or
exit handler of a tracker's library reaches training, and no thread of theirs is there while data loading processes are
forked. A tracker that fails or lags behind loses numbers; metrics.jsonl and TensorBoard have them all.

    runs/NAME/trackers/wandb.json    the run's id there, with which a resumed run continues it, and the last step
                      wandb.log      what the library says, such as the address of the run

Servers, keys and modes are the libraries' own variables (WANDB_MODE, MLFLOW_TRACKING_URI, TRACKIO_SPACE_ID, ...).
Without a server, numbers stay in files: runs/NAME/wandb, runs/mlflow.db, trackio's own folder. Steps that a resumed run
repeats are not sent again, since trackers cannot take a point back. Declined: images and histograms.
"""

import contextlib
import json
import math
import os
import signal
import subprocess
import sys
import time
import traceback
import uuid
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from dist_proxygml.storage.files import publish_text

_SECONDS_TO_END = 15.0  # that a run waits for its trackers
_SECONDS_TO_UPLOAD = 600  # that a tracker may take after its run
_MOST_BYTES = 4096  # of a line: what a pipe takes in one piece or not at all (PIPE_BUF)


def check_trackers(names: Sequence[str]) -> None:
    """Refuse trackers that are not installed.

    Raises:
        ValueError: with what to install.
    """
    missing = [name for name in names if find_spec(name) is None]
    if missing:
        raise ValueError(
            f"expected {' and '.join(missing)} for telemetry.trackers, got no such package; "
            f'pip install "dist_proxygml[{",".join(missing)}]", or leave it out'
        )


class Trackers:
    """The trackers of one start of a run, on rank 0.

    Args:
        names: "wandb", "mlflow", "trackio".
        run_directory: the run's folder, whose name is that of the run.
        project: the project or experiment that they show the run in.
        settings: the run's settings, flat.
        say: called with a message when a tracker has failed, once for each.
    """

    def __init__(
        self,
        names: Sequence[str],
        run_directory: Path,
        *,
        project: str,
        settings: Mapping[str, object],
        say: Callable[[str], object],
    ) -> None:
        self._say = say
        self._folder = run_directory / "trackers"
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self._num_dropped = dict.fromkeys(names, 0)
        for name in names:
            with self._survived(name):
                self._start(name, json.dumps({"project": project, "settings": dict(settings)}))

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        """Send the numbers of a step, by TensorBoard's names. Never waits; a tracker that lags behind loses them."""
        lines = _lines(step, {name: number for name, number in numbers.items() if math.isfinite(number)})
        for name, process in list(self._processes.items()):
            with self._survived(name):
                self._num_dropped[name] += not all(self._send(process, line) for line in lines)

    def close(self) -> None:
        """End the trackers. Waits for at most 15 seconds; one that is still uploading then does so by itself."""
        for name, process in list(self._processes.items()):
            with self._survived(name):
                self._send(process, "{}")  # the pipe itself may be open in data loading processes
                assert process.stdin is not None
                process.stdin.close()
        deadline = time.monotonic() + _SECONDS_TO_END
        for name, process in self._processes.items():
            try:
                if process.wait(max(0.0, deadline - time.monotonic())):
                    self._say(self._failure(name))
            except subprocess.TimeoutExpired:
                self._say(f"{name} is still sending, see {self._log(name)}; it ends by itself")
            if self._num_dropped[name]:
                self._say(f"{name} lagged behind: it lacks numbers of {self._num_dropped[name]} logged steps")
        self._processes.clear()

    def _start(self, name: str, first_line: str) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        root = str(Path(__file__).parents[2])
        paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
        with open(self._log(name), "ab") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", __name__, name, str(self._folder.parent.resolve())],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                start_new_session=True,  # Ctrl-C is for the run, which ends its trackers
                env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
                bufsize=0,
            )
        self._processes[name] = process
        assert process.stdin is not None
        process.stdin.write(first_line.encode() + b"\n")
        os.set_blocking(process.stdin.fileno(), False)

    def _send(self, process: subprocess.Popen[bytes], line: str) -> bool:
        """Write a line, unless the pipe is full; whether it was written."""
        assert process.stdin is not None
        data = line.encode() + b"\n"
        return len(data) <= _MOST_BYTES and process.stdin.write(data) is not None

    @contextlib.contextmanager
    def _survived(self, name: str) -> Any:
        """Report a tracker that has ended, or could not start, and do without it."""
        try:
            yield
        except OSError as error:
            process = self._processes.pop(name, None)
            if process is not None:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(1.0)
            self._say(f"{name} could not start: {error}" if process is None else self._failure(name))

    def _failure(self, name: str) -> str:
        with contextlib.suppress(OSError):
            lines = self._log(name).read_text(encoding="utf-8", errors="replace").strip().splitlines() or ["?"]
            return f"{name} gets no more numbers: {lines[-1][:300]} (all of it in {self._log(name)})"
        return f"{name} gets no more numbers"

    def _log(self, name: str) -> Path:
        return self._folder / f"{name}.log"


def _lines(step: int, numbers: dict[str, float]) -> list[str]:
    """The numbers of a step in as many lines as a pipe needs to take each whole."""
    line = json.dumps({"step": step, "numbers": numbers})
    if len(line) < _MOST_BYTES or len(numbers) == 1:
        return [line]
    items = list(numbers.items())
    middle = len(items) // 2
    return [*_lines(step, dict(items[:middle])), *_lines(step, dict(items[middle:]))]


# ---- the process of a tracker ----------------------------------------------------------------------------------------


class _Run(NamedTuple):
    """A run as a tracker's library has it."""

    id: str
    log: Callable[[int, dict[str, float]], object]
    finish: Callable[[], object]


def _open_wandb(directory: Path, project: str, settings: dict[str, Any], known_id: str | None) -> _Run:
    import wandb

    known_id = known_id or uuid.uuid4().hex[:12]
    options: dict[str, Any] = {
        "project": project,
        "name": directory.name,
        "id": known_id,
        "resume": "allow",
        "config": settings,
    }
    options |= {"dir": directory, "settings": wandb.Settings(console="off", init_timeout=30, finish_timeout=300)}
    try:
        run = wandb.init(**options)
    except wandb.errors.Error as error:  # no key, or no network
        print(f"kept offline, send it with `wandb sync {directory / 'wandb'}/offline-run-*`: {error}", flush=True)
        wandb.teardown()  # or the id would be in use
        run = wandb.init(**options, mode="offline")
    run.define_metric("*", step_metric="step")
    return _Run(known_id, lambda step, numbers: run.log({**numbers, "step": step}), run.finish)


def _open_mlflow(directory: Path, project: str, settings: dict[str, Any], known_id: str | None) -> _Run:
    import mlflow
    from mlflow import entities

    runs = directory.parent
    given = os.environ.get("MLFLOW_TRACKING_URI")
    client = mlflow.MlflowClient(tracking_uri=given or f"sqlite:///{runs / 'mlflow.db'}")

    def experiment() -> str:
        found = client.get_experiment_by_name(project)
        location = None if given else (runs / "mlartifacts").as_uri()
        return str(found.experiment_id if found else client.create_experiment(project, artifact_location=location))

    if known_id is None:
        try:
            experiment_id = experiment()
        except mlflow.exceptions.MlflowException:  # another run has just created it
            experiment_id = experiment()
        known_id = str(client.create_run(experiment_id, run_name=directory.name).info.run_id)
        params = [entities.Param(name, str(value)[:500]) for name, value in settings.items()]
        for first in range(0, len(params), 100):  # as many as one call may have
            client.log_batch(known_id, params=params[first : first + 100])
    else:
        client.update_run(known_id, status="RUNNING")

    def log(step: int, numbers: dict[str, float]) -> None:
        now = int(time.time() * 1000)  # names have no "@"
        client.log_batch(
            known_id, metrics=[entities.Metric(n.replace("@", "_at_"), v, now, step) for n, v in numbers.items()]
        )

    return _Run(known_id, log, lambda: client.set_terminated(known_id))


def _open_trackio(directory: Path, project: str, settings: dict[str, Any], known_id: str | None) -> _Run:
    import trackio

    name = known_id or f"{directory.name}-{uuid.uuid4().hex[:6]}"  # runs are known by name there
    options: dict[str, Any] = {"resume": "allow", "embed": False, "auto_log_gpu": False, "auto_log_cpu": False}
    run = trackio.init(project=project, name=name, config=settings, **options)
    return _Run(name, lambda step, numbers: run.log(numbers, step=step), run.finish)


_OPEN: dict[str, Callable[[Path, str, dict[str, Any], str | None], _Run]] = {
    "wandb": _open_wandb,
    "mlflow": _open_mlflow,
    "trackio": _open_trackio,
}


def _main(name: str, directory: Path) -> None:
    """Send the lines of standard input to a tracker, until an empty object or the end of the input."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # SLURM sends it to every process; the run ends this one
    first = json.loads(sys.stdin.readline())
    path = directory / "trackers" / f"{name}.json"
    known: dict[str, Any] = {}
    with contextlib.suppress(FileNotFoundError):
        known = json.loads(path.read_text(encoding="utf-8"))
    run = _OPEN[name](directory, first["project"], first["settings"], known.get("id"))
    last: dict[str, int] = known.get("last_step", {})
    publish_text(path, json.dumps({"id": run.id, "last_step": last}) + "\n")
    for text in sys.stdin:
        line = json.loads(text) if text.endswith("\n") else {}
        if not line:
            break
        step = line["step"]
        new = {tag: v for tag, v in line["numbers"].items() if step > last.get(tag, -1)}
        if new:
            run.log(step, new)
            last |= dict.fromkeys(new, step)
            publish_text(path, json.dumps({"id": run.id, "last_step": last}) + "\n")
    signal.alarm(_SECONDS_TO_UPLOAD)  # ends this process, which nobody waits for any more
    run.finish()


if __name__ == "__main__":
    try:
        _main(sys.argv[1], Path(sys.argv[2]))
    except Exception as error:
        traceback.print_exc()
        print(f"error: {type(error).__name__}: {' '.join(str(error).split())}", flush=True)
        os._exit(1)  # without the library's exit handlers, which may wait for its server
