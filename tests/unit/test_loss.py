"""ProxyGMLLoss in one process: the oracle, the paper's special cases, what is refused."""

import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from dist_proxygml import ProxyGMLLoss
from dist_proxygml.head.choices import Head
from dist_proxygml.head.loss import ProxyLoss
from dist_proxygml.head.reference import proxygml_loss
from tests.problems import (
    ROUNDING,
    SELECTIONS,
    Problem,
    assert_agrees_with_the_oracle,
    build_loss,
    outcomes,
    random_problem,
    reference_of,
    relative_difference,
    tied_problem,
)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_drawn_problems_agree_with_the_oracle(data: st.DataObject) -> None:
    num_classes = data.draw(st.integers(2, 7), label="C")
    proxies_per_class = data.draw(st.integers(1, 3), label="N")
    make = data.draw(st.sampled_from([random_problem, tied_problem]), label="make")
    problem = make(
        num_classes=num_classes,
        proxies_per_class=proxies_per_class,
        num_images=data.draw(st.integers(1, 5), label="B"),
        seed=data.draw(st.integers(0, 2**30), label="seed"),
        topk=data.draw(st.integers(proxies_per_class + 1, num_classes * proxies_per_class), label="k"),
        regularization_weight=data.draw(st.sampled_from([0.0, 0.3]), label="lambda"),
        scale=data.draw(st.sampled_from([1.0, 4.0]), label="scale"),
    )
    results = outcomes(problem, world_size=None, selection=data.draw(st.sampled_from(SELECTIONS)))
    assert_agrees_with_the_oracle(results, problem)


def test_with_every_proxy_kept_and_one_a_class_it_is_the_normalised_softmax() -> None:
    problem = random_problem(num_classes=7, topk=7)
    embeddings = problem.embeddings.clone().requires_grad_()
    proxies = problem.proxies.clone().requires_grad_()
    expected = F.cross_entropy(embeddings @ F.normalize(proxies[:, 0], dim=1).T, problem.labels)
    expected.backward()
    assert embeddings.grad is not None
    assert proxies.grad is not None
    (result,) = outcomes(problem, world_size=None)
    assert relative_difference(result.total, expected.detach()) < ROUNDING
    assert relative_difference(result.grad_embeddings, embeddings.grad) < ROUNDING
    assert relative_difference(result.grad_proxies, proxies.grad) < ROUNDING
    assert result.kept_classes == 7


def test_a_ratio_of_one_keeps_every_proxy() -> None:
    assert ProxyGMLLoss(7, 5, proxies_per_class=3, ratio=1.0).topk == 21


def test_one_image_worked_out_by_hand() -> None:
    # Classes on both axes and the diagonal; an image on the first axis keeps that and the diagonal.
    proxies = torch.tensor([[[2.0, 0.0]], [[0.0, 5.0]], [[3.0, 3.0]]], dtype=torch.float64)
    problem = Problem(torch.tensor([[1.0, 0.0]], dtype=torch.float64), torch.tensor([0]), proxies, topk=2)
    terms = build_loss(problem)(problem.embeddings, problem.labels)
    expected = math.log(math.exp(1.0) + math.exp(math.sqrt(0.5))) - 1.0
    assert terms.total.item() == pytest.approx(expected, rel=1e-14)
    assert terms.kept_classes.item() == 2
    assert terms.regularization.item() == 0


def test_a_class_without_images_still_gets_gradients_where_it_is_kept() -> None:
    problem = random_problem(num_classes=4, topk=4, labels=[0, 0, 1, 2, 1, 0, 2])
    (result,) = outcomes(problem, world_size=None)
    assert result.grad_proxies[3].abs().max() > 1e-3
    assert_agrees_with_the_oracle([result], problem)


def test_proxies_that_no_image_keeps_get_a_gradient_of_exactly_zero() -> None:
    problem = random_problem(num_classes=6, topk=2, num_images=1, labels=[2])
    (result,) = outcomes(problem, world_size=None)
    assert (result.grad_proxies.flatten(1).abs().amax(dim=1) > 0).sum() == 2


