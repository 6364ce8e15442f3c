"""Ranks' rows as one DTensor, the form in which torch.distributed.checkpoint saves and loads on any number of ranks.

The rows are placed `Shard(0)`, which splits as torch.chunk does; the last ranks may have fewer or none.
"""

import math

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard


def as_row_tensor(rows: Tensor, num_rows: int, group: dist.ProcessGroup | None) -> Tensor:
    """Wrap this rank's rows, which are not copied, as its part of [num_rows, ...]. No communication.

    Without a group, rows are returned as they are.
    """
    if group is None:
        return rows
    mesh = DeviceMesh.from_group(group, rows.device.type)
    shape = torch.Size((num_rows, *rows.shape[1:]))
    stride = tuple(math.prod(shape[dimension + 1 :]) for dimension in range(len(shape)))
    wrapped: Tensor = DTensor.from_local(rows, mesh, [Shard(0)], run_check=False, shape=shape, stride=stride)
    return wrapped


def own_rows(value: Tensor) -> Tensor:
    """Return this rank's rows of a DTensor; another tensor is returned as it is."""
    return value.to_local() if isinstance(value, DTensor) else value
