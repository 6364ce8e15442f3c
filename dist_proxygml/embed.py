"""Embed images with a trained model: `python -m dist_proxygml.embed --run runs/NAME --data photos --out OUT`.

The images are any folder, or a split of shards; the result is a folder of rows, ids and a manifest
(inference/embeddings.py). One process, or one for each GPU: `deepspeed --module dist_proxygml.embed --run ...`, or
`torchrun -m -- dist_proxygml.embed --run ...`, which takes `--run` for its own option without the two dashes. The same
command resumes where it was stopped, on any number of processes.
"""

import argparse
import os
import sys
from collections.abc import Sequence

from dist_proxygml.cli import add_model_options, add_options, build_parser, printable
from dist_proxygml.distributed.parallel import (
    ParallelContext,
    has_started,
    join_world,
    parse_arguments,
    run_launcher,
    run_long,
    single_process,
)

EXAMPLES = """\
  python -m dist_proxygml.embed --run runs/demo_cpu --data photos --out embeddings/photos
  deepspeed --module dist_proxygml.embed --run runs/sop_8gpu --data photos --out embeddings/photos
  torchrun --nproc_per_node 2 -m -- dist_proxygml.embed --run runs/demo_cpu --data photos --out embeddings/photos
  python -m dist_proxygml.embed --run exports/sop --data shards/sop --split test --out embeddings/sop --num-workers 8
"""


def _parser() -> argparse.ArgumentParser:
    parser = build_parser(
        "embed", "Write the embeddings of a folder of images, or of a split of shards, into a folder.", EXAMPLES
    )
    add_options(parser, "--run", help="folder of a run, a checkpoint or an export")
    add_options(parser, "--checkpoint")
    add_options(parser, "--data", required=True, help="folder of images, at any depth, or of shards with an index")
    add_options(parser, "--split", "--out", "--overwrite")
    add_options(
        parser,
        "--on-bad",
        help="an image that cannot be read: fail and name it (default), or skip it and name it in the manifest",
    )
    add_model_options(parser)
    add_options(parser, "--local_rank")
    return parser


def _world(device: str) -> ParallelContext:
    """Join the processes that a launcher has started, or take this one alone."""
    from dist_proxygml.inference.embedder import choose_device

    chosen = choose_device(device)
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return single_process(str(chosen))
    if ":" in device:
        raise ValueError(
            f"expected --device auto, cpu or cuda for several processes, got {device}: each has its own GPU"
        )
    return join_world(device=chosen.type)


def main(arguments: Sequence[str] | None = None) -> None:
    """Embed, and say what there is. Called on all ranks."""
    given = parse_arguments(_parser(), arguments)
    context = _world(given.device)

    from dist_proxygml.data.sources import FolderSource, ImageSource, ShardSource, open_source
    from dist_proxygml.inference.embed import embed_to_folder
    from dist_proxygml.inference.embedder import Embedder

    def opened() -> tuple[Embedder, ImageSource]:
        """What is quick to refuse comes first."""
        embedder = Embedder.from_run(given.run, device=str(context.device), checkpoint=given.checkpoint)
        source = open_source(given.data, split=given.split or embedder.test_split, is_typed=True)
        if given.split is not None and isinstance(source, FolderSource):
            raise ValueError(f"expected shards with --split, {given.data} is a folder of images; leave --split out")
        return embedder, source

    embedder, source = run_long(context, opened)
    has_started()
    if isinstance(source, ShardSource) and context.is_main:
        print(f"{given.data} holds shards: split {source.index.split!r}, {source.num_images:,} images", file=sys.stderr)
    manifest = embed_to_folder(
        embedder,
        source,
        given.out,
        context=context,
        batch_size=given.batch_size,
        num_workers=given.num_workers,
        on_bad=given.on_bad,
        overwrite=given.overwrite,
    )
    if not context.is_main:
        return
    left_out = manifest["left_out"]
    if left_out:
        shown = "\n".join(f"  {damage['image']}: {damage['reason']}" for damage in left_out[:20])
        print(f"{len(left_out)} images cannot be used and were skipped:\n{printable(shown)}", file=sys.stderr)
    num_repeated = manifest["num_rows"] - manifest["num_ids"]
    if num_repeated:  # under an index that was made before keys were distinguished
        print(
            f"warning: {num_repeated:,} embeddings have the id of another; make the index again with `python -m "
            f"dist_proxygml.shard index {given.data}`, then embed again with --overwrite",
            file=sys.stderr,
        )
    model, dim = manifest["model"], manifest["embedding_dim"]
    done = f"{manifest['num_rows']:,} embeddings of dimension {dim} by {model['run']}, step {model['step']}"
    print(printable(f"{done}, written to {given.out}"))


if __name__ == "__main__":
    run_launcher(main, stopped="stopped; the same command resumes with what is finished")
