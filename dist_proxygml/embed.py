"""Embed images with a trained model: `python -m dist_proxygml.embed --run runs/NAME --data photos --out OUT`.

The images are any folder, or a split of shards; the result is a folder of rows, ids and a manifest
(inference/embeddings.py). One process on one device. The same command resumes where it was stopped.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dist_proxygml.cli import add_model_options, printable, refuse, run_command

if TYPE_CHECKING:
    from dist_proxygml.data.sources import ImageSource, OnBad
    from dist_proxygml.inference.embedder import Embedder

EXAMPLES = """examples:
  python -m dist_proxygml.embed --run runs/demo_cpu --data photos --out embeddings/photos
  python -m dist_proxygml.embed --run exports/sop --data shards/sop --split test --out embeddings/sop --num-workers 8
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse, embed, say what there is; the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m dist_proxygml.embed",
        description="Write the embeddings of a folder of images, or of a split of shards, into a folder.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--run", required=True, type=Path, help="folder of a run, a checkpoint or an export")
    parser.add_argument(
        "--checkpoint", help="name of a checkpoint of that run, such as step-000800 (default: the newest)"
    )
    parser.add_argument("--data", required=True, help="folder of images, at any depth, or of shards with an index")
    parser.add_argument("--split", help="split of the shards (default: the run's test split)")
    parser.add_argument("--out", required=True, type=Path, help="folder to write")
    parser.add_argument("--overwrite", action="store_true", help="replace embeddings that are there already")
    parser.add_argument(
        "--on-bad",
        choices=("fail", "skip"),
        default="fail",
        help="an image that cannot be read: fail and name it (default), or leave it out and name it in the manifest",
    )
    add_model_options(parser)
    given = parser.parse_args(arguments)
    try:
        print(printable(_embed(given)))
    except KeyboardInterrupt:
        print("stopped; the same command resumes with what is finished", file=sys.stderr)
        return 130
    except (ValueError, OSError) as error:
        return refuse(error)
    return 0


def _embed(given: argparse.Namespace) -> str:
    from dist_proxygml.data.sources import FolderSource, ShardSource, open_source
    from dist_proxygml.inference.embedder import Embedder

    # What is quick to refuse comes first.
    embedder = Embedder.from_run(given.run, device=given.device, checkpoint=given.checkpoint)
    source = open_source(given.data, split=given.split or embedder.test_split, is_typed=True)
    if given.split is not None and isinstance(source, FolderSource):
        raise ValueError(f"expected shards with --split, {given.data} is a folder of images; leave --split out")
    if isinstance(source, ShardSource):
        print(f"{given.data} holds shards: split {source.index.split!r}, {source.num_images:,} images", file=sys.stderr)
    manifest = embed_to_folder(
        embedder,
        source,
        given.out,
        batch_size=given.batch_size,
        num_workers=given.num_workers,
        on_bad=given.on_bad,
        overwrite=given.overwrite,
    )
    left_out = manifest["left_out"]
    if left_out:
        shown = "\n".join(f"  {damage['image']}: {damage['reason']}" for damage in left_out[:20])
        print(f"{len(left_out)} images cannot be used and were left out:\n{printable(shown)}", file=sys.stderr)
    num_repeated = manifest["num_rows"] - manifest["num_ids"]
    if num_repeated:  # under an index that was made before keys were told apart
        print(
            f"warning: {num_repeated:,} embeddings have the id of another; make the index again with `python -m "
            f"dist_proxygml.shard index {given.data}`, then embed again with --overwrite",
            file=sys.stderr,
        )
    model = manifest["model"]
    return (
        f"{manifest['num_rows']:,} embeddings of dimension {manifest['embedding_dim']} by {model['run']}, step "
        f"{model['step']}, written to {given.out}"
    )


def embed_to_folder(
    embedder: "Embedder",
    source: "ImageSource",
    out: Path,
    *,
    batch_size: int | None = None,
    num_workers: int | None = None,
    on_bad: "OnBad" = "fail",
    overwrite: bool = False,
) -> dict[str, Any]:
    """Embed all images of a source into a folder; returns its manifest.

    Raises:
        ValueError: `out` is in use, an image cannot be used (with "fail"), or an embedding is zero or not finite.
    """
    from tqdm import tqdm

    from dist_proxygml.inference.embedder import loading_processes
    from dist_proxygml.inference.embeddings import EmbeddingWriter

    batch_size = batch_size or embedder.batch_size
    data = source.about()
    plan = {"model": {**embedder.about, "path": None}, "data": data, "batch_size": batch_size}
    with (
        EmbeddingWriter(out, plan=plan, embedding_dim=embedder.embedding_dim, overwrite=overwrite) as writer,
        tqdm(total=source.num_images, desc="embedding", unit=" images", mininterval=0.5) as bar,
    ):
        if writer.num_done:
            bar.update(min(writer.num_done * batch_size, source.num_images))
            bar.write(f"going on after {bar.n:,} images of an interrupted call", file=sys.stderr)
        if writer.left_out and on_bad == "fail":
            raise ValueError(": ".join(writer.left_out[0]))
        loader = source.loader(
            embedder.transform,
            batch_size=batch_size,
            start=writer.num_done,
            num_workers=loading_processes(source.num_images, num_workers),
            on_bad=on_bad,
        )
        for batch in loader:
            records = [source.record(number) for number in batch.ids.tolist()]
            rows_bD = embedder.embed_prepared(batch.images, names=[record.id for record in records])
            writer.add(rows_bD, records, batch.damaged)
            bar.update(len(records) + len(batch.damaged))
        return writer.finish({"model": embedder.about, "data": data, "batch_size": batch_size})


if __name__ == "__main__":
    run_command(main)
