"""A new run takes over what a trained one knows: rows of proxies by class name, bit by bit, on any number of ranks."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from dist_proxygml.backbones.build import build_backbone
from dist_proxygml.checkpoint import folder
from dist_proxygml.checkpoint.folder import find_checkpoint
from dist_proxygml.checkpoint.model import open_trained
from dist_proxygml.config import BackboneConfig, parse_config
from dist_proxygml.data.index import ClassEntry
from dist_proxygml.distributed.collectives import AgreedError
from dist_proxygml.distributed.parallel import ParallelContext, run_on_rank_zero, run_together, single_process
from dist_proxygml.head.loss import ProxyLoss
from dist_proxygml.head.partition import ClassPartition
from dist_proxygml.head.proxies import initial_proxies
from dist_proxygml.training import transfer as transferring
from dist_proxygml.training.run import train
from dist_proxygml.training.step import build_loss
from dist_proxygml.training.transfer import copy_rows_, match_classes, open_transfer
from tests.harness import run_ranks
from tests.long_work import lasting
from tests.shards_of_noise import write_noise_shards
from tests.trained_runs import STEP, configuration, read_class_names, write_class_names, write_run

Runs = dict[str, dict[str, np.ndarray]]

# Class names of trained runs: seven, uneven over three ranks, and two, which leave the third rank without any.
TRAINED = {"seven": "gull owl wren kite dove lark swan".split(), "two": ["lark", "owl"]}
# ... and of runs that start from them: in another order, with new ones, without some; two are too few for four ranks.
NEW = {
    "other order": "swan auk dove ibis gull wren coot kite".split(),
    "crow and owl": ["crow", "owl"],
    "one more": [*TRAINED["seven"], "crow"],
}


# Heads on the same proxies; the one of the runs above is a top-k of all.
HEADS: dict[str, dict[str, Any]] = {
    "top-k": {"per_class": 2, "topk": 5},
    "softmax": {
        **{"per_class": 2, "negatives": "all", "scale": 6.0, "learn_scale": True, "class_score": "softmax"},
        "margin": {"name": "cosface", "margin": 0.2},
    },
    "sampled": {"per_class": 2, "negatives": "sampled", "share": 0.5},
}


def names(folder: Path, classes: list[str]) -> Path:
    """Shards whose classes have these names; source ids say nothing."""
    write_class_names(folder, [(name, f"id {number}") for number, name in enumerate(classes)])
    return folder


def write_runs(context: ParallelContext, root: Path, runs: dict[str, dict[str, Any]]) -> Runs:
    written = {}
    for name, changes in runs.items():
        shards = changes.pop("shards", name)
        num_classes = 3 if shards is None else read_class_names(root / "shards" / shards).num_classes
        config = configuration(name, root / "runs", num_classes, seed=5, **changes)
        written[name] = write_run(context, config, None if shards is None else root / "shards" / shards)
    return written


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Runs]:
    """Runs that three ranks have written, and all their proxies."""
    root = tmp_path_factory.mktemp("trained")
    for name, classes in {**TRAINED, **NEW}.items():
        names(root / "shards" / name, classes)
    # as the index has shards without class names
    for name, num_classes in (("numbers", 3), ("other numbers", 3), ("more numbers", 4)):
        write_class_names(root / "shards" / name, [(str(label), label) for label in range(num_classes)])
    runs: dict[str, dict[str, Any]] = {"seven": {}, "two": {}, "numbers": {}, "stream": {"shards": None}}
    runs["softmax"] = {"shards": "seven", "proxies": HEADS["softmax"]}
    ranks = run_ranks(write_runs, 3, root, runs, timeout=180)
    whole = {
        name: {
            **ranks[0][name],
            "proxies": np.concatenate([rank[name]["proxies"] for rank in ranks]),
        }
        for name in runs
    }
    return root, whole


def take_over(
    context: ParallelContext, root: Path, pairs: list[tuple[str, str]], unit_norm: bool = False
) -> list[tuple[np.ndarray, np.ndarray, str]]:
    """Of each (run, shards): this rank's initial proxies, those after the transfer, and what is told."""
    found = []
    for run, shards in pairs:
        index = read_class_names(root / "shards" / shards)
        checkpoint = {"init_from": str(root / "runs" / run)}
        config = configuration("new", root / "runs", index.num_classes, checkpoint=checkpoint)
        transfer = open_transfer(config, index, context)
        assert transfer is not None
        proxies = initial_proxies(
            ClassPartition(config.num_trained_classes, context.world_size, context.rank), 2, 4, seed=0
        )
        before = proxies.numpy().copy()
        transfer.load_proxies_(proxies, context, unit_norm=unit_norm)
        found.append((before, proxies.numpy(), str(transfer)))
    return found


