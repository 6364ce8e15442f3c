"""Resources of the head, predicted before anything is allocated: bytes per rank, bytes and messages per step.

The head is the proxy bank, its gradient and optimizer state, and the working memory of one micro-batch; the backbone is
DeepSpeed's. Training plans too: it prints the table and refuses at once what does not fit, suggesting what would. Only
integers and the configuration; nothing here touches a process group.

A loss of pytorch-metric-learning is planned as what it is: a copy of all its parameters on every rank, and at least six
matrices of the batch's pairs or of its images and classes. Triplets, up to the cube of the batch, come on top.

The working memory models head/selection.py and head/similarity.py; a test keeps it within 10 % of what is measured.
A sparse gradient is planned at its maximum, as if no two images kept the same proxy.
"""

import json
from dataclasses import dataclass
from typing import Any

from dist_proxygml.config import Config, LossConfig, parse_config
from dist_proxygml.distributed.memory import format_bytes
from dist_proxygml.head.classification import keeps_matrix
from dist_proxygml.head.loss import checked_topk
from dist_proxygml.head.partition import ClassPartition
from dist_proxygml.head.pml import try_pml_loss
from dist_proxygml.head.regularizer import regularizer_anchors
from dist_proxygml.head.selection import BYTES_PER_ENTRY, candidate_bytes_per_row, rows_per_block
from dist_proxygml.head.similarity import chunk_width, default_memory_budget, sampled_bytes_per_row
from dist_proxygml.head.traffic import bytes_per_step, cheapest_selection, regularizer_bytes
from dist_proxygml.rules import check_classes
from dist_proxygml.training.optim import wants_sparse_gradient

_FLOAT = 4  # of the bank and the similarities, which are float32
# Optimizer state, in numbers per element and per proxy.
_STATE = {
    "adam": (2, 0),
    "adamw": (2, 0),
    "sparse_adam": (2, 0),
    "sgd": (0, 0),
    "rowwise_adagrad": (0, 1),
}
# Copies of a chunk's similarities where all proxies compete: similarities, scores, logits and weights.
_CHUNKS_AT_A_TIME = 5
# Matrices of a batch's pairs: distances, exponentials, masks and their gradients.
_PAIR_MATRICES = 6
# Maximum bytes of a kept pair until the end of backward: row, proxy, similarity, class, weight, and copies in another
# order. They add to the memory of the search, because the C library keeps much of what was freed in between.
_BYTES_PER_KEPT_PAIR = 120


class DoesNotFitError(ValueError):
    """The run needs more memory than is available."""

    status = 1  # of a command that was asked whether it fits


@dataclass(frozen=True)
class HeadPlan:
    """Resources of the head on the rank that owns the most classes."""

    world_size: int
    num_proxies: int
    """0: a loss whose parameters, here called bank, are whole on every rank."""
    num_own_proxies: int
    topk: int | None
    """k; None where not the top-k competes."""
    selection: str
    anchors: int | None
    """Anchors of the regulariser in each micro-batch; None: none, or all proxies."""
    bank_bytes: int
    gradient_bytes: int
    optimizer_bytes: int
    working_bytes: int
    """Similarities, kept pairs, gathered embeddings and other temporaries of a micro-batch."""
    received_bytes_per_step: int
    messages_per_step: int
    copy_bytes: int = 0
    """Host copies of a background save, on CPUs; on GPUs the copy is not in the head's memory."""

    @property
    def bank_name(self) -> str:
        """What is trained, for people."""
        return "bank" if self.num_proxies else "loss"

    @property
    def total_bytes(self) -> int:
        """Peak memory of the head on one rank."""
        return self.bank_bytes + self.gradient_bytes + self.optimizer_bytes + self.working_bytes + self.copy_bytes

    def __str__(self) -> str:
        """Format the plan as a table."""
        rows = [
            ("ranks", f"{self.world_size}"),
            *([("proxies over all ranks", f"{self.num_proxies:,}")] if self.num_proxies else []),
            *([] if self.topk is None else [("kept per image k", f"{self.topk:,}"), ("selection", self.selection)]),
            (self.bank_name, format_bytes(self.bank_bytes)),
            (f"{self.bank_name} gradient", format_bytes(self.gradient_bytes)),
            (f"{self.bank_name} optimizer state", format_bytes(self.optimizer_bytes)),
            ("working memory", format_bytes(self.working_bytes)),
            ("together", format_bytes(self.total_bytes)),
            ("received per step", format_bytes(self.received_bytes_per_step)),
            ("messages per step", f"{self.messages_per_step}"),
        ]
        names = [name for name, _ in rows]
        if self.copy_bytes:
            rows.insert(names.index("together"), ("copy for saves", format_bytes(self.copy_bytes)))
        if self.anchors is not None:
            rows.insert(names.index(self.bank_name), ("regulariser anchors", f"{self.anchors:,}"))
        return "plan of the head, per rank:\n" + "\n".join(f"  {name:<24}{value:>14}" for name, value in rows)


