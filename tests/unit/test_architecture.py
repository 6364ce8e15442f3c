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

ROOT = Path(__file__).parents[2]
PACKAGE = "dist_proxygml"

# Top to bottom. A name is a folder, or a module of the package's root. What stands in one line does not import each
# other; inside a folder everything may.
LAYERS: tuple[tuple[str, ...], ...] = (
    ("launchers", "__main__"),
    (
        *("init", "train", "evaluate", "submit", "sweep", "shard", "embed", "index", "search", "serve", "export"),
        *("report", "doctor", "plan"),
    ),
    ("inference", "cluster"),
    ("training",),
    ("reporting",),
    ("evaluation",),
    ("checkpoint",),
    ("head", "data", "backbones"),
    ("distributed",),
    ("cli",),
    ("storage",),
    ("config",),
    ("protocols", "rules", "faults"),
)

OWNERS: dict[str, set[str]] = {
    "deepspeed": {"distributed.engine"},
    "faiss": {"evaluation.search", "inference.retrieval_index"},
    "onnx": {"inference.graph"},
    "onnxruntime": {"inference.graph"},
    "fastapi": {"inference.server"},
    "fontTools": {"data.typefaces"},
    "datasets": {"data.hf"},
    "webdataset": {"data"},
    "submitit": {"cluster"},
    "psutil": {"distributed.memory"},
    "pyarrow": {"data.rows", "data.hf"},
    "pytorch_metric_learning": {"head.pml"},
    "pydantic": {"config"},
    "peft": {"backbones.lora"},
    "timm": {"backbones"},
    "triton": {"head.fused"},
    "jinja2": {"reporting.render"},
    "huggingface_hub": {"inference.hub", "inference.model_card", "data.remote", "backbones"},
    "matplotlib": {"reporting.charts", "cluster.sweep_chart"},
    "mlflow": {"reporting.trackers"},
    "tensorboard": {"reporting.projector"},
    "trackio": {"reporting.trackers"},
    "wandb": {"reporting.trackers"},
    "torch.utils.tensorboard": {"reporting.telemetry"},
}

# Who may call torch.distributed. Everyone may name its ProcessGroup as a type.
DISTRIBUTED = {
    "distributed.parallel",
    "distributed.collectives",
    "distributed.row_tensors",
    "checkpoint.bank_storage",
    "checkpoint.writer",
    "distributed.engine",
    "checkpoint.model",
}
DISTRIBUTED_TYPES = {"ProcessGroup"}

