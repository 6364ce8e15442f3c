"""All pairs are counted to the same numbers by any number of ranks."""

import pytest
import torch

from dist_proxygml.distributed.parallel import ParallelContext, single_process
from dist_proxygml.evaluation.embedding_pass import EmbeddingTable
from dist_proxygml.evaluation.evaluator import PairSettings, Roles, Settings, evaluate_table
from dist_proxygml.evaluation.exact import round_rows
from dist_proxygml.evaluation.verification import Pairs, verify_all
from tests.harness import run_ranks

FARS = (1e-6, 1e-3, 1e-2, 0.1)


def measure(context: ParallelContext) -> list[str]:
    """Results of a split, of queries with a gallery, of a collapsed model, and of more and fewer tiles than ranks."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 60, (400,), generator=generator)
    rows = torch.randn(60, 16, generator=generator)[labels] + torch.randn(400, 16, generator=generator)
    collapsed = 1 + 1e-6 * torch.randn(400, 16, generator=generator)
    settings = Settings(recall_at=(1,), kmeans_seeds=(), pairs=PairSettings(False, FARS))
    is_query = torch.arange(400) % 3 == 0
    found = []
    for embeddings, roles in ((rows, None), (rows, Roles(is_query, ~is_query)), (collapsed, None)):
        table = EmbeddingTable(torch.nn.functional.normalize(embeddings, dim=1), labels, torch.arange(400))
        found.append(evaluate_table(table, context=context, settings=settings, roles=roles).to_json())
    few = Pairs(round_rows(torch.nn.functional.normalize(rows, dim=1).numpy()), labels.numpy())
    for tile in ((16, 64), (300, 300)):
        found.append(str(verify_all(few, fars=FARS, context=context, tile=tile)))
    with pytest.raises(ValueError, match=r"pairs of different classes, got .* and 0;"):
        verify_all(Pairs(few.rows, 0 * few.labels), fars=FARS, context=context)
    return found


def test_any_number_of_ranks_counts_the_same() -> None:
    expected = measure(single_process())
    assert expected[3] == expected[4]
    for world_size in (2, 3):
        for found in run_ranks(measure, world_size):
            assert found == expected
