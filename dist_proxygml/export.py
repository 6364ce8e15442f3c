"""Write what a run learned into a folder of its own: `python -m dist_proxygml.export --run runs/demo_cpu --out DIR`.

The command line; inference/export_folder.py does it, and says what is in the folder.
"""

import argparse
import sys
from pathlib import Path

from dist_proxygml.cli import printable, refuse, run_command

FORMATS = ("safetensors", "onnx")
EXAMPLES = """examples:
  python -m dist_proxygml.export --run runs/demo_cpu --out exports/demo_cpu
  python -m dist_proxygml.export --run runs/demo_cpu --out exports/demo_cpu --format safetensors,onnx --verify
  python -m dist_proxygml.export --run runs/sop_8gpu --checkpoint step-000800 --out exports/sop --format onnx --opset 21
"""


def main(arguments: list[str] | None = None) -> int:
    """Parse, export, print where it is; the exit code: 1 where what was written differs from what was trained."""
    parser = argparse.ArgumentParser(
        prog="python -m dist_proxygml.export",
        description="Write the backbone, the proxies and the class names of a run into a folder of their own, with a "
        "model card.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--run", required=True, type=Path, help="folder of a training run")
    parser.add_argument(
        "--checkpoint", help="name of a checkpoint of that run, such as step-000800 (default: the newest)"
    )
    parser.add_argument("--out", required=True, type=Path, help="folder to write")
    parser.add_argument(
        "--format",
        action="append",
        type=_formats,
        metavar="NAME[,NAME]",
        help="safetensors (default): weights, proxies and class names, from which training can start again; onnx: "
        "the backbone as one graph, from bytes to unit embeddings, for images of the size it was evaluated at in "
        "batches of any size",
    )
    parser.add_argument(
        "--verify",
        action="store_true",
        help="embed 512 test images with the checkpoint and with every file written; if an embedding or Recall@1 "
        "differs by more than 1e-4, publish nothing and end with status 1",
    )
    parser.add_argument("--data", help="shards for --verify (default: the run's own; random images without them)")
    parser.add_argument("--opset", type=int, help="ONNX operator set, 18 or later (default: torch's own choice)")
    parser.add_argument("--overwrite", action="store_true", help="replace an export that is there already")
    given = parser.parse_args(arguments)
    formats = list(dict.fromkeys(name for names in given.format or [["safetensors"]] for name in names))
    if given.data is not None and not given.verify:
        parser.error("--data names the images for --verify; add --verify, or leave it out")
    if given.opset is not None and "onnx" not in formats:
        parser.error("--opset is of ONNX; add --format onnx, or leave it out")

    from dist_proxygml.inference.export_check import ExportDiffersError
    from dist_proxygml.inference.export_folder import export

    try:
        told = export(
            given.run,
            given.out,
            checkpoint=given.checkpoint,
            overwrite=given.overwrite,
            formats=formats,
            verify=given.verify,
            data=given.data,
            opset=given.opset,
        )
    except (ValueError, OSError) as error:
        return refuse(error)
    except ExportDiffersError as error:
        print(f"error: {printable(error)}", file=sys.stderr)
        return 1
    print(printable(told))
    return 0


def _formats(text: str) -> list[str]:
    names = text.split(",")
    unknown = [name for name in names if name not in FORMATS]
    if unknown:
        raise argparse.ArgumentTypeError(f"expected one or several of {', '.join(FORMATS)}, got {unknown[0]!r}")
    return names


if __name__ == "__main__":
    run_command(main)
