"""The import rules of docs/design.md, read from the source with `ast`.

Chosen: one table of layers, in which a module may import only what stands below it. Declined:
import-linter, a dependency for sixty lines.
"""

import ast
import importlib.util
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = "dist_proxygml"

# Top to bottom. A name stands for a module and for what lies in the package of that name; modules
# of one package (data, evaluation) may import each other, other neighbours may not.
LAYERS: tuple[tuple[str, ...], ...] = (
    ("launchers.sweep",),
    ("launchers",),
    ("search",),
    ("embed", "index"),
    ("training", "shard", "report", "export", "sweep_chart", "doctor"),
    ("board",),
    ("plan",),
    ("rehearsal",),
    ("export_folder",),
    ("model_card",),
    (
        "evaluation.best",
        "evaluation.compare",
        "evaluation.evaluator",
        "evaluation.report",
        "export_check",
        "run_plan",
        "step",
        "sweep",
    ),
    ("retrieval_index",),
    ("embedder", "embeddings", "search_page"),
    ("transfer",),
    ("checkpoint", "nonfinite", "optim", "run_lock", "trained", "training_data", "watchdog"),
    ("projector", "proxy_statistics", "telemetry"),
    ("bank_storage", "checkpoint_folder", "engine", "sealed_folder"),
    ("published_folder",),
    ("loss", "backbone", "evaluation"),
    ("data",),
    (
        "selection",
        "regularizer",
        "proxies",
        "bank_optim",
        "batch_norm",
        "bn_inception",
        "pretrained",
        "small_cnn",
        "graph",
    ),
    ("similarity", "traffic", "memory", "repartition"),
    ("fused",),
    ("bank", "matmul"),
    ("preemption",),
    ("parallel",),
    ("collectives",),
    ("config", "faults", "slurm", "finding", "options"),
    ("partition", "protocols"),
)

OWNERS: dict[str, set[str]] = {
    "deepspeed": {"engine"},
    "faiss": {"evaluation.search", "retrieval_index"},
    "onnx": {"graph"},
    "onnxruntime": {"graph"},
    "webdataset": {"data"},
    "submitit": {"launchers.submit"},
    "psutil": {"memory"},
    "pydantic": {"config"},
    "timm": {"backbone"},
    "triton": {"fused"},
    "jinja2": {"evaluation.render"},
    "huggingface_hub": {"model_card"},
    "matplotlib": {"evaluation.charts", "sweep_chart"},
    "tensorboard": {"projector"},
    "torch.utils.tensorboard": {"telemetry"},
}

# Who may call torch.distributed. Everyone may name its ProcessGroup as a type.
DISTRIBUTED = {"parallel", "collectives", "bank_storage", "checkpoint", "engine", "trained"}
DISTRIBUTED_TYPES = {"ProcessGroup"}

# Takes tensors, ints and a process group, never a configuration.
MATHS = {
    "collectives",
    "evaluation.exact",
    "evaluation.hubs",
    "evaluation.metrics",
    "evaluation.rank_counts",
    "evaluation.retrieval",
    "evaluation.search",
    "fused",
    "loss",
    "matmul",
    "partition",
    "proxies",
    "regularizer",
    "selection",
    "similarity",
    "traffic",
}


def sources() -> dict[str, Path]:
    """Every module of the package by its name inside it, and every launcher as `launchers.NAME`."""
    found = {}
    for path in sorted((ROOT / PACKAGE).rglob("*.py")):
        parts = path.relative_to(ROOT / PACKAGE).with_suffix("").parts
        found[".".join(part for part in parts if part != "__init__")] = path
    for path in sorted((ROOT / "launchers").glob("*.py")):
        found[f"launchers.{path.stem}"] = path
    return found


SOURCES = sources()
MODULES = sorted(name for name in SOURCES if name)  # without the package's own __init__
TREES = {name: ast.parse(path.read_text(), filename=str(path)) for name, path in SOURCES.items()}


