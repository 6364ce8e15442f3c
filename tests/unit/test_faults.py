"""The fault hook: what its variable may say, and that it does so at that passage of that point on that rank only."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from dist_proxygml.faults import POINTS, VARIABLE, Fault, parse_faults

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "dist_proxygml"


def passing(points: list[str], fault: str, *, rank: int = 0) -> subprocess.CompletedProcess[str]:
    """Pass the points in a process of its own; prints what each said."""
    code = f"""
from dist_proxygml.faults import fault_point
for point in {points!r}:
    try:
        print(point, fault_point(point), flush=True)
    except OSError as error:
        print(point, error.errno, flush=True)
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "RANK": str(rank), VARIABLE: fault}
    return subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120, check=False
    )


def test_a_variable_is_read_as_point_rank_passage_and_action() -> None:
    faults = parse_faults("save.publish@1:3:kill9, step.begin@0:1:signal=USR2,step.loss@2:7:sleep=0.5")
    assert faults == [
        Fault("save.publish", 1, 3, "kill9"),
        Fault("step.begin", 0, 1, "signal=USR2"),
        Fault("step.loss", 2, 7, "sleep=0.5"),
    ]
    assert parse_faults("") == []


@pytest.mark.parametrize(
    "text", ["save.nowhere@0:1:kill9", "step.begin@0:0:nan", "step.begin:1:nan", "step.begin@0:1:explode"]
)
def test_what_cannot_be_done_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"DIST_PROXYGML_FAULT=.*start\.join.*kill9"):
        parse_faults(text)


def test_a_fault_happens_at_its_passage_of_its_point_on_its_rank() -> None:
    points = ["step.begin", "step.loss", "step.loss", "step.loss"]
    fault = "step.loss@1:2:nan,step.begin@1:1:enospc"
    assert passing(points, fault, rank=1).stdout.splitlines() == [
        f"step.begin {errno.ENOSPC}",
        "step.loss False",
        "step.loss True",
        "step.loss False",
    ]
    assert passing(points, fault, rank=0).stdout.splitlines() == [f"{point} False" for point in points]
    killed = passing(points, "step.loss@0:3:kill9")
    assert killed.returncode == -9
    assert len(killed.stdout.splitlines()) == 3
    assert passing(points, "step.loss@0:1:signal=TERM").returncode == -15


def test_every_point_is_passed_somewhere_and_no_other() -> None:
    source = "\n".join(path.read_text() for path in PACKAGE.rglob("*.py") if path.name != "faults.py")
    for point in POINTS:
        assert f'fault_point("{point}")' in source, point
    assert source.count('fault_point("') == len(POINTS)
