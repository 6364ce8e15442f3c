"""Runs for tests of the report: shards with two splits of given pictures, and a folder as training leaves it."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dist_proxygml.config import ResizeConfig
from dist_proxygml.data.index import ShardIndex, open_index, write_index
from dist_proxygml.data.shards import ShardSample, list_shard, sample_key, shard_name, write_shard
from dist_proxygml.data.transforms import build_transform
from dist_proxygml.distributed.parallel import single_process
from dist_proxygml.evaluation.embedding_pass import PassSettings, Split, save_table
from dist_proxygml.evaluation.evaluator import PairSettings, Settings, evaluate
from tests.shards_of_noise import SIDE, Projection

# An image file and its label.
Picture = tuple[bytes, int]


def write_picture_shards(
    root: Path, splits: Mapping[str, Sequence[Picture]], names: Mapping[str, Sequence[str]] | None = None
) -> dict[str, ShardIndex]:
    """One shard for each split; classes are called "SPLIT LABEL" unless named."""
    root.mkdir(parents=True, exist_ok=True)
    files, classes = {}, {}
    for split, pictures in splits.items():
        samples = [
            ShardSample(sample_key(split, i), "jpg" if image.startswith(b"\xff\xd8") else "png", image, label, {})
            for i, (image, label) in enumerate(pictures)
        ]
        name = shard_name(split, 0)
        write_shard(root / name, samples)
        files[split] = [(name, list_shard(root / name))]
        num_classes = max(label for _, label in pictures) + 1
        named = (names or {}).get(split) or [f"{split} {label}" for label in range(num_classes)]
        classes[split] = [(name, f"{split}-{label}") for label, name in enumerate(named)]
    write_index(root, dataset="pictures", build={}, shards=files, classes=classes)
    return {split: open_index(root, split) for split in splits}


def write_run(
    directory: Path,
    index: ShardIndex,
    *,
    name: str,
    recall_at: Sequence[int] = (1, 2, 10),
    pairs: PairSettings | None = None,
) -> Path:
    """A finished run: three evaluations, the newest embeddings, logged steps, statistics of its proxies."""
    (directory / "evaluation").mkdir(parents=True)
    (directory / "proxies").mkdir()
    transform = build_transform(ResizeConfig(name="resize", size=SIDE))
    for stem, width in (("pixels", 2), ("step-000000", 3), ("step-000020", 8)):
        result = evaluate(
            Projection(width),
            Split(index),
            PassSettings(transform),
            context=single_process(),
            settings=Settings(recall_at=tuple(recall_at), kmeans_seeds=(0, 1), pairs=pairs),
        )
        (directory / "evaluation" / f"{stem}.json").write_text(result.to_json())
    assert result.table is not None
    save_table(result.table, directory / "embeddings" / "step-000020.npz")
    data = {"shards": str(index.root), "train_split": "train", "test_split": "test"}
    (directory / "config.json").write_text(json.dumps({"name": name, "data": data}))
    (directory / "proxies" / "step-000020.json").write_text(json.dumps(proxy_statistics()))
    lines = [
        {"kind": "train", "step": step, "loss": loss, "classification": loss - 1}
        | {"regularization": 1.0, "lr_backbone": 1e-3, "lr_proxies": 1e-2}
        for step, loss in ((5, 4.0), (10, 3.5), (15, 9.0), (10, 3.0), (15, 2.0), (20, 1.5))
    ]
    text = "\n".join(json.dumps(line) for line in lines) + '\n{"kind": "train", "st'
    (directory / "metrics.jsonl").write_text(text)
    return directory


def proxy_statistics() -> dict[str, Any]:
    """As training writes them at an evaluation."""
    edges = np.linspace(-1, 1, 9).tolist()
    return {
        "step": 20,
        "num_classes": 6,
        "per_class": 2,
        "window_steps": 20,
        "num_images": 1280,
        "num_dead": 3,
        "dead_definition": "no image kept it",
        "dead_examples": [{"class": 4, "proxy": 1, "name": "<four>"}, {"class": 5, "proxy": 0, "name": "five"}],
        "kept_positive": {"edges": edges, "counts": [0, 0, 0, 0, 0, 0, 5, 15]},
        "kept_negative": {"edges": edges, "counts": [0, 0, 0, 100, 300, 0, 0, 0]},
    }
