"""A backbone as one graph that runs without this package, ONNX or TorchScript; the only file that knows onnxruntime.

    images: uint8 RGB [b, 3, S, S], any b from 1 on  ->  embeddings: float32 [b, D], unit rows

Mean, deviation and order of colours are inside, since they are the backbone's first layer. The side S is fixed to the
one that the network was evaluated at: grids of pooling and places of transformers are worked out for it while the graph
is recorded. An ONNX graph refuses images of another side; a trace does not, and may give them other embeddings than the
backbone would. Arithmetic is float32, whatever precision the weights were trained in: few runtimes have bfloat16.

ONNX comes from torch.export (dynamo=True), whose record of our source files is left out. torch.jit.trace records
TorchScript and checks it by a second recording; torch.jit is deprecated in torch itself, so ONNX is what will last.
"""

import importlib.util
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

INPUT, OUTPUT = "images", "embeddings"
FIRST_OPSET = 18  # of those that torch.onnx has operators for; earlier ones come from a converter that mostly fails
_BYTES_IN_ONE_FILE = 2**31 - 2**26  # protobuf holds less than 2 GiB; beyond, weights lie in NAME.onnx.data

Embed = Callable[[Tensor], Tensor]
"""Images uint8 [b, 3, S, S] to embeddings float32 [b, D], on the CPU."""


def check_onnx(*, opset: int | None, runs: bool) -> None:
    """Refuse before any work what would fail after it.

    Args:
        opset: the operator set that is wanted, None for torch's choice.
        runs: whether the graph is to be run as well.

    Raises:
        ValueError: a package is missing, or does not know that operator set.
    """
    needed = ["onnx", "onnxscript", *(["onnxruntime"] if runs else [])]
    missing = [name for name in needed if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(
            f"--format onnx{' --verify' if runs else ''} expects the packages {', '.join(needed)}, found no "
            f"{' and no '.join(missing)}; pip install '.[export]' in the checkout, or pip install {' '.join(missing)}"
        )
    if opset is None:
        return
    import onnx

    last: int = onnx.defs.onnx_opset_version()
    if not FIRST_OPSET <= opset <= last:
        raise ValueError(f"expected an --opset from {FIRST_OPSET} to {last}, got {opset}; leave it out for torch's own")


def write_onnx(model: nn.Module, path: Path, *, side: int, opset: int | None = None) -> int:
    """Write a backbone as ONNX; the operator set that it is in.

    Args:
        model: in evaluation mode, float32, on the CPU.
        path: the file; weights beyond 2 GiB go beside it.
        side: S.
        opset: the operator set; None for torch's own.

    Raises:
        ValueError: torch cannot write this network, or not in this operator set.
    """
    batch = torch.export.Dim("batch", min=1)
    try:
        with torch.no_grad():
            program: Any = torch.onnx.export(
                model,
                (_example(side),),
                dynamo=True,
                input_names=[INPUT],
                output_names=[OUTPUT],
                dynamic_shapes=({0: batch},),
                opset_version=opset,
                verbose=False,
            )
    except torch.onnx.OnnxExporterError as error:
        raise ValueError(
            f"torch cannot write this backbone as ONNX ({_first_line(error)}); take --format torchscript"
        ) from error
    found: int = program.model.opset_imports[""]
    if opset not in (None, found):
        raise ValueError(
            f"expected ONNX in operator set {opset}, but torch could write this backbone in {found} only; leave out "
            f"--opset, or take --opset {found}"
        )
    # Names of our functions and files, and a trace of the source at every node, with the folders of this machine.
    program.model.graph.metadata_props.clear()
    for node in program.model.graph.all_nodes():
        node.metadata_props.clear()
    num_bytes = sum(tensor.nbytes for tensor in model.state_dict().values())
    program.save(path, external_data=num_bytes > _BYTES_IN_ONE_FILE)
    return found


def write_torchscript(model: nn.Module, path: Path, *, side: int) -> None:
    """Write a backbone as TorchScript; arguments as in `write_onnx`.

    Raises:
        ValueError: torch cannot trace this network, or a second trace differs.
    """
    try:
        with torch.no_grad(), _known_warnings():
            torch.jit.save(torch.jit.trace(model, (_example(side),), check_trace=True), path)
    except (RuntimeError, torch.jit.TracingCheckError) as error:
        raise ValueError(f"torch cannot trace this backbone ({_first_line(error)}); take --format onnx") from error


def open_onnx(path: Path) -> Embed:
    """A written graph, run by onnxruntime on the CPU with as many threads as torch has."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    def embed(images: Tensor) -> Tensor:
        return torch.from_numpy(session.run([OUTPUT], {INPUT: images.numpy()})[0])

    return embed


def open_torchscript(path: Path) -> Embed:
    """A written trace, on the CPU."""
    with _known_warnings():
        traced = torch.jit.load(path, map_location="cpu")

    def embed(images: Tensor) -> Tensor:
        with torch.inference_mode():
            return traced(images)

    return embed


def _example(side: int) -> Tensor:
    """Two images, as one is a size that torch.export would take for a constant."""
    return torch.randint(0, 256, (2, 3, side, side), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@contextmanager
def _known_warnings() -> Iterator[None]:
    """Without what is said elsewhere or is not so; other warnings of the tracer are shown.

    That torch.jit is deprecated comes once for every function; export.py says it once. The tracer warns of the
    backbone's check of its input's shape, which is the same for every batch.
    """

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"`torch\.jit\.\w+` is deprecated", FutureWarning)
        warnings.filterwarnings("ignore", category=torch.jit.TracerWarning, module=r".*dist_proxygml\W+backbone")
        yield


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
