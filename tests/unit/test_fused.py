"""The GPU's kernels give what head/similarity.py gives: run by Triton's interpreter on the CPU, and compiled for a GPU.

Most data are small integers, and lengths powers of two: their products have no rounding error, so values are equal and
ties are real. The interpreter needs TRITON_INTERPRET before triton is imported, so a child process calls the kernels.

Dimension key: that of head/fused.py.
"""

import functools
import importlib.util
import math
import multiprocessing
import pickle
import re
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from dist_proxygml import ProxyGMLLoss
from dist_proxygml.head import similarity
from dist_proxygml.head.bank import Bank, Pairs, build_bank
from dist_proxygml.head.choices import Head
from dist_proxygml.head.loss import ProxyLoss

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="needs triton, which comes with torch on Linux"
)

SHARED_MEMORY = {80: 163 * 1024, 90: 227 * 1024}  # bytes that a program can have, by compute capability


@pytest.fixture(scope="module")
def interpreted() -> Iterator[Callable[..., Any]]:
    """Calls a function of head/fused.py (or of this file) by name where the kernels are interpreted."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("TRITON_INTERPRET", "1")
            pool.submit(_compute_in_bfloat16_as_gpus_do).result()
        # As bytes: a tensor would travel as shared memory.
        yield lambda *call, **named: pickle.loads(pool.submit(_call, pickle.dumps((call, named))).result())


def _call(message: bytes) -> bytes:
    from dist_proxygml.head import fused

    (name, *arguments), named = pickle.loads(message)
    torch.set_num_threads(1)
    return pickle.dumps((getattr(fused, name, None) or globals()[name])(*arguments, **named))


def _compute_in_bfloat16_as_gpus_do() -> None:
    """Mends the interpreter: it cuts numbers off where a GPU rounds them, and multiplies the bits of bfloat16 numbers
    as integers.
    """
    import triton.language as tl
    from triton.runtime import interpreter

    def converted(data, source, target, rounding_mode, original=interpreter._convert_float):
        if (source, target) != (tl.float32, tl.bfloat16):
            return original(data, source, target, rounding_mode)
        return torch.tensor(data).bfloat16().view(torch.uint16).numpy()

    def product(self, left, right, *others, original=interpreter.InterpreterBuilder.create_dot):
        return original(self, *(self.cast_impl(factor, tl.float32) for factor in (left, right)), *others)

    interpreter._convert_float = converted
    interpreter.InterpreterBuilder.create_dot = product


def framed(values: Tensor) -> Tensor:
    """The same values, with NaN before and after them in memory: whoever reads there gets NaN."""
    frame = torch.full((values.numel() + 2000,), math.nan)
    inside = frame[1000 : 1000 + values.numel()].view(values.shape)
    return inside.copy_(values)


def integers(*shape: int, seed: int) -> Tensor:
    return framed(torch.randint(-3, 4, shape, generator=torch.Generator().manual_seed(seed)).float())


def normal(*shape: int, seed: int) -> Tensor:
    return framed(torch.randn(shape, generator=torch.Generator().manual_seed(seed)))


def exact_problem(num_rows: int, num_proxies: int, dim: int) -> tuple[Tensor, Bank, Tensor]:
    """Rows, bank and ranges to exclude: at both ends, across them, outside, far outside, empty, in the middle."""
    last, far = num_proxies, 1 << 40
    ranges = [[0, 2], [last - 1, last], [-7, -3], [last, last + 3], [-2, 1], [last - 2, last + 9], [3, 3]]
    ranges += [[far, far + 5], [-far, -far + 5], [1, last // 2]]
    excluded_R2 = torch.tensor([ranges[row % len(ranges)] for row in range(num_rows)])
    bank = Bank(integers(num_proxies, dim, seed=3), framed(2 ** integers(num_proxies, seed=1)))
    return integers(num_rows, dim, seed=2), bank, excluded_R2


def twin_pairs_above(embeddings_RD: Tensor, bank: Bank, floor_R: Tensor, excluded_R2: Tensor) -> Pairs:
    return similarity._pairs_above(embeddings_RD, bank, floor_R, excluded_R2, len(bank.proxies), 1 << 28)


def assert_same_pairs(got: Pairs | None, expected: Pairs) -> None:
    assert got is not None
    for of_kernels, of_twin in zip(got, expected, strict=True):
        assert of_kernels.dtype == of_twin.dtype
        assert torch.equal(of_kernels, of_twin)


def some_pairs(num_rows: int, num_proxies: int, *, num_pairs: int) -> Pairs:
    """Different pairs, by row, then by proxy."""
    generator = torch.Generator().manual_seed(4)
    key_n = torch.randperm(num_rows * num_proxies, generator=generator)[:num_pairs].sort().values
    return Pairs(key_n // num_proxies, key_n % num_proxies, torch.randn(num_pairs, generator=generator))


def assert_near(got: Tensor, expected: Tensor) -> None:
    """To one part in a million of the whole, in float32; what a sum of a few hundred terms has as rounding error."""
    assert got.dtype == torch.float32
    assert got.shape == expected.shape
    assert torch.linalg.vector_norm(got - expected) <= 1e-6 * torch.linalg.vector_norm(expected)


# Fewer than a tile, and tiles that are cut off at each edge.
SIZES = pytest.mark.parametrize("sizes", [(5, 77, 19), (67, 261, 33), (1, 1, 1)], ids=str)


@SIZES
def test_the_pairs_above_the_floor_are_those_of_the_twin(interpreted, sizes) -> None:
    embeddings_RD, bank, excluded_R2 = exact_problem(*sizes)
    similarity_Rp = similarity.all_similarities(embeddings_RD, bank)
    floor_R = similarity_Rp.median(dim=1).values  # some of the values: many are equal to it
    expected = twin_pairs_above(embeddings_RD, bank, floor_R, excluded_R2)
    got = interpreted(
        "pairs_above",
        embeddings_RD,
        bank.proxies,
        bank.inverse_norm,
        floor_R,
        excluded_R2,
        matmul_dtype=torch.float32,
        capacity=similarity_Rp.numel(),
    )
    assert_same_pairs(got, expected)


def test_a_value_at_the_floor_is_not_above_it(interpreted) -> None:
    proxies_pD = torch.tensor([[4.0], [5.0], [4.0]])
    got = interpreted(
        "pairs_above",
        torch.ones(2, 1),
        proxies_pD,
        torch.ones(3),
        torch.tensor([4.0, -math.inf]),
        torch.tensor([[0, 0], [1, 2]]),
        matmul_dtype=torch.float32,
        capacity=3,
    )
    assert [column.tolist() for column in got] == [[0, 1, 1], [1, 0, 2], [5.0, 4.0, 4.0]]


def test_more_pairs_than_there_is_room_for_are_none_and_just_as_many_are_not(interpreted) -> None:
    embeddings_RD, bank, excluded_R2 = exact_problem(9, 140, 3)
    floor_R = torch.zeros(9)
    expected = twin_pairs_above(embeddings_RD, bank, floor_R, excluded_R2)
    arguments = embeddings_RD, bank.proxies, bank.inverse_norm, floor_R, excluded_R2
    call = functools.partial(interpreted, "pairs_above", *arguments, matmul_dtype=torch.float32)
    assert_same_pairs(call(capacity=len(expected.row)), expected)
    assert call(capacity=len(expected.row) - 1) is None
    assert call(capacity=0) is None
    # Where memory allows, once more with room for all.
    assert_same_pairs(call(capacity=1, most=len(expected.row)), expected)
    assert call(capacity=1, most=len(expected.row) - 1) is None


def test_a_search_with_too_many_pairs_is_given_up_counted_and_done_by_the_twin(interpreted) -> None:
    for memory_budget, given_up in ((None, 0), (100_000, 1)):
        plain, _ = _loss_among_equal_proxies(memory_budget, False)
        total, searches = interpreted("_loss_among_equal_proxies", memory_budget, True)
        assert searches == (2, given_up)  # above the guessed floor there is none; then all pairs are searched
        torch.testing.assert_close(total, plain, rtol=1e-5, atol=0)


def _loss_among_equal_proxies(memory_budget: int | None, fused: bool) -> tuple[Tensor, tuple[int, int]]:
    loss = ProxyGMLLoss(4801, 6, topk=9, memory_budget=memory_budget, fused=fused, sparse=True)
    with torch.no_grad():
        loss.proxies.copy_(torch.ones(6))
    total = loss(torch.nn.functional.normalize(normal(7, 6, seed=12)), torch.arange(0, 4801, 701)).total
    return total.detach(), (loss.searches.done, loss.searches.given_up)


def test_nothing_is_written_beyond_the_room_there_is(interpreted) -> None:
    key_n, similarity_n, num_found = interpreted("_fill", 140, 9, 50)
    assert num_found == 140 * 9
    assert torch.equal(key_n == -1, torch.arange(200) >= 50)
    assert torch.equal(similarity_n == -1, torch.arange(200) >= 50)


def _fill(num_proxies: int, num_rows: int, capacity: int) -> tuple[Tensor, Tensor, int]:
    """What the kernel leaves of buffers of 200 elements, filled with -1, if it is told that there are fewer."""
    from dist_proxygml.head import fused

    key_n, similarity_n = torch.full((200,), -1), torch.full((200,), -1.0)
    num_found = torch.zeros(1, dtype=torch.int64)
    fused._pairs_above_kernel[(2,)](
        torch.ones(num_rows, 3),
        torch.ones(num_proxies, 3),
        torch.ones(num_proxies),
        torch.zeros(num_rows),
        torch.zeros(num_rows, 2, dtype=torch.int32),
        key_n,
        similarity_n,
        num_found,
        torch.zeros(2, dtype=torch.int32),
        num_rows,
        num_proxies,
        3,
        capacity,
        **fused._tile(num_rows, torch.float32),
    )
    return key_n, similarity_n, int(num_found)


@pytest.mark.parametrize("sizes", [(5, 77, 19), (5, 0, 19), (0, 77, 19)], ids=str)
def test_nothing_above_the_floor_or_nothing_at_all_gives_no_pair(interpreted, sizes) -> None:
    num_rows, num_proxies, dim = sizes
    got = interpreted(
        "pairs_above",
        torch.ones(num_rows, dim),
        torch.ones(num_proxies, dim),
        torch.ones(num_proxies),
        torch.full((num_rows,), float(dim)),
        torch.zeros(num_rows, 2, dtype=torch.int64),
        matmul_dtype=torch.float32,
        capacity=7,
    )
    assert [(column.tolist(), column.dtype) for column in got] == [
        ([], torch.int64),
        ([], torch.int64),
        ([], torch.float32),
    ]


def test_inputs_are_rounded_to_bfloat16_and_sums_are_not(interpreted) -> None:
    embeddings_RD = normal(21, 67, seed=5)
    bank = build_bank(normal(77, 67, seed=8), matmul_dtype=torch.bfloat16)
    similarity_Rp = similarity.all_similarities(embeddings_RD, bank)
    sorted_Rp = similarity_Rp.sort(dim=1).values
    floor_R = sorted_Rp[:, 40:42].mean(dim=1)  # between two values: no rounding error decides
    excluded_R2 = torch.tensor([[3, 9]]).expand(21, -1)
    expected = twin_pairs_above(embeddings_RD, bank, floor_R, excluded_R2)
    got = interpreted(
        "pairs_above",
        embeddings_RD,
        bank.proxies,
        bank.inverse_norm,
        floor_R,
        excluded_R2,
        matmul_dtype=torch.bfloat16,
        capacity=5000,
    )
    assert_same_pairs(got._replace(similarity=expected.similarity), expected)
    torch.testing.assert_close(got.similarity, expected.similarity, rtol=0, atol=2e-6)  # bfloat16 sums: 1e-2


@pytest.mark.parametrize("dim", [19, 150])
def test_the_gradient_of_the_embeddings_is_that_of_the_twin(interpreted, dim) -> None:
    """Rows of none, one, exactly a segment, a segment and one, and several segments of pairs."""
    generator = torch.Generator().manual_seed(6)
    counts = [0, 1, 1024, 0, 1025, 2500, 0]
    bank = build_bank(normal(2600, dim, seed=9))
    row_n = torch.repeat_interleave(torch.tensor(counts))
    proxy_n = torch.cat([torch.randperm(2600, generator=generator)[:count].sort().values for count in counts])
    pairs = Pairs(row_n, proxy_n, torch.zeros(len(row_n)))
    weight_n = torch.randn(len(row_n), generator=generator)
    got = interpreted("embedding_gradient", pairs, bank, weight_n, num_rows=7)
    exact_bank = Bank(bank.proxies.double(), bank.inverse_norm.double())
    assert_near(got, similarity.embedding_gradient(pairs, exact_bank, weight_n.double(), num_rows=7))


@pytest.mark.parametrize("touched_only", [True, False])
@pytest.mark.parametrize("dim", [19, 150])
def test_the_gradient_of_the_proxies_is_that_of_the_twin(interpreted, dim, touched_only) -> None:
    """From pairs in no order, with proxies of none and of more pairs than are read at once."""
    generator = torch.Generator().manual_seed(7)
    bank = build_bank(normal(61, dim, seed=10))
    embeddings_RD = normal(23, dim, seed=11)
    pairs = some_pairs(23, 61, num_pairs=150)
    hot = Pairs(torch.arange(23), torch.full((23,), 59), torch.randn(23, generator=generator))
    order_n = torch.randperm(173, generator=generator)
    pairs = Pairs(*(torch.cat(parts)[order_n] for parts in zip(pairs, hot, strict=True)))
    weight_n = torch.randn(173, generator=generator)
    proxy_u, got = interpreted("proxy_gradient", pairs, bank, embeddings_RD, weight_n, touched_only=touched_only)
    expected_u, expected = similarity.proxy_gradient(
        pairs._replace(similarity=pairs.similarity.double()),
        Bank(bank.proxies.double(), bank.inverse_norm.double()),
        embeddings_RD.double(),
        weight_n.double(),
        touched_only=touched_only,
    )
    assert proxy_u.dtype == expected_u.dtype
    assert torch.equal(proxy_u, expected_u)
    assert (len(proxy_u) < 61) == touched_only
    assert_near(got, expected)


def test_without_a_pair_gradients_are_zero_or_empty(interpreted) -> None:
    bank = build_bank(torch.ones(5, 3))
    none = Pairs(torch.zeros(0, dtype=torch.int64), torch.zeros(0, dtype=torch.int64), torch.zeros(0))
    for num_rows in (0, 2):
        gradient_RD = interpreted("embedding_gradient", none, bank, torch.zeros(0), num_rows=num_rows)
        assert torch.equal(gradient_RD, torch.zeros(num_rows, 3))
    for touched_only, num_proxies in ((True, 0), (False, 5)):
        proxy_u, gradient_uD = interpreted(
            "proxy_gradient", none, bank, torch.ones(2, 3), torch.zeros(0), touched_only=touched_only
        )
        assert torch.equal(proxy_u, torch.arange(num_proxies))
        assert torch.equal(gradient_uD, torch.zeros(num_proxies, 3))


@pytest.mark.parametrize("prefixes", [(), (4,)])
@pytest.mark.parametrize("matmul_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_loss_and_its_gradients_do_not_change(interpreted, matmul_dtype, prefixes) -> None:
    plain, fused = _loss(matmul_dtype, False, prefixes), interpreted("_loss", matmul_dtype, True, prefixes)
    assert torch.equal(fused[1], plain[1])  # the same classes have a gradient
    for of_kernels, of_twin in zip(fused, plain, strict=True):
        torch.testing.assert_close(of_kernels, of_twin, rtol=1e-5, atol=2e-6)  # sums in another order


def _loss(matmul_dtype: torch.dtype, fused: bool, prefixes: tuple[int, ...]) -> tuple[Tensor, ...]:
    """Loss, classes with a gradient, their gradients and those of the embeddings."""
    head = Head(topk=9, scale=5.0)
    loss = ProxyLoss(4801, 6, head, matmul_dtype=matmul_dtype, fused=fused, sparse=True, matryoshka_dims=prefixes)
    embeddings = torch.nn.functional.normalize(normal(7, 6, seed=12)).requires_grad_()
    total = loss(embeddings, torch.arange(0, 4801, 701)).total
    total.backward()
    gradient = loss.proxies.grad.coalesce()
    return total.detach(), gradient.indices(), gradient.values(), embeddings.grad


TYPES = {
    "order_ptr": "*i64",
    "start_ptr": "*i64",
    "stop_ptr": "*i64",
    "row_ptr": "*i64",
    "proxy_ptr": "*i64",
    "wanted_ptr": "*i32",
    "excluded_ptr": "*i32",
    "key_ptr": "*i64",
    "num_found_ptr": "*i64",
    "num_in_tile_ptr": "*i32",
    "num_rows": "i32",
    "num_proxies": "i32",
    "dim": "i32",
    "capacity": "i64",
}  # of the kernels' arguments, as Triton writes them; all others point to float32


# Kernel, rows and type of the product: at most so many registers, bytes spilled and bytes of shared memory on an A100
# (sm_80) and an H100 (sm_90): what was measured with Triton 3.8, and about a tenth more.
LIMITS: dict[tuple[str, int, torch.dtype], dict[int, tuple[int, int, int]]] = {
    ("_pairs_above_kernel", 32, torch.float32): {80: (140, 0, 20480), 90: (140, 0, 20480)},
    ("_pairs_above_kernel", 1 << 20, torch.float32): {80: (255, 0, 24576), 90: (255, 0, 24576)},
    ("_pairs_above_kernel", 32, torch.bfloat16): {80: (99, 0, 40960), 90: (88, 0, 45056)},
    ("_pairs_above_kernel", 1 << 20, torch.bfloat16): {80: (128, 30, 65536), 90: (128, 0, 81920)},
    ("_segment_sums_kernel", 32, torch.float32): {80: (64, 0, 2048), 90: (64, 0, 2048)},
    ("_proxy_gradient_kernel", 32, torch.float32): {80: (106, 0, 0), 90: (106, 0, 0)},
}


class Compiled(NamedTuple):
    """What ptxas says of a kernel."""

    ptx: str
    registers: int
    spilled: int  # bytes stored and loaded again
    shared: int  # bytes


def compiled_for(capability: int, kernel: str, num_rows: int, matmul_dtype: torch.dtype, folder: Path) -> Compiled:
    """Compile a kernel ahead of time, as its launcher would; ptxas comes with Triton, and a GPU is not needed."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from dist_proxygml.head import fused

    function = getattr(fused, kernel)
    types, options = dict(TYPES), {"_segment_sums_kernel": {"BLOCK_N": 32, "num_warps": 4}}.get(kernel, {})
    options = {"BLOCK_N": 8, "num_warps": 1} | options | {"BLOCK_D": 128}
    if kernel == "_pairs_above_kernel":
        options = fused._tile(num_rows, matmul_dtype)
        if matmul_dtype == torch.bfloat16:
            types["embeddings_ptr"] = "*bf16"
    constants = {name: options.pop(name) for name in list(options) if name.startswith("BLOCK_")}
    signature = {name: "constexpr" if name in constants else types.get(name, "*fp32") for name in function.arg_names}
    # What the launcher would find: addresses and the dimension are multiples of 16.
    aligned = {
        (index,): [["tt.divisibility", 16]]
        for index, name in enumerate(function.arg_names)
        if name.endswith("_ptr") or name == "dim"
    }
    compiled = triton.compile(
        ASTSource(function, signature, constexprs=constants, attrs=aligned),
        target=GPUTarget("cuda", capability, 32),
        options=options,
    )
    source = folder / "kernel.ptx"
    source.write_text(compiled.asm["ptx"])
    target = re.search(r"\.target (\w+)", compiled.asm["ptx"])[1]
    ptxas = Path(triton.__file__).parent / "backends/nvidia/bin/ptxas"
    command = [ptxas, "-v", f"--gpu-name={target}", source, "-o", folder / "kernel.cubin"]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    stored, loaded = map(int, re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", said).groups())
    registers = int(re.search(r"Used (\d+) registers", said)[1])
    return Compiled(compiled.asm["ptx"], registers, stored + loaded, compiled.metadata.shared)


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize(("kernel", "num_rows", "matmul_dtype"), LIMITS, ids=str)
def test_a_kernel_compiles_for_gpus_and_keeps_to_its_registers_and_memory(
    kernel: str,
    num_rows: int,
    matmul_dtype: torch.dtype,
    capability: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The interpreter forgives what a GPU's compiler does not: shapes, types, memory."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    found = compiled_for(capability, kernel, num_rows, matmul_dtype, tmp_path)
    registers, spilled, shared = LIMITS[kernel, num_rows, matmul_dtype][capability]
    assert found.shared <= SHARED_MEMORY[capability]
    assert found.registers <= registers
    assert found.spilled <= spilled
    assert found.shared <= shared
    if matmul_dtype == torch.bfloat16:
        assert {80: "mma.sync", 90: "wgmma.mma_async"}[capability] in found.ptx  # tensor cores
        assert "cvt.rn.bf16x2.f32" in found.ptx  # rounded to nearest, as torch does
