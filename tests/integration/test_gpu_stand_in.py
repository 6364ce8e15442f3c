"""A whole training run with the code for GPUs, on a stand-in: it trains, saves, evaluates, reports and resumes.

DeepSpeed is not there: its engine looks for a driver. What takes its place does what it does at ZeRO 0 on one rank.
"""

import contextlib
import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dist_proxygml.checkpoint import writer
from dist_proxygml.config import load_config
from dist_proxygml.distributed import engine as engine_module
from dist_proxygml.distributed.parallel import ParallelContext
from dist_proxygml.evaluation import search
from dist_proxygml.storage.run_folder import step_name
from dist_proxygml.training.run import train
from tests.gpu_stand_in import StandIn

ROOT = Path(__file__).parents[2]


class PlainEngine:
    """What DeepSpeed's engine does at ZeRO 0, in float32, on one rank."""

    def __init__(self, *, model: nn.Module, optimizer: torch.optim.Optimizer, config: dict[str, Any], **_: Any) -> None:
        self.module, self.optimizer = model, optimizer
        self.accumulation, self.num_backward = config["gradient_accumulation_steps"], 0
        self.checkpoint_engine: Any = None

    def __call__(self, images: Tensor) -> Tensor:
        return self.module(images)

    def backward(self, loss: Tensor) -> None:
        (loss / self.accumulation).backward()
        self.num_backward += 1

    def is_gradient_accumulation_boundary(self) -> bool:
        return self.num_backward % self.accumulation == 0

    def step(self) -> None:
        if self.is_gradient_accumulation_boundary():
            self.optimizer.step()
            self.optimizer.zero_grad()

    def was_step_applied(self) -> bool:
        return self.is_gradient_accumulation_boundary()

    def save_checkpoint(self, directory: str, *, tag: str, save_latest: bool) -> None:
        content = {"module": self.module.state_dict(), "optimizer": self.optimizer.state_dict()}
        self.checkpoint_engine.makedirs(f"{directory}/{tag}", exist_ok=True)
        self.checkpoint_engine.save(content, f"{directory}/{tag}/all.pt")

    def load_checkpoint(self, directory: str, *, tag: str) -> tuple[str, dict[str, Any]]:
        path = f"{directory}/{tag}/all.pt"
        content = torch.load(path, map_location="cpu")
        self.module.load_state_dict(content["module"])
        self.optimizer.load_state_dict(content["optimizer"])
        return path, {}

    zero_optimization_stage = staticmethod(lambda: 0)
    get_global_grad_norm = staticmethod(lambda: None)  # as before a step's last micro-batch
    fp16_enabled = staticmethod(lambda: False)


@pytest.fixture
def without_deepspeed(monkeypatch: pytest.MonkeyPatch) -> None:
    deepspeed = SimpleNamespace(
        initialize=lambda **named: (PlainEngine(**named), None),
        zero=SimpleNamespace(GatheredParameters=contextlib.nullcontext),
    )
    monkeypatch.setattr(engine_module, "_import_deepspeed", lambda: deepspeed)
    monkeypatch.setattr(search, "searches_on_gpu", lambda device: False)  # faiss asks the driver itself
    save = writer.save_file  # reads where the numbers lie
    monkeypatch.setattr(writer, "save_file", lambda named, path: save({n: t.cpu() for n, t in named.items()}, path))
    monkeypatch.setattr("torch.utils.data._utils.pin_memory.pin_memory", lambda data, device=None: data)


def metrics(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


CASES = {
    "plain": [],
    "asynchronous, anchors": [
        "checkpoint.asynchronous=true",
        "proxies.per_class=2",
        "proxies.regularization_weight=0.3",
        "proxies.regularization_anchors=20",
        "deepspeed.gradient_accumulation_steps=2",
        "optimizer.proxies_clip_norm=1.0",
    ],
    "row-wise, from class means": [
        "optimizer.proxies_name=rowwise_adagrad",
        "optimizer.proxies_weight_decay=0",
        "proxies.unit_norm=true",
        "proxies.initialization=class_mean",
    ],
}


@pytest.mark.usefixtures("without_deepspeed")
@pytest.mark.parametrize("name", ["plain", *(pytest.param(name, marks=pytest.mark.ci) for name in list(CASES)[1:])])
def test_a_run_mixes_no_devices_and_resumes(name: str, tmp_path: Path) -> None:
    overrides = [f"runs_dir={json.dumps(str(tmp_path))}", "name=run", "training.epochs=1", "evaluation.kmeans_seeds=1"]
    overrides += ["telemetry.log_every_steps=2", "telemetry.progress_bar=false", "checkpoint.every_steps=3"]
    overrides += ["evaluation.at_start=false", "evaluation.raw_pixels=false", f"data.shards={ROOT / 'shards/demo'}"]
    overrides += ["training.max_steps=6", "data.num_workers=0", *CASES[name]]
    context = ParallelContext(0, 1, 0, torch.device("cuda", 0), None)

    config = load_config(ROOT / "configs/demo_cpu.json", overrides)
    with StandIn():
        folder = train(config, context, resume="never")
        losses = {row["step"]: row["loss"] for row in metrics(folder) if "loss" in row}
        assert list(losses) == [2, 4, 6]
        shutil.rmtree(folder / "checkpoints" / step_name(6))
        (folder / "metrics.jsonl").unlink()
        train(config, context, resume="auto")
    resumed = {row["step"]: row["loss"] for row in metrics(folder) if "loss" in row}
    assert resumed == {step: losses[step] for step in (4, 6)}  # from step 3 on, to the last bit
    assert (folder / "report.html").is_file()
