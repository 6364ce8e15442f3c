"""The loss's state on one number of ranks and on another: whole, and through torch.distributed.checkpoint."""

import functools
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict

from dist_proxygml import ProxyGMLLoss
from dist_proxygml.distributed.parallel import ParallelContext, single_process
from dist_proxygml.head.choices import Head
from dist_proxygml.head.loss import ProxyLoss
from dist_proxygml.head.optim import RowwiseAdagrad
from tests.harness import run_ranks
from tests.problems import assert_agrees_with_the_oracle, outcomes, random_problem

OPTIMIZERS: dict[str, Any] = {"adam": torch.optim.Adam, "adagrad": RowwiseAdagrad}
OPTIMIZERS["sgd"] = functools.partial(torch.optim.SGD, momentum=0.9)


def loss_of(context: ParallelContext, *, num_classes: int = 4, per_class: int = 2, seed: int = 0) -> ProxyGMLLoss:
    """4 classes on 3 ranks: the last has none."""
    return ProxyGMLLoss(
        num_classes,
        5,
        proxies_per_class=per_class,
        topk=5 if per_class == 2 else 3,
        group="world" if context.group else None,
        seed=seed,
    )


def stepped(context: ParallelContext, name: str, *, steps: int, seed: int = 0) -> tuple[ProxyGMLLoss, Any]:
    loss = loss_of(context, seed=seed)
    optimizer = OPTIMIZERS[name](loss.parameters(), lr=0.1)
    for step in range(steps):
        step_once(loss, optimizer, step)
    return loss, optimizer


def step_once(loss: ProxyGMLLoss, optimizer: torch.optim.Optimizer, step: int) -> None:
    """Every image on rank 0, so that any number of ranks computes the same."""
    rows = torch.randn(6, 5, generator=torch.Generator().manual_seed(step))
    count = 6 if loss.partition.rank == 0 else 0
    optimizer.zero_grad()
    loss(rows[:count], torch.tensor([0, 1, 2, 3, 3, 0])[:count]).total.backward()
    optimizer.step()


def save_and_step(context: ParallelContext, folder: Path) -> dict[str, Any]:
    """Save after two steps; the proxies of all classes after a third."""
    after = {}
    for name in OPTIMIZERS:
        loss, optimizer = stepped(context, name, steps=2)
        state = loss.full_state_dict(optimizer)
        assert (context.rank == 0) == bool(state)
        if context.rank == 0:
            torch.save(state, folder / f"{name}-{context.world_size}.pt")
        step_once(loss, optimizer, 2)
        after[name] = loss.full_state_dict()
    return after


def load_and_step(context: ParallelContext, folder: Path) -> dict[str, Any]:
    after = {}
    for path in sorted(folder.iterdir()):
        loss, optimizer = stepped(context, path.name.split("-")[0], steps=1, seed=9)
        state = torch.load(path, mmap=True, weights_only=True) if context.rank == 0 else {}
        loss.load_full_state_dict(state, optimizer)
        step_once(loss, optimizer, 2)
        after[path.name] = loss.full_state_dict()
    return after


def test_the_whole_state_saved_on_any_number_of_ranks_trains_on_alike_on_any_other(tmp_path: Path) -> None:
    expected = save_and_step(single_process(), tmp_path)
    for world_size in (2, 3):
        for name, state in run_ranks(save_and_step, world_size, tmp_path)[0].items():
            torch.testing.assert_close(state, expected[name])
    loaded = [load_and_step(single_process(), tmp_path)]
    loaded += [run_ranks(load_and_step, world_size, tmp_path)[0] for world_size in (2, 3)]
    for after in loaded:
        assert len(after) == 9
        for name, state in after.items():
            torch.testing.assert_close(state, expected[name.split("-")[0]])
    states = [torch.load(tmp_path / f"adam-{world_size}.pt") for world_size in (1, 2, 3)]
    assert {name: (value.shape, value.device.type) for name, value in states[2].items()} == {
        "proxies": ((4, 2, 5), "cpu"),
        "optimizer.exp_avg": ((4, 2, 5), "cpu"),
        "optimizer.exp_avg_sq": ((4, 2, 5), "cpu"),
        "optimizer.step": ((), "cpu"),
    }
    for state in states[1:]:
        torch.testing.assert_close(state, states[0])
    alone = loss_of(single_process(), seed=9)
    alone.load_state_dict({"proxies": states[2]["proxies"]})  # the layout is that of one process


def refused_states(context: ParallelContext) -> list[str]:
    loss = loss_of(context)
    other, narrow = (
        loss_of(context, num_classes=7).full_state_dict(),
        loss_of(context, per_class=1).full_state_dict(),
    )
    group = "world" if context.group else None
    scaled = ProxyLoss(4, 5, Head(topk=5, learn_scale=True), proxies_per_class=2, group=group)
    messages = []
    for state, optimizer in [
        (other, None),
        (narrow, None),
        ({}, None),
        (loss.full_state_dict(), torch.optim.Adam(loss.parameters())),
        (scaled.full_state_dict(), None),
    ]:
        before = loss.proxies.detach().clone()
        with pytest.raises(ValueError, match="expected") as raised:
            loss.load_full_state_dict(state, optimizer)
        assert torch.equal(loss.proxies, before)
        messages.append(str(raised.value))
    return messages


