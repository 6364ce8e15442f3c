"""A stand-in for a GPU: tensors that say cuda:0 and keep their numbers on the host.

    with StandIn() as gpu:
        loss = ProxyGMLLoss(100, 512).to("cuda")
        loss(embeddings.to("cuda"), labels.to("cuda")).total.backward()
    assert gpu.num_synchronisations <= 3 and gpu.num_launches <= 90

Refused, in torch's words: operators between tensors of the host and of the device (but scalars where CUDA takes
them), `numpy()` of the device's, operators without a CUDA kernel. Counted, by the line of the project that asks: kernel
launches, and the times that the host waits for the device: to read a value, for a result whose size depends on values,
for a copy that blocks.

How: a subclass of torch.Tensor around a CPU tensor, and a dispatch mode that runs every operator on what is inside.
Composite operators are taken apart before they arrive, backward passes included. Only Python sees the name of the
device: to C++ such a tensor is one of the CPU, so that autograd runs without a driver.

Not seen: streams, races, 32-bit limits, rounding, memory, NCCL's own rules (collectives go through gloo), and the
choice of kernels by C++ code that looks at the device. How many kernels an operator launches, and what waits, are the
tables below: an estimate, from ATen's CUDA sources.
"""

import contextlib
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

aten = torch.ops.aten
CUDA, HOST = torch.device("cuda", 0), torch.device("cpu")
PROJECT = str(Path(__file__).parents[1] / "dist_proxygml")

# How often an operator waits for the device; all others never do.
WAITS = {
    "_local_scalar_dense": 1,  # item(), bool(), int(), float()
    "nonzero": 1,
    "masked_select": 1,
    "unique_consecutive": 1,
    "_unique2": 2,
    "bincount": 2,  # the least and the largest value
    "repeat_interleave": 1,  # without output_size
    "equal": 1,
    "_coalesce": 1,
}
# Kernels of an operator; all others launch one.
KERNELS = {
    "topk": 4,
    "bincount": 5,
    "cumsum": 2,
    "logsumexp": 9,
    "masked_select": 6,
    "repeat_interleave": 3,
} | dict.fromkeys(
    "empty empty_like empty_strided new_empty new_empty_strided detach lift_fresh set_ resize_ is_same_size _nnz dim "
    "sym_size is_coalesced _coalesced_ _sparse_coo_tensor_unsafe _sparse_coo_tensor_with_dims_and_tensors".split(),
    0,
)
_NONZERO = 4  # of a vector: partial sums, their sum, the scan, the places
STREAM = SimpleNamespace(synchronize=lambda: None)  # there is one, and it is always done
MOVES = {"copy_", "_to_copy", "copy"}
INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index"}
# Beside pointwise operators, those that take a 0-dimensional tensor of the host.
TAKES_SCALARS = {
    "fill_",
    "fill",
    "index_fill_",
    "masked_fill",
    "masked_fill_",
    "lerp_",
    "_foreach_mul_",
    "_foreach_add_",
}
FUSED_OPTIMIZERS = {"_fused_adam_", "_fused_adamw_", "_fused_sgd_"}  # lists of tensors: a launch for some 40 of them


