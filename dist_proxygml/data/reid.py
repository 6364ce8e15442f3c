"""Person re-identification to a list of images with cameras: Market-1501 and MSMT17.

    Market-1501   bounding_box_train, query, bounding_box_test: 0002_c1s1_000451_03.jpg is person 2 at camera 1.
                  -1 is junk, neither right nor wrong, and left out; 0000 are distractors of the gallery, never right
    MSMT17        list_{train,val,query,gallery}.txt: 0000/0000_000_01_0303morning_0008_0.jpg 0 is person 0 at camera 1,
                  below train/ or test/; the images of val are of persons that train, and train too

The splits are train, query and gallery; the last two share their classes. The number of the camera goes into each
sample's JSON, and from there into the index: `evaluation.exclude_same`. Sources: Zheng et al., Scalable Person
Re-identification: A Benchmark, ICCV 2015; Wei et al., Person Transfer GAN, CVPR 2018.
"""

import re
from dataclasses import replace
from pathlib import Path

from dist_proxygml.data.datasets import IMAGE_SUFFIXES, SourceDataset, SourceImage, finish, is_hidden
from dist_proxygml.data.published import find_layout, rows_of

_SHARED = (("query", "gallery"),)
_MARKET_FOLDERS = {"train": "bounding_box_train", "query": "query", "gallery": "bounding_box_test"}
_MARKET_NAME = re.compile(r"(-1|\d{4,})_c(\d{1,6})\D.*")
_MSMT_NAME = re.compile(r"\d+_\d+_(\d{1,6})_.*")
_MSMT_FOLDERS = {"train": ("train", "mask_train_v2"), "test": ("test", "mask_test_v2")}  # of its two releases


def read_market1501(root: Path, *, allow_partial: bool = False) -> SourceDataset:
    """Read Market-1501, or anything that lies as it does (`allow_partial`: its numbers are not compared).

    Raises ValueError for an image whose name says no person and camera, and as `finish`.
    """
    _, root = find_layout(root, {"Market-1501": [(folder,) for folder in _MARKET_FOLDERS.values()]})
    images, num_junk = [], 0
    for split, folder in _MARKET_FOLDERS.items():
        for path in sorted((root / folder).iterdir()):
            if is_hidden(path.name) or path.suffix.lower() not in IMAGE_SUFFIXES:
                continue
            name = f"{folder}/{path.name}"
            found = _MARKET_NAME.fullmatch(path.name)
            if found is None:
                raise ValueError(f"{root}: expected a name like 0002_c1s1_000451_03.jpg, got {name}; rename it")
            person, camera = int(found[1]), int(found[2])
            if person == -1:
                num_junk += 1
                continue
            if person == 0 and split != "gallery":
                raise ValueError(f"{root}: {name} is a distractor (0000), which the gallery alone has; move it there")
            class_name = found[1] if person else "distractors"
            images.append(SourceImage(split, person, class_name, name, path, {"camera": camera}))
    dataset = finish("market1501", images, root=root, allow_partial=allow_partial, shared_classes=_SHARED)
    notes = (f"{num_junk} junk images (-1) were left out, as the protocol ignores them",) if num_junk else ()
    return replace(dataset, notes=(*dataset.notes, *notes))


def read_msmt17(root: Path, *, allow_partial: bool = False) -> SourceDataset:
    """Read MSMT17 of either release; images of list_train.txt and list_val.txt train, as it counts them.

    Raises ValueError for an image whose name says no camera, and as `finish`.
    """
    lists = {"train": ("train", "val"), "query": ("query",), "gallery": ("gallery",)}
    names = [f"list_{name}.txt" for of_split in lists.values() for name in of_split]
    _, root = find_layout(root, {"MSMT17": [*((name,) for name in names), *_MSMT_FOLDERS.values()]})
    images = []
    for split, of_split in lists.items():
        side = "train" if split == "train" else "test"
        folder = next(folder for folder in _MSMT_FOLDERS[side] if (root / folder).is_dir())
        for table in (root / f"list_{name}.txt" for name in of_split):
            for path, person in rows_of(table, 2):
                found = _MSMT_NAME.fullmatch(path.rpartition("/")[2])
                if found is None or not person.isdigit():
                    raise ValueError(
                        f"{table}: expected a line like 0000/0000_000_01_0303morning_0008_0.jpg 0, got {path} {person}"
                    )
                # The persons of both sides are numbered from 0.
                person = f"{side}/{int(person):04d}"
                name = f"{folder}/{path}"
                images.append(SourceImage(split, person, person, name, root / name, {"camera": int(found[1])}))
    return finish("msmt17", images, root=root, allow_partial=allow_partial, shared_classes=_SHARED)