def test_the_length_of_a_proxy_changes_no_term_and_the_length_of_its_gradient_inversely() -> None:
    problem = random_problem(num_classes=5, proxies_per_class=2, topk=5, regularization_weight=0.3)
    (result,) = outcomes(problem, world_size=None)
    (longer,) = outcomes(problem._replace(proxies=4 * problem.proxies), world_size=None)
    assert relative_difference(longer.total, result.total) < ROUNDING
    assert relative_difference(4 * longer.grad_proxies, result.grad_proxies) < ROUNDING


def test_the_gradients_are_those_of_finite_differences() -> None:
    problem = random_problem(num_classes=5, proxies_per_class=2, num_images=3, topk=5, regularization_weight=0.3)
    loss = build_loss(problem)
    embeddings = problem.embeddings.clone().requires_grad_()

    def total(embeddings: torch.Tensor, proxies: torch.Tensor) -> torch.Tensor:
        terms = torch.func.functional_call(loss, {"proxies": proxies}, (embeddings, problem.labels))
        return terms.total

    torch.autograd.gradcheck(total, (embeddings, loss.proxies), eps=1e-6, atol=1e-7)


def test_gradients_add_up_over_calls_as_accumulation_needs() -> None:
    problem = random_problem(num_classes=5, num_images=6, topk=3)
    loss = build_loss(problem)
    for rows in (slice(0, 3), slice(3, 6)):
        (loss(problem.embeddings[rows], problem.labels[rows]).total / 2).backward()
    expected = reference_of(problem).grad_proxies
    assert loss.proxies.grad is not None
    assert relative_difference(loss.proxies.grad, expected) < ROUNDING


def test_extreme_scales_neither_overflow_nor_vanish() -> None:
    problem = random_problem(num_classes=5, topk=5)
    loss = build_loss(problem._replace(scale=1e4))
    terms = loss(problem.embeddings, problem.labels)
    similarity = problem.embeddings @ F.normalize(problem.proxies[:, 0], dim=1).T
    expected = F.cross_entropy(1e4 * similarity, problem.labels)
    assert relative_difference(terms.total.detach(), expected) < 1e-10


# Settings


@pytest.mark.parametrize(
    ("num_classes", "proxies_per_class", "ratio", "expected"),
    [
        (100, 12, 0.05, 60),  # CUB, Cars and SOP as published
        (98, 12, 0.05, 59),
        (11_318, 1, 0.05, 566),
        (48, 10, 0.05, 25),  # 0.05 * (48 * 10) is 24 and 0.05 * 48 * 10 a little more
        (45, 12, 0.05, 27),  # 0.05 * 12 * 45 is a little more than 27
    ],
)
def test_k_comes_from_the_global_numbers_rounded_up_in_the_published_order(
    num_classes: int, proxies_per_class: int, ratio: float, expected: int
) -> None:
    loss = ProxyGMLLoss(num_classes, 2, proxies_per_class=proxies_per_class, ratio=ratio)
    assert loss.topk == expected


@pytest.mark.parametrize(
    ("topk", "remedy"), [(1, "raise topk to at least 4"), (3, "raise"), (19, "lower topk to at m")]
)
def test_k_of_at_most_n_or_beyond_all_proxies_is_refused_with_the_numbers_and_the_right_way(
    topk: int, remedy: str
) -> None:
    with pytest.raises(ValueError, match=rf"\b3 .*\b18 .*k = {topk}.*{remedy}"):
        ProxyGMLLoss(6, 4, proxies_per_class=3, topk=topk)


@pytest.mark.parametrize("head", [Head(ratio=0.5), Head("all"), Head("sampled", share=0.5)])
def test_one_class_has_nothing_to_be_told_from(head: Head) -> None:
    with pytest.raises(ValueError, match=r"two classes.*1"):
        ProxyLoss(1, 4, head)


def test_a_share_that_draws_hardly_a_class_is_warned_about() -> None:
    with pytest.warns(UserWarning, match=r"0\.01 of 20 .*0\.1"):
        ProxyLoss(20, 4, Head("sampled", share=0.01))


def test_a_ratio_that_keeps_no_negative_is_refused() -> None:
    with pytest.raises(ValueError, match="k = 12"):
        ProxyGMLLoss(98, 8, proxies_per_class=12, ratio=0.01)


