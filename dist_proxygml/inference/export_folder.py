"""Write what a run learned into a folder of its own, in the formats that are asked for.

    safetensors   backbone.safetensors   its weights, in the precision they were trained in
                  bank.safetensors       "proxies", float32 [classes, proxies per class, D], unnormalised; not where
                                         loss.name is one of pytorch-metric-learning
                  classes.jsonl          a line per row of the bank: name, source id, number of training images
                  config.json, model.safetensors   a network of timm's once more, as timm opens it, see timm_folder.py
    onnx          backbone.onnx          the backbone as one graph in float32, see graph.py
    always        README.md              the model card
                  export.json            what it is: backbone, sizes, preprocessing, step, settings, versions, what the
                                         check found, bytes and sha256 of every other file

One process, without DeepSpeed. The folder is written aside and published by rename, so an export that fails, or whose
files do not give what the checkpoint gives, leaves nothing, and what was there before stays. The bank is read straight
into its file, which is mapped: memory holds the largest part that a rank wrote, and what the system keeps of the file.
"""

import json
import os
import platform
import shutil
import struct
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from tqdm import tqdm

from dist_proxygml.backbones.timm_folder import write_timm_folder
from dist_proxygml.checkpoint.model import (
    BACKBONE_FILE,
    BANK_FILE,
    CARD_FILE,
    CLASSES_FILE,
    EXPORT,
    EXPORT_FILE,
    PROXIES,
    StoredBank,
    TrainedModel,
    open_trained,
)
from dist_proxygml.config import Config, load_run_config
from dist_proxygml.inference.export_check import (
    LIMIT,
    CheckImages,
    ExportDiffersError,
    FileCheck,
    check_file,
    check_images,
    embed_all,
    format_checks,
    original_backbone,
)
from dist_proxygml.inference.graph import Embed, check_onnx, open_onnx, write_onnx
from dist_proxygml.inference.hub import check_push, push
from dist_proxygml.inference.model_card import TrainingFacts, find_evaluation, write_card
from dist_proxygml.storage.folder import check_is_free, make_empty, partial_path, seal
from dist_proxygml.storage.run_folder import RunFolder

ONNX_FILE = "backbone.onnx"
_PRECISIONS = {"F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64"}


def export(
    run_directory: Path,
    out: Path,
    *,
    checkpoint: str | None = None,
    overwrite: bool = False,
    formats: Sequence[str] = ("safetensors",),
    verify: bool = False,
    data: str | None = None,
    opset: int | None = None,
    push_to: str | None = None,
) -> str:
    """Export a checkpoint of a run; returns a summary.

    Args:
        run_directory: the run's folder.
        out: the folder to write.
        checkpoint: name of the checkpoint; None for the newest whole one.
        overwrite: replace an export that is there.
        formats: of safetensors and onnx.
        verify: hold what every file gives against what the checkpoint gives.
        data: shards to do that with; None for the run's own.
        opset: ONNX's operator set; None for torch's own.
        push_to: repository on the Hugging Face Hub to upload it to.

    Raises:
        ValueError: `out` is in use, there is no such whole checkpoint, it lacks its class names, a package is missing,
            or the network cannot be written in a format.
        ExportDiffersError: a file does not give what the checkpoint gives.
        OSError: `out` cannot be written.
        In every case nothing is left of it, but after a push that failed, which the message says.
    """
    # 1. What can be refused before any work is.
    out = Path(os.path.realpath(out))  # a link stays one
    check_is_free(out, EXPORT, overwrite=overwrite)
    if "onnx" in formats:
        check_onnx(opset=opset, runs=verify)
    if push_to is not None:
        check_push(push_to)
    if (run_directory / EXPORT_FILE).is_file() or not RunFolder(run_directory).config.is_file():
        raise ValueError(
            f"expected the folder of a run at {run_directory}, found no config.json in it; name the run, and one of "
            "its checkpoints with --checkpoint"
        )
    config = load_run_config(run_directory)
    model = open_trained(RunFolder(run_directory).checkpoints / checkpoint if checkpoint else run_directory)
    model.check_config(config, source=RunFolder(run_directory).config)
    bank = model.bank() if model.pml_loss is None else None
    facts = _training_facts(model)
    evaluation = find_evaluation(run_directory, model.step)
    images = check_images(config, data=data) if verify else None

    # 2. The files, aside.
    partial = partial_path(out)
    try:
        make_empty(partial)
        precision = _precision(model.path / BACKBONE_FILE)
        timm_embedding: str | None = None
        if "safetensors" in formats:
            if bank is not None:
                _write_bank(bank, partial / BANK_FILE)
            shutil.copyfile(model.path / BACKBONE_FILE, partial / BACKBONE_FILE)
            if model.has_class_names:
                shutil.copyfile(model.class_table(), partial / CLASSES_FILE)
            if config.backbone.name.startswith("timm/"):
                transform = config.data.test_transform.model_dump(mode="json")
                backbone = original_backbone(config, model.path)
                timm_embedding = write_timm_folder(backbone, config.backbone, transform, partial)
        found_opset = None
        if "onnx" in formats:
            print(f"writing {ONNX_FILE}", file=sys.stderr, flush=True)
            backbone, side = original_backbone(config, model.path).float(), config.data.test_transform.side
            found_opset = write_onnx(backbone, partial / ONNX_FILE, side=side, opset=opset)
        checks: list[FileCheck] = []
        if images is not None:
            checks = _check_files(config, model.path, partial, images, formats=formats, precision=precision)
        about = _description(model, bank, config, formats) | {
            "precision": precision,
            "opset": found_opset,
            "timm_embedding": timm_embedding,
            "verification": None
            if images is None
            else {"images": images.source, "limit": LIMIT, "files": [check.as_json() for check in checks]},
        }
        write_card(partial / CARD_FILE, about, facts=facts, evaluation=evaluation, checks=checks)
        num_bytes = sum(path.stat().st_size for path in partial.iterdir())
        print(f"hashing {num_bytes / 2**20:,.1f} MiB", file=sys.stderr, flush=True)
        seal(partial, out, EXPORT, about=about)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    summary = _summary(model, out, about, images, checks)
    return summary if push_to is None else f"{summary}\npushed to {push(out, push_to)}"


