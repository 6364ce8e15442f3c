"""Batch normalisation over ranks: outputs, gradients and statistics are those of one process."""

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from timm.layers import BatchNormAct2d
from torch import Tensor, nn

from dist_proxygml.backbones.batch_norm import GlobalBatchNorm, convert_batch_norm
from dist_proxygml.distributed.parallel import ParallelContext
from tests.gpu_stand_in import StandIn
from tests.harness import run_ranks

NUM_IMAGES = 7  # uneven over 2 and 3 ranks
SHAPES = {"map": (NUM_IMAGES, 5, 3, 2), "vector": (NUM_IMAGES, 5)}


def layer(kind: str) -> nn.Module:
    """A BatchNorm layer with parameters and statistics that are not those it starts with."""
    torch.manual_seed(0)
    norm = {
        "map": nn.BatchNorm2d(5, momentum=0.3),
        "vector": nn.BatchNorm1d(5, momentum=None),
        "timm": BatchNormAct2d(5, act_layer=nn.ReLU6),
    }[kind]
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    norm.running_mean.normal_()
    return nn.Sequential(norm).double()


def problem(kind: str) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    shape = SHAPES.get(kind, SHAPES["map"])
    # a mean far from 0: a variance from sums of squares would lose its digits
    x, gradient = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))
    return 100 + 3 * x, gradient


def normalised(context: ParallelContext | None, kind: str, device: str = "cpu") -> dict[str, np.ndarray]:
    """Two training passes, then the gradients of the second; with a context only this rank's images."""
    model = layer(kind)
    x, gradient = problem(kind)
    rank, world_size, group = (context.rank, context.world_size, context.group) if context else (0, 1, None)
    if context is not None:
        convert_batch_norm(model, group)
        assert isinstance(model[0], GlobalBatchNorm)
    own = slice(rank * NUM_IMAGES // world_size, (rank + 1) * NUM_IMAGES // world_size)
    model = model.to(device)
    x, gradient = x[own].to(device, copy=True).requires_grad_(), gradient[own].to(device)
    model(x)
    y = model(x)
    y.backward(gradient)
    return {
        "y": y.detach().cpu().numpy(),
        "dx": x.grad.cpu().numpy(),
        **{f"sum {name}": p.grad.cpu().numpy() for name, p in model.named_parameters()},
        **{f"same {name}": b.cpu().numpy() for name, b in model.named_buffers()},
        "y in evaluation": model.eval()(x).detach().cpu().numpy(),
    }


def normalised_twice(context: ParallelContext, kind: str) -> list[dict[str, np.ndarray]]:
    """On the CPU, and with the operators for GPUs."""
    with StandIn() as gpu:
        on_gpu = normalised(context, kind, device="cuda")
    assert gpu.num_collectives == (0 if context.world_size == 1 else 3)  # two passes forward, one backward
    return [normalised(context, kind), on_gpu]


@pytest.mark.parametrize("kind", ["map", "vector", "timm"])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_ranks_normalise_as_one_process_does(kind: str, world_size: int) -> None:
    expected = normalised(None, kind)
    for ranks in zip(*run_ranks(normalised_twice, world_size, kind), strict=True):
        assert_together(ranks, expected)


def assert_together(ranks: Sequence[dict[str, np.ndarray]], expected: dict[str, np.ndarray]) -> None:
    for name, values in expected.items():
        parts = [rank[name] for rank in ranks]
        if name.startswith("same"):
            for part in parts:
                np.testing.assert_array_equal(part, parts[0], err_msg=name)
            got = parts[0]
        else:  # gradients of parameters are each rank's part, for the engine to reduce
            got = sum(parts) if name.startswith("sum") else np.concatenate(parts)
        np.testing.assert_allclose(got, values, rtol=1e-10, atol=1e-10, err_msg=name)


def test_names_and_values_stay_when_layers_are_replaced() -> None:
    model = nn.ModuleDict({"a": layer("timm"), "b": nn.Sequential(nn.Linear(2, 5), nn.BatchNorm1d(5))})
    before = {name: value.clone() for name, value in model.state_dict().items()}
    convert_batch_norm(model, None)
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert sum(isinstance(module, GlobalBatchNorm) for module in model.modules()) == 2


def test_statistics_that_were_cast_are_still_updated() -> None:
    model = nn.Sequential(nn.BatchNorm2d(3))
    convert_batch_norm(model, None)
    model.bfloat16()
    model(5 + torch.randn(64, 3, 2, 2, generator=torch.Generator().manual_seed(0)).bfloat16())
    torch.testing.assert_close(model[0].running_mean.float(), torch.full((3,), 0.5), rtol=0.1, atol=0)


def test_bf16_weights_meet_float32_statistics() -> None:
    model = nn.Sequential(nn.BatchNorm2d(3))
    convert_batch_norm(model, None)
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16()  # as the engine does; it leaves buffers alone
    x = torch.randn(4, 3, 2, 2, dtype=torch.bfloat16)
    assert model(x).dtype == torch.bfloat16
    assert model.eval()(x).dtype == torch.bfloat16
    assert model[0].running_var.dtype == torch.float32
