"""The command that embeds: any folder, or shards; what cannot be read is named; what was done is not done again."""

import io
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dist_proxygml.data.images import ORIENTATION_TAG
from dist_proxygml.data.index import ShardIndex
from dist_proxygml.data.shards import ShardSample, write_shard
from dist_proxygml.data.sources import ImageRecord
from dist_proxygml.data.verify import index_shards
from dist_proxygml.distributed.parallel import status_of
from dist_proxygml.embed import main
from dist_proxygml.inference.embedder import Embedder
from dist_proxygml.inference.embeddings import check_rows, open_embeddings, write_embeddings
from dist_proxygml.storage import folder as sealed_folder
from dist_proxygml.storage.folder import hash_files
from tests.shards_of_noise import write_noise_shards
from tests.trained_runs import write_finished_run

# In the order of their paths.
PHOTOS = ["a/deep/er/y.webp", "a/x.jpg", "a/ünï côdé.jpeg", "b.PNG", "c/1.bmp", *(f"c/{n}.png" for n in "234"), "z.gif"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_finished_run(tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> ShardIndex:
    return write_noise_shards(tmp_path_factory.mktemp("noise"), [4, 9, 7])


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Nine images in nested folders, and files that are none."""
    generator = np.random.default_rng(0)
    for name in PHOTOS:
        path = tmp_path / "photos" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(generator.integers(0, 256, (12, 18, 3), dtype=np.uint8)).save(path)
    for name in ("notes.txt", ".hidden.png", "__MACOSX/a.png", ".cache/thumb.png"):
        path = tmp_path / "photos" / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"no image")
    return tmp_path / "photos"


def embedded(*arguments: object) -> int:
    return status_of(lambda: main([str(argument) for argument in arguments]))


def test_photographs_that_a_camera_stored_turned_are_embedded_as_viewers_show_them(run: Path, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[ORIENTATION_TAG] = 6
    photo = Image.fromarray(np.random.default_rng(0).integers(0, 256, (12, 18, 3), dtype=np.uint8))
    folder = tmp_path / "photos"
    folder.mkdir()
    photo.save(folder / "0.png")
    photo.transpose(Image.Transpose.ROTATE_90).save(folder / "1.png", exif=exif)
    photo.transpose(Image.Transpose.ROTATE_90).save(folder / "2.png")
    assert embedded("--run", run, "--data", folder, "--out", tmp_path / "out") == 0
    upright, turned, another = open_embeddings(tmp_path / "out").rows
    np.testing.assert_allclose(upright, turned, atol=1e-6)  # of one batch
    assert abs(upright - another).max() > 1e-3
    assert open_embeddings(tmp_path / "out").manifest["data"]["exif"] == "applied"


def test_any_folder_of_images_is_embedded_in_the_order_of_its_paths(
    run: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (photos / "a" / "loop").symlink_to(photos)  # must not be walked for ever
    out = tmp_path / "out"
    assert embedded("--run", run, "--data", photos, "--out", out, "--batch-size", 4) == 0
    assert capsys.readouterr().out == f"9 embeddings of dimension 4 by small, step 30, written to {out}\n"
    rows, records, manifest = open_embeddings(out)
    names = [record.id for record in records]
    assert names == PHOTOS
    expected = Embedder.from_run(run).embed([photos / name for name in names], batch_size=4)
    np.testing.assert_array_equal(rows, expected)
    assert sorted(path.name for path in out.iterdir()) == ["embeddings.npy", "ids.jsonl", "manifest.json"]
    plain = np.load(out / "embeddings.npy")
    assert (plain.dtype, plain.shape, plain.flags["C_CONTIGUOUS"]) == (np.float32, (9, 4), True)
    assert json.loads((out / "ids.jsonl").read_text().splitlines()[0]) == {"id": "a/deep/er/y.webp"}
    assert manifest["model"] == Embedder.from_run(run).about
    assert (manifest["data"]["kind"], manifest["data"]["location"]) == ("folder", str(photos))
    assert (manifest["num_rows"], manifest["left_out"]) == (9, [])
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_shards_bring_keys_labels_and_classes(run: Path, shards: ShardIndex, tmp_path: Path) -> None:
    options = ("--run", run, "--data", shards.root, "--split", "test", "--batch-size", 6)
    assert embedded(*options, "--out", tmp_path / "one") == 0
    assert embedded(*options, "--out", tmp_path / "two", "--num-workers", 2) == 0
    rows, records, manifest = open_embeddings(tmp_path / "one")
    np.testing.assert_array_equal(open_embeddings(tmp_path / "two").rows, rows)
    assert [record.id for record in records] == [f"test-{number:08d}" for number in range(20)]
    assert [record.label for record in records] == shards.labels.tolist()
    assert records[3].class_name == f"pattern {records[3].label} <&>"
    assert [record.sample for record in records] == list(range(20))
    assert manifest["data"]["index_sha256"] == shards.sha256
    images = Embedder.from_run(run)
    from dist_proxygml.data.sources import ShardSource

    source = ShardSource(shards)
    np.testing.assert_array_equal(rows[:6], images.embed([source.image(record) for record in records[:6]]))


def test_ids_are_unique_where_keys_repeat_and_an_earlier_index_that_does_not_know_it_is_told(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    image = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 8, 3)).astype(np.uint8)).save(image, "PNG")
    for shard in range(3):
        write_shard(tmp_path / f"train-{shard}.tar", [ShardSample("sample", "png", image.getvalue(), 0, {})])
    index_shards(tmp_path, quiet=True)
    options = ("--run", run, "--data", tmp_path, "--split", "train", "--out", tmp_path / "out")
    assert embedded(*options) == 0
    assert "warning" not in capsys.readouterr().err
    records = open_embeddings(tmp_path / "out").records
    assert [record.id for record in records] == ["train-0/sample", "train-1/sample", "train-2/sample"]

    document = json.loads((tmp_path / "index.json").read_text())
    assert document["splits"]["train"].pop("keys_repeat") is True
    (tmp_path / "index.json").write_text(json.dumps(document))
    assert embedded(*options, "--overwrite") == 0
    assert "warning: 2 embeddings have the id of another; make the index again" in capsys.readouterr().err


def test_a_pipe_among_the_images_is_named_and_not_waited_for(
    run: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    os.mkfifo(photos / "a.png")
    assert embedded("--run", run, "--data", photos, "--out", tmp_path / "out") == 2
    assert f"{photos / 'a.png'}: the file cannot be read: it is no regular file" in capsys.readouterr().err


def test_an_image_that_cannot_be_read_fails_by_name_or_is_left_out_by_name(
    run: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (photos / "c" / "2.png").write_bytes((photos / "c" / "2.png").read_bytes()[:100])
    (photos / "z.png").symlink_to(tmp_path / "nowhere.png")
    options = ("--run", run, "--data", photos, "--batch-size", 2)
    assert embedded(*options, "--out", tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert f"error: {photos}/c/2.png: the image does not decode" in error
    assert not (tmp_path / "out").exists()

    # The same command goes on, now without that image.
    assert embedded(*options, "--out", tmp_path / "out", "--on-bad", "skip") == 0
    error = capsys.readouterr().err
    assert "resuming: 4 of 10 images are embedded already\n" in error
    assert f"2 images cannot be used and were skipped:\n  {photos}/c/2.png: the image does not decode" in error
    assert f"  {photos}/z.png: the file cannot be read: No such file" in error
    rows, records, manifest = open_embeddings(tmp_path / "out")
    names = [record.id for record in records]
    assert len(rows) == 8
    assert "c/2.png" not in names
    assert [damage["image"] for damage in manifest["left_out"]] == [f"{photos}/c/2.png", f"{photos}/z.png"]
    expected = Embedder.from_run(run).embed([photos / name for name in names])
    np.testing.assert_allclose(rows, expected, atol=1e-6)  # row and name still belong together

    for name in names:
        (photos / name).write_bytes(b"")
    assert embedded(*options, "--out", tmp_path / "none", "--on-bad", "skip") == 2
    assert "error: none of the 10 images can be used, the first is" in capsys.readouterr().err


def test_damaged_shards_are_named_and_may_be_left_out(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    index = write_noise_shards(tmp_path / "noise", [4, 9, 7])
    offset = int(index.samples["offset"][3]) + 40
    with open(index.shard_paths[0], "r+b") as stream:
        stream.seek(offset)
        stream.write(b"\xff\x00\xff")
    options = ("--run", run, "--data", index.root, "--out", tmp_path / "out")
    assert embedded(*options) == 2
    assert "sample test-00000003 (label" in capsys.readouterr().err
    assert embedded(*options, "--on-bad", "skip") == 0
    records = open_embeddings(tmp_path / "out").records
    assert [record.sample for record in records] == [number for number in range(20) if number != 3]


def test_a_call_that_was_stopped_goes_on_and_ends_with_the_same_bytes(
    run: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("--run", run, "--data", photos, "--batch-size", 2, "--out")
    assert embedded(*options, tmp_path / "whole") == 0
    real, calls = Embedder.embed_prepared, []

    def stopping(self: Embedder, *arguments: object, **names: object) -> np.ndarray:
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return real(self, *arguments, **names)  # type: ignore[arg-type]

    monkeypatch.setattr(Embedder, "embed_prepared", stopping)
    assert embedded(*options, tmp_path / "out") == 130
    assert not (tmp_path / "out").exists()
    # What a kill leaves besides: half a block, half a folder.
    blocks = tmp_path / ".out.partial" / "blocks"
    (blocks / "000003-000003.block.tmp-17").write_bytes(b"half a block")
    (tmp_path / ".out.partial" / "folder").mkdir()
    (tmp_path / ".out.partial" / "folder" / "embeddings.npy").write_bytes(b"half of them")
    capsys.readouterr()
    assert embedded(*options, tmp_path / "out") == 0
    assert "resuming: 6 of 9 images are embedded already\n" in capsys.readouterr().err
    assert len(calls) == 6  # three before, one stopped, two after: five batches in all
    for name in ("embeddings.npy", "ids.jsonl", "manifest.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "photos", "whole"]


@pytest.mark.parametrize("last", ["hash_files", "publish_folder"])
def test_a_writer_that_is_killed_while_it_hashes_has_lost_no_embedding(
    run: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, last: str
) -> None:
    options = ("--run", run, "--data", photos, "--batch-size", 5, "--out", tmp_path / "out")
    assert embedded("--run", run, "--data", photos, "--batch-size", 5, "--out", tmp_path / "whole") == 0
    calls: list[int] = []
    real = Embedder.embed_prepared

    def counted(self: Embedder, *arguments: object, **names: object) -> np.ndarray:
        calls.append(1)
        return real(self, *arguments, **names)  # type: ignore[arg-type]

    def killed(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(sealed_folder, last, killed)
        assert embedded(*options) == 130
    monkeypatch.setattr(Embedder, "embed_prepared", counted)
    assert embedded(*options) == 0
    assert not calls
    for name in ("embeddings.npy", "ids.jsonl", "manifest.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


@pytest.mark.parametrize(("change", "part"), [("model", "weights"), ("images", "images"), ("batches", "batch size")])
def test_what_was_begun_differently_begins_anew_and_says_why(
    run: Path,
    photos: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    change: str,
    part: str,
) -> None:
    real = Embedder.embed_prepared
    counts = iter(range(100))

    def stopping(self: Embedder, *arguments: object, **names: object) -> np.ndarray:
        if next(counts) == 1:
            raise KeyboardInterrupt
        return real(self, *arguments, **names)  # type: ignore[arg-type]

    monkeypatch.setattr(Embedder, "embed_prepared", stopping)
    assert embedded("--run", run, "--data", photos, "--batch-size", 5, "--out", tmp_path / "out") == 130
    other, batch_size = run, 5
    if change == "model":
        other = write_finished_run(tmp_path, "other", seed=1)
    elif change == "images":
        Image.new("RGB", (9, 9), "red").save(photos / "b.PNG")
    else:
        batch_size = 4
    capsys.readouterr()
    assert embedded("--run", other, "--data", photos, "--batch-size", batch_size, "--out", tmp_path / "out") == 0
    assert f"are of other {part}: removed, to be embedded anew\n" in capsys.readouterr().err
    rows, records, _ = open_embeddings(tmp_path / "out")
    expected = Embedder.from_run(other).embed([photos / record.id for record in records], batch_size=batch_size)
    np.testing.assert_array_equal(rows, expected)


def test_mistakes_are_refused_before_any_work(
    run: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def told(*arguments: object) -> str:
        assert embedded(*arguments) == 2
        return capsys.readouterr().err.rpartition("error: ")[2]

    out = tmp_path / "out"
    assert told("--run", tmp_path, "--data", photos, "--out", out).startswith("expected a checkpoint (step-N), a run's")
    missing = told("--run", run, "--data", tmp_path / "no", "--out", out)
    assert missing == f"expected a folder of images or of shards at {tmp_path / 'no'}, found none; correct the path\n"
    assert "leave --split out" in told("--run", run, "--data", photos, "--split", "test", "--out", out)
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "train-000000.tar").write_bytes(b"")
    told_empty = told("--run", run, "--data", tmp_path / "empty", "--out", out)
    assert "found none among 1 files; for its 1 tar files run `python -m dist_proxygml.shard index" in told_empty
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("years")
    assert "found something else; name another folder" in told(
        "--run", run, "--data", photos, "--out", tmp_path / "mine", "--overwrite"
    )
    assert embedded("--run", run, "--data", photos, "--out", out) == 0
    assert "add --overwrite" in told("--run", run, "--data", photos, "--out", out)
    (photos / "b.PNG").unlink()
    assert embedded("--run", run, "--data", photos, "--out", out, "--overwrite") == 0
    assert len(open_embeddings(out).rows) == 8
    with pytest.raises(SystemExit):
        main(["--run", str(run), "--data", str(photos), "--out", str(out), "--batch-size", "0"])


def test_embeddings_that_were_changed_are_refused(run: Path, photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert embedded("--run", run, "--data", photos, "--out", out) == 0
    content = bytearray((out / "embeddings.npy").read_bytes())
    content[-1] ^= 1
    (out / "embeddings.npy").write_bytes(content)
    with pytest.raises(ValueError, match=r"\bout\b.*embeddings\.npy.*sha256"):
        open_embeddings(out)
    (out / "embeddings.npy").unlink()
    with pytest.raises(ValueError, match=r"embeddings\.npy.*No such file"):
        open_embeddings(out)
    (out / "manifest.json").write_text("{}")
    with pytest.raises(
        ValueError,
        match=r"dist-proxygml-embeddings.*version 1.*manifest\.json",
    ):
        open_embeddings(out)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("embeddings.npy", b""),
        ("embeddings.npy", b"negative"),
        ("embeddings.npy", pickle.dumps(print)),
        ("ids.jsonl", b"[" * 200_000),
    ],
)
def test_embeddings_whose_manifest_was_mended_are_refused(tmp_path: Path, name: str, content: bytes) -> None:
    out = tmp_path / "out"
    rows = (np.eye(4, dtype=np.float32), [ImageRecord(str(row)) for row in range(4)], [])
    write_embeddings(tmp_path / "new", out, [rows], embedding_dim=4, about={"model": {}, "data": {}})
    before = (out / name).read_bytes()
    (out / name).write_bytes(before.replace(b"(4, 4)", b"(-4,4)") if content == b"negative" else content)
    manifest = json.loads((out / "manifest.json").read_text())
    manifest["files"] = hash_files(out, list(manifest["files"]), num_threads=1)
    (out / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match=r"\bout is damaged: "):
        open_embeddings(out)


def test_two_processes_do_not_write_the_same_embeddings(
    run: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    program = (
        "import sys; from pathlib import Path; from dist_proxygml.storage.lock import FolderLock\n"
        "lock = FolderLock(Path(sys.argv[1])); print('begun', flush=True); input()"
    )
    command = [sys.executable, "-c", program, str(tmp_path / "out")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "begun\n"
        assert embedded("--run", run, "--data", photos, "--out", tmp_path / "out") == 2
        assert "out is in use by process" in capsys.readouterr().err
        other.communicate("\n")
    assert embedded("--run", run, "--data", photos, "--out", tmp_path / "out") == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "photos"]


def test_rows_that_are_not_of_length_1_are_never_published(tmp_path: Path) -> None:
    rows = np.eye(3, dtype=np.float32)
    check_rows(rows)
    rows[1, 1] = np.nan
    with pytest.raises(ValueError, match=r"length 1.*nan in row 1"):
        check_rows(rows)
    rows[1, 1] = 0
    parts = [(rows, [ImageRecord(name) for name in "abc"], [])]
    with pytest.raises(ValueError, match=r"\b0 in row 1 \(b\)"):
        write_embeddings(tmp_path / "new", tmp_path / "out", parts, embedding_dim=3, about={})
    assert not (tmp_path / "out").exists()


def test_what_an_older_version_wrote_opens_and_what_it_left_unfinished_begins_anew(
    run: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    old = tmp_path / "old"
    old.mkdir()
    np.save(old / "embeddings.npy", np.eye(3, 4, dtype=np.float32))
    (old / "ids.jsonl").write_text("".join(f'{{"id": "{name}.jpg"}}\n' for name in "abc"))
    about = {"kind": "dist-proxygml-embeddings", "version": 1, "num_rows": 3, "embedding_dim": 4, "num_ids": 3}
    about |= {"rows": "float32, finite, unit length", "model": {}, "data": {}, "batch_size": 2, "left_out": []}
    about["files"] = hash_files(old, ["embeddings.npy", "ids.jsonl"], num_threads=1)
    (old / "manifest.json").write_text(json.dumps(about))
    assert [record.id for record in open_embeddings(old).records] == ["a.jpg", "b.jpg", "c.jpg"]

    partial = tmp_path / ".out.partial"
    partial.mkdir()
    for name in ("embeddings.npy", "ids.jsonl", "plan.json", "done.jsonl"):
        (partial / name).write_text("{}")
    assert embedded("--run", run, "--data", photos, "--out", tmp_path / "out") == 0
    assert f"embedding anew: an older version of this package left {partial}" in capsys.readouterr().err
    assert len(open_embeddings(tmp_path / "out").rows) == 9
    assert not partial.exists()
