"""A training run of a tiny backbone that tests build, and how they compare what it comes to."""

from typing import Any

import torch
from torch import Tensor

from dist_proxygml.config import Config, parse_config

NUM_CLASSES = 7


def configuration(**changes: object) -> Config:
    raw = {
        "name": "parity",
        "data": {
            "shards": "unused",
            "num_classes": NUM_CLASSES,
            "train_transform": {"name": "resize", "size": 16},
            "test_transform": {"name": "resize", "size": 16},
        },
        "backbone": {"name": "small_cnn", "embedding_dim": 8, "options": {"width": 4}},
        "proxies": {"per_class": 2, "ratio": 0.5, "regularization_weight": 0.3, "scale": 4.0},
        # a large eps keeps Adam from blowing up rounding where a gradient is almost 0, as the published 0.01 does
        "optimizer": {
            "name": "adam",
            "backbone_lr": 1e-3,
            "embedding_lr": 3e-3,
            "proxies_lr": 1e-2,
            "eps": 0.01,
            "weight_decay": 1e-4,
        },
        "schedule": {"name": "step", "milestones": [3], "gamma": 0.1},
        "training": {"epochs": 6, "batch_size": 12, "frozen_trunk_epochs": [2]},
    }
    return parse_config(raw | changes, source="the test")


def same(left: Any, right: Any) -> bool:
    """Bit for bit."""
    if isinstance(left, Tensor):
        return torch.equal(left, right)
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(same(left[key], right[key]) for key in left)
    if isinstance(left, (list, tuple)):
        return len(left) == len(right) and all(map(same, left, right))
    return bool(left == right)
