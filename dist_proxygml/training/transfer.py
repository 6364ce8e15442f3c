"""Initialise a new run from a trained model: its backbone, and the proxies of shared classes, matched by name.

    rank 0      opens the model, verifies it, and finds each class's row in its bank by the class's name
    all ranks   receive the rows of their own classes, load the backbone, and read those rows

A class that only the new run has keeps its initial proxies; a class that only the model has is dropped. Optimizers
start anew. Classes match by name; where a table has a name twice, the source's id must match too. Classes without a
name, which the index calls by their number, match in the same shards only: the numbers of another data set mean other
classes.

Chosen: one lookup on rank 0 and no exchange of rows; each rank reads what it needs. Declined: a user-supplied mapping
of classes (rename classes in the shards instead); adapting another number of proxies per class or dimension.

Dimension key: C classes of the new run, c those of this rank.
"""

from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from dist_proxygml.backbones.from_weights import with_colours
from dist_proxygml.checkpoint.model import StoredBank, TrainedModel, open_trained
from dist_proxygml.checkpoint.writer import load_backbone
from dist_proxygml.config import OF_TRAINING, BackboneConfig, Config, flattened
from dist_proxygml.data.index import ClassEntry, ShardIndex
from dist_proxygml.distributed.collectives import all_reduce_sum
from dist_proxygml.distributed.parallel import (
    ParallelContext,
    run_long,
    run_on_rank_zero,
    run_on_rank_zero_for_long,
    run_together,
)
from dist_proxygml.head.optim import bring_to_unit_length_
from dist_proxygml.head.partition import ClassPartition

# Settings of a backbone that may change from a run to the next one: what its weights compute stays.
_FREE_OF_BACKBONE = OF_TRAINING | {"pretrained", "matryoshka_dims", "batch_norm", "channels_last"}


@dataclass(frozen=True)
class Transfer:
    """The parts of a trained model that a new run takes over."""

    model: TrainedModel
    rows_c: np.ndarray | None
    """int64 [c]; the row of each class of this rank in the model's bank, -1 for a new class. None: no proxies."""
    num_classes: int
    num_kept: int
    num_dropped: int

    @property
    def num_new(self) -> int:
        """Number of classes whose proxies are initialised as configured."""
        return self.num_classes - self.num_kept

    def load_backbone_(self, model: nn.Module) -> None:
        """Load the weights into a backbone before it enters an engine, in its precision. No collective.

        Raises:
            ValueError: the network is a different one.
        """
        types = {name: value.dtype for name, value in model.state_dict().items()}
        load_backbone(self.model.path, model)  # in their trained precision, memory-mapped
        weights = {name: value.to(types[name], copy=True) for name, value in model.state_dict().items()}
        model.load_state_dict(weights, assign=True)

    def other_network(self, config: BackboneConfig) -> str | None:
        """Return a warning if the weights fit a backbone, but it computes something else with them: from other colours,
        with another norm or activation.
        """
        own = with_colours(dict(flattened({"backbone": config.of_trained_model()})))
        stored = with_colours(self.model.settings)
        unsaid = {f"backbone.{name}": value for name, value in config.unsaid.items()}
        names = sorted(name for name in own.keys() | stored.keys() if name.startswith("backbone."))
        parts = []
        for name in (name for name in names if name.split(".")[1] not in _FREE_OF_BACKBONE):
            there, here = (found.get(name, unsaid.get(name)) or None for found in (stored, own))
            if name == "backbone.name":  # a tag of timm's names weights, not a network
                there, here = (str(value).partition(".")[0] for value in (there, here))
            if there != here:
                parts.append(f"{name} {there}, here {here}")
        if not parts:
            return None
        return (
            f"{self.model.path} was trained with {'; '.join(parts)}: its weights may fit, but mean something "
            "else here; set the same, unless you want to train on with the other"
        )

    def load_proxies_(self, proxies_cND: Tensor, context: ParallelContext, *, unit_norm: bool) -> None:
        """Copy the proxies of this rank's classes that the model has, bit by bit; with `unit_norm` normalise all.

        Called on all ranks.

        Raises:
            ValueError: on every rank, if the bank cannot be read.
        """
        if self.rows_c is not None:
            rows_c = self.rows_c
            run_together(context, lambda: copy_rows_(proxies_cND, self.model.bank(), rows_c))
        if unit_norm:
            bring_to_unit_length_(proxies_cND)

    def __str__(self) -> str:
        start = f"from {self.model.path}, step {self.model.step}"
        if self.rows_c is None:
            return f"{start}: its backbone; what the loss learns of all {self.num_classes:,} classes is new"
        return (
            f"{start}: its backbone, and proxies of {self.num_kept:,} of {self.num_classes:,} classes "
            f"({self.num_new:,} new, {self.num_dropped:,} dropped)"
        )


def copy_rows_(proxies_cND: Tensor, bank: StoredBank, rows_c: np.ndarray) -> None:
    """Copy a row of a stored bank, bit by bit, into the proxies of each class of this rank. No collective.

    Only the range of each part that contains this rank's rows is read. Memory beyond the proxies: three such parts.

    Args:
        proxies_cND: float32; overwritten in place.
        bank: of the same N and D.
        rows_c: int64 [c]; the row of each class, -1 leaves its proxies unchanged.

    Raises:
        ValueError: the bank cannot be read.
    """
    order = np.argsort(rows_c, kind="stable")
    order = order[np.searchsorted(rows_c[order], 0) :]
    wanted = rows_c[order]  # ascending
    for part in bank.parts():
        here = slice(*np.searchsorted(wanted, part))
        if here.start == here.stop:
            continue
        first, last = int(wanted[here][0]), int(wanted[here][-1])
        rows_xND = torch.empty(last + 1 - first, *bank.shape[1:])
        bank.read_(rows_xND, first=first)
        values = rows_xND[torch.from_numpy(wanted[here] - first)]
        proxies_cND.index_copy_(0, torch.from_numpy(order[here]).to(proxies_cND.device), values.to(proxies_cND.device))


