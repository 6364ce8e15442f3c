"""The choices of a head on one process: against the definition, known identities and pytorch-metric-learning."""

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from pytorch_metric_learning import losses
from torch import Tensor

from dist_proxygml import ProxyGMLLoss
from dist_proxygml.head.choices import Head
from dist_proxygml.head.class_scores import scores, scores_of_groups
from dist_proxygml.head.loss import ProxyLoss
from dist_proxygml.head.margins import LengthStatistics, Margin
from dist_proxygml.head.partition import ClassPartition
from dist_proxygml.head.reference import proxy_loss
from dist_proxygml.head.sampling import draw_classes

NUM_CLASSES, DIM, NUM_ROWS = 11, 6, 9


def cosface(m: float) -> Callable[[Tensor], Tensor]:
    return lambda score: score - m


def arcface(m: float) -> Callable[[Tensor], Tensor]:
    def psi(score: Tensor) -> Tensor:
        angle = torch.acos(score.clamp(-1 + 1e-12, 1 - 1e-12))
        return torch.where(angle <= math.pi - m, torch.cos(angle + m), score - m * math.sin(m))

    return psi


MARGINS: dict[str, tuple[Margin | None, Callable[[Tensor], Tensor]]] = {
    "none": (None, lambda score: score),
    "cosface": (Margin("cosface", 0.35), cosface(0.35)),
    "arcface": (Margin("arcface", 0.5), arcface(0.5)),
}
COMPETING: dict[str, dict[str, Any]] = {
    "topk": {"negatives": "topk", "topk": 7},
    "all": {"negatives": "all"},
    "sampled": {"negatives": "sampled", "share": 0.4},
}


