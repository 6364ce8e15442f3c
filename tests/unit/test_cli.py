"""How commands end: a mistake, Ctrl-C, a reader that has gone."""

import argparse
import importlib
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from dist_proxygml.cli import build_parser, command
from dist_proxygml.distributed.parallel import status_of

ROOT = Path(__file__).parents[2]
MISTAKES = {  # of each command, a few
    "doctor": ("--config nowhere.json", "--set seed=1"),
    "evaluate": ("--run nowhere", "--run nowhere --validation --split test"),
    "export": ("--run nowhere --out new", "--run nowhere --out new --opset 20", "--run nowhere --out new --data d"),
    "index": ("--embeddings nowhere --out new",),
    "plan": ("--config nowhere.json", "--config demo_cpu --ranks 0", "--config demo_cpu --memory much"),
    "report": ("", "--run nowhere", "--run nowhere compare a b", "compare a b"),
    "search": ("--index nowhere a.jpg", "--index nowhere . --html a.jpg"),
    "shard": (
        "verify nowhere",
        "info nowhere",
        "index nowhere",
        "build sop --root nowhere --out new",
        "build imagefolder --root nowhere --out new",
    ),
    "serve": ("--index nowhere --port 0", "--index nowhere --host 0.0.0.0"),
    "submit": ("--config nowhere.json --tasks-per-node 1",),
    "sweep": ("--config nowhere.json --tasks-per-node 1",),
    "train": ("--config nowhere.json", "--config demo_cpu --set seed=no"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_told_in_one_line_with_status_2_and_writes_nothing(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    main: Callable[[list[str]], object] = importlib.import_module(f"dist_proxygml.{name}").main
    for words in MISTAKES[name]:
        statuses: list[object] = []
        of_ranks = status_of(lambda: statuses.append(main(words.split())))  # noqa: B023
        told = capsys.readouterr()
        assert (of_ranks or statuses[0]) == 2, words
        assert told.err.startswith("error: "), told.err
        assert not told.out
        assert len(told.err.splitlines()) <= 2  # a configuration says its file first
        assert not any(tmp_path.iterdir())


def test_ctrl_c_is_told_in_one_line_with_status_130(capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted(given: argparse.Namespace) -> int:
        raise KeyboardInterrupt

    main = command(lambda: build_parser("x", "", ""), stopped="stopped; the same command goes on")(interrupted)
    assert main([]) == 130
    assert capsys.readouterr().err == "stopped; the same command goes on\n"
    assert status_of(lambda: interrupted(argparse.Namespace())) == 130
    assert capsys.readouterr().err == "stopped\n"


def test_of_several_ranks_one_tells_of_ctrl_c(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted() -> None:
        raise KeyboardInterrupt

    monkeypatch.setenv("RANK", "1")
    assert status_of(interrupted) == 130
    assert capsys.readouterr().err == ""


READ_BY_NOBODY = """
import os, sys
from dist_proxygml.cli import run_command

def main():
    reader, writer = os.pipe()
    os.close(reader)
    os.dup2(writer, 1)
    for number in range(20_000):
        print("a line that nobody reads", number)
    print("done", file=sys.stderr)
    return 3

run_command(main)
"""


@pytest.mark.timeout(60)
def test_a_command_whose_reader_has_gone_comes_to_its_end_with_its_status() -> None:
    command = [sys.executable, "-c", READ_BY_NOBODY]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=50, check=False)
    assert (done.returncode, done.stderr) == (3, "done\n")


def test_every_command_ends_through_one_place() -> None:
    for path in sorted([*(ROOT / "dist_proxygml").glob("*.py"), *(ROOT / "launchers").glob("*.py")]):
        _, is_command, ending = path.read_text().rpartition('if __name__ == "__main__":\n')
        assert not is_command or ending.lstrip().startswith(("run_command(", "run_launcher(")), path
