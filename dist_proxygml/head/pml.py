"""Losses and miners of pytorch-metric-learning, on the global batch.

    X, y = rows of all ranks          embeddings with gradient
    loss = Loss(X, y, Miner(X, y))    computed whole on every rank, from the same draws

Chosen: replicas. Every rank has all of a loss's parameters, a memory of earlier embeddings and the matrix of the global
batch's pairs; a loss over very many classes belongs in loss.py, which partitions them. Every rank's copy of the loss
has the complete gradient, so backward of the gathering adds up W of them: W times the gradient of a rank's rows, which
an engine that takes the mean over ranks divides out again. The parameters' gradients are averaged, so replicas cannot
drift apart where a device rounds the same sum differently twice; the loss, too.

Declined: the library's DistributedLossWrapper, which gathers without a factor and with equal batches only; names other
than those that the library exports, so a configuration runs no code of its own.

Dimension key: b images of this rank, B of the global batch, D embedding.
"""

import contextlib
import difflib
import inspect
from collections.abc import Iterator, Mapping
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from dist_proxygml.distributed.collectives import (
    NonFiniteError,
    all_reduce_sum,
    gather_rows,
    group_named,
    world_size_of,
)
from dist_proxygml.head.global_loss import GlobalLoss
from dist_proxygml.head.reference import LossTerms

Kind = Literal["loss", "miner", "distance", "reducer", "regularizer"]

# Options that are objects of the library: {"name": ..., "options": {...}}.
_NESTED: dict[str, Kind] = {
    "distance": "distance",
    "reducer": "reducer",
    "embedding_regularizer": "regularizer",
    "weight_regularizer": "regularizer",
}
# Exported, but of no use by name: base classes, and what needs another loss, views of the same image or an order.
_NOT_BY_NAME = {
    "GenericPairLoss",
    "ManifoldLoss",
    "VICRegLoss",
    "EmbeddingsAlreadyPackagedAsTriplets",
    "MultipleReducers",
}
_TRIAL_CLASSES, _TRIAL_IMAGES = 3, 4  # per class


