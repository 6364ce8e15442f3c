"""What the head of a run will need, before anything is allocated: bytes per rank, bytes and messages per step.

    python -m dist_proxygml.plan --config configs/sop_8gpu.json --ranks 8 --memory "80 GiB"

The command also shows the rest of the run (training/run_plan.py) and, with --measure, its times
(training/rehearsal.py).

The head is the proxy bank, its gradient and optimizer state, and the working memory of one micro-batch; the backbone is
DeepSpeed's. Training plans too, prints the table and refuses at once what does not fit, with what would. Integers and
the configuration only: nothing here touches a process group.

The working memory is a model of head/selection.py and head/similarity.py, held to 10 % of what is measured by a test.
Of a sparse gradient the plan takes the most there can be, as if no two images kept the same proxy.
"""

import argparse
import contextlib
import json
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from dist_proxygml.backbones.build import build_backbone, check_images
from dist_proxygml.config import Config, load_config, parse_bytes, parse_config
from dist_proxygml.data.audit import shared_classes
from dist_proxygml.data.index import ShardIndex
from dist_proxygml.data.transforms import build_transform
from dist_proxygml.distributed.engine import check_settings, engine_settings, refuse_fp16_on_cpu
from dist_proxygml.distributed.memory import available_memory, format_bytes
from dist_proxygml.distributed.parallel import join_world, run_launcher, single_process
from dist_proxygml.evaluation.evaluator import Settings, check_split
from dist_proxygml.head.loss import checked_topk
from dist_proxygml.head.partition import ClassPartition
from dist_proxygml.head.regularizer import regularizer_anchors
from dist_proxygml.head.selection import candidate_bytes_per_row, rows_per_block
from dist_proxygml.head.similarity import chunk_width, sampled_bytes_per_row
from dist_proxygml.head.traffic import bytes_per_step, cheapest_selection, regularizer_bytes
from dist_proxygml.training.data import TrainingData, count_classes, open_split, open_training_data
from dist_proxygml.training.optim import build_backbone_optimizer, build_bank_optimizer, wants_sparse_gradient
from dist_proxygml.training.rehearsal import rehearse
from dist_proxygml.training.run_plan import RunPlan, has_index, plan_run
from dist_proxygml.training.transfer import open_transfer

_FLOAT = 4  # the bank and the similarities are float32
# Optimizer state, in numbers per element and per proxy.
_STATE = {
    "adam": (2, 0),
    "adamw": (2, 0),
    "sparse_adam": (2, 0),
    "sgd": (0, 0),
    "rowwise_adagrad": (0, 1),
}
# Bytes of a kept pair, at most, until the end of backward: row, proxy, similarity, class, weight, and copies in another
# order. They add to what the search took, for a C library keeps much of what was freed in between.
_BYTES_PER_KEPT_PAIR = 120
_EXAMPLES = """examples:
  python -m dist_proxygml.plan --config configs/sop_8gpu.json --ranks 8
  python -m dist_proxygml.plan --config configs/sop_8gpu.json --ranks 64 --memory "80 GiB" \\
      --set data.num_classes=10000000 proxies.topk=1000 proxies.ratio=null training.batch_size=8192
  python -m dist_proxygml.plan --config configs/demo_cpu.json --measure
  deepspeed --num_gpus 2 --module dist_proxygml.plan --config configs/demo_cpu.json --measure
"""


class DoesNotFitError(ValueError):
    """What a run needs is more than there is."""


