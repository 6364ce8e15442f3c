"""Which GPU a rank takes, which are refused, and whose GPU a thread uses. Torch's answers are given: no GPU needed."""

import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dist_proxygml.checkpoint.bank_storage import BankWriter
from dist_proxygml.config import TrainingConfig
from dist_proxygml.distributed import gpus, parallel
from dist_proxygml.distributed.gpus import (
    check_gpus,
    hides_gpus,
    local_gpu,
    shared_gpus,
    signs_of_gpus,
    start_thread,
    thread_pool,
    unsupported,
    why_unusable,
)
from dist_proxygml.distributed.parallel import OneRankError, ParallelContext, fair_threads, join_world
from dist_proxygml.inference.embedder import choose_device
from dist_proxygml.training.presets import find_machine
from tests.harness import run_ranks

OF_CUDA_13 = ["sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120"]


def machine(
    monkeypatch: pytest.MonkeyPatch,
    *,
    num_seen: int = 0,
    driver: str | None = None,
    cuda: str | None = "13.0",
    capability: tuple[int, int] = (9, 0),
) -> None:
    """Pretend that torch sees so many GPUs, and that nvidia-smi knows of this driver."""
    said = {"--list-gpus": "GPU 0: Tesla V100 (UUID: GPU-1)", "--query-gpu=driver_version": driver}
    monkeypatch.setattr(gpus, "said_by", lambda program, what, *_: said[what] if driver else None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: num_seen > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: num_seen)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda number: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda number: "a GPU")
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: OF_CUDA_13 if num_seen else [])
    monkeypatch.setattr(torch.version, "cuda", cuda)
    for name in ("CUDA_VISIBLE_DEVICES", "SLURM_STEP_GPUS", "SLURM_JOB_GPUS", "SLURM_GPUS_ON_NODE", "DS_ACCELERATOR"):
        monkeypatch.delenv(name, raising=False)


# ---- GPUs that torch cannot use --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("capability", "built_for", "runs"),
    [
        ((7, 0), OF_CUDA_13, False),  # V100
        ((7, 5), OF_CUDA_13, True),
        ((8, 9), OF_CUDA_13, True),  # the binary of 8.6
        ((10, 3), OF_CUDA_13, True),
        ((11, 0), OF_CUDA_13, False),
        ((12, 1), OF_CUDA_13, True),
        ((8, 0), ["sm_86"], False),  # not from a later minor one
        ((9, 0), ["sm_90a"], True),
        ((9, 1), ["sm_90a"], False),  # that very architecture
        ((10, 3), ["sm_100f"], True),  # its family
        ((13, 0), ["sm_75", "compute_120"], True),  # compiled by the driver
        ((7, 0), ["compute_75"], False),
        ((9, 0), [], True),  # nothing is known
        ((9, 4), ["gfx90a", "gfx942"], True),  # not NVIDIA's
    ],
)
def test_a_gpu_runs_what_was_built_for_it(capability: tuple[int, int], built_for: list[str], runs: bool) -> None:
    assert (unsupported(capability, built_for) is None) == runs


@pytest.mark.parametrize(
    ("cuda", "driver", "expected"),
    [
        ("13.0", "535.104.05", "too old"),
        ("13.0", "580.65.06", None),
        ("12.6", "525.60.13", None),
        ("12.6", "470.82.01", "too old"),
        (None, "580.65.06", "for CPUs"),
        ("13.0", None, None),
    ],
)
def test_a_driver_is_compared_with_the_cuda_of_torch(
    cuda: str | None, driver: str | None, expected: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine(monkeypatch, driver=driver, cuda=cuda)
    found = why_unusable()
    assert found is None if expected is None else expected in str(found)


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"CUDA_VISIBLE_DEVICES": "0,1"}, "CUDA_VISIBLE_DEVICES"),
        ({"CUDA_VISIBLE_DEVICES": "0,1", "CROSS_SIZE": "1"}, None),  # deepspeed numbers CPU ranks so
        ({"SLURM_JOB_GPUS": "0,3"}, "SLURM_JOB_GPUS"),
        ({"SLURM_STEP_GPUS": "2"}, "SLURM_STEP_GPUS"),
        ({"SLURM_GPUS_ON_NODE": "8"}, "SLURM_GPUS_ON_NODE"),
        ({"SLURM_GPUS_ON_NODE": "0", "SLURM_JOB_GPUS": ""}, None),
        ({}, None),
    ],
)
def test_variables_tell_of_gpus(
    environment: dict[str, str], expected: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine(monkeypatch)
    found = signs_of_gpus(environment, tmp_path)
    assert found is None if expected is None else str(found).startswith(expected)


def test_device_files_and_nvidia_smi_tell_of_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch)
    (tmp_path / "nvidiactl").touch()
    assert signs_of_gpus({}, tmp_path) is None
    (tmp_path / "nvidia1").touch()
    assert signs_of_gpus({}, tmp_path) == f"there is {tmp_path}/nvidia1"
    monkeypatch.setattr("os.access", lambda path, mode: False)  # the job may not open it
    assert signs_of_gpus({}, tmp_path) is None
    machine(monkeypatch, driver="535.1")
    assert "Tesla V100" in str(signs_of_gpus({}, tmp_path))


