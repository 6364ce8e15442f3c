"""Write what a run learned into a folder of its own: `python -m dist_proxygml.export --run runs/demo_cpu --out DIR`.

The command line; inference/export_folder.py does it, and says what is in the folder.
"""

import argparse
import sys

from dist_proxygml.cli import add_options, build_parser, command, printable, run_command

FORMATS = ("safetensors", "onnx")
EXAMPLES = """\
  python -m dist_proxygml.export --run runs/demo_cpu --out exports/demo_cpu
  python -m dist_proxygml.export --run runs/demo_cpu --out exports/demo_cpu --format safetensors,onnx --verify
  python -m dist_proxygml.export --run runs/sop_8gpu --checkpoint step-000800 --out exports/sop --format onnx --opset 21
  python -m dist_proxygml.export --run runs/demo_cpu --out exports/demo_cpu --push-to-hub your-name/demo
"""


def _parser() -> argparse.ArgumentParser:
    parser = build_parser(
        "export",
        "Write the backbone, the proxies and the class names of a run into a folder of their own, with a model card.",
        EXAMPLES,
        *("--run", "--checkpoint", "--out", "--overwrite"),
    )
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
    add_options(parser, "--data", help="shards for --verify (default: the run's own; random images without them)")
    parser.add_argument("--opset", type=int, help="ONNX operator set, 18 or later (default: torch's own choice)")
    parser.add_argument(
        "--push-to-hub",
        metavar="REPO",
        help="then upload it to ORGANISATION/NAME on the Hugging Face Hub, a private repository if it is new",
    )
    return parser


@command(_parser)
def main(given: argparse.Namespace) -> int:
    """Export and print where it is; the exit code: 1 where what was written differs from what was trained."""
    formats = list(dict.fromkeys(name for names in given.format or [["safetensors"]] for name in names))
    if given.data is not None and not given.verify:
        raise ValueError("expected --verify with --data, which names its images; add it, or leave --data out")
    if given.opset is not None and "onnx" not in formats:
        raise ValueError("expected --format onnx with --opset, which is of ONNX; add it, or leave --opset out")

    from dist_proxygml.inference.export_check import ExportDiffersError
    from dist_proxygml.inference.export_folder import export

    try:
        summary = export(
            given.run,
            given.out,
            checkpoint=given.checkpoint,
            overwrite=given.overwrite,
            formats=formats,
            verify=given.verify,
            data=given.data,
            opset=given.opset,
            push_to=given.push_to_hub,
        )
    except ExportDiffersError as error:
        print(f"error: {printable(error)}", file=sys.stderr)
        return 1
    print(printable(summary))
    return 0


def _formats(text: str) -> list[str]:
    names = text.split(",")
    unknown = [name for name in names if name not in FORMATS]
    if unknown:
        raise argparse.ArgumentTypeError(f"expected one or several of {', '.join(FORMATS)}, got {unknown[0]!r}")
    return names


if __name__ == "__main__":
    run_command(main)
