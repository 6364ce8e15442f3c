"""Each configuration trains: its loss, optimizers and transforms on a small network of its own family, or of one of
today's.
"""

import json
from pathlib import Path

import pytest

from dist_proxygml.config import load_config
from dist_proxygml.distributed.parallel import ParallelContext
from dist_proxygml.storage.run_folder import RunFolder
from tests.harness import run_ranks
from tests.stand_ins import FAMILIES, ROOT, tiny_run

CONFIGS = sorted(str(path.relative_to(ROOT / "configs").with_suffix("")) for path in ROOT.glob("configs/**/*.json"))


def family_of(name: str) -> str:
    if "vit" in name:
        return next(family for family in FAMILIES if ("clip" if "inshop" in name else "dinov2") in family)
    return "test_efficientnet" if name.endswith("cpu") else "resnet50"


def trained(context: ParallelContext, name: str, family: str, runs_dir: str) -> str:
    from dist_proxygml.training.run import train

    config = load_config(ROOT / "configs" / f"{name}.json", [*tiny_run(family), f"runs_dir={runs_dir}"])
    return str(train(config, context, resume="never"))


@pytest.mark.ci
@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", CONFIGS)
def test_a_configuration_trains_with_a_small_network_in_place_of_its_own(name: str, tmp_path: Path) -> None:
    family = family_of(name)
    (folder,) = run_ranks(trained, 1, name, family, str(tmp_path), timeout=240)
    run = RunFolder(Path(folder))
    stored = json.loads(run.config.read_text())
    assert stored["backbone"]["name"] == f"timm/{family}"
    assert len(stored["backbone"]["mean"]) == 3  # filled in from the weights of that name
    (evaluation,) = run.evaluations().values()
    assert 0 <= json.loads(evaluation.read_text())["metrics"]["recall@1"] <= 1
    assert list(run.checkpoints.glob("step-000002"))
