"""Random transforms of torchvision.transforms.v2, by name, of crops that have their final size.

    {"name": "random_resized_crop", "size": 224, "augment": [
        {"name": "RandAugment", "num_ops": 2, "magnitude": 9},
        {"name": "RandomApply", "p": 0.5, "transforms": [{"name": "GaussianBlur", "kernel_size": 23}]},
        {"name": "RandomErasing", "p": 0.25, "value": [124, 116, 104]}
    ]}

A step is the name of a class and its arguments. Enumerations and dtypes are given by their value ("bilinear",
"float32"), steps within steps as `transforms`. Steps get uint8 [3, S, S] and give the same, or floats from 0 to 1,
which are rounded to uint8: mean and deviation belong to the backbone.

Randomness: torchvision draws from torch's global generator (and other versions may draw from Python's), so both are
seeded for each image with a number from that image's own generator, and restored after the batch. An image therefore
depends on (seed, epoch, image) alone, as everywhere in transforms.py. A batch is computed with one thread, as in a
loading process: the rounding of a mean, and so the last bit of a pixel, depends on their number.

Chosen: a list within `random_resized_crop`, after crop and mirroring, so that steps work on small images of one size,
and what a published recipe adds to its crop is all that is written.
Declined: a transform of its own made of v2 steps alone, crop included, which would be a second, slower way to crop, and
whose size would be known by trial only; checking names where a configuration is parsed, because a run must be evaluated
where torchvision no longer has a transform that it was trained with. They are checked where a run is (checks.py),
before anything is written.
"""

import contextlib
import difflib
import inspect
import random
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as vision

_NUM_TRIED = 8  # random draws of a trial, beside one in which everything is applied
_SETTING = "data.train_transform.augment"


class Augment:
    """A list of steps.

    Raises:
        ValueError: a name or an argument is unknown, or a step cannot be built of its arguments.
    """

    def __init__(self, steps: Sequence[Mapping[str, Any]], *, size: int) -> None:
        self.size = size
        self._settings = steps
        self._steps = _build_all(steps, _SETTING, always=False)

    def __call__(self, image: torch.Tensor, *, seed: int) -> torch.Tensor:
        """Transform an image, uint8 [3, S, S], within `own_randomness`.

        Raises:
            ValueError: a step fails, or the result has another shape or type.
        """
        return _to_uint8(_apply(self._steps, image, seed=seed), self.size)

    def check(self) -> None:
        """Try all steps on noise.

        Raises:
            ValueError: as `__call__`, or floats of the result are not from 0 to 1.
        """
        noise = torch.randint(0, 256, (3, self.size, self.size), generator=torch.Generator().manual_seed(0))
        everything = _build_all(self._settings, _SETTING, always=True)
        with own_randomness():
            for seed in range(1 + _NUM_TRIED):
                result = _apply(self._steps if seed else everything, noise.to(torch.uint8), seed=seed)
                _to_uint8(result, self.size)
                if result.is_floating_point() and not (0 <= result.min() and result.max() <= 1):
                    raise ValueError(
                        f"expected {_SETTING} to give floats from 0 to 1, got {result.min():.3g} to "
                        f"{result.max():.3g}; remove Normalize, mean and deviation belong to the backbone"
                    )


@contextlib.contextmanager
def own_randomness() -> Iterator[None]:
    """Restore the global generators at the end, and compute with one thread until then."""
    of_torch, of_python, num_threads = torch.default_generator.get_state(), random.getstate(), torch.get_num_threads()
    try:
        if num_threads != 1:
            torch.set_num_threads(1)
        yield
    finally:
        if num_threads != 1:
            torch.set_num_threads(num_threads)
        torch.default_generator.set_state(of_torch)
        random.setstate(of_python)


def _apply(steps: Sequence[tuple[str, v2.Transform]], image: torch.Tensor, *, seed: int) -> torch.Tensor:
    torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed GPUs too
    random.seed(seed)
    for where, step in steps:
        try:
            image = step(image)
        except Exception as problem:  # whatever a step raises
            reason = (str(problem).splitlines() or [""])[0]
            raise ValueError(
                f"expected {where} to transform images, got {type(problem).__name__}: {reason}; change its arguments "
                "or remove it"
            ) from problem
    return image