@pytest.mark.parametrize("topk", [4, 6])
def test_k_of_at_most_twice_n_is_warned_about(topk: int) -> None:
    with pytest.warns(UserWarning, match=f"k = {topk}"):
        ProxyGMLLoss(6, 4, proxies_per_class=3, topk=topk)


def test_k_above_twice_n_is_silent() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ProxyGMLLoss(6, 4, proxies_per_class=3, topk=7)


@pytest.mark.parametrize(
    ("setting", "named"),
    [
        ({"ratio": 0.0}, "ratio"),
        ({"ratio": 1.5}, "ratio"),
        ({"ratio": 0.5, "topk": 4}, "ratio=0.5 and topk=4"),
        ({"proxies_per_class": 0}, "proxies_per_class"),
        ({"regularization_weight": -0.1}, "regularization_weight"),
        ({"regularization_anchors": 0}, "regularization_anchors.* and 0"),
        ({"scale": 0.0}, "scale"),
        ({"scale": float("nan")}, "scale"),
        ({"gradient_reduction": "average"}, "gradient_reduction.*'average'"),
        ({"selection": "all"}, "selection.*'all'"),
        ({"memory_budget": 0}, "memory_budget.*0"),
        ({"matmul_dtype": torch.float16}, "matmul_dtype.*float16"),
    ],
)
def test_a_setting_out_of_range_is_refused_by_name(setting: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        ProxyGMLLoss(60, 4, **setting)


@pytest.mark.parametrize(("num_classes", "embedding_dim"), [(0, 4), (-1, 4), (60, 0)])
def test_an_empty_bank_is_refused(num_classes: int, embedding_dim: int) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        ProxyGMLLoss(num_classes, embedding_dim)


# Initial proxies


def test_initial_proxies_fill_the_published_interval_and_nothing_else() -> None:
    proxies = ProxyGMLLoss(2500, 8, proxies_per_class=4, seed=3).proxies.detach()
    bound = 1 / math.sqrt(2500 * 4)
    assert proxies.shape == (2500, 4, 8)
    assert proxies.abs().max() <= bound
    assert proxies.abs().max() > 0.999 * bound
    assert abs(float(proxies.mean())) < 0.01 * bound
    assert float(proxies.std()) == pytest.approx(bound / math.sqrt(3), rel=0.01)


def test_initial_proxies_depend_on_the_seed_alone_and_leave_the_global_generator_alone() -> None:
    torch.manual_seed(0)
    state = torch.get_rng_state()
    first, again, other = (ProxyGMLLoss(60, 4, seed=seed).proxies for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_no_two_classes_start_with_the_same_proxies() -> None:
    proxies = ProxyGMLLoss(5000, 8, seed=0).proxies.detach().flatten(1)
    assert len(proxies.unique(dim=0)) == 5000


# Embeddings of any length and precision


def raw_problem() -> tuple[Problem, torch.Tensor]:
    problem = random_problem(num_classes=7, proxies_per_class=2, topk=6, regularization_weight=0.3, scale=3.0)
    return problem, problem.embeddings * torch.linspace(0.1, 60, 7, dtype=torch.float64)[:, None]


def test_embeddings_of_any_length_get_the_reference_s_loss_of_their_directions_and_its_gradient() -> None:
    problem, raw = raw_problem()
    results = []
    for compute in (
        build_loss(problem, normalize=True),
        lambda rows, labels: proxygml_loss(
            rows / rows.norm(dim=1, keepdim=True), labels, problem.proxies, topk=6, regularization_weight=0.3, scale=3.0
        ),
    ):
        rows = raw.clone().requires_grad_()
        total = compute(rows, problem.labels).total
        total.backward()
        assert rows.grad is not None
        results.append((total.detach(), rows.grad))
    assert relative_difference(results[0][0], results[1][0]) < ROUNDING
    assert relative_difference(results[0][1], results[1][1]) < ROUNDING


def test_embeddings_are_normalised_unless_the_caller_says_that_they_are() -> None:
    torch.manual_seed(0)
    raw, labels = torch.randn(5, 4), torch.arange(5)
    expected = ProxyGMLLoss(6, 4, topk=3, normalize=False)(F.normalize(raw), labels).total
    torch.testing.assert_close(ProxyGMLLoss(6, 4, topk=3)(50 * raw, labels).total, expected)


def test_an_embedding_of_length_zero_gets_no_gradient_and_the_others_keep_theirs() -> None:
    rows = torch.eye(4)[:3].clone()
    rows[1] = 0
    rows.requires_grad_()
    loss = ProxyGMLLoss(6, 4, topk=3)
    loss(rows, torch.tensor([0, 5, 2])).total.backward()
    assert rows.grad is not None
    assert rows.grad.isfinite().all()
    assert rows.grad.any(dim=1).tolist() == [True, False, True]


def test_an_embedding_whose_length_overflows_is_refused() -> None:
    loss, embeddings, labels = good_batch()
    with pytest.raises(ValueError, match="embeddings are too long"):
        loss(1e30 * embeddings, labels)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("normalize", [True, False])
def test_half_precision_is_converted_to_that_of_the_proxies(dtype: torch.dtype, normalize: bool) -> None:
    _, embeddings, labels = good_batch()
    rows = embeddings.to(dtype)
    grads = []
    for batch in (rows.clone(), rows.float()):
        loss = ProxyGMLLoss(6, 4, topk=3, normalize=normalize)
        total = loss(batch.requires_grad_(), labels).total
        total.backward()
        assert total.dtype == torch.float32
        assert batch.grad is not None
        grads.append((total.detach(), batch.grad, loss.proxies.grad))
    (half, half_grad, half_proxies), (single, single_grad, single_proxies) = grads
    assert torch.equal(half, single)
    assert torch.equal(half_proxies, single_proxies)
    assert half_grad.dtype == dtype
    assert torch.equal(half_grad, single_grad.to(dtype))


def test_a_network_under_bfloat16_autocast_trains() -> None:
    loss, images, labels = good_batch()
    network = torch.nn.Linear(4, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        embeddings = network(images)
        total = loss(embeddings, labels).total
    assert embeddings.dtype == torch.bfloat16
    total.backward()
    assert network.weight.grad is not None
    assert network.weight.grad.any()


def test_embeddings_said_to_be_unit_rows_that_are_not_are_warned_about_once() -> None:
    loss, embeddings, labels = ProxyGMLLoss(6, 4, topk=3, normalize=False), *good_batch()[1:]
    embeddings[1] *= 4
    with pytest.warns(UserWarning, match=r"normalize=False, got 1 of 3 rows .*up to 4\)") as caught:
        loss(embeddings, labels)
    assert Path(caught[0].filename) == Path(torch.nn.modules.module.__file__)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loss(embeddings, labels)


def test_unit_rows_rounded_to_bfloat16_are_unit_rows() -> None:
    rows = F.normalize(torch.randn(200, 64, generator=torch.Generator().manual_seed(0))).bfloat16()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ProxyGMLLoss(6, 64, topk=3, normalize=False)(rows, torch.zeros(200, dtype=torch.int64))


def test_the_world_needs_a_process_group_and_no_other_group_goes_by_name() -> None:
    with pytest.raises(ValueError, match="init_process_group"):
        ProxyGMLLoss(6, 4, topk=3, group="world")
    with pytest.raises(ValueError, match="'all'"):
        ProxyGMLLoss(6, 4, topk=3, group="all")  # type: ignore[arg-type]


# Bad batches


def good_batch() -> tuple[ProxyGMLLoss, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    return (
        ProxyGMLLoss(6, 4, topk=3),
        F.normalize(torch.randn(3, 4), dim=1),
        torch.tensor([0, 5, 2]),
    )


@pytest.mark.parametrize(("label", "row"), [(6, 0), (-1, 2), (2**40, 1)])
def test_a_label_out_of_range_is_refused_with_its_row(label: int, row: int) -> None:
    loss, embeddings, labels = good_batch()
    labels[row] = label
    with pytest.raises(ValueError, match=f"0 to 5, got {label} in row {row}"):
        loss(embeddings, labels)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_an_embedding_that_is_not_finite_is_refused_with_its_row(value: float) -> None:
    loss, embeddings, labels = good_batch()
    embeddings[1, 2] = value
    with pytest.raises(ValueError, match=r"row 1 .*1 of 3 rows"):
        loss(embeddings, labels)


def test_wrong_shapes_and_types_are_refused_with_what_was_expected() -> None:
    loss, embeddings, labels = good_batch()
    wrong: list[tuple[torch.Tensor, torch.Tensor, str]] = [
        (embeddings[:, :3], labels, r"\[b, 4\].*\[3, 3\]"),
        (embeddings[0], labels, r"\[b, 4\].*\[4\]"),
        (embeddings, labels[:2], r"\[3, 4\] and \[2\]"),
        (embeddings, labels[:, None], r"\[3, 1\]"),
        (embeddings.double(), labels, r"torch.float32.*torch.float64"),
        (embeddings, labels.int(), r"torch.int64.*torch.int32"),
        (embeddings, labels.float(), r"torch.int64.*torch.float32"),
        (embeddings[:0], labels[:0], "at least one image"),
    ]
    for bad_embeddings, bad_labels, expected in wrong:
        with pytest.raises(ValueError, match=expected):
            loss(bad_embeddings, bad_labels)


# A sparse gradient


@pytest.mark.parametrize("proxies_per_class", [1, 3])
def test_a_sparse_gradient_is_the_dense_one_where_a_proxy_was_kept(proxies_per_class: int) -> None:
    problem = random_problem(num_classes=9, proxies_per_class=proxies_per_class, topk=4, num_images=3)
    dense, sparse = (outcomes(problem, world_size=None, sparse=sparse)[0].grad_proxies for sparse in (False, True))
    assert sparse.layout == torch.sparse_coo
    assert (sparse.sparse_dim(), sparse.dense_dim()) == (1, 2)
    assert sparse.shape == dense.shape
    assert torch.equal(sparse.to_dense(), dense)
    touched = dense.flatten(1).any(dim=1).nonzero().flatten()
    assert torch.equal(sparse.coalesce().indices()[0], touched)
    assert len(touched) < 9


def test_sparse_gradients_add_up_over_calls_and_step_torch_s_sparse_adam() -> None:
    problem = random_problem(num_classes=9, proxies_per_class=2, topk=5, num_images=3)
    losses = [build_loss(problem, sparse=sparse) for sparse in (False, True)]
    for loss in losses:
        for rows in (slice(0, 2), slice(2, 3)):
            loss(problem.embeddings[rows], problem.labels[rows]).total.backward()
    dense, sparse = (loss.proxies for loss in losses)
    torch.testing.assert_close(sparse.grad.to_dense(), dense.grad, rtol=1e-14, atol=1e-16)
    torch.optim.SparseAdam([sparse], lr=0.1, eps=1e-30).step()  # the two put eps in another place
    torch.optim.Adam([dense], lr=0.1, eps=1e-30).step()
    torch.testing.assert_close(sparse.detach(), dense.detach(), rtol=1e-12, atol=1e-14)
    moved = (sparse - problem.proxies).flatten(1).any(dim=1)
    assert 0 < moved.sum() < 9


def test_a_sparse_gradient_with_a_regulariser_is_refused() -> None:
    with pytest.raises(ValueError, match=r"regularization_weight 0 .*sparse=True.*\b0\.3"):
        ProxyGMLLoss(6, 4, topk=3, sparse=True, regularization_weight=0.3)


def test_a_sparse_gradient_of_a_gathered_bank_is_refused() -> None:
    with pytest.raises(ValueError, match=r"selection .*sparse=True.*\"gather\""):
        ProxyGMLLoss(6, 4, topk=3, sparse=True, selection="gather")


# The regulariser from a draw


def test_each_call_draws_other_anchors_and_the_same_draw_gives_the_same_bits() -> None:
    problem = random_problem(num_classes=9, proxies_per_class=2, topk=5, regularization_weight=0.3)
    loss = build_loss(problem, regularization_anchors=4, seed=3)
    first, second = (loss(problem.embeddings, problem.labels).regularization for _ in range(2))
    assert loss.draw == 2
    assert not torch.equal(first, second)
    loss.draw = 1
    assert torch.equal(loss(problem.embeddings, problem.labels).regularization, second)


def test_the_regulariser_is_drawn_where_the_class_sums_do_not_fit_the_budget() -> None:
    problem = random_problem(num_classes=50, proxies_per_class=2, topk=5, regularization_weight=0.3)
    full = build_loss(problem)(problem.embeddings, problem.labels).regularization
    class_sums = 2 * 50 * problem.proxies.shape[2] * 4
    fits, drawn = (
        build_loss(problem, memory_budget=budget)(problem.embeddings, problem.labels).regularization
        for budget in (3 * class_sums, 3 * class_sums - 1)
    )
    assert relative_difference(fits, full) < 1e-12
    assert relative_difference(drawn, full) > 1e-6


# What it must not do


class LargestTensor(TorchDispatchMode):
    """Records the most elements that any operator returned."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, tuple | list) else [result]:
            if isinstance(value, torch.Tensor):
                self.numel = max(self.numel, value.numel())
        return result


def test_the_similarity_matrix_is_never_built() -> None:
    num_classes, num_images, dim = 60_000, 64, 2
    loss = ProxyGMLLoss(num_classes, dim, topk=30, sparse=True, memory_budget=1 << 23)
    embeddings = F.normalize(torch.randn(num_images, dim), dim=1).requires_grad_()
    with LargestTensor() as largest:
        loss(embeddings, torch.arange(num_images)).total.backward()
    assert largest.numel < num_images * num_classes / 8
    assert loss.proxies.grad._nnz() < num_images * 30


@pytest.mark.parametrize("selection", SELECTIONS)
def test_nothing_as_large_as_proxies_times_classes_is_ever_built(selection: str) -> None:
    num_classes, proxies_per_class = (
        3000,
        2,
    )  # 6000 * 3000 = 18 million; a chunk of the regulariser is 4 million
    loss = ProxyGMLLoss(
        num_classes,
        4,
        proxies_per_class=proxies_per_class,
        regularization_weight=0.3,
        selection=selection,
    )
    embeddings = F.normalize(torch.randn(3, 4), dim=1).requires_grad_()
    with LargestTensor() as largest:
        loss(embeddings, torch.tensor([0, 7, 2999])).total.backward()
    assert largest.numel < num_classes * proxies_per_class * num_classes / 4


def test_under_autocast_the_loss_is_computed_in_the_precision_of_its_proxies() -> None:
    loss, embeddings, labels = good_batch()
    expected = loss(embeddings, labels).total
    with torch.autocast("cpu", dtype=torch.bfloat16):
        total = loss(embeddings, labels).total
    assert total.dtype == torch.float32
    assert torch.equal(total, expected)


def test_the_same_call_gives_the_same_bits() -> None:
    problem = random_problem(num_classes=7, proxies_per_class=3, topk=9, regularization_weight=0.3)
    first, second = (outcomes(problem, world_size=None)[0] for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_state_is_the_proxies_alone_and_loads_back() -> None:
    loss, embeddings, labels = good_batch()
    other = ProxyGMLLoss(6, 4, topk=3, seed=9)
    assert list(loss.state_dict()) == ["proxies"]
    other.load_state_dict(loss.state_dict())
    assert torch.equal(other(embeddings, labels).total, loss(embeddings, labels).total)


def test_printing_the_loss_shows_its_settings() -> None:
    text = repr(ProxyGMLLoss(60, 4, proxies_per_class=2, topk=9, scale=3.0, regularization_weight=0.5))
    assert all(
        part in text for part in ("ProxyGML: ", "9 most similar of 120 ", "scale 3", "regularization_weight=0.5")
    )


@pytest.mark.parametrize("num_broken", [1, 3, 19])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_broken_proxy_is_never_hidden_by_the_selection(num_broken: int, value: float) -> None:
    loss = ProxyGMLLoss(20, 8, topk=4)
    embeddings = F.normalize(torch.randn(5, 8, generator=torch.Generator().manual_seed(0)))
    with torch.no_grad():
        loss.proxies[1 : 1 + num_broken] = value
    with pytest.raises(ValueError, match="proxy"):
        loss(embeddings, torch.zeros(5, dtype=torch.int64))  # class 0 itself is sound


@pytest.mark.parametrize("num_sound", [0, 40])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_large_bank_that_is_mostly_broken_is_refused_too(num_sound: int, value: float) -> None:
    loss = ProxyGMLLoss(5000, 8, topk=100)  # large enough to be searched by a guessed bound
    with torch.no_grad():
        loss.proxies[num_sound:] = value
    with pytest.raises(ValueError, match="proxy"):
        loss(F.normalize(torch.randn(3, 8)), torch.zeros(3, dtype=torch.int64))
