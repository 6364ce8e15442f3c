"""The projector's files: what TensorBoard reads of them, within what a browser takes."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from google.protobuf import text_format
from PIL import Image
from tensorboard.plugins.projector.projector_config_pb2 import ProjectorConfig

from dist_proxygml.data.index import ShardIndex
from dist_proxygml.data.pipeline import ShardImages
from dist_proxygml.data.transforms import Resize
from dist_proxygml.evaluation.embedding_pass import EmbeddingTable
from dist_proxygml.reporting.gallery import stratified_sample, thumbnail
from dist_proxygml.reporting.projector import (
    MAX_POINTS,
    MAX_SPRITE_SIDE,
    has_projection,
    thumbnail_side,
    write_projection,
)
from tests.shards_of_noise import write_noise_shards, write_query_and_gallery


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> ShardIndex:
    return write_noise_shards(tmp_path_factory.mktemp("noise"), [4, 5, 1, 6, 4])


@pytest.fixture(scope="module")
def table(index: ShardIndex) -> EmbeddingTable:
    ids = torch.arange(1, index.num_samples)  # the first image was damaged
    embeddings = F.normalize(torch.randn(len(ids), 3, generator=torch.Generator().manual_seed(0)))
    return EmbeddingTable(embeddings, torch.from_numpy(index.labels)[ids], ids)


def test_a_sprite_is_never_larger_than_a_browser_takes() -> None:
    for num_points, side in ((1, 64), (16_384, 64), (16_385, 63), (MAX_POINTS, 64)):
        assert thumbnail_side(num_points) == side
        assert side * np.ceil(np.sqrt(num_points)) <= MAX_SPRITE_SIDE


def test_the_configuration_names_points_their_classes_and_their_pictures(
    tmp_path: Path, index: ShardIndex, table: EmbeddingTable
) -> None:
    assert not has_projection(tmp_path, "step-000007")
    write_projection(tmp_path, "step-000007", table, index, num_points=10, progress_bar=False)
    assert has_projection(tmp_path, "step-000007")
    config = text_format.Parse((tmp_path / "projector_config.pbtxt").read_text(), ProjectorConfig())
    (embedding,) = config.embeddings
    rows = stratified_sample(table.labels.numpy(), 10)
    assert (embedding.tensor_name, list(embedding.tensor_shape)) == ("step-000007", [10, 3])

    points = np.loadtxt(tmp_path / embedding.tensor_path, delimiter="\t")
    np.testing.assert_allclose(points, table.embeddings[rows], atol=5.1e-5)  # four decimals
    header, *lines = (tmp_path / embedding.metadata_path).read_text().splitlines()
    assert header.split("\t") == ["class", "label", "image"]
    for row, line in zip(rows.tolist(), lines, strict=True):
        label = int(table.labels[row])
        assert line.split("\t") == [f"pattern {label} <&>", str(label), str(int(table.ids[row]))]

    sprite = np.asarray(Image.open(tmp_path / embedding.sprite.image_path))
    side, width = embedding.sprite.single_image_dim
    assert (side, width) == (64, 64)
    assert sprite.shape == (4 * 64, 4 * 64, 3)  # ten images in rows of four
    images = ShardImages(index, Resize(64))
    for position, row in enumerate(rows.tolist()):
        top, left = 64 * (position // 4), 64 * (position % 4)
        expected = thumbnail(images.image(int(table.ids[row])), 64)
        np.testing.assert_array_equal(sprite[top : top + 64, left : left + 64], expected)
    assert (sprite[128:, 128:] == 255).all()


def test_points_of_queries_and_gallery_have_the_pictures_of_their_split(tmp_path: Path) -> None:
    index, gallery = write_query_and_gallery(tmp_path / "shards", [4, 5, 6])
    labels = torch.from_numpy(np.concatenate([index.labels, gallery.labels]))
    table = EmbeddingTable(F.normalize(torch.randn(len(labels), 3)), labels, torch.arange(len(labels)))
    write_projection(tmp_path, "step-000007", table, index, gallery=gallery, num_points=100, progress_bar=False)
    sprite = np.asarray(Image.open(tmp_path / "projector" / "step-000007" / "sprite.png"))
    last = thumbnail(ShardImages(gallery, Resize(64)).image(gallery.num_samples - 1), 64)
    top, left = (64 * part for part in divmod(len(labels) - 1, 4))
    np.testing.assert_array_equal(sprite[top : top + 64, left : left + 64], last)


def test_later_embeddings_take_the_place_of_earlier_ones(
    tmp_path: Path, index: ShardIndex, table: EmbeddingTable
) -> None:
    for name in ("step-000007", "step-000014"):
        write_projection(tmp_path, name, table, index, num_points=3, progress_bar=False)
    assert has_projection(tmp_path, "step-000014")
    assert not has_projection(tmp_path, "step-000007")
    assert [folder.name for folder in (tmp_path / "projector").iterdir()] == ["step-000014"]
