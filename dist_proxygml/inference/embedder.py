"""Images to embeddings with a trained model: `Embedder.from_run("runs/demo_cpu").embed(["a.jpg", "b.png"])`.

The network, its weights and the way it takes images come from a run, a checkpoint or an export alone; nothing of the
training is started. An image goes the way of the evaluation: decoded by data/images.py, prepared by the run's test
transform, unit rows in float32. So embeddings equal the evaluation's, to the last digit in batches of the same images
with the same number of threads; in other batches matrix products may round differently, by about 1e-7.

Dimension key: b images of a batch, n images, D embedding.
"""

import os
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from PIL import Image
from torch import Tensor, nn

from dist_proxygml.backbones.build import build_backbone
from dist_proxygml.checkpoint.model import BACKBONE_FILE, EXPORT_FILE, open_trained
from dist_proxygml.checkpoint.writer import load_backbone
from dist_proxygml.config import load_run_config, parse_model
from dist_proxygml.data.images import rgb_pixels
from dist_proxygml.data.pipeline import sample_generators
from dist_proxygml.data.sources import read_image
from dist_proxygml.data.transforms import Transform, build_transform
from dist_proxygml.distributed.gpus import check_gpus
from dist_proxygml.inference.hub import HUB, fetch
from dist_proxygml.storage.files import sha256_of
from dist_proxygml.storage.run_folder import RunFolder

COMPARED = ("weights_sha256", "backbone", "preprocessing")
"""Entries of `Embedder.about` on which embeddings depend."""

OneImage = str | Path | Image.Image | np.ndarray | Tensor


class Embedder:
    """A trained backbone and the preparation of its images.

    Attributes:
        model: uint8 RGB [b, 3, S, S] -> unit rows [b, D], in evaluation mode, on `device`.
        transform: images of any size -> uint8 [b, 3, S, S].
        device: where the model is.
        embedding_dim: D.
        batch_size: images of a forward pass by default: that of the run's evaluation.
        test_split: the split that the run was evaluated on.
        about: which model it is, as manifests store it; `model_difference` compares two.
    """

    def __init__(
        self,
        model: nn.Module,
        transform: Transform,
        *,
        device: torch.device,
        about: dict[str, Any],
        batch_size: int = 64,
        test_split: str = "test",
    ) -> None:
        self.model = model.to(device).eval()
        self.transform = transform
        self.device = device
        self.about = about
        self.embedding_dim = int(about["embedding_dim"])
        self.batch_size = batch_size
        self.test_split = test_split

    @classmethod
    def from_run(cls, path: str | Path, *, device: str = "auto", checkpoint: str | None = None) -> "Embedder":
        """The model of a run's folder (its newest whole checkpoint, or the one named), of a checkpoint or of an export.

        Every file of it is verified first. `device` is "auto" (a GPU if there is one), "cpu", "cuda" or "cuda:1".

        Raises:
            ValueError: there is no such model, a file of it is damaged, or there is no such device.
        """
        path = Path(path)
        where = choose_device(device)
        if checkpoint is not None and not RunFolder(path).checkpoints.is_dir():
            raise ValueError(f"expected the folder of a run with a checkpoint name, got {path}; leave the name out")
        trained = open_trained(RunFolder(path).checkpoints / checkpoint if checkpoint else path)
        batch_size, test_split = 64, "test"
        if trained.export is not None:
            name = trained.export["run"]
            backbone, transform = parse_model(
                trained.export["backbone"], trained.export["preprocessing"], source=str(trained.path / EXPORT_FILE)
            )
        else:
            run = trained.path.parent.parent
            config = load_run_config(run)
            trained.check_config(config, source=RunFolder(run).config)
            name, backbone, transform = config.name, config.backbone, config.data.test_transform
            batch_size, test_split = config.evaluation.batch_size, config.data.test_split or "test"
        with torch.random.fork_rng(devices=[]):  # its first weights are thrown away
            model = build_backbone(backbone, load_pretrained=False)
        load_backbone(trained.path, model)
        about = {
            "run": name,
            "step": trained.step,
            "path": str(trained.path.resolve()),
            "weights_sha256": sha256_of(trained.path / BACKBONE_FILE),
            "embedding_dim": backbone.embedding_dim,
            "backbone": backbone.of_trained_model(),
            "preprocessing": transform.model_dump(mode="json"),
        }
        return cls(
            model,
            build_transform(transform),
            device=where,
            about=about,
            batch_size=batch_size,
            test_split=test_split,
        )

    @classmethod
    def from_pretrained(cls, name: str | Path, *, device: str = "auto", revision: str | None = None) -> "Embedder":
        """The model of "hf-hub:ORGANISATION/NAME" (an export on the Hugging Face Hub, at a revision) or of a folder.

        Raises:
            ValueError: as `from_run`; or the Hub has no such export, or cannot be reached.
        """
        if str(name).startswith(HUB):
            return cls.from_run(fetch(str(name), revision=revision), device=device)
        if revision is not None:
            raise ValueError(f"expected a revision with {HUB}NAME only, got the folder {name}; leave it out")
        return cls.from_run(name, device=device)

    def embed(
        self, images: OneImage | Iterable[OneImage], *, batch_size: int | None = None
    ) -> Float[np.ndarray, "n D"]:
        """Unit rows in float32, in the order of the images; [1, D] for a single one.

        An image is a path, a PIL image, a numpy array uint8 [h, w], [h, w, 3] or [h, w, 4], or a tensor uint8 RGB
        [3, h, w]; an array or a tensor with one dimension more is a batch of them. An iterable is read a batch at a
        time.

        Raises:
            ValueError: naming an image that cannot be read, or is none of these, or whose embedding is zero or not
                finite.
        """
        rows = [np.zeros((0, self.embedding_dim), dtype=np.float32)]
        start, every = 0, _pixels_of_each(images)
        while pixels := list(islice(every, batch_size or self.batch_size)):
            ids = range(start, start + len(pixels))
            images_b3SS = self.transform(pixels, sample_generators(ids, seed=0, epoch=0))
            rows.append(self.embed_prepared(images_b3SS, names=[f"image {number}" for number in ids]))
            start += len(pixels)
        return np.concatenate(rows)

    @torch.inference_mode()
    def embed_prepared(
        self, images: UInt8[Tensor, "b 3 S S"], *, names: Iterable[str] = ()
    ) -> Float[np.ndarray, "b D"]:
        """Unit rows of images that went through `transform`; `names` are for messages.

        Raises:
            ValueError: an embedding is zero or not finite.
        """
        if len(images) == 0:
            return np.zeros((0, self.embedding_dim), dtype=np.float32)
        output_bD = self.model(images.to(self.device, non_blocking=True))
        with torch.autocast(self.device.type, enabled=False):
            rows_bD = F.normalize(output_bD.float(), dim=1).cpu()
        lengths_b = torch.linalg.vector_norm(rows_bD, dim=1)
        bad = (~((lengths_b - 1).abs() < 1e-3)).nonzero().flatten().tolist()  # NaN compares as false
        if bad:
            called = list(names) or [f"image {number} of the batch" for number in range(len(rows_bD))]
            raise ValueError(
                f"the embedding of {called[bad[0]]} is zero or not finite{f' ({len(bad)} in all)' if bad[1:] else ''}; "
                "has the model diverged? Take another checkpoint, or look at the image"
            )
        found: np.ndarray = rows_bD.numpy()
        return found