@pytest.mark.timeout(240)
@pytest.mark.parametrize("world_size", [1, 4])
def test_classes_of_the_same_name_keep_their_proxies_bit_by_bit(trained: tuple[Path, Runs], world_size: int) -> None:
    root, runs = trained
    pairs = [("seven", "other order"), ("seven", "crow and owl"), ("two", "crow and owl"), ("seven", "one more")]
    alone = [take_over(single_process(), root, pairs)] if world_size == 1 else None
    ranks = alone or run_ranks(take_over, world_size, root, pairs, timeout=180)
    for number, (run, shards) in enumerate(pairs):
        before, after = (np.concatenate([rank[number][moment] for rank in ranks]) for moment in (0, 1))
        known = dict(zip(TRAINED[run], runs[run]["proxies"], strict=True))
        expected = [known.get(name, initial) for name, initial in zip(NEW[shards], before, strict=True)]
        np.testing.assert_array_equal(after, np.stack(expected), err_msg=f"{run} -> {shards}")
    where = root / "runs" / "seven" / "checkpoints" / f"step-{STEP:06d}"
    assert {rank[0][2] for rank in ranks} == {
        f"from {where}, step 30: its backbone, and proxies of 5 of 8 classes (3 new, 2 dropped)"
    }


def take_over_slowly(context: ParallelContext, root: Path) -> str:
    with lasting((folder, "verify_checkpoint"), (transferring, "_rows_by_name")):
        return take_over(context, root, [("seven", "other order")])[0][2]


def test_a_model_that_takes_long_to_verify_and_to_match_is_waited_for(trained: tuple[Path, Runs]) -> None:
    root, _ = trained
    for told in run_ranks(take_over_slowly, 2, root):
        assert "proxies of 5 of 8 classes" in told


@pytest.mark.parametrize(("run", "head"), [("seven", "softmax"), ("seven", "sampled"), ("softmax", "top-k")])
def test_another_head_keeps_the_proxies_of_the_same_classes(trained: tuple[Path, Runs], run: str, head: str) -> None:
    """What only the new head learns, its scale, starts where the new run says."""
    root, runs = trained
    index = read_class_names(root / "shards" / "other order")
    checkpoint = {"init_from": str(root / "runs" / run)}
    config = configuration("new", root / "runs", 8, checkpoint=checkpoint, proxies=HEADS[head])
    transfer = open_transfer(config, index, single_process())
    assert transfer is not None
    model, loss = build_backbone(config.backbone), build_loss(config, single_process())
    transfer.load_backbone_(model)
    for name, value in model.state_dict().items():
        np.testing.assert_array_equal(value.numpy(), runs[run][name])
    assert isinstance(loss, ProxyLoss)
    before = loss.proxies.detach().clone()
    transfer.load_proxies_(loss.proxies.detach(), single_process(), unit_norm=False)
    known = dict(zip(TRAINED["seven"], runs[run]["proxies"], strict=True))
    expected = [known.get(name, initial) for name, initial in zip(NEW["other order"], before.numpy(), strict=True)]
    np.testing.assert_array_equal(loss.proxies.detach().numpy(), np.stack(expected))
    assert loss.scale == pytest.approx(HEADS[head].get("scale", 1.0), rel=1e-6)
    assert transfer.other_network(config.backbone) is None