class OnDevice(torch.Tensor):
    """A tensor of the stand-in."""

    inner: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, inner: Tensor) -> "OnDevice":
        """Wrap a tensor of the host."""
        assert not isinstance(inner, OnDevice)
        options: dict[str, Any] = {"dtype": inner.dtype, "layout": inner.layout, "device": HOST}
        if inner.layout == torch.sparse_coo:
            options |= {"dispatch_sizes_strides_policy": "sizes"}
        else:
            options |= {"strides": inner.stride(), "storage_offset": inner.storage_offset()}
        tensor = torch.Tensor._make_wrapper_subclass(cls, inner.shape, **options)  # type: ignore[attr-defined]
        tensor.inner = inner
        return tensor

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        """cuda:0."""
        return CUDA

    is_cuda = property(lambda self: True)
    is_cpu = property(lambda self: False)

    def __repr__(self) -> str:  # type: ignore[override]
        return f"OnDevice({self.inner!r})"

    def to(self, *args: Any, **options: Any) -> Tensor:
        """Convert; C++ would take a move to the host for none."""
        copy = options.pop("copy", False)
        device, dtype, non_blocking, memory_format = torch._C._nn._parse_to(*args, **options)
        dtype = dtype or self.dtype
        if device is not None and device.type == "cpu":
            return _current().download(self, dtype, non_blocking)
        if dtype == self.dtype and memory_format is None and not copy:
            return self
        return aten._to_copy.default(self, dtype=dtype, memory_format=memory_format)

    def cpu(self, *_: Any) -> Tensor:
        """Copy to the host."""
        return self.to("cpu")

    def cuda(self, *_: Any, **__: Any) -> Tensor:
        """Nothing to do."""
        return self

    def tolist(self) -> Any:
        """Read all values."""
        _current().count("tolist", waits=1)
        return self.inner.detach().tolist()

    def numpy(self, *, force: bool = False) -> Any:
        """Refuse, as CUDA does."""
        if not force:
            raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() first.")
        return self.cpu().detach().numpy()

    def __array__(self, dtype: Any = None) -> Any:
        return self.numpy()

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.cpu().detach().__reduce_ex__(protocol)  # as what reads it will have it: on the host

    def __deepcopy__(self, memo: Any) -> "OnDevice":
        return OnDevice(self.inner.detach().clone())

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _current().run(func, args, kwargs or {})


