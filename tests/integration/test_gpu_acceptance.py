"""The command that accepts a GPU machine, without one: its table, its lines, its failures and its time limits.

Every section runs here at sizes that take no time, on the stand-in for a GPU and over gloo.
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from dist_proxygml.faults import VARIABLE
from tools import gpu_acceptance
from tools.gpu_acceptance import SECTIONS, Section

ROOT = Path(__file__).resolve().parents[2]


def results(out: Path) -> dict[str, dict[str, Any]]:
    lines = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    return {line["section"]: line for line in lines}


def accept(out: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "tools/gpu_acceptance.py", "--device", "cpu", "--out", str(out), *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | variables
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.ci
@pytest.mark.timeout(900)
@pytest.mark.parametrize("sections", [[name for name in SECTIONS if name not in ("training", "ranks")], ["training"]])
def test_every_section_passes_on_the_stand_in(sections: list[str], tmp_path: Path) -> None:
    done = accept(tmp_path, "--minutes", "14", "--only", *sections)
    assert done.returncode == 0, done.stdout + done.stderr
    found = results(tmp_path)
    assert list(found) == sections
    table = done.stdout[done.stdout.index("\nsection ") :].splitlines()[2 : 2 + len(sections)]
    assert [line.split()[0] for line in table] == sections
    for name, result in found.items():
        statuses = [check["status"] for check in result["checks"]]
        assert set(statuses) <= {"passed", "not tested"}
        assert result["status"] == ("passed" if "passed" in statuses else "not tested")
        assert (name == "memory") == ("passed" not in statuses)  # tests on CPUs hold the plan to measured memory
        assert all(check["text"] == "no GPU" for check in result["checks"] if check["status"] == "not tested")
        assert all(check["name"] in done.stdout for check in result["checks"])
    if "steps" in found:
        assert all(check["numbers"]["launches"] > 50 for check in found["steps"]["checks"])


def write(code: str) -> list[str]:
    """A section that writes a check, then does something else."""
    start = (
        "import json, pathlib, sys, time\n"
        "name, out = sys.argv[1], pathlib.Path(sys.argv[5])\n"
        "def check(status, text=''):\n"
        "    line = {'name': 'a check of ' + name, 'status': status, 'seconds': 0.1, 'text': text, 'numbers': {}}\n"
        "    with open(out / (name + '.jsonl'), 'a') as file: file.write(json.dumps(line) + chr(10))\n"
    )
    return [sys.executable, "-c", start + code]


def test_failures_hangs_and_crashes_are_reported_and_stop_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    child = "import subprocess; print(subprocess.Popen(['sleep', '600']).pid, file=open(out / 'child', 'w'))\n"
    sections = {
        "wrong": Section(1, "one check fails", write("check('failed', 'got 3'); check('passed')")),
        "hangs": Section(3, "never ends", write(f"check('passed')\n{child}time.sleep(600)")),
        "crashes": Section(100, "ends early", write("check('passed'); print('out of luck'); sys.exit(7)")),
        "cannot": Section(100, "needs two GPUs", write("check('not tested', 'needs 2 GPUs, found 1')")),
        "fine": Section(100, "all pass", write("check('passed')")),
    }
    monkeypatch.setattr(gpu_acceptance, "SECTIONS", sections)
    arguments = ["--out", str(tmp_path), "--minutes"]
    start = time.monotonic()
    assert gpu_acceptance.main([*arguments, "10"]) == 1
    assert time.monotonic() - start < 60
    found = results(tmp_path)
    assert {name: result["status"] for name, result in found.items()} == {
        "wrong": "failed",
        "hangs": "killed",
        "crashes": "failed",
        "cannot": "not tested",
        "fine": "passed",
    }
    assert found["wrong"]["text"] == "a check of wrong"
    assert "time limit" in found["hangs"]["text"]
    assert len(found["hangs"]["checks"]) == 1
    assert "status 7" in found["crashes"]["text"]
    assert "out of luck" in found["crashes"]["text"]
    child_pid = int((tmp_path / "child").read_text())
    status = Path(f"/proc/{child_pid}/stat")
    assert not status.exists() or status.read_text().rpartition(")")[2].split()[0] in "ZX"  # what it started is gone
    printed = capsys.readouterr().out
    assert "got 3" in printed
    assert printed.index("\nfine:") < printed.index("\nsection ")
    assert gpu_acceptance.main([*arguments, "10", "--only", "fine", "cannot"]) == 0
    assert list(results(tmp_path)) == ["cannot", "fine"]


@pytest.mark.ci
def test_a_rank_that_fails_makes_its_section_fail_and_not_the_others(tmp_path: Path) -> None:
    done = accept(tmp_path, "--minutes", "4", "--only", "collectives", "ranks", **{VARIABLE: "start.join@0:1:raise"})
    assert done.returncode == 1, done.stdout + done.stderr
    found = results(tmp_path)
    assert found["collectives"]["status"] == "passed"
    assert found["ranks"]["status"] == "failed"
    assert "expected status 0 of one rank" in found["ranks"]["checks"][0]["text"]


def test_what_cannot_be_asked_for_is_refused(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert gpu_acceptance.main(["--minutes", "0", "--out", str(tmp_path)]) == 2
    assert "--minutes" in capsys.readouterr().err
    assert gpu_acceptance.main(["--list"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == list(SECTIONS)
