"""A model card says what is known and no more, is read by the programs that read cards, and its code prepares images
as the run did.
"""

import dataclasses
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from PIL import Image

from dist_proxygml.config import CenterCropConfig, ResizeConfig
from dist_proxygml.data.images import decode_image
from dist_proxygml.data.transforms import build_transform
from dist_proxygml.evaluation.evaluator import EvaluationResult
from dist_proxygml.inference.export_check import FileCheck
from dist_proxygml.inference.model_card import StoredEvaluation, TrainingFacts, escape, find_evaluation, write_card

HOSTILE = '</td><script>alert(1)</script> | [x](http://a.b) `rm` *b* \n---\nlicense: mit # "q" \u2028 \x85 \ud800 é'
RESULT = EvaluationResult(
    metrics={"nmi": 0.25, "nmi_sd": 0.001, "recall@1": 0.67441, "map@r": 0.5, "my|own": 0.125},
    bounds={"recall@1": (0.67, 0.68)},
    num_images=1234,
    num_classes=55,
    num_queries=1230,
    num_lone=4,
    num_damaged=2,
    protocol={"data": {"dataset": "birds", "split": "test", "index_sha256": "abc", "class_table_sha256": "def"}},
)
ABOUT: dict[str, Any] = {
    "run": "demo",
    "step": 30,
    "formats": ["safetensors", "onnx"],
    "precision": "float32",
    "opset": 20,
    "timm_embedding": None,
    "embedding_dim": 128,
    "num_classes": 549,
    "backbone": {"name": "timm/resnet50", "pretrained": "/home/ada/weights.pth", "options": {}},
    "preprocessing": {"name": "resize", "size": 32},
    "written_with": {"torch": "2.14.1"},
    "verification": None,
}


def card(
    tmp_path: Path,
    *,
    facts: TrainingFacts = TrainingFacts(2977, "table", "abc"),  # noqa: B008  # a tuple
    evaluation: StoredEvaluation | None = StoredEvaluation(30, RESULT),  # noqa: B008
    checks: tuple[FileCheck, ...] = (),
    **changes: Any,
) -> str:
    """The text of a card beside two files."""
    (tmp_path / "backbone.onnx").write_bytes(b"x" * 3000)
    (tmp_path / "backbone.safetensors").write_bytes(b"x" * 10)
    path = tmp_path / "README.md"
    write_card(path, ABOUT | changes, facts=facts, evaluation=evaluation, checks=checks)
    return path.read_text(encoding="utf-8")


def test_the_head_is_read_as_hugging_face_reads_it(tmp_path: Path) -> None:
    card(tmp_path)
    data = ModelCard.load(tmp_path / "README.md").data
    assert data.library_name == "dist_proxygml"
    assert {"image-retrieval", "safetensors", "onnx"} <= set(data.tags)
    assert data.license is None  # nobody has said
    assert data.model_name == "demo"
    assert data.eval_results is not None
    found = {result.metric_type: result.metric_value for result in data.eval_results}
    assert found == {"recall@1": 67.441, "map@r": 50.0, "nmi": 25.0, "my|own": 12.5}
    assert {(result.dataset_name, result.dataset_split) for result in data.eval_results} == {("birds", "test")}


def test_the_card_says_what_was_measured_on_what(tmp_path: Path) -> None:
    text = card(tmp_path)
    for line in (
        "| Recall@1 | 67.44 | 67.00 to 68.00 |\n| MAP@R | 50.00 |  |\n| NMI | 25.00 ± 0.10 over seeds |  |\n",
        "| my\\|own | 12.50 |  |",
        "Each image of the split is a query against all others of the split: 1,230 queries, 1,234 images, 55 classes.",
        "4 images without another of their class to find are no queries, 2 damaged ones are left out.",
        f"| fingerprint of the protocol | `{RESULT.fingerprint}` |",
        "| `backbone.onnx` | 2.9 KiB | the backbone as one graph |",
        "| `backbone.safetensors` | 10 bytes |",
        "| data set | birds |\n| classes | 549 |\n| images | 2,977 |\n| sha256 of the shards' index | `abc` |",
        "The files were not compared with the checkpoint",
    ):
        assert line in text
    assert '"pretrained": "weights.pth"' in text
    assert "/home/ada" not in text
    data = RESULT.protocol["data"] | {"gallery_split": "gal_lery"}
    searched = card(tmp_path, evaluation=StoredEvaluation(30, dataclasses.replace(RESULT, protocol={"data": data})))
    assert "a query against the images of the split gal\\_lery: 1,230 queries" in searched
    # The name of the data set is known from the evaluation, if that was on the same shards.
    other = card(tmp_path, facts=TrainingFacts(2977, "table", "other"))
    assert "| data set | not recorded |\n| classes | 549 |" in other


def test_a_moving_average_is_said_to_be_one(tmp_path: Path) -> None:
    assert "weights in\nfloat32.\n" in card(tmp_path)
    averaged = card(tmp_path, settings={"training.ema_decay": 0.999})
    assert "weights in\nfloat32, a moving average of those of its steps (decay 0.999).\n" in averaged


def test_what_is_not_known_is_not_claimed(tmp_path: Path) -> None:
    text = card(tmp_path, evaluation=None, facts=TrainingFacts(None, None, None))
    assert "This model was not evaluated." in text
    assert "| images | a stream, not counted |" in text
    head = yaml.safe_load(text.split("---\n")[1])
    assert "metrics" not in head
    assert "model-index" not in head

    # An evaluation of another step is no evaluation of this one.
    text = card(tmp_path, evaluation=StoredEvaluation(7, RESULT))
    assert "**This model, step 30, was not evaluated.** The numbers are of step-000007 of the same run" in text
    assert "| Recall@1 | 67.44 | 67.00 to 68.00 |" in text
    assert "model-index" not in yaml.safe_load(text.split("---\n")[1])