def test_weights_that_fit_another_network_are_told(trained: tuple[Path, Runs]) -> None:
    root, _ = trained
    checkpoint = {"init_from": str(root / "runs" / "seven")}
    config = configuration("new", root / "runs", 8, checkpoint=checkpoint)
    transfer = open_transfer(config, read_class_names(root / "shards" / "other order"), single_process())
    assert transfer is not None
    whole = config.backbone.model_dump(mode="json")
    other = {"mean": [0.5] * 3, "std": [0.25] * 3, "embedding_norm": "layer_norm", "channels_last": True}
    told = transfer.other_network(BackboneConfig.model_validate_json(json.dumps(whole | other)))
    assert told is not None
    for part in ("backbone.mean None, here [0.5, 0.5, 0.5]", "backbone.embedding_norm None, here layer_norm"):
        assert part in told
    assert "channels_last" not in told
    training_only = {"matryoshka_dims": [2], "gradient_checkpointing": True, "batch_norm": "frozen", "frozen_stages": 1}
    assert transfer.other_network(BackboneConfig.model_validate_json(json.dumps(whole | training_only))) is None
    changed = whole | {"options": {"width": 6}}  # would be refused by its shapes, too
    told = transfer.other_network(BackboneConfig.model_validate_json(json.dumps(changed)))
    assert told is not None
    assert "backbone.options.width 4, here 6" in told


def test_with_unit_norm_all_proxies_have_length_1(trained: tuple[Path, Runs]) -> None:
    root, runs = trained
    [(_, proxies, _)] = take_over(single_process(), root, [("seven", "one more")], unit_norm=True)
    np.testing.assert_allclose(np.linalg.norm(proxies, axis=-1), 1, rtol=1e-6)
    expected = runs["seven"]["proxies"] / np.linalg.norm(runs["seven"]["proxies"], axis=-1, keepdims=True)
    np.testing.assert_allclose(proxies[:7], expected, rtol=1e-5)


# ---- what is refused -------------------------------------------------------------------------------------------------


def refusals(context: ParallelContext, root: Path, cases: dict[str, dict[str, Any]]) -> dict[str, str]:
    """What each case is refused with on this rank."""
    told = {}
    for case, changes in cases.items():
        index = read_class_names(root / "shards" / changes.get("shards", "other order"))
        sections = {key: value for key, value in changes.items() if key in ("backbone", "proxies")}
        checkpoint = {
            "init_from": str(changes.get("path", root / "runs" / "seven")),
            "init_proxies": not changes.get("backbone_only"),
        }
        name = changes.get("name", "new")
        config = configuration(name, root / "runs", index.num_classes, checkpoint=checkpoint, **sections)
        try:
            transfer = open_transfer(config, index, context)
            assert transfer is not None
            backbone = build_backbone(config.backbone)
            run_together(context, transfer.load_backbone_, backbone)
            transfer.load_proxies_(torch.zeros(len(transfer.rows_c), 2, 4), context, unit_norm=False)  # type: ignore[arg-type]
        except AgreedError as error:
            told[case] = str(error)
    return told


