"""Embed a folder of images or a split of shards into a folder of embeddings, resuming one that was interrupted."""

import sys
from pathlib import Path
from typing import Any

from tqdm import tqdm

from dist_proxygml.data.sources import ImageSource, OnBad
from dist_proxygml.inference.embedder import Embedder, loading_processes
from dist_proxygml.inference.embeddings import EmbeddingWriter


def embed_to_folder(
    embedder: Embedder,
    source: ImageSource,
    out: Path,
    *,
    batch_size: int | None = None,
    num_workers: int | None = None,
    on_bad: OnBad = "fail",
    overwrite: bool = False,
) -> dict[str, Any]:
    """Embed all images of a source into a folder; return its manifest.

    Raises:
        ValueError: `out` is in use, an image cannot be used (with "fail"), or an embedding is zero or not finite.
    """
    batch_size = batch_size or embedder.batch_size
    data = source.about()
    plan = {"model": {**embedder.about, "path": None}, "data": data, "batch_size": batch_size}
    with (
        EmbeddingWriter(out, plan=plan, embedding_dim=embedder.embedding_dim, overwrite=overwrite) as writer,
        tqdm(total=source.num_images, desc="embedding", unit=" images", mininterval=0.5) as bar,
    ):
        if writer.num_done:
            bar.update(min(writer.num_done * batch_size, source.num_images))
            bar.write(f"resuming after {bar.n:,} images of an interrupted call", file=sys.stderr)
        if writer.differing:
            names = " and ".join(writer.differing)
            bar.write(f"starting anew: the interrupted call had another {names}", file=sys.stderr)
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