def plan_head(config: Config, *, world_size: int, device: str = "cpu") -> HeadPlan:
    """Predict the resources of `config` on `world_size` ranks with devices of type `device`.

    Raises:
        ValueError: k <= N, or the batch does not divide over the ranks.
    """
    if config.loss is not None:
        return _plan_pml(config, config.loss, world_size=world_size, device=device)
    proxies, dim, num_classes = config.proxies, config.backbone.embedding_dim, config.num_trained_classes
    num_proxies = num_classes * proxies.per_class
    check_classes(num_classes, share=proxies.share)
    topk = None
    if proxies.negatives == "topk":
        topk = checked_topk(num_classes, proxies.per_class, ratio=proxies.ratio, topk=proxies.topk, section="proxies.")
    num_prefixes, prefix_dims = len(config.backbone.matryoshka_dims), sum(config.backbone.matryoshka_dims)
    micro = config.micro_batch_size(world_size)
    batch, budget = micro * world_size, proxies.memory_budget_bytes or default_memory_budget(device)
    sparse = wants_sparse_gradient(config)
    sizes: dict[str, Any] = {
        "batch_size": batch,
        "num_classes": num_classes,
        "proxies_per_class": proxies.per_class,
        "embedding_dim": dim,
        "topk": topk,
        "world_size": world_size,
    }
    selection: str = "none" if topk is None else proxies.selection
    if selection == "auto":
        selection = cheapest_selection(**sizes, may_gather=not sparse)

    # 1. Persistent: the bank of the rank with the most classes, its gradient, its optimizer's state.
    own_proxies = ClassPartition(num_classes, world_size).num_local * proxies.per_class
    bank = own_proxies * dim * _FLOAT
    per_element, per_proxy = _STATE[config.optimizer.proxies_rule]
    per_element += config.optimizer.proxies_momentum > 0
    optimizer = own_proxies * (per_element * dim + per_proxy) * _FLOAT
    gathers_bank = selection == "gather"
    rows, proxies_at_hand = (micro, num_proxies) if gathers_bank else (batch, own_proxies)
    competing = proxies_at_hand  # whose rows the step touches
    if proxies.share is not None:
        own_classes = proxies_at_hand // proxies.per_class
        competing = min(own_classes, round(own_classes * proxies.share) + batch) * proxies.per_class
    num_kept = rows * min(topk or proxies.per_class, proxies_at_hand)
    is_accumulated = config.accumulation > 1
    gradient = bank * (1 + is_accumulated)  # that of the next micro-batch, before the two are added
    if sparse:  # per class, with all its proxies; several are appended, then summed in a copy
        most = num_kept if topk is not None else competing // proxies.per_class
        touched = min(own_proxies // proxies.per_class, most) * proxies.per_class * dim * _FLOAT
        is_copied = is_accumulated or num_prefixes > 0
        gradient = touched * (config.accumulation * (1 + num_prefixes) + is_copied + (proxies.per_class > 1))

    # 2. Temporary, per micro-batch: the search for its pairs, then the computations on them.
    block, choosing = rows, 0
    num_choosing = 1 if gathers_bank else world_size
    if topk is not None:
        choice = {"num_negatives": topk - proxies.per_class, "num_proxies": proxies_at_hand}
        block = rows_per_block(rows, **choice, budget=budget, world_size=num_choosing, device=device)
        guessing = min(budget // 4, block * sampled_bytes_per_row(topk - proxies.per_class, proxies_at_hand))
        choosing = max(guessing, block * candidate_bytes_per_row(**choice, world_size=num_choosing, device=device))
    width = min(chunk_width(block, memory_budget=budget, device=device), proxies_at_hand)
    working = (
        choosing
        + num_kept * _BYTES_PER_KEPT_PAIR
        + (2 if topk is not None else _CHUNKS_AT_A_TIME) * width * block * _FLOAT
        + 3 * rows * dim * _FLOAT
        + competing * _FLOAT  # inverse lengths
    )
    keeps_matrix_here = topk is not None and keeps_matrix(
        rows,
        num_proxies=proxies_at_hand,
        memory_budget=budget,
        device=device,
        needs_pairs=sparse or proxies.fused or proxies.matmul_dtype != "float32",
    )
    if keeps_matrix_here:
        working = rows * proxies_at_hand * BYTES_PER_ENTRY + (3 * rows * dim + proxies_at_hand) * _FLOAT
    if proxies.share is not None:  # the drawn classes' proxies and their gradient
        working += 2 * competing * dim * _FLOAT
    if num_prefixes:  # their kept pairs and rows until backward; copies, or a gradient, and that padded
        working += num_prefixes * num_kept * _BYTES_PER_KEPT_PAIR + 3 * rows * prefix_dims * _FLOAT
        copied = prefix_dims if proxies.fused else max(config.backbone.matryoshka_dims)
        working += competing * (copied + (0 if sparse else dim)) * _FLOAT
    if gathers_bank and world_size > 1:  # the gathered bank, padded and concatenated, and its gradient
        working += 3 * num_proxies * dim * _FLOAT
    anchors = None
    regularizer = 0
    if proxies.regularization_weight > 0:
        anchors = regularizer_anchors(
            num_classes,
            dim,
            proxies_per_class=proxies.per_class,
            wanted=proxies.regularization_anchors,
            memory_budget=proxies.memory_budget_bytes or default_memory_budget("cpu"),
            batch_size=batch,
        )
        regularizer = regularizer_bytes(anchors, num_classes=num_classes, embedding_dim=dim, world_size=world_size)
        working += bank  # its own gradient, before the two are added
        # class sums, transposed too, their gradient and its sum; or anchors likewise, and a chunk of class sums
        working += 4 * num_classes * dim * _FLOAT if anchors is None else 5 * anchors * dim * _FLOAT + (8 << 20)

    if proxies.initialization == "class_mean":  # before there is a gradient: the sums are float64
        working = max(working, 2 * bank - gradient - optimizer)

    # 3. Messages. Sizes; then gather: bank and its gradient, loss; candidates: embeddings, labels, to the owners, back,
    # MAX, SUM, gradient; histogram: four histograms and a count instead of the two exchanges. A prefix: an exchange,
    # MAX and SUM of its own. The regulariser: class sums, their gradient and a number, or anchors, MAX, SUM and their
    # gradient.
    num_blocks = 1 if keeps_matrix_here else -(-rows // block)
    exchange = {"none": 0, "gather": 0, "candidates": 2, "histogram": 5}[selection] * num_blocks
    messages = 1 + (3 if gathers_bank else 5 + exchange + num_prefixes * (2 + exchange))
    others, extra = world_size - 1, 0
    if proxies.learn_scale:  # its gradient
        messages, extra = messages + 1, 2 * others * _FLOAT // world_size
    if proxies.margin is not None and proxies.margin.name == "adaface":  # the embeddings' lengths
        messages, extra = messages + 1, extra + others * micro * _FLOAT
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
        received_bytes_per_step=config.accumulation
        * (bytes_per_step(selection, **sizes, num_prefixes=num_prefixes) + regularizer + extra),
        messages_per_step=0 if world_size == 1 else config.accumulation * messages,
        copy_bytes=bank + optimizer if config.checkpoint.asynchronous and device == "cpu" else 0,
    )


def _plan_pml(config: Config, loss: LossConfig, *, world_size: int, device: str) -> HeadPlan:
    """Predict the resources of a loss of pytorch-metric-learning, of which every rank has all.

    Raises:
        ValueError: it cannot be built, or the batch does not divide over the ranks.
    """
    dim, others = config.backbone.embedding_dim, world_size - 1
    micro = config.micro_batch_size(world_size)
    batch = micro * world_size
    arguments = loss.arguments(config.accumulation)
    size = try_pml_loss(arguments, config.num_trained_classes, dim)
    parameters = size.parameters * _FLOAT
    per_element = _STATE[config.optimizer.proxies_rule][0] + (config.optimizer.proxies_momentum > 0)
    compared = max(batch + (arguments["memory_size"] or 0), size.parameters // dim)
    # counts of rows, embeddings, labels and the loss; then the embeddings' gradient
    received = others * (2 * 8 + 2 * micro * dim * _FLOAT + micro * 8) + 2 * others * _FLOAT // world_size
    return HeadPlan(
        world_size=world_size,
        num_proxies=0,
        num_own_proxies=0,
        topk=None,
        selection="none",
        anchors=None,
        bank_bytes=parameters + size.memory_bytes,
        gradient_bytes=2 * parameters,  # a rank's own, and the average
        optimizer_bytes=per_element * parameters,
        working_bytes=(4 * batch * dim + _PAIR_MATRICES * batch * compared) * _FLOAT,
        received_bytes_per_step=config.accumulation * received + 2 * others * parameters // world_size,
        messages_per_step=0 if world_size == 1 else config.accumulation * 5 + size.tensors,
        copy_bytes=(
            (1 + per_element) * parameters + size.memory_bytes
            if config.checkpoint.asynchronous and device == "cpu"
            else 0
        ),
    )


def check_fits(config: Config, plan: HeadPlan, *, memory: int, device: str = "cpu") -> None:
    """Refuse a head that does not fit into `memory` bytes of one rank.

    Raises:
        ValueError: it does not fit; the message says what is needed, what is available, and what would fit.
    """
    if plan.total_bytes <= memory:
        return
    bank, gradient, optimizer, working, total = map(
        format_bytes,
        (plan.bank_bytes, plan.gradient_bytes, plan.optimizer_bytes, plan.working_bytes, plan.total_bytes),
    )
    copy = f", copy for saves in the background {format_bytes(plan.copy_bytes)}" if plan.copy_bytes else ""
    raise DoesNotFitError(
        f"expected a head of at most {format_bytes(memory)} per rank, the memory that is available, got {total} on "
        f"{plan.world_size} rank(s): {plan.bank_name} {bank}, gradient {gradient}, optimizer state {optimizer}, "
        f"working memory {working}{copy}; {_suggest_what_fits(config, plan, memory, device)}"
    )


def _suggest_what_fits(config: Config, plan: HeadPlan, memory: int, device: str) -> str:
    """Suggest single changes with which the head fits."""
    if config.loss is not None:
        return (
            f"every rank holds all of {config.loss.name} for {config.num_trained_classes:,} classes; remove the "
            "section loss and take a head of the section proxies, whose classes are divided over the ranks, or lower "
            "training.batch_size or loss.cross_batch_memory.memory_size"
        )

    def fits(changes: dict[str, object], world_size: int) -> bool:
        raw = config.model_dump(mode="json")
        for key, value in changes.items():
            section, field = key.split(".")
            raw[section][field] = value
        try:
            changed = parse_config(raw, source="the changed configuration")
            return plan_head(changed, world_size=world_size, device=device).total_bytes <= memory
        except ValueError:  # a configuration that cannot run is no remedy
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
