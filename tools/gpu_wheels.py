"""Collect the wheels that tools/gpu_acceptance.py needs on a machine without a network.

    python tools/gpu_wheels.py --python 3.12 --out build/gpu-wheels        (make gpu-wheels)

What dist_proxygml depends on, with pytest, in the versions that are installed here, but for torch and what comes with
it, and for what is large and expected there (ON_THE_MACHINE). faiss is the one for CPUs: 20 MB instead of 200, so faiss
on the GPU is not tested from such a folder. For Linux on x86-64. DeepSpeed has no wheel on PyPI: a pure one is built.
"""

import argparse
import importlib.metadata
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[1]
ON_THE_MACHINE = ("torch", "torchvision", "numpy", "pillow", "scipy", "scikit-learn", "matplotlib", "setuptools")
# Not needed: it is replaced by faiss-cpu; only the server of TensorBoard starts it.
LEFT_OUT = ("faiss-gpu", "tensorboard-data-server")
ADDED = ("faiss-cpu", "pytest", "pytest-timeout")
BUILT = ("deepspeed",)
PLATFORMS = [f"manylinux_2_{minor}_x86_64" for minor in (34, 31, 28, 27, 24, 17, 12, 5)]
PLATFORMS += ["manylinux2014_x86_64", "manylinux2010_x86_64", "manylinux1_x86_64"]


def normalised(name: str) -> str:
    """A package's name as PyPI compares it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def needed() -> dict[str, str]:
    """Names and versions of what dist_proxygml needs, and what that needs, that is not on the machine."""
    pins = dict(re.findall(r"^([\w.-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(), flags=re.MULTILINE))
    pinned = {normalised(name): version for name, version in pins.items()}
    found: dict[str, str] = {}
    own = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    waiting = [*ADDED, *applying(own)]
    while waiting:
        name = normalised(waiting.pop())
        if name in found or name in ON_THE_MACHINE or name in LEFT_OUT:
            continue
        found[name] = pinned[name] if name in pinned else importlib.metadata.version(name)
        if name != "faiss-cpu":  # which is not installed beside faiss-gpu, and needs numpy and packaging
            waiting += applying(importlib.metadata.requires(name) or [])
    return found


def applying(requirements: list[str]) -> list[str]:
    """Names of the requirements that hold here, without extras."""
    parsed = map(Requirement, requirements)
    return [needs.name for needs in parsed if needs.marker is None or needs.marker.evaluate({"extra": ""})]


def main() -> None:
    """Download, build, and say how large the folder is."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", default="3.12", help="of the machine (default: 3.12)")
    parser.add_argument("--out", type=Path, default=Path("build/gpu-wheels"))
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    for path in given.out.glob("*.whl"):  # two versions of a package would stop pip
        path.unlink()
    packages = needed()
    exact = [f"{name}=={version}" for name, version in packages.items() if name not in BUILT]
    built = [f"{name}=={packages[name]}" for name in BUILT]
    platforms = [option for name in PLATFORMS for option in ("--platform", name)]
    pip = [sys.executable, "-m", "pip"]
    options = ["--quiet", "--no-deps", "--only-binary=:all:", "--python-version", given.python, *platforms]
    subprocess.run([*pip, "download", *options, "--dest", str(given.out), *exact], check=True)
    environment = os.environ | {"DS_BUILD_OPS": "0"}
    wheel = [*pip, "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", str(given.out), *built]
    subprocess.run(wheel, check=True, env=environment)
    wheels = list(given.out.glob("*.whl"))
    size = sum(path.stat().st_size for path in wheels) / 2**20
    print(f"{len(wheels)} wheels, {size:.1f} MiB in {given.out}; expected there: {', '.join(ON_THE_MACHINE)}")


if __name__ == "__main__":
    main()