def batch(seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    embeddings_bD = F.normalize(torch.randn(NUM_ROWS, DIM, generator=generator, dtype=torch.float64))
    labels_b = torch.randint(NUM_CLASSES, (NUM_ROWS,), generator=generator)
    labels_b[:2] = labels_b[2]
    return embeddings_bD.requires_grad_(), labels_b


def build(head: Head, per_class: int, **settings: Any) -> ProxyLoss:
    return ProxyLoss(NUM_CLASSES, DIM, head, proxies_per_class=per_class, seed=3, **settings).double()


def gradients(total: Tensor, *inputs: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(total, inputs))


@pytest.mark.parametrize("learn_scale", [False, True])
@pytest.mark.parametrize("per_class", [1, 3])
@pytest.mark.parametrize("budget", [1 << 28, 1])  # 1: a chunk of 16 proxies at a time
def test_every_head_is_its_definition(per_class: int, budget: int, learn_scale: bool) -> None:
    for competing, how, (name, (margin, psi)) in itertools.product(
        COMPETING, ("sum", "softmax", "max"), MARGINS.items()
    ):
        if name == "arcface" and how == "sum" and per_class > 1:
            continue
        head = Head(**COMPETING[competing], class_score=how, margin=margin, scale=7.0, learn_scale=learn_scale)
        loss = build(head, per_class, memory_budget=budget)
        embeddings_bD, labels_b = batch()
        drawn_C = torch.from_numpy(draw_classes(loss.partition, 0.4, seed=3, draw=0)) if head.share else None
        log_scale = torch.full((1, 1, 1), math.log(7.0), dtype=torch.float64)
        log_scale = (log_scale if loss.log_scale is None else loss.log_scale).detach().clone().requires_grad_()
        proxies_CND = loss.proxies.detach().clone().requires_grad_()
        wanted = proxy_loss(
            embeddings_bD,
            labels_b,
            proxies_CND,
            topk=head.topk,
            drawn_C=drawn_C,
            class_score=how,
            gamma=head.gamma,
            margin=psi,
            scale=log_scale.exp().view(()),
        )
        got = loss(embeddings_bD, labels_b).total
        case = (competing, how, name)
        torch.testing.assert_close(got, wanted, rtol=1e-6 if name == "arcface" else 1e-12, atol=0, msg=str(case))
        inputs, own = [embeddings_bD, proxies_CND], [embeddings_bD, loss.proxies]
        if loss.log_scale is not None:
            inputs, own = [*inputs, log_scale], [*own, loss.log_scale]
        # the definition's embeddings are not normalised inside, so their gradient is projected here
        expected = gradients(wanted, *inputs)
        expected[0] = expected[0] - (expected[0] * embeddings_bD).sum(dim=1, keepdim=True) * embeddings_bD
        for one, other in zip(gradients(got, *own), expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-9, msg=str(case))


def test_matryoshka_is_the_mean_over_prefixes() -> None:
    embeddings_bD, labels_b = batch()
    for negatives, selection in [("topk", "auto"), ("topk", "gather"), ("all", "auto"), ("sampled", "auto")]:
        head = Head(**COMPETING[negatives], margin=Margin("cosface", 0.2), scale=7.0)
        loss = build(head, 2, matryoshka_dims=[2, 3], selection=selection)
        proxies_CND = loss.proxies.detach().clone().requires_grad_()
        drawn_C = torch.from_numpy(draw_classes(loss.partition, 0.4, seed=3, draw=0)) if head.share else None
        wanted = torch.stack(
            [
                proxy_loss(
                    F.normalize(embeddings_bD[:, :dim], dim=1),
                    labels_b,
                    proxies_CND[..., :dim],
                    topk=head.topk,
                    drawn_C=drawn_C,
                    margin=cosface(0.2),
                    scale=7.0,
                )
                for dim in (2, 3, DIM)
            ]
        ).mean()
        got = loss(embeddings_bD, labels_b).total
        torch.testing.assert_close(got, wanted, rtol=1e-12, atol=0)
        expected = gradients(wanted, embeddings_bD, proxies_CND)
        for one, other in zip(gradients(got, embeddings_bD, loss.proxies), expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-11)


def test_a_sparse_gradient_of_prefixes_is_the_dense_one() -> None:
    embeddings_bD, labels_b = batch()
    dense, sparse = (
        build(Head(topk=5, scale=4.0), 2, matryoshka_dims=[3], selection="candidates", sparse=sparse)
        for sparse in (False, True)
    )
    for loss in (dense, sparse):
        loss(embeddings_bD, labels_b).total.backward()
    assert sparse.proxies.grad is not None
    assert sparse.proxies.grad.is_sparse
    torch.testing.assert_close(sparse.proxies.grad.to_dense(), dense.proxies.grad, rtol=1e-12, atol=1e-15)


def test_top_k_of_all_without_a_margin_is_all_and_so_is_a_share_of_1() -> None:
    embeddings_bD, labels_b = batch()
    heads = (Head("all", scale=5.0), Head(topk=2 * NUM_CLASSES, scale=5.0), Head("sampled", share=1.0, scale=5.0))
    results = [build(head, 2)(embeddings_bD, labels_b) for head in heads]
    for other in results[1:]:
        torch.testing.assert_close(other.total, results[0].total, rtol=1e-12, atol=0)
        assert float(other.kept_classes) == NUM_CLASSES


def test_all_with_margin_0_is_normalised_softmax() -> None:
    embeddings_bD, labels_b = batch()
    for margin in (None, Margin("cosface", 0.0), Margin("arcface", 0.0)):
        loss = build(Head("all", margin=margin, scale=16.0), 1)
        logits_bC = 16 * embeddings_bD @ F.normalize(loss.proxies.detach()[:, 0], dim=1).T
        wanted = F.cross_entropy(logits_bC, labels_b)
        torch.testing.assert_close(loss(embeddings_bD, labels_b).total, wanted, rtol=1e-10, atol=0)


def test_proxygml_is_the_default_head() -> None:
    embeddings_bD, labels_b = batch()
    one = ProxyGMLLoss(NUM_CLASSES, DIM, proxies_per_class=3, topk=9, scale=2.0, seed=3).double()
    other = build(Head(topk=9, scale=2.0), 3)
    assert one(embeddings_bD, labels_b).total == other(embeddings_bD, labels_b).total


PML: dict[str, tuple[Head, int, Callable[[], Any]]] = {
    "CosFaceLoss": (
        Head("all", margin=Margin("cosface", 0.35), scale=64.0),
        1,
        lambda: losses.CosFaceLoss(NUM_CLASSES, DIM, margin=0.35, scale=64),
    ),
    "ArcFaceLoss": (
        Head("all", margin=Margin("arcface", math.radians(28.6)), scale=64.0),
        1,
        lambda: losses.ArcFaceLoss(NUM_CLASSES, DIM, margin=28.6, scale=64),
    ),
    "SoftTripleLoss": (
        Head("all", class_score="softmax", gamma=0.1, margin=Margin("cosface", 0.01), scale=20.0),
        4,
        lambda: losses.SoftTripleLoss(NUM_CLASSES, DIM, centers_per_class=4, la=20, gamma=0.1, margin=0.01),
    ),
    "SubCenterArcFaceLoss": (
        Head("all", class_score="max", margin=Margin("arcface", math.radians(28.6)), scale=64.0),
        3,
        lambda: losses.SubCenterArcFaceLoss(num_classes=NUM_CLASSES, embedding_size=DIM, margin=28.6, scale=64),
    ),
    "NormalizedSoftmaxLoss": (
        Head("all", scale=20.0),
        1,
        lambda: losses.NormalizedSoftmaxLoss(NUM_CLASSES, DIM, temperature=0.05),
    ),
}


@pytest.mark.parametrize("name", PML)
def test_the_loss_is_that_of_pytorch_metric_learning(name: str) -> None:
    head, per_class, theirs = PML[name]
    embeddings_bD, labels_b = batch(seed=1)
    other, loss = theirs().double(), build(head, per_class)
    weights_DP = other.fc if name == "SoftTripleLoss" else other.W
    with torch.no_grad():
        loss.proxies.copy_(weights_DP.T.reshape(loss.proxies.shape))
    wanted, got = other(embeddings_bD, labels_b), loss(embeddings_bD, labels_b).total
    torch.testing.assert_close(got, wanted, rtol=1e-6, atol=0)
    theirs_bD, theirs_DP = gradients(wanted, embeddings_bD, weights_DP)
    ours_bD, ours_CND = gradients(got, embeddings_bD, loss.proxies)
    torch.testing.assert_close(ours_bD, theirs_bD, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(ours_CND.flatten(0, 1).T, theirs_DP, rtol=1e-6, atol=1e-8)


def test_adaface_by_hand() -> None:
    """Lengths 1 and 5 with mean 3 and deviation 2: q is -1 and 1 at h = 1, so the margins are +m and -m angles."""
    statistics = LengthStatistics().eval()
    statistics.mean.fill_(3.0)
    statistics.deviation.fill_(2.0 - 1e-3)
    quality_2 = statistics(torch.tensor([1.0, 5.0]), 1.0)
    assert quality_2.tolist() == pytest.approx([-1, 1])
    score_2 = torch.tensor([math.cos(1.0), math.cos(1.0)], dtype=torch.float64, requires_grad=True)
    value_2, slope_2 = Margin("adaface", 0.4).apply(score_2.detach(), quality_2.double())
    assert value_2.tolist() == pytest.approx([math.cos(1.4) + 0.4 - 0.4, math.cos(0.6) - 0.4 - 0.4])
    wanted = torch.cos(torch.acos(score_2) - 0.4 * quality_2.double()).sum()
    assert slope_2.tolist() == pytest.approx(gradients(wanted, score_2)[0].tolist())


def test_adaface_counts_lengths_in_training_only() -> None:
    loss = build(Head("all", margin=Margin("adaface", 0.4), scale=10.0), 1)
    embeddings_bD, labels_b = batch()
    before = loss.state_dict()
    assert set(before) == {"proxies", "length_statistics.mean", "length_statistics.deviation"}
    long_bD = 30 * embeddings_bD
    trained = loss(long_bD, labels_b).total
    assert float(loss.length_statistics.mean) == pytest.approx(0.99 * 20 + 0.01 * 30)  # type: ignore[union-attr]
    loss.eval()
    loss(long_bD, labels_b)
    assert float(loss.length_statistics.mean) == pytest.approx(20.1)  # type: ignore[union-attr]
    assert trained != loss(embeddings_bD, labels_b).total  # shorter ones have another margin


def test_arcface_falls_on_beyond_pi() -> None:
    cosines = torch.linspace(-1, 1, 2001, dtype=torch.float64)
    value, slope = Margin("arcface", 0.5).apply(cosines)
    assert (value.diff() > 0).all()
    assert (slope[1:-1] > 0).all()


def test_of_equally_similar_proxies_the_first_makes_the_score_of_a_class() -> None:
    similarity_n = torch.tensor([0.25, 0.5, 0.5, 0.5, 0.5, -1.0])
    score_g, slope_n = scores_of_groups(similarity_n, torch.tensor([0, 0, 0, 1, 1, 2]), 3, how="max", gamma=0.1)
    assert score_g.tolist() == [0.5, 0.5, -1.0]
    assert slope_n is not None
    assert slope_n.tolist() == [0, 1, 0, 1, 0, 1]
    score_2, slope_23 = scores(torch.tensor([[0.25, 0.5, 0.5], [0.5, 0.5, -1.0]]), dim=1, how="max", gamma=0.1)
    assert score_2.tolist() == [0.5, 0.5]
    assert slope_23 is not None
    assert slope_23.tolist() == [[0, 1, 0], [1, 0, 0]]


def test_drawn_classes_are_the_same_for_any_number_of_ranks_and_as_many_as_wanted() -> None:
    whole = draw_classes(ClassPartition(10_007), 0.1, seed=5, draw=7)
    for world_size in (2, 3, 7):
        parts = [
            draw_classes(ClassPartition(10_007, world_size, rank), 0.1, seed=5, draw=7) for rank in range(world_size)
        ]
        assert [drawn for part in parts for drawn in part] == whole.tolist()
    assert abs(whole.sum() - 1000.7) < 4 * math.sqrt(1000.7 * 0.9)
    assert (whole != draw_classes(ClassPartition(10_007), 0.1, seed=5, draw=8)).any()
    assert (whole != draw_classes(ClassPartition(10_007), 0.1, seed=6, draw=7)).any()


def test_a_sparse_gradient_of_sampled_classes_is_the_dense_one() -> None:
    head = Head("sampled", share=0.3, margin=Margin("cosface", 0.2), scale=4.0)
    embeddings_bD, labels_b = batch()
    dense, sparse = build(head, 2), build(head, 2, sparse=True)
    for loss in (dense, sparse):
        loss(embeddings_bD, labels_b).total.backward()
    assert sparse.proxies.grad is not None
    assert sparse.proxies.grad.is_sparse
    assert len(sparse.proxies.grad.coalesce().indices()[0]) < NUM_CLASSES
    assert torch.equal(sparse.proxies.grad.to_dense(), dense.proxies.grad)


@pytest.mark.parametrize(
    ("key", "make"),
    [
        ("negatives", lambda: Head("some")),  # type: ignore[arg-type]
        ("class_score", lambda: Head(class_score="mean")),  # type: ignore[arg-type]
        ("share", lambda: Head("sampled")),
        ("share", lambda: Head("all", share=0.5)),
        ("share", lambda: Head("sampled", share=1.5)),
        ("topk", lambda: Head("all", topk=5)),
        ("scale", lambda: Head(scale=0.0)),
        ("margin", lambda: Margin("cosface", -0.1)),
        ("class_score", lambda: build(Head("all", margin=Margin("arcface", 0.5)), 2)),
        ("normalize", lambda: build(Head("all", margin=Margin("adaface", 0.5)), 1, normalize=False)),
        ("negatives", lambda: build(Head("all"), 1, sparse=True)),
        ("selection", lambda: build(Head("all"), 1, selection="gather")),
        ("matryoshka_dims", lambda: build(Head("all"), 1, matryoshka_dims=[3, 2])),
        ("matryoshka_dims", lambda: build(Head("all"), 1, matryoshka_dims=[2, DIM])),
    ],
)
def test_choices_that_do_not_go_together_are_refused(key: str, make: Callable[[], object]) -> None:
    with pytest.raises(ValueError, match=key):
        make()


@pytest.mark.parametrize(
    ("head", "per_class", "words"),
    [
        (Head(topk=5), 1, "ProxyGML: the 5 most similar of 11 proxies, scale 1"),
        (Head("all", margin=Margin("cosface", 0.35), scale=64.0), 1, "CosFace: all 11 proxies, margin 0.35"),
        (Head("sampled", share=0.1, margin=Margin("arcface", 0.5)), 1, "ArcFace on sampled classes: 0.1 of 11 classes"),
        (Head("all", class_score="softmax"), 3, "SoftTriple: all 33 proxies, softmax over 3 proxies per class"),
        (
            Head("all", learn_scale=True, scale=16.0),
            1,
            "normalised softmax: all 11 proxies, scale 16 at first, learned",
        ),
    ],
)
def test_printing_a_loss_names_its_head(head: Head, per_class: int, words: str) -> None:
    assert words in repr(build(head, per_class))


def test_printing_a_loss_names_its_prefixes() -> None:
    assert "scale 1, also by the first 2, 4 dimensions" in repr(build(Head("all"), 1, matryoshka_dims=[2, 4]))
