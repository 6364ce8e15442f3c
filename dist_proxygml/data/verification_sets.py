"""Verification sets of face recognition (`lfw.bin`, `cfp_fp.bin`, `agedb_30.bin`): images in pairs, same person or not.

    NAME.bin    a pickle of (image files, flags): images 2i and 2i + 1 are pair i, flag i says whether they are the same

Each file becomes a split of its own, called as the file, and each image with other bytes a sample. That images are of
one person is known of pairs only, so every image is a class of its own: no Recall@K can be made of what is not known.
Pairs are cut in file order into ten consecutive folds, as equal as they can be (Huang et al. 2007, LFW).

A pickle can run any program when it is read. Here it can name nothing but what these files hold (lists, tuples, bytes,
bools, ints, and NumPy's arrays and scalars of them, for which there are stand-ins without NumPy's code).
"""

import io
import pickle
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from dist_proxygml.data.datasets import SourceDataset, SourceImage, SourcePair
from dist_proxygml.data.index import NUM_FOLDS

_MAX_BYTES = 4 << 30  # of a file; those of the field have some hundred MB
_AGAIN = "download it again"


def read_pairs(root: Path) -> SourceDataset:
    """Read a folder of verification sets, or one file. Raises ValueError as `with_pairs`."""
    files = sorted(root.glob("*.bin")) if root.is_dir() else [root]
    if not files:
        raise ValueError(f"{root} has no verification sets; expected files like lfw.bin")
    return with_pairs(SourceDataset("pairs", []), files)


def with_pairs(dataset: SourceDataset, files: Sequence[Path]) -> SourceDataset:
    """Add verification sets to a data set.

    Raises ValueError if a file is missing, is no verification set, or has the name of another split.
    """
    images, pairs = list(dataset.images), dict(dataset.pairs)
    splits = {image.split for image in images}
    for file in files:
        split = file.stem
        if split in splits:
            raise ValueError(f"{file} would be the split {split!r}, which is there already; rename the file")
        splits.add(split)
        contents, flags = _read_bin(file)
        names: dict[bytes, str] = {}
        for number, content in enumerate(contents):
            if content not in names:
                name = names[content] = f"{file.name}#{number}"
                images.append(SourceImage(split, name, name, name, content))
        fold_of = np.repeat(range(NUM_FOLDS), [len(fold) for fold in np.array_split(flags, NUM_FOLDS)]).tolist()
        pairs[split] = [
            SourcePair(names[first], names[second], flag, fold)
            for first, second, flag, fold in zip(contents[::2], contents[1::2], flags, fold_of, strict=True)
        ]
    return replace(dataset, images=images, pairs=pairs)


def _read_bin(path: Path) -> tuple[list[bytes], list[bool]]:
    """The image files and the flags of a verification set."""
    if not path.is_file():
        raise ValueError(f"{path} is no file; expected a verification set such as lfw.bin")
    if path.stat().st_size > _MAX_BYTES:
        raise ValueError(f"{path} has {path.stat().st_size:,} bytes, expected at most {_MAX_BYTES:,}; {_AGAIN}")
    try:
        found = _Unpickler(io.BytesIO(path.read_bytes()), encoding="bytes").load()
        images, flags = map(_as_list, found)
        contents, same = [_as_bytes(image) for image in images], [_as_bool(flag) for flag in flags]
    except Exception as problem:  # the unpickler raises whatever a damaged pickle leads to
        raise ValueError(
            f"{path} is not a verification set, a pickle of (images, flags): {type(problem).__name__}: {problem}; "
            f"{_AGAIN}"
        ) from problem
    if len(contents) != 2 * len(same) or len(same) < NUM_FOLDS:
        raise ValueError(
            f"{path} has {len(contents)} images and {len(same)} flags; expected two images for each flag, and at least "
            f"{NUM_FOLDS} flags; {_AGAIN}"
        )
    return contents, same


class _Array:
    """Stands in for an array or a scalar of NumPy: its bytes, or the list of its objects."""

    content: Any = b""

    def __setstate__(self, state: Any) -> None:
        *_, self.content = state  # (version, shape, dtype, order, content)


class _Dtype:
    """Stands in for a dtype. Those of more than a byte have no meaning here."""

    def __init__(self, name: str | bytes, *_: object) -> None:
        code = name.decode("ascii") if isinstance(name, bytes) else name
        if code not in ("b1", "u1", "i1", "O", "O8") and not code.startswith("S"):
            raise pickle.UnpicklingError(f"an array of {code}, expected bytes, bools or objects")

    def __setstate__(self, state: Any) -> None:
        pass


def _array(*_: object) -> _Array:
    return _Array()


def _filled(content: Any, *_: object) -> _Array:
    array = _Array()
    array.content = content
    return array


def _scalar(_: _Dtype, content: Any) -> _Array:
    return _filled(content)


def _encoded(text: str, encoding: str = "latin1") -> bytes:
    if encoding not in ("latin1", b"latin1"):
        raise pickle.UnpicklingError(f"bytes in {encoding!r}")
    return text.encode("latin1")


_CORES = ("numpy.core", "numpy._core")  # until and since NumPy 2
_ALLOWED: Mapping[tuple[str, str], Any] = {
    ("_codecs", "encode"): _encoded,  # bytes of Python 3 in protocol 2
    ("numpy", "ndarray"): _Array,
    ("numpy", "dtype"): _Dtype,
    **{(f"{core}.multiarray", "_reconstruct"): _array for core in _CORES},
    **{(f"{core}.multiarray", "scalar"): _scalar for core in _CORES},
    **{(f"{core}.numeric", "_frombuffer"): _filled for core in _CORES},
}


class _Unpickler(pickle.Unpickler):
    """Unpickles lists, tuples, bytes, bools, ints, and stand-ins for NumPy's; refuses any other name."""

    def find_class(self, module: str, name: str) -> Any:
        """Return one of the few stand-ins."""
        if (module, name) not in _ALLOWED:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which no verification set does")
        return _ALLOWED[module, name]


def _as_list(value: Any) -> list[Any]:
    if isinstance(value, _Array):
        value = value.content  # of flags as bytes, a number for each
    if not isinstance(value, list | tuple | bytes | bytearray):
        raise TypeError(f"expected a list, got {type(value).__name__}")
    return list(value)


def _as_bytes(value: Any) -> bytes:
    if isinstance(value, _Array):
        value = value.content
    if not isinstance(value, bytes | bytearray):
        raise TypeError(f"expected the bytes of an image, got {type(value).__name__}")
    return bytes(value)


def _as_bool(value: Any) -> bool:
    if isinstance(value, _Array):
        (value,) = value.content  # one byte
    if value not in (0, 1) or not isinstance(value, int):
        raise TypeError(f"expected True, False, 1 or 0, got {str(value)[:40]}")
    return bool(value)