def imports(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Line and full dotted name of every import of the file, those inside functions too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                yield node.lineno, f"{node.module}.{alias.name}"


def own_module(imported: str) -> str | None:
    """The module of this project that a name lies in ("" for the package itself), or None."""
    top, _, rest = imported.partition(".")
    if top == "launchers":
        return imported
    if top != PACKAGE:
        return None
    while rest and rest not in SOURCES:
        rest = rest.rpartition(".")[0]
    return rest


def belongs(module: str, name: str) -> bool:
    """Whether `module` is `name` or lies in it."""
    return module == name or module.startswith(name + ".")


def layer(module: str) -> int:
    """Index of the layer of a module in LAYERS; the longest name that fits decides."""
    fitting = [(len(name), index) for index, names in enumerate(LAYERS) for name in names if belongs(module, name)]
    where = SOURCES[module].relative_to(ROOT)
    assert fitting, f"{where} has no layer: give it one in LAYERS and in docs/design.md"
    return max(fitting)[1]


@pytest.mark.parametrize("module", MODULES)
def test_a_module_imports_only_what_stands_below_it(module: str) -> None:
    for line, imported in imports(TREES[module]):
        target = own_module(imported)
        if target is None:
            continue
        where = f"{SOURCES[module].relative_to(ROOT)}:{line}"
        if target == "":
            assert module.startswith("launchers."), f"{where} imports the package's front door"
            continue
        package = module.rpartition(".")[0]
        neighbours = package != "" and package != "launchers" and belongs(target, package)
        allowed = layer(target) > layer(module) or (neighbours and layer(target) == layer(module))
        assert allowed, f"{where} imports {target}, which does not stand below {module}"


def test_no_module_imports_itself_through_others() -> None:
    below = {module: {t for _, name in imports(TREES[module]) if (t := own_module(name))} for module in MODULES}
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " -> ".join((*path, module))
        if module not in done:
            for target in below.get(module, ()):
                visit(target, (*path, module))
            done.add(module)

    for module in MODULES:
        visit(module, ())


@pytest.mark.parametrize("library", sorted(OWNERS))
def test_a_library_is_imported_only_by_its_owners(library: str) -> None:
    strangers = {
        module
        for module, tree in TREES.items()
        if any(belongs(imported, library) for _, imported in imports(tree))
        and not any(belongs(module, owner) for owner in OWNERS[library])
    }
    assert not strangers


@pytest.mark.parametrize("module", MODULES)
def test_only_the_communication_modules_call_torch_distributed(module: str) -> None:
    if module in DISTRIBUTED or module.startswith("launchers."):
        return
    aliases, used = set(), set()
    for node in ast.walk(TREES[module]):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if belongs(alias.name, "torch.distributed"):
                    aliases.add(alias.asname or alias.name)
        elif isinstance(node, ast.ImportFrom) and belongs(node.module or "", "torch.distributed"):
            used |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module == "torch":
            aliases |= {a.asname or a.name for a in node.names if a.name == "distributed"}
    for node in ast.walk(TREES[module]):
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) in aliases:
            used.add(node.attr)
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "torch.distributed":
            used.add(node.attr)
    assert used <= DISTRIBUTED_TYPES


@pytest.mark.parametrize("module", sorted(MATHS & set(MODULES)))
def test_maths_never_sees_the_configuration(module: str) -> None:
    assert "config" not in {own_module(imported) for _, imported in imports(TREES[module])}


@pytest.mark.parametrize("module", sorted(SOURCES))
def test_a_module_states_things_and_does_nothing(module: str) -> None:
    """At the top level: definitions, constants, imports; a bare call there would be an action."""
    for node in TREES[module].body:
        guard = isinstance(node, ast.If) and ast.unparse(node.test) in (
            "__name__ == '__main__'",
            "TYPE_CHECKING",
        )
        states = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef, ast.Assign)
        docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        allowed = guard or docstring or isinstance(node, (*states, ast.AnnAssign))
        assert allowed, f"{SOURCES[module].relative_to(ROOT)}:{node.lineno}: {ast.unparse(node)}"
    used = {type(node) for node in ast.walk(TREES[module])}
    assert ast.Global not in used


@pytest.mark.parametrize("module", sorted(SOURCES))
def test_a_file_opens_by_saying_what_it_is(module: str) -> None:
    assert ast.get_docstring(TREES[module]), SOURCES[module].relative_to(ROOT)


def test_importing_the_package_starts_and_prints_nothing() -> None:
    program = """
import importlib, random, sys
import torch, torch.distributed as dist
before = torch.get_rng_state(), random.getstate(), torch.get_num_threads()
for name in sys.argv[1:]:
    importlib.import_module(name)
after = torch.get_rng_state(), random.getstate(), torch.get_num_threads()
assert not dist.is_initialized(), "a process group was started"
assert not torch.cuda.is_initialized(), "a device was touched"
assert "matplotlib" not in sys.modules, "what only draws was imported"
assert torch.equal(before[0], after[0]) and before[1:] == after[1:], "seed or threads changed"
"""
    # DeepSpeed prints while it is imported, and its owner may not be asked to prevent that.
    quiet = [f"{PACKAGE}.{name}" for name in MODULES if not name.startswith("launchers.")]
    not_asked = importers_of("deepspeed")
    if importlib.util.find_spec("triton") is None:  # torch brings it on Linux only
        not_asked |= importers_of("triton")
    quiet = [name for name in quiet if own_module(name) not in not_asked]
    result = subprocess.run(
        [sys.executable, "-c", program, PACKAGE, *quiet],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert (result.returncode, result.stdout) == (0, ""), result.stderr


def test_make_test_runs_every_folder_of_tests() -> None:
    named = set(re.findall(r"tests/(\w+)", (ROOT / "Makefile").read_text()))
    there = {path.parent.name for path in (ROOT / "tests").glob("*/test_*.py")}
    assert there <= named


def importers_of(library: str) -> set[str]:
    """Modules that import `library`, directly or through others of this project."""
    found = {
        module for module, tree in TREES.items() if any(belongs(imported, library) for _, imported in imports(tree))
    }
    while True:
        more = {
            module for module in MODULES if any(own_module(imported) in found for _, imported in imports(TREES[module]))
        }
        if more <= found:
            return found
        found |= more
