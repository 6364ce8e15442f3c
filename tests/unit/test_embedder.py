"""An embedder gives the embeddings of the evaluation, from any kind of image, and says what it cannot take."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import dist_proxygml
from dist_proxygml import Embedder
from dist_proxygml.backbones.build import build_backbone
from dist_proxygml.checkpoint.model import BACKBONE_FILE
from dist_proxygml.checkpoint.writer import load_backbone
from dist_proxygml.config import load_config
from dist_proxygml.data.index import open_index
from dist_proxygml.data.pipeline import build_evaluation_loader
from dist_proxygml.data.sources import ImageRecord, open_source
from dist_proxygml.data.transforms import build_transform
from dist_proxygml.distributed.parallel import single_process
from dist_proxygml.evaluation.embedding_pass import embed
from dist_proxygml.inference.embedder import choose_device, model_difference
from dist_proxygml.inference.export_folder import export
from tests.trained_runs import write_finished_run

ROOT = Path(__file__).parents[2]
DEMO = ROOT / "shards" / "demo"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_finished_run(tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def embedder(run: Path) -> Embedder:
    return Embedder.from_run(run, device="cpu")


def write_export(run: Path, out: Path) -> Path:
    """What of an export an embedder reads."""
    config = load_config(run / "config.json")
    out.mkdir()
    content = (run / "checkpoints" / "step-000030" / BACKBONE_FILE).read_bytes()
    (out / BACKBONE_FILE).write_bytes(content)
    about = {
        "kind": "dist-proxygml-export",
        "version": 1,
        "run": config.name,
        "step": 30,
        "settings": {},
        "backbone": config.backbone.model_dump(mode="json"),
        "preprocessing": config.data.test_transform.model_dump(mode="json"),
        "files": {},
    }
    (out / "export.json").write_text(json.dumps(about))
    return out


def test_rows_are_those_of_the_evaluation_to_the_last_digit(run: Path, embedder: Embedder) -> None:
    config = load_config(run / "config.json")
    index = open_index(DEMO, "test")
    model = build_backbone(config.backbone, load_pretrained=False)
    load_backbone(run / "checkpoints" / "step-000030", model)
    transform = build_transform(config.data.test_transform)
    loader = build_evaluation_loader(index, transform, batch_size=64)
    expected = embed(model, loader, context=single_process(), num_samples=index.num_samples).embeddings.numpy()

    source = open_source(DEMO)
    images = [source.image(source.record(number)) for number in range(200)]
    assert embedder.batch_size == 64  # that of the run's evaluation
    rows = embedder.embed(images[:192])
    assert rows.dtype == np.float32
    np.testing.assert_array_equal(rows, expected[:192])
    # In other batches sums may be rounded in another order.
    np.testing.assert_allclose(embedder.embed(images, batch_size=7), expected[:200], atol=1e-6)


def test_an_image_is_the_same_in_every_form(embedder: Embedder, tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    pixels = generator.integers(0, 256, (3, 20, 30, 3), dtype=np.uint8)
    for number, image in enumerate(pixels):
        Image.fromarray(image).save(tmp_path / f"{number}.png")
    paths = [tmp_path / f"{number}.png" for number in range(3)]
    expected = embedder.embed(paths)
    assert expected.shape == (3, 4)
    assert len(np.unique(expected, axis=0)) == 3
    np.testing.assert_allclose(np.linalg.norm(expected, axis=1), 1, atol=1e-6)
    tensors = torch.from_numpy(pixels).permute(0, 3, 1, 2)
    opaque = np.concatenate([pixels, np.full_like(pixels[..., :1], 255)], axis=-1)
    forms = {
        "strings": map(str, paths),
        "PIL": [Image.open(path) for path in paths],
        "arrays": list(pixels),
        "an array": pixels,
        "with opacity": opaque,
        "a tensor": tensors,
        "tensors": iter(tensors),
        "mixed": [paths[0], pixels[1], tensors[2]],
    }
    for name, images in forms.items():
        np.testing.assert_array_equal(embedder.embed(images), expected, err_msg=name)
    for single in (paths[1], str(paths[1]), Image.open(paths[1]), pixels[1], tensors[1]):
        np.testing.assert_allclose(embedder.embed(single), expected[1:2], atol=1e-6)
    grey = embedder.embed(pixels[0, :, :, 0])
    np.testing.assert_allclose(grey, embedder.embed(np.repeat(pixels[:1, :, :, :1], 3, axis=3)), atol=1e-6)
    assert embedder.embed([]).shape == (0, 4)


def test_a_run_its_checkpoint_and_its_export_are_one_model(run: Path, embedder: Embedder, tmp_path: Path) -> None:
    image = np.random.default_rng(1).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    same = [
        Embedder.from_run(str(run), checkpoint="step-000030", device="cpu"),
        Embedder.from_run(run / "checkpoints" / "step-000030", device="cpu"),
        Embedder.from_run(write_export(run, tmp_path / "export"), device="cpu"),
    ]
    for other in same:
        np.testing.assert_array_equal(other.embed(image), embedder.embed(image))
        assert model_difference(embedder.about, other.about) is None
        assert (other.about["run"], other.about["step"], other.embedding_dim) == ("small", 30, 4)
    weights = Embedder.from_run(write_finished_run(tmp_path, "weights", seed=1))
    assert model_difference(embedder.about, weights.about) == "weights"
    data = json.loads((run / "config.json").read_text())["data"]
    data["test_transform"] = {"name": "center_crop", "resize": 20, "size": 16}
    preparation = Embedder.from_run(write_finished_run(tmp_path, "preparation", data=data))
    assert model_difference(embedder.about, preparation.about) == "preprocessing"


def test_the_random_state_stays_as_it_was(run: Path) -> None:
    before = torch.get_rng_state()
    Embedder.from_run(run)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (torch.zeros(3, 8, 8), r"image 0.*\[3, h, w\].*torch\.float32 \[3, 8, 8\]"),
        (torch.zeros(8, 8, 3, dtype=torch.uint8), r"torch\.uint8 \[8, 8, 3\]"),
        (np.zeros((8, 8, 3)), r"image 0.*uint8.*float64 \[8, 8, 3\].*0 to 255"),
        (np.zeros((3, 8, 8), np.uint8), r"uint8 \[3, 8, 8\]"),
        (np.zeros((0, 8, 3), np.uint8), r"uint8 \[0, 8, 3\]"),
        ([np.zeros((8, 8, 3), np.uint8), 7], r"image 1.*\bint\b"),
        ("no/such.jpg", r"no/such\.jpg.*No such file"),
        (str(ROOT), "Is a directory"),
        (__file__, r"test_embedder\.py.*JPEG, PNG, "),
    ],
)
def test_what_is_no_image_is_named(embedder: Embedder, image: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        embedder.embed(image)  # type: ignore[arg-type]


def test_a_model_that_is_not_there_or_diverged_is_refused(run: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nowhere"):
        Embedder.from_run(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="step-000030"):
        Embedder.from_run(run, checkpoint="step-000031")
    with pytest.raises(ValueError, match="name"):
        Embedder.from_run(run / "checkpoints" / "step-000030", checkpoint="step-000030")
    export = write_export(run, tmp_path / "export")
    weights = load_file(export / BACKBONE_FILE)
    weights["embedding.bias"][:] = torch.nan
    save_file(weights, export / BACKBONE_FILE)
    pixels = np.zeros((2, 8, 8, 3), np.uint8)
    with pytest.raises(ValueError, match=r"image 0 .*\b2 in all"):
        Embedder.from_run(export).embed(pixels)
    about = json.loads((export / "export.json").read_text())
    (export / "export.json").write_text(json.dumps(about | {"preprocessing": {"name": "rezise", "size": 3}}))
    with pytest.raises(ValueError, match=r"export\.json.*backbone.*preprocessing"):
        Embedder.from_run(export)


def test_a_configuration_that_was_edited_after_the_training_is_refused(tmp_path: Path) -> None:
    run = write_finished_run(tmp_path)
    settings = json.loads((run / "config.json").read_text())
    size, width = settings["data"]["test_transform"]["size"], settings["backbone"]["options"]["width"]
    settings["data"]["test_transform"]["size"] = size + 8
    settings["data"]["num_workers"] = 7  # is free
    (run / "config.json").write_text(json.dumps(settings))
    expected = rf"config\.json.*step-000030.*data\.test_transform\.size {size}\b"
    with pytest.raises(ValueError, match=expected):
        Embedder.from_run(run)
    settings["data"]["test_transform"]["size"] = size
    settings["backbone"]["options"]["width"] = width + 1
    (run / "config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match=rf"backbone\.options\.width {width}.*\b{width + 1}\b"):
        export(run, tmp_path / "export")
    settings["backbone"]["options"]["width"] = width
    (run / "config.json").write_text(json.dumps(settings))
    Embedder.from_run(run)


def test_checkpoints_that_are_all_damaged_are_not_called_missing(tmp_path: Path) -> None:
    run = write_finished_run(tmp_path)
    weights = run / "checkpoints" / "step-000030" / BACKBONE_FILE
    weights.write_bytes(weights.read_bytes()[:-1])
    with (
        pytest.warns(UserWarning, match="passed over"),
        pytest.raises(ValueError, match=r"-000030"),
    ):
        Embedder.from_run(run)


def test_a_device_is_chosen_or_refused() -> None:
    assert choose_device("cpu") == torch.device("cpu")
    assert choose_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    for other in ("gpu", "mps"):
        with pytest.raises(ValueError, match=f"device.*'{other}'"):
            choose_device(other)
    with pytest.raises(ValueError, match="device 'cuda:99'"):
        choose_device("cuda:99")


def test_the_package_offers_it_at_its_front_door() -> None:
    assert {"Embedder", "Index", "SearchResult"} <= set(dist_proxygml.__all__)
    assert all(hasattr(dist_proxygml, name) for name in dist_proxygml.__all__)
    program = "import sys, dist_proxygml; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True)
    with pytest.raises(AttributeError, match="'Indexer'"):
        dist_proxygml.Indexer  # noqa: B018


@pytest.mark.parametrize("name", ["/etc/hostname", "../private.png", "a/../../private.png"])
def test_a_record_shows_no_image_outside_its_folder(name: str, tmp_path: Path) -> None:
    for place in ("photos/a/0.png", "private.png"):
        (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (2, 2)).save(tmp_path / place)
    source = open_source(tmp_path / "photos")
    assert source.image(ImageRecord("a/0.png")).shape == (3, 2, 2)
    with pytest.raises(ValueError, match="image file"):
        source.image(ImageRecord(name))
