"""The code for GPUs, on a stand-in: no tensor of the host gets among the device's, and few launches and waits a step.

The limits are what was counted, and a fiftieth more; what the stand-in does not see says `tests/gpu_stand_in.py`.
"""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dist_proxygml.head.bank import Pairs, build_bank
from dist_proxygml.head.choices import Head
from dist_proxygml.head.loss import ProxyGMLLoss, ProxyLoss
from dist_proxygml.head.margins import Margin
from dist_proxygml.head.optim import RowwiseAdagrad, SparseAdam, bring_to_unit_length_, coalesced, squared_norm
from dist_proxygml.head.selection import select_negatives
from dist_proxygml.head.similarity import all_similarities
from dist_proxygml.head.statistics import ProxyStatistics, ProxyUse
from tests.gpu_stand_in import OnDevice, StandIn


def on_device(*shape: int) -> Tensor:
    return torch.randn(*shape).to("cuda")


def test_a_tensor_says_where_it_is_and_computes_what_the_host_does() -> None:
    weight = torch.randn(3, 4)
    with StandIn():
        layer = torch.nn.Linear(4, 3).to("cuda")
        x = on_device(2, 4).requires_grad_()
        layer(x).square().sum().backward()
        assert layer.weight.device == x.grad.device == torch.device("cuda", 0)
        on_host = torch.nn.Linear(4, 3)
        on_host.load_state_dict({name: value.cpu() for name, value in layer.state_dict().items()})
        on_host(x.detach().cpu()).square().sum().backward()
        assert torch.equal(layer.weight.grad.cpu(), on_host.weight.grad)
        assert isinstance(layer.weight.grad, OnDevice)
        assert not isinstance(on_host.weight.grad, OnDevice)
        assert torch.equal(weight.to("cuda").cpu(), weight)


@pytest.mark.parametrize(
    "mix",
    [
        lambda: on_device(3) + torch.ones(3),
        lambda: on_device(3, 3) @ torch.ones(3, 3),
        lambda: torch.cat([on_device(3), torch.ones(3)]),
        lambda: torch.ones(3)[torch.zeros(1, dtype=torch.int64).to("cuda")],
        lambda: on_device(3).index_add_(0, torch.zeros(1, dtype=torch.int64), on_device(1)),
        lambda: on_device(3).index_put_((torch.zeros(2, dtype=torch.int64).to("cuda"),), torch.ones(2)),
    ],
)
def test_tensors_of_host_and_device_do_not_mix(mix: Any) -> None:
    with StandIn(), pytest.raises(RuntimeError, match="same device"):
        mix()


def test_what_cuda_refuses_is_refused() -> None:
    with StandIn():
        with pytest.raises(TypeError, match="numpy"):
            on_device(3).numpy()
        with pytest.raises(NotImplementedError, match="mkldnn"):
            torch.ops.mkldnn._linear_pointwise(on_device(2, 2), on_device(2, 2), None, "none", [], "")


@pytest.mark.parametrize(
    ("work", "waits", "launches"),
    [
        (lambda x: x + 1, 0, 1),
        (lambda x: x.view(3, 1).T, 0, 0),
        (lambda x: x * torch.tensor(2.0), 0, 1),  # scalars of the host are arguments of the kernel
        (lambda x: x.sum().item(), 1, 2),
        (lambda x: bool((x > 0).all()), 1, 3),
        (lambda x: x[x > 0], 1, 6),
        (lambda x: x.masked_fill_(x > 0, 0.0), 0, 2),
        (lambda x: x.tolist(), 1, 0),
        (lambda x: x.cpu(), 1, 1),
        (lambda x: x.to("cpu", non_blocking=True), 0, 1),
        (lambda x: torch.tensor([1.0], device=x.device), 1, 1),
        (lambda x: x.double().to(x.device), 0, 1),
        (lambda x: x[:2].nonzero(), 1, 4),
    ],
)
def test_waits_and_launches_are_counted(work: Any, waits: int, launches: int) -> None:
    with StandIn() as gpu:
        x = on_device(3)
        gpu.clear()
        work(x)
        assert (gpu.num_synchronisations, gpu.num_launches) == (waits, launches), str(gpu)


