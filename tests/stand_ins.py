"""Small networks in place of a recipe's, so that each configuration can be trained for some steps on a CPU without a
download: timm's own test networks, and architectures of today's families at a size of their own.
"""

import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]

VIT = {"depth": 2, "embed_dim": 24, "num_heads": 2}
FAMILIES: dict[str, tuple[dict[str, Any], int]] = {
    "vit_small_patch14_dinov2": (VIT | {"img_size": 28}, 28),
    "vit_small_patch14_reg4_dinov2": (VIT | {"dynamic_img_size": True}, 28),
    "vit_small_patch16_dinov3": (VIT, 48),
    "convnext_tiny.dinov3_lvd1689m": ({"depths": [1, 1, 1, 1], "dims": [8, 8, 16, 16]}, 64),
    "vit_base_patch16_clip_224.openai": (VIT | {"img_size": 32}, 32),
    "vit_base_patch16_clip_quickgelu_224.openai": (VIT | {"img_size": 32}, 32),
    "vit_base_patch16_siglip_224": (VIT | {"img_size": 32}, 32),
    "vit_base_patch16_siglip_gap_224": (VIT | {"img_size": 32}, 32),
    "convnext_tiny": ({"depths": [1, 1, 1, 1], "dims": [8, 8, 16, 16]}, 64),
    "test_efficientnet": ({}, 64),
    "resnet50": ({"layers": [1, 1, 1, 1], "channels": [8, 8, 16, 16]}, 64),
}
"""Options that make timm's network small, and a side of images that it takes."""


def tiny_run(family: str, *, num_steps: int = 2) -> list[str]:
    """Overrides that make any configuration a run of some steps on the demo's images, of what depends on neither kept:
    loss, optimizers, schedule, transforms (but for their sizes), precision.
    """
    options, side = FAMILIES[family]
    changed: dict[str, Any] = {
        **{"data.shards": str(ROOT / "shards" / "demo"), "data.num_classes": None, "data.num_workers": 0},
        **{"data.train_split": "train", "data.test_split": "test", "data.validation_classes": None},
        **{"data.train_transform.size": side, "data.test_transform.size": side},
        **{"backbone.name": f"timm/{family}", "backbone.options": options, "backbone.pretrained": None},
        **{"backbone.embedding_dim": 8, "backbone.pool": 1, "training.batch_size": 8, "training.max_steps": num_steps},
        **{"evaluation.protocol": "custom", "evaluation.gallery_split": None, "evaluation.recall_at": [1]},
        **{
            "evaluation.pairs": None,
            "evaluation.at_start": False,
            "evaluation.every_epochs": 0,
            "evaluation.kmeans_seeds": 0,
        },
        **{"evaluation.raw_pixels": False, "checkpoint.keep_best": None, "telemetry.projector": False},
        **{"checkpoint.init_from": None, "telemetry.progress_bar": False},
    }
    return [f"{key}={json.dumps(value)}" for key, value in changed.items()]
