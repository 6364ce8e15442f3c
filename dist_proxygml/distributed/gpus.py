"""The GPU of a rank: which one is its own, whether and how torch computes on it, and threads that stay on it.

torch reports no GPU where the driver is too old for the CUDA that it was built for, and one that it was not built for
as usable until the first kernel fails. A run would then train on CPUs, or start and fail; both are refused here, before
a rank waits for another. Whoever wants CPUs beside GPUs says so: CUDA_VISIBLE_DEVICES empty.

A launcher shows a rank all GPUs of its host, and the rank takes the one of its local number; or it shows each rank one
(srun --gpus-per-task, --gpu-bind=single), which is then number 0. Both look alike to a rank when too many are started
on a host with one GPU, so the ranks compare the GPUs' unique numbers, through the rendezvous store: NCCL itself cannot
be asked, it fails on two ranks of one GPU.

Sources: NVIDIA, CUDA Compatibility (minor versions; binaries run on the same major compute capability from their minor
one on, PTX on any later one); torch's lists of what its wheels are built for.
"""

import contextlib
import os
import re
import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from dist_proxygml.cli import said_by
from dist_proxygml.config import TrainingConfig

# First driver series that runs programs of a CUDA major version.
_DRIVERS = {11: 450, 12: 525, 13: 580}
WHEELS = (
    "a torch built for an older CUDA, for drivers from 525 and GPUs from Maxwell to Hopper: `pip install torch "
    "torchvision --index-url https://download.pytorch.org/whl/cu126` (docs/gpu.md)"
)
_ON_CPUS = "set CUDA_VISIBLE_DEVICES to empty to compute on CPUs"


def local_gpu(local_rank: int) -> int:
    """Return the number of the GPU of a rank among those that this process sees.

    Raises:
        ValueError: the rank has none.
    """
    num_visible = torch.cuda.device_count()
    if local_rank < num_visible:
        return local_rank
    if num_visible == 1:  # each rank sees its own, or too many share one: `shared_gpus` tells
        return 0
    raise ValueError(
        f"local rank {local_rank} has no GPU: expected at least {local_rank + 1} on this host, or one for each rank, "
        f"found {num_visible}; start fewer ranks per host"
    )


def shared_gpus(own: Sequence[tuple[str, str]]) -> str | None:
    """Describe the first GPU that several ranks would use, given each rank's host and its GPU's unique number."""
    for gpu in own:
        ranks = [rank for rank, other in enumerate(own) if other == gpu]
        if len(ranks) > 1:
            return (
                f"expected a GPU for each rank, got ranks {', '.join(map(str, ranks))} on the same GPU of {gpu[0]} "
                f"({gpu[1]}); start as many ranks per host as it has GPUs, or let the launcher show each its own "
                "(srun --gpus-per-task=1)"
            )
    return None


def hides_gpus(environment: Mapping[str, str]) -> bool:
    """Whether an environment says that GPUs are not to be used. SLURM says NoDevFiles to jobs without."""
    shown = environment.get("CUDA_VISIBLE_DEVICES")
    return shown in ("", "-1", "NoDevFiles") or environment.get("DS_ACCELERATOR") == "cpu"


def signs_of_gpus(environment: Mapping[str, str], devices: Path = Path("/dev")) -> str | None:
    """Say by what one knows that this process has GPUs, whether torch sees them or not; None if nothing says so."""
    # DeepSpeed's launcher, which CROSS_SIZE shows, numbers CPU ranks by this variable too.
    if environment.get("CUDA_VISIBLE_DEVICES") and "CROSS_SIZE" not in environment:
        return f"CUDA_VISIBLE_DEVICES is {environment['CUDA_VISIBLE_DEVICES']}"
    for name in ("SLURM_STEP_GPUS", "SLURM_JOB_GPUS", "SLURM_GPUS_ON_NODE"):
        if environment.get(name, "0") not in ("", "0"):
            return f"{name} is {environment[name]}"
    files = sorted(path for path in devices.glob("nvidia[0-9]*") if os.access(path, os.R_OK | os.W_OK))
    if files:
        return f"there is {files[0]}"
    found = said_by("nvidia-smi", "--list-gpus")
    return f"nvidia-smi lists {found.splitlines()[0]}" if found and found.startswith("GPU ") else None


