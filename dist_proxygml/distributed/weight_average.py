"""Exponential moving average (EMA) of the backbone's weights, in float32.

    average <- average + (1 - d) * (weights - average)        after every optimizer step that was applied
    d = min(decay, (1 + t) / (10 + t))                        t: optimizer steps before this one

Averaged weights generalise at least as well as those of the last step, at the price of their memory (Polyak and
Juditsky 1992; Tarvainen and Valpola 2017). The factor d grows with t, as in TensorFlow's ExponentialMovingAverage,
so that the random weights of the start are soon forgotten; as a function of the step alone it needs no counter.

The average is of the float32 weights that the optimizer updates, under bf16 and fp16 too, and each rank keeps that of
the fragments which it updates itself: all under ZeRO 0, its partition otherwise. An update is elementwise, so it
needs no communication and gives the same digits for any number of ranks. Whole weights are assembled for an
evaluation or a checkpoint only. Weights that DeepSpeed keeps on disk (nvme) are refused by engine_settings.

Buffers are those of the backbone at that moment: BatchNorm's running statistics are moving averages already.
Declined: an average of the proxies, which retrieval does not use; a copy on every rank under ZeRO.
"""

from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from dist_proxygml.distributed.collectives import all_reduce_sum
from dist_proxygml.distributed.engine import Engine


class WeightAverage:
    """The average of an engine's weights; at first it equals them. Built, and every method called, on all ranks.

    Args:
        engine: the backbone's.
        decay: the largest d, between 0 and 1.
    """

    def __init__(self, engine: Engine, decay: float) -> None:
        self._engine, self.decay = engine, decay
        self._fragments: dict[str, Tensor] = {
            name: fragment.values.clone() for name, fragment in engine.float32_weights().items()
        }

    def update(self, step: int) -> None:
        """Take in the weights of an optimizer step that was applied. No collective.

        Args:
            step: optimizer steps before that one.
        """
        if self._fragments:
            now = [fragment.values for fragment in self._engine.float32_weights().values()]
            torch._foreach_lerp_(list(self._fragments.values()), now, 1 - min(self.decay, (1 + step) / (10 + step)))

    def full_state_dict(self) -> dict[str, Tensor]:
        """Return the complete averaged parameters in float32, with the backbone's buffers, on every rank.

        Parameters that are not trained are the backbone's. One all-reduce a parameter under ZeRO.
        """
        parameters = dict(self._engine.module.named_parameters(remove_duplicate=False))
        state = self._engine.full_state_dict()
        own = self._engine.float32_weights()
        whole: dict[int, Tensor] = {}  # a shared parameter has several names
        for name, parameter in parameters.items():
            if not parameter.requires_grad:
                state[name] = state[name].to(torch.promote_types(state[name].dtype, torch.float32))
                continue
            if id(parameter) not in whole:
                whole[id(parameter)] = self._assemble(name, state[name], offset=own[name].offset if name in own else 0)
            state[name] = whole[id(parameter)]
        return state

    def _assemble(self, name: str, like: Tensor, *, offset: int) -> Tensor:
        """Join the fragments of a parameter that is shaped as `like`, on its device."""
        average = self._fragments.get(name)
        dtype = torch.promote_types(like.dtype, torch.float32)
        if not self._engine.has_partitioned_weights:
            assert average is not None
            return average.reshape(like.shape).to(like.device, dtype, copy=True)
        flat = torch.zeros(like.numel(), dtype=dtype, device=like.device)
        if average is not None:
            flat.narrow(0, offset, average.numel()).copy_(average)
        return all_reduce_sum(flat, group=self._engine.group).view(like.shape)

    def load(self, file: Path) -> None:
        """Read the average from the weights that `full_state_dict` gave, on any number of ranks. No collective.

        Raises:
            ValueError: the file does not hold them; on this rank only.
        """
        with safe_open(file, framework="pt") as stored:
            names = set(stored.keys())
            for name, fragment in self._engine.float32_weights().items():
                own = self._fragments[name]
                value = stored.get_tensor(name) if name in names else None
                if value is None or value.dtype not in (torch.float32, torch.float64) or value.numel() < own.numel():
                    found = "none" if value is None else f"{value.dtype} {list(value.shape)}"
                    raise ValueError(f"expected averaged weights of {name} in {file}, got {found}")
                own.copy_(value.flatten().narrow(0, fragment.offset, own.numel()))