OPTIMIZERS = {
    "adam": lambda parameters: torch.optim.Adam(parameters, 0.01, eps=0.01, fused=True),
    "rowwise_adagrad": lambda parameters: RowwiseAdagrad(parameters, 0.01),
    "sparse_adam": lambda parameters: SparseAdam(parameters, 0.01),
}


def two_steps(
    device: str, loss: ProxyLoss, *, batch_size: int, optimizer: str, gpu: StandIn | None = None
) -> tuple[list[Tensor], ProxyUse]:
    """Forward, backward, norm and update, twice: losses, gradients and proxies; and what the statistics say. After it
    `gpu` holds what the second step did.
    """
    loss = loss.to(device)
    update = OPTIMIZERS[optimizer](loss.parameters())
    statistics = ProxyStatistics(loss.partition, loss.proxies_per_class, device=loss.proxies.device, group=None)
    loss.observer = statistics.observe
    generator = torch.Generator().manual_seed(0)
    found: list[Tensor] = []
    for step in range(2):
        statistics.begin_step(is_logged=step == 0)
        rows = F.normalize(torch.randn(batch_size, loss.embedding_dim, generator=generator))
        embeddings = rows.to(device).requires_grad_()
        labels = torch.randint(0, loss.num_classes, (batch_size,), generator=generator).to(device)
        if gpu is not None:
            gpu.clear()  # the second step is counted: no state is made, no similarity is shown
        total = loss(embeddings, labels).total
        total.backward()
        gradient = loss.proxies.grad
        if gradient.is_sparse:
            gradient = loss.proxies.grad = coalesced(gradient)
        squared_norm(gradient.values() if gradient.is_sparse else gradient).item()
        update.step()
        if gradient.is_sparse:
            bring_to_unit_length_(loss.proxies, classes_u=gradient.indices()[0])
        update.zero_grad()
        counts = () if gpu is None else (gpu.waits.copy(), gpu.launches.copy())
        found += [total.detach().cpu(), embeddings.grad.cpu(), loss.proxies.detach().cpu().clone()]
    use = statistics.close_window()
    if gpu is not None:
        gpu.waits, gpu.launches = counts
    return found, use


# Arguments of the head, images, optimizer; then waits and launches at most.
HEADS: dict[str, tuple[Any, int, str, int, int]] = {
    "CUB": (lambda: ProxyGMLLoss(100, 512, proxies_per_class=12, regularization_weight=0.3), 32, "adam", 3, 121),
    "many classes": (lambda: ProxyGMLLoss(3000, 64, topk=150), 32, "adam", 3, 89),
    "pairs": (lambda: ProxyGMLLoss(9000, 32, topk=40, sparse=True), 64, "rowwise_adagrad", 6, 245),
    "pairs of several proxies": (
        lambda: ProxyGMLLoss(4001, 32, proxies_per_class=3, topk=40, sparse=True),
        16,
        "sparse_adam",
        8,
        272,
    ),
    "bfloat16": (lambda: ProxyGMLLoss(9000, 32, topk=40, matmul_dtype=torch.bfloat16), 64, "adam", 5, 233),
    "anchors": (
        lambda: ProxyGMLLoss(300, 32, proxies_per_class=4, regularization_weight=0.3, regularization_anchors=50),
        32,
        "adam",
        5,
        167,
    ),
    "softmax over proxies": (
        lambda: ProxyLoss(
            50, 32, Head(topk=30, class_score="softmax", scale=4.0, learn_scale=True), proxies_per_class=3
        ),
        32,
        "adam",
        3,
        106,
    ),
    "max and margin": (
        lambda: ProxyLoss(50, 32, Head(topk=30, scale=4.0, margin=Margin("arcface", 0.3)), proxies_per_class=1),
        32,
        "adam",
        3,
        109,
    ),
    "all proxies": (
        lambda: ProxyLoss(500, 32, Head("all", scale=16.0, margin=Margin("cosface", 0.3)), proxies_per_class=2),
        32,
        "adam",
        4,
        157,
    ),
    "sampled classes": (
        lambda: ProxyLoss(500, 32, Head("sampled", share=0.3, scale=16.0), sparse=True),
        32,
        "rowwise_adagrad",
        6,
        180,
    ),
}