class StandIn(TorchDispatchMode):
    """The device is there inside the block."""

    current: "StandIn | None" = None

    def __init__(self) -> None:
        super().__init__()
        self.clear()

    def clear(self) -> None:
        """Start counting anew."""
        self.launches: Counter[str] = Counter()  # by operator and line
        self.waits: Counter[str] = Counter()
        self.collectives: Counter[str] = Counter()

    @property
    def num_launches(self) -> int:
        """Kernels launched."""
        return self.launches.total()

    @property
    def num_synchronisations(self) -> int:
        """How often the host waited for the device."""
        return self.waits.total()

    @property
    def num_collectives(self) -> int:
        """Collectives started."""
        return self.collectives.total()

    def __enter__(self) -> "StandIn":
        torch._C._ensureCUDADeviceGuardSet()  # C++ asks no driver which device is the current one
        self._patches = contextlib.ExitStack()
        cuda: dict[str, Any] = {
            "_lazy_init": lambda: None,
            "is_available": lambda: True,
            "is_initialized": lambda: True,
            "is_bf16_supported": lambda *_: True,
            "device_count": lambda: 1,
            "current_device": lambda: 0,
            "set_device": lambda device: None,
            "get_device_capability": lambda device=None: (9, 0),
            "get_device_name": lambda device=None: "stand-in",
            "get_device_properties": lambda device=None: SimpleNamespace(
                name="stand-in", total_memory=80 << 30, major=9, minor=0, multi_processor_count=132, uuid="0"
            ),
            "current_stream": lambda device=None: STREAM,
            "stream": lambda stream: contextlib.nullcontext(),
            "synchronize": lambda device=None: self.count("synchronize", waits=1),
            "empty_cache": lambda: None,
            "mem_get_info": lambda device=None: (70 << 30, 80 << 30),
            "memory_allocated": lambda device=None: 0,
            "max_memory_allocated": lambda device=None: 0,
            "reset_peak_memory_stats": lambda device=None: None,
            "get_rng_state": lambda device=None: torch.get_rng_state(),
            "set_rng_state": lambda state, device=None: None,
        }
        for name, value in cuda.items():
            self._replace(torch.cuda, name, value)
        # Tensors of inference mode have no place for what is inside.
        self._replace(torch, "inference_mode", lambda mode=True: torch.no_grad() if mode else contextlib.nullcontext())
        # `module.to` makes new parameters, instead of putting the device's data into the host's.
        self._patches.callback(torch.__future__.set_overwrite_module_params_on_conversion, False)
        torch.__future__.set_overwrite_module_params_on_conversion(True)
        # `torch.tensor(..., device=)` makes a tensor of the host first, whose copy the mode sees.
        self._patches.callback(torch._C._set_only_lift_cpu_tensors, False)
        torch._C._set_only_lift_cpu_tensors(True)
        self._replace(StandIn, "current", self)
        return super().__enter__()

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        self._patches.close()

    def _replace(self, owner: Any, name: str, value: Any) -> None:
        self._patches.callback(setattr, owner, name, getattr(owner, name))
        setattr(owner, name, value)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.run(func, args, kwargs or {})

    def download(self, tensor: OnDevice, dtype: torch.dtype, non_blocking: bool) -> Tensor:
        """Copy to the host."""
        self.count("download", launches=1, waits=0 if non_blocking else 1)
        return tensor.detach().inner.to(dtype, copy=True)

    def run(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """Run one operator: refuse, count, compute, wrap."""
        name = func._schema.name.split("::")[-1]
        flat, spec = tree_flatten((args, kwargs))
        ours = [value for value in flat if isinstance(value, OnDevice)]
        asks = any(isinstance(value, torch.device) and value.type == "cuda" for value in flat)
        if not any(isinstance(value, Tensor) for value in flat) and _is_asked_by_autograd():
            return tree_map(
                lambda value: OnDevice(value) if isinstance(value, Tensor) else value, func(*args, **kwargs)
            )
        if name == "_pin_memory":
            return args[0]
        if not ours and not asks:
            return func(*args, **kwargs)
        hosts = [value for value in flat if isinstance(value, Tensor) and not isinstance(value, OnDevice)]
        _refuse_mixtures(name, func, args, ours, hosts)
        _refuse_without_kernel(func, ours)
        self._count_operator(name, func, args, kwargs, ours, hosts)
        inner_args, inner_kwargs = tree_unflatten([_unwrapped(value) for value in flat], spec)
        if asks:
            inner_kwargs.pop("pin_memory", None)
        if name == "_to_copy" and not ours:  # a copy even where the type is the same
            found = func(*inner_args, **inner_kwargs).clone()
        else:
            found = SUBSTITUTES.get(func, func)(*inner_args, **inner_kwargs)
        # What an operator changes and hands back is the tensor that it was given.
        given = {id(tensor.inner): tensor for tensor in ours} | {id(tensor): tensor for tensor in hosts}

        def wrapped(value: Any) -> Any:
            if not isinstance(value, Tensor):
                return value
            same = given.get(id(value))
            return OnDevice(value) if same is None or same.shape != value.shape else same

        return tree_map(wrapped, found)

    def _count_operator(
        self, name: str, func: Any, args: Any, kwargs: dict[str, Any], ours: list[OnDevice], hosts: list[Tensor]
    ) -> None:
        if func._schema.name.startswith("c10d"):
            if "wait" not in name and "monitored" not in name:
                self.collectives[f"{name} {_line()}"] += 1
            return
        waits = WAITS.get(name, 0)
        if name == "repeat_interleave" and kwargs.get("output_size") is not None:
            waits = 0
        if name in INDEXING:
            indices = [index for index in args[1] if isinstance(index, Tensor)]
            value = args[2] if len(args) > 2 else None
            fills = isinstance(value, Tensor) and not isinstance(value, OnDevice) and len(indices) == 1
            masks = sum(index.dtype in (torch.bool, torch.uint8) for index in indices)
            waits += 0 if fills else masks
            waits += any(not isinstance(index, OnDevice) for index in indices)  # copied to the device first
        if name in MOVES and (hosts or not ours):
            waits += not (kwargs.get("non_blocking") or (len(args) > 2 and args[2]))
        makes_view = func.is_view or any(r.alias_info and not r.alias_info.is_write for r in func._schema.returns)
        launches = 0 if makes_view else _num_kernels(name, args, kwargs)
        if name in INDEXING:
            launches += _NONZERO * (0 if fills else masks)
        self.count(name, launches=launches, waits=waits)

    def count(self, name: str, *, launches: int = 0, waits: int = 0) -> None:
        """Count for the line that asks."""
        line = _line() if launches or waits else ""
        if launches:
            self.launches[f"{name} {line}"] += launches
        if waits:
            self.waits[f"{name} {line}"] += waits

    def __str__(self) -> str:
        """What was counted, the most first: for people."""
        lines = [f"{self.num_synchronisations} synchronisations, {self.num_launches} launches"]
        for title, counts in (("waits", self.waits), ("launches", self.launches)):
            lines += [f"  {title:<10}{count:>5}  {what}" for what, count in counts.most_common(40)]
        return "\n".join(lines)


def _num_kernels(name: str, args: Any, kwargs: dict[str, Any]) -> int:
    """Kernels of an operator, where its arguments decide."""
    if name in FUSED_OPTIMIZERS or name.startswith("_foreach"):
        return -(-len(args[0]) // 40)
    if name in ("nonzero", "nonzero_static"):
        return _NONZERO + (args[0].ndim > 1)
    if name == "unique_consecutive":  # the last is the copy of their number
        returns_inverse = kwargs.get("return_inverse", len(args) > 1 and args[1])
        return 6 if returns_inverse else 3
    if name == "sort":  # a small one in place, of a copy; a large one by a pass for each byte of its keys
        key_bytes = args[0].element_size()
        return 4 if args[0].shape[-1] <= (1024 if key_bytes == 8 else 2048) else 3 + key_bytes
    return KERNELS.get(name, 1)


def _current() -> StandIn:
    assert StandIn.current is not None, "a tensor of the stand-in is used outside of it"
    return StandIn.current


def _unwrapped(value: Any) -> Any:
    if isinstance(value, OnDevice):
        return value.inner
    return HOST if isinstance(value, torch.device) and value.type == "cuda" else value


def _line() -> str:
    """The line of the project that is running."""
    frame = sys._getframe()
    while frame is not None:
        file = frame.f_code.co_filename
        if file.startswith(PROJECT):
            return f"{Path(file).relative_to(PROJECT)}:{frame.f_lineno}"
        frame = frame.f_back  # type: ignore[assignment]
    return "elsewhere"


def _is_asked_by_autograd() -> bool:
    """Whether a step of autograd in C++ runs, which makes its zeros on the device that C++ knows."""
    frame = sys._getframe(2)
    while frame.f_code.co_filename == __file__ or frame.f_code.co_name in ("inner", "_fn"):
        frame = frame.f_back  # type: ignore[assignment]
    return frame.f_code.co_name == "_engine_run_backward"


def _refuse_mixtures(name: str, func: Any, args: Any, ours: list[OnDevice], hosts: list[Tensor]) -> None:
    if name in MOVES or not hosts or not ours:
        return
    wrong = hosts
    if name in INDEXING:  # indices may be the host's, what they index may not
        value = args[2] if len(args) > 2 else None
        values = [value] if isinstance(value, Tensor) and not isinstance(value, OnDevice) and value.ndim else []
        wrong = values if isinstance(args[0], OnDevice) else [args[0]]
    elif not func._schema.name.startswith("c10d") and name not in FUSED_OPTIMIZERS:
        takes_scalars = torch.Tag.pointwise in func.tags or name in TAKES_SCALARS
        wrong = [tensor for tensor in hosts if tensor.ndim or not takes_scalars]
    if wrong:
        raise RuntimeError(
            "Expected all tensors to be on the same device, but found at least two devices, cpu and cuda:0! "
            f"({name}, of the host: {[list(tensor.shape) for tensor in wrong]}, at {_line()})"
        )


def _refuse_without_kernel(func: Any, ours: list[OnDevice]) -> None:
    is_sparse = "_sparse_coo" in func.name() or any(tensor.layout == torch.sparse_coo for tensor in ours)
    key = "SparseCUDA" if is_sparse else "CUDA"
    has_schema = torch._C._dispatch_has_kernel(func.name())
    if has_schema and not torch._C._dispatch_has_computed_kernel_for_dispatch_key(func.name(), key):
        raise NotImplementedError(f"Could not run '{func.name()}' with arguments from the '{key}' backend at {_line()}")


def _product_in(left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    """torch.mm with another type of the result, which CPUs do not have."""
    if left.dtype not in (torch.float16, torch.bfloat16) or dtype != torch.float32:
        raise RuntimeError(f"out_dtype must be float32 for half precision, got {dtype} for {left.dtype}")
    return torch.mm(left.to(dtype), right.to(dtype))


def _channels(x: Tensor, *values_C: Tensor) -> list[Tensor]:
    return [value_C.view(1, -1, *[1] * (x.ndim - 2)) for value_C in values_C]


def _sum(x: Tensor) -> Tensor:
    return x.sum(dim=[0, *range(2, x.ndim)])


def _stats(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    variance_C, mean_C = torch.var_mean(x, dim=[0, *range(2, x.ndim)], correction=0)
    return mean_C, (variance_C + eps).rsqrt()


def _gather_stats(
    x: Tensor,
    mean_WC: Tensor,
    inverse_WC: Tensor,
    running_mean_C: Tensor,
    running_var_C: Tensor,
    momentum: float,
    eps: float,
    count_W: Tensor,
) -> tuple[Tensor, Tensor]:
    total, count_W1 = count_W.sum(), count_W[:, None]
    mean_C = (count_W1 * mean_WC).sum(dim=0) / total
    squares_C = (count_W1 * (inverse_WC.pow(-2) - eps + (mean_WC - mean_C) ** 2)).sum(dim=0)
    running_mean_C.lerp_(mean_C, momentum)
    running_var_C.lerp_(squares_C / (total - 1), momentum)
    return mean_C, (squares_C / total + eps).rsqrt()


def _elemt(x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, inverse: Tensor, eps: float) -> Tensor:
    weight, bias, mean, inverse = _channels(x, weight, bias, mean, inverse)
    return (x - mean) * inverse * weight + bias


def _backward_reduce(
    dy: Tensor, x: Tensor, mean_C: Tensor, inverse_C: Tensor, weight_C: Tensor, *needs: bool
) -> tuple[Tensor, ...]:
    product_C = _sum(dy * (x - _channels(x, mean_C)[0]))
    return _sum(dy), product_C, product_C * inverse_C, _sum(dy)


def _backward_elemt(
    dy: Tensor,
    x: Tensor,
    mean: Tensor,
    inverse: Tensor,
    weight: Tensor,
    sum_: Tensor,
    product_: Tensor,
    count_W: Tensor,
) -> Tensor:
    mean, inverse, weight, sum_, product_ = _channels(x, mean, inverse, weight, sum_, product_)
    total = count_W.sum()
    return (dy - sum_ / total - (x - mean) * inverse**2 * product_ / total) * inverse * weight


# What only CUDA has, as its documentation and SyncBatchNorm's (Ioffe and Szegedy, arXiv 1502.03167) define it.
SUBSTITUTES: dict[Any, Any] = {
    aten.mm.dtype: _product_in,
    aten.batch_norm_stats.default: _stats,
    aten.batch_norm_gather_stats_with_counts.default: _gather_stats,
    aten.batch_norm_elemt.default: _elemt,
    aten.batch_norm_backward_reduce.default: _backward_reduce,
    aten.batch_norm_backward_elemt.default: _backward_elemt,
}
