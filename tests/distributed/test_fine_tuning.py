"""Groups by layer and weight decay, frozen stages and adapters: the same on any number of ranks and ZeRO stage, and
after a stop; and what is stored needs no peft.
"""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

from dist_proxygml.backbones.build import build_backbone
from dist_proxygml.checkpoint.folder import Retention, RunState
from dist_proxygml.checkpoint.writer import CheckpointWriter, load_backbone
from dist_proxygml.config import BackboneConfig, Config
from dist_proxygml.data.pipeline import Batch
from dist_proxygml.distributed.parallel import ParallelContext
from dist_proxygml.evaluate import main as evaluate
from dist_proxygml.export import main as export
from dist_proxygml.inference.embedder import Embedder, model_difference
from tests.harness import run_ranks
from tests.shards_of_noise import write_noise_shards
from tests.small_training import NUM_CLASSES, configuration

VIT: dict[str, Any] = {
    "name": "timm/vit_tiny_patch16_224",
    "embedding_dim": 8,
    "options": {"img_size": 16, "patch_size": 8, "embed_dim": 12, "depth": 3, "num_heads": 2},
}
CNN: dict[str, Any] = {"name": "small_cnn", "embedding_dim": 8, "options": {"width": 4}}
LAYERS = {"layer_decay": 0.5, "weight_decay_on": "matrices", "weight_decay": 0.3, "name": "adamw"}
SETTINGS = {"seed": 0}
STOP, NUM_STEPS, FROZEN_STEP = 2, 4, 1

# backbone, optimizer, and what of the trunk is trained
CASES: dict[str, tuple[dict[str, Any], dict[str, Any], set[str]]] = {
    "layers": (VIT | {"frozen_stages": 1}, LAYERS, {"blocks.1", "blocks.2", "norm.weight", "norm.bias"}),
    "adapters": (VIT | {"lora": {"rank": 2, "target_modules": ["qkv", "fc1"]}}, LAYERS, {"adapters"}),
    "stages": (CNN | {"frozen_stages": 1}, {}, {"2.0", "2.1", "3.0", "3.1"}),
}
KEYS = {"layers, 0": ("layers", 0), "layers, 2": ("layers", 2), "adapters, 2": ("adapters", 2)}
MORE_KEYS = {"layers, 3": ("layers", 3), "adapters, 0": ("adapters", 0), "adapters, 3": ("adapters", 3)}
MORE_KEYS |= {"stages, 0": ("stages", 0), "stages, 2": ("stages", 2)}


