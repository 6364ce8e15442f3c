"""Learning rates as a function of the step, and the optimizers behind them."""

import math

import pytest
import torch
from torch import nn

from dist_proxygml.config import OptimizerConfig, ScheduleConfig
from dist_proxygml.optim import (
    build_backbone_optimizer,
    build_bank_optimizer,
    clip_norm_,
    learning_rate_factor,
    set_learning_rates,
)


def factors(config: ScheduleConfig, *, steps_per_epoch: int, num_steps: int) -> list[float]:
    return [
        learning_rate_factor(config, step=step, steps_per_epoch=steps_per_epoch, num_steps=num_steps)
        for step in range(num_steps)
    ]


def test_the_published_steps_start_with_the_numbered_epochs() -> None:
    config = ScheduleConfig(name="step", milestones=[20, 40], gamma=0.1)
    by_step = factors(config, steps_per_epoch=3, num_steps=150)
    # epochs are numbered from 1: 19 epochs at full rate, then 20 at a tenth, then a hundredth
    assert by_step[: 19 * 3] == [1.0] * 57
    assert by_step[19 * 3 : 39 * 3] == pytest.approx([0.1] * 60)
    assert by_step[39 * 3 :] == pytest.approx([0.01] * 33)


def test_cosine_falls_from_one_to_nearly_zero_after_the_warm_up() -> None:
    config = ScheduleConfig(name="cosine", warmup_steps=4)
    got = factors(config, steps_per_epoch=7, num_steps=104)
    assert got[:4] == [0.25, 0.5, 0.75, 1.0]
    assert got[4] == 1.0
    assert got[54] == pytest.approx(0.5)
    assert got[-1] == pytest.approx((1 + math.cos(math.pi * 0.99)) / 2)
    assert got[4:] == sorted(got[4:], reverse=True)


def test_constant_stays_constant() -> None:
    assert factors(ScheduleConfig(), steps_per_epoch=2, num_steps=5) == [1.0] * 5


def test_a_learning_rate_of_zero_holds_the_trunk_still_and_not_the_embedding() -> None:
    trunk, embedding = nn.Linear(3, 3), nn.Linear(3, 2)
    config = OptimizerConfig(backbone_lr=0.1, embedding_lr=0.3, proxies_lr=1.0, weight_decay=0.1)
    optimizer = build_backbone_optimizer(config, trunk=trunk.parameters(), embedding=embedding.parameters())
    assert [group["lr"] for group in optimizer.param_groups] == [0.1, 0.3]
    before = trunk.weight.detach().clone(), embedding.weight.detach().clone()
    embedding(trunk(torch.ones(1, 3))).sum().backward()
    set_learning_rates(optimizer, [0.0, 0.3])
    optimizer.step()
    assert torch.equal(trunk.weight, before[0])
    assert not torch.equal(embedding.weight, before[1])


def test_adam_decays_through_the_gradient_and_adamw_apart_from_it() -> None:
    def weight_after_one_step(name: str) -> float:
        proxies = nn.Parameter(torch.full((1, 1, 1), 2.0))
        config = OptimizerConfig(
            name=name, backbone_lr=1.0, proxies_lr=0.5, proxies_weight_decay=0.25, eps=1.0, betas=(0.0, 0.0)
        )
        optimizer = build_bank_optimizer(config, proxies)
        proxies.grad = torch.full((1, 1, 1), 3.0)
        optimizer.step()
        return proxies.item()

    # without momentum a step is lr * g / (|g| + eps)
    assert weight_after_one_step("adam") == pytest.approx(2 - 0.5 * 3.5 / 4.5)  # g = 3 + 0.25 * 2
    assert weight_after_one_step("adamw") == pytest.approx(2 * (1 - 0.5 * 0.25) - 0.5 * 3 / 4)


def test_clipping_scales_a_part_by_the_norm_of_the_whole() -> None:
    part = torch.tensor([3.0, 4.0])
    clip_norm_(part, norm=torch.tensor(10.0), max_norm=2.0)
    torch.testing.assert_close(part, torch.tensor([0.6, 0.8]))
    clip_norm_(part, norm=torch.tensor(1.0), max_norm=2.0)
    torch.testing.assert_close(part, torch.tensor([0.6, 0.8]))