@pytest.mark.timeout(240)
def test_what_does_not_fit_is_refused_on_all_ranks_alike(trained: tuple[Path, Runs], tmp_path: Path) -> None:
    root, _ = trained
    checkpoint = root / "runs" / "seven" / "checkpoints" / f"step-{STEP:06d}"
    for copied in ("alone", "damaged", "wrong names", "no table"):
        shutil.copytree(checkpoint, tmp_path / copied / checkpoint.name)
    bank = next((tmp_path / "damaged" / checkpoint.name / "bank").glob("*.distcp"))
    content = bytearray(bank.read_bytes())
    content[len(content) // 2] ^= 1
    bank.write_bytes(content)
    table = (root / "runs" / "seven" / "classes.jsonl").read_text()
    (tmp_path / "wrong names" / checkpoint.name / "classes.jsonl").write_text(table.replace("gull", "puffin"))
    (tmp_path / "no table" / checkpoint.name / "classes.jsonl").write_text(table[:-5])
    (tmp_path / "nothing").mkdir()
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)

    numbers = root / "runs" / "numbers"
    wide = {"name": "small_cnn", "embedding_dim": 4, "options": {"width": 6}}
    cases: dict[str, tuple[dict[str, Any], list[str]]] = {
        "other D": (
            {"backbone": {"name": "small_cnn", "embedding_dim": 5, "options": {"width": 4}}},
            ["backbone.embedding_dim is 5, but the proxies of", "have 4; set it to 4, or checkpoint.init_proxies"],
        ),
        "other N": (
            {"proxies": {"per_class": 3, "ratio": 0.9}},
            ["proxies.per_class is 3, but the proxies of", "have 2; set it to 2"],
        ),
        "other backbone": ({"backbone": wide}, [f"{checkpoint}/backbone.safetensors does not fit the configured"]),
        "nothing in common": (
            {"path": root / "runs" / "two"},
            ["in common, found none: the 2 of the one (lark, owl) are not among the 8 of the other (swan, auk, ...)"],
        ),
        "numbers": (
            {"path": numbers, "shards": "more numbers"},
            ["expected class names", f"the classes of {numbers}", "numbers only", '"class_name"'],
        ),
        "the same numbers": (
            {"path": numbers, "shards": "other numbers"},
            ["expected class names", f"the classes of {numbers}", "numbers only"],
        ),
        "numbers here": (
            {"shards": "more numbers"},
            ["expected class names", f"the classes of {root}/shards/more numbers", "numbers only"],
        ),
        "a stream": ({"path": root / "runs" / "stream"}, ["no class names: it was trained on a stream"]),
        "damaged": ({"path": tmp_path / "damaged" / checkpoint.name}, ["is damaged: bank/", "sha256"]),
        "alone": (
            {"path": tmp_path / "alone" / checkpoint.name},
            [
                f"expected the class names of {tmp_path}/alone/{checkpoint.name} at {tmp_path}/classes.jsonl",
                "index.classes.train.jsonl of the shards that it was trained on",
                f"to {tmp_path}/alone/{checkpoint.name}/classes.jsonl",
            ],
        ),
        "wrong names": (
            {"path": tmp_path / "wrong names" / checkpoint.name},
            ["wrong names/step-000030/classes.jsonl is not the class table of", "expected sha256"],
        ),
        "no table": ({"path": tmp_path / "no table" / checkpoint.name}, ["is not a table of classes (", "copy"]),
        "a folder": ({"path": tmp_path / "nothing"}, ["or an export at", "found a folder without any of their files"]),
        "no folder": ({"path": tmp_path / "not there"}, ["or an export at", "found no folder"]),
        "no checkpoint": ({"path": tmp_path / "run"}, ["expected a whole checkpoint in", "train the run first"]),
        "itself": ({"name": "seven"}, ["lies in the folder of this very run"]),
    }
    ranks = run_ranks(refusals, 2, root, {case: changes for case, (changes, _) in cases.items()}, timeout=180)
    assert ranks[0] == ranks[1]
    assert ranks[0].keys() == cases.keys()
    for case, (_, parts) in cases.items():
        for part in parts:
            assert part in ranks[0][case], case

    # remedies: the class table beside the lone checkpoint, the same shards, the backbone only
    (tmp_path / "alone" / checkpoint.name / "classes.jsonl").write_text(table)
    accepted = {
        "a copied table": {"path": tmp_path / "alone" / checkpoint.name},
        "numbers of the same shards": {"path": numbers, "shards": "numbers"},
    }
    assert refusals(single_process(), root, accepted) == {}


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"checkpoint": {"init_proxies": False}}, "init_from.*init_proxies"),
        (
            {"data": {"mode": "stream", "stream": {"urls": "x.tar", "samples_per_epoch": 6}}},
            r"checkpoint\.init_proxies.*checkpoint\.init_from.*stream",
        ),
    ],
)
def test_settings_that_contradict_each_other_are_refused(
    tmp_path: Path, sections: dict[str, dict[str, Any]], message: str
) -> None:
    whole = configuration("new", tmp_path, 8).model_dump(mode="json")
    checkpoint = whole["checkpoint"] | {"init_from": "runs/old"}
    parse_config(whole | {"checkpoint": checkpoint}, source="the test")
    changed = {"data": whole["data"] | sections.get("data", {}), "checkpoint": sections.get("checkpoint", checkpoint)}
    with pytest.raises(ValueError, match=message):
        parse_config(whole | changed, source="the test")
    if "data" in sections:
        parse_config(whole | changed | {"checkpoint": checkpoint | {"init_proxies": False}}, source="the test")


