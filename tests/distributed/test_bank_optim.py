"""The training step with every rule of the bank: sparse and dense gradients, any number of ranks and micro-batches."""

import functools
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

from dist_proxygml.config import Config, parse_config
from dist_proxygml.data.order import EpochPlan
from dist_proxygml.data.pipeline import Batch
from dist_proxygml.distributed.parallel import ParallelContext
from tests.harness import run_ranks

NUM_CLASSES, NUM_IMAGES, NUM_STEPS, BATCH = 23, 24, 4, 6
LEARNING_RATE, CLIP = 0.05, 11.0  # some steps are clipped
RULES = ["adam", "adamw", "sgd", "sgd with momentum", "rowwise_adagrad", "sparse_adam"]
SPARSE_RULES = ["sgd", "rowwise_adagrad", "sparse_adam"]


def configuration(rule: str, accumulation: int, *, unit_norm: bool = False) -> Config:
    transform = {"name": "resize", "size": 16}
    optimizer: dict[str, Any] = {"proxies_name": rule.split()[0], "proxies_momentum": 0.9 * ("momentum" in rule)}
    raw = {
        "name": "bank",
        "data": {
            "shards": "unused",
            "num_classes": NUM_CLASSES,
            "train_transform": transform,
            "test_transform": transform,
        },
        "backbone": {
            "name": "small_cnn",
            "embedding_dim": 8,
            "batch_norm": "frozen",  # what a step computes does not depend on how it is cut into micro-batches
            "options": {"width": 4},
        },
        "proxies": {"per_class": 2, "topk": 5, "scale": 4.0, "unit_norm": unit_norm},
        # the large eps keeps rounding from being blown up
        "optimizer": {
            "backbone_lr": 1e-3,
            "proxies_lr": LEARNING_RATE,
            "eps": 0.01,
            "proxies_clip_norm": CLIP,
            **optimizer,
        },
        "training": {"epochs": 1, "batch_size": BATCH},
        "deepspeed": {"gradient_accumulation_steps": accumulation},
    }
    return parse_config(raw, source="the test")


class Outcome(NamedTuple):
    initial: np.ndarray
    proxies: np.ndarray
    state: dict[str, np.ndarray]
    norms: np.ndarray  # of the gradient before clipping, step by step
    lengths: np.ndarray  # of what the bank moved by


class Task(NamedTuple):
    rule: str
    accumulation: int = 1
    sparse: bool = True
    unit_norm: bool = False


def micro_batches(context: ParallelContext, step: int, accumulation: int) -> list[Batch]:
    """This rank's part of a step; images are of few classes, so that some proxies are never kept."""
    images = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (NUM_IMAGES, 3, 16, 16), dtype=np.uint8))
    labels = torch.arange(NUM_IMAGES) % 4 * 6
    plan = EpochPlan(np.random.default_rng(1).permutation(NUM_IMAGES), BATCH, accumulation, context.world_size)
    parts = [plan.micro_batch(step, micro, context.rank) for micro in range(accumulation)]
    return [Batch(images[p.ids], labels[p.ids], torch.from_numpy(p.ids), p.global_size, p.step_size) for p in parts]


def train(context: ParallelContext, tasks: list[Task]) -> list[Outcome]:
    from dist_proxygml.training.step import build_train_state, train_step

    outcomes = []
    for task in tasks:
        config = configuration(task.rule, task.accumulation, unit_norm=task.unit_norm)
        state = build_train_state(config, context, steps_per_epoch=NUM_STEPS)
        assert state.loss.sparse == (task.rule in SPARSE_RULES)
        state.loss.sparse = task.sparse and state.loss.sparse
        state.engine.module.train()
        initial = state.loss.proxies.detach().numpy().copy()
        norms, lengths = [], []
        for step in range(NUM_STEPS):
            before = state.loss.proxies.detach().clone()
            report = train_step(state, micro_batches(context, step, task.accumulation), measure=True)
            norms.append(report.proxies_norm)
            lengths.append((state.loss.proxies.detach() - before).norm().item())
            assert state.loss.proxies.grad is None
        rows = {name: value.numpy() for name, value in state.bank_optimizer.state[state.loss.proxies].items()}
        proxies = state.loss.proxies.detach().numpy()
        outcomes.append(Outcome(initial, proxies, rows, np.array(norms), np.array(lengths)))
    return outcomes


@functools.cache
def all_on_one_rank() -> dict[Task, Outcome]:
    """What the tests compare, in one process: starting one takes longer than training."""
    tasks = [
        Task(rule, accumulation, sparse, unit_norm)
        for rule in SPARSE_RULES
        for accumulation in (1, 2)
        for sparse in (True, False)
        for unit_norm in (False, True)
        if rule != "sparse_adam" or (sparse and not unit_norm)
    ]
    return dict(zip(tasks, run_ranks(train, 1, tasks)[0], strict=True))


def on_one_rank(task: Task) -> Outcome:
    return all_on_one_rank()[task]


def assert_same(got: Outcome, expected: Outcome) -> None:
    # float32 sums in another order
    np.testing.assert_allclose(got.norms, expected.norms, rtol=1e-4)
    np.testing.assert_allclose(got.proxies, expected.proxies, rtol=0, atol=1e-5)
    assert got.state.keys() == expected.state.keys()
    for name, value in expected.state.items():
        np.testing.assert_allclose(got.state[name], value, rtol=1e-3, atol=1e-5, err_msg=name)