@dataclass(frozen=True)
class HeadPlan:
    """Needs of the head on the rank that owns the most classes."""

    world_size: int
    num_proxies: int
    num_own_proxies: int
    topk: int
    selection: str
    anchors: int | None
    """Anchors of the regulariser in each micro-batch; None: none, or all proxies."""
    bank_bytes: int
    gradient_bytes: int
    optimizer_bytes: int
    working_bytes: int
    """Similarities, kept pairs, gathered embeddings and whatever else a micro-batch needs for a while."""
    received_bytes_per_step: int
    messages_per_step: int
    copy_bytes: int = 0
    """Of what a save in the background copies to the host, on CPUs; on GPUs the copy is beside the head's memory."""

    @property
    def total_bytes(self) -> int:
        """Most memory of the head on one rank."""
        return self.bank_bytes + self.gradient_bytes + self.optimizer_bytes + self.working_bytes + self.copy_bytes

    def __str__(self) -> str:
        """A table for people."""
        rows = [
            ("ranks", f"{self.world_size}"),
            ("proxies over all ranks", f"{self.num_proxies:,}"),
            ("kept per image k", f"{self.topk:,}"),
            ("selection", self.selection),
            ("bank", format_bytes(self.bank_bytes)),
            ("bank gradient", format_bytes(self.gradient_bytes)),
            ("bank optimizer state", format_bytes(self.optimizer_bytes)),
            ("working memory", format_bytes(self.working_bytes)),
            ("together", format_bytes(self.total_bytes)),
            ("received per step", format_bytes(self.received_bytes_per_step)),
            ("messages per step", f"{self.messages_per_step}"),
        ]
        if self.copy_bytes:
            rows.insert(8, ("copy for saves", format_bytes(self.copy_bytes)))
        if self.anchors is not None:
            rows.insert(4, ("regulariser anchors", f"{self.anchors:,}"))
        return "plan of the head, per rank:\n" + "\n".join(f"  {name:<24}{value:>14}" for name, value in rows)


