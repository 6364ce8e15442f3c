"""Similarities in chunks: the best pairs of each row whatever the bound, the chunk and the budget; their gradients."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from dist_proxygml.head import similarity as module
from dist_proxygml.head.bank import Bank, Pairs, build_bank
from dist_proxygml.head.selection import looks_at_pairs, rows_per_block, select_negatives
from dist_proxygml.head.similarity import (
    best_pairs,
    chunk_width,
    embedding_gradient,
    kth_largest,
    largest,
    pair_similarities,
    proxy_gradient,
)
from tests.reference import kept_proxies

PLENTY = 1 << 28


def random_bank(num_proxies: int, dim: int, *, seed: int = 0) -> Bank:
    generator = torch.Generator().manual_seed(seed)
    return build_bank(torch.randn(num_proxies, dim, generator=generator, dtype=torch.float64))


def random_rows(num_rows: int, dim: int, *, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(num_rows, dim, generator=generator, dtype=torch.float64), dim=1)


def no_proxies(num_rows: int) -> Tensor:
    return torch.full((num_rows, 2), -5)


def kept_columns(pairs: Pairs, num_rows: int) -> list[list[int]]:
    return [pairs.proxy[pairs.row == row].tolist() for row in range(num_rows)]


def expected_columns(similarity: Tensor, excluded: Tensor, num_wanted: int) -> list[list[int]]:
    """What sorting keeps, lower proxies first among equals, by the oracle that the loss is tested against."""
    columns = []
    for row, (start, stop) in zip(similarity.tolist(), excluded.tolist(), strict=True):
        positive = [start <= j < stop for j in range(len(row))]
        kept = kept_proxies(row, positive, topk=sum(positive) + num_wanted)
        columns.append([j for j in range(len(row)) if kept[j] and not positive[j]])
    return columns


# Banks that a guess from a strided sample must not be fooled by.


def any_directions(dim: int) -> Bank:
    return random_bank(5003, dim)


def all_the_same(dim: int) -> Bank:
    return build_bank(torch.ones(5003, dim, dtype=torch.float64))


def few_directions(dim: int) -> Bank:
    """Masses of exact ties: lengths are powers of two, so the similarities of a direction are the same bits."""
    generator = torch.Generator().manual_seed(3)
    directions = torch.randn(5, dim, generator=generator, dtype=torch.float64)
    lengths = 2.0 ** torch.randint(-3, 4, (5003, 1), generator=generator)
    return build_bank(directions[torch.randint(5, (5003,), generator=generator)] * lengths)


def best_where_the_sample_looks(dim: int) -> Bank:
    proxies = random_bank(5003, dim).proxies.clone()
    proxies[::4] = proxies[::4].abs() + 1
    return build_bank(proxies)


def best_where_it_does_not(dim: int) -> Bank:
    proxies = random_bank(5003, dim).proxies.clone()
    proxies[::4] = -proxies[::4].abs() - 1
    return build_bank(proxies)


BANKS = [any_directions, all_the_same, few_directions, best_where_the_sample_looks, best_where_it_does_not]


@pytest.mark.parametrize("budget", [PLENTY, 40_000])
@pytest.mark.parametrize("num_wanted", [1, 7, 600])
@pytest.mark.parametrize("bank_of", BANKS)
def test_the_best_proxies_of_each_row_are_found(bank_of: Callable[[int], Bank], num_wanted: int, budget: int) -> None:
    dim, num_rows = 3, 5
    bank, rows = bank_of(dim), random_rows(num_rows, dim).abs()
    excluded = torch.tensor([[0, 3], [4999, 5003], [-3, 0], [5003, 5006], [2500, 2501]])
    similarity = rows @ F.normalize(bank.proxies, dim=1).T
    similarity = module.all_similarities(rows, bank) if bank_of is any_directions else similarity
    pairs = select_negatives(
        rows,
        bank,
        excluded_R2=excluded,
        num_negatives=num_wanted,
        row_counts=[num_rows],
        proxy_counts=[5003],
        group=None,
        memory_budget=budget,
    )
    kept = kept_columns(pairs, num_rows)
    if bank_of in (all_the_same, few_directions):  # near ties differ in the last bit between products
        similarity = torch.stack(
            [pair_similarities(rows, bank, torch.arange(num_rows), torch.full((num_rows,), j)) for j in range(5003)], 1
        )
        similarity = (similarity * 1e9).round()
    assert kept == expected_columns(similarity, excluded, num_wanted)


def test_a_row_with_fewer_proxies_than_wanted_gets_all_there_are() -> None:
    bank, rows = random_bank(40, 3), random_rows(4, 3)
    excluded = torch.tensor([[0, 5], [35, 45], [-9, -4], [0, 40]])
    pairs, _ = best_pairs(rows, bank, excluded_R2=excluded, num_wanted=100, memory_budget=PLENTY)
    expected = [list(range(5, 40)), list(range(35)), list(range(40)), []]
    assert kept_columns(pairs, 4) == expected


def test_a_guess_that_failed_for_one_row_is_made_good(monkeypatch: pytest.MonkeyPatch) -> None:
    bank, rows = random_bank(5003, 3), random_rows(4, 3)
    guess, too_high = module._guess_floor, torch.tensor([0.0, 2.0, 0.0, 0.0])  # no similarity is above 1
    monkeypatch.setattr(module, "_guess_floor", lambda *arguments: guess(*arguments) + too_high)
    pairs, _ = best_pairs(rows, bank, excluded_R2=no_proxies(4), num_wanted=20, memory_budget=PLENTY)
    best = module.all_similarities(rows, bank).topk(20, dim=1).indices.sort(dim=1).values
    for row in range(4):
        found = pairs.similarity[pairs.row == row].topk(20).indices
        assert pairs.proxy[pairs.row == row][found].sort().values.tolist() == best[row].tolist()


def test_the_guess_keeps_few_pairs_more_than_wanted() -> None:
    bank, rows = random_bank(65_536, 8), random_rows(16, 8)
    pairs, _ = best_pairs(rows, bank, excluded_R2=no_proxies(16), num_wanted=256, memory_budget=PLENTY)
    assert 16 * 256 <= len(pairs.row) < 4 * 16 * 256


def test_mass_ties_stay_within_the_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    bank = build_bank(torch.ones(50_003, 2, dtype=torch.float64))
    rows, budget = random_rows(8, 2), 4_000_000  # all 400,024 pairs would take ten times as much
    held, look_at = [], module._with_groups

    def counted(pairs: Pairs, groups: Any, *others: Tensor) -> Pairs:
        held.append(len(pairs.row) + groups.similarity.numel())
        return look_at(pairs, groups, *others)

    monkeypatch.setattr(module, "_with_groups", counted)
    pairs, _ = best_pairs(rows, bank, excluded_R2=no_proxies(8), num_wanted=3, memory_budget=budget)
    chunk = budget // 32  # similarities
    assert max(held) <= budget // module.BYTES_PER_PAIR + 2 * chunk
    assert torch.equal(torch.bincount(pairs.row), torch.full((8,), 3))
    assert kept_columns(pairs, 8) == [[0, 1, 2]] * 8


def test_blocks_of_rows_and_chunks_fit_the_budget() -> None:
    assert looks_at_pairs(500, 1_000_000)
    assert not looks_at_pairs(500, 15_999)  # more than a thirty-second of them
    assert looks_at_pairs(500, 16_000)
    assert not looks_at_pairs(60, 1200)
    assert rows_per_block(64, num_negatives=500, num_proxies=1_000_000, budget=1 << 28) == 64
    assert rows_per_block(4096, num_negatives=50_000, num_proxies=1_000_000, budget=1 << 28) == 33
    assert rows_per_block(4096, num_negatives=50_000, num_proxies=1_000_000, budget=1 << 28, device="cuda") == 22
    assert rows_per_block(64, num_negatives=60, num_proxies=1200, budget=1) == 1
    assert chunk_width(64, memory_budget=1 << 28, device="cpu") == 8192
    assert chunk_width(64, memory_budget=1 << 28, device="cuda") == 262_144
    assert chunk_width(1 << 20, memory_budget=1 << 10, device="cpu") == 16


def test_bfloat16_rounds_the_inputs_and_nothing_else() -> None:
    rows, proxies = random_rows(3, 64).float(), random_bank(50, 64).proxies.float()
    rounded = build_bank(proxies, matmul_dtype=torch.bfloat16)
    expected = rows.bfloat16().double() @ proxies.bfloat16().double().T / proxies.double().norm(dim=1)
    actual = module.all_similarities(rows, rounded)
    assert actual.dtype == torch.float32
    assert (actual.double() - expected).abs().max() < 1e-6  # rounding of float32; of bfloat16 it would be 4e-3
    assert (actual.double() - rows.double() @ F.normalize(proxies.double()).T).abs().max() > 1e-5


@pytest.mark.parametrize("touched_only", [True, False])
def test_gradients_of_pairs_are_those_of_the_dense_expression(touched_only: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    num_rows, num_proxies, dim = 5, 11, 3
    rows = random_rows(num_rows, dim).requires_grad_()
    proxies = torch.randn(num_proxies, dim, generator=generator, dtype=torch.float64).requires_grad_()
    mask = torch.rand(num_rows, num_proxies, generator=generator) < 0.3
    mask[2] = False  # a row without a pair
    mask[:, [0, 10]] = False  # the first and the last proxy too
    weight = torch.randn(num_rows, num_proxies, generator=generator, dtype=torch.float64)
    similarity = rows @ F.normalize(proxies, dim=1).T
    (similarity * weight)[mask].sum().backward()

    row, proxy = mask.nonzero().unbind(1)
    pairs, bank = Pairs(row, proxy, similarity.detach()[mask]), build_bank(proxies.detach())
    gradient = embedding_gradient(pairs, bank, weight[mask], num_rows=num_rows)
    torch.testing.assert_close(gradient, rows.grad, rtol=1e-12, atol=1e-14)
    touched, values = proxy_gradient(pairs, bank, rows.detach(), weight[mask], touched_only=touched_only)
    expected = mask.any(dim=0).nonzero().flatten() if touched_only else torch.arange(num_proxies)
    assert torch.equal(touched, expected)
    torch.testing.assert_close(values, proxies.grad[touched], rtol=1e-12, atol=1e-14)
    assert not values[~torch.isin(touched, proxy)].any()


def test_a_proxy_of_length_zero_has_similarity_zero_as_normalize_has_it() -> None:
    proxies = random_bank(6, 3).proxies.clone()
    proxies[2] = 0
    similarity = module.all_similarities(random_rows(2, 3), build_bank(proxies))
    assert not similarity[:, 2].any()
    assert similarity.isfinite().all()


def test_padding_puts_each_row_on_its_line() -> None:
    pairs = Pairs(torch.tensor([0, 2, 2]), torch.tensor([4, 1, 3]), torch.tensor([0.5, 0.25, 0.125]))
    similarity, proxy = module.padded(pairs, num_rows=4, longest=2)
    nothing = -math.inf
    assert similarity.tolist() == [[0.5, nothing], [nothing, nothing], [0.25, 0.125], [nothing, nothing]]
    assert proxy.tolist() == [[4, -1], [-1, -1], [1, 3], [-1, -1]]


@pytest.mark.parametrize("proxies_per_class", [2, 3, 4, 8, 12])
def test_the_sample_meets_every_proxy_of_a_class(proxies_per_class: int) -> None:
    for num_proxies in (4800, 24_000, 96_000, 2_400_000):
        stride, _ = module._sample_of(50, num_proxies)
        met = torch.arange(0, num_proxies, stride) % proxies_per_class
        counts = torch.bincount(met, minlength=proxies_per_class)
        assert counts.max() - counts.min() <= 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("k", [1, 3, 40])
def test_the_largest_are_those_of_a_sort_with_ties_infinities_and_nan(dtype: torch.dtype, k: int) -> None:
    values_nR = torch.randint(-3, 4, (40, 6), generator=torch.Generator().manual_seed(0)).to(dtype)
    values_nR[7:9, 1] = -math.inf
    values_nR[3, 2] = math.inf
    values_nR[30, 3] = math.nan
    sorted_nR = values_nR.sort(dim=0, descending=True).values
    found_R, found_Rk = kth_largest(values_nR.T, k), largest(values_nR.T, k)  # whose rows are not adjacent in memory
    exactly = {"rtol": 0, "atol": 0, "equal_nan": True}
    torch.testing.assert_close(found_R, sorted_nR[k - 1], **exactly)
    torch.testing.assert_close(found_Rk.sort(dim=1, descending=True).values, sorted_nR[:k].T, **exactly)
    assert found_R.dtype == found_Rk.dtype == dtype