def open_transfer(config: Config, index: ShardIndex | None, context: ParallelContext) -> Transfer | None:
    """Open and verify the model that `checkpoint.init_from` names, and match it with the configuration and the classes
    of `index`, the training split; None if it is unset. Called on all ranks, before anything is built.

    Raises:
        ValueError: on every rank, if the model is missing or damaged, does not fit, or shares no class.
    """
    if config.checkpoint.init_from is None:
        return None
    path = Path(config.checkpoint.init_from)
    model = run_on_rank_zero_for_long(context, _open, path, config)
    num_classes = config.num_trained_classes
    if not config.checkpoint.init_proxies:
        return Transfer(model, None, num_classes, num_kept=0, num_dropped=0)
    assert index is not None  # Config refuses a stream
    num_stored = run_on_rank_zero(context, _check_shape, model, config)
    no_rows = np.zeros(num_classes, np.int64)  # the remaining ranks' part
    rows_C = run_long(context, lambda: _rows_by_name(model, index) if context.is_main else no_rows)
    rows_C = all_reduce_sum(torch.from_numpy(rows_C).to(context.device), group=context.group).cpu().numpy()
    partition = ClassPartition(config.num_trained_classes, context.world_size, context.rank)
    rows_c = rows_C[partition.start : partition.stop].copy()
    num_kept = int((rows_C >= 0).sum())
    return Transfer(model, rows_c, num_classes, num_kept=num_kept, num_dropped=num_stored - num_kept)


def match_classes(new: Sequence[ClassEntry], stored: Sequence[ClassEntry]) -> np.ndarray:
    """Return the position in `stored` of each class of `new`, -1 if missing; int64 [len(new)]."""
    ambiguous = _names_that_come_twice(new) | _names_that_come_twice(stored)

    def key(entry: ClassEntry) -> Hashable:
        return (entry.name, entry.source_id) if entry.name in ambiguous else entry.name

    rows = {key(entry): row for row, entry in enumerate(stored) if not _is_unnamed(entry)}
    found = (-1 if _is_unnamed(entry) else rows.get(key(entry), -1) for entry in new)
    return np.fromiter(found, np.int64, len(new))


def _open(path: Path, config: Config) -> TrainedModel:
    if path.resolve().is_relative_to(config.run_directory.resolve()):
        raise ValueError(
            f"checkpoint.init_from {path} lies in the folder of this very run, which a new run of its name moves away; "
            "give this run another name with --set name=NAME, or continue it with --resume auto"
        )
    return open_trained(path)


def _check_shape(model: TrainedModel, config: Config) -> int:
    """Refuse a bank with another N or D; return its number of classes."""
    num_stored, per_class, embedding_dim = model.bank().shape
    for name, here, there in (
        ("backbone.embedding_dim", config.backbone.embedding_dim, embedding_dim),
        ("proxies.per_class", config.proxies.per_class, per_class),
    ):
        if here != there:
            raise ValueError(
                f"{name} is {here}, but the proxies of {model.path} have {there}; set it to {there}, or "
                "checkpoint.init_proxies to false to take over the backbone only"
            )
    return num_stored


def _rows_by_name(model: TrainedModel, index: ShardIndex) -> np.ndarray:
    same = {"class table": index.class_table_sha256, "shards": index.sha256}
    if all(model.settings.get(name) == value for name, value in same.items()):
        return np.arange(index.num_classes)
    stored = model.classes()
    new = index.classes
    rows_C = match_classes(new, stored)
    if (rows_C >= 0).any():
        return rows_C
    for where, table in ((model.path, stored), (index.location, new)):
        if all(_is_unnamed(entry) for entry in table):
            raise ValueError(
                f"expected class names to find proxies by, but the classes of {where} have numbers only, which mean "
                'other classes in other shards; give the samples\' JSON a "class_name" and index the shards again, or '
                "set checkpoint.init_proxies to false to take over the backbone only"
            )
    raise ValueError(
        f"expected classes that {model.path} and {index.location} have in common, found none: the {len(stored):,} of "
        f"the one ({_some(stored)}) are not among the {len(new):,} of the other ({_some(new)}); correct "
        "checkpoint.init_from, or set checkpoint.init_proxies to false to take over the backbone only"
    )


def _is_unnamed(entry: ClassEntry) -> bool:
    """Whether the index made up the name, as it does for shards without names."""
    return entry.source_id == entry.label and entry.name == str(entry.label)


def _names_that_come_twice(classes: Sequence[ClassEntry]) -> set[str]:
    names = [entry.name for entry in classes]
    if len(set(names)) == len(names):
        return set()
    return {name for name, count in Counter(names).items() if count > 1}


def _some(classes: Sequence[ClassEntry]) -> str:
    return ", ".join(chain((entry.name for entry in classes[:2]), ["..."] if len(classes) > 2 else []))