def _to_uint8(image: Any, size: int) -> torch.Tensor:
    if not isinstance(image, torch.Tensor):
        raise ValueError(f"expected {_SETTING} to give an image, got {type(image).__name__}; remove the step that does")
    if image.shape != (3, size, size) or not (image.dtype == torch.uint8 or image.is_floating_point()):
        raise ValueError(
            f"expected {_SETTING} to give images [3, {size}, {size}] of uint8 or floats, got {list(image.shape)} of "
            f"{str(image.dtype).removeprefix('torch.')}; remove the step that changes size, channels or type"
        )
    if image.dtype == torch.uint8:
        return image
    converted: torch.Tensor = vision.to_dtype(image.clamp(0, 1), torch.uint8, scale=True)
    return converted


def _build_all(steps: Any, where: str, *, always: bool) -> list[tuple[str, v2.Transform]]:
    if not (isinstance(steps, list | tuple) and all(isinstance(step, Mapping) and "name" in step for step in steps)):
        raise ValueError(f'expected {where} to be a list of steps such as {{"name": "RandAugment"}}, got {steps!r}')
    named = [(f"{where}.{number} ({step['name']})", step) for number, step in enumerate(steps)]
    return [(place, _build(step, place, always=always)) for place, step in named]


def _build(step: Mapping[str, Any], where: str, *, always: bool) -> v2.Transform:
    """Build a step; with `always` one that is applied with probability 1, as are those within it."""
    name, arguments = step["name"], {key: value for key, value in step.items() if key != "name"}
    known = {
        key: entry for key, entry in vars(v2).items() if inspect.isclass(entry) and issubclass(entry, v2.Transform)
    }
    del known["Transform"]  # their base
    if name not in known:
        nearest = difflib.get_close_matches(str(name), known, n=3, cutoff=0.0)
        raise ValueError(
            f"expected the name of a transform of torchvision.transforms.v2 in {where}; did you mean "
            f"{', '.join(map(repr, nearest))}? there are: {', '.join(sorted(known))}"
        )
    parameters = inspect.signature(known[name]).parameters
    unknown = next((key for key in arguments if key not in parameters), None)
    if unknown is not None:
        nearest = difflib.get_close_matches(unknown, parameters, n=1, cutoff=0.0)
        hint = f"did you mean {nearest[0]!r}? it takes: {', '.join(parameters)}" if nearest else "it takes none"
        raise ValueError(f"{where}: unknown argument {unknown!r}; {hint}")
    if name == "RandomErasing" and arguments.get("value") == "random":
        raise ValueError(
            f"{where}: expected a value from 0 to 255, or one for each colour, got 'random', which is noise about 0 "
            "for images that are normalised, and these are not yet; [124, 116, 104] is the mean of ImageNet"
        )
    if always and "p" in parameters and isinstance(arguments.get("p", parameters["p"].default), int | float):
        arguments["p"] = 1.0
    if "transforms" in arguments:
        inside = _build_all(arguments["transforms"], f"{where}.transforms", always=always)
        arguments["transforms"] = [one for _, one in inside]
    try:
        return known[name](**{key: _converted(key, value) for key, value in arguments.items()})
    except Exception as problem:  # of torchvision, or of an enumeration
        reason = (str(problem).splitlines() or [""])[0]
        raise ValueError(
            f"expected arguments that {where} can be built of, got {type(problem).__name__}: {reason}; change them"
        ) from problem


def _converted(key: str, value: Any) -> Any:
    """Convert a value of JSON to what torchvision takes under this name."""
    if isinstance(value, str):
        match key:
            case "interpolation":
                return v2.InterpolationMode(value)
            case "policy":
                return v2.AutoAugmentPolicy(value)
            case "dtype":
                return getattr(torch, value)
    return value
