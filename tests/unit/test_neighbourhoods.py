"""Lists of a report: a full sort's, with ties and copies, for queries and galleries that are not the same."""

import numpy as np
import pytest
import torch

from dist_proxygml.evaluation.embedding_pass import EmbeddingTable
from dist_proxygml.reporting.neighbourhoods import examine


def make_table(num_images: int = 400, num_classes: int = 60) -> EmbeddingTable:
    """Unit rows of few values, so that scores tie and rows repeat; classes of one image among them."""
    generator = np.random.default_rng(3)
    rows = generator.integers(-2, 3, (num_images, 4)) + 0.0
    rows[:, 0] += 5
    rows = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    labels = generator.integers(0, num_classes, num_images)
    labels[:5] = num_classes + np.arange(5)
    return EmbeddingTable(torch.from_numpy(rows.astype(np.float32)), torch.from_numpy(labels), torch.arange(num_images))


@pytest.mark.parametrize("are_apart", [False, True])
def test_lists_and_first_right_answers_are_those_of_a_full_sort(are_apart: bool) -> None:
    table = make_table()
    numbers = np.arange(len(table.labels))
    is_gallery = (numbers % 3 != 0) | (not are_apart)
    is_query = (numbers % 3 == 0) | (not are_apart)
    lists = examine(table, num_neighbours=10, most=10_000, is_gallery=is_gallery if are_apart else None)

    embeddings, labels = table.embeddings.numpy(), table.labels.numpy()
    seen = {}
    for query in np.flatnonzero(is_query):
        others = np.flatnonzero(is_gallery & (numbers != query))
        scores = embeddings[others] @ embeddings[query]
        order = others[np.lexsort((others, -scores.round(6)))]
        right = labels[order] == labels[query]
        if right.any():
            seen[int(query)] = (order, right)
    assert set(lists.queries.tolist()) == set(seen)
    assert lists.are_all
    for number, query in enumerate(lists.queries.tolist()):
        order, right = seen[query]
        assert np.array_equal(lists.right[number], labels[lists.neighbours[number]] == labels[query])
        assert lists.num_positives[number] == right.sum()
        assert np.array_equal(lists.gallery[lists.places[number]], lists.neighbours[number])
        assert is_gallery[lists.neighbours[number]].all()
        assert query not in lists.neighbours[number]
        # Scores that agree to the last bits may change places between this sort and the search: compare the scores.
        expected = embeddings[order[:10]] @ embeddings[query]
        assert lists.scores[number] == pytest.approx(expected, abs=1e-6)
        scores = embeddings[order] @ embeddings[query]
        best = scores[right].max()
        in_front, equal = (scores > best + 1e-6).sum(), (np.abs(scores - best) <= 1e-6).sum()
        assert in_front < lists.first_right[number] <= in_front + equal
        if lists.right[number].any():
            assert lists.first_right[number] == lists.right[number].argmax() + 1


def test_copies_are_in_the_order_of_their_ids() -> None:
    rows = torch.zeros(6, 2)
    rows[:, 0] = 1.0
    table = EmbeddingTable(rows, torch.tensor([0, 1, 1, 0, 2, 2]), torch.arange(6))
    lists = examine(table, num_neighbours=3, most=6)
    of = {int(query): number for number, query in enumerate(lists.queries)}
    assert lists.neighbours[of[0]].tolist() == [1, 2, 3]
    assert lists.neighbours[of[4]].tolist() == [0, 1, 2]
    assert lists.first_right[of[4]] == 5  # 0, 1, 2, 3, then 5
    assert lists.first_right[of[0]] == 3


def test_more_queries_than_are_looked_at_are_drawn_at_random_and_counted() -> None:
    done: list[int] = []
    lists = examine(make_table(), num_neighbours=5, most=300, progress=done.append)
    assert (len(lists.queries), sum(done), lists.are_all) == (300, 300, False)
    assert lists.num_queries > 350
    assert lists.queries.tolist() != sorted(lists.queries.tolist())
    whole = examine(make_table(), num_neighbours=5, most=1000)
    of = {int(query): number for number, query in enumerate(whole.queries)}
    same = [of[int(query)] for query in lists.queries]
    assert np.array_equal(whole.first_right[same], lists.first_right)


def test_a_table_in_which_nothing_can_be_found_is_refused() -> None:
    table = EmbeddingTable(torch.eye(3), torch.arange(3), torch.arange(3))
    with pytest.raises(ValueError, match="right answer"):
        examine(table, num_neighbours=2, most=10)
