"""Checks of a run before anything is written or moved, shared by train, its --dry-run, plan and submit."""

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from dist_proxygml.backbones.build import EmbeddingModel, build_backbone
from dist_proxygml.backbones.from_weights import fill_from_weights
from dist_proxygml.backbones.image_size import check_sizes
from dist_proxygml.backbones.lora import add_adapters_, unused_adapters_refused
from dist_proxygml.config import Config
from dist_proxygml.data.audit import shared_classes
from dist_proxygml.data.index import ShardIndex
from dist_proxygml.data.transforms import check_transform
from dist_proxygml.distributed.engine import check_settings, engine_settings, refuse_fp16_on_cpu
from dist_proxygml.distributed.parallel import single_process
from dist_proxygml.evaluation.evaluator import check_split
from dist_proxygml.evaluation.run import measured, open_gallery
from dist_proxygml.reporting.trackers import check_trackers
from dist_proxygml.storage.run_folder import RunFolder
from dist_proxygml.training.data import TrainingData, count_classes, open_split, open_training_data
from dist_proxygml.training.head_plan import HeadPlan, plan_head
from dist_proxygml.training.optim import build_backbone_optimizer, build_bank_optimizer, build_groups
from dist_proxygml.training.run_plan import has_index
from dist_proxygml.training.transfer import open_transfer


class CheckedRun(NamedTuple):
    """The parts of a run that are known without starting it."""

    config: Config
    """Including the number of classes."""
    plan: HeadPlan
    engine_settings: dict[str, Any]
    data: TrainingData | None
    """None: no shards are available."""
    test_index: ShardIndex | None
    """None: no shards are available, or no test split is configured."""


def check_run(
    config: Config,
    *,
    world_size: int,
    device: str | None = None,
    is_start: bool = False,
    is_what_if: bool = False,
) -> CheckedRun:
    """Build the parts of a run, small or on meta tensors, to find contradictions before anything is written or queued.
    Uses no collectives and leaves random generators unchanged.

    Args:
        config: the run.
        world_size: its number of ranks.
        device: type of their devices, "cpu" or "cuda"; None if unknown.
        is_start: the run is about to start: its shards must exist, and its builder loads the weights. Otherwise only
            what is visible on this machine is checked.
        is_what_if: also ignore shards with another number of classes.

    Raises:
        ValueError: the run cannot work.
    """
    # 1. The network, and whether it takes the images that it will get.
    config = fill_from_weights(config)
    batch_size = config.micro_batch_size(world_size) * world_size  # over all ranks, as BatchNorm sees it
    model = check_network(config, batch_size, load_local=not is_start)

    # 2. Settings among each other.
    check_trackers(config.telemetry.trackers)
    config = count_classes(config)
    if config.proxies.fused and device == "cpu":
        raise ValueError("expected an NVIDIA GPU with proxies.fused, got a device of type cpu; set it to false")
    if config.proxies.fused and is_start:
        try_kernels(torch.device("cuda", torch.cuda.current_device()))
    if config.training.compile and is_start:
        try_compile("cuda" if device == "cuda" else "cpu")
    settings = engine_settings(config, world_size)
    check_settings(settings)
    if device is not None:
        refuse_fp16_on_cpu(settings, device)
    plan = plan_head(config, world_size=world_size, device=device or "cpu")

    # 3. Images.
    data, test_index = None, None
    if is_start or has_index(config):
        is_other = is_what_if and config.data.stream is None
        if not is_other or open_split(config, config.data.train_split).num_classes == config.num_classes:
            data, test_index = _open_data(config)
            data.loader(replace(single_process(), world_size=world_size), epoch=0, start=0)
            if data.count_steps() == 0:
                raise ValueError(
                    f"expected at least one step an epoch, got {data.epoch_size:,} images for a training.batch_size of "
                    f"{config.training.batch_size} with data.drop_last; lower it, or set drop_last to false"
                )
    for name in ("train_transform", "test_transform"):
        with _refused(f"data.{name}"):
            check_transform(getattr(config.data, name))

    # 4. Optimizers.
    with _refused("optimizer"):
        build_backbone_optimizer(config.optimizer, build_groups(config, model))
        build_bank_optimizer(config.optimizer, torch.nn.Parameter(torch.zeros(1, 1, 1)))
    init_from = config.checkpoint.init_from
    is_new = not is_start and not RunFolder(config.run_directory).checkpoints.exists()
    if data is not None and is_new and init_from is not None:
        open_transfer(config, data.index, single_process())
    return CheckedRun(config, plan, settings, data, test_index)


