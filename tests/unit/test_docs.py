"""What the documents point at exists: links, files, commands with their options, Python examples.

Chosen: each command is looked up in the `--help` of its program, all programs in one process; it is
not run.
"""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from dist_proxygml.config import load_config
from dist_proxygml.training.head_plan import plan_head

ROOT = Path(__file__).parents[2]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "shards").glob("*.md")])
NAMES = [str(path.relative_to(ROOT)) for path in DOCUMENTS]

# Prints {"PROGRAM SUBCOMMAND ...": [exit code or error, help]} for the command lines given as JSON.
HELP_OF_ALL = """
import contextlib, io, json, runpy, sys
helps = {}
for words in json.loads(sys.argv[1]):
    program, *subcommands = words
    sys.argv = [program, *subcommands, "--help"]
    output, ending = io.StringIO(), "did not end at --help"
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
        try:
            if program.endswith(".py"):
                runpy.run_path(program, run_name="__main__")
            else:
                runpy.run_module(program, run_name="__main__", alter_sys=True)
        except SystemExit as end:
            ending = end.code or 0
        except Exception as error:
            ending = repr(error)
    helps[" ".join(words)] = ending, output.getvalue()
json.dump(helps, sys.stdout)
"""


class Command(NamedTuple):
    """A command line of a document that starts a program of this project."""

    document: str
    line: str
    program: str  # dist_proxygml.shard or launchers/train.py
    subcommands: tuple[str, ...]
    arguments: tuple[str, ...]

    @property
    def words(self) -> list[str]:
        """The program and its subcommands."""
        return [self.program, *self.subcommands]


def blocks(path: Path, *languages: str) -> list[str]:
    """The code blocks of a document that are marked with one of the languages."""
    found = re.findall(r"^```(\w*)\n(.*?)^```", path.read_text(), flags=re.DOTALL | re.MULTILINE)
    return [text for language, text in found if language in languages]


def command_lines(path: Path) -> list[str]:
    """Lines of the shell blocks, continued lines joined, and what stands in backquotes."""
    lines = [
        line.strip()
        for block in blocks(path, "bash", "sh", "console")
        for line in block.replace("\\\n", " ").splitlines()
    ]
    prose = re.sub(r"^```.*?^```", "", path.read_text(), flags=re.DOTALL | re.MULTILINE)
    return [line for line in lines + re.findall(r"`([^`\n]+)`", prose) if line]


def read_command(document: str, line: str) -> Command | None:
    """The program of this project that the line starts, or None."""
    match = re.search(r"(?:-m (dist_proxygml\.[\w.]+)|(?<!\S)(launchers/\w+\.py|tools/build_demo\.py))(.*)", line)
    if match is None or not re.match(r"\S*(python3?|deepspeed|srun)\b", line):
        return None
    rest = match[3].replace("'", " ").replace('"', " ")
    words = shlex.split(rest, comments=True)
    subcommands = []
    for word in words:
        if not re.fullmatch(r"[a-z][a-z0-9_-]*", word):
            break
        subcommands.append(word)
    arguments = tuple(words[len(subcommands) :])
    return Command(document, line, match[1] or match[2], tuple(subcommands), arguments)


COMMANDS = [
    command
    for path in DOCUMENTS
    for line in command_lines(path)
    if (command := read_command(str(path.relative_to(ROOT)), line)) is not None
]


# Configurations that documented commands write.
WRITTEN = {c.arguments[c.arguments.index("--out") + 1] for c in COMMANDS if c.program == "dist_proxygml.init"}