# Takes tensors, ints and a process group, never a configuration.
MATHS = {
    "distributed.collectives",
    "evaluation.class_sizes",
    "evaluation.exact",
    "reporting.hubs",
    "evaluation.metrics",
    "evaluation.rank_counts",
    "evaluation.retrieval",
    "evaluation.search",
    "head.fused",
    "head.global_loss",
    "head.loss",
    "head.matmul",
    "head.partition",
    "head.pml",
    "head.proxies",
    "head.reference",
    "head.regularizer",
    "head.selection",
    "head.similarity",
    "head.traffic",
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


IMPORTS = {name: list(imports(tree)) for name, tree in TREES.items()}


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


def room(module: str) -> str:
    """The folder that a module lies in, or the module itself at the root."""
    return module.partition(".")[0]


LAYER_OF = {name: number for number, names in enumerate(LAYERS) for name in names}


def test_every_folder_has_a_layer() -> None:
    assert {room(module) for module in MODULES} == set(LAYER_OF)


def test_a_folder_imports_only_what_stands_below_it() -> None:
    upwards = []
    for module in MODULES:
        for line, imported in IMPORTS[module]:
            target = own_module(imported)
            if target and room(target) != room(module) and LAYER_OF[room(target)] <= LAYER_OF[room(module)]:
                upwards.append(f"{SOURCES[module].relative_to(ROOT)}:{line} imports {target}")
            if target == "" and room(module) != "launchers":
                upwards.append(f"{SOURCES[module].relative_to(ROOT)}:{line} imports the package's front door")
    assert not upwards, "\n".join(upwards)


def test_no_module_imports_itself_through_others() -> None:
    below = {module: {t for _, name in IMPORTS[module] if (t := own_module(name))} for module in MODULES}
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " -> ".join((*path, module))
        if module not in done:
            for target in below.get(module, ()):
                visit(target, (*path, module))
            done.add(module)

    for module in MODULES:
        visit(module, ())


def test_a_library_is_imported_only_by_its_owners() -> None:
    strangers = {
        (library, module)
        for library, owners in OWNERS.items()
        for module in TREES
        if any(belongs(imported, library) for _, imported in IMPORTS[module])
        and not any(belongs(module, owner) for owner in owners)
    }
    assert strangers == set()


def called_from_torch_distributed(tree: ast.Module) -> set[str]:
    """Names of torch.distributed that a module uses."""
    aliases, used = {"torch.distributed"}, set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            aliases |= {a.asname or a.name for a in node.names if belongs(a.name, "torch.distributed")}
        elif isinstance(node, ast.ImportFrom) and belongs(node.module or "", "torch.distributed"):
            used |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module == "torch":
            aliases |= {a.asname or a.name for a in node.names if a.name == "distributed"}
    calls = (node for node in ast.walk(tree) if isinstance(node, ast.Attribute))
    return used | {node.attr for node in calls if ast.unparse(node.value) in aliases}


def test_only_the_communication_modules_call_torch_distributed() -> None:
    callers = {module for module in MODULES if called_from_torch_distributed(TREES[module]) - DISTRIBUTED_TYPES}
    assert callers <= DISTRIBUTED


def test_maths_never_sees_the_configuration() -> None:
    assert MATHS <= set(MODULES)
    seeing = {m for m in MATHS if "config" in {own_module(imported) for _, imported in IMPORTS[m]}}
    assert seeing == set()


def test_text_files_are_opened_with_their_encoding() -> None:
    """That of the locale may be ASCII."""
    nameless = []
    for module, tree in TREES.items():
        for node in (n for n in ast.walk(tree) if isinstance(n, ast.Call)):
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            mode = next((a.value for a in node.args if isinstance(a, ast.Constant) and isinstance(a.value, str)), "")
            is_text = name in ("read_text", "write_text") or (name == "open" and re.fullmatch(r"[rwax]\+?t?", mode))
            is_named = "encoding" in {keyword.arg for keyword in node.keywords} or (name == "read_text" and node.args)
            if is_text and not is_named:
                nameless.append(f"{SOURCES[module].relative_to(ROOT)}:{node.lineno}")
    assert nameless == []


def test_modules_state_things_and_do_nothing() -> None:
    """At the top level: definitions, constants, imports; a bare call there would be an action."""
    states = (
        ast.Import,
        ast.ImportFrom,
        ast.FunctionDef,
        ast.AsyncFunctionDef,
        ast.ClassDef,
        ast.Assign,
        ast.AnnAssign,
    )
    actions = []
    for module, tree in TREES.items():
        for node in tree.body:
            guard = isinstance(node, ast.If) and ast.unparse(node.test) in ("__name__ == '__main__'", "TYPE_CHECKING")
            docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
            if not (guard or docstring or isinstance(node, (*states, ast.AnnAssign))):
                actions.append(f"{SOURCES[module].relative_to(ROOT)}:{node.lineno}: {ast.unparse(node)}")
        actions += [f"{module}: global" for node in ast.walk(tree) if isinstance(node, ast.Global)]
    assert not actions, "\n".join(actions)


def test_every_file_opens_by_saying_what_it_is() -> None:
    assert [str(SOURCES[module]) for module, tree in TREES.items() if not ast.get_docstring(tree)] == []


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


def test_make_test_runs_every_folder_of_tests_and_ci_every_test() -> None:
    makefile = (ROOT / "Makefile").read_text()
    named = set(re.findall(r"tests/(\w+)", makefile))
    there = {path.parent.name for path in (ROOT / "tests").glob("*/test_*.py")}
    assert there <= named
    chosen = dict(re.findall(r"^(\w+): PYTEST := \S+ -m pytest(.*)$", makefile, re.MULTILINE))
    assert chosen == {"test": " -m 'not ci'", "ci": " -m ci"}
    assert re.findall(r"^make (test|ci)\b", (ROOT / ".ci" / "run").read_text(), re.MULTILINE) == ["test", "ci"]


def test_no_test_imports_from_another_file_of_tests() -> None:
    """What several need stands in a file of its own in tests/."""
    importing = {
        f"{path.relative_to(ROOT)} imports {imported}"
        for path in (ROOT / "tests").rglob("*.py")
        for _, imported in imports(ast.parse(path.read_text()))
        if ".test_" in imported
    }
    assert importing == set()


def importers_of(library: str) -> set[str]:
    """Modules that import `library`, directly or through others of this project."""
    found = {module for module in TREES if any(belongs(imported, library) for _, imported in IMPORTS[module])}
    while True:
        more = {module for module in MODULES if any(own_module(imported) in found for _, imported in IMPORTS[module])}
        if more <= found:
            return found
        found |= more
