"""What is exported is what was trained, whole or not at all; anybody reads it, a new run starts from it."""

import hashlib
import importlib.util
import json
import pickle
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from dist_proxygml.backbones.build import EmbeddingModel, build_backbone
from dist_proxygml.checkpoint import model as trained_module
from dist_proxygml.checkpoint.model import EXPORT, open_trained
from dist_proxygml.checkpoint.writer import load_backbone
from dist_proxygml.config import BackboneConfig, load_config
from dist_proxygml.distributed.parallel import ParallelContext, single_process
from dist_proxygml.export import main
from dist_proxygml.inference import export_folder
from dist_proxygml.inference.export_check import original_backbone
from dist_proxygml.inference.export_folder import export
from dist_proxygml.storage.folder import hash_files, seal
from dist_proxygml.training.transfer import open_transfer
from tests.harness import run_ranks
from tests.trained_runs import configuration, read_class_names, write_class_names, write_run

NAMES = ["gull", "owl", "wren", "kité", "dove", "lark", "swan"]  # uneven over two ranks
CHECKPOINT = "step-000030"
DEMO = Path(__file__).parents[2] / "shards" / "demo"

needs_onnx = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("onnx", "onnxscript", "onnxruntime")),
    reason="needs ONNX: pip install '.[export]'",
)


def write_runs(context: ParallelContext, root: Path) -> list[dict[str, np.ndarray]]:
    named = configuration("named", root / "runs", len(NAMES))
    stream = configuration("stream", root / "runs", 3)
    half = configuration("half", root / "runs", 3, deepspeed={"bf16": {"enabled": True}})
    written = [write_run(context, named, root / "shards"), write_run(context, stream, None)]
    write_run(context, half, None)
    return written


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, np.ndarray]]:
    """The folder of a run that two ranks have written, beside it one on a stream and one in bfloat16, and the first
    one's numbers.
    """
    root = tmp_path_factory.mktemp("trained")
    write_class_names(root / "shards", [(name, number) for number, name in enumerate(NAMES, start=1)])
    ranks = run_ranks(write_runs, 2, root, timeout=180)
    proxies = np.concatenate([rank[0]["proxies"] for rank in ranks])
    return root / "runs" / "named", ranks[0][0] | {"proxies": proxies}


