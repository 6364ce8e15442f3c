"""Low-rank adapters in a trunk: Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", ICLR 2022.

    W x   becomes   W x + alpha / rank * B (A x),     A [rank, in] random, B [out, rank] 0 at the start

W and the rest of the trunk are frozen; A, B and the embedding layer are trained. peft replaces the layers.

Chosen: adapters exist in training only. Outside of the engine a model has merged weights, W + alpha / rank * B A under
W's name: a checkpoint's backbone.safetensors, what training itself evaluates, exports, and what another run starts
from. So only training needs peft, and all of them give the same embeddings. Whoever trains on from merged weights gets
new adapters. Declined: weights that are merged in place and restored after an evaluation, which rounding does not
restore; adapters of convolutions and of embeddings.
"""

import contextlib
import importlib
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from dist_proxygml.backbones.build import EmbeddingModel
from dist_proxygml.config import LoraConfig

_ADAPTER = "default"  # the name that peft gives a model's only adapter
_ATTENTION = ("attn.qkv", "attn.q_proj", "attn.k_proj", "attn.v_proj", "attn.proj")


def add_adapters_(model: EmbeddingModel, config: LoraConfig) -> None:
    """Freeze a model's trunk and add adapters to the layers that `config` names. Draws A from torch's global generator.

    Raises:
        ValueError: peft is missing, or no linear layer has such a name.
    """
    try:
        peft = importlib.import_module("peft")
    except ImportError as error:
        raise ValueError(
            f"expected the package peft with backbone.lora, found none that loads ({error}); pip install "
            "'dist_proxygml[lora]', or remove backbone.lora"
        ) from None
    linear = [name for name, layer in model.trunk.named_modules() if _can_be_adapted(layer)]
    wanted = config.target_modules or _ATTENTION
    chosen = [name for name in linear if any(_ends(name, end) for end in wanted)]
    missing = [end for end in config.target_modules or () if not any(_ends(name, end) for name in linear)]
    if missing or not chosen:
        raise ValueError(
            f"expected linear layers named {', '.join(missing or wanted)} for backbone.lora, found none in "
            f"{type(model.trunk).__name__}, whose linear layers are {_some(linear)}; set backbone.lora.target_modules "
            "to the ends of such names, or remove backbone.lora"
        )
    model.trunk.requires_grad_(False)
    peft.inject_adapter_in_model(
        peft.LoraConfig(
            r=config.rank, lora_alpha=config.alpha, lora_dropout=config.dropout, target_modules=chosen, bias="none"
        ),
        model.trunk,
        adapter_name=_ADAPTER,
    )
    for name, parameter in model.trunk.named_parameters():
        parameter.requires_grad_(".lora_" in name)
    model.adapter_scale = config.alpha / config.rank
    model.train(model.training)


def merged_weights(weights: Mapping[str, Tensor], module: nn.Module) -> dict[str, Tensor]:
    """Return the weights of `module`, whole ones by name, with its adapters merged: those of a model without them.

    The sum is taken in float32, or in the weights' type where that is wider, and rounded to their type.
    """
    scale = getattr(module, "adapter_scale", None)
    if scale is None:
        return dict(weights)
    merged = {}
    for name, value in weights.items():
        layer, is_base, which = name.partition(".base_layer.")
        if is_base and which == "weight":
            a, b = (weights[f"{layer}.lora_{letter}.{_ADAPTER}.weight"] for letter in "AB")
            wide = torch.promote_types(value.dtype, torch.float32)
            value = (value.to(wide) + scale * (b.to(wide) @ a.to(wide))).to(value.dtype)
        if ".lora_" not in name:
            merged[f"{layer}.{which}" if is_base else name] = value
    return merged


@contextlib.contextmanager
def unused_adapters_refused(model: EmbeddingModel) -> Iterator[None]:
    """Refuse adapters that a forward pass inside the block does not use: some networks read the weights of a layer
    instead of calling it.

    Raises:
        ValueError: there are such; not where no forward pass ended.
    """
    called: set[str] = set()
    adapted = [name for name, layer in model.trunk.named_modules() if hasattr(layer, "lora_A")]
    named = {name: model.trunk.get_submodule(f"{name}.lora_A.{_ADAPTER}") for name in adapted} | {"": model.embedding}
    handles = [layer.register_forward_hook(lambda *_, name=name: called.add(name)) for name, layer in named.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
    unused = [name for name in adapted if name not in called]
    if unused and "" in called:
        raise ValueError(
            f"expected layers that {type(model.trunk).__name__} calls in backbone.lora.target_modules, got "
            f"{_some(unused)}, whose weights it reads by another way, so that adapters would do nothing; name others"
        )


def _can_be_adapted(layer: nn.Module) -> bool:
    """torch's own attention reads the weights of its output projection, which has a type of its own."""
    return isinstance(layer, nn.Linear) and not isinstance(layer, NonDynamicallyQuantizableLinear)


def _ends(name: str, end: str) -> bool:
    return f".{name}".endswith(f".{end}")


def _some(names: list[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "") if names else "none"