def test_a_backbone_alone_comes_in_the_precision_of_the_new_run(trained: tuple[Path, Runs]) -> None:
    """One rank, without a process group: weights are copied into the new run's precision, proxies left alone."""
    root, runs = trained
    index = read_class_names(root / "shards" / "more numbers")
    checkpoint = {"init_from": str(root / "runs" / "stream"), "init_proxies": False}
    config = configuration("new", root / "runs", index.num_classes, checkpoint=checkpoint)
    transfer = open_transfer(config, index, single_process())
    assert transfer is not None
    model = build_backbone(config.backbone).to(torch.bfloat16)
    wanted = {name: parameter.requires_grad_(name.startswith("trunk")) for name, parameter in model.named_parameters()}
    transfer.load_backbone_(model)
    for name, value in model.state_dict().items():
        np.testing.assert_array_equal(
            value.float().numpy(), torch.from_numpy(runs["stream"][name]).to(value.dtype).float().numpy()
        )
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert {n: p.requires_grad for n, p in model.named_parameters()} == {n: p.requires_grad for n, p in wanted.items()}
    proxies = torch.ones(4, 2, 4)
    transfer.load_proxies_(proxies, single_process(), unit_norm=False)
    assert bool((proxies == 1).all())
    assert str(transfer).endswith("step 30: its backbone; what the loss learns of all 4 classes is new")


# ---- rows and names --------------------------------------------------------------------------------------------------


class NotedBank:
    """A bank of 10 classes in two parts that notes what is read."""

    shape = (10, 1, 2)
    values = torch.arange(20.0).view(10, 1, 2)

    def __init__(self) -> None:
        self.ranges: list[tuple[int, int]] = []

    def parts(self) -> list[tuple[int, int]]:
        return [(0, 4), (4, 10)]

    def read_(self, rows_xND: torch.Tensor, *, first: int) -> None:
        self.ranges.append((first, first + len(rows_xND)))
        rows_xND.copy_(self.values[first : first + len(rows_xND)])


@pytest.mark.parametrize(
    ("rows", "ranges"),
    [
        ([7, -1, 5, 7], [(5, 8)]),
        ([4, 3], [(3, 4), (4, 5)]),
        ([9, 0, 2], [(0, 3), (9, 10)]),
        ([-1, -1], []),
        ([], []),
    ],
)
def test_a_rank_reads_only_the_range_of_each_part_that_its_rows_lie_in(
    rows: list[int], ranges: list[tuple[int, int]]
) -> None:
    bank = NotedBank()
    proxies = torch.full((len(rows), 1, 2), -5.0)
    copy_rows_(proxies, bank, np.array(rows, np.int64))
    assert bank.ranges == ranges
    expected = [bank.values[row] if row >= 0 else torch.full((1, 2), -5.0) for row in rows]
    assert torch.equal(proxies, torch.stack(expected) if rows else torch.zeros(0, 1, 2))


def entries(*classes: tuple[str, int | str]) -> list[ClassEntry]:
    return [ClassEntry(label, name, source_id, 1) for label, (name, source_id) in enumerate(classes)]


