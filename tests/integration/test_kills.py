"""Real training runs that are killed, stopped, hung and fed with NaN; what they are put through is in tests/soak.py."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


# In the parts, the publication and the naming of a save, in a step and in an evaluation; on both ranks.
FIVE_KILLS = (
    "save.engine@1:2:kill9",
    "save.publish@0:2:kill9",
    "save.latest@0:2:kill9",
    "step.update@1:2:kill9",
    "evaluate.batch@0:1:kill9",
)


def disturb(*what: str) -> list[str]:
    command = [sys.executable, "-m", "tests.soak", *what]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    *lines, last = [line for line in done.stdout.splitlines() if not line.startswith("[")]  # DeepSpeed's own
    assert last == "the runs that were disturbed came to the numbers and bytes of the one that was left alone"
    return lines


@pytest.mark.timeout(300)
def test_a_run_that_is_killed_in_saves_a_step_and_an_evaluation_comes_to_the_same_end() -> None:
    assert len(disturb("--sweep", *FIVE_KILLS, "--steps", "10")) == 5


@pytest.mark.ci
@pytest.mark.timeout(300)
def test_a_run_that_is_killed_at_every_point_comes_to_the_same_end() -> None:
    assert len(disturb("--sweep")) == 23


@pytest.mark.ci
@pytest.mark.timeout(300)
def test_signals_hangs_and_nan_lose_nothing() -> None:
    assert len(disturb("--signals")) == 10