@pytest.mark.parametrize("world_size", [1, 3])
def test_a_state_of_another_bank_is_refused_by_all_ranks_with_both_shapes(world_size: int) -> None:
    for other, narrow, nothing, bare, scaled in run_ranks(refused_states, world_size):
        assert "proxies [4, 2, 5]" in other
        assert "got [7, 2, 5]; build the loss with num_classes=7" in other
        assert "got [4, 1, 5]" in narrow
        assert "got nothing" in nothing
        assert "optimizer's state" in bare
        assert "'proxies' alone" in scaled
        assert "'log_scale' too" in scaled


def test_the_whole_state_is_a_copy() -> None:
    loss = loss_of(single_process())
    state = loss.full_state_dict()
    with torch.no_grad():
        loss.proxies.zero_()
    assert state["proxies"].any()


def test_one_optimizer_of_network_and_loss_gets_the_proxies_state_alone() -> None:
    network, loss = torch.nn.Linear(5, 5), loss_of(single_process())
    optimizer = torch.optim.Adam([*network.parameters(), *loss.parameters()])
    for _ in range(2):
        step_once(loss, optimizer, 0)
    state = loss.full_state_dict(optimizer)
    other = loss_of(single_process(), seed=3)
    their = torch.optim.Adam([*network.parameters(), *other.parameters()])
    other.load_full_state_dict(state, their)
    assert list(their.state) == [other.proxies]
    for name, value in optimizer.state[loss.proxies].items():
        assert torch.equal(their.state[other.proxies][name], value)


def dcp_save(context: ParallelContext, folder: Path) -> None:
    loss = loss_of(context, seed=context.world_size)
    dcp.save({"loss": get_model_state_dict(loss)}, checkpoint_id=folder / str(context.world_size))


def dcp_load(context: ParallelContext, folder: Path) -> list[Any]:
    loaded = []
    for saved in (1, 2, 3):
        loss = loss_of(context, seed=9)
        state = {"loss": get_model_state_dict(loss)}
        dcp.load(state, checkpoint_id=folder / str(saved))
        set_model_state_dict(loss, state["loss"])
        loaded.append(loss.full_state_dict())
    return loaded


def test_torch_s_distributed_checkpoints_load_on_any_number_of_ranks(tmp_path: Path) -> None:
    for world_size in (1, 2, 3):
        run_ranks(dcp_save, world_size, tmp_path)
    for world_size in (1, 2, 3):
        for saved, state in enumerate(run_ranks(dcp_load, world_size, tmp_path)[0], 1):
            assert torch.equal(state["proxies"], loss_of(single_process(), seed=saved).proxies), (saved, world_size)


def state_per_rank(context: ParallelContext) -> None:
    """What was possible before: each rank keeps its own rows, as a plain tensor."""
    loss, other = loss_of(context, seed=1), loss_of(context, seed=2)
    other.load_state_dict({"proxies": loss.proxies.detach().clone()})
    assert torch.equal(other.proxies, loss.proxies)
    another = loss_of(context, seed=3)
    another.load_state_dict(loss.state_dict())
    assert torch.equal(another.proxies, loss.proxies)
    assert another.group is dist.group.WORLD


def test_a_rank_s_own_rows_load_on_that_rank() -> None:
    run_ranks(state_per_rank, 3)


def test_a_loss_of_one_process_is_pickled_and_its_state_is_plain() -> None:
    loss = loss_of(single_process())
    assert torch.equal(pickle.loads(pickle.dumps(loss)).proxies, loss.proxies)
    assert type(loss.state_dict()["proxies"]) is torch.Tensor


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_normalisation_gives_the_gradient_of_the_directions_on_any_number_of_ranks(world_size: int) -> None:
    """At unit rows the gradient of the direction is that of the reference without its part along the embedding."""
    problem = random_problem(num_classes=7, proxies_per_class=2, topk=6, regularization_weight=0.3)
    raw = outcomes(problem, world_size=world_size, gradient_reduction="sum")
    assert_agrees_with_the_oracle(raw, problem)
    twice = outcomes(problem._replace(embeddings=2 * problem.embeddings), world_size=world_size, normalize=True)
    expected = torch.cat([result.grad_embeddings for result in raw])
    along = (expected * problem.embeddings).sum(dim=1, keepdim=True) * problem.embeddings
    found = torch.cat([result.grad_embeddings for result in twice])
    torch.testing.assert_close(found, world_size * (expected - along) / 2, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(twice[0].total, raw[0].total, rtol=1e-13, atol=0)