def choose_device(wanted: str) -> torch.device:
    """The device of a name; "auto" takes a GPU if there is one.

    Raises:
        ValueError: there is no such device, or "auto" finds GPUs that torch cannot use.
    """
    if wanted == "auto":
        check_gpus(os.environ, instead="name the device: cpu")
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device: torch.device | None = torch.device(wanted)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise ValueError(f"expected a device auto, cpu, cuda or cuda:1, got {wanted!r}")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(
            f"expected a GPU for the device {wanted!r}, found {torch.cuda.device_count()}; take auto or cpu"
        )
    return device


def loading_processes(num_images: int, wanted: int | None, *, num_ranks: int = 1) -> int:
    """Default number of processes that read images for each of the machine's ranks: none for so few that starting them
    takes longer.
    """
    if wanted is not None:
        return wanted
    return 0 if num_images < 512 else max(1, min(8, len(os.sched_getaffinity(0)) // num_ranks))


def model_difference(one: dict[str, Any], other: dict[str, Any]) -> str | None:
    """Name the first difference between two models, described as by `Embedder.about`; None if their embeddings are
    comparable. A run and its export are the same model.
    """
    for name in COMPARED:
        first, second = one.get(name), other.get(name)
        if (
            name == "backbone"
            and isinstance(first, dict)
            and isinstance(second, dict)
            and ("mean" in first) != ("mean" in second)
        ):  # one of them is from before the weights' colours were stored
            first, second = ({k: v for k, v in each.items() if k not in ("mean", "std")} for each in (first, second))
        if first != second:
            return name.replace("_sha256", "")
    return None


def _pixels_of_each(images: OneImage | Iterable[OneImage]) -> Iterator[Tensor]:
    """Each image as uint8 RGB [3, h, w]."""
    is_batch = isinstance(images, np.ndarray | Tensor) and images.ndim == 4
    is_single = isinstance(images, OneImage) and not is_batch
    several = cast(Iterable[OneImage], [images] if is_single else images)
    for number, image in enumerate(several):
        yield _pixels(image, number)


def _pixels(image: Any, number: int) -> Tensor:
    if isinstance(image, str | Path):
        return read_image(Path(image))
    if isinstance(image, Tensor):
        if image.dtype != torch.uint8 or image.ndim != 3 or image.shape[0] != 3 or 0 in image.shape:
            raise ValueError(
                f"image {number}: expected a tensor uint8 RGB [3, h, w], got {image.dtype} {list(image.shape)}; pass "
                "pixels as they are, from 0 to 255, the model normalises them"
            )
        return image.cpu()
    if isinstance(image, np.ndarray):
        channels = image.shape[2:]
        if image.dtype != np.uint8 or image.ndim not in (2, 3) or channels not in ((), (3,), (4,)) or 0 in image.shape:
            raise ValueError(
                f"image {number}: expected an array uint8 [h, w], [h, w, 3] or [h, w, 4], got {image.dtype} "
                f"{list(image.shape)}; pass pixels as they are, from 0 to 255, colours last"
            )
        image = Image.fromarray(image)
    if isinstance(image, Image.Image):
        return torch.from_numpy(rgb_pixels(image)).permute(2, 0, 1)
    raise ValueError(
        f"image {number}: expected a path, a PIL image, an array or a tensor, got {type(image).__name__}; convert it"
    )