@pytest.mark.parametrize("unit_norm", [False, True])
@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("rule", ["sgd", "rowwise_adagrad"])  # they do the same to a gradient of 0 as to none
def test_a_sparse_gradient_trains_as_a_dense_one(rule: str, accumulation: int, unit_norm: bool) -> None:
    sparse = on_one_rank(Task(rule, accumulation, sparse=True, unit_norm=unit_norm))
    dense = on_one_rank(Task(rule, accumulation, sparse=False, unit_norm=unit_norm))
    assert_same(sparse, dense)


@pytest.mark.parametrize("sparse", [True, False])
def test_a_gradient_is_clipped_to_the_norm_of_all_proxies(sparse: bool) -> None:
    outcome = on_one_rank(Task("sgd", accumulation=2, sparse=sparse))
    assert outcome.norms.min() < CLIP < outcome.norms.max()
    np.testing.assert_allclose(outcome.lengths, LEARNING_RATE * np.minimum(outcome.norms, CLIP), rtol=1e-4)


@pytest.mark.parametrize("rule", SPARSE_RULES)
def test_micro_batches_are_one_batch(rule: str) -> None:
    assert_same(on_one_rank(Task(rule, accumulation=2)), on_one_rank(Task(rule)))


@pytest.mark.timeout(240)
def test_three_ranks_train_as_one() -> None:
    tasks = [Task(rule, accumulation=2, unit_norm=rule == "sgd") for rule in SPARSE_RULES]
    ranks = run_ranks(train, 3, tasks, timeout=180)
    for number, task in enumerate(tasks):
        of_ranks = [rank[number] for rank in ranks]
        state = {
            name: np.concatenate([outcome.state[name] for outcome in of_ranks]) if value.ndim else value
            for name, value in of_ranks[0].state.items()
        }
        proxies = np.concatenate([outcome.proxies for outcome in of_ranks])
        expected = on_one_rank(Task(task.rule, unit_norm=task.unit_norm))
        for outcome in of_ranks:
            np.testing.assert_array_equal(outcome.norms, of_ranks[0].norms)
        assert_same(expected._replace(proxies=proxies, state=state, norms=of_ranks[0].norms), expected)


@pytest.mark.parametrize("rule", SPARSE_RULES)
def test_classes_that_no_image_kept_do_not_move(rule: str) -> None:
    outcome = on_one_rank(Task(rule))
    moved = (outcome.proxies != outcome.initial).any(axis=(1, 2))
    assert 0 < moved.sum() < NUM_CLASSES
    for name, value in outcome.state.items():
        if value.ndim:
            np.testing.assert_array_equal(value.reshape(NUM_CLASSES, -1).any(axis=1), moved, err_msg=name)


@pytest.mark.parametrize("rule", ["sgd", "rowwise_adagrad"])
def test_proxies_keep_length_one_from_the_start_with_unit_norm(rule: str) -> None:
    outcome = on_one_rank(Task(rule, unit_norm=True))
    free = on_one_rank(Task(rule))
    assert np.abs(np.linalg.norm(free.initial, axis=2) - 1).min() > 0.1
    assert np.abs(np.linalg.norm(free.proxies, axis=2) - 1).max() > 0.1
    for proxies in (outcome.initial, outcome.proxies):
        np.testing.assert_allclose(np.linalg.norm(proxies, axis=2), 1, rtol=1e-6)
    assert (outcome.proxies != outcome.initial).any()


def skip_a_step(context: ParallelContext) -> None:
    """A step that the engine does not apply, between two that it does."""
    from dist_proxygml.training.step import build_train_state, train_step

    for rule in RULES:
        state = build_train_state(configuration(rule, 1, unit_norm=True), context, steps_per_epoch=NUM_STEPS)
        state.engine.module.train()

        def numbers(state: Any = state) -> list[np.ndarray]:
            rows = state.bank_optimizer.state[state.loss.proxies].values()
            return [value.detach().numpy().copy() for value in (state.loss.proxies, *rows)]

        def step(state: Any = state) -> None:
            train_step(state, micro_batches(context, state.step, 1), measure=True)

        step()
        before = numbers()
        state.loss.proxies.data *= 2  # a projection would undo it
        applied, state.engine.step_was_applied = state.engine.step_was_applied, lambda: False  # type: ignore[method-assign]
        step()
        state.loss.proxies.data /= 2
        for got, expected in zip(numbers(), before, strict=True):
            np.testing.assert_array_equal(got, expected, err_msg=rule)
        assert state.loss.proxies.grad is None
        assert state.step == 2
        state.engine.step_was_applied = applied  # type: ignore[method-assign]
        step()
        assert not np.array_equal(numbers()[0], before[0]), rule


def test_a_step_that_the_engine_skips_changes_neither_bank_nor_state() -> None:
    run_ranks(skip_a_step, 1)


def number_the_draws(context: ParallelContext) -> list[int]:
    from dist_proxygml.training.step import build_train_state, train_step

    state = build_train_state(configuration("adam", 2), context, steps_per_epoch=NUM_STEPS)
    state.engine.module.train()
    draws = []
    forward = state.loss.forward

    def noted(*args: Any) -> Any:
        draws.append(state.loss.draw)
        return forward(*args)

    state.loss.forward = noted  # type: ignore[method-assign]
    state.step = 3  # as after loading a checkpoint
    train_step(state, micro_batches(context, 0, 2), measure=False)
    train_step(state, micro_batches(context, 1, 2), measure=False)
    return draws


def test_a_continued_run_draws_what_the_interrupted_one_would_have_drawn() -> None:
    assert run_ranks(number_the_draws, 1) == [[6, 7, 8, 9]]