def case_config(folder: Path, case: str, stage: int) -> Config:
    backbone, optimizer, _ = CASES[case]
    rates = {"backbone_lr": 3e-3, "embedding_lr": 1e-2, "proxies_lr": 1e-2, "eps": 0.01}
    return configuration(
        backbone=backbone | {"pretrained": str(folder / f"{case}.safetensors")},
        optimizer=rates | optimizer,
        deepspeed={"zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0}},
        schedule={"name": "cosine", "warmup_steps": 1},
        training={"epochs": NUM_STEPS, "batch_size": 12, "frozen_trunk_epochs": [FROZEN_STEP + 1]},  # of one step each
    )


def write_weights(folder: Path) -> None:
    """Whoever freezes starts from weights."""
    for case, (backbone, _, _) in CASES.items():
        torch.manual_seed(5)
        plain = BackboneConfig.model_validate(backbone | {"lora": None, "frozen_stages": None})
        save_file(build_backbone(plain).trunk.state_dict(), folder / f"{case}.safetensors")


def batch_of(context: ParallelContext, number: int) -> Batch:
    """A step's 12 images, of which this rank has its part."""
    size = 12 // context.world_size
    generator = torch.Generator().manual_seed(number)
    images = torch.randint(0, 256, (12, 3, 16, 16), dtype=torch.uint8, generator=generator)
    labels = torch.randint(0, NUM_CLASSES, (12,), generator=generator)
    own = slice(context.rank * size, (context.rank + 1) * size)
    return Batch(images[own], labels[own], torch.arange(12)[own], 12, 12)


def part_of(name: str) -> str:
    """A block, or another part of the trunk, of a parameter; "" outside of it; adapters apart from their blocks."""
    module, *parts = name.split(".")
    if module != "trunk":
        return ""
    return "adapters" if any(part.startswith("lora_") for part in parts) else ".".join(parts[:2])


def trained(
    context: ParallelContext, config: Config, moving: set[str], checkpoints: Path, start: int
) -> dict[str, Any]:
    """Steps from `start`, with checkpoints at the stop and at the end: what they came to."""
    from dist_proxygml.training.loop import load_state
    from dist_proxygml.training.step import build_train_state, train_step

    state = build_train_state(config, context, steps_per_epoch=1)
    if start:
        load_state(checkpoints / f"step-{start:06d}", state, SETTINGS)
        state.step = state.schedule_step = start
    state.engine.module.train()
    writer = CheckpointWriter(checkpoints, context, Retention(9))
    rates, losses, before = [], [], {k: v.clone() for k, v in state.engine.full_state_dict().items()}
    for number in range(start, NUM_STEPS):
        report = train_step(state, [batch_of(context, number)], measure=True)
        assert report.terms is not None
        losses.append(report.terms.total.item())
        rates.append([group["lr"] for group in state.engine.optimizer.param_groups])
        if number + 1 in (STOP, NUM_STEPS):
            run = RunState(number + 1, 0, 0, context.world_size, SETTINGS)
            parts = {"engine": state.engine, "loss": state.loss, "bank_optimizer": state.bank_optimizer}
            (saved,) = writer.save(state=run, **parts)  # type: ignore[arg-type]
        if number in (FROZEN_STEP, NUM_STEPS - 1):  # what has moved, since the step before or over the last ones
            after = {k: v.clone() for k, v in state.engine.full_state_dict().items()}
            moved = {name for name, value in after.items() if not torch.equal(value, before[name])}
            statistics = {name for name in moved if "running" in name or "num_batches" in name}
            assert {part_of(name) for name in statistics} <= moving
            expected = {""} if number == FROZEN_STEP else {"", *moving}
            assert {part_of(name) for name in moved - statistics} == expected, (number, moved)
        if number == FROZEN_STEP - 1:
            before = {k: v.clone() for k, v in state.engine.full_state_dict().items()}
    return {
        "rates": rates,
        "decays": [group["weight_decay"] for group in state.engine.optimizer.param_groups],
        "losses": losses,
        "weights": {name: value.numpy() for name, value in load_file(saved.path / "backbone.safetensors").items()},
        "proxies": state.bank.proxies.detach().numpy(),
    }


def without_peft(context: ParallelContext, config: Config, checkpoint: Path) -> None:
    """What a process without peft makes of a checkpoint is what training's own evaluation embeds."""
    from dist_proxygml.training.evaluate import backbone_of_one_rank
    from dist_proxygml.training.loop import load_state
    from dist_proxygml.training.step import build_train_state

    images = batch_of(context, 0).images
    with torch.no_grad():
        state = build_train_state(config, context, steps_per_epoch=1)
        load_state(checkpoint, state, SETTINGS)
        evaluated = backbone_of_one_rank(state).eval()(images)
        adapted = state.engine.module.eval()(images)
        peft = sys.modules["peft"]
        sys.modules["peft"] = None  # type: ignore[assignment]
        plain = build_backbone(config.backbone, load_pretrained=False)
        load_backbone(checkpoint, plain)
        sys.modules["peft"] = peft
        assert torch.equal(plain.eval()(images), evaluated)
        torch.testing.assert_close(adapted, evaluated, rtol=0, atol=1e-5)


def all_of(context: ParallelContext, folder: Path, keys: dict[str, tuple[str, int]]) -> dict[str, dict[str, Any]]:
    """Two ranks train, and go on from their stop; three go on from there, too; one trains, and looks at the end."""
    found = {}
    for key, (case, stage) in keys.items():
        config, moving = case_config(folder, case, stage), CASES[case][2]
        of_two = folder / "2" / key
        if context.world_size == 2:
            found[key] = trained(context, config, moving, of_two, 0)
            again = trained(context, config, moving, of_two, STOP)
            for name, value in {**again["weights"], "proxies": again["proxies"]}.items():
                np.testing.assert_array_equal(value, {**found[key]["weights"], **found[key]}[name], err_msg=name)
            assert again["losses"] == found[key]["losses"][STOP:]
        elif context.world_size == 3:
            found[key] = trained(context, config, moving, of_two, STOP)
        else:
            found[key] = trained(context, config, moving, folder / "1" / key, 0)
            if config.backbone.lora is not None:
                without_peft(context, config, of_two / f"step-{NUM_STEPS:06d}")
    return found


def whole(ranks: list[dict[str, dict[str, Any]]], key: str) -> dict[str, np.ndarray]:
    return ranks[0][key]["weights"] | {"proxies": np.concatenate([rank[key]["proxies"] for rank in ranks])}


def assert_close(found: dict[str, np.ndarray], expected: dict[str, np.ndarray], what: str) -> None:
    """To rounding: sums over images are in another order on other ranks."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-4, atol=2e-5, err_msg=f"{what}: {name}")


@pytest.mark.timeout(300)
@pytest.mark.parametrize("keys", [KEYS, pytest.param(MORE_KEYS, marks=pytest.mark.ci)], ids=["some", "others"])
def test_all_is_the_same_on_any_ranks_and_stage_and_after_stops(
    tmp_path: Path, keys: dict[str, tuple[str, int]]
) -> None:
    write_weights(tmp_path)
    two, one, three = (run_ranks(all_of, ranks, tmp_path, keys, timeout=250) for ranks in (2, 1, 3))
    for key, (case, _) in keys.items():
        expected = whole(two, key)
        assert_close(whole(one, key), expected, f"{key}, one rank")
        assert_close(whole(three, key), expected, f"{key}, continued on three ranks")
        other = next(other for other, (its, _) in keys.items() if its == case)
        assert_close(expected, whole(two, other), f"{key} as {other}")  # of another stage
        plain = build_backbone(BackboneConfig.model_validate(CASES[case][0]), load_pretrained=False)
        assert set(expected) == {*plain.state_dict(), "proxies"}

        # The frozen stem and block have no group; other layers have one with weight decay and one without.
        factors = {"layers": [0.5**2, 0.5**2, 0.5, 0.5], "adapters": [0.5**3, 0.5**2, 0.5], "stages": [1.0]}[case]
        of_layer = [1e-2] if case == "stages" else [1e-2, 1e-2]
        decays = {"layers": [0.3, 0.0] * 3, "adapters": [0.3, 0.3, 0.3, 0.3, 0.0], "stages": [0.0, 0.0]}[case]
        assert two[0][key]["decays"] == decays
        for number, rates in enumerate(two[0][key]["rates"]):
            schedule = 1.0 if number == 0 else (1 + np.cos(np.pi * (number - 1) / 3)) / 2
            trunk = 0.0 if number == FROZEN_STEP else 3e-3 * schedule
            wanted = [*(trunk * factor for factor in factors), *(rate * schedule for rate in of_layer)]
            np.testing.assert_allclose(rates, wanted, rtol=1e-12, err_msg=f"{key}, {number}")

        # What lies in a checkpoint, and what another run starts from, is merged.
        if case == "adapters":
            base = load_file(tmp_path / "adapters.safetensors")
            moved = {name for name, value in base.items() if not np.array_equal(expected[f"trunk.{name}"], value)}
            assert moved == {f"blocks.{n}.{layer}.weight" for n in range(3) for layer in ("attn.qkv", "mlp.fc1")}


# ---- a whole run -----------------------------------------------------------------------------------------------------


def run_config(root: Path, name: str, backbone: dict[str, Any], **checkpoint: Any) -> Config:
    return configuration(
        name=name,
        runs_dir=str(root / "runs"),
        data={
            "shards": str(root / "shards"),
            "train_split": "test",  # the only one that the noise shards have
            "test_split": None,
            "validation_classes": 3,
            "num_workers": 0,
            "train_transform": {"name": "resize", "size": 16},
            "test_transform": {"name": "resize", "size": 16},
        },
        backbone=backbone,
        optimizer={"backbone_lr": 3e-3, "proxies_lr": 1e-2, **LAYERS},
        training={"epochs": 1, "batch_size": 12},
        schedule={"name": "constant"},
        evaluation={"batch_size": 8, "recall_at": [1], "kmeans_seeds": 0, "raw_pixels": False},
        checkpoint={"keep_last": 1, **checkpoint},
        telemetry={"progress_bar": False, "log_every_steps": 1},
    )


def train_runs(context: ParallelContext, root: Path) -> None:
    """A run with adapters; one that starts from it, whole, and with its first block frozen."""
    from dist_proxygml.training.run import train

    weights = {"pretrained": str(root / "adapters.safetensors")}
    train(run_config(root, "adapters", VIT | weights | {"lora": {"rank": 2}}), context)
    train(run_config(root, "next", VIT | {"frozen_stages": 1}, init_from=str(root / "runs" / "adapters")), context)


@pytest.mark.timeout(240)
def test_a_run_with_adapters_is_evaluated_exported_and_started_from_without_peft(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_weights(tmp_path)
    write_noise_shards(tmp_path / "shards", [5, 4, 6, 3, 5, 4, 5, 4])
    run_ranks(train_runs, 1, tmp_path, timeout=200)
    run, out = tmp_path / "runs" / "adapters", tmp_path / "export"
    facts = json.loads((run / "run.json").read_text())
    num_adapted = 3 * (2 * (12 + 36) + 2 * (12 + 12))  # A and B of qkv and proj, in each block
    assert facts["trained_parameters"] == num_adapted + 12 * 8 + 8
    assert f"({facts['trained_parameters']:,} of them trained)" in (run / "report.html").read_text()

    monkeypatch.setitem(sys.modules, "peft", None)
    stored = json.loads(next(run.glob("evaluation/validation-step-00000[1-9].json")).read_text())
    evaluate(["--run", str(run), "--validation"])
    again = json.loads(next(run.glob("evaluation/validation-step-00000[1-9].json")).read_text())
    assert again["metrics"] == stored["metrics"]
    assert export(["--run", str(run), "--out", str(out), "--verify"]) == 0
    about = json.loads((out / "export.json").read_text())
    assert "lora" not in about["backbone"]
    of_run, of_export = Embedder.from_run(run), Embedder.from_run(out)
    assert model_difference(of_run.about, of_export.about) is None
    images = torch.randint(0, 256, (4, 3, 16, 16), dtype=torch.uint8)
    np.testing.assert_array_equal(of_run.embed(images), of_export.embed(images))
    of_timm = timm.create_model(f"local-dir:{out}", pretrained=True)
    assert of_timm.num_classes == 8  # the embedding layer in the place of a classifier

    (last,) = run.glob("checkpoints/step-*/backbone.safetensors")
    (following,) = (tmp_path / "runs" / "next").glob("checkpoints/step-*/backbone.safetensors")
    before, after = load_file(last), load_file(following)
    base = load_file(tmp_path / "adapters.safetensors")
    same = {name for name, value in before.items() if torch.equal(value, after[name])}
    assert {part_of(name) for name in same} == {"cls_token", "pos_embed", "patch_embed.proj", "blocks.0"}
    assert not torch.equal(after["trunk.blocks.0.attn.qkv.weight"], base["blocks.0.attn.qkv.weight"])
