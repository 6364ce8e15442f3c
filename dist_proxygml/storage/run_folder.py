"""The names in the folder of a run; who writes them and who reads them has them from here.

runs/NAME/config.json                                what was asked for (read by config.py)
          metrics.jsonl, report.html, tensorboard/
          run.json                                   what it ran on, and how long
          checkpoints/step-000800/
          evaluation/step-000800.json                on the test split; validation-step-000800.json on classes that
                                                     are held out, pixels.json without a model, step-000800-on-...
                                                     on other data
          embeddings/step-000800.npz, NAME.partial/  of the newest evaluation; of an interrupted one
          proxies/step-000800.json                   what the images kept of the proxies
"""

import re
from pathlib import Path
from typing import NamedTuple

from dist_proxygml.storage.files import paths_in


class RunFolder(NamedTuple):
    """The folder of a run, which need not be there."""

    path: Path

    @property
    def config(self) -> Path:
        """The configuration that it was last started with."""
        return self.path / "config.json"

    @property
    def metrics(self) -> Path:
        """The log, a JSON object a line."""
        return self.path / "metrics.jsonl"

    @property
    def facts(self) -> Path:
        """What the run ran on, and for how long: ranks, device, parameters, seconds by phase."""
        return self.path / "run.json"

    @property
    def report(self) -> Path:
        """The page that shows it."""
        return self.path / "report.html"

    @property
    def board(self) -> Path:
        """TensorBoard's folder."""
        return self.path / "tensorboard"

    @property
    def checkpoints(self) -> Path:
        """The folder of checkpoints."""
        return self.path / "checkpoints"

    def evaluation(self, name: str) -> Path:
        """The result of an evaluation."""
        return self.path / "evaluation" / f"{name}.json"

    def embeddings(self, name: str) -> Path:
        """The rows of an evaluation."""
        return self.path / "embeddings" / f"{name}.npz"

    def unfinished(self, name: str) -> Path:
        """Folder for the embeddings of an unfinished evaluation."""
        return self.path / "embeddings" / f"{name}.partial"

    def proxies(self, step: int) -> Path:
        """Use of the proxies by the images before a step's evaluation."""
        return self.path / "proxies" / f"{step_name(step)}.json"

    def evaluations(self, *, of_validation: bool = False) -> dict[int, Path]:
        """Stored results by step, in order; none on other data."""
        return by_step(self.path / "evaluation", ".json", of_validation=of_validation)


def step_name(step: int, *, of_validation: bool = False) -> str:
    """Name of everything that belongs to a step, from its checkpoint to its evaluations."""
    return f"{'validation-' if of_validation else ''}step-{step:06d}"


def step_in(name: str) -> int | None:
    """The step in a name such as step-000800-on-shards-test.json, if there is one."""
    found = re.match(r"(?:validation-)?step-([0-9]{1,18})", name)
    return None if found is None else int(found[1])


def by_step(folder: Path, suffix: str = "", *, of_validation: bool = False) -> dict[int, Path]:
    """Paths whose names are exactly those of `step_name`, by step, in order.

    Raises:
        ValueError: the folder cannot be read.
    """
    pattern = re.compile(("validation-" if of_validation else "") + r"step-([0-9]{1,18})" + re.escape(suffix))
    found = {int(match[1]): path for path in paths_in(folder) if (match := pattern.fullmatch(path.name))}
    return dict(sorted(found.items()))
