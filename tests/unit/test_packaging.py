"""What pip installs: one faiss, ranges that hold the tested versions, and a wheel that is complete on its own."""

import email
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import venv
import zipfile
from collections.abc import Sequence
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

import dist_proxygml
from tests.harness import free_port

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
NEEDED = [Requirement(text) for text in PROJECT["dependencies"]]
EXTRA = [Requirement(text) for texts in PROJECT["optional-dependencies"].values() for text in texts]


@pytest.mark.parametrize(
    ("system", "machine", "expected"),
    [("linux", "x86_64", "faiss-gpu"), ("linux", "aarch64", "faiss-cpu"), ("darwin", "arm64", "faiss-cpu")],
)
def test_each_machine_gets_one_faiss(system: str, machine: str, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from dist_proxygml.evaluation import search

    environment = {"sys_platform": system, "platform_machine": machine}
    wanted = [requirement for requirement in NEEDED if requirement.name.startswith("faiss")]
    assert [r.name for r in wanted if r.marker is None or r.marker.evaluate(environment)] == [expected]
    monkeypatch.setattr(search.sys, "platform", system)
    monkeypatch.setattr(search.platform, "machine", lambda: machine)
    assert search.preferred_faiss() == expected


def test_the_tested_versions_lie_in_the_ranges() -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    tested = {line.partition("==")[0].lower(): line.partition("==")[2] for line in lines if "==" in line}
    unnamed = {requirement.name for requirement in [*NEEDED, *EXTRA] if requirement.name.lower() not in tested}
    outside = [str(r) for r in [*NEEDED, *EXTRA] if not r.specifier.contains(tested.get(r.name.lower(), "0"))]
    # pip knows a name by several spellings
    assert (unnamed, outside) == ({"resvg-py"}, ["resvg-py==0.5.0"])
    assert tested["resvg_py"] == "0.5.0"


def test_the_classifiers_name_the_versions_of_python_that_are_allowed() -> None:
    named = re.findall(r"Python :: (3\.\d+)", " ".join(PROJECT["classifiers"]))
    allowed = SpecifierSet(PROJECT["requires-python"])
    assert named == [f"3.{minor}" for minor in range(30) if allowed.contains(f"3.{minor}.1")]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built without network from a copy: building leaves folders in the source."""
    pytest.importorskip("setuptools", minversion="77")
    source = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    shutil.copytree(ROOT / "dist_proxygml", source / "dist_proxygml", ignore=shutil.ignore_patterns("__pycache__"))
    # Folders that a checkout has beside the package, and that must not be installed.
    for name in ("launchers", "tests"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__", "golden"))
    command = [sys.executable, "-m", "pip", "wheel", ".", "--no-deps", "--no-build-isolation", "--quiet", "-w", "dist"]
    result = subprocess.run(command, cwd=source, capture_output=True, text=True, timeout=180, check=False)
    assert result.returncode == 0, result.stderr
    (built,) = (source / "dist").glob("*.whl")
    return built


def test_the_wheel_holds_every_file_of_the_package_and_nothing_else(wheel: Path) -> None:
    files = {
        str(path.relative_to(ROOT))
        for path in (ROOT / "dist_proxygml").rglob("*")
        if path.is_file() and not {"__pycache__", "configs"} & set(path.parts)
    }
    files |= {f"dist_proxygml/{path.relative_to(ROOT)}" for path in (ROOT / "configs").rglob("*.json")}
    assert {Path(name).suffix for name in files} >= {".py", ".css", ".typed", ".json"}
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    assert {name for name in names if ".dist-info/" not in name} == files


def test_the_version_stands_in_one_place(wheel: Path) -> None:
    assert "version" not in PROJECT
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        metadata = email.message_from_bytes(archive.read(name))
    assert (metadata["Name"], metadata["Version"]) == ("dist_proxygml", dist_proxygml.__version__)
    assert metadata["Requires-Python"] is not None


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of a fresh environment with the wheel in it. Its dependencies, gigabytes, are those of this one."""
    folder = tmp_path_factory.mktemp("installed")
    venv.create(folder / "venv", with_pip=False, symlinks=True)
    python = folder / "venv" / "bin" / "python"
    (site,) = (folder / "venv" / "lib").glob("python*/site-packages")
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(site), str(wheel)], check=True
    )
    # Appended, so that the wheel comes first; the .pth files there, an editable installation's above all, do not count.
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return python


def run_outside(
    python: Path, *arguments: str, cwd: Path, launcher: Sequence[str] = (), **variables: str
) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | variables
    environment["PATH"] = f"{python.parent}:{Path(sys.executable).parent}:{environment['PATH']}"  # ninja, deepspeed
    return subprocess.run(
        [str(python), *launcher, *arguments],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


def test_the_installed_wheel_checks_the_machine(installed: Path, tmp_path: Path) -> None:
    program = """
import json, dist_proxygml
from dist_proxygml import doctor
print(json.dumps([dist_proxygml.__file__, [f.text for f in doctor.check_python()], len(list(doctor.check_packages()))]))
"""
    done = run_outside(installed, "-c", program, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    file, pythons, num_findings = json.loads(done.stdout)
    assert Path(file).is_relative_to(installed.parents[1])
    assert pythons[0].startswith(".".join(map(str, sys.version_info[:2])))
    assert num_findings >= 1


@pytest.mark.parametrize(
    "launcher",
    [
        pytest.param(
            ("-m", "deepspeed.launcher.runner", "--num_gpus", "2", "--module", "dist_proxygml.train"),
            marks=pytest.mark.ci,
            id="deepspeed",
        ),
        pytest.param(
            ("-m", "torch.distributed.run", "--nproc_per_node", "2", "-m", "dist_proxygml.train"), id="torchrun"
        ),
    ],
)
def test_the_installed_wheel_trains_in_an_empty_folder(
    launcher: tuple[str, ...], installed: Path, tmp_path: Path
) -> None:
    port = free_port()
    launcher = (*launcher[:2], f"--master_port={port}", *launcher[2:])
    settings = [f"data.shards={ROOT / 'shards' / 'demo'}", "training.max_steps=5", "evaluation.at_start=false"]
    settings += ["evaluation.raw_pixels=false", "backbone.options.width=4", "telemetry.progress_bar=false"]
    done = run_outside(
        installed, "--config", "demo_cpu", "--set", *settings, cwd=tmp_path, launcher=launcher, OMP_NUM_THREADS="1"
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Recall@1" in done.stdout
    assert (tmp_path / "runs" / "demo_cpu" / "report.html").is_file()