def test_classes_are_found_by_name_and_where_names_repeat_by_name_and_id() -> None:
    stored = entries(("owl", 1), ("kite", "a"), ("kite", "b"), ("1", "1"), ("4", 4), ("swan", 6))
    new = entries(("kite", "b"), ("owl", 77), ("swan", 6), ("kite", "c"), ("4", 4), ("1", "x"), ("swan", 7))
    # kite comes twice in the one table, swan in the other; the new "4" of label 4 is a number, as is the stored one
    assert match_classes(new, stored).tolist() == [2, 0, 5, -1, -1, 3, -1]
    assert match_classes([], stored).tolist() == []


# ---- a whole run -----------------------------------------------------------------------------------------------------


def start_and_start_again(context: ParallelContext, root: Path) -> list[dict[str, np.ndarray]]:
    """A run on three classes, one that starts from it on five, and the same again after the first is gone; of each the
    backbone and the proxies at its end. What there is to learn is too little to change a number.
    """
    found = []

    def run(name: str, num_classes: int, epochs: int, **changes: Any) -> None:
        transform = {"name": "resize", "size": 8}
        config = configuration(
            name,
            root / "runs",
            num_classes,
            data={
                "shards": str(root / f"{num_classes} classes"),
                "train_split": "test",  # the only one that the noise shards have
                "num_classes": num_classes,
                "num_workers": 0,
                "train_transform": transform,
                "test_transform": transform,
            },
            backbone={"name": "small_cnn", "embedding_dim": 4, "batch_norm": "frozen", "options": {"width": 4}},
            optimizer={"backbone_lr": 1e-30, "proxies_lr": 1e-30},
            training={"epochs": epochs, "batch_size": 6},
            evaluation={"at_start": False, "every_epochs": 0, "kmeans_seeds": 0, "allow_seen_classes": True},
            telemetry={"progress_bar": False},
            **changes,
        )
        checkpoint = find_checkpoint(train(config, context) / "checkpoints", "auto")
        assert checkpoint is not None
        bank = open_trained(checkpoint).bank()
        proxies = torch.zeros(bank.shape)
        copy_rows_(proxies, bank, np.arange(num_classes))
        found.append(load_file(checkpoint / "backbone.safetensors") | {"proxies": proxies.numpy()})

    start = {
        "seed": 1,
        "proxies": {"per_class": 2, "ratio": 0.9, "initialization": "class_mean"},
        "checkpoint": {"init_from": str(root / "runs" / "first")},
        "deepspeed": {"zero_optimization": {"stage": 1}},  # the engine has a copy of the weights
    }
    run("first", 3, 1, seed=0, proxies={"per_class": 2, "ratio": 0.9})
    run("second", 5, 1, **start)
    run_on_rank_zero(context, shutil.rmtree, root / "runs" / "first")
    run("second", 5, 2, **start)
    return found


@pytest.mark.timeout(240)
def test_a_run_starts_from_another_one_and_goes_on_without_it(tmp_path: Path) -> None:
    for sizes in ([5, 4, 6], [5, 1, 7, 4, 6]):  # "pattern 0" and so on are classes of both
        write_noise_shards(tmp_path / f"{len(sizes)} classes", sizes)
    first, second, third = run_ranks(start_and_start_again, 1, tmp_path, timeout=180)[0]
    assert all(np.abs(first[name]).max() > 0.01 for name in ("embedding.weight", "proxies"))
    for name in first.keys() - {"proxies"}:  # a bias of 0 has moved by 1e-30
        np.testing.assert_allclose(second[name], first[name], rtol=0, atol=1e-20, err_msg=name)
    np.testing.assert_array_equal(second["proxies"][:3], first["proxies"])
    np.testing.assert_allclose(np.linalg.norm(second["proxies"][3:], axis=-1), 1, rtol=1e-6)  # class means
    assert np.linalg.norm(first["proxies"], axis=-1).max() < 0.9
    for name in second:
        np.testing.assert_allclose(third[name], second[name], rtol=0, atol=1e-20, err_msg=name)
    assert json.loads((tmp_path / "runs" / "second" / "config.json").read_text())["checkpoint"]["init_from"]
    state = json.loads((tmp_path / "runs" / "second" / "checkpoints" / "step-000008" / "state.json").read_text())
    assert state["epoch"] == 2
