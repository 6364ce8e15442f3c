"""Resharding of a backbone's optimizer state saved under ZeRO, for one rank of another number of ranks.

ZeRO concatenates the flattened parameters of a group and partitions the result over ranks: float32 weights, moments.
Stages 1 and 2 partition the whole, and each file lists its fragments of parameters; stage 3 partitions every parameter
separately, into equal parts of which the last is padded.

Chosen: reassemble every parameter by name from the files of all ranks and partition it as the present engine does; this
adds no cost to saving, and DeepSpeed's own loader does the rest. The files are memory-mapped, so a rank holds one
parameter at a time besides its own part. Declined: DeepSpeed's universal checkpoints, which rewrite the checkpoint as
four files per parameter, in other processes, and give every parameter group the settings of the first.
"""

import copy
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

WEIGHTS = "weights"  # among the names of the optimizer's state


class Fragment(NamedTuple):
    """A rank's elements `offset` to `offset + numel` of a flattened parameter, at `start` in its part."""

    name: str
    start: int
    numel: int
    offset: int


class Part(NamedTuple):
    """A rank's state of each group."""

    fragments: Sequence[Sequence[Fragment]]
    state: Sequence[Mapping[str, Any]]
    """`WEIGHTS` and moments, flat, and step counters."""


def equal_fragments(shapes: Sequence[Mapping[str, torch.Size]], *, rank: int, num_ranks: int) -> list[list[Fragment]]:
    """Compute a rank's fragments under ZeRO stage 3, by group, from the shapes of the parameters in order."""
    groups = []
    for group in shapes:
        fragments, start = [], 0
        for name, shape in group.items():
            size = math.ceil(shape.numel() / num_ranks)
            offset = min(rank * size, shape.numel())
            fragments.append(Fragment(name, start, min(size, shape.numel() - offset), offset))
            start += size
        groups.append(fragments)
    return groups


def equal_part(pieces: Sequence[Tensor], numel: int, *, rank: int, num_ranks: int) -> Tensor:
    """Cut a rank's equal part of a flattened parameter, padded with zeros, from the parts of all saving ranks."""
    whole = torch.cat([piece.flatten() for piece in pieces])[:numel]
    size = math.ceil(numel / num_ranks)
    own = whole[min(rank * size, numel) : (rank + 1) * size]
    return torch.cat([own, own.new_zeros(size - own.numel())])


def reshard(
    parts: Sequence[Part],
    *,
    names: Sequence[Sequence[str]],
    fragments: Sequence[Sequence[Fragment]],
    sizes: Sequence[int],
) -> list[dict[str, Any]]:
    """Assemble a rank's state, by group, as in `Part`, padded with zeros.

    Args:
        parts: of all saving ranks in order, so that the fragments of a parameter are consecutive.
        names: the parameters of each group, including those of which the rank has no elements.
        fragments: the rank's fragments.
        sizes: elements of its part of each group.
    """
    pieces: dict[str, dict[str, list[Tensor]]] = defaultdict(lambda: defaultdict(list))
    counters: dict[str, dict[str, Any]] = {}
    for part in parts:
        for group, state in zip(part.fragments, part.state, strict=True):
            flat = {key: value for key, value in state.items() if isinstance(value, Tensor) and value.ndim == 1}
            for fragment in group:
                counters[fragment.name] = {key: value for key, value in state.items() if key not in flat}
                for key, value in flat.items():
                    pieces[fragment.name][key].append(value.narrow(0, fragment.start, fragment.numel))
    result = []
    for group_names, group, size in zip(names, fragments, sizes, strict=True):
        own = copy.deepcopy(counters[group_names[0]])  # a separate one per group, because optimizers increment it
        for key, some in pieces[group_names[0]].items():
            own[key] = torch.zeros(size, dtype=some[0].dtype)
            for fragment in group:
                whole = torch.cat(pieces[fragment.name][key])
                cut = whole.narrow(0, fragment.offset, fragment.numel)
                own[key].narrow(0, fragment.start, fragment.numel).copy_(cut)
        result.append(own)
    return result