@pytest.mark.filterwarnings("ignore:k = ")
@pytest.mark.parametrize("name", HEADS)
def test_a_step_of_the_head_gives_what_it_gives_on_the_cpu_with_few_launches_and_waits(name: str) -> None:
    build, batch_size, optimizer, most_waits, most_launches = HEADS[name]
    gpu = StandIn()
    with gpu:
        found, use = two_steps("cuda", build(), batch_size=batch_size, optimizer=optimizer, gpu=gpu)
    expected, expected_use = two_steps("cpu", build(), batch_size=batch_size, optimizer=optimizer)
    for one, other in zip(found, expected, strict=True):
        # Sums in another order, in float32; Adam divides small gradients by their own size.
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
    assert use == expected_use
    counted = (gpu.num_synchronisations, gpu.num_launches)
    assert counted[0] <= most_waits, str(gpu)
    assert counted[1] <= most_launches, str(gpu)


@pytest.mark.ci  # a minute of CPU: 1,024 images against a million classes, twice
def test_a_step_with_a_million_classes_takes_few_launches_and_waits() -> None:
    loss = ProxyGMLLoss(1_000_000, 8, topk=100, sparse=True, initialization="unit")
    gpu = StandIn()
    with gpu:
        two_steps("cuda", loss, batch_size=1024, optimizer="rowwise_adagrad", gpu=gpu)
    assert gpu.num_synchronisations <= 6, str(gpu)
    assert gpu.num_launches <= 322, str(gpu)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_products_of_bfloat16_keep_the_precision_of_the_proxies(dtype: torch.dtype) -> None:
    """CUDA multiplies bfloat16 into float32 only."""
    rows, proxies = torch.randn(5, 8, dtype=dtype), torch.randn(20, 8, dtype=dtype)
    expected = all_similarities(rows, build_bank(proxies, matmul_dtype=torch.bfloat16))
    with StandIn():
        found = all_similarities(rows.to("cuda"), build_bank(proxies.to("cuda"), matmul_dtype=torch.bfloat16)).cpu()
    assert found.dtype == dtype
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(("kind", "passes"), [("spread", 1), ("all in one chunk", 2), ("equal", 3)])
def test_a_search_whose_groups_do_not_fit_is_done_again_with_room_for_them(kind: str, passes: int) -> None:
    """Of four chunks: the best proxies of all rows in one of them; or all equal, so that nothing exceeds the bound, and
    without one there are too many.
    """
    generator = torch.Generator().manual_seed(0)
    proxies = torch.randn(20_000, 8, generator=generator)
    rows = F.normalize(torch.ones(64, 8) + 0.01 * torch.randn(64, 8, generator=generator))
    if kind == "all in one chunk":
        proxies = proxies[F.normalize(proxies).sum(dim=1).argsort()]
    elif kind == "equal":
        proxies = torch.ones(20_000, 8)

    def found(device: str) -> Pairs:
        bank = build_bank(proxies.to(device))
        excluded_R2 = torch.zeros(64, 2, dtype=torch.int64, device=device)
        return select_negatives(
            rows.to(device),
            bank,
            excluded_R2=excluded_R2,
            num_negatives=400,
            row_counts=[64],
            proxy_counts=[20_000],
            group=None,
            memory_budget=16 * 6000 * 64,
        )

    with StandIn() as gpu:
        pairs = [part.cpu() for part in found("cuda")]
    for one, other in zip(pairs[:2], found("cpu")[:2], strict=True):
        assert torch.equal(one, other)
    assert sum(gpu.launches[key] for key in gpu.launches if key.startswith("mm ")) - 1 == 4 * passes, str(gpu)
