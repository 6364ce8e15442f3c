"""Write what a run learned into a folder of its own: `python -m dist_proxygml.export --run runs/demo_cpu --out DIR`.

    backbone.safetensors   its weights, in the precision they were trained in
    bank.safetensors       "proxies", float32 [classes, proxies per class, D], unnormalised
    classes.jsonl          a line per row of the bank: name, source id, number of training images
    export.json            what it is: backbone, sizes, preprocessing, step, settings, versions, bytes and sha256

One process, without DeepSpeed. Nothing in it is a pickle, so it may be passed on, and `checkpoint.init_from` takes it.
The folder is written aside and published by rename. The bank is read straight into its file, which is mapped: memory
holds the largest part that a rank wrote, and what the system keeps of the file.
"""

import argparse
import json
import os
import shutil
import struct
import sys
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from dist_proxygml.checkpoint_folder import files_below, hash_files, make_empty, partial_path, publish_checkpoint
from dist_proxygml.config import Config, load_config
from dist_proxygml.data.shards import publish
from dist_proxygml.trained import (
    BACKBONE_FILE,
    BANK_FILE,
    CLASSES_FILE,
    EXPORT_FILE,
    EXPORT_KIND,
    EXPORT_VERSION,
    PROXIES,
    StoredBank,
    TrainedModel,
    open_trained,
)

EXAMPLES = """examples:
  python -m dist_proxygml.export --run runs/demo_cpu --out exports/demo_cpu
  python -m dist_proxygml.export --run runs/sop_8gpu --checkpoint step-000800 --out exports/sop --overwrite
"""


def main(arguments: list[str] | None = None) -> int:
    """Parse, export, print where it is; the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m dist_proxygml.export",
        description="Write the backbone, the proxies and the class names of a run into a folder of their own.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--run", required=True, type=Path, help="folder of a training run")
    parser.add_argument(
        "--checkpoint", help="name of a checkpoint of that run, such as step-000800 (default: the newest)"
    )
    parser.add_argument("--out", required=True, type=Path, help="folder to write")
    parser.add_argument("--overwrite", action="store_true", help="replace an export that is there already")
    given = parser.parse_args(arguments)
    try:
        print(export(given.run, given.out, checkpoint=given.checkpoint, overwrite=given.overwrite))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def export(run_directory: Path, out: Path, *, checkpoint: str | None = None, overwrite: bool = False) -> str:
    """Export a checkpoint of a run, the newest whole one unless its name is given; returns what to tell.

    Raises:
        ValueError: `out` is in use, there is no such whole checkpoint, or it lacks its class names.
        OSError: `out` cannot be written; nothing is left of it.
    """
    out = out.absolute()
    _check_is_free(out, overwrite=overwrite)
    config = load_config(run_directory / "config.json")
    model = open_trained(run_directory / "checkpoints" / checkpoint if checkpoint else run_directory)
    bank, num_named = model.bank(), None
    if model.has_class_names:
        num_named = len(model.classes())
    partial = partial_path(out)
    try:
        make_empty(partial)
        _write_bank(bank, partial / BANK_FILE)
        shutil.copyfile(model.path / BACKBONE_FILE, partial / BACKBONE_FILE)
        if num_named is not None:
            shutil.copyfile(model.class_table(), partial / CLASSES_FILE)
        _write_description(model, bank, config, partial)
        publish_checkpoint(partial, out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    num_classes, per_class, embedding_dim = bank.shape
    return (
        f"exported {model.path} to {out}: {config.backbone.name}, and {num_classes:,} classes x {per_class} proxies of "
        f"dimension {embedding_dim}{'' if num_named else ', without class names, as it was trained on a stream'}"
    )


def _check_is_free(out: Path, *, overwrite: bool) -> None:
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not (out / EXPORT_FILE).is_file():
        raise ValueError(f"expected nothing or an earlier export at {out}, found something else; name another folder")
    if not overwrite:
        raise ValueError(f"expected nothing at {out}, found an export; name another folder, or add --overwrite")


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


def _write_description(model: TrainedModel, bank: StoredBank, config: Config, partial: Path) -> None:
    """export.json, which lists the other files and so is written last."""
    names = files_below(partial)
    num_bytes = sum((partial / name).stat().st_size for name in names)
    print(f"hashing {num_bytes / 2**20:,.1f} MiB", file=sys.stderr, flush=True)
    num_classes, per_class, embedding_dim = bank.shape
    about = {
        "kind": EXPORT_KIND,
        "version": EXPORT_VERSION,
        "run": config.name,
        "step": model.step,
        "backbone": config.backbone.model_dump(mode="json"),
        "embedding_dim": embedding_dim,
        "proxies_per_class": per_class,
        "num_classes": num_classes,
        "preprocessing": config.data.test_transform.model_dump(mode="json"),
        "settings": model.settings,
        "written_with": {name: version(name) for name in ("dist_proxygml", "torch", "safetensors")},
        "files": hash_files(partial, names, num_threads=torch.get_num_threads()),
    }
    with publish(partial / EXPORT_FILE) as stream:
        stream.write(json.dumps(about, indent=2, ensure_ascii=False).encode("utf-8") + b"\n")


if __name__ == "__main__":
    sys.exit(main())