class PmlLoss(GlobalLoss):
    """A loss of pytorch-metric-learning on the images of all ranks.

    The embeddings' gradient is for an engine that takes the mean over ranks; those of the parameters are this rank's
    until `average_gradients_`.

    Args:
        name: of pytorch_metric_learning.losses.
        num_classes: C.
        embedding_dim: D.
        options: arguments of the loss; distance, reducer and regularizers as {"name": ..., "options": {...}}. It gets
            num_classes and embedding_size where it takes them.
        miner: name and options, of pytorch_metric_learning.miners.
        memory_size: number of earlier embeddings that the batch is compared with, too (CrossBatchMemory).
        memory_after: forward passes before that memory is filled and used.
        group: ranks that share a batch; None for this process alone.
        dtype: torch.float32 or float64.
        seed: of the parameters, and of what loss and miner draw.

    Raises:
        ValueError: an unknown name, or options that the library refuses.
    """

    partition = None
    topk = None
    log_scale = None
    queue: Tensor
    memory: Any
    miner: Any

    def __init__(
        self,
        name: str,
        num_classes: int,
        embedding_dim: int,
        *,
        options: Mapping[str, Any] | None = None,
        miner: tuple[str, Mapping[str, Any]] | None = None,
        memory_size: int | None = None,
        memory_after: int = 0,
        group: dist.ProcessGroup | None = None,
        dtype: torch.dtype = torch.float32,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.name, self.num_classes, self.embedding_dim = name, num_classes, embedding_dim
        self.memory_size, self.memory_after = memory_size, memory_after
        self.group, self.seed, self.draw = group_named(group), seed, 0
        self._dtype = dtype
        self._options, self._miner_options = dict(options or {}), miner
        known = {"num_classes": num_classes, "embedding_size": embedding_dim, "descriptors_dim": embedding_dim}
        with _drawing(seed, 0, torch.device("cpu")):
            self.loss = _build("loss", name, self._options, known, setting="loss")
        self.miner = None if miner is None else _build("miner", *miner, {}, setting="loss.miner")
        self.memory = None if memory_size is None else self._build_memory(memory_size)
        # Its position and whether it is full, which the library keeps as attributes.
        self.register_buffer("queue", torch.zeros(2, dtype=torch.int64))
        _register_plain_tensors(self)
        self.to(dtype)

    def forward(self, embeddings: Tensor, labels: Tensor) -> LossTerms:
        """Compute the loss of the global batch. Called on all ranks, each with any number of images, even none.

        Args:
            embeddings: [b, D].
            labels: [b] int64 global class ids.

        Returns:
            The loss as total and classification; the other terms are 0.

        Raises:
            ValueError: as ProxyLoss.
        """
        row_counts = self.agree_on_rows(embeddings, labels)
        copies = world_size_of(self.group)
        with torch.autocast(embeddings.device.type, enabled=False):
            embeddings_BD = gather_rows(embeddings.to(self.dtype), row_counts=row_counts, group=self.group)
            labels_B = gather_rows(labels, row_counts=row_counts, group=self.group)
            with _drawing(self.seed, self.draw, embeddings.device):
                # Every rank runs backward of the gathering, also where a loss has no pair left on one of them.
                own = self._loss_of(embeddings_BD, labels_B) + (embeddings_BD * 0).sum()
            value = all_reduce_sum(own.detach(), group=self.group) / copies
        if not bool(value.isfinite()):  # the same number on every rank
            raise NonFiniteError(
                f"expected a finite loss, got {value.item()} of {self.name}; the embeddings are finite, so lower the "
                "learning rates, or change loss.options"
            )
        self.draw += 1
        zero = value.new_zeros(())
        return LossTerms(own + (value - own).detach(), value, zero, zero)

    def average_gradients_(self) -> list[Tensor]:
        """Average the parameters' gradients over ranks in place, 0 where there are none, and return them. Called on
        all ranks, after backward.
        """
        gradients = []
        for parameter in self.parameters():
            gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            parameter.grad = all_reduce_sum(gradient, group=self.group).div_(world_size_of(self.group))
            gradients.append(parameter.grad)
        return gradients

    @property
    def dtype(self) -> torch.dtype:
        """Precision of the computation."""
        return self._dtype

    @property
    def device(self) -> torch.device:
        """Device of the state."""
        return self.queue.device

    @property
    def described(self) -> str:
        """The loss, its miner and its memory."""
        parts = [_described(f"pml/{self.name}", self._options)]
        if self._miner_options is not None:
            parts.append(_described(*self._miner_options))
        if self.memory_size is not None:
            after = f" after {self.memory_after:,} batches" if self.memory_after else ""
            parts.append(f"memory of {self.memory_size:,} embeddings{after}")
        return "; ".join(parts)

    def _loss_of(self, embeddings_BD: Tensor, labels_B: Tensor) -> Tensor:
        if self.memory is not None and self.draw >= self.memory_after:
            if len(labels_B) > self.memory.memory_size:
                raise ValueError(
                    f"expected loss.cross_batch_memory.memory_size of at least the {len(labels_B)} images of a global "
                    f"batch, got {self.memory.memory_size}; raise it"
                )
            position, is_full = self.queue.tolist()
            self.memory.queue_idx, self.memory.has_been_filled = position, bool(is_full)
            loss = self.memory(embeddings_BD, labels_B)
            self.queue.copy_(torch.tensor([self.memory.queue_idx, self.memory.has_been_filled]))
        else:
            pairs = None if self.miner is None else self.miner(embeddings_BD, labels_B)
            loss = self.loss(embeddings_BD, labels_B, pairs)
        if not isinstance(loss, Tensor) or loss.ndim:
            raise ValueError(f"expected one number from {self.name}, got {type(loss).__name__}; change its reducer")
        for module in self.modules():  # running averages are no part of the next step's graph
            for name, value in list(module.named_buffers(recurse=False)):
                setattr(module, name, value.detach())
        return loss

    def _build_memory(self, memory_size: int) -> Any:
        from pytorch_metric_learning.losses import CrossBatchMemory

        supported = CrossBatchMemory.supported_losses()
        if self.name not in supported:
            raise ValueError(
                f"expected no loss.cross_batch_memory with {self.name}, got one; remove it, or take one of "
                f"{', '.join(supported)}"
            )
        return CrossBatchMemory(self.loss, self.embedding_dim, memory_size=memory_size, miner=self.miner)


class PmlSize(NamedTuple):
    """Numbers that a loss keeps on every rank."""

    parameters: int
    tensors: int
    """Number of parameters' tensors."""
    memory_bytes: int
    """Of earlier embeddings."""


def try_pml_loss(arguments: Mapping[str, Any], num_classes: int, embedding_dim: int) -> PmlSize:
    """Build the loss for few classes, call it once, and return its size for `num_classes`. No collective; random
    generators are unchanged.

    Every parameter of the library has a size that is constant or proportional to the number of classes, so that of
    three and four classes tells it without allocating it.

    Args:
        arguments: of PmlLoss, but for the numbers of classes and dimensions.
        num_classes: C.
        embedding_dim: D.

    Raises:
        ValueError: the library is not installed, a name is unknown, or the options cannot be used.
    """
    num_images = _TRIAL_CLASSES * _TRIAL_IMAGES
    small = {**arguments, "memory_after": 0}
    if small.get("memory_size") is not None:
        small["memory_size"] = min(small["memory_size"], 2 * num_images)
    first, second = (PmlLoss(num_classes=n, embedding_dim=embedding_dim, **small) for n in (3, 4))
    generator = torch.Generator().manual_seed(0)
    images_BD = torch.nn.functional.normalize(torch.randn(num_images, embedding_dim, generator=generator))
    labels_B = torch.arange(num_images) % _TRIAL_CLASSES
    try:
        if first.memory is not None and small["memory_size"] < num_images:
            images_BD, labels_B = images_BD[: small["memory_size"]], labels_B[: small["memory_size"]]
        first(images_BD.requires_grad_(), labels_B).total.backward()
    except Exception as error:
        raise ValueError(
            f"expected loss.options that {first.described} can be computed with, got {_reason(error)}; change them"
        ) from error
    numbers, more = (sum(parameter.numel() for parameter in loss.parameters()) for loss in (first, second))
    memory = (arguments.get("memory_size") or 0) * (embedding_dim * 4 + 8)
    total = numbers + (num_classes - 3) * (more - numbers)
    return PmlSize(total, len(list(first.parameters())), memory)


def names(kind: Kind) -> dict[str, type]:
    """Return the classes of one kind that may be named, by name.

    Raises:
        ValueError: the library is not installed.
    """
    try:
        from pytorch_metric_learning import distances, losses, miners, reducers, regularizers
    except ImportError as error:
        raise ValueError(
            f"expected pytorch-metric-learning for loss.name, got {_reason(error)}; "
            'pip install "dist_proxygml[pml]", or remove the section loss'
        ) from None
    module, base = {
        "loss": (losses, losses.BaseMetricLossFunction),
        "miner": (miners, miners.BaseMiner),
        "distance": (distances, distances.BaseDistance),
        "reducer": (reducers, reducers.BaseReducer),
        "regularizer": (regularizers, regularizers.BaseRegularizer),
    }[kind]
    exported = {name: value for name, value in vars(module).items() if inspect.isclass(value)}
    return {n: c for n, c in exported.items() if issubclass(c, base) and c is not base and n not in _NOT_BY_NAME}


def _build(kind: Kind, name: Any, options: Any, known: Mapping[str, int], *, setting: str) -> Any:
    """Build an object of the library by its name; `known` are arguments that it gets where it requires them."""
    allowed = names(kind)
    if name not in allowed:
        nearest = difflib.get_close_matches(str(name), allowed, n=3, cutoff=0.0)
        raise ValueError(
            f"expected {setting}.name to be a {kind} of pytorch-metric-learning, got {name!r}; did you mean "
            f"{' or '.join(nearest)}?"
        )
    options = dict(options)
    for key, nested in _NESTED.items():
        value = options.get(key)
        if value is not None:
            where = f"{setting}.options.{key}"
            if not isinstance(value, Mapping) or not {"name"} <= value.keys() <= {"name", "options"}:
                raise ValueError(
                    f'expected {where} to be {{"name": ..., "options": {{...}}}}, got {value!r}; change it'
                )
            options[key] = _build(nested, value["name"], value.get("options", {}), {}, setting=where)
    required = known.keys() & _required_arguments(allowed[name])
    if options.keys() & required:
        twice = ", ".join(sorted(options.keys() & required))
        raise ValueError(f"expected no {twice} in {setting}.options, which the run knows; remove it")
    try:
        return allowed[name](**options, **{key: known[key] for key in required})
    except Exception as error:
        raise ValueError(f"expected {setting}.options that {name} takes, got {_reason(error)}; change them") from error


def _required_arguments(kind: type) -> set[str]:
    """Names of the arguments without a default, also of the base classes that get what a class passes on."""
    found: set[str] = set()
    for base in kind.__mro__:
        if "__init__" in vars(base):
            parameters = inspect.signature(base.__init__).parameters.values()  # type: ignore[misc]
            found |= {p.name for p in parameters if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD}
            if not any(p.kind is p.VAR_KEYWORD for p in parameters):
                break
    return found - {"self"}


def _register_plain_tensors(module: nn.Module) -> None:
    """Make plain tensor attributes buffers, which move and are stored with the loss."""
    for part in list(module.modules()):
        for name in [name for name, value in vars(part).items() if isinstance(value, Tensor)]:
            value = vars(part).pop(name)
            part.register_buffer(name, value)


@contextlib.contextmanager
def _drawing(seed: int, draw: int, device: torch.device) -> Iterator[None]:
    """Seed the random generators by (seed, draw) inside the block, and restore them after it."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(int(np.random.SeedSequence([seed, draw]).generate_state(1)[0]))
        numpy_state = np.random.get_state()
        np.random.seed(torch.initial_seed() % 2**32)
        try:
            yield
        finally:
            np.random.set_state(numpy_state)


def _described(name: str, options: Mapping[str, Any]) -> str:
    listed = (f"{key} {v['name'] if isinstance(v, Mapping) else v}" for key, v in options.items())
    return f"{name}: {', '.join(listed)}" if options else name


def _reason(error: BaseException) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
