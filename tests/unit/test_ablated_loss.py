"""The loss whose parts can be left out: with all of them it is the product's; each part left out is what it says."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.ablated_loss import AblatedProxyGML
from dist_proxygml.head.choices import Head
from dist_proxygml.head.loss import ProxyLoss
from dist_proxygml.head.pml import PmlLoss
from dist_proxygml.head.reference import proxygml_loss

NUM_CLASSES, PER_CLASS, DIM, RATIO = 11, 3, 5, 0.2  # k = 7


def batch(size: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    embeddings_BD = F.normalize(torch.randn(size, DIM, generator=generator, dtype=torch.float64))
    return embeddings_BD.requires_grad_(), torch.randint(NUM_CLASSES, (size,), generator=generator)


@pytest.mark.parametrize(("weight", "scale"), [(0.3, 4.0), (0.0, 1.0)])
def test_with_all_parts_it_is_the_head_of_the_product_by_the_name_it_registers(weight: float, scale: float) -> None:
    options = {"proxies_per_class": PER_CLASS, "ratio": RATIO, "regularization_weight": weight, "scale": scale}
    loss = PmlLoss("AblatedProxyGML", NUM_CLASSES, DIM, options={**options, "seed": 7}, seed=7)
    head = Head(ratio=RATIO, scale=scale)
    product = ProxyLoss(
        NUM_CLASSES, DIM, head, proxies_per_class=PER_CLASS, regularization_weight=weight, normalize=False, seed=7
    )
    (proxies_CND,) = loss.parameters()
    torch.testing.assert_close(proxies_CND, product.proxies, rtol=0, atol=0)
    loss = PmlLoss("AblatedProxyGML", NUM_CLASSES, DIM, options=options, dtype=torch.float64)
    (proxies_CND,) = loss.parameters()
    embeddings_BD, labels_B = batch(16)
    topk = math.ceil(RATIO * NUM_CLASSES * PER_CLASS)
    wanted = proxygml_loss(
        embeddings_BD, labels_B, proxies_CND, topk=topk, regularization_weight=weight, scale=scale
    ).total
    found = loss(embeddings_BD, labels_B).total
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    gradients, wanted_gradients = (
        torch.autograd.grad(value, [embeddings_BD, proxies_CND]) for value in (found, wanted)
    )
    assert all(gradient.abs().max() > 0.01 for gradient in gradients)
    for gradient, of_definition in zip(gradients, wanted_gradients, strict=True):
        torch.testing.assert_close(gradient, of_definition, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("forced", [False, True])
def test_a_part_that_is_left_out_is_that_one(forced: bool, masked: bool) -> None:
    loss = AblatedProxyGML(
        NUM_CLASSES,
        DIM,
        proxies_per_class=PER_CLASS,
        ratio=RATIO,
        forced_positives=forced,
        masked_softmax=masked,
        scale=2.0,
    ).double()
    embeddings_BD, labels_B = batch(16)
    wanted, num_without_own = 0.0, 0
    unit_CND = F.normalize(loss.proxies.detach(), dim=2)
    for embedding_D, label in zip(embeddings_BD.detach(), labels_B.tolist(), strict=True):  # the equations, by hand
        similar = {(c, n): float(embedding_D @ unit_CND[c, n]) for c in range(NUM_CLASSES) for n in range(PER_CLASS)}
        order = sorted(similar, key=lambda i: similar[i] + (1000 if forced and i[0] == label else 0), reverse=True)
        scores = {} if masked else dict.fromkeys(range(NUM_CLASSES), 0.0)
        for c, n in order[:7]:
            scores[c] = scores.get(c, 0.0) + similar[c, n]
        num_without_own += all(c != label for c, _ in order[:7])
        if label in scores:
            wanted += math.log(sum(math.exp(2 * score) for score in scores.values())) - 2 * scores[label]
    found = loss(embeddings_BD, labels_B)
    assert (num_without_own > 0) == (not forced)
    assert float(found) == pytest.approx(wanted / 16, rel=1e-12)
    found.backward()
    assert embeddings_BD.grad is not None
    assert embeddings_BD.grad.isfinite().all()