def check_network(config: Config, batch_size: int, *, load_local: bool) -> EmbeddingModel:
    """Build the backbone of a configuration without nulls, and pass images of both sizes through it on meta tensors.

    Args:
        config: the run.
        batch_size: images of a training step.
        load_local: also load its weights if they are on this machine.

    Raises:
        ValueError: it cannot be built, or refuses images of a size.
    """
    weights = config.backbone.pretrained or ""
    folder = weights.removeprefix("local-dir:")
    is_here = Path(folder).is_dir() if folder != weights else bool(weights) and Path(weights).is_file()
    with torch.random.fork_rng(devices=[]), _refused("backbone"):
        model = build_backbone(config.backbone, load_pretrained=load_local and is_here)
        if config.backbone.lora is not None:
            add_adapters_(model, config.backbone.lora)
    with unused_adapters_refused(model):
        check_sizes(model, config, batch_size)
    return model


def try_compile(device: str) -> None:
    """Let torch.compile compile a sum for a type of device.

    Raises:
        ValueError: it cannot, for want of a C++ compiler or, on a GPU, of triton and a C compiler.
    """
    try:
        torch.compile(lambda x: x + 1, dynamic=False)(torch.zeros(3, device=device))
    except Exception as error:  # of a compiler, a linker, a driver, of many types
        needs = "triton, a C compiler and Python's headers" if device == "cuda" else "a C++ compiler"
        reason = " ".join(str(error).split())[:300]
        raise ValueError(
            f"expected {needs} with training.compile, but torch.compile fails on a {device}: {reason}; install what is "
            "missing (Debian, Ubuntu: `apt install g++ python3-dev`), or set training.compile to false"
        ) from error


def try_kernels(device: torch.device) -> None:
    """Compile one of the kernels of proxies.fused for a GPU, run it on four rows, and compare.

    Raises:
        ValueError: it cannot be compiled here, or gives something else than torch.
    """
    rows_RD = torch.eye(4, 16, device=device)
    try:
        from dist_proxygml.head.fused import pairs_above

        found = pairs_above(
            rows_RD,
            rows_RD,
            torch.ones(4, device=device),
            torch.full((4,), 0.5, device=device),
            torch.zeros(4, 2, dtype=torch.int64, device=device),
            matmul_dtype=torch.float32,
            capacity=16,
        )
    except Exception as error:  # of a compiler, a linker, a driver, of many types
        reason = " ".join(str(error).split())[:300]
        raise ValueError(
            f"expected to compile the kernels of proxies.fused on this machine, got {type(error).__name__}: {reason}; "
            "install a C compiler and Python's headers (`python -m dist_proxygml.doctor` says what is missing), or set "
            "proxies.fused to false"
        ) from error
    own = list(range(4))
    if found is None or (found.row.tolist(), found.proxy.tolist()) != (own, own):
        raise ValueError(
            "expected the kernels of proxies.fused to find what torch finds, got something else on this GPU; set "
            "proxies.fused to false"
        )


@contextlib.contextmanager
def _refused(section: str) -> Iterator[None]:
    """Name the section of the configuration for which a library raised its own error."""
    try:
        yield
    except (ValueError, OSError):
        raise
    except Exception as error:
        reason = (str(error).splitlines() or [""])[0]
        raise ValueError(
            f"expected a section {section} that can be built, got {type(error).__name__}: {reason}; change its settings"
        ) from error


def _open_data(config: Config) -> tuple[TrainingData, ShardIndex | None]:
    """Open the training data and the index of the test split, if there is one."""
    data = open_training_data(config)
    test_index = None if config.data.test_split is None else open_split(config, config.data.test_split)
    shared = None if data.index is None or test_index is None else shared_classes(data.index, test_index)
    if shared and not config.evaluation.allow_seen_classes:
        raise ValueError(
            f"expected classes in data.test_split {config.data.test_split!r} that are not trained, got "
            f"{len(shared):,} of {test_index.num_classes:,} "  # type: ignore[union-attr]
            f"that are in {config.data.train_split!r} too, such as {', '.join(map(repr, shared[:3]))}; build shards "
            "with splits by class, or set evaluation.allow_seen_classes to true to measure on known classes"
        )
    for index in (data.validation, test_index):
        if index is None:
            continue
        try:
            check_split(index, open_gallery(config, index), measured(config, index))
        except ValueError as error:
            raise ValueError(f"{index.split}: {error}") from None
    return data, test_index
