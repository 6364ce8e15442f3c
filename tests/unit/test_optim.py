"""Learning rates as a function of the step, and the optimizers behind them."""

import math
from typing import Any

import pytest
import torch
from torch import nn

from dist_proxygml.backbones.layers import ParameterGroup, parameter_groups
from dist_proxygml.config import Config, OptimizerConfig, ScheduleConfig, parse_config
from dist_proxygml.training.optim import (
    build_backbone_optimizer,
    build_bank_optimizer,
    clip_norm_,
    group_learning_rates,
    learning_rate_factor,
    set_learning_rates,
    wants_sparse_gradient,
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
    groups = parameter_groups(trunk, [embedding], "any", layer_decay=None, decays_matrices_only=False)
    optimizer = build_backbone_optimizer(config, groups)
    assert [(group["lr"], group["weight_decay"]) for group in optimizer.param_groups] == [(0.1, 0.1), (0.3, 0.1)]
    before = trunk.weight.detach().clone(), embedding.weight.detach().clone()
    embedding(trunk(torch.ones(1, 3))).sum().backward()
    set_learning_rates(optimizer, group_learning_rates(groups, trunk=0.0, embedding=0.3))
    optimizer.step()
    assert torch.equal(trunk.weight, before[0])
    assert not torch.equal(embedding.weight, before[1])


def test_a_group_has_its_factor_of_its_layers_rate_and_weight_decay_or_none() -> None:
    bias, weight, layer = (nn.Parameter(torch.ones(1)) for _ in range(3))
    groups = [
        ParameterGroup([bias], is_embedding=False, lr_factor=0.25, decays=False),
        ParameterGroup([weight], is_embedding=False, lr_factor=0.5, decays=True),
        ParameterGroup([layer], is_embedding=True, lr_factor=1.0, decays=True),
    ]
    config = OptimizerConfig(name="adamw", backbone_lr=0.1, embedding_lr=0.3, proxies_lr=1.0, weight_decay=0.5)
    optimizer = build_backbone_optimizer(config, groups)
    assert [(group["lr"], group["weight_decay"]) for group in optimizer.param_groups] == [
        (0.025, 0.0),
        (0.05, 0.5),
        (0.3, 0.5),
    ]
    for parameter in (bias, weight, layer):
        parameter.grad = torch.zeros(1)
    optimizer.step()  # weight decay alone: 1 - lr * decay
    torch.testing.assert_close([p.item() for p in (bias, weight, layer)], [1.0, 0.975, 0.85])
    assert group_learning_rates(groups, trunk=0.0, embedding=3.0) == [0.0, 0.0, 3.0]


def test_the_backbone_has_the_fused_optimizer_on_gpus_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    config = OptimizerConfig(backbone_lr=0.1, proxies_lr=1.0)
    groups = [
        ParameterGroup([nn.Parameter(torch.ones(1))], is_embedding=last, lr_factor=1.0, decays=True)
        for last in (False, True)
    ]

    def build() -> list[bool | None]:
        optimizer = build_backbone_optimizer(config, groups)
        return [group["fused"] for group in optimizer.param_groups]

    assert build() == [None, None]
    monkeypatch.setattr(nn.Parameter, "is_cuda", True)
    assert build() == [True, True]


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


# Optimizers of the bank


def configuration(*, regularization_weight: float = 0.0, selection: str = "auto", **optimizer: Any) -> Config:
    transform = {"name": "resize", "size": 8}
    raw = {
        "name": "optimizers",
        "data": {"shards": "unused", "num_classes": 7, "train_transform": transform, "test_transform": transform},
        "backbone": {"name": "small_cnn"},
        "proxies": {"ratio": 0.5, "regularization_weight": regularization_weight, "selection": selection},
        "optimizer": {"backbone_lr": 0.1, "proxies_lr": 0.1, **optimizer},
        "training": {"epochs": 1, "batch_size": 4},
    }
    return parse_config(raw, source="the test")


RULES = ["adam", "adamw", "sgd", "rowwise_adagrad", "sparse_adam"]


def test_the_rule_of_the_proxies_is_that_of_the_backbone_unless_it_has_its_own() -> None:
    def kind(**settings: Any) -> str:
        config = OptimizerConfig(backbone_lr=0.1, proxies_lr=0.1, **settings)
        return type(build_bank_optimizer(config, nn.Parameter(torch.zeros(2, 1, 3)))).__name__

    assert kind() == "Adam"
    assert kind(name="adamw") == "AdamW"
    assert [kind(name="adamw", proxies_name=rule) for rule in RULES] == [
        "Adam",
        "AdamW",
        "SGD",
        "RowwiseAdagrad",
        "SparseAdam",
    ]


@pytest.mark.parametrize(
    ("settings", "moves"),
    [
        ({"proxies_name": "adam"}, True),
        ({"proxies_name": "adamw"}, True),
        ({"proxies_name": "sgd"}, False),
        ({"proxies_name": "sgd", "proxies_momentum": 0.9}, True),
        ({"proxies_name": "rowwise_adagrad"}, False),
        ({"proxies_name": "sparse_adam"}, False),
    ],
)
def test_which_rules_move_a_class_after_the_last_image_that_kept_it(settings: dict[str, Any], moves: bool) -> None:
    config = configuration(**settings)
    proxies = nn.Parameter(torch.ones(3, 1, 2))
    optimizer = build_bank_optimizer(config.optimizer, proxies)
    after = []
    for kept in (0, 1):
        gradient = torch.zeros(3, 1, 2).index_fill(0, torch.tensor(kept), 1.0)
        if wants_sparse_gradient(config):
            gradient = gradient.to_sparse(1)
        proxies.grad = gradient
        optimizer.step()
        after.append(proxies.detach().clone())
    assert not torch.equal(after[0][0], torch.ones(1, 2))
    assert torch.equal(after[1][0], after[0][0]) != moves
    assert not torch.equal(after[1][1], torch.ones(1, 2))
    assert torch.equal(after[1][2], torch.ones(1, 2))


@pytest.mark.parametrize("settings", [{"name": "adam"}, {"name": "adamw"}, {"proxies_name": "sgd"}])
def test_weight_decay_moves_every_class(settings: dict[str, Any]) -> None:
    config = configuration(proxies_weight_decay=0.5, **settings)
    assert not wants_sparse_gradient(config)
    proxies = nn.Parameter(torch.ones(3, 1, 2))
    proxies.grad = torch.zeros(3, 1, 2)
    build_bank_optimizer(config.optimizer, proxies).step()
    assert (proxies < 1).all()


def test_the_fused_adam_of_the_bank_is_adam() -> None:
    proxies, expected = (nn.Parameter(torch.linspace(-1, 1, 24).view(4, 2, 3)) for _ in range(2))
    config = configuration(eps=0.01, proxies_weight_decay=1e-4)
    optimizers = [
        build_bank_optimizer(config.optimizer, proxies),
        torch.optim.Adam([expected], lr=0.1, eps=0.01, weight_decay=1e-4, fused=False),
    ]
    for seed in range(20):
        gradient = torch.randn(4, 2, 3, generator=torch.Generator().manual_seed(seed))
        proxies.grad, expected.grad = gradient.clone(), gradient.clone()
        for optimizer in optimizers:
            optimizer.step()
    torch.testing.assert_close(proxies, expected, rtol=1e-5, atol=1e-6)  # float32 in another order


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_sgd_with_momentum_by_hand(momentum: float) -> None:
    config = configuration(proxies_name="sgd", proxies_momentum=momentum)
    proxies = nn.Parameter(torch.zeros(1, 1, 1))
    optimizer = build_bank_optimizer(config.optimizer, proxies)
    for _ in range(2):
        proxies.grad = torch.ones(1, 1, 1)
        optimizer.step()
    assert proxies.item() == pytest.approx(-0.1 - 0.1 * (1 + momentum))


@pytest.mark.parametrize("rule", RULES)
def test_every_rule_steps_on_a_rank_without_classes(rule: str) -> None:
    config = configuration(proxies_name=rule)
    proxies = nn.Parameter(torch.zeros(0, 2, 3))
    proxies.grad = torch.zeros(0, 2, 3)
    if wants_sparse_gradient(config):
        proxies.grad = proxies.grad.to_sparse(1)
    build_bank_optimizer(config.optimizer, proxies).step()


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"proxies_name": "rowwise_adagrad"}, True),
        ({"proxies_name": "rowwise_adagrad", "regularization_weight": 0.3}, False),
        ({"proxies_name": "rowwise_adagrad", "selection": "histogram"}, True),
        ({"proxies_name": "rowwise_adagrad", "selection": "gather"}, False),
        ({"proxies_name": "sparse_adam"}, True),
        ({"proxies_name": "sgd"}, True),
        ({"proxies_name": "sgd", "regularization_weight": 0.3}, False),
        ({"proxies_name": "sgd", "proxies_momentum": 0.9}, False),
        ({"proxies_name": "sgd", "proxies_weight_decay": 1e-4}, False),
        ({"proxies_name": "adam"}, False),
        ({"name": "adamw"}, False),
    ],
)
def test_the_gradient_is_sparse_where_nothing_but_the_kept_classes_moves(
    settings: dict[str, Any], expected: bool
) -> None:
    assert wants_sparse_gradient(configuration(**settings)) == expected


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"proxies_momentum": 0.9}, r"proxies_momentum.*'adam'.*\b0\.9\b.*proxies_name"),
        ({"proxies_name": "sparse_adam", "proxies_momentum": 0.9}, "proxies_momentum.*'sparse_adam'"),
        (
            {"proxies_name": "rowwise_adagrad", "proxies_weight_decay": 1e-4},
            r"proxies_weight_decay.*'rowwise_adagrad'.*\b0\.0001",
        ),
        ({"proxies_name": "sparse_adam", "proxies_weight_decay": 1e-4}, "proxies_weight_decay.*'sparse_adam'"),
        (
            {"proxies_name": "sparse_adam", "regularization_weight": 0.3},
            r"proxies\.regularization_weight.*optimizer\.proxies_name.*\b0\.3\b",
        ),
        (
            {"proxies_name": "sparse_adam", "selection": "gather"},
            r'proxies\.selection.*optimizer\.proxies_name.*"gather"',
        ),
    ],
)
def test_settings_of_the_bank_that_contradict_each_other_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        configuration(**settings)
