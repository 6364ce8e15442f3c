"""Evaluate a model as a configuration says, and store the result: what training and `evaluate` have in common.

Where a run has a result (storage/run_folder.py), nobody evaluates again; its embeddings are those of the newest
evaluation of the test split.
"""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dist_proxygml.backbones.build import build_backbone
from dist_proxygml.config import Config
from dist_proxygml.data.damage import DamageLog
from dist_proxygml.data.index import ShardIndex
from dist_proxygml.data.transforms import build_transform
from dist_proxygml.distributed.parallel import ParallelContext, run_together
from dist_proxygml.evaluation.blocks import BlockFolder
from dist_proxygml.evaluation.embedding_pass import PassHooks, PassSettings, Split, save_table
from dist_proxygml.evaluation.evaluator import EvaluationResult, PairSettings, Settings, evaluate
from dist_proxygml.evaluation.retrieval import SearchOptions
from dist_proxygml.storage.files import paths_in, publish_text
from dist_proxygml.storage.run_folder import RunFolder


def build_evaluation_model(config: Config) -> nn.Module:
    """A backbone without an engine, for weights to be loaded into; the random generator is left as it was."""
    with torch.random.fork_rng(devices=[]):
        return build_backbone(config.backbone, load_pretrained=False)


def evaluate_model(
    config: Config,
    context: ParallelContext,
    model: nn.Module,
    split: Split,
    *,
    is_baseline: bool = False,
    verify: bool = False,
    hooks: PassHooks,
) -> EvaluationResult:
    """Evaluate a backbone on a split as the configuration says. Called on all ranks.

    The protocol and the gallery are those of the test split; another split is searched in itself. A baseline, which is
    not the configuration's backbone, gets one run of k-means, and none by prefixes. With `verify` ranks are found in
    two ways, which must agree.
    """
    wanted, index, gallery = config.evaluation, run_together(context, open_gallery, config, split.index), None
    if index is not None:
        log = split.damage  # whoever counts damaged images counts those of the gallery too, in the same file
        if log is not None:
            log = build_damage_log(config, context, log.path, split=index.split, num_images=index.num_samples)
        gallery = Split(index, log)
    return evaluate(
        model,
        split,
        PassSettings(
            build_transform(config.data.test_transform),
            wanted.batch_size,
            config.data.num_workers,
            config.data.test_transform.model_dump(),
        ),
        context=context,
        gallery=gallery,
        settings=measured(config, split.index, is_baseline=is_baseline),
        options=SearchOptions(wanted.search, wanted.gallery, wanted.memory_budget_bytes, verify),
        hooks=hooks,
    )


def measured(config: Config, index: ShardIndex, *, is_baseline: bool = False) -> Settings:
    """Build the settings for a split; the published protocol is that of the test split alone."""
    wanted, is_test, pairs = config.evaluation, index.split == config.data.test_split, None
    if wanted.pairs is not None and (is_test or wanted.pairs.of == "all"):
        pairs = PairSettings(wanted.pairs.of == "listed", tuple(wanted.pairs.far), config.checkpoint.keep_best)
    return Settings(
        recall_at=tuple(wanted.recall_at),
        kmeans_seeds=tuple(range(min(1, wanted.kmeans_seeds) if is_baseline else wanted.kmeans_seeds)),
        kmeans_on_gpu=wanted.kmeans_on_gpu,
        protocol=wanted.protocol if is_test else "custom",
        legacy_proxygml=wanted.legacy_proxygml and is_test,
        exclude_same=wanted.excluded,
        pairs=pairs,
        prefixes=() if is_baseline else tuple(config.backbone.matryoshka_dims),
    )


def open_gallery(config: Config, index: ShardIndex) -> ShardIndex | None:
    """The split that this one is searched in, if it is not itself."""
    split = config.evaluation.gallery_split
    return None if split is None or index.split != config.data.test_split else index.open_sibling(split)


def block_folder(run_directory: Path, name: str, *, say: Callable[[str], object]) -> BlockFolder:
    """Blocks of the evaluation that will be stored as NAME."""
    return BlockFolder(RunFolder(run_directory).unfinished(name), say)


def store_evaluation(run_directory: Path, name: str, result: EvaluationResult, *, with_embeddings: bool) -> Path:
    """Write embeddings/NAME.npz in place of earlier embeddings, and last evaluation/NAME.json: where that is, nobody
    evaluates again. On rank 0 only.
    """
    if with_embeddings and result.table is not None:
        newest = save_table(result.table, RunFolder(run_directory).embeddings(name))
        for old in set(paths_in(newest.parent, "*.npz*")) - {newest}:
            old.unlink()
    path = RunFolder(run_directory).evaluation(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    publish_text(path, result.to_json())
    return path


def build_damage_log(
    config: Config, context: ParallelContext, path: Path, *, split: str, num_images: int
) -> DamageLog | None:
    """Build the log of damaged images if the configuration skips them, else None. Called on all ranks."""
    if config.data.damaged_images == "fail":
        return None
    return DamageLog(path, split=split, num_images=num_images, max_share=config.data.max_damaged, context=context)


def result_suffix(config: Config, own: Config, *, shards: str | None, digest: str) -> str:
    """Suffix of a checkpoint's name under which a result is stored, so that it does not replace one that measured
    something else; empty where it measures what the run itself does.

    Args:
        config: what is measured.
        own: the run's own configuration.
        shards: others than the run's, if there are any.
        digest: the sha256 of their index.
    """
    settings, own_settings = result_settings(config), result_settings(own)
    if shards is None and settings == own_settings:
        return ""
    wanted = config.evaluation
    parts = ["on", Path(shards or config.data.shards).name, *([digest[:8]] if shards else [])]
    parts += [config.data.test_split] if config.data.test_split else []
    parts += ["in", wanted.gallery_split] if wanted.gallery_split else []
    parts += ["as", wanted.protocol] if wanted.protocol != "custom" else []
    for said in (settings, own_settings):
        for section, name in (("data", "test_split"), ("evaluation", "gallery_split"), ("evaluation", "protocol")):
            del said[section][name]
    if settings != own_settings:
        text = json.dumps(settings, sort_keys=True)
        parts += ["with", hashlib.sha256(text.encode()).hexdigest()[:8]]
    return "-" + "-".join(parts)


def result_settings(config: Config) -> dict[str, Any]:
    """Settings that determine the numbers of an evaluation: all but when to evaluate, how to search and to load."""
    of_data = {"shards", "train_split", "validation_classes", "test_split", "test_transform"}
    of_data |= {"damaged_images", "max_damaged"}
    wanted: dict[str, Any] = {"seed": True, "evaluation": True, "data": of_data}
    settings = config.model_dump(mode="json", include=wanted) | {"backbone": config.backbone.of_trained_model()}
    for name in ("search", "gallery", "memory_budget", "at_start", "every_epochs", "raw_pixels", "allow_seen_classes"):
        del settings["evaluation"][name]
    return dict(settings)