def test_unusable_gpus_are_refused_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch)
    check_gpus({})  # a machine without GPUs
    with pytest.raises(ValueError, match="asked for"):
        check_gpus({}, are_needed=True)
    machine(monkeypatch, driver="535.104.05")
    with pytest.raises(ValueError, match=r"535\.104\.05.*580 or newer.*cu126.*CUDA_VISIBLE_DEVICES"):
        check_gpus({})
    for hidden in ("", "-1", "NoDevFiles"):
        assert hides_gpus({"CUDA_VISIBLE_DEVICES": hidden})
        check_gpus({"CUDA_VISIBLE_DEVICES": hidden})
        with pytest.raises(ValueError, match="asked for"):
            check_gpus({"CUDA_VISIBLE_DEVICES": hidden}, are_needed=True)
    machine(monkeypatch, num_seen=1, capability=(7, 0))
    with pytest.raises(ValueError, match=r"7\.0 is not among sm_75.*cu126"):
        check_gpus({})
    machine(monkeypatch, num_seen=1)
    check_gpus({}, are_needed=True)


@pytest.mark.parametrize("device", ["auto", "cuda"])
def test_no_command_takes_the_cpu_beside_gpus_unasked(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch, driver="535.104.05")
    with pytest.raises(OneRankError, match=r"535\.104\.05.*rank 0"):
        join_world(device=device)
    with pytest.raises(ValueError, match="cpu"):
        choose_device("auto")
    with pytest.raises(ValueError, match="--device cpu"):
        find_machine("auto")
    assert choose_device("cpu") == torch.device("cpu")
    assert find_machine("cpu").device == "cpu"


# ---- the GPU of a rank -----------------------------------------------------------------------------------------------


def test_a_rank_takes_the_gpu_of_its_number_or_the_only_one(monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch, num_seen=8)
    assert [local_gpu(rank) for rank in range(8)] == list(range(8))
    with pytest.raises(ValueError, match="at least 9 on this host, or one for each rank, found 8"):
        local_gpu(8)
    machine(monkeypatch, num_seen=1)  # srun --gpus-per-task=1
    assert [local_gpu(rank) for rank in range(8)] == [0] * 8


def test_ranks_of_one_gpu_are_named() -> None:
    assert shared_gpus([("a", "1"), ("a", "2"), ("b", "1"), ("b", "2")]) is None
    found = shared_gpus([("a", "1"), ("b", "2"), ("b", "1"), ("b", "2")])
    assert found is not None
    assert "ranks 1, 3 on the same GPU of b (2)" in found


def meet(context: ParallelContext, numbers: list[str]) -> str:
    torch.cuda.get_device_properties = lambda device: SimpleNamespace(uuid=numbers[context.rank])  # type: ignore
    try:
        parallel._meet_neighbours(context.rank, context.world_size, torch.device("cuda", 0))
    except ValueError as error:
        return str(error)
    return "met"


def test_all_ranks_refuse_a_shared_gpu_before_nccl_is_used() -> None:
    told = run_ranks(meet, 2, ["GPU-1", "GPU-1"])
    assert told[0] == told[1]
    assert "ranks 0, 1 on the same GPU" in told[0]
    assert run_ranks(meet, 2, ["GPU-1", "GPU-2"]) == ["met", "met"]


