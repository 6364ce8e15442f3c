"""Images in two splits: copies by their bytes, the same picture in another size or compression by its looks."""

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_sample_images

from dist_proxygml.reporting import copies
from dist_proxygml.reporting.copies import Pair, find_copies, find_look_alikes
from dist_proxygml.reporting.thumbnails import Thumbnails
from tests.report_runs import Picture, write_picture_shards


def photographs(number: int) -> list[Image.Image]:
    """Parts of two photographs, each another place in them."""
    generator = np.random.default_rng(0)
    parts = []
    for place in range(number):
        whole = Image.fromarray(load_sample_images().images[place % 2])
        side = int(generator.integers(120, 300))
        left, top = int(generator.integers(0, whole.width - side)), int(generator.integers(0, whole.height - side))
        parts.append(whole.crop((left, top, left + side, top + side)))
    return parts


def jpeg(image: Image.Image, quality: int = 90) -> bytes:
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=quality)
    return stream.getvalue()


def shards(folder: Path, test: list[Picture], train: list[Picture]) -> tuple[Thumbnails, Thumbnails]:
    indexes = write_picture_shards(folder, {"test": test, "train": train})
    return Thumbnails(indexes["test"]), Thumbnails(indexes["train"])


def test_a_file_that_is_in_both_splits_is_found_whatever_its_label(tmp_path: Path) -> None:
    files = [jpeg(image) for image in photographs(8)]
    test, train = shards(
        tmp_path,
        [(file, number) for number, file in enumerate(files[:5])],
        [(files[5], 0), (files[3], 1), (files[6], 0), (files[0], 0), (files[3], 0)],
    )
    found = find_copies(test, train)
    assert found.pairs == [Pair(0, 3), Pair(3, 1)]
    assert (found.num_found, found.num_compared, found.num_expected) == (2, 2, 2)


def test_equal_length_and_checksum_are_not_enough(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = [jpeg(image) for image in photographs(4)]
    test, train = shards(tmp_path, [(files[0], 0), (files[1], 0)], [(files[2], 0), (files[1], 0)])
    # As if the first two had the same length and checksum.
    keys = {files[0]: 1, files[1]: 2, files[2]: 1}
    monkeypatch.setattr(
        copies, "file_keys", lambda index: np.array([keys[Thumbnails(index).file(i)] for i in range(2)], np.uint64)
    )
    found = find_copies(test, train)
    assert (found.num_found, found.pairs, found.num_expected) == (2, [Pair(1, 1)], 1)


def test_beyond_a_number_of_files_length_and_checksum_are_taken_at_their_word(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(copies, "_MAX_COMPARED", 2)
    files: list[Picture] = [(jpeg(image), 0) for image in photographs(5)]
    found = find_copies(*shards(tmp_path, files, files[::-1]))
    assert (found.pairs, found.num_found, found.num_compared) == ([Pair(0, 4), Pair(1, 3)], 5, 2)
    assert found.num_expected == 5


def test_the_same_picture_in_another_compression_or_size_is_found_and_strangers_are_not(tmp_path: Path) -> None:
    images = photographs(40)
    changed = {
        3: jpeg(images[3], 40),
        11: jpeg(images[11].resize((images[11].width // 2, images[11].height // 2)), 80),
        20: jpeg(images[20].resize((400, 400)), 85),
    }
    done: list[int] = []
    test, train = shards(
        tmp_path,
        [(jpeg(image), 0) for image in images[:24]],
        [(jpeg(image), 0) for image in images[24:]] + [(file, 0) for file in changed.values()],
    )
    found = find_look_alikes(test, train, most=100, progress=done.append)
    assert sorted(found.pairs) == [Pair(3, 16), Pair(11, 17), Pair(20, 18)]
    assert (found.num_here, found.num_there, sum(done)) == (24, 19, 43)


def test_the_same_shape_in_another_colour_is_another_picture(tmp_path: Path) -> None:
    files: list[Picture] = []
    for colour in ("red", "blue"):
        image = Image.new("RGB", (64, 64), "white")
        image.paste(colour, (20, 20, 44, 44))
        files.append((jpeg(image), 0))
    assert find_look_alikes(*shards(tmp_path, files[:1], files[1:]), most=10).pairs == []


def test_two_pale_pictures_of_different_shapes_are_different(tmp_path: Path) -> None:
    stripes = np.repeat(np.array([246, 252] * 4 + [246], np.uint8), 8) * np.ones((72, 1), np.uint8)
    other = (498 - stripes.astype(int)).astype(np.uint8)
    files: list[Picture] = [(jpeg(Image.fromarray(pixels).convert("RGB"), 98), 0) for pixels in (stripes, other)]
    assert find_look_alikes(*shards(tmp_path, files[:1], files[1:]), most=10).pairs == []


def test_at_most_so_many_are_looked_at_and_damaged_ones_are_passed_over(tmp_path: Path) -> None:
    files: list[Picture] = [(jpeg(image), 0) for image in photographs(6)]
    test, train = shards(tmp_path, [*files, (b"\xff\xd8\xff broken", 0)], files)
    found = find_look_alikes(test, train, most=100)
    assert (found.num_here, found.num_there, sorted(found.pairs)) == (6, 6, [Pair(i, i) for i in range(6)])
    found = find_look_alikes(test, train, most=4)
    assert (found.num_there, len(found.pairs) <= 4) == (4, True)
    nothing = write_picture_shards(tmp_path / "broken", {"test": [(b"\xff\xd8\xff broken", 0)]})["test"]
    assert find_look_alikes(test, Thumbnails(nothing), most=10).pairs == []
