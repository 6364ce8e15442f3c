"""Checkpoints of a tiny backbone and a bank, and what lies in their folders."""

import copy
import hashlib
from pathlib import Path

import torch
from torch import Tensor, nn

from dist_proxygml.checkpoint.folder import Retention, RunState, SavedCheckpoint
from dist_proxygml.checkpoint.writer import save_checkpoint
from dist_proxygml.distributed.engine import Engine
from dist_proxygml.distributed.parallel import ParallelContext
from dist_proxygml.head.loss import ProxyGMLLoss

NUM_CLASSES = 7  # uneven over 2 and 3 ranks


SETTINGS = {"seed": 0, "class table": "abc"}


def parts(context: ParallelContext, stage: int, seed: int) -> tuple[Engine, ProxyGMLLoss, torch.optim.Optimizer]:
    """A tiny backbone under DeepSpeed and a bank; `seed` varies all numbers."""
    torch.manual_seed(seed)
    model = nn.Linear(5, 4)
    settings = {
        "train_micro_batch_size_per_gpu": 6 // context.world_size,
        "zero_optimization": {"stage": stage},
        "zero_force_ds_cpu_optimizer": False,
    }
    engine = Engine(model, torch.optim.Adam(model.parameters(), lr=0.1), settings=settings, context=context)
    loss = ProxyGMLLoss(NUM_CLASSES, 4, proxies_per_class=2, ratio=0.5, group=context.group, seed=seed)
    return engine, loss, torch.optim.Adam(loss.parameters(), lr=0.1)


def step(
    context: ParallelContext, engine: Engine, loss: ProxyGMLLoss, optimizer: torch.optim.Optimizer, seed: int
) -> float:
    generator = torch.Generator().manual_seed(seed)
    images, labels = torch.randn(6, 5, generator=generator), torch.randint(0, NUM_CLASSES, (6,), generator=generator)
    own = slice(context.rank * 6 // context.world_size, (context.rank + 1) * 6 // context.world_size)
    embeddings = nn.functional.normalize(engine.embed(images[own]))
    leaf = embeddings.detach().requires_grad_()
    terms = loss(leaf, labels[own])
    terms.total.backward()
    engine.backward(embeddings, leaf.grad)
    engine.step(measure_norm=False)
    optimizer.step()
    optimizer.zero_grad()
    return terms.total.item()


KEEP_TWO = Retention(keep_last=2)


class PlainEngine:
    """What a checkpoint asks of an engine, and of a copy of one, without DeepSpeed."""

    zero_stage = 0

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.module = nn.Linear(5, 4)
        self.module.register_buffer("mean", torch.zeros(8))  # no optimizer knows of it
        self.optimizer = torch.optim.SGD(self.module.parameters(), lr=0.1, momentum=0.9)

    def save(self, directory: Path) -> None:
        (directory / "engine").mkdir(exist_ok=True)
        torch.save(self.optimizer.state_dict(), directory / "engine" / "optimizer.pt")

    def snapshot(self) -> "PlainEngine":
        return copy.deepcopy(self)

    def full_state_dict(self) -> dict[str, Tensor]:
        return dict(self.module.state_dict())


class Saver:
    """A bank and an engine whose checkpoints differ from step to step."""

    def __init__(self, context: ParallelContext, directory: Path) -> None:
        self.context, self.directory, self.engine = context, directory, PlainEngine()
        self.loss = ProxyGMLLoss(NUM_CLASSES, 4, proxies_per_class=2, ratio=0.5, group=context.group, seed=0)
        self.optimizer = torch.optim.Adam(self.loss.parameters(), lr=0.1)

    def __call__(self, number: int, retention: Retention = KEEP_TWO) -> SavedCheckpoint:
        self.loss.proxies.grad = torch.full_like(self.loss.proxies, float(number))
        self.optimizer.step()
        return self.save(number, retention)

    def save(self, number: int, retention: Retention = KEEP_TWO) -> SavedCheckpoint:
        return save_checkpoint(
            self.directory,
            state=RunState(number, 0, 6 * number, self.context.world_size, SETTINGS),
            engine=self.engine,
            loss=self.loss,
            bank_optimizer=self.optimizer,
            context=self.context,
            retention=retention,
        )


def names_in(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def contents(directory: Path) -> dict[str, str]:
    """sha256 of every file below, by name."""
    files = [path for path in directory.rglob("*") if path.is_file()]
    return {str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
