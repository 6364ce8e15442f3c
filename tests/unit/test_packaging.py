"""What pip installs: one faiss, ranges that hold the tested versions, and a wheel that is complete on its own."""

import email
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

import dist_proxygml

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
    result = subprocess.run(command, cwd=source, capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 0, result.stderr
    (built,) = (source / "dist").glob("*.whl")
    return built


def test_the_wheel_holds_every_file_of_the_package_and_nothing_else(wheel: Path) -> None:
    files = {
        str(path.relative_to(ROOT))
        for path in (ROOT / "dist_proxygml").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert {Path(name).suffix for name in files} >= {".py", ".css", ".typed"}
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


def test_the_installed_wheel_runs_outside_of_the_checkout(wheel: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:  # what pip does with a wheel of pure Python
        archive.extractall(tmp_path / "site")
    program = """
import json, dist_proxygml
from dist_proxygml import doctor
print(json.dumps([dist_proxygml.__file__, [f.text for f in doctor.check_python()], len(list(doctor.check_packages()))]))
"""
    result = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": "site"},
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    file, pythons, num_findings = json.loads(result.stdout)
    assert Path(file).resolve().is_relative_to(tmp_path)
    assert pythons[0].startswith(".".join(map(str, sys.version_info[:2])))
    assert num_findings >= 1
