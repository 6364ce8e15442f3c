"""A sample of a run's embeddings with thumbnails, for TensorBoard's projector.

    tensorboard/projector/step-NNNNNN/{tensors.tsv,metadata.tsv,sprite.png}
    tensorboard/projector_config.pbtxt                                        written last, names the files

At most 10,000 points, and a sprite of at most 8192 pixels a side: browsers refuse larger textures. Written once, after
the run's last evaluation; a configuration that names the step exists only if everything else does.

Declined: SummaryWriter.add_embedding, which builds the sprite in float64 (3 GB for these 10,000 points), writes 20
characters per number where five are enough to see, and loses earlier entries when a run is resumed.
"""

import math
import shutil
import sys
from pathlib import Path

import numpy as np
from google.protobuf import text_format
from PIL import Image
from tensorboard.plugins.projector.projector_config_pb2 import ProjectorConfig
from tqdm import tqdm

from dist_proxygml.data.index import ShardIndex
from dist_proxygml.evaluation.embedding_pass import EmbeddingTable
from dist_proxygml.reporting.gallery import TableImages, stratified_sample
from dist_proxygml.storage.files import publish_text

MAX_POINTS = 10_000
MAX_SPRITE_SIDE = 8192
MAX_THUMBNAIL_SIDE = 64

_CONFIG_FILE = "projector_config.pbtxt"


def thumbnail_side(num_points: int) -> int:
    """Return the side in pixels of each of `num_points` thumbnails in a sprite."""
    return min(MAX_THUMBNAIL_SIDE, MAX_SPRITE_SIDE // math.ceil(math.sqrt(num_points)))


def has_projection(board: Path, name: str) -> bool:
    """Whether TensorBoard's folder `board` shows embeddings of that name."""
    path = board / _CONFIG_FILE
    if not path.is_file():
        return False
    try:
        config = text_format.Parse(path.read_bytes(), ProjectorConfig())
    except text_format.ParseError:
        return False
    return [embedding.tensor_name for embedding in config.embeddings] == [name]


def write_projection(
    board: Path,
    name: str,
    table: EmbeddingTable,
    index: ShardIndex,
    *,
    gallery: ShardIndex | None = None,
    num_points: int,
    progress_bar: bool,
) -> None:
    """Show a sample of a table in TensorBoard's folder `board`, replacing any earlier one. On rank 0 only.

    Args:
        board: the folder of the event files.
        name: name of the embeddings and their folder, such as step-000120.
        table: embeddings of the split.
        index: the split, or that of the queries, for its images and the names of its classes.
        gallery: the split that was searched, if it is another one.
        num_points: maximum number of points, capped at MAX_POINTS.
        progress_bar: whether to show progress.

    Raises:
        ValueError: an image is damaged.
    """
    rows = stratified_sample(table.labels.numpy(), min(num_points, MAX_POINTS))
    folder = board / "projector" / name
    shutil.rmtree(folder.parent, ignore_errors=True)
    folder.mkdir(parents=True)

    # 1. Points and their metadata.
    embeddings_nD = table.embeddings[rows].numpy()
    np.savetxt(folder / "tensors.tsv", embeddings_nD, fmt="%.4f", delimiter="\t")
    lines = ["class\tlabel\timage"]
    for row in rows.tolist():
        label = int(table.labels[row])
        name_of_class = " ".join(index.classes[label].name.split())  # no tabs or line breaks
        lines.append(f"{name_of_class}\t{label}\t{int(table.ids[row])}")
    (folder / "metadata.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")

    # 2. Thumbnails, row by row.
    side, per_row = thumbnail_side(len(rows)), math.ceil(math.sqrt(len(rows)))
    sprite = np.full((per_row * side, per_row * side, 3), 255, dtype=np.uint8)
    images = TableImages(index, gallery)
    pace = 0.5 if sys.stderr.isatty() else 15.0  # a file gets a line every 15 seconds
    shown = tqdm(rows.tolist(), desc="projector", unit="image", disable=not progress_bar, leave=False, mininterval=pace)
    for position, row in enumerate(shown):
        top, left = (side * part for part in divmod(position, per_row))
        sprite[top : top + side, left : left + side] = images.thumbnail(int(table.ids[row]), side)
    Image.fromarray(sprite).save(folder / "sprite.png")

    # 3. The configuration, last.
    config = ProjectorConfig()
    embedding = config.embeddings.add()
    embedding.tensor_name = name
    embedding.tensor_shape.extend(embeddings_nD.shape)
    for field, file in (("tensor_path", "tensors.tsv"), ("metadata_path", "metadata.tsv")):
        setattr(embedding, field, f"projector/{name}/{file}")
    embedding.sprite.image_path = f"projector/{name}/sprite.png"
    embedding.sprite.single_image_dim.extend([side, side])
    publish_text(board / _CONFIG_FILE, text_format.MessageToString(config))
