"""A backbone as one ONNX graph, which runs without this package; the only file that knows onnxruntime.

    images: uint8 RGB [b, 3, S, S], any b from 1 on  ->  embeddings: float32 [b, D], unit rows

Mean, deviation and order of colours are inside, since they are the backbone's first layer. The side S is fixed to the
one that the network was evaluated at: grids of pooling and places of transformers are worked out for it while the graph
is recorded, and it refuses images of another one. Arithmetic is float32, whatever precision the weights were trained
in: few runtimes have bfloat16.

The graph comes from torch.export (dynamo=True), whose record of our source files is omitted. TorchScript was declined:
torch.jit is deprecated in torch itself.
"""

import importlib.util
from collections.abc import Callable
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
    """Refuse settings that would fail after the work is done.

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
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(f"torch cannot write this backbone as ONNX ({reason}); take --format safetensors") from error
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


def open_onnx(path: Path) -> Embed:
    """A written graph, run by onnxruntime on the CPU with as many threads as torch has."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    def embed(images: Tensor) -> Tensor:
        return torch.from_numpy(session.run([OUTPUT], {INPUT: images.numpy()})[0])

    return embed


def _example(side: int) -> Tensor:
    """Two images, as one is a size that torch.export would take for a constant."""
    return torch.randint(0, 256, (2, 3, side, side), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
