"""Files that are in two splits."""

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dist_proxygml.reporting import copies
from dist_proxygml.reporting.copies import Pair, find_copies
from dist_proxygml.reporting.thumbnails import Thumbnails
from tests.report_runs import Picture, write_picture_shards


def files_of(number: int) -> list[bytes]:
    """JPEG files of noise."""
    generator, files = np.random.default_rng(0), []
    for _ in range(number):
        stream = io.BytesIO()
        Image.fromarray(generator.integers(0, 256, (12, 12, 3), dtype=np.uint8)).save(stream, "JPEG")
        files.append(stream.getvalue())
    return files


def shards(folder: Path, test: list[Picture], train: list[Picture]) -> tuple[Thumbnails, Thumbnails]:
    indexes = write_picture_shards(folder, {"test": test, "train": train})
    return Thumbnails(indexes["test"]), Thumbnails(indexes["train"])


def test_a_file_that_is_in_both_splits_is_found_whatever_its_label(tmp_path: Path) -> None:
    files = files_of(8)
    test, train = shards(
        tmp_path,
        [(file, number) for number, file in enumerate(files[:5])],
        [(files[5], 0), (files[3], 1), (files[6], 0), (files[0], 0), (files[3], 0)],
    )
    found = find_copies(test, train)
    assert found.pairs == [Pair(0, 3), Pair(3, 1)]
    assert (found.num_found, found.num_compared, found.num_expected) == (2, 2, 2)


def test_equal_length_and_checksum_are_not_enough(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = files_of(4)
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
    files: list[Picture] = [(file, 0) for file in files_of(5)]
    found = find_copies(*shards(tmp_path, files, files[::-1]))
    assert (found.pairs, found.num_found, found.num_compared) == ([Pair(0, 4), Pair(1, 3)], 5, 2)
    assert found.num_expected == 5


def test_a_file_that_no_decoder_reads_is_a_copy_as_well(tmp_path: Path) -> None:
    broken: list[Picture] = [(b"\xff\xd8\xff broken", 0)]
    assert find_copies(*shards(tmp_path, broken, broken)).pairs == [Pair(0, 0)]