def test_what_the_check_found_is_in_the_card(tmp_path: Path) -> None:
    checks = (
        FileCheck("backbone.onnx", "onnx", "float32", 512, 2.4e-7, 0.5, 0.5),
        FileCheck("backbone.safetensors", "safetensors", "bfloat16", 64, 0.0, None, None),
    )
    text = card(tmp_path, checks=checks, precision="bfloat16", verification={"images": "512 images of birds"})
    assert "| `backbone.onnx` | float32 | 2.4e-07 | 50.00 | 50.00 | 0.00 |" in text
    assert "| `backbone.safetensors` | bfloat16 | 0.0e+00 |  |  |  |" in text
    assert "embedded 512 images of birds." in text
    assert "Training and evaluation ran in bfloat16, the graph computes with the same weights in float32" in text


def test_a_users_text_stays_text(tmp_path: Path) -> None:
    data = {"dataset": HOSTILE, "split": HOSTILE, "index_sha256": "`" + HOSTILE}
    result = dataclasses.replace(RESULT, protocol={"data": data})
    text = card(
        tmp_path,
        run=HOSTILE,
        evaluation=StoredEvaluation(30, result),
        backbone=ABOUT["backbone"] | {"options": {HOSTILE: "```\n# heading"}},
    )
    # 1. The head has the keys that it should, and the names in one piece.
    head = yaml.safe_load(re.split(r"^---$", text, flags=re.MULTILINE)[1])
    assert "license" not in head
    assert head["model-index"][0]["name"].startswith("</td><script>")
    # 2. Outside of code nothing of it is read as Markdown or HTML.
    prose = re.sub(r"^---$.*?^---$", "", text, count=1, flags=re.DOTALL | re.MULTILINE)
    prose = re.sub(r"^```.*?^```$", "", prose, flags=re.DOTALL | re.MULTILINE)
    prose = re.sub(r"(?<!\\)`[^`\n]*`", "", prose)
    assert "<script" not in re.sub(r"\\.", "", prose)
    assert "license: mit" not in prose
    assert not re.search(r"(?<!\\)[<>]|(?<!\\)\[x\]|(?<!\\)\*b", prose)
    assert len(re.findall(r"^# ", prose, flags=re.MULTILINE)) == 1
    # 3. Every fence that opens is closed by ours.
    assert len(re.findall(r"^```", text, flags=re.MULTILINE)) % 2 == 0


def test_every_sign_of_markdown_is_escaped() -> None:
    assert escape("a|b <i>*x*</i> [l](u) `c` \\ \n# h") == (
        "a\\|b \\<i\\>\\*x\\*\\</i\\> \\[l\\]\\(u\\) \\`c\\` \\\\ \\# h"
    )


# ---- evaluations -----------------------------------------------------------------------------------------------------


def test_the_evaluation_of_the_exported_step_is_found_or_else_the_newest(tmp_path: Path) -> None:
    assert find_evaluation(tmp_path, 30) is None
    folder = tmp_path / "evaluation"
    folder.mkdir()
    for name, recall in (
        ("step-000030", 0.3),
        ("step-000100", 0.9),
        ("step-000100-on-other-test", 0.1),
        ("pixels", 0.2),
    ):
        result = dataclasses.replace(RESULT, metrics={"recall@1": recall})
        (folder / f"{name}.json").write_text(result.to_json())
    for step, expected in ((30, (30, 0.3)), (100, (100, 0.9)), (50, (100, 0.9))):
        found = find_evaluation(tmp_path, step)
        assert found is not None
        assert (found.step, found.result.metrics["recall@1"]) == expected
    (folder / "step-000030.json").write_text("[]")
    with pytest.raises(ValueError, match=r"step-000030\.json"):
        find_evaluation(tmp_path, 30)


# ---- preparing images ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "config",
    [ResizeConfig(name="resize", size=32), CenterCropConfig(name="center_crop", resize=48, size=40)],
    ids=lambda config: config.name,
)
@pytest.mark.parametrize("size", [(64, 64), (32, 32), (90, 61), (37, 80), (20, 31)])
def test_the_code_for_pillow_prepares_images_as_the_run_does(
    config: ResizeConfig | CenterCropConfig, size: tuple[int, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Smooth colours, half transparent in a corner: what a resizing does to noise is not what it does to images.
    x, y = np.meshgrid(np.linspace(0, 1, size[0]), np.linspace(0, 1, size[1]))
    colours = np.stack([x, y, (np.sin(6 * x + 4 * y) + 1) / 2, 1 - 0.5 * x * y], axis=-1)
    picture = Image.fromarray((255 * colours).astype(np.uint8), "RGBA")
    for name in ("first.png", "second.png"):
        picture.save(tmp_path / name)
    text = card(tmp_path, preprocessing=config.model_dump(mode="json"))
    code = re.findall(r"^```python\n(.*?)^```$", text, flags=re.DOTALL | re.MULTILINE)[0]
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(compile(code, "card", "exec"), names)

    expected = build_transform(config)([decode_image((tmp_path / "first.png").read_bytes())], ())
    assert names["images"].shape == (2, *expected.shape[1:])
    assert names["images"].dtype == np.uint8
    difference = torch.from_numpy(names["images"][:1]).int() - expected.int()
    assert difference.abs().max() <= 2, "Pillow and torchvision round in other places"
