"""On a CUDA device: an evaluation gives what it gives on the CPU, by faiss and by sweeps. Skipped without a device."""

import dataclasses

import numpy as np
import pytest
import torch

from dist_proxygml.distributed.parallel import single_process
from dist_proxygml.evaluation import rank_counts
from dist_proxygml.evaluation.embedding_pass import EmbeddingTable
from dist_proxygml.evaluation.evaluator import Settings, evaluate_table
from dist_proxygml.evaluation.exact import error_bound, float32_products, round_rows, scores_of_block
from dist_proxygml.evaluation.retrieval import SearchOptions
from dist_proxygml.evaluation.search import build_searcher, searches_on_gpu

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
CUDA = torch.device("cuda", 0)


def table(num_images: int = 3000, width: int = 96) -> EmbeddingTable:
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, num_images // 6, (num_images,), generator=generator)
    rows = torch.randn(num_images // 6, width, generator=generator)[labels]
    rows += 1.5 * torch.randn(num_images, width, generator=generator)
    rows[100:160] = rows[7]  # copies
    return EmbeddingTable(torch.nn.functional.normalize(rows, dim=1), labels, torch.arange(num_images))


@pytest.mark.parametrize("search", ["faiss", "counter"])
@pytest.mark.parametrize("allow_tf32", [False, True])
def test_metrics_are_those_of_the_cpu_to_the_last_bit(search: str, allow_tf32: bool) -> None:
    settings = Settings(recall_at=(1, 10, 100), kmeans_seeds=(), protocol="sop", legacy_proxygml=True)
    expected = evaluate_table(table(), context=single_process(), settings=settings)
    torch.set_float32_matmul_precision("high" if allow_tf32 else "highest")
    try:
        with torch.autocast("cuda", dtype=torch.bfloat16):
            found = evaluate_table(
                table(),
                context=single_process("cuda:0"),
                settings=settings,
                options=SearchOptions(search, verify=True, memory_budget=4 << 20),
            )
    finally:
        torch.set_float32_matmul_precision("highest")
    assert dataclasses.replace(found, table=None) == dataclasses.replace(expected, table=None)


def test_float32_products_stay_within_the_error_bound() -> None:
    rows = round_rows(table().embeddings.numpy())
    with float32_products(CUDA):
        products = torch.from_numpy(rows).cuda() @ torch.from_numpy(rows).cuda().T
    assert np.abs(products.cpu().numpy() - scores_of_block(rows, rows)).max() < error_bound(rows.shape[1])


def test_faiss_searches_on_the_gpu_where_it_can() -> None:
    if not searches_on_gpu(CUDA):
        pytest.skip("faiss-cpu is installed")
    rows = round_rows(table().embeddings.numpy())
    on_device = torch.from_numpy(rows).to(CUDA)
    before = torch.cuda.mem_get_info(CUDA)[0]
    searcher = build_searcher(rows, on_device)
    scores, found = searcher.search(rows[:50], 20)
    assert before - torch.cuda.mem_get_info(CUDA)[0] < 512 << 20  # faiss would reserve 1.5 GiB
    exact = scores_of_block(rows[:50], rows)
    assert np.abs(scores - np.take_along_axis(exact, found, axis=1)).max() < error_bound(rows.shape[1])
    assert np.abs(scores - -np.sort(-exact, axis=1)[:, :20]).max() < 2 * error_bound(rows.shape[1])


def test_faiss_makes_no_copy_of_a_gallery_on_the_gpu() -> None:
    if not searches_on_gpu(CUDA):
        pytest.skip("faiss-cpu is installed")
    on_device = torch.nn.functional.normalize(torch.randn(8 << 20, 64, device=CUDA))  # 2 GiB
    queries = on_device[:3].cpu().numpy()
    before = torch.cuda.mem_get_info(CUDA)[0]
    _, found = build_searcher(np.empty((0, 64), np.float32), on_device).search(queries, 1)
    assert found[:, 0].tolist() == [0, 1, 2]
    assert before - torch.cuda.mem_get_info(CUDA)[0] < 512 << 20


def test_a_block_that_the_gpu_has_no_memory_for_is_halved(monkeypatch: pytest.MonkeyPatch) -> None:
    settings, said = Settings(kmeans_seeds=()), []
    expected = evaluate_table(table(), context=single_process(), settings=settings)
    take = rank_counts.ScoreBuffer.take

    def scarce(buffer: rank_counts.ScoreBuffer, num_rows: int, num_columns: int) -> torch.Tensor:
        if num_rows > 100:
            return torch.empty(1 << 50, device=CUDA)  # a petabyte
        return take(buffer, num_rows, num_columns)

    monkeypatch.setattr(rank_counts.ScoreBuffer, "take", scarce)
    options = SearchOptions("counter")
    found = evaluate_table(
        table(), context=single_process("cuda:0"), settings=settings, options=options, say=said.append
    )
    assert found.metrics == expected.metrics
    assert any("has no memory for" in line for line in said)
