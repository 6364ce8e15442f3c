"""A backbone's optimizer state that W ranks saved under ZeRO, as one rank of another number of ranks would have it.

ZeRO lays the parameters of a group behind each other, flat, and cuts the result into one part a rank: weights in
float32, moments. Stages 1 and 2 cut the whole, and each file says what of which parameter lies where in it; stage 3
cuts every parameter by itself, into equal parts of which the last is padded.

Chosen: to put every parameter together again by its name, from the files of all ranks, and to cut it as the engine at
hand does; saving costs nothing for it, and DeepSpeed's own loader does the rest. The files are mapped, so a rank holds
one parameter at a time besides its own part. Declined: DeepSpeed's universal checkpoints, which rewrite the checkpoint
as four files a parameter, in other processes, and give every parameter group the settings of the first.
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
    """What a rank has of a parameter: elements `offset` to `offset + numel` of it, flat, at `start` in its part."""

    name: str
    start: int
    numel: int
    offset: int


class Part(NamedTuple):
    """What a rank has, by group."""

    fragments: Sequence[Sequence[Fragment]]
    state: Sequence[Mapping[str, Any]]
    """`WEIGHTS` and moments, flat, and step counters."""


def equal_fragments(shapes: Sequence[Mapping[str, torch.Size]], *, rank: int, num_ranks: int) -> list[list[Fragment]]:
    """The fragments of a rank under ZeRO stage 3, by group, from the shapes of the parameters in their order."""
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


def reshard(
    parts: Sequence[Part],
    *,
    names: Sequence[Sequence[str]],
    fragments: Sequence[Sequence[Fragment]],
    sizes: Sequence[int],
) -> list[dict[str, Any]]:
    """The state of a rank, by group, as in `Part`, padded with zeros.

    Args:
        parts: of all ranks that saved, in their order, in which the fragments of a parameter follow each other.
        names: of the parameters of each group, also of those that the rank has nothing of.
        fragments: what of them the rank has.
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
        own = copy.deepcopy(counters[group_names[0]])  # of each group its own, to be counted on
        for key, some in pieces[group_names[0]].items():
            own[key] = torch.zeros(size, dtype=some[0].dtype)
            for fragment in group:
                whole = torch.cat(pieces[fragment.name][key])
                cut = whole.narrow(0, fragment.offset, fragment.numel)
                own[key].narrow(0, fragment.start, fragment.numel).copy_(cut)
        result.append(own)
    return result