def names_below(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.timeout(240)
def test_the_command_writes_what_was_trained_without_deepspeed(
    trained: tuple[Path, dict[str, np.ndarray]], tmp_path: Path
) -> None:
    run, numbers = trained
    out = tmp_path / "exports" / "birds"
    arguments = ["--run", str(run), "--checkpoint", CHECKPOINT, "--out", str(out)]
    program = (
        "import runpy, sys; sys.modules['deepspeed'] = None; sys.argv = ['export', *sys.argv[1:]]; "
        "runpy.run_module('dist_proxygml.export', run_name='__main__')"
    )
    result = subprocess.run(
        [sys.executable, "-c", program, *arguments], capture_output=True, text=True, timeout=100, check=False
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout == (
        f"exported {run}/checkpoints/{CHECKPOINT} to {out}: small_cnn, and 7 classes x 2 proxies of dimension 4\n"
    )
    assert names_below(out) == ["README.md", "backbone.safetensors", "bank.safetensors", "classes.jsonl", "export.json"]
    assert names_below(out.parent) == ["birds"]

    bank = load_file(out / "bank.safetensors")
    assert bank.keys() == {"proxies"}
    assert bank["proxies"].dtype == torch.float32
    np.testing.assert_array_equal(bank["proxies"].numpy(), numbers["proxies"])
    with safe_open(out / "bank.safetensors", framework="np") as file:  # its numbers are aligned
        np.testing.assert_array_equal(file.get_slice("proxies")[5:7], numbers["proxies"][5:7])
    assert [json.loads(line)[:2] for line in (out / "classes.jsonl").open()] == [
        [name, number] for number, name in enumerate(NAMES, start=1)
    ]

    about = json.loads((out / "export.json").read_text())
    assert (about["kind"], about["version"]) == ("dist-proxygml-export", 1)
    assert (about["run"], about["step"]) == ("named", 30)
    assert (about["num_classes"], about["proxies_per_class"], about["embedding_dim"]) == (7, 2, 4)
    assert about["preprocessing"] == {"name": "resize", "size": 16}
    assert (about["formats"], about["precision"], about["opset"]) == (["safetensors"], "float32", None)
    assert about["verification"] is None
    assert about["written_with"]["torch"] == torch.__version__.partition("+")[0]
    assert about["files"] == {
        path.name: {"sha256": hashlib.sha256(path.read_bytes()).hexdigest(), "bytes": path.stat().st_size}
        for path in out.iterdir()
        if path.name != "export.json"
    }
    model = build_backbone(BackboneConfig.model_validate(about["backbone"]), load_pretrained=False)
    load_backbone(out, model)
    for name, value in model.state_dict().items():
        np.testing.assert_array_equal(value.numpy(), numbers[name], err_msg=name)


def test_a_new_run_starts_from_an_export_as_from_its_checkpoint(
    trained: tuple[Path, dict[str, np.ndarray]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, numbers = trained
    export(run, tmp_path / "birds")
    monkeypatch.setattr(trained_module, "_BYTES_AT_A_TIME", 2 * 4 * 2 * 4)  # two classes
    write_class_names(tmp_path / "shards", [("swan", 1), ("puffin", 2), ("gull", 3), ("kité", 4)])
    index = read_class_names(tmp_path / "shards")
    for source in (tmp_path / "birds", run):
        checkpoint = {"init_from": str(source)}
        config = configuration("new", tmp_path / "runs", index.num_classes, checkpoint=checkpoint)
        transfer = open_transfer(config, index, single_process())
        assert transfer is not None
        assert "step 30: its backbone, and proxies of 3 of 4 classes (1 new, 4 dropped)" in str(transfer)
        proxies = torch.full((4, 2, 4), 9.0)
        transfer.load_proxies_(proxies, single_process(), unit_norm=False)
        expected = [numbers["proxies"][6], np.full((2, 4), 9.0), numbers["proxies"][0], numbers["proxies"][3]]
        np.testing.assert_array_equal(proxies.numpy(), np.stack(expected))


def test_a_run_on_a_stream_is_exported_without_names(
    trained: tuple[Path, dict[str, np.ndarray]], tmp_path: Path
) -> None:
    told = export(trained[0].with_name("stream"), tmp_path / "stream")
    assert told.endswith("3 classes x 2 proxies of dimension 4, without class names, as it was trained on a stream")
    assert names_below(tmp_path / "stream") == ["README.md", "backbone.safetensors", "bank.safetensors", "export.json"]
    with pytest.raises(ValueError, match=r"class names.*stream"):
        open_trained(tmp_path / "stream").classes()


# ---- graphs, and whether they are what was trained -------------------------------------------------------------------


@needs_onnx
@pytest.mark.timeout(240)
def test_every_format_gives_what_the_checkpoint_gives_by_the_code_of_its_card(
    trained: tuple[Path, dict[str, np.ndarray]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run, _ = trained
    out = tmp_path / "birds"
    arguments = ["--run", run, "--out", out, "--format", "onnx,safetensors", "--format", "onnx"]
    arguments += ["--verify", "--data", DEMO, "--opset", "21"]
    assert main([str(argument) for argument in arguments]) == 0
    graphs = ["backbone.onnx", "backbone.safetensors"]
    assert names_below(out) == ["README.md", *graphs, "bank.safetensors", "classes.jsonl", "export.json"]

    # 1. What is told and recorded.
    captured = capsys.readouterr()
    assert "backbone.onnx in operator set 21\n" in captured.out
    assert re.search(r"verified with 512 images of \d+ classes of demo, split test\n", captured.out)
    about = json.loads((out / "export.json").read_text())
    assert about["formats"] == ["onnx", "safetensors"]
    assert about["files"].keys() == {*names_below(out)} - {"export.json"}
    found = {check["file"]: check for check in about["verification"]["files"]}
    assert sorted(found) == graphs
    for file, check in found.items():
        assert check["largest_difference"] < 1e-5
        assert check["recall_at_1_difference"] == 0.0
        assert check["num_images"] == 512
        assert 0 < check["recall_at_1"] < 1
        assert f"{file} " in captured.out
    assert open_trained(out).step == 30

    # 2. The code of the card, block by block, in the folder.
    for name, colour in (("first.png", (200, 30, 90)), ("second.png", (10, 160, 240))):
        Image.new("RGB", (40, 30), colour).save(out / name)
    blocks = re.findall(r"^```python\n(.*?)^```$", (out / "README.md").read_text(), flags=re.DOTALL | re.MULTILINE)
    assert len(blocks) == 1 + 2
    monkeypatch.chdir(out)
    prepared: dict[str, Any] = {}
    exec(compile(blocks[0], "preparation", "exec"), prepared)
    model = original_backbone(load_config(run / "config.json"), run / "checkpoints" / CHECKPOINT)
    with torch.no_grad():
        expected = model(torch.from_numpy(prepared["images"])).numpy()
    assert abs(expected[0] - expected[1]).max() > 1e-3
    for block, sign in zip(blocks[1:], ("onnxruntime", "build_backbone"), strict=True):
        assert sign in block
        names = {"images": prepared["images"]}
        exec(compile(block, sign, "exec"), names)
        np.testing.assert_allclose(names["embeddings"], expected, atol=1e-5, err_msg=sign)
        assert names["similarities"].shape == (2, 2)


@pytest.mark.parametrize("file", ["backbone.safetensors", "backbone.onnx"])
def test_a_file_that_differs_from_the_checkpoint_is_not_published(
    trained: tuple[Path, dict[str, np.ndarray]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    file: str,
) -> None:
    run, _ = trained
    name = file.partition(".")[2]
    if name == "onnx":
        pytest.importorskip("onnxscript")
        pytest.importorskip("onnxruntime")
    export(run, tmp_path / "birds")
    before = {path.name: path.read_bytes() for path in (tmp_path / "birds").iterdir()}

    if name == "safetensors":
        copy = shutil.copyfile

        def copy_wrongly(source: Path, target: Path) -> None:
            copy(source, target)
            if target.name == file:
                weights = load_file(target)
                weights["embedding.bias"][0] += 0.01
                save_file(weights, target)

        monkeypatch.setattr(export_folder.shutil, "copyfile", copy_wrongly)
    else:
        write = getattr(export_folder, f"write_{name}")

        def write_wrongly(model: EmbeddingModel, *rest: Any, **settings: Any) -> Any:
            with torch.no_grad():
                model.embedding.bias[0] += 0.01
            return write(model, *rest, **settings)

        monkeypatch.setattr(export_folder, f"write_{name}", write_wrongly)
    arguments = ["--run", str(run), "--out", str(tmp_path / "birds"), "--format", name, "--overwrite"]
    assert main([*arguments, "--verify"]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert (
        f"error: {file} differs by more than 0.0001 from what the checkpoint gives for 64 random images, as the run's "
        "test images were not there; nothing was published\n"
    ) in captured.err
    assert re.search(rf"{re.escape(file)} .* TOO FAR", captured.err)
    assert {path.name: path.read_bytes() for path in (tmp_path / "birds").iterdir()} == before
    assert names_below(tmp_path) == ["birds"]
    assert main(arguments) == 0  # it is --verify that finds it


@needs_onnx
def test_weights_in_bfloat16_stay_so_and_their_graph_is_float32(
    trained: tuple[Path, dict[str, np.ndarray]], tmp_path: Path
) -> None:
    told = export(trained[0].with_name("half"), tmp_path / "half", formats=["onnx", "safetensors"], verify=True)
    assert re.search(r"^backbone.safetensors +bfloat16 +0.0e\+00", told, flags=re.MULTILINE)
    assert re.search(r"^backbone.onnx +float32 ", told, flags=re.MULTILINE)
    about = json.loads((tmp_path / "half" / "export.json").read_text())
    assert about["precision"] == "bfloat16"
    assert {check["recall_at_1"] for check in about["verification"]["files"]} == {None}
    assert about["verification"]["images"].startswith("64 random images")
    assert load_file(tmp_path / "half" / "backbone.safetensors")["embedding.weight"].dtype == torch.bfloat16


@needs_onnx
def test_a_graph_alone_is_nothing_to_train_from(trained: tuple[Path, dict[str, np.ndarray]], tmp_path: Path) -> None:
    told = export(trained[0], tmp_path / "birds", formats=["onnx"])
    assert re.search(r"birds: small_cnn, backbone.onnx in operator set \d+$", told)
    assert names_below(tmp_path / "birds") == ["README.md", "backbone.onnx", "export.json"]
    with pytest.raises(ValueError, match=r"onnx.*--format safetensors"):
        open_trained(tmp_path / "birds")


def test_an_export_of_before_that_holds_a_torchscript_graph_still_opens(
    trained: tuple[Path, dict[str, np.ndarray]], tmp_path: Path
) -> None:
    export(trained[0], tmp_path / "new")
    about = json.loads((tmp_path / "new" / "export.json").read_text())
    (tmp_path / "new" / "backbone.torchscript").write_bytes(b"a program")
    about["formats"].append("torchscript")
    del about["files"]
    seal(tmp_path / "new", tmp_path / "old", EXPORT, about=about)
    assert open_trained(tmp_path / "old").bank().shape == open_trained(trained[0]).bank().shape


def test_a_card_may_be_edited(trained: tuple[Path, dict[str, np.ndarray]], tmp_path: Path) -> None:
    export(trained[0], tmp_path / "birds")
    with open(tmp_path / "birds" / "README.md", "a") as stream:
        stream.write("More about our birds.\n")
    assert open_trained(tmp_path / "birds").step == 30


def test_a_wrong_command_line_ends_before_any_work(
    trained: tuple[Path, dict[str, np.ndarray]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run, _ = trained
    given = ["--run", str(run), "--out", str(tmp_path / "new")]
    for name in ("pickle", "torchscript"):
        with pytest.raises(SystemExit, match="2"):
            main([*given, "--format", f"onnx,{name}"])
        assert f"expected one or several of safetensors, onnx, got {name!r}" in capsys.readouterr().err
    for more, message in (
        (["--data", "shards/demo"], "--verify with --data"),
        (["--opset", "20"], "onnx with --opset"),
    ):
        assert main([*given, *more]) == 2
        assert message in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "onnx", None)
    assert main([*given, "--format", "onnx"]) == 2
    assert re.match(
        r"error: --format onnx expects .* found no onnx; pip install '\.\[export\]'", capsys.readouterr().err
    )
    assert main([*given, "--verify", "--data", str(tmp_path)]) == 2
    assert str(tmp_path) in capsys.readouterr().err
    assert names_below(tmp_path) == []


# ---- what is in the way ----------------------------------------------------------------------------------------------


def test_what_is_in_the_place_is_not_lost(
    trained: tuple[Path, dict[str, np.ndarray]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, _ = trained
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("years")
    (tmp_path / "a file").write_text("text")
    old = '{"kind": "dist-proxygml-export"}'
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "export.json").write_text(old)

    def told(*arguments: object) -> str:
        assert main([str(argument) for argument in arguments]) == 2
        captured = capsys.readouterr()
        assert captured.out == ""
        return captured.err

    for place in ("mine", "a file"):
        for overwrite in ([], ["--overwrite"]):
            error = told("--run", run, "--out", tmp_path / place, *overwrite)
            assert error.startswith(
                f"error: expected nothing or an earlier dist-proxygml-export at {tmp_path / place}, found"
            )
    # before any work: there is no such run
    error = told("--run", tmp_path / "no run", "--out", tmp_path / "old")
    assert error == (
        f"error: expected nothing at {tmp_path / 'old'}, found dist-proxygml-export; name another folder, or add "
        "--overwrite\n"
    )
    assert "found no config.json in it" in told("--run", tmp_path / "no run", "--out", tmp_path / "new")
    for part in (run / "checkpoints" / CHECKPOINT, run / "config.json"):
        assert "one of its checkpoints with --checkpoint" in told("--run", part, "--out", tmp_path / "new")
    error = told("--run", run, "--checkpoint", "step-000031", "--out", tmp_path / "new")
    assert "this run has: step-000030" in error
    assert (tmp_path / "mine" / "thesis.tex").read_text() == "years"
    assert (tmp_path / "old" / "export.json").read_text() == old
    assert names_below(tmp_path) == ["a file", "mine", "old"]

    (tmp_path / "empty").mkdir()
    for place, overwrite in (("empty", []), ("old", ["--overwrite"])):
        assert main(["--run", str(run), "--out", str(tmp_path / place), *overwrite]) == 0
        assert open_trained(tmp_path / place).step == 30
    assert names_below(tmp_path) == ["a file", "empty", "mine", "old"]


def test_an_export_that_fails_leaves_the_earlier_one(
    trained: tuple[Path, dict[str, np.ndarray]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run, _ = trained
    export(run, tmp_path / "birds")
    before = {path.name: path.read_bytes() for path in (tmp_path / "birds").iterdir()}

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(export_folder.os, "posix_fallocate", full)
    assert main(["--run", str(run), "--out", str(tmp_path / "birds"), "--overwrite"]) == 2
    assert "No space left on device" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in (tmp_path / "birds").iterdir()} == before
    assert names_below(tmp_path) == ["birds"]


@pytest.mark.parametrize("kind", ["empty", "half", "pickle", "complex", "whole numbers"])
def test_weights_that_are_none_are_refused_though_the_manifest_was_mended(
    trained: tuple[Path, dict[str, np.ndarray]], tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    run = Path(shutil.copytree(trained[0], tmp_path / "run"))
    checkpoint = run / "checkpoints" / CHECKPOINT
    weights = load_file(path := checkpoint / "backbone.safetensors")
    content = {"empty": b"", "half": path.read_bytes()[:999], "pickle": pickle.dumps(print)}.get(kind)
    if content is None:
        dtype = torch.complex64 if kind == "complex" else torch.int8
        save_file({name: value.to(dtype) for name, value in weights.items()}, path)
    else:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=r"backbone\.safetensors"):
        load_backbone(checkpoint, build_backbone(load_config(run / "config.json").backbone))
    manifest = json.loads((checkpoint / "MANIFEST.json").read_text())
    manifest["files"] = hash_files(checkpoint, list(manifest["files"]), num_threads=1)
    (checkpoint / "MANIFEST.json").write_text(json.dumps(manifest))
    assert main(["--run", str(run), "--out", str(tmp_path / "out")]) == 2
    assert re.fullmatch(r"error: .*backbone.safetensors holds no weights: .*; copy it again\n", capsys.readouterr().err)
    assert names_below(tmp_path) == ["run"]


def test_a_bank_of_whole_numbers_is_no_bank(trained: tuple[Path, dict[str, np.ndarray]], tmp_path: Path) -> None:
    export(trained[0], tmp_path / "birds")
    for dtype in (torch.int8, torch.bool, torch.float8_e4m3fn):
        save_file({"proxies": torch.ones(7, 1, 4).to(dtype)}, tmp_path / "birds" / "bank.safetensors")
        with pytest.raises(ValueError, match=r"bank\.safetensors.*proxies"):
            trained_module.TrainedModel(tmp_path / "birds", 30, {}, export={"step": 30}).bank()


@pytest.mark.parametrize("name", ["backbone.safetensors", "bank.safetensors", "classes.jsonl"])
def test_a_damaged_export_is_not_used(trained: tuple[Path, dict[str, np.ndarray]], tmp_path: Path, name: str) -> None:
    export(trained[0], tmp_path / "birds")
    path = tmp_path / "birds" / name
    content = bytearray(path.read_bytes())
    path.write_bytes(content[:-1])
    with pytest.raises(
        ValueError,
        match=rf"\bbirds\b.*{name}.*\b{len(content) - 1} bytes.*\b{len(content)}\b",
    ):
        open_trained(tmp_path / "birds")
    content[-3] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"\bbirds\b.*{name}.*sha256"):
        open_trained(tmp_path / "birds")
    path.unlink()
    with pytest.raises(ValueError, match=rf"\bbirds\b.*{name}.*No such file"):
        open_trained(tmp_path / "birds")
    (tmp_path / "birds" / "export.json").write_text('{"kind": "dist-proxygml-export", "version": 2}')
    with pytest.raises(ValueError, match=r"dist-proxygml-export.*version 1.*version 2"):
        open_trained(tmp_path / "birds")
    (tmp_path / "birds" / "export.json").write_text('{"kind": "dist-proxygml-export", "version": 1, "files": {}}')
    with pytest.raises(ValueError, match=r"export\.json.*'run'"):
        open_trained(tmp_path / "birds")
