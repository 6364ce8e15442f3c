"""Pictures of what is retrieved: which images stand where, in which frame."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from dist_proxygml.data.index import ShardIndex
from dist_proxygml.data.pipeline import ShardImages
from dist_proxygml.data.transforms import Resize
from dist_proxygml.evaluation.embedding_pass import EmbeddingTable
from dist_proxygml.reporting.gallery import TILE_SIDE, retrieval_gallery, stratified_sample, thumbnail
from tests.shards_of_noise import SIDE, write_noise_shards, write_query_and_gallery

CELL = TILE_SIDE + 8
GREEN, RED, GREY, WHITE = (26, 152, 80), (215, 48, 39), (128, 128, 128), (255, 255, 255)


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> ShardIndex:
    return write_noise_shards(tmp_path_factory.mktemp("noise"), [4, 5, 1, 6, 4])


def table_of(index: ShardIndex, *, left_out: int = 3) -> EmbeddingTable:
    """Random embeddings of all images but one, so that rows and ids differ."""
    ids = torch.tensor([i for i in range(index.num_samples) if i != left_out])
    embeddings = F.normalize(torch.randn(len(ids), 3, generator=torch.Generator().manual_seed(0)))
    return EmbeddingTable(embeddings, torch.from_numpy(index.labels)[ids], ids)


def test_a_row_holds_a_query_and_its_nearest_images_in_frames_that_say_what_is_right(index: ShardIndex) -> None:
    table = table_of(index)
    picture = retrieval_gallery(table, index).permute(1, 2, 0).numpy()
    assert picture.shape == (10 * CELL, 9 * CELL, 3)
    # an 8-pixel image is enlarged to 64: every eighth pixel is the image itself
    images = ShardImages(index, Resize(SIDE))
    id_of = {images.image(i).permute(1, 2, 0).numpy().tobytes(): i for i in range(index.num_samples)}
    assert len(id_of) == index.num_samples
    row_of = {int(image): row for row, image in enumerate(table.ids)}
    queries, frames = [], set()
    for row in range(10):
        cells = [picture[row * CELL : (row + 1) * CELL, c * CELL : (c + 1) * CELL] for c in range(9)]
        shown = [row_of[id_of[cell[4:-4:8, 4:-4:8].tobytes()]] for cell in cells]
        query = shown[0]
        order = sorted(range(len(table.ids)), key=lambda i: -float(table.embeddings[query] @ table.embeddings[i]))
        assert shown[1:] == [i for i in order if i != query][:8]
        for column, (cell, image) in enumerate(zip(cells, shown, strict=True)):
            is_right = bool(table.labels[image] == table.labels[query])
            expected = GREY if column == 0 else GREEN if is_right else RED
            top = [tuple(pixel) for pixel in cell[2, 1:-1].tolist()]
            assert set(top) == ({expected} if is_right else {expected, WHITE})
            frames.add(expected)
        queries.append(query)
    assert frames == {GREY, GREEN, RED}
    assert len(set(queries)) == 10
    assert all(int((table.labels == table.labels[query]).sum()) > 1 for query in queries)
    again = retrieval_gallery(table._replace(embeddings=-table.embeddings), index)
    assert torch.equal(again[:, :, :CELL], torch.from_numpy(picture[:, :CELL]).permute(2, 0, 1))  # the same queries


def test_queries_are_searched_in_a_gallery_of_their_own(tmp_path: Path) -> None:
    index, gallery = write_query_and_gallery(tmp_path, [4, 5, 1, 6, 4])
    splits = (index, gallery)
    labels = torch.from_numpy(np.concatenate([split.labels for split in splits]))
    embeddings = F.normalize(torch.randn(len(labels), 3, generator=torch.Generator().manual_seed(0)))
    table = EmbeddingTable(embeddings, labels, torch.arange(len(labels)))
    picture = retrieval_gallery(table, index, gallery=gallery).permute(1, 2, 0).numpy()
    images = [ShardImages(split, Resize(SIDE)).image(i) for split in splits for i in range(split.num_samples)]
    row_of = {image.permute(1, 2, 0).numpy().tobytes(): row for row, image in enumerate(images)}
    for row in range(len(picture) // CELL):
        cells = [picture[row * CELL : (row + 1) * CELL, c * CELL : (c + 1) * CELL] for c in range(9)]
        query, *shown = [row_of[cell[4:-4:8, 4:-4:8].tobytes()] for cell in cells]
        assert query < index.num_samples
        searched = range(index.num_samples, len(labels))
        assert shown == sorted(searched, key=lambda i: -float(embeddings[query] @ embeddings[i]))[:8]
        assert labels[query] in gallery.labels


def test_a_thumbnail_is_the_whole_image_in_the_middle_of_a_square() -> None:
    image = torch.zeros(3, 100, 50, dtype=torch.uint8)
    image[0] = 200
    square = thumbnail(image, 20)
    assert square.shape == (20, 20, 3)
    assert (square[:, 5:15] == (200, 0, 0)).all()
    assert (square[:, :5] == 255).all()
    assert (square[:, 15:] == 255).all()
    assert thumbnail(torch.zeros(3, 1, 900, dtype=torch.uint8), 4).sum(axis=2)[:, 0].tolist() == [765, 0, 765, 765]


def test_a_sample_gives_every_class_its_share() -> None:
    labels = np.random.default_rng(1).permutation(np.repeat([3, 5, 9], [100, 40, 4]))
    everything = stratified_sample(labels, 1000)
    assert everything.tolist() == list(range(144))
    rows = stratified_sample(labels, 60)
    assert rows.tolist() == sorted(set(rows.tolist()))
    assert np.bincount(labels[rows])[[3, 5, 9]].tolist() == [20, 20, 4]
    assert stratified_sample(labels, 60).tolist() == rows.tolist()


def test_a_sample_of_very_many_classes_has_some_of_them_with_their_neighbours() -> None:
    labels = np.arange(3000) // 10
    rows = stratified_sample(labels, 100)
    counts = np.bincount(labels[rows])
    assert len(rows) == 100
    assert sorted(counts[counts > 0].tolist()) == [4] + 12 * [8]
    assert stratified_sample(labels, 1).shape == (1,)
