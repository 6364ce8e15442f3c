"""What a step costs a GPU, counted on CPUs: reads of the device, collectives, waits; and what it leaves alone."""

import copy
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from dist_proxygml.data.pipeline import Batch
from dist_proxygml.distributed.parallel import ParallelContext
from tests.harness import run_ranks
from tests.small_training import NUM_CLASSES, configuration, same

NUM_STEPS = 5


class Counted(NamedTuple):
    """A run of NUM_STEPS steps and a forward pass of an evaluation."""

    waits: int  # of DeepSpeed, for the device
    sums: int  # collectives of the step itself
    norms: int  # measured
    reads: int  # of a measured norm by itself
    precisions: set[tuple[str, str, str]]  # of float32 products in backbone, head and the head's backward pass
    norm: float


def batches(context: ParallelContext, step: int) -> list[Batch]:
    generator = torch.Generator().manual_seed(10 * step + context.rank)
    images = torch.randint(256, (6, 3, 16, 16), generator=generator, dtype=torch.uint8)
    return [Batch(images, torch.randint(NUM_CLASSES, (6,), generator=generator), torch.arange(6), 12, 12)]


def build(context: ParallelContext, stage: int, **deepspeed: Any) -> Any:
    from dist_proxygml.training.step import build_train_state

    config = configuration(deepspeed={"zero_optimization": {"stage": stage}} | deepspeed)
    state = build_train_state(config, context, steps_per_epoch=100)
    state.engine.module.train()
    return state


def count(context: ParallelContext) -> Counted:
    from deepspeed.accelerator import get_accelerator

    from dist_proxygml.distributed.engine import Engine
    from dist_proxygml.training import step as step_module

    counts = dict.fromkeys(("waits", "sums", "norms", "reads"), 0)

    def counted(name: str, function: Any) -> Any:
        def call(*args: Any, **options: Any) -> Any:
            counts[name] += 1
            return function(*args, **options)

        return call

    class Norm(Tensor):
        """A norm that tells when it is read by itself."""

        __float__ = counted("reads", Tensor.__float__)

    get_accelerator().synchronize = counted("waits", get_accelerator().synchronize)
    step_module.all_reduce_sum = counted("sums", step_module.all_reduce_sum)
    measure = Engine.gradient_norm
    Engine.gradient_norm = counted("norms", lambda engine: measure(engine).as_subclass(Norm))  # type: ignore
    state = build(context, stage=0)
    torch.set_float32_matmul_precision("high")
    precisions: list[str] = []

    def note(*_: Any) -> None:
        precisions.append(torch.get_float32_matmul_precision())

    state.engine.module.register_forward_hook(note)
    state.loss.register_forward_hook(note)
    state.loss.proxies.register_hook(note)
    for step in range(NUM_STEPS):
        report = step_module.train_step(state, batches(context, step), measure=True)
    steps = {tuple(precisions[first : first + 3]) for first in range(0, len(precisions), 3)}
    with torch.no_grad():
        state.engine.module.eval()(batches(context, 0)[0].images)
    Engine.gradient_norm = measure  # type: ignore
    torch.set_float32_matmul_precision("highest")
    assert report.backbone_norm is not None
    return Counted(**counts, precisions=steps, norm=report.backbone_norm)


def skip(context: ParallelContext, stage: int) -> tuple[str | None, bool, bool]:
    """A step in which the gradient of rank 1's proxies alone is NaN: its reason, whether anything moved, and whether
    the next step moves it.
    """
    from dist_proxygml.training.step import train_step

    state = build(context, stage)

    def numbers() -> Any:
        return copy.deepcopy((state.loss.proxies.detach(), state.engine.full_state_dict()["embedding.weight"]))

    before = numbers()
    hook = state.loss.proxies.register_hook(lambda gradient: gradient * (torch.nan if context.rank == 1 else 1))
    report = train_step(state, batches(context, 0), measure=True)
    after = numbers()
    hook.remove()
    train_step(state, batches(context, 1), measure=True)
    return report.skipped and report.skipped.reason, same(before, after), same(after, numbers())


class Reads(TorchDispatchMode):
    """How often a value is read from a tensor."""

    num = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.num += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def look_for_overflow(context: ParallelContext) -> list[tuple[bool, int]]:
    """Under bf16 without ZeRO, with one gradient that is NaN, infinite or neither: whether it is seen, and reads."""
    engine = build(context, 0, bf16={"enabled": True}).engine
    parameters = list(engine.module.parameters())
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    assert len(parameters) > 4
    found = []
    for value in (torch.nan, -torch.inf, 1.0):
        parameters[-1].grad.view(-1)[-1] = value
        with Reads() as reads:
            found.append((engine.optimizer.overflow_checker.check(), reads.num))
    return found


def load_what_a_gpu_saved(context: ParallelContext, stage: int) -> tuple[set[Any], set[str]]:
    """Whether the optimizer is fused, and where its step counters are, after its checkpoint said that it was."""
    from dist_proxygml.distributed.parallel import run_on_rank_zero
    from dist_proxygml.training.step import train_step

    state = build(context, stage)
    train_step(state, batches(context, 0), measure=False)
    folder = Path(run_on_rank_zero(context, tempfile.mkdtemp))
    for group in state.engine.optimizer.param_groups:
        group["fused"] = True
    state.engine.save(folder)
    for group in state.engine.optimizer.param_groups:
        group["fused"] = None
    state.engine.load(folder)
    counters = [entry["step"] for entry in state.engine.optimizer.state.values() if "step" in entry]
    assert counters
    return {group["fused"] for group in state.engine.optimizer.param_groups}, {str(one.device) for one in counters}


def all_of_it(context: ParallelContext) -> tuple[Any, ...]:
    return (
        count(context),
        [skip(context, stage) for stage in (0, 2)],
        [load_what_a_gpu_saved(context, stage) for stage in (0, 2)],
        look_for_overflow(context),
    )


def test_a_step_reads_once_and_waits_never_and_the_head_stays_exact() -> None:
    ranks = run_ranks(all_of_it, 2, timeout=240)
    for counted, skipped, loaded, overflows in ranks:
        assert counted.waits == 0
        assert counted.sums == counted.norms == NUM_STEPS
        assert counted.reads == 0  # with the sums, in one read
        assert counted.precisions == {("high", "highest", "highest")}
        assert 0 < counted.norm == ranks[0][0].norm
        assert skipped == [("the gradient of the proxies is NaN or infinite", True, False)] * 2
        assert loaded == [({None}, {"cpu"})] * 2
        assert overflows == [(True, 2), (True, 2), (False, 2)]  # the norm, and DeepSpeed's own flag
