"""The checks of tools/gpu_acceptance.py; one process runs one section.

    python -m tools.gpu_sections head --device cuda --out build/gpu-check

A check is a function that raises where something is wrong, `NotTested` where this machine cannot tell, and returns what
it measured. Limits and expected results are those of the tests: tests/problems.py for the loss, the tests of the
stand-in for launches and waits, benchmarks/head.py for times. With --device cpu what is written for "cuda" runs on the
stand-in (tests/gpu_stand_in.py), at sizes that take no time.
"""

import argparse
import contextlib
import json
import math
import os
import shutil
import socket
import subprocess
import sys
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from dist_proxygml.distributed.gpus import check_gpus

ROOT = Path(__file__).resolve().parents[1]
GIB = 1 << 30
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.int32)


class NotTested(Exception):  # noqa: N818 (no error)
    """This machine cannot tell."""


class Checks:
    """Runs the checks of a section and writes a line for each as it ends."""

    def __init__(self, name: str, device: str, out: Path) -> None:
        self.device, self.out = device, out
        self.is_tiny = device == "cpu"
        self._file = out / f"{name}.jsonl"

    def run(self, name: str, check: Callable[..., dict[str, Any] | None], *arguments: Any, **options: Any) -> None:
        """Run one; its error is this check's and ends no other."""
        print(f"---- {name}", flush=True)
        start, numbers = time.perf_counter(), {}
        try:
            numbers = check(*arguments, **options) or {}
            status, text = "passed", ", ".join(f"{key} {shown(value)}" for key, value in numbers.items())
        except NotTested as reason:
            status, text = "not tested", str(reason)
        except (Exception, SystemExit) as error:
            traceback.print_exc()
            status, text = "failed", f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        seconds = round(time.perf_counter() - start, 2)
        line = {"name": name, "status": status, "seconds": seconds, "text": text, "numbers": numbers}
        with open(self._file, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def need_gpus(self, number: int = 1) -> None:
        """Give up where there are not so many."""
        found = 0 if self.is_tiny else torch.cuda.device_count()
        if found < number:
            raise NotTested("no GPU" if not found else f"needs {number} GPUs, found {found}")

    def accelerator(self) -> contextlib.AbstractContextManager[Any]:
        """Where "cuda" is the GPU, or its stand-in."""
        if not self.is_tiny:
            return contextlib.nullcontext()
        from tests.gpu_stand_in import StandIn

        return StandIn()


def shown(value: Any) -> str:
    """A number for people."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def expect(condition: bool, message: str) -> None:
    """Fail with what was expected and got."""
    if not condition:
        raise AssertionError(message)


def run(*command: str, status: int = 0, **variables: str) -> str:
    """Run a command from the root; returns its output. Fails with its last lines where it ends with another status."""
    done = subprocess.run(command, cwd=ROOT, env=os.environ | variables, capture_output=True, text=True, check=False)
    print(done.stdout, done.stderr, sep="\n", flush=True)
    said = " | ".join((done.stdout + done.stderr).strip().splitlines()[-3:])
    expect(
        done.returncode == status, f"{' '.join(command[1:4])}: expected status {status}, got {done.returncode}: {said}"
    )
    return done.stdout


# ---- the machine -----------------------------------------------------------------------------------------------------


def machine(checks: Checks) -> None:
    """Driver, libraries, the doctor, a kernel."""
    checks.run("driver", driver, checks)
    checks.run("doctor", doctor)
    checks.run("a kernel", one_kernel, checks)


def driver(checks: Checks) -> dict[str, Any]:
    """What is here."""
    checks.need_gpus()
    gpu = torch.cuda.get_device_properties(0)
    return {
        "GPUs": torch.cuda.device_count(),
        "name": gpu.name,
        "GiB": round(gpu.total_memory / GIB, 1),
        "capability": f"{gpu.major}.{gpu.minor}",
        "torch": torch.__version__,
        "CUDA": torch.version.cuda,
        "cuDNN": torch.backends.cudnn.version(),
        "NCCL": ".".join(map(str, torch.cuda.nccl.version())),
    }


def doctor() -> dict[str, Any]:
    """No problem; what it warns of is in the log."""
    findings = json.loads(run(sys.executable, "-m", "dist_proxygml.doctor", "--json"))
    return dict(Counter(finding["status"] for finding in findings))


def one_kernel(checks: Checks) -> None:
    """Of proxies.fused."""
    checks.need_gpus()
    from dist_proxygml.training.checks import try_kernels

    try_kernels(torch.device("cuda", 0))


def tests(checks: Checks) -> None:
    """The project's own, and small kernels under NVIDIA's checkers."""
    checks.run("tests/gpu", gpu_tests, checks)
    checks.run("small kernels", kernels_in_a_process, checks)
    for tool in ("memcheck", "racecheck"):
        checks.run(f"compute-sanitizer {tool}", kernels_in_a_process, checks, tool)


def gpu_tests(checks: Checks) -> dict[str, Any]:
    """tests/gpu by pytest."""
    checks.need_gpus()
    said = run(sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/gpu")
    return {"pytest": said.strip().splitlines()[-1]}


def kernels_in_a_process(checks: Checks, tool: str | None = None) -> None:
    """`small_kernels` in a process of its own, in Triton's interpreter where there is no GPU."""
    sanitizer = None if tool is None else shutil.which("compute-sanitizer")
    if tool is not None:
        checks.need_gpus()
        if sanitizer is None:
            raise NotTested("compute-sanitizer is not installed")
    prefix = [] if sanitizer is None else [sanitizer, "--tool", str(tool), "--error-exitcode", "9"]
    code = f"from tools.gpu_sections import small_kernels; small_kernels({checks.device!r})"
    run(*prefix, sys.executable, "-c", code, **({"TRITON_INTERPRET": "1"} if checks.is_tiny else {}))


def small_kernels(device: str) -> None:
    """Each kernel of head/fused.py once, at odd sizes, against torch's operators."""
    from dist_proxygml.head import fused, similarity
    from dist_proxygml.head.bank import build_bank

    torch.manual_seed(0)
    for num_rows, num_proxies, dim in ((5, 77, 19),) if device == "cpu" else ((5, 77, 19), (33, 301, 70)):
        rows = F.normalize(torch.randn(num_rows, dim, device=device))
        bank = build_bank(torch.randn(num_proxies, dim, device=device))
        floor = torch.full((num_rows,), 0.05, device=device)
        excluded = torch.zeros(num_rows, 2, dtype=torch.int64, device=device)
        pairs = fused.pairs_above(
            rows, bank.proxies, bank.inverse_norm, floor, excluded, matmul_dtype=torch.float32, capacity=20_000
        )
        assert pairs is not None
        expected = (rows @ bank.proxies.T * bank.inverse_norm)[pairs.row, pairs.proxy]
        torch.testing.assert_close(pairs.similarity, expected, rtol=1e-4, atol=1e-5)
        weight = torch.randn(len(pairs.row), device=device)
        torch.testing.assert_close(
            fused.embedding_gradient(pairs, bank, weight, num_rows=num_rows),
            similarity.embedding_gradient(pairs, bank, weight, num_rows=num_rows),
            rtol=1e-4,
            atol=1e-4,
        )
        for found, twin in zip(
            fused.proxy_gradient(pairs, bank, rows, weight, touched_only=True),
            similarity.proxy_gradient(pairs, bank, rows, weight, touched_only=True),
            strict=True,
        ):
            torch.testing.assert_close(found, twin, rtol=1e-4, atol=1e-4)


# ---- the head --------------------------------------------------------------------------------------------------------


def head(checks: Checks) -> None:
    """Loss and gradients, against the dense definition and against the CPU."""
    from tests.problems import SELECTIONS, Task, random_problem, tied_problem
    from tests.unit.test_gpu_stand_in import HEADS

    problems = [
        random_problem(num_classes=7, proxies_per_class=2, topk=6),
        random_problem(num_classes=7, topk=7, scale=3.0),  # all proxies kept
        tied_problem(num_classes=7, proxies_per_class=3, topk=8),
    ]
    many = random_problem(num_classes=4099, topk=30)
    regularised = random_problem(num_classes=7, proxies_per_class=2, topk=6, regularization_weight=0.3)
    routes: list[dict[str, Any]] = [{}, {"memory_budget": 1}]
    cases = {
        f"selection by {selection}": [
            Task(problem, None, {"selection": selection} | route) for problem in problems for route in routes
        ]
        for selection in SELECTIONS
    }
    cases["sparse and dense gradients"] = [Task(many, None, {"sparse": sparse}) for sparse in (False, True)]
    cases["regulariser in full"] = [Task(regularised)]
    for name, tasks in cases.items():
        checks.run(name, against_the_oracle, checks, tasks)
    for name, (build, batch_size, *_) in HEADS.items():
        checks.run(f"{name}, against the CPU", against_the_cpu, checks, build, batch_size)
    for sparse in (False, True):
        checks.run(f"fused, {'sparse' if sparse else 'dense'}", fused_against_plain, checks, sparse=sparse)


def against_the_oracle(checks: Checks, tasks: Sequence[Any]) -> None:
    """In float64, by the tests' own tolerance."""
    from dist_proxygml.distributed.parallel import single_process
    from tests.problems import assert_agrees_with_the_oracle, outcomes_on_rank

    with checks.accelerator():
        outcomes = outcomes_on_rank(single_process(), tasks, device="cuda")
    for task, outcome in zip(tasks, outcomes, strict=True):
        assert_agrees_with_the_oracle([outcome], task.problem)


def against_the_cpu(checks: Checks, build: Callable[[], Any], batch_size: int) -> dict[str, Any]:
    """Loss, both gradients: in float64, but in float32 where products are in bfloat16, which CUDA has no others for."""
    is_rounded = build().matmul_dtype == torch.bfloat16
    dtype, limit = (torch.float32, 1e-2) if is_rounded else (torch.float64, 1e-9)
    results = [loss_and_gradients(build().to(dtype), batch_size, dtype)]
    with checks.accelerator():
        results.append(loss_and_gradients(build().to(dtype).to("cuda"), batch_size, dtype))
    worst = max(difference(found, expected) for expected, found in zip(*results, strict=True))
    expect(worst <= limit, f"expected a relative difference of at most {limit:g}, got {worst:g}")
    return {"difference": worst}


def fused_against_plain(checks: Checks, *, sparse: bool) -> dict[str, Any]:
    """The kernels against torch's operators on the same GPU; a proxy within rounding of the k-th may differ."""
    from dist_proxygml import ProxyGMLLoss

    checks.need_gpus()
    results = []
    for fused in (False, True):
        loss = ProxyGMLLoss(100_003, 128, topk=500, sparse=sparse, fused=fused).to("cuda")
        results.append(loss_and_gradients(loss, 64, torch.float32))
    expect(loss.searches.done > loss.searches.given_up, f"expected searches by the kernels, got {loss.searches}")
    worst = max(difference(found, expected) for expected, found in zip(*results, strict=True))
    expect(worst <= 1e-3, f"expected a relative difference of at most 0.001, got {worst:g}")
    return {"difference": worst}


def loss_and_gradients(loss: Any, batch_size: int, dtype: torch.dtype) -> list[Tensor]:
    """Total, gradient of the embeddings and of the proxies, on the CPU, of random rows and labels."""
    generator = torch.Generator().manual_seed(0)
    rows = F.normalize(torch.randn(batch_size, loss.embedding_dim, generator=generator, dtype=torch.float64)).to(dtype)
    labels = torch.randint(0, loss.num_classes, (batch_size,), generator=generator)
    embeddings = rows.to(loss.proxies.device, copy=True).requires_grad_()
    total = loss(embeddings, labels.to(loss.proxies.device)).total
    total.backward()
    return [total.detach().cpu(), embeddings.grad.cpu(), loss.proxies.grad.to_dense().cpu()]  # type: ignore[union-attr]


def difference(found: Tensor, expected: Tensor) -> float:
    """Length of the difference, over that of what is expected."""
    found, expected = found.double(), expected.double()
    return float((found - expected).norm() / expected.norm())


# ---- communication ---------------------------------------------------------------------------------------------------


def collectives(checks: Checks) -> None:
    """What is called on several ranks, on a world of one: NCCL takes the types, sizes and groups at all."""
    device = torch.device("cpu" if checks.is_tiny else "cuda:0")
    dist.init_process_group("gloo" if checks.is_tiny else "nccl", rank=0, world_size=1, store=dist.HashStore())
    for dtype in DTYPES:
        checks.run(f"collectives of {str(dtype).removeprefix('torch.')}", collectives_of, dtype, device)
    checks.run("objects and barrier", objects)
    checks.run("gloo beside it", gloo_beside)
    checks.run("a stored bank", stored_bank, checks.out / "bank", device)
    dist.destroy_process_group()


def collectives_of(dtype: torch.dtype, device: torch.device) -> None:
    """Those of distributed/collectives.py, past their short cut for a world of one, and DeepSpeed's."""
    from dist_proxygml.distributed.collectives import _AllReduceSum, _GatherRows

    group = dist.group.WORLD
    for num_rows in (0, 1, 7):
        rows = torch.arange(3 * num_rows, device=device).view(num_rows, 3).to(dtype)
        if dtype.is_floating_point:
            rows.requires_grad_()
        gathered = _GatherRows.apply(rows, (num_rows,), group)
        torch.testing.assert_close(gathered, rows)
        total = _AllReduceSum.apply(rows, group)
        torch.testing.assert_close(total, rows)
        if dtype.is_floating_point:
            (2 * gathered + total).sum().backward()
            torch.testing.assert_close(rows.grad, torch.full_like(rows, 3))
        value = rows.detach().clone()
        received = torch.empty_like(value.view(-1))
        dist.all_to_all_single(received, value.view(-1), [value.numel()], [value.numel()], group=group)
        dist.all_reduce(received, dist.ReduceOp.MAX, group=group)
        dist.broadcast(received, src=0, group=group)
        torch.testing.assert_close(received, value.view(-1))


def objects() -> None:
    """Gathered, and sent by rank 0."""
    values: list[Any] = [None]
    dist.all_gather_object(values, {"loss": math.pi})
    sent = [values[0]]
    dist.broadcast_object_list(sent, src=0)
    expect(sent == [{"loss": math.pi}], f"expected what was sent, got {sent}")
    dist.barrier()


def gloo_beside() -> None:
    """A group for tensors of the host, as background saves have one."""
    group = dist.new_group([0], backend="gloo")
    value = torch.arange(5.0)
    dist.all_reduce(value, group=group)
    torch.testing.assert_close(value, torch.arange(5.0))
    dist.destroy_process_group(group)


def stored_bank(folder: Path, device: torch.device) -> None:
    """Rows as a DTensor, saved and loaded by torch.distributed.checkpoint; also a rank without any."""
    import torch.distributed.checkpoint as dcp

    from dist_proxygml.checkpoint.bank_storage import BankReader, BankWriter
    from dist_proxygml.distributed.row_tensors import as_row_tensor

    for num_rows in (0, 11):
        shutil.rmtree(folder, ignore_errors=True)
        rows = torch.randn(num_rows, 2, 8, device=device)
        dcp.save({"proxies": as_row_tensor(rows, num_rows, dist.group.WORLD)}, storage_writer=BankWriter(folder))
        found = torch.zeros_like(rows)
        dcp.load({"proxies": as_row_tensor(found, num_rows, dist.group.WORLD)}, storage_reader=BankReader(folder))
        expect(torch.equal(found, rows), f"expected the {num_rows} rows that were saved, got others")


# ---- training --------------------------------------------------------------------------------------------------------


def settings_of(checks: Checks, name: str, num_steps: int, *changes: str) -> list[str]:
    """Of a short run of the demo."""
    return [
        f"runs_dir={json.dumps(str(checks.out / 'runs'))}",
        f"name={name}",
        f"data.shards={json.dumps(str(ROOT / 'shards/demo'))}",
        f"training.max_steps={num_steps}",
        f"checkpoint.every_steps={num_steps // 2}",
        "schedule.warmup_steps=0",
        "telemetry.log_every_steps=1",
        "telemetry.progress_bar=false",
        "evaluation.at_start=false",
        "evaluation.raw_pixels=false",
        "evaluation.every_epochs=0",
        "evaluation.kmeans_seeds=0",
        *changes,
    ]


def losses_of(folder: Path, num_steps: int) -> list[float]:
    """Of every step, finite."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    losses = {row["step"]: row["loss"] for row in rows if "loss" in row}
    expect(list(losses) == list(range(1, num_steps + 1)), f"expected {num_steps} steps, got {list(losses)}")
    expect(all(map(math.isfinite, losses.values())), f"expected finite losses, got {losses}")
    return list(losses.values())


def training(checks: Checks) -> None:
    """The demo: ways of DeepSpeed in this process, then the commands."""
    from dist_proxygml.distributed.parallel import join_world

    num_steps = 4 if checks.is_tiny else 60
    cases = {
        "ZeRO-0": [],
        "ZeRO-1": ["deepspeed.zero_optimization.stage=1"],
        "ZeRO-2": ["deepspeed.zero_optimization.stage=2"],
        "ZeRO-3": ["deepspeed.zero_optimization.stage=3"],
        "bf16": ["deepspeed.bf16.enabled=true"],
        "fp16": ["deepspeed.fp16.enabled=true", "deepspeed.zero_optimization.stage=1"],
        "saves-in-the-background": ["checkpoint.asynchronous=true"],
    }
    context = join_world(device=checks.device)
    first: list[float] = []
    for name, changes in cases.items():
        checks.run(name.replace("-", " "), one_run, checks, context, name, num_steps, changes, first)
    dist.destroy_process_group()
    checks.run("SIGTERM, resume", stop_and_resume, checks, num_steps)
    checks.run("evaluate --verify", evaluate_again, checks, num_steps)


def one_run(
    checks: Checks, context: Any, name: str, num_steps: int, changes: list[str], first: list[float]
) -> dict[str, Any]:
    """The loss falls, starts where that of the first run did, and a checkpoint is there; evaluation included."""
    from dist_proxygml.config import load_config
    from dist_proxygml.training.run import train

    if name != "ZeRO-0":  # the tests run the others on CPUs, but fp16
        checks.need_gpus()
    config = load_config(ROOT / "configs/demo_cpu.json", settings_of(checks, name, num_steps, *changes))
    folder = train(config, context, resume="never")
    losses = losses_of(folder, num_steps)
    if not checks.is_tiny:  # which takes too few steps
        start, end = sum(losses[:20]) / 20, sum(losses[-20:]) / 20
        expect(end < start, f"expected the loss to fall, got {start:.4f}, then {end:.4f}")
    if not first:
        first += losses
    limit = 0.05 if name in ("bf16", "fp16") else 1e-3
    apart = abs(losses[0] / first[0] - 1)
    expect(apart <= limit, f"expected the first loss of the first run, {first[0]:.5f}, got {losses[0]:.5f}")
    expect((folder / f"checkpoints/step-{num_steps:06d}").is_dir(), "expected a checkpoint of the last step, got none")
    return {"first": losses[0], "last": losses[-1], "recall@1": recall_of(folder, num_steps)}


def recall_of(folder: Path, step: int) -> float:
    """Of the evaluation of a step."""
    stored = json.loads((folder / f"evaluation/step-{step:06d}.json").read_text())
    return float(stored["metrics"]["recall@1"])


def start(num_ranks: int, settings: list[str], *, resume: str, fault: str = "") -> list[int]:
    """launchers/train.py on so many ranks of this machine; their statuses."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    command = [sys.executable, "launchers/train.py", "--config", "configs/demo_cpu.json", "--resume", resume]
    world = {"WORLD_SIZE": num_ranks, "LOCAL_WORLD_SIZE": num_ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    world = {} if num_ranks == 1 else world | {"GLOO_SOCKET_IFNAME": "lo"}
    processes = []
    for rank in range(num_ranks):
        told = world and world | {"RANK": rank, "LOCAL_RANK": rank}
        environment = os.environ | {name: str(value) for name, value in told.items()}
        if fault:
            environment["DIST_PROXYGML_FAULT"] = fault
        processes.append(subprocess.Popen([*command, "--set", *settings], cwd=ROOT, env=environment))
    return [process.wait() for process in processes]


def stop_and_resume(checks: Checks, num_steps: int) -> None:
    """A run that SIGTERM stops half-way saves, says so by its status, and the same command ends it."""
    settings = settings_of(checks, "stopped", num_steps)
    statuses = start(1, settings, resume="never", fault=f"step.begin@0:{num_steps // 2}:signal=TERM")
    expect(statuses == [75], f"expected status 75 after SIGTERM, got {statuses}")
    statuses = start(1, settings, resume="auto")
    expect(statuses == [0], f"expected status 0 of the resumed run, got {statuses}")
    losses_of(checks.out / "runs/stopped", num_steps)


def evaluate_again(checks: Checks, num_steps: int) -> dict[str, Any]:
    """In a process of its own, ranks found in two ways: what the run found right after its last step."""
    folder = checks.out / "runs/stopped"
    of_the_run = recall_of(folder, num_steps)
    run(sys.executable, "launchers/evaluate.py", "--run", str(folder), "--verify")
    again = recall_of(folder, num_steps)
    expect(abs(again - of_the_run) <= 0.005, f"expected Recall@1 {of_the_run:.4f} of the run itself, got {again:.4f}")
    return {"recall@1": again}


def ranks(checks: Checks) -> None:
    """Two ranks."""
    checks.run("1 against 2, one killed", one_against_two, checks)


def one_against_two(checks: Checks) -> dict[str, Any]:
    """The same losses (batch norm goes over both ranks' images) although a rank is killed on the way."""
    if not checks.is_tiny:
        checks.need_gpus(2)
    alone, both = (settings_of(checks, f"ranks-{number}", 4, "training.step_timeout=60") for number in (1, 2))
    expect(start(1, alone, resume="never") == [0], "expected status 0 of one rank, got another")
    statuses = start(2, both, resume="never", fault="step.begin@1:4:kill9")
    expect(0 not in statuses, f"expected both ranks to end after one was killed, got statuses {statuses}")
    expect(start(2, both, resume="auto") == [0, 0], "expected status 0 of both ranks of the resumed run, got another")
    one, two = (losses_of(checks.out / f"runs/ranks-{number}", 4) for number in (1, 2))
    apart = max(abs(a / b - 1) for a, b in zip(one, two, strict=True))
    expect(apart <= (1e-3 if checks.is_tiny else 1e-2), f"expected the losses {one} of one rank, got {two}")
    return {"difference": apart}


# ---- waits, launches, time -------------------------------------------------------------------------------------------


class OnGpu:
    """Counts as the stand-in does, on a GPU: waits by torch's debug mode, launches by the profiler."""

    def __init__(self) -> None:
        self.waits: Counter[str] = Counter()
        self.launches: Counter[str] = Counter()
        self.busy_seconds = 0.0

    @contextlib.contextmanager
    def counting(self) -> Iterator[None]:
        """Count what the block does."""
        from torch.profiler import ProfilerActivity, profile

        torch.cuda.synchronize()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
                    yield
                    torch.cuda.set_sync_debug_mode("default")
                    torch.cuda.synchronize()
            finally:
                torch.cuda.set_sync_debug_mode("default")
        places = (f"{warning.filename}:{warning.lineno}" for warning in caught if "synchroniz" in str(warning.message))
        self.waits = Counter(places)
        events = [event for event in profiler.events() if not getattr(event, "is_user_annotation", False)]
        self.launches = Counter(event.name for event in events if "LaunchKernel" in event.name)
        on_gpu = (event for event in events if event.device_type == torch.autograd.DeviceType.CUDA)
        self.busy_seconds = sum(event.time_range.elapsed_us() for event in on_gpu) / 1e6


def steps(checks: Checks) -> None:
    """Of BN-Inception at 32 images, and of heads, with the limits of the stand-in's tests."""
    from tests.unit.test_gpu_stand_in import HEADS

    with checks.accelerator() as stand_in:
        checks.run("BN-Inception", network_step, checks, stand_in)
        for name, (build, batch_size, _, *limits) in HEADS.items():
            checks.run(f"head: {name}", head_step, stand_in, build(), batch_size, *limits)


@contextlib.contextmanager
def counted(stand_in: Any) -> Iterator[Any]:
    """What counts, filled after the block."""
    if stand_in is not None:
        stand_in.clear()
        yield stand_in
        return
    gpu = OnGpu()
    with gpu.counting():
        yield gpu


def head_step(stand_in: Any, loss: Any, batch_size: int, most_waits: int, most_launches: int) -> dict[str, Any]:
    """Forward and backward, the second time."""
    loss = loss.to("cuda")
    generator = torch.Generator().manual_seed(0)  # other rows may need another pass of the search
    rows = F.normalize(torch.randn(batch_size, loss.embedding_dim, generator=generator)).to("cuda").requires_grad_()
    labels = torch.randint(0, loss.num_classes, (batch_size,), generator=generator).to("cuda")

    def step() -> None:
        loss(rows, labels).total.backward()
        loss.zero_grad()

    return within_limits(stand_in, step, most_waits, most_launches)


def within_limits(stand_in: Any, step: Callable[[], None], most_waits: int, most_launches: int) -> dict[str, Any]:
    """Counts of a step, the second one."""
    step()
    with counted(stand_in) as gpu:
        step()
    waits, launches = gpu.waits.total(), gpu.launches.total()
    print("waits", gpu.waits, "launches", gpu.launches, sep="\n", flush=True)
    expect(launches > 0, "expected launches to be counted, got none")
    expect(waits <= most_waits, f"expected at most {most_waits} waits for the GPU, got {waits}: {dict(gpu.waits)}")
    expect(launches <= most_launches, f"expected at most {most_launches} launches, got {launches}")
    return {"waits": waits, "launches": launches}


def network_step(checks: Checks, stand_in: Any) -> dict[str, Any]:
    """BN-Inception with the head of CUB: no wait in the network; then time, and how long the GPU computes of it."""
    from dist_proxygml import ProxyGMLLoss
    from dist_proxygml.backbones.build import build_backbone
    from dist_proxygml.config import BackboneConfig
    from tests.distributed.test_gpu_stand_in import MOST_LAUNCHES

    num_images, side = (2, 64) if checks.is_tiny else (32, 224)
    settings = BackboneConfig(name="bn_inception", embedding_dim=512, batch_norm="train")
    model = build_backbone(settings).to("cuda").train()
    loss = ProxyGMLLoss(100, 512, proxies_per_class=12, regularization_weight=0.3).to("cuda")
    optimizer = torch.optim.Adam([*model.parameters(), *loss.parameters()], 1e-4, eps=0.01, fused=True)
    images = torch.randint(0, 256, (num_images, 3, side, side), dtype=torch.uint8).to("cuda")
    labels = torch.randint(0, 100, (num_images,)).to("cuda")

    def pass_both_ways() -> None:
        model.zero_grad()
        model(images).sum().backward()

    found = within_limits(stand_in, pass_both_ways, 0, MOST_LAUNCHES[1])

    def step() -> None:
        loss(model(images), labels).total.backward()
        optimizer.step()
        optimizer.zero_grad()

    repeats = 1 if checks.is_tiny else 20
    step()
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(repeats):
        step()
    torch.cuda.synchronize()
    seconds = (time.perf_counter() - start) / repeats
    found |= {"step ms": 1e3 * seconds, "images per second": num_images / seconds}
    if not checks.is_tiny:
        with counted(None) as gpu:
            step()
        found["busy share"] = min(1.0, gpu.busy_seconds / seconds)
    return found


def speed(checks: Checks) -> None:
    """The head with very many classes."""
    from benchmarks.head import SIZES

    for name in ["tiny"] if checks.is_tiny else ["h100_1m", "h100_10m"]:
        for budget in (None, 256 << 20):
            text = "default budget" if budget is None else f"{budget >> 20} MiB"
            checks.run(f"{name}, {text}", with_and_without_fused, checks, SIZES[name]._replace(memory_budget=budget))


def with_and_without_fused(checks: Checks, size: Any) -> dict[str, Any]:
    """Step times by benchmarks/head.py; fails where the kernels' search was given up, or is slower."""
    from benchmarks.head import Settings, measured

    need_memory(checks, 3 * 4 * size.num_proxies * size.embedding_dim)
    settings = Settings(1 if checks.is_tiny else 7, torch.get_num_threads(), checks.device)
    plain = measured("proxygml", "rowwise_adagrad", size, settings)
    expect("skipped" not in plain, f"expected a measurement, got {plain.get('skipped')}")
    found = {"plain ms": plain["step_ms"], "product ms": plain["product_ms"], "plain peak MiB": plain["peak_mib"]}
    if checks.is_tiny:  # has no fused kernels
        return found
    fused = measured("proxygml_fused", "rowwise_adagrad", size, settings)
    expect("skipped" not in fused, f"expected a measurement, got {fused.get('skipped')}")
    done, given_up = fused["searches_done"], fused["searches_given_up"]
    expect(done > 0 and given_up == 0, f"expected the kernels to search, got {given_up} given up of {done}")
    expect(
        abs(fused["loss"] / plain["loss"] - 1) <= 1e-3,
        f"expected the loss {plain['loss']:.5f}, got {fused['loss']:.5f}",
    )
    ratio = plain["step_ms"] / fused["step_ms"]
    expect(ratio >= 1, f"expected fused to be faster, got {fused['step_ms']:.1f} ms for {plain['step_ms']:.1f} ms")
    return found | {"fused ms": fused["step_ms"], "fused peak MiB": fused["peak_mib"], "faster": ratio}


def need_memory(checks: Checks, device_bytes: int, host_bytes: int = 0) -> None:
    """Give up where the GPU, or the host, has less."""
    from dist_proxygml.distributed.memory import available_memory

    devices = [("host", torch.device("cpu"), host_bytes)]
    if not checks.is_tiny:
        devices.append(("GPU", torch.device("cuda", 0), device_bytes))
    for name, device, needed in devices:
        if (there := available_memory(device)) < needed:
            raise NotTested(f"needs {needed / GIB:.0f} GiB of the {name}'s memory, {there / GIB:.0f} are left")


# ---- very large banks ------------------------------------------------------------------------------------------------


def large(checks: Checks) -> None:
    """More numbers than 32 bits count."""
    for fused in (False, True):
        checks.run(f"2^31 numbers{', fused' if fused else ''}", at_the_end_of_a_bank, checks, fused=fused)


def at_the_end_of_a_bank(checks: Checks, *, fused: bool) -> dict[str, Any]:
    """Images of the last classes: loss, gradients and an update against the CPU, in float32."""
    from dist_proxygml import ProxyGMLLoss
    from dist_proxygml.head.optim import RowwiseAdagrad

    if fused:
        checks.need_gpus()
    num_classes, dim, num_images = (5000 if checks.is_tiny else 5_000_000), 512, 8
    bank_bytes = 4 * num_classes * dim
    need_memory(checks, 3 * bank_bytes // 2, 3 * bank_bytes)
    loss = ProxyGMLLoss(num_classes, dim, topk=100, sparse=True)
    labels = torch.arange(num_classes - num_images, num_classes)
    noise = torch.randn(num_images, dim, generator=torch.Generator().manual_seed(0))
    rows = F.normalize(F.normalize(loss.proxies.detach()[labels, 0]) + 0.02 * noise)

    def forward_backward(device: str) -> tuple[Tensor, Tensor, Tensor]:
        embeddings = rows.to(device, copy=True).requires_grad_()
        total = loss(embeddings, labels.to(device)).total
        total.backward()
        assert embeddings.grad is not None
        assert loss.proxies.grad is not None
        return total.detach().cpu(), embeddings.grad.cpu(), loss.proxies.grad.cpu().coalesce()

    # 1. On the CPU: the loss, its gradients, and an update of a bank that has those classes alone.
    expected = forward_backward("cpu")
    kept = expected[2].indices()[0]
    expect(int(kept[-1]) == num_classes - 1, f"expected the last class to be kept, got {int(kept[-1])}")
    few = torch.nn.Parameter(loss.proxies.detach()[labels].clone())
    where = torch.searchsorted(kept, labels)
    few.grad = torch.sparse_coo_tensor(
        torch.arange(num_images)[None], expected[2].values()[where], few.shape, is_coalesced=True
    )
    RowwiseAdagrad([few], lr=0.01).step()
    loss.proxies.grad = None
    # 2. The same on the device.
    with checks.accelerator():
        loss.fused = fused
        loss.to("cuda")
        found = forward_backward("cuda")
        RowwiseAdagrad([loss.proxies], lr=0.01).step()
        tail = loss.proxies.detach()[-num_images:].cpu()
    apart = {
        "loss": difference(found[0], expected[0]),
        "embeddings": difference(found[1], expected[1]),
        "proxies": float((found[2] - expected[2]).coalesce().values().norm() / expected[2].values().norm()),
        "update": difference(tail, few.detach()),
    }
    # A proxy within rounding of the k-th may be kept by one of them only.
    limits = {"loss": 1e-4, "embeddings": 1e-3, "proxies": 1e-3, "update": 1e-4}
    too_far = {name: value for name, value in apart.items() if not value <= limits[name]}
    expect(not too_far, f"expected relative differences of at most {limits}, got {too_far}")
    if fused:
        searches = loss.searches
        expect(searches.done > searches.given_up, f"expected searches by the kernels, got {searches}")
    return apart


def memory(checks: Checks) -> None:
    """The plan's prediction."""
    from benchmarks.head import SIZES

    for name in ("1m", "h100_1m"):
        for optimizer in ("adam", "rowwise_adagrad"):
            checks.run(f"{name}, {optimizer}", peak_against_plan, checks, SIZES[name], optimizer)


def peak_against_plan(checks: Checks, size: Any, optimizer: str) -> dict[str, Any]:
    """Peak of a head's memory within a tenth above the plan, which takes no two images to keep the same proxy."""
    from benchmarks.head import MIB, Settings, measured
    from dist_proxygml.config import load_config
    from dist_proxygml.training.head_plan import plan_head

    changes = [
        f"data.num_classes={size.num_classes}",
        f"proxies.per_class={size.proxies_per_class}",
        "proxies.ratio=null",
        f"proxies.topk={size.topk}",
        f"proxies.matmul_dtype={size.matmul_dtype}",
        f"backbone.embedding_dim={size.embedding_dim}",
        f"training.batch_size={size.batch_size}",
        f"optimizer.proxies_name={optimizer}",
        *([] if optimizer == "adam" else ["optimizer.proxies_weight_decay=0"]),
    ]
    plan = plan_head(load_config(ROOT / "configs/paper/sop.json", changes), world_size=1, device="cuda")
    planned = plan.total_bytes / MIB
    checks.need_gpus()
    need_memory(checks, plan.total_bytes * 5 // 4)
    row = measured("proxygml", optimizer, size, Settings(3, torch.get_num_threads(), checks.device))
    expect("skipped" not in row, f"expected a measurement, got {row.get('skipped')}")
    share = row["peak_mib"] / planned
    expect(0.7 <= share <= 1.1, f"expected a peak of 0.7 to 1.1 times the plan's {planned:.0f} MiB, got {share:.2f}")
    return {"plan MiB": planned, "peak MiB": row["peak_mib"], "share": share}


def main() -> None:
    """Run one section."""
    sections = (machine, tests, head, collectives, training, steps, speed, large, memory, ranks)
    by_name = {section.__name__: section for section in sections}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("section", choices=by_name)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    if given.device == "cuda":
        check_gpus(os.environ, are_needed=True)
    by_name[given.section](Checks(given.section, given.device, given.out))


if __name__ == "__main__":
    main()