def plan_head(config: Config, *, world_size: int, device: str = "cpu") -> HeadPlan:
    """The needs of `config` on `world_size` ranks with devices of type `device`.

    Raises:
        ValueError: k <= N, or the batch does not divide over the ranks.
    """
    proxies, dim, num_classes = config.proxies, config.backbone.embedding_dim, config.num_trained_classes
    num_proxies = num_classes * proxies.per_class
    topk = checked_topk(num_classes, proxies.per_class, ratio=proxies.ratio, topk=proxies.topk)
    num_negatives = topk - proxies.per_class
    micro = config.micro_batch_size(world_size)
    batch, budget = micro * world_size, proxies.memory_budget_bytes
    sparse = wants_sparse_gradient(config)
    sizes = {
        "batch_size": batch,
        "num_classes": num_classes,
        "proxies_per_class": proxies.per_class,
        "embedding_dim": dim,
        "topk": topk,
        "world_size": world_size,
    }
    selection: str = proxies.selection
    if selection == "auto":
        selection = cheapest_selection(**sizes, may_gather=not sparse)

    # 1. What stays: the bank of the rank with the most classes, its gradient, its optimizer's state.
    own_proxies = ClassPartition(num_classes, world_size).num_local * proxies.per_class
    bank = own_proxies * dim * _FLOAT
    per_element, per_proxy = _STATE[config.optimizer.proxies_rule]
    per_element += config.optimizer.proxies_momentum > 0
    optimizer = own_proxies * (per_element * dim + per_proxy) * _FLOAT
    gathers_bank = selection == "gather"
    rows, proxies_at_hand = (micro, num_proxies) if gathers_bank else (batch, own_proxies)
    num_kept = rows * min(topk, proxies_at_hand)
    is_accumulated = config.accumulation > 1
    gradient = bank * (1 + is_accumulated)  # the next micro-batch's, before the two are added
    if sparse:  # of classes, with all their proxies; accumulated ones are appended, then added up in a copy
        touched = min(own_proxies // proxies.per_class, num_kept) * proxies.per_class * dim * _FLOAT
        gradient = touched * (config.accumulation + is_accumulated + (proxies.per_class > 1))

    # 2. What comes and goes with a micro-batch: the search for its pairs, then what is computed from them.
    choice = {"num_negatives": num_negatives, "num_proxies": proxies_at_hand}
    num_choosing = 1 if gathers_bank else world_size
    block = rows_per_block(rows, **choice, budget=budget, world_size=num_choosing)
    width = min(chunk_width(block, memory_budget=budget, device=device), proxies_at_hand)
    guessing = min(budget // 4, block * sampled_bytes_per_row(num_negatives, proxies_at_hand))
    choosing = block * candidate_bytes_per_row(**choice, world_size=num_choosing)
    working = (
        max(guessing, choosing)
        + num_kept * _BYTES_PER_KEPT_PAIR
        + 2 * width * block * _FLOAT
        + 3 * rows * dim * _FLOAT
        + proxies_at_hand * _FLOAT  # inverse lengths
    )
    if gathers_bank and world_size > 1:  # the bank of all ranks, padded and joined, and its gradient
        working += 3 * num_proxies * dim * _FLOAT
    anchors = None
    regularizer = 0
    if proxies.regularization_weight > 0:
        anchors = regularizer_anchors(
            num_classes,
            dim,
            proxies_per_class=proxies.per_class,
            wanted=proxies.regularization_anchors,
            memory_budget=budget,
            batch_size=batch,
        )
        regularizer = regularizer_bytes(anchors, num_classes=num_classes, embedding_dim=dim, world_size=world_size)
        working += bank  # its own gradient, before the two are added
        # class sums, transposed too, their gradient and its sum; or anchors likewise, and a chunk of class sums
        working += 4 * num_classes * dim * _FLOAT if anchors is None else 5 * anchors * dim * _FLOAT + (8 << 20)

    if proxies.initialization == "class_mean":  # before there is a gradient: the sums are float64
        working = max(working, 2 * bank - gradient - optimizer)

    # 3. Messages. Sizes; then gather: bank and its gradient, loss; candidates: embeddings, labels, to the owners, back,
    # MAX, SUM, gradient; histogram: four histograms and a count instead of the two exchanges. The regulariser: class
    # sums, their gradient and a number, or anchors, MAX, SUM and their gradient.
    num_blocks = -(-rows // block)
    exchange = {"gather": 0, "candidates": 2, "histogram": 5}[selection] * num_blocks
    messages = 1 + (3 if gathers_bank else 5 + exchange)
    if proxies.regularization_weight > 0:
        messages += 3 if anchors is None else 4
    return HeadPlan(
        world_size=world_size,
        num_proxies=num_proxies,
        num_own_proxies=own_proxies,
        topk=topk,
        selection=selection,
        anchors=anchors,
        bank_bytes=bank,
        gradient_bytes=gradient,
        optimizer_bytes=optimizer,
        working_bytes=working,
        received_bytes_per_step=config.accumulation * (bytes_per_step(selection, **sizes) + regularizer),
        messages_per_step=0 if world_size == 1 else config.accumulation * messages,
        copy_bytes=bank + optimizer if config.checkpoint.asynchronous and device == "cpu" else 0,
    )


class CheckedRun(NamedTuple):
    """What a run starts with, as far as can be told without starting it."""

    config: Config
    """With the number of classes."""
    plan: HeadPlan
    engine_settings: dict[str, Any]
    data: TrainingData | None
    """None: there are no shards to look at."""
    test_index: ShardIndex | None


def check_run(
    config: Config,
    *,
    world_size: int,
    device: str | None = None,
    is_start: bool = False,
    is_what_if: bool = False,
) -> CheckedRun:
    """Build, small or for shapes only, whatever a run is built of, so that what does not go together is found before
    anything is written or waits in a queue. Uses no collectives, and leaves random generators as they were.

    Args:
        config: the run.
        world_size: ranks that it is meant for.
        device: type of their devices, "cpu" or "cuda"; None where that is not known.
        is_start: the run is about to start: its shards must be there, and weights are loaded by whoever builds it. Else
            those are looked at that this machine sees.
        is_what_if: shards with another number of classes are not looked at either.

    Raises:
        ValueError: with what is wrong.
    """
    # 1. Settings among each other.
    config = count_classes(config)
    if config.proxies.fused and device == "cpu":
        raise ValueError("expected an NVIDIA GPU with proxies.fused, got a device of type cpu; set it to false")
    settings = engine_settings(config, world_size)
    check_settings(settings)
    if device is not None:
        refuse_fp16_on_cpu(settings, device)
    plan = plan_head(config, world_size=world_size, device=device or "cpu")

    # 2. Images.
    data, test_index = None, None
    if is_start or has_index(config):
        is_other = is_what_if and config.data.stream is None
        if not is_other or open_split(config, config.data.train_split).num_classes == config.num_classes:
            data, test_index = _open_data(config)
            data.loader(replace(single_process(), world_size=world_size), epoch=0, start=0)
            if data.count_steps() == 0:
                raise ValueError(
                    f"expected at least one step an epoch, got {data.epoch_size:,} images for a training.batch_size of "
                    f"{config.training.batch_size} with data.drop_last; lower it, or set drop_last to false"
                )
    image = torch.zeros(3, 97, 80, dtype=torch.uint8)
    for name in ("train_transform", "test_transform"):
        with _refused(f"data.{name}"):
            build_transform(getattr(config.data, name))([image], [np.random.default_rng(0)])

    # 3. Network and optimizers.
    weights, init_from = config.backbone.pretrained, config.checkpoint.init_from
    with torch.random.fork_rng(devices=[]), _refused("backbone"):
        model = build_backbone(
            config.backbone, load_pretrained=not is_start and weights is not None and Path(weights).is_file()
        )
    batch_size = config.micro_batch_size(world_size) * world_size  # of all ranks, as BatchNorm sees it
    check_images(
        model, config.backbone, batch_size, size=config.data.train_transform.size, setting="data.train_transform.size"
    )
    check_images(
        model.eval(), config.backbone, 1, size=config.data.test_transform.size, setting="data.test_transform.size"
    )
    trunk, embedding = model.parameter_groups()
    with _refused("optimizer"):
        build_backbone_optimizer(config.optimizer, trunk=trunk, embedding=embedding)
        build_bank_optimizer(config.optimizer, torch.nn.Parameter(torch.zeros(1, 1, 1)))
    is_new = not is_start and not (config.run_directory / "checkpoints").exists()
    if data is not None and is_new and init_from is not None and Path(init_from).exists():
        open_transfer(config, data.index, single_process())
    return CheckedRun(config, plan, settings, data, test_index)


@contextlib.contextmanager
def _refused(section: str) -> Iterator[None]:
    """Say which section it was that a library raised an error of its own for."""
    try:
        yield
    except (ValueError, OSError):
        raise
    except Exception as error:
        reason = (str(error).splitlines() or [""])[0]
        raise ValueError(
            f"expected a section {section} that can be built, got {type(error).__name__}: {reason}; change its settings"
        ) from error


def _open_data(config: Config) -> tuple[TrainingData, ShardIndex]:
    """What to train and what to evaluate on."""
    data = open_training_data(config)
    test_index = open_split(config, config.data.test_split)
    shared = None if data.index is None else shared_classes(data.index, test_index)
    if shared and not config.evaluation.allow_seen_classes:
        raise ValueError(
            f"expected classes in data.test_split {test_index.split!r} that are not trained, got {len(shared):,} of "
            f"{test_index.num_classes:,} that are in {data.index.split!r} too, such as "  # type: ignore[union-attr]
            f"{', '.join(map(repr, shared[:3]))}; build shards with splits by class, or set "
            "evaluation.allow_seen_classes to true"
        )
    for index in (data.validation, test_index):
        if index is None:
            continue
        is_test = index is test_index
        settings = Settings(
            tuple(config.evaluation.recall_at), protocol=config.evaluation.protocol if is_test else "custom"
        )
        gallery = config.evaluation.gallery_split if is_test else None
        try:
            check_split(index, None if gallery is None else index.open_sibling(gallery), settings)
        except ValueError as error:
            raise ValueError(f"{index.split}: {error}") from None
    return data, test_index


def check_fits(config: Config, plan: HeadPlan, *, memory: int, device: str = "cpu") -> None:
    """Refuse a head that does not fit into `memory` bytes of one rank.

    Raises:
        ValueError: with what it needs, what there is, and what would fit.
    """
    if plan.total_bytes <= memory:
        return
    bank, gradient, optimizer, working, total = map(
        format_bytes,
        (plan.bank_bytes, plan.gradient_bytes, plan.optimizer_bytes, plan.working_bytes, plan.total_bytes),
    )
    copy = f", copy for saves in the background {format_bytes(plan.copy_bytes)}" if plan.copy_bytes else ""
    raise DoesNotFitError(
        f"expected a head of at most {format_bytes(memory)} per rank, the memory that is left there, got {total} on "
        f"{plan.world_size} rank(s): bank {bank}, gradient {gradient}, optimizer state {optimizer}, working memory "
        f"{working}{copy}; {_what_would_fit(config, plan, memory, device)}"
    )


def _what_would_fit(config: Config, plan: HeadPlan, memory: int, device: str) -> str:
    """Changes, each alone, with which the head fits."""

    def fits(changes: dict[str, object], world_size: int) -> bool:
        raw = config.model_dump(mode="json")
        for key, value in changes.items():
            section, field = key.split(".")
            raw[section][field] = value
        try:
            changed = parse_config(raw, source="the changed configuration")
            return plan_head(changed, world_size=world_size, device=device).total_bytes <= memory
        except ValueError:  # what cannot run is no remedy
            return False

    row_wise: dict[str, object] = {"optimizer.proxies_name": "rowwise_adagrad"}
    row_wise |= {
        f"optimizer.{name}": 0.0
        for name in ("proxies_weight_decay", "proxies_momentum")
        if getattr(config.optimizer, name) > 0
    }
    remedies = []
    alone: list[dict[str, object]] = [
        row_wise,
        {"proxies.selection": "candidates"},
        {"proxies.memory_budget": "64 MiB"},
        {"checkpoint.asynchronous": False},
    ]
    for changes in alone:
        if fits(changes, plan.world_size):
            settings = [f"{k}={value if isinstance(value, str) else json.dumps(value)}" for k, value in changes.items()]
            remedies.append("--set " + " ".join(json.dumps(text) if " " in text else text for text in settings))
    slots = config.training.batch_size // config.accumulation
    more = (ranks for ranks in range(plan.world_size + 1, slots + 1) if slots % ranks == 0)
    ranks = next((ranks for ranks in more if fits({}, ranks)), None)
    if ranks is not None:
        remedies.append(f"{ranks} ranks")
    if not remedies:
        return "no single change of optimizer, selection, budget or number of ranks would fit; use fewer proxies"
    return "what would fit: " + ", or ".join(remedies)


def describe_plans(config: Config, plan: HeadPlan) -> str:
    """The tables of the head and of the rest of the run.

    Raises:
        ValueError: the shards are there but unusable, or the backbone cannot be built.
    """
    return f"{plan}\n{_plan_rest(config, plan)}"


def _plan_rest(config: Config, plan: HeadPlan) -> RunPlan:
    whole_bank = plan.num_proxies * (plan.bank_bytes + plan.optimizer_bytes) // plan.num_own_proxies
    return plan_run(config, world_size=plan.world_size, bank_bytes=whole_bank)


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status: 0 the run fits, 1 it does not, 2 a mistake in what was asked for."""
    parser = argparse.ArgumentParser(
        prog="python -m dist_proxygml.plan",
        description="Predict what a run needs: memory, bytes and messages of the head, steps, memory of the backbone, "
        "checkpoints. Starts nothing, unless it is to measure.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", required=True, type=Path, help="configuration of the run")
    parser.add_argument("--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="override settings")
    parser.add_argument("--ranks", type=int, help="number of ranks (default: those started, or 1)")
    parser.add_argument(
        "--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu", help="of the ranks"
    )
    parser.add_argument(
        "--memory", help='memory of one rank, such as "80 GiB" (default: what is left on this machine, for one rank)'
    )
    parser.add_argument(
        "--measure",
        action="store_true",
        help="train for twelve steps on this machine and estimate the times of the run",
    )
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)  # given by the deepspeed launcher
    given = parser.parse_args(arguments)
    is_main = os.environ.get("RANK", "0") == "0"
    try:
        ranks = int(os.environ.get("WORLD_SIZE", "1")) if given.ranks is None else given.ranks
        if ranks < 1:
            raise ValueError(f"expected at least one rank, got --ranks {ranks}")
        device = given.device if torch.cuda.is_available() or given.device == "cuda" else None
        config, plan, *_ = check_run(
            load_config(given.config, given.set), world_size=ranks, device=device, is_what_if=True
        )
        memory = parse_bytes(given.memory) if given.memory else _memory_here(given.device)
        rest = _plan_rest(config, plan)
        if is_main:
            print(f"{plan}\n{rest}", flush=True)
        check_fits(config, plan, memory=memory, device=given.device)
        if rest.needed_bytes > rest.free_bytes:
            raise DoesNotFitError(rest.what_does_not_fit)
        if is_main:
            print(f"the head fits into {format_bytes(memory)}", flush=True)
        if given.measure:
            measured = rehearse(config, join_world())
            if is_main:
                print(measured.describe(config, rest))
    except ValueError as error:
        if is_main:
            print(f"error: {error}", file=sys.stderr)
        return 1 if isinstance(error, DoesNotFitError) else 2
    return 0


def _memory_here(device: str) -> int:
    """Memory that is left for a rank on this machine.

    Raises:
        ValueError: it has no such device.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            "expected a GPU for --device cuda, whose free memory a rank may take, found none; say what a rank has, "
            'such as --memory "80 GiB"'
        )
    return available_memory(torch.device(device))


class _StatusError(Exception):
    def __init__(self, status: int) -> None:
        super().__init__(status)
        self.status = status


def _launched() -> None:
    status = main()
    if status:
        raise _StatusError(status)


if __name__ == "__main__":
    run_launcher(_launched)