def check_gpus(environment: Mapping[str, str], *, are_needed: bool = False, instead: str = _ON_CPUS) -> None:
    """Refuse to leave GPUs unused that are there, or that were asked for.

    Args:
        environment: of this process.
        are_needed: GPUs were asked for.
        instead: how to compute on CPUs.

    Raises:
        ValueError: torch sees no GPU, and there are some, or `are_needed`; or one that it was not built for.
    """
    if torch.cuda.is_available():
        for number in range(torch.cuda.device_count()):
            if problem := unsupported(torch.cuda.get_device_capability(number), torch.cuda.get_arch_list()):
                raise ValueError(
                    f"expected a GPU that this torch is built for, got {torch.cuda.get_device_name(number)}: "
                    f"{problem}; install {WHEELS}, or {instead}"
                )
        return
    sign = None if hides_gpus(environment) and not are_needed else signs_of_gpus(environment)
    if sign is None and not are_needed:
        return
    there = " and ".join(filter(None, ("GPUs were asked for" if are_needed else None, sign)))
    raise ValueError(
        f"expected GPUs that torch can use, got none: {there}, but torch {torch.__version__} sees none; "
        f"{why_unusable() or 'see what `python -m dist_proxygml.doctor` says on that machine'}, or {instead}"
    )


def why_unusable(driver: str | None = None) -> str | None:
    """Say why torch sees no GPU, with the remedy, as far as versions tell. `driver` is asked for if it is not given."""
    if torch.version.cuda is None:
        return "this torch is built for CPUs: `pip install torch torchvision` of a build for GPUs"
    driver = driver or said_by("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    if driver is None:
        return None
    series, needed = int(driver.split(".")[0]), _DRIVERS.get(int(torch.version.cuda.split(".")[0]), 0)
    if series >= needed:
        return None
    return (
        f"the driver {driver.split()[0]} is too old for CUDA {torch.version.cuda}, which this torch is built for: "
        f"update it to {needed} or newer, or install {WHEELS}"
    )


def unsupported(capability: tuple[int, int], built_for: Collection[str]) -> str | None:
    """Say that code built for some architectures ("sm_90", "sm_90a", "compute_120") does not run on a GPU of this
    compute capability; None if it does, or if the list says nothing.
    """
    known = [re.fullmatch(r"(sm|compute)_(\d+)(\d)([af]?)", name) for name in built_for]
    runs = []
    for match in filter(None, known):
        kind, built, suffix = match[1], (int(match[2]), int(match[3])), match[4]
        if suffix == "a":
            runs.append(built == capability)
        elif kind == "compute":
            runs.append(built <= capability)
        else:
            runs.append(built[0] == capability[0] and built[1] <= capability[1])
    if not runs or any(runs):
        return None
    return f"compute capability {capability[0]}.{capability[1]} is not among {', '.join(built_for)}"


# ---- arithmetic ------------------------------------------------------------------------------------------------------


def set_arithmetic(config: TrainingConfig, device: torch.device) -> None:
    """Set how torch computes on GPUs in this process, before the first product; nothing on a CPU.

    With `deterministic`, torch warns by name of an operator whose sums have no fixed order.
    """
    if device.type != "cuda":
        return
    torch.set_float32_matmul_precision(config.float32_matmul)
    torch.backends.cudnn.benchmark = config.cudnn_benchmark
    if config.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # or cuBLAS's sums depend on its streams
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # nothing reads it


@contextlib.contextmanager
def exact_products() -> Iterator[None]:
    """Products of float32 in float32 proper, without TF32, whatever is set around. The setting is the process's, so it
    holds for the backward passes that run inside too.
    """
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


# ---- threads ---------------------------------------------------------------------------------------------------------


def start_thread(name: str, function: Callable[..., object], *args: object) -> threading.Thread:
    """Start a daemon thread on this thread's GPU.

    A new thread's GPU is number 0, whatever its process uses: the first call that touches it would put a context of
    every rank, several hundred MiB each, into the memory of rank 0's.
    """
    stay = _staying()

    def run() -> None:
        stay()
        function(*args)

    thread = threading.Thread(target=run, name=name, daemon=True)
    thread.start()
    return thread


def thread_pool(num_threads: int) -> ThreadPoolExecutor:
    """Threads on this thread's GPU, as `start_thread` starts one."""
    return ThreadPoolExecutor(num_threads, initializer=_staying())


def _staying() -> Callable[[], None]:
    """What a new thread calls to use this thread's GPU."""
    if not torch.cuda.is_initialized():  # also where there is none
        return lambda: None
    device = torch.cuda.current_device()
    return lambda: torch.cuda.set_device(device)
