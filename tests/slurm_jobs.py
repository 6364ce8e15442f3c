"""What tests of the launchers need: jobs of the submit command, and a SLURM of our own that runs them.

The SLURM is that of tools/slurm_cluster.py, which the fixture `slurm` (integration/conftest.py) starts once a session
where its programs are installed and we are root. With DIST_PROXYGML_NEEDS_SLURM set, as in CI, none is a failure.
"""

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from dist_proxygml.storage.files import read_log

ROOT = Path(__file__).resolve().parents[1]
PROGRAM = "tools/slurm_cluster.py"


def wait_for(condition: Callable[[], object], *, seconds: float, what: str) -> None:
    """Return as soon as the condition holds; a failed test if it does not in time."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"waited {seconds} s for {what}"
        time.sleep(0.1)


def start_launcher(*command: str, **variables: str) -> subprocess.Popen[str]:
    """Start "launchers/submit.py" with its arguments, with the environment of this process and these variables."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PATH": path, **variables}
    return subprocess.Popen(
        [sys.executable, *command], cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def training_losses(run_directory: Path) -> list[tuple[int, float]]:
    """Step and loss of every line of training in a run's metrics, in their order; the run may be writing the last."""
    log = read_log(run_directory / "metrics.jsonl", {"step": int, "kind": str})
    assert not log.odd, log.odd
    return [(line["step"], line["loss"]) for _, line in log.records if line["kind"] == "train"]


class Slurm:
    """A running SLURM: node1, node2 and node3."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.configuration = folder / "slurm.conf"

    def ask(self, *command: str, check: bool = True) -> str:
        """What a command of SLURM's prints."""
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=180,
            check=False,
            env={**os.environ, "SLURM_CONF": str(self.configuration)},
        )
        assert not check or done.returncode == 0, f"{' '.join(command)}: {done.stderr}"
        return done.stdout

    def field(self, job_id: str, name: str) -> str:
        """What `scontrol show job` says after NAME=."""
        words = self.ask("scontrol", "show", "job", job_id).split()
        return next(word.split("=", 1)[1] for word in words if word.startswith(f"{name}="))

    def launch(self, *command: str, **variables: str) -> subprocess.Popen[str]:
        """As `start_launcher`; what it submits goes to this SLURM."""
        return start_launcher(*command, SLURM_CONF=str(self.configuration), **variables)

    def control(self, *command: str) -> None:
        """Call tools/slurm_cluster.py with its further commands: "fail node2", "start"."""
        done = subprocess.run(
            [sys.executable, PROGRAM, "--folder", str(self.folder), *command],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.returncode == 0, done.stderr


@contextlib.contextmanager
def running_slurm() -> Iterator[Slurm]:
    """A SLURM that ends with this block, and with this process however that ends; skips where there can be none."""
    folder = Path(tempfile.mkdtemp(prefix="slurm-", dir="/tmp"))  # short: it holds unix sockets
    command = [sys.executable, PROGRAM, "--folder", str(folder), "start", "--nodes", "3", "--hold"]
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,  # Ctrl-C is for the tests, which stop it then
    )
    assert process.stdin is not None
    assert process.stdout is not None
    told = [process.stdout.readline()]
    if "cannot have networks of their own" in told[0]:
        told.append(process.stdout.readline())
        warnings.warn(told[0].strip(), stacklevel=1)  # a rank that looks for its peers at localhost goes unseen
    if not told[-1]:
        reason = f"no SLURM: {process.communicate()[1].strip()}"
        shutil.rmtree(folder, ignore_errors=True)
        if "DIST_PROXYGML_NEEDS_SLURM" in os.environ:
            pytest.fail(reason)
        pytest.skip(f"{reason}; `sudo python3 {PROGRAM} install` installs it (Debian, Ubuntu)")
    try:
        yield Slurm(folder)
    finally:
        process.stdin.write("stop\n")  # its end alone may go unseen: processes that were forked meanwhile have it open
        process.stdin.close()
        process.wait(timeout=180)