def test_a_bound_rank_joins_with_gpu_0_and_tells_deepspeed_so(monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch, num_seen=1)
    monkeypatch.setenv("LOCAL_RANK", "3")
    taken: list[Any] = []
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)

    def joined(backend: str, **_: object) -> None:
        assert backend == "nccl"
        assert parallel.os.environ["LOCAL_RANK"] == "0"
        raise InterruptedError

    monkeypatch.setattr(parallel.dist, "init_process_group", joined)
    with pytest.raises(InterruptedError):
        join_world()
    assert taken == [torch.device("cuda", 0)]


def test_cores_are_shared_by_those_who_may_use_them() -> None:
    assert fair_threads(range(16), [range(16)] * 8) == 2
    assert fair_threads(range(2), [range(2)] * 3) == 1
    assert fair_threads(range(4, 8), [range(4), range(4, 8)]) == 4  # bound by SLURM
    assert fair_threads([0, 1, 2, 3], [[0, 1, 2, 3], [2, 3, 4, 5]]) == 3


# ---- arithmetic ------------------------------------------------------------------------------------------------------


def test_arithmetic_is_set_on_gpus_and_left_alone_on_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    fast = TrainingConfig(epochs=1, batch_size=1, float32_matmul="high", cudnn_benchmark=True)
    try:
        gpus.set_arithmetic(fast, torch.device("cpu"))
        assert (torch.get_float32_matmul_precision(), torch.backends.cudnn.benchmark) == ("highest", False)
        gpus.set_arithmetic(fast, torch.device("cuda", 0))
        assert (torch.get_float32_matmul_precision(), torch.backends.cudnn.benchmark) == ("high", True)
        assert not torch.are_deterministic_algorithms_enabled()
        with gpus.exact_products():
            assert torch.get_float32_matmul_precision() == "highest"
        assert torch.get_float32_matmul_precision() == "high"
        gpus.set_arithmetic(TrainingConfig(epochs=1, batch_size=1, deterministic=True), torch.device("cuda", 0))
        assert (torch.get_float32_matmul_precision(), torch.backends.cudnn.benchmark) == ("highest", False)
        assert torch.are_deterministic_algorithms_enabled()
        assert torch.is_deterministic_algorithms_warn_only_enabled()
        assert gpus.os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    finally:
        gpus.os.environ.pop("CUBLAS_WORKSPACE_CONFIG", None)
        torch.use_deterministic_algorithms(False)
        torch.set_float32_matmul_precision("highest")


def test_a_fixed_order_of_sums_excludes_algorithms_chosen_by_time() -> None:
    with pytest.raises(ValueError, match="cudnn_benchmark"):
        TrainingConfig(epochs=1, batch_size=1, deterministic=True, cudnn_benchmark=True)


# ---- threads ---------------------------------------------------------------------------------------------------------


def test_threads_use_the_gpu_of_who_started_them(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[int] = []
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 5)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    start_thread("one", taken.append, -1).join()
    assert taken == [5, -1]  # before it does anything else
    with thread_pool(1) as threads:
        threads.submit(taken.append, -2).result()
    assert taken == [5, -1, 5, -2]
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    start_thread("two", taken.append, -3).join()
    assert taken[-2:] == [-2, -3]


def test_a_bank_on_gpus_is_written_by_the_thread_that_saves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 7)
    assert BankWriter(tmp_path).thread_count == 7
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    assert BankWriter(tmp_path).thread_count == 1


# Threads that never touch a tensor: files, signals, child processes.
OTHERS = {
    "data/builder.py",
    "data/remote.py",
    "distributed/gpus.py",
    "distributed/preemption.py",
    "distributed/watchdog.py",
    "storage/folder.py",
}


def test_every_thread_that_handles_tensors_stays_on_its_gpu() -> None:
    root = Path(gpus.__file__).parents[1]
    pattern = r"threading\.Thread(\|ThreadPoolExecutor("
    found = subprocess.run(
        ["grep", "-rl", "--include=*.py", pattern, "."], cwd=root, capture_output=True, text=True, check=True
    )
    assert {line.removeprefix("./") for line in found.stdout.splitlines()} == OTHERS
