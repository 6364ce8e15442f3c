"""How commands end: a mistake, Ctrl-C, a reader that has gone."""

import argparse
import importlib
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from dist_proxygml.__main__ import main as list_commands
from dist_proxygml.cli import build_parser, command
from dist_proxygml.distributed.parallel import status_of

ROOT = Path(__file__).parents[2]
MISTAKES = {  # of each command, a few
    "doctor": ("--config nowhere.json", "--set seed=1"),
    "evaluate": ("--run nowhere", "--run nowhere --validation --split test"),
    "export": ("--run nowhere --out new", "--run nowhere --out new --opset 20", "--run nowhere --out new --data d"),
    "index": ("--embeddings nowhere --out new", "--embeddings nowhere --index there"),
    "init": ("nowhere --out new.json", "nowhere --out new"),
    "plan": ("--config nowhere.json", "--config demo_cpu --ranks 0", "--config demo_cpu --memory much"),
    "report": ("", "--run nowhere", "--run nowhere compare a b", "compare a b"),
    "search": ("--index nowhere a.jpg", "--index nowhere . --html a.jpg"),
    "shard": (
        "verify nowhere",
        "info nowhere",
        "index nowhere",
        "build sop --data nowhere --out new",
        "build imagefolder --data nowhere --out new",
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


@pytest.mark.parametrize("ranks", ["-1", "0", "two"])
def test_a_plan_for_no_rank_is_refused_by_the_name_of_its_option(
    ranks: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        PARSERS["train"].parse_args(["--config", "demo_cpu", "--dry-run", ranks])
    assert f"--dry-run: expected a whole number of at least 1, got '{ranks}'" in capsys.readouterr().err
    assert PARSERS["train"].parse_args(["--config", "demo_cpu", "--dry-run"]).dry_run == 0  # those started


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


@pytest.mark.timeout(240)
def test_a_command_whose_reader_has_gone_comes_to_its_end_with_its_status() -> None:
    command = [sys.executable, "-c", READ_BY_NOBODY]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=180, check=False)
    assert (done.returncode, done.stderr) == (3, "done\n")


def test_every_command_ends_through_one_place() -> None:
    for path in sorted([*(ROOT / "dist_proxygml").glob("*.py"), *(ROOT / "launchers").glob("*.py")]):
        _, is_command, ending = path.read_text().rpartition('if __name__ == "__main__":\n')
        assert not is_command or ending.lstrip().startswith(("run_command(", "run_launcher(")), path


def parsers() -> dict[str, argparse.ArgumentParser]:
    """The parser of every command, and of every subcommand, by the words that call it."""
    found: dict[str, argparse.ArgumentParser] = {}

    def add(name: str, parser: argparse.ArgumentParser) -> None:
        found[name] = parser
        for action in parser._actions:
            if isinstance(action, argparse._SubParsersAction):
                for word, below in action.choices.items():
                    add(f"{name} {word}", below)

    for path in sorted((ROOT / "dist_proxygml").glob("*.py")):
        if "def _parser(" in path.read_text():
            add(path.stem, importlib.import_module(f"dist_proxygml.{path.stem}")._parser())
    return found


PARSERS = parsers()
SHOWN = {
    name: {
        option: action
        for action in parser._actions
        for option in action.option_strings
        if option not in ("-h", "--help") and action.help != argparse.SUPPRESS
    }
    for name, parser in PARSERS.items()
}
# `train --dry-run RANKS` says for how many ranks the plan is, submit and sweep have no ranks to ask for.
DIFFERENT = {"--dry-run"}
OLD_NAMES = {"--root", "--directory", "--images", "--output", "--workers", "--gpus", "--force-overwrite"}


def test_every_command_has_a_parser_that_is_looked_at_and_is_listed(capsys: pytest.CaptureFixture[str]) -> None:
    commands = {path.stem for path in (ROOT / "dist_proxygml").glob("[a-z]*.py") if "__main__" in path.read_text()}
    assert {name.partition(" ")[0] for name in PARSERS} == commands
    assert list_commands() == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("  ")]
    assert [words[0] for words in lines] == sorted(commands)
    assert all(len(words) > 2 for words in lines)


def test_a_flag_means_the_same_in_every_command() -> None:
    kinds: dict[str, dict[tuple[object, ...], list[str]]] = {}
    for name, options in SHOWN.items():
        for option, action in options.items():
            shape = getattr(action.type, "__qualname__", action.type), action.nargs, type(action)
            kinds.setdefault(option, {}).setdefault(shape, []).append(name)
    assert {option: found for option, found in kinds.items() if len(found) > 1 and option not in DIFFERENT} == {}


def test_a_thing_has_one_flag_and_older_names_are_not_shown() -> None:
    shown = {(name, option) for name, options in SHOWN.items() for option in options}
    assert {(name, option) for name, option in shown if option in OLD_NAMES} == set()
    assert {option for _, option in shown if option.startswith("--out")} == {"--out"}


@pytest.mark.parametrize("name", SHOWN)
def test_a_command_reads_every_option_that_its_help_shows(name: str) -> None:
    command = name.partition(" ")[0]
    source = (ROOT / "dist_proxygml" / f"{command}.py").read_text()
    if command in ("submit", "sweep"):  # which pass on what was parsed
        source += "".join(path.read_text() for path in (ROOT / "dist_proxygml" / "cluster").glob("*.py"))
    unread = [
        option
        for option, action in SHOWN[name].items()
        if not re.search(rf"\.{action.dest}\b|\"{action.dest}\"", source)
    ]
    assert unread == []


@pytest.mark.parametrize("name", PARSERS)
def test_the_examples_in_a_help_are_commands_of_it_that_parse(name: str) -> None:
    assert all(action.help for action in SHOWN[name].values())
    epilog = (PARSERS[name].epilog or "").replace("\\\n", " ")
    examples = [line.strip() for line in epilog.splitlines() if line.startswith("  ")]
    assert examples
    command = name.partition(" ")[0]
    for example in examples:
        program, _, rest = re.split(rf"((?:launchers/{command}\.py|dist_proxygml\.{command})\b)", example, maxsplit=1)
        assert re.match(r"(python|deepspeed|torchrun)", program), example
        words = shlex.split(rest)
        if "--help" not in words:
            PARSERS[command].parse_args(words)