def _training_facts(model: TrainedModel) -> TrainingFacts:
    if not model.has_class_names:
        return TrainingFacts(None, None, None)
    counts = [entry.count for entry in model.classes()]
    return TrainingFacts(sum(counts), model.settings["class table"], model.settings.get("shards"))


def _precision(weights: Path) -> str:
    """The type that the parameters are stored in; running statistics are float32 whatever that is."""
    try:
        with safe_open(weights, framework="pt") as file:
            names = [name for name in file.keys() if name.endswith((".weight", ".bias"))]
            types = {_PRECISIONS[file.get_slice(name).get_dtype()] for name in names}
    except (SafetensorError, OSError, KeyError) as error:
        raise ValueError(f"{weights} holds no weights: {error}; copy it again") from None
    return " and ".join(sorted(types)) or "float32"


def _check_files(
    config: Config, checkpoint: Path, partial: Path, images: CheckImages, *, formats: Sequence[str], precision: str
) -> list[FileCheck]:
    """Hold every file against the checkpoint.

    Raises:
        ExportDiffersError: one is too far from it.
    """
    openers: dict[str, tuple[str, Callable[[], Embed], str]] = {
        "safetensors": (BACKBONE_FILE, lambda: original_backbone(config, partial), precision),
        "onnx": (ONNX_FILE, lambda: open_onnx(partial / ONNX_FILE), "float32"),
    }
    original = original_backbone(config, checkpoint)
    originals: dict[str, Tensor] = {}
    checks = []
    for name, (file, opener, computes_in) in openers.items():  # the one in the precision of training is first
        if name not in formats:
            continue
        if computes_in not in originals:
            in_precision = original.float() if computes_in == "float32" else original
            originals[computes_in] = embed_all(in_precision, images.images, name=f"checkpoint, {computes_in}")
        checks.append(check_file(opener, originals[computes_in], images, file=file, format=name, precision=computes_in))
    wrong = [check.file for check in checks if not check.passed]
    if wrong:
        raise ExportDiffersError(
            f"{' and '.join(wrong)} differs by more than {LIMIT:g} from what the checkpoint gives for {images.source}; "
            f"nothing was published\n{format_checks(checks)}"
        )
    return checks


def _write_bank(bank: StoredBank, path: Path) -> None:
    """A safetensors file: the length of a JSON header, the header, the numbers. Its library writes what it has whole in
    memory, so the header is written here, and the rest read into the mapped file.
    """
    num_bytes = 4 * int(np.prod(bank.shape))
    contents = {PROXIES: {"dtype": "F32", "shape": list(bank.shape), "data_offsets": [0, num_bytes]}}
    header = json.dumps(contents, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    with open(path, "wb") as stream:
        stream.write(struct.pack("<Q", len(header)) + header)
        stream.flush()
        os.posix_fallocate(stream.fileno(), stream.tell(), num_bytes)  # a full disk is an error here, and a crash later
    bank_CND = torch.from_numpy(np.memmap(path, np.float32, "r+", offset=8 + len(header), shape=bank.shape))
    with tqdm(total=bank.shape[0], desc="proxies", unit=" classes", unit_scale=True, delay=1.0) as bar:
        for first, end in bank.parts():
            bank.read_(bank_CND[first:end], first=first)
            bar.update(end - first)


def _description(
    model: TrainedModel, bank: StoredBank | None, config: Config, formats: Sequence[str]
) -> dict[str, Any]:
    """Content of export.json before its files are known."""
    if bank is not None:
        num_classes, per_class, embedding_dim = bank.shape
    else:
        num_classes = len(model.classes()) if model.has_class_names else config.num_trained_classes
        per_class, embedding_dim = 0, config.backbone.embedding_dim
    packages = ["dist_proxygml", "torch", "torchvision", "timm", "safetensors"]
    packages += ["onnx", "onnxscript"] if "onnx" in formats else []
    return {
        "run": config.name,
        "step": model.step,
        "formats": list(formats),
        "backbone": config.backbone.of_trained_model(),
        "embedding_dim": embedding_dim,
        "proxies_per_class": per_class,
        "num_classes": num_classes,
        "preprocessing": config.data.test_transform.model_dump(mode="json"),
        "settings": model.settings,
        "written_with": {name: version(name) for name in packages} | {"python": platform.python_version()},
    }


def _summary(
    model: TrainedModel, out: Path, about: dict[str, Any], images: CheckImages | None, checks: Sequence[FileCheck]
) -> str:
    contents = []
    if "safetensors" in about["formats"]:
        contents.append(
            (
                f"and {about['num_classes']:,} classes x {about['proxies_per_class']} proxies of dimension "
                f"{about['embedding_dim']}"
                if model.pml_loss is None
                else f"without proxies, of which {model.pml_loss} has none"
            )
            + ("" if model.has_class_names else ", without class names, as it was trained on a stream")
        )
    if "onnx" in about["formats"]:
        contents.append(f"{ONNX_FILE} in operator set {about['opset']}")
    text = f"exported {model.path} to {out}: {about['backbone']['name']}, {', '.join(contents)}"
    if images is not None:
        text += f"\nverified with {images.source}\n{format_checks(checks)}"
    return text
