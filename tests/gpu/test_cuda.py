"""On a CUDA device: the loss and the backbone give what they give on the CPU. Skipped without a device."""

import pytest
import torch
import torch.nn.functional as F

from dist_proxygml import ProxyGMLLoss
from dist_proxygml.backbones.build import build_backbone
from dist_proxygml.config import BackboneConfig

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_loss_and_gradients_are_those_of_the_cpu(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    rows = F.normalize(torch.randn(48, 64, generator=generator, dtype=dtype))
    labels = torch.randint(0, 997, (48,), generator=generator)
    results = []
    for device in ("cpu", "cuda"):
        loss = ProxyGMLLoss(997, 64, proxies_per_class=3, ratio=0.05, regularization_weight=0.3).to(device, dtype)
        embeddings = rows.to(device).requires_grad_()
        terms = loss(embeddings, labels.to(device))
        terms.total.backward()
        results.append([part.detach().cpu() for part in (terms.total, embeddings.grad, loss.proxies.grad)])
    tolerance = {"rtol": 1e-10, "atol": 1e-12} if dtype == torch.float64 else {"rtol": 1e-3, "atol": 1e-6}
    for on_cpu, on_gpu in zip(*results, strict=True):
        torch.testing.assert_close(on_gpu, on_cpu, **tolerance)


def test_the_small_network_embeds_as_on_the_cpu() -> None:
    model = build_backbone(BackboneConfig(name="small_cnn", embedding_dim=16, pool=4)).eval()
    images = torch.randint(0, 256, (8, 3, 32, 32), dtype=torch.uint8)
    with torch.no_grad():
        expected = model(images)
        got = model.cuda()(images.cuda()).cpu()
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-4)
