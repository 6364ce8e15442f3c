"""A trained backbone in the form in which timm opens folders: `timm.create_model("local-dir:FOLDER", pretrained=True)`.

    config.json         architecture, its arguments, number of features, how images are prepared
    model.safetensors   the weights by timm's names, in the precision they were trained in

The embedding layer becomes timm's classifier, so that such a model gives the embeddings before they are brought to
length 1. That is tried on two images; where timm's model ends otherwise (a head that is no linear layer, say) the trunk
is written alone, and gives the features that the embedding layer, or the LayerNorm before it, takes. A trunk that was
cut, or is pooled to a grid or by a generalised mean, is not what timm builds by that name: it is not written. Declined:
timm's own writer, which other versions lack or call otherwise, and which stores pickles unless told.
"""

import json
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from dist_proxygml.backbones.build import EmbeddingModel
from dist_proxygml.config import BackboneConfig

TIMM_WEIGHTS_FILE = "model.safetensors"
TIMM_CONFIG_FILE = "config.json"
_TOLERANCE = 1e-4  # relative to the largest number: the same operations, perhaps in another order


def write_timm_folder(
    model: EmbeddingModel, config: BackboneConfig, preparation: dict[str, Any], folder: Path
) -> str | None:
    """Write both files, if the backbone is a whole network of timm's.

    Args:
        model: the trained model, in evaluation mode.
        config: what it was built from.
        preparation: of images, as the test transform of a run: "name", "size" and, for "center_crop", "resize".
        folder: an existing folder.

    Returns:
        Where the embedding layer is: "classifier", or "beside" the trunk; None if nothing was written.
    """
    family, _, name = config.name.partition("/")
    if family != "timm" or "out_indices" in config.options or config.pool > 1 or config.pooling != "average":
        return None
    embedding = model.embedding
    assert isinstance(embedding, nn.Linear)
    size = preparation["size"]
    weights = dict(model.trunk.state_dict())
    found = None if model.norm_features else _with_classifier(name, config.options, model, size)
    layer, weights = found if found else (None, weights)
    shape = {"num_classes": embedding.out_features if layer else 0, "num_features": embedding.in_features}
    of_network: Any = model.trunk.pretrained_cfg
    known = {key: of_network[key] for key in ("first_conv", "fixed_input_size") if key in of_network}
    colours = model.preprocessing
    is_crop = preparation["name"] == "center_crop"
    prepared = {
        "input_size": [3, size, size],
        "interpolation": "bicubic" if preparation.get("interpolation") == "bicubic" else "bilinear",
        "crop_pct": size / preparation["resize"] if is_crop else 1.0,
        "crop_mode": "center" if is_crop else "squash",
        "mean": [value / colours.value_range for value in colours.mean],
        "std": [value / colours.value_range for value in colours.std],
        "classifier": layer,
    }
    description = {"architecture": name, **shape, "model_args": config.options, "pretrained_cfg": known | prepared}
    own = {key: value.detach().contiguous().clone() for key, value in weights.items()}
    save_file(own, folder / TIMM_WEIGHTS_FILE, {"format": "pt"})
    (folder / TIMM_CONFIG_FILE).write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")
    return "beside" if layer is None else "classifier"


def _with_classifier(
    name: str, options: dict[str, Any], model: EmbeddingModel, size: int
) -> tuple[str, dict[str, Tensor]] | None:
    """The name of timm's classifier and the weights of its model with the embedding layer there; None if timm has no
    such place, or its model gives something else.
    """
    embedding = model.embedding
    try:
        with torch.random.fork_rng(devices=[]):  # its first weights are thrown away
            plain: Any = timm.create_model(name, num_classes=embedding.out_features, **options)
        layer = next(key for key, module in plain.named_modules() if module is plain.get_classifier())
        weights = dict(model.trunk.state_dict())
        weights |= {f"{layer}.{key}": value for key, value in embedding.state_dict().items()}
        agrees = isinstance(plain.get_submodule(layer), nn.Linear) and _agrees(plain, weights, model, size)
    except Exception:  # networks raise many types
        return None
    return (layer, weights) if agrees else None


@torch.inference_mode()
def _agrees(plain: nn.Module, weights: dict[str, Tensor], model: EmbeddingModel, size: int) -> bool:
    """Whether timm's model with these weights gives what the embedding layer gives, for two images of noise."""
    plain.load_state_dict(weights)
    trunk, embedding = model.trunk, model.embedding
    dtype = next(embedding.parameters()).dtype
    pixels = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0)).to(dtype)
    expected = embedding(trunk(pixels)).float()
    found = plain.to(dtype).eval()(pixels).float()
    return found.shape == expected.shape and bool((found - expected).abs().max() <= _TOLERANCE * expected.abs().max())
