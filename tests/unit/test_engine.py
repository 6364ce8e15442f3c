"""What the engine refuses at start, and that its loss scale and its skipped steps are the backbone's affair alone."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dist_proxygml import ProxyGMLLoss
from dist_proxygml.data.pipeline import Batch
from dist_proxygml.distributed.engine import Engine, engine_settings
from dist_proxygml.distributed.parallel import single_process
from dist_proxygml.training import step as step_module
from dist_proxygml.training.step import TrainState, build_train_state, train_step
from tests.small_training import configuration, same

LARGEST_HALF = 65504.0


class ScaledEngine:
    """What DeepSpeed's fp16 does with its loss and its steps, in float32 and in the open.

    The loss is multiplied by the scale, gradients are divided by it at the step, and a step whose scaled gradients
    exceed `largest` is skipped and halves the scale.
    """

    zero_stage, scales_loss, updates_plainly = 0, True, False

    def __init__(self, model: nn.Module, optimizer: Any, *, scale: float, largest: float, accumulation: int) -> None:
        self.module, self.optimizer = model, optimizer
        self.scale, self.largest, self.accumulation = scale, largest, accumulation
        self.micro_steps, self.applied = 0, False

    def embed(self, images: Tensor) -> Tensor:
        return self.module(images)

    def backward(self, embeddings: Tensor, gradient: Tensor) -> None:
        (self.scale / self.accumulation * (embeddings * gradient).sum()).backward()

    def step(self, *, norm: float | None, is_wanted: bool, measure_norm: bool) -> float | None:
        assert norm is None
        self.applied = False
        self.micro_steps += 1
        if self.micro_steps % self.accumulation:
            return None
        gradients = [p.grad for p in self.module.parameters()]
        if all(bool((g.abs() <= self.largest).all()) for g in gradients):
            for gradient in gradients:
                gradient /= self.scale
            self.optimizer.step()
            self.applied = True
        else:
            self.scale /= 2
        self.module.zero_grad()
        return None

    def step_was_applied(self) -> bool:
        return self.applied


# The bank's optimizers: with a gradient of every proxy, and with one of the kept proxies only.
BANKS = {
    "adam": {},
    "sgd": {"proxies_name": "sgd", "proxies_momentum": 0.9},
    "rowwise_adagrad": {"proxies_name": "rowwise_adagrad"},
    "sparse_adam": {"proxies_name": "sparse_adam"},
}


def scaled_state(
    monkeypatch: pytest.MonkeyPatch, bank: str, *, scale: float, largest: float, accumulation: int
) -> TrainState:
    def build(model: nn.Module, optimizer: Any, **_: Any) -> ScaledEngine:
        return ScaledEngine(model, optimizer, scale=scale, largest=largest, accumulation=accumulation)

    monkeypatch.setattr(step_module, "Engine", build)
    optimizer = {"name": "adam", "backbone_lr": 1e-2, "proxies_lr": 3e-2, "eps": 0.01, **BANKS[bank]}
    regularization_weight = 0.0 if bank in ("rowwise_adagrad", "sparse_adam") else 0.3
    config = configuration(
        optimizer=optimizer,
        proxies={"per_class": 2, "ratio": 0.5, "regularization_weight": regularization_weight, "scale": 4.0},
        schedule={"name": "constant"},
        training={"epochs": 1, "batch_size": 8},
        deepspeed={"gradient_accumulation_steps": accumulation},
    )
    state = build_train_state(config, single_process(), steps_per_epoch=100)
    state.engine.module.train()
    return state


def batches(step: int, accumulation: int) -> list[Batch]:
    generator = torch.Generator().manual_seed(step)
    size = 8 // accumulation
    return [
        Batch(
            torch.randint(256, (size, 3, 16, 16), generator=generator, dtype=torch.uint8),
            torch.randint(7, (size,), generator=generator),
            torch.arange(size),
            size,
            8,
        )
        for _ in range(accumulation)
    ]


def bank_of(state: TrainState) -> dict[str, Any]:
    return copy.deepcopy({"proxies": state.loss.proxies.detach(), "optimizer": state.bank_optimizer.state_dict()})


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("bank", BANKS)
def test_the_loss_scale_never_reaches_the_bank(monkeypatch: pytest.MonkeyPatch, bank: str, accumulation: int) -> None:
    ends = []
    for scale in (1.0, 65536.0):
        state = scaled_state(monkeypatch, bank, scale=scale, largest=torch.inf, accumulation=accumulation)
        start = bank_of(state)
        for step in range(4):
            train_step(state, batches(step, accumulation), measure=False)
            assert state.engine.step_was_applied()
        ends.append((bank_of(state), state.engine.module.state_dict()))
        assert not torch.equal(ends[-1][0]["proxies"], start["proxies"])
    # a power of two changes no digit, so backbone and bank are the same numbers after several steps
    assert same(*ends)


@pytest.mark.parametrize("bank", BANKS)
def test_a_skipped_step_is_skipped_by_the_bank_and_leaves_no_trace(monkeypatch: pytest.MonkeyPatch, bank: str) -> None:
    state = scaled_state(monkeypatch, bank, scale=2.0**24, largest=LARGEST_HALF, accumulation=2)
    applied = []
    for step in range(16):
        before, backbone = bank_of(state), copy.deepcopy(dict(state.engine.module.named_parameters()))
        if step == 12:
            state.engine.scale = 2.0**24  # one more overflow, with optimizer state to spoil
        train_step(state, batches(step, 2), measure=True)
        applied.append(state.engine.step_was_applied())
        assert same(bank_of(state)["proxies"], before["proxies"]) == (not applied[-1])
        assert same(dict(state.engine.module.named_parameters()), backbone) == (not applied[-1])
        if not applied[-1]:
            after = bank_of(state)
            assert same(after["optimizer"]["state"], before["optimizer"]["state"])
        assert state.loss.proxies.grad is None
        assert all(p.grad is None for p in state.engine.module.parameters())
    assert not applied[0]
    assert applied[11]
    assert not applied[12]

    # the same run over the applied steps alone, without a scale
    alone = scaled_state(monkeypatch, bank, scale=1.0, largest=torch.inf, accumulation=2)
    for step, was_applied in enumerate(applied):
        if was_applied:
            alone.step = step
            train_step(alone, batches(step, 2), measure=False)
    assert same(bank_of(alone), bank_of(state))


def backbone_and_bank() -> tuple[nn.Module, ProxyGMLLoss]:
    return nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 5)), ProxyGMLLoss(7, 5, topk=3)


def build_engine(model: nn.Module, *parameters: nn.Parameter, **options: Any) -> Engine:
    optimizer = torch.optim.Adam([*model.parameters(), *parameters])
    return Engine(model, optimizer, context=single_process(), **{"settings": {}, **options})


def test_a_bank_in_the_model_is_refused() -> None:
    model, loss = backbone_and_bank()
    with pytest.raises(ValueError, match=r"ProxyGMLLoss at '2'"):
        build_engine(nn.Sequential(*model, loss))
    with pytest.raises(ValueError, match="ProxyGMLLoss at ''"):
        build_engine(loss)


def test_a_parameter_of_the_bank_in_the_model_is_refused() -> None:
    model, loss = backbone_and_bank()
    model[1].register_parameter("classifier", loss.proxies)
    with pytest.raises(ValueError, match=r"'1\.classifier'"):
        build_engine(model, outside=loss.parameters())


def test_a_bank_in_the_optimizer_of_the_model_is_refused() -> None:
    model, loss = backbone_and_bank()
    with pytest.raises(ValueError, match=r"\[7, 1, 5\].*optimizer"):
        build_engine(model, loss.proxies)


def test_fp16_on_a_cpu_is_refused() -> None:
    model, _ = backbone_and_bank()
    with pytest.raises(ValueError, match=r"fp16.*deepspeed\.bf16"):
        build_engine(model, settings={"fp16": {"enabled": True}})


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"fp16": {"enabled": True}}, "loss scale.*stage 1, 2 or 3"),
        ({"fp16": {"enabled": True}, "zero_optimization": {"stage": 0}}, "loss scale"),
        ({"torch_autocast": {"enabled": True, "dtype": "float16"}}, "bfloat16.*'float16'"),
        ({"torch_autocast": {"enabled": True, "dtype": "half"}, "zero_optimization": {"stage": 2}}, "bfloat16.*'half'"),
        ({"torch_autocast": {"enabled": True}}, "bfloat16.*None"),
    ],
)
def test_settings_under_which_the_loss_scale_goes_wrong_are_refused(section: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        engine_settings(configuration(deepspeed=section), world_size=1)


@pytest.mark.parametrize(
    "section",
    [
        {"fp16": {"enabled": False}},
        {"fp16": {"enabled": True}, "zero_optimization": {"stage": 1}},
        {"bf16": {"enabled": True}},
        {"torch_autocast": {"enabled": True, "dtype": "bfloat16"}},
        {"torch_autocast": {"enabled": False, "dtype": "float16"}},
    ],
)
def test_settings_that_work_are_passed_on(section: dict[str, Any]) -> None:
    settings = engine_settings(configuration(deepspeed=section), world_size=3)
    assert section.items() <= settings.items()
    assert (settings["train_batch_size"], settings["train_micro_batch_size_per_gpu"]) == (12, 4)


def test_weights_on_disk_are_not_averaged() -> None:
    offload = {"stage": 3, "offload_optimizer": {"device": "nvme"}}
    section = {"zero_optimization": offload, "zero_force_ds_cpu_optimizer": False}
    engine_settings(configuration(deepspeed=section), world_size=1)
    with pytest.raises(ValueError, match=r"training\.ema_decay.*nvme"):
        engine_settings(
            configuration(deepspeed=section, training={"epochs": 1, "batch_size": 12, "ema_decay": 0.9}), world_size=1
        )