@pytest.fixture(scope="module")
def helps() -> dict[str, tuple[int | str, str]]:
    """Exit code and help text of every program and subcommand that the documents name."""
    wanted = sorted({tuple(command.words) for command in COMMANDS})
    result = subprocess.run(
        [sys.executable, "-c", HELP_OF_ALL, json.dumps(wanted)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=240,
        check=True,
    )
    return json.loads(result.stdout.splitlines()[-1])


def anchors(path: Path) -> set[str]:
    """The anchors that GitHub gives the headings of a document."""
    headings = re.findall(r"^#+ (.*)$", path.read_text(), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("name", NAMES)
def test_every_relative_link_leads_somewhere(name: str) -> None:
    path = ROOT / name
    text = re.sub(r"^```.*?^```", "", path.read_text(), flags=re.DOTALL | re.MULTILINE)
    targets = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r"(?:src|href)=\"([^\"]+)\"", text)
    for target in targets:
        if re.match(r"[a-z]+:", target):
            continue
        file, _, anchor = target.partition("#")
        linked = (path.parent / file).resolve() if file else path
        assert linked.exists(), f"{name} links to {target}"
        if name.startswith("docs/"):
            assert linked.is_relative_to(ROOT / "docs"), f"{name} links to {target}, which the site does not have"
        if anchor:
            assert anchor in anchors(linked), f"{name} links to {target}"


@pytest.mark.parametrize("name", NAMES)
def test_every_file_that_is_named_exists(name: str) -> None:
    text = re.sub(r"\]\([^)]*\)", "]", (ROOT / name).read_text())  # links have a test of their own
    folders = "benchmarks|configs|docs|launchers|tests|tools"
    named = set(re.findall(rf"\b(?:{folders})/[\w./-]*\w\.(?:json|py|md|png|svg)\b", text))
    missing = sorted(file for file in named - WRITTEN if not (ROOT / file).exists())
    # A changelog tells of what was, and may name what is gone.
    assert name == "CHANGELOG.md" or not missing


@pytest.mark.parametrize("name", NAMES)
def test_nothing_is_left_to_be_filled_in(name: str) -> None:
    lines = (ROOT / name).read_text().splitlines()
    assert [line for line in lines if "TODO" in line] == []


@pytest.mark.parametrize("name", NAMES)
def test_every_make_target_that_is_named_exists(name: str) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    named = {line.split()[1] for line in command_lines(ROOT / name) if re.match(r"make [a-z]+\b", line)}
    assert named <= targets


def test_the_documents_name_commands() -> None:
    """Or the tests below would pass by finding nothing."""
    programs = {command.program for command in COMMANDS}
    assert {"launchers/train.py", "dist_proxygml.shard"} <= programs


@pytest.mark.parametrize("command", COMMANDS, ids=lambda c: f"{c.document}: {c.line}")
def test_every_command_is_there_and_takes_its_options(
    command: Command, helps: dict[str, tuple[int | str, str]]
) -> None:
    ending, text = helps[" ".join(command.words)]
    assert ending == 0, text
    known = set(re.findall(r"(?<![\w-])--[a-z][\w-]*", text))
    assert {word.partition("=")[0] for word in command.arguments if word.startswith("--")} <= known


@pytest.mark.parametrize("command", [c for c in COMMANDS if "--config" in c.arguments], ids=lambda c: c.line)
def test_every_command_gives_a_valid_configuration(command: Command) -> None:
    values: dict[str, list[str]] = {}
    option = ""
    for word in command.arguments:
        if word.startswith("--"):
            option = word
        else:
            values.setdefault(option, []).append(word)
    (path,) = values["--config"]
    path = "configs/imagefolder_1gpu.json" if path in WRITTEN else path
    load_config(ROOT / path if Path(path).suffix else path, values.get("--set", []))  # one of the package's by its name


@pytest.mark.parametrize("name", ["docs/heads.md", "docs/coming_from_pml.md", "docs/coming_from_partialfc.md"])
def test_every_head_in_a_table_is_a_valid_configuration(name: str) -> None:
    heads = [line.split() for line in command_lines(ROOT / name) if re.match(r"(proxies|loss)\.\w[\w.]*=", line)]
    assert len(heads) >= 4
    for settings in heads:
        config = load_config(ROOT / "configs" / "demo_cpu.json", ["data.num_classes=5000", "proxies={}", *settings])
        plan_head(config, world_size=1)
    for block in blocks(ROOT / name, "json"):
        plan_head(
            load_config(
                ROOT / "configs" / "demo_cpu.json", ["proxies={}", f"loss={json.dumps(json.loads(block)['loss'])}"]
            ),
            world_size=1,
        )


@pytest.mark.parametrize("name", [name for name in NAMES if blocks(ROOT / name, "python")])
def test_the_python_examples_run(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One after the other, as a reader would; what needs ranks has a test of its own."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "shards").symlink_to(ROOT / "shards")
    names: dict[str, object] = {}
    for block in blocks(ROOT / name, "python"):
        if "init_process_group" not in block:
            exec(compile(block, name, "exec"), names)


def test_the_readme_s_loop_trains_under_torchrun_and_continues_on_another_number_of_ranks(tmp_path: Path) -> None:
    (block,) = (block for block in blocks(ROOT / "README.md", "python") if "init_process_group" in block)
    (tmp_path / "own_loop.py").write_text(block)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node"]
    variables = os.environ | {"PYTHONPATH": str(ROOT), "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    steps, banks = [], []
    for num_ranks in ("2", "1"):
        command = [*launcher, num_ranks, "own_loop.py"]
        done = subprocess.run(command, cwd=tmp_path, env=variables, capture_output=True, text=True, timeout=180)
        assert done.returncode == 0, done.stderr
        saved = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
        steps += [int(saved["loss"]["optimizer.step"]), int(saved["optimizer"]["state"][0]["step"])]
        banks.append(saved["loss"]["proxies"])
    assert steps == [20, 20, 40, 40]
    assert banks[0].shape == banks[1].shape == (1000, 4, 128)
    assert not torch.equal(banks[0], banks[1])


def test_ci_runs_the_command_that_the_readme_gives_for_the_tests() -> None:
    assert "`make test`" in (ROOT / "README.md").read_text()
    assert re.search(r"^make test\b", (ROOT / ".ci" / "run").read_text(), flags=re.MULTILINE)
