"""On a CUDA device: the fused kernels give what head/similarity.py gives, in little memory, and the same each time.

Small integers and lengths that are powers of two have products without rounding error: values are equal, ties are real.

Dimension key: that of head/fused.py.
"""

import importlib.util
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dist_proxygml import ProxyGMLLoss
from dist_proxygml.head import similarity
from dist_proxygml.head.bank import Bank, Pairs, build_bank

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton"),
]

DEVICE = "cuda"
DTYPES = pytest.mark.parametrize("matmul_dtype", [torch.float32, torch.bfloat16], ids=str)


def generator(seed: int) -> torch.Generator:
    return torch.Generator(DEVICE).manual_seed(seed)


def integers(*shape: int, seed: int) -> Tensor:
    return torch.randint(-3, 4, shape, generator=generator(seed), device=DEVICE).float()


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=generator(seed), device=DEVICE)


def nothing_excluded(num_rows: int) -> Tensor:
    return torch.zeros(num_rows, 2, dtype=torch.int64, device=DEVICE)


def some_pairs(num_rows: int, num_proxies: int, *, per_row: int) -> Pairs:
    """As many pairs of each row with different proxies, which they share more often than chance has it."""
    proxy_n = (torch.rand(num_rows, per_row, generator=generator(4), device=DEVICE) ** 3 * num_proxies).long()
    key_n = torch.unique(torch.arange(num_rows, device=DEVICE)[:, None] * num_proxies + proxy_n)
    return Pairs(key_n // num_proxies, key_n % num_proxies, normal(len(key_n), seed=5))


def in_float64(pairs: Pairs, bank: Bank) -> tuple[Pairs, Bank]:
    return pairs._replace(similarity=pairs.similarity.double()), Bank(bank.proxies.double(), bank.inverse_norm.double())


def assert_near(got: Tensor, expected: Tensor) -> None:
    """To one part in a million of the whole, in float32."""
    assert got.dtype == torch.float32
    assert got.shape == expected.shape
    assert torch.linalg.vector_norm(got - expected) <= 1e-6 * torch.linalg.vector_norm(expected)


@DTYPES
@pytest.mark.parametrize("sizes", [(5, 77, 19), (33, 3001, 64), (300, 10007, 130), (129, 4096, 512)], ids=str)
def test_the_pairs_above_the_floor_are_those_of_the_twin(sizes: tuple[int, int, int], matmul_dtype) -> None:
    from dist_proxygml.head import fused

    num_rows, num_proxies, dim = sizes
    embeddings_RD = integers(num_rows, dim, seed=0)
    bank = Bank(integers(num_proxies, dim, seed=1), 2 ** integers(num_proxies, seed=2), matmul_dtype)
    start_R = torch.randint(-9, num_proxies + 9, (num_rows,), generator=generator(3), device=DEVICE)
    excluded_R2 = torch.stack([start_R, start_R + 8], dim=1)
    floor_R = similarity.all_similarities(embeddings_RD, bank).sort(dim=1).values[:, -num_proxies // 20]  # one of them
    expected = similarity._pairs_above(embeddings_RD, bank, floor_R, excluded_R2, num_proxies, 1 << 30)
    arguments = embeddings_RD, bank.proxies, bank.inverse_norm, floor_R, excluded_R2
    count = len(expected.row)
    got = fused.pairs_above(*arguments, matmul_dtype=matmul_dtype, capacity=count)
    assert got is not None
    assert all(torch.equal(*columns) for columns in zip(got, expected, strict=True))
    assert fused.pairs_above(*arguments, matmul_dtype=matmul_dtype, capacity=count - 1) is None


@DTYPES
def test_similarities_of_any_numbers_are_those_of_the_twin(matmul_dtype: torch.dtype) -> None:
    from dist_proxygml.head import fused

    embeddings_RD = F.normalize(normal(200, 500, seed=0))
    bank = build_bank(normal(5003, 500, seed=1), matmul_dtype=matmul_dtype)
    got = fused.pairs_above(
        embeddings_RD,
        bank.proxies,
        bank.inverse_norm,
        torch.full((200,), -math.inf, device=DEVICE),
        nothing_excluded(200),
        matmul_dtype=matmul_dtype,
        capacity=200 * 5003,
    )
    assert got is not None
    assert len(got.row) == 200 * 5003
    exact_Rp = (
        embeddings_RD.to(matmul_dtype).double() @ bank.proxies.to(matmul_dtype).double().T * bank.inverse_norm.double()
    )
    # 500 products of numbers of length 1, summed in float32; TF32 or bfloat16 would be off by 1e-4 and more.
    torch.testing.assert_close(got.similarity.view(200, 5003).double(), exact_Rp, rtol=0, atol=4e-6)


@DTYPES
def test_a_similarity_does_not_depend_on_where_its_proxy_lies(matmul_dtype: torch.dtype) -> None:
    """So ranks that hold other parts of the bank find the same values, ties included."""
    from dist_proxygml.head import fused

    embeddings_RD = F.normalize(normal(70, 96, seed=0))
    bank = build_bank(normal(1000, 96, seed=1))
    found = []
    for first in (0, 37):
        pairs = fused.pairs_above(
            embeddings_RD,
            bank.proxies[first:],
            bank.inverse_norm[first:],
            torch.full((70,), -math.inf, device=DEVICE),
            nothing_excluded(70),
            matmul_dtype=matmul_dtype,
            capacity=70_000,
        )
        assert pairs is not None
        found.append(pairs.similarity.view(70, -1)[:, 37 - first :])
    assert torch.equal(*found)


@DTYPES
def test_pairs_above_takes_little_memory(matmul_dtype: torch.dtype) -> None:
    from dist_proxygml.head import fused

    num_rows, num_proxies, num_wanted = 1024, 200_003, 100
    embeddings_RD = F.normalize(normal(num_rows, 64, seed=0))
    bank = build_bank(normal(num_proxies, 64, seed=1), matmul_dtype=matmul_dtype)
    floor_R = similarity._guess_floor(embeddings_RD, bank, num_wanted, 1 << 28)
    arguments = embeddings_RD, bank.proxies, bank.inverse_norm, floor_R, nothing_excluded(num_rows)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    pairs = fused.pairs_above(*arguments, matmul_dtype=matmul_dtype, capacity=4 * num_wanted * num_rows)
    assert pairs is not None
    assert torch.bincount(pairs.row).min() >= num_wanted
    # A tenth of S; a copy of the bank in bfloat16 would take 26 MB.
    assert torch.cuda.max_memory_allocated() - before < 64 * 4 * num_wanted * num_rows < num_rows * num_proxies * 4 / 10


@pytest.mark.parametrize("dim", [19, 512])
def test_gradients_are_those_of_the_twin_and_the_same_each_time(dim: int) -> None:
    from dist_proxygml.head import fused

    embeddings_RD = F.normalize(normal(96, dim, seed=0))
    bank = build_bank(normal(20_011, dim, seed=1))
    pairs = some_pairs(96, 20_011, per_row=5000)  # several segments a row
    weight_n = normal(len(pairs.row), seed=2)
    exact_pairs, exact_bank = in_float64(pairs, bank)
    got = fused.embedding_gradient(pairs, bank, weight_n, num_rows=96)
    assert_near(got, similarity.embedding_gradient(exact_pairs, exact_bank, weight_n.double(), num_rows=96))
    assert torch.equal(got, fused.embedding_gradient(pairs, bank, weight_n, num_rows=96))
    for touched_only in (True, False):
        arguments = exact_pairs, exact_bank, embeddings_RD.double(), weight_n.double()
        expected_u, expected = similarity.proxy_gradient(*arguments, touched_only=touched_only)
        proxy_u, got = fused.proxy_gradient(pairs, bank, embeddings_RD, weight_n, touched_only=touched_only)
        assert torch.equal(proxy_u, expected_u)
        assert_near(got, expected)
        _, again = fused.proxy_gradient(pairs, bank, embeddings_RD, weight_n, touched_only=touched_only)
        assert torch.equal(got, again)


@DTYPES
@pytest.mark.parametrize("sparse", [True, False])
def test_the_loss_and_its_gradients_do_not_change(matmul_dtype: torch.dtype, sparse: bool) -> None:
    results = []
    for fused in (False, True):
        loss = ProxyGMLLoss(
            20_011, 130, proxies_per_class=3, topk=500, matmul_dtype=matmul_dtype, fused=fused, sparse=sparse
        ).to(DEVICE)
        embeddings = F.normalize(normal(50, 130, seed=0)).requires_grad_()
        terms = loss(embeddings, torch.randint(0, 20_011, (50,), generator=generator(1), device=DEVICE))
        terms.total.backward()
        results.append([terms.total.detach(), embeddings.grad, loss.proxies.grad.to_dense()])
    for of_twin, of_kernels in zip(*results, strict=True):
        # A proxy within rounding of the k-th may be kept by one of them only; its weight is about 1/500.
        assert torch.linalg.vector_norm(of_kernels - of_twin) <= 1e-3 * torch.linalg.vector_norm(of_twin)


def test_nothing_as_large_as_the_gradient_exists_beside_it() -> None:
    from dist_proxygml.head import fused

    embeddings_RD = F.normalize(normal(64, 512, seed=0))
    bank = build_bank(normal(200_003, 512, seed=1))
    pairs = some_pairs(64, 200_003, per_row=1000)
    weight_n = normal(len(pairs.row), seed=2)
    for touched_only in (True, False):
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        _, gradient_uD = fused.proxy_gradient(pairs, bank, embeddings_RD, weight_n, touched_only=touched_only)
        result = gradient_uD.numel() * 4
        assert torch.cuda.max_memory_allocated() - before < 1.3 * result
        del gradient_uD


def test_a_bank_of_more_elements_than_int32_counts() -> None:
    from dist_proxygml.head import fused

    dim, num_proxies = 512, (1 << 31) // 512 + 1001
    if torch.cuda.mem_get_info()[0] < 4 * num_proxies * 4 * dim:
        pytest.skip(f"needs {4 * num_proxies * 4 * dim / 1e9:.0f} GB of device memory")
    bank = build_bank(normal(num_proxies, dim, seed=0))
    first = num_proxies - 500
    embeddings_RD = F.normalize(bank.proxies[first : first + 40])
    pairs = fused.pairs_above(
        embeddings_RD,
        bank.proxies,
        bank.inverse_norm,
        torch.full((40,), 0.9, device=DEVICE),
        nothing_excluded(40),
        matmul_dtype=torch.bfloat16,
        capacity=1000,
    )
    assert pairs is not None
    assert torch.equal(pairs.row, torch.arange(40, device=DEVICE))
    assert torch.equal(pairs.proxy, first + pairs.row)
    weight_n = normal(40, seed=1)
    tail = Bank(bank.proxies[first:], bank.inverse_norm[first:])
    pairs_in_tail = pairs._replace(proxy=pairs.proxy - first)
    expected = similarity.embedding_gradient(pairs_in_tail, tail, weight_n, num_rows=40)
    torch.testing.assert_close(fused.embedding_gradient(pairs, bank, weight_n, num_rows=40), expected)
    for touched_only in (True, False):
        _, expected = similarity.proxy_gradient(pairs_in_tail, tail, embeddings_RD, weight_n, touched_only=True)
        proxy_u, got = fused.proxy_gradient(pairs, bank, embeddings_RD, weight_n, touched_only=touched_only)
        where_u = torch.arange(40, device=DEVICE) if touched_only else pairs.proxy
        assert torch.equal(proxy_u[where_u], pairs.proxy)
        torch.testing.assert_close(got[where_u], expected, rtol=1e-4, atol=1e-6)
        del got
