"""Exact inner-product search and k-means: the only file that knows faiss.

Flat indexes only: every score is computed, nothing is approximated. Inner products of unit rows
rather than L2 distances: the same order in exact arithmetic, without the cancellation. faiss
decides neither who "self" is nor how ties go; rank_counts.py does.

A rank searches on its own device: a GPU of its own with a faiss that knows GPUs, else the CPU.
faiss's way to use several GPUs from one process (`index_cpu_to_all_gpus`) was declined: the other
GPUs belong to other ranks. k-means runs on the CPU, where a seed gives one answer;
if asked for, faiss assigns points to centres on the GPU, in float32 too, and averages them on the CPU.

Dimension key: q queries, g gallery rows, K neighbours, n points, D embedding.
"""

import importlib
import importlib.metadata
import platform
import sys
from types import ModuleType
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int

GPU_SCRATCH = 64 << 20  # bytes; left to itself faiss reserves about 1.5 GiB of every GPU
MOST_NEIGHBOURS_ON_GPU = 2048  # of one faiss search


class FlatIndex:
    """A gallery of float32 rows, searched exhaustively by inner product on the CPU, where it lies: no copy is made.

    Raises:
        ValueError: faiss is missing or installed twice.
    """

    def __init__(self, gallery_gD: Float[np.ndarray, "g D"]) -> None:
        self._faiss = load_faiss()
        self.num_rows = len(gallery_gD)
        self._gallery_gD = np.ascontiguousarray(gallery_gD, dtype=np.float32)

    def search(
        self, queries_qD: Float[np.ndarray, "q D"], num_neighbours: int
    ) -> tuple[Float[np.ndarray, "q K"], Int[np.ndarray, "q K"]]:
        """Scores (descending) and gallery row numbers of the best `num_neighbours` rows, at most `num_rows` of them.

        The order of equal scores, and which of them make the cut, is faiss's affair, and so are the last bits of a
        score, which depend on the shape of the block of queries.
        """
        scores_qK, rows_qK = self._faiss.knn(
            np.ascontiguousarray(queries_qD, dtype=np.float32),
            self._gallery_gD,
            min(num_neighbours, self.num_rows),
            metric=self._faiss.METRIC_INNER_PRODUCT,
        )
        return scores_qK, rows_qK


class OnGpu:
    """A gallery in the memory of one GPU, float32 throughout, searched where it lies: faiss makes no copy.

    Args:
        gallery_gD: rows on a GPU.

    Raises:
        ValueError: faiss is missing or installed twice.
    """

    def __init__(self, gallery_gD: Float[torch.Tensor, "g D"]) -> None:
        assert gallery_gD.dtype == torch.float32
        self.num_rows = len(gallery_gD)
        self._faiss = load_faiss()
        self._resources = _gpu_resources()
        self._gallery_gD = gallery_gD.contiguous()

    def search(
        self, queries_qD: Float[np.ndarray, "q D"], num_neighbours: int
    ) -> tuple[Float[np.ndarray, "q K"], Int[np.ndarray, "q K"]]:
        """As `FlatIndex.search`, with at most MOST_NEIGHBOURS_ON_GPU neighbours."""
        assert num_neighbours <= MOST_NEIGHBOURS_ON_GPU
        queries_qD = np.ascontiguousarray(queries_qD, dtype=np.float32)
        shape = (len(queries_qD), min(num_neighbours, self.num_rows))
        scores_qK, rows_qK = np.empty(shape, np.float32), np.empty(shape, np.int64)
        # Queries and results may lie on the host (faiss/gpu/GpuDistance.h). The gallery was copied before this call:
        # faiss has a stream of its own.
        task = self._faiss.GpuDistanceParams()
        task.metric, task.k = self._faiss.METRIC_INNER_PRODUCT, shape[1]
        task.numVectors, task.dims = self._gallery_gD.shape
        task.vectors = self._faiss.cast_integer_to_void_ptr(self._gallery_gD.data_ptr())
        task.numQueries, task.queries = len(queries_qD), self._faiss.swig_ptr(queries_qD)
        task.outDistances, task.outIndices = self._faiss.swig_ptr(scores_qK), self._faiss.swig_ptr(rows_qK)
        task.device = self._gallery_gD.get_device()
        self._faiss.bfKnn(self._resources, task)
        return scores_qK, rows_qK


def _gpu_resources() -> Any:
    resources = load_faiss().StandardGpuResources()
    resources.setTempMemory(GPU_SCRATCH)
    return resources


def _flat_on_gpu(kind: str, width: int, device: torch.device) -> tuple[Any, Any]:
    """An empty flat index of faiss on a GPU, and what it lives in, which must outlive it."""
    faiss, resources = load_faiss(), _gpu_resources()
    options = faiss.GpuIndexFlatConfig()
    options.device = torch.cuda.current_device() if device.index is None else device.index
    options.useFloat16 = False
    return resources, getattr(faiss, kind)(resources, width, options)


def searches_on_gpu(device: torch.device) -> bool:
    """Whether faiss can search on this device. Without a GPU of one's own, or with faiss-cpu, it cannot.

    Raises:
        ValueError: faiss is missing or installed twice.
    """
    if device.type != "cuda":
        return False
    faiss = load_faiss()
    return hasattr(faiss, "bfKnn") and faiss.get_num_gpus() > 0


def build_searcher(gallery_gD: Float[np.ndarray, "g D"], on_device_gD: Float[torch.Tensor, "g D"]) -> FlatIndex | OnGpu:
    """A search of these rows on the rank's own device, where they are, too, or on the CPU where faiss cannot use that.

    Raises:
        ValueError: faiss is missing or installed twice.
    """
    return OnGpu(on_device_gD) if searches_on_gpu(on_device_gD.device) else FlatIndex(gallery_gD)


def cluster(
    points_nD: Float[np.ndarray, "n D"],
    *,
    num_clusters: int,
    seed: int,
    num_iterations: int,
    device: torch.device | None = None,
) -> Int[np.ndarray, " n"]:
    """k-means over all points (no subsampling), one start from random points; the cluster of each
    point. Points are assigned to centres on `device`, a GPU that faiss can use, or on the CPU.

    Raises:
        ValueError: faiss is missing or installed twice.
    """
    faiss = load_faiss()
    num_points, width = points_nD.shape
    points_nD = np.ascontiguousarray(points_nD, dtype=np.float32)
    kmeans = faiss.Kmeans(
        width,
        num_clusters,
        niter=num_iterations,
        nredo=1,
        seed=seed,
        min_points_per_centroid=1,
        max_points_per_centroid=num_points,  # faiss would silently keep 256 points a cluster
    )
    if device is not None:
        kmeans.resources, kmeans.index = _flat_on_gpu("GpuIndexFlatL2", width, device)
    kmeans.train(points_nD)
    _, clusters_n1 = kmeans.index.search(points_nD, 1)
    clusters_n: Int[np.ndarray, " n"] = clusters_n1[:, 0]
    return clusters_n


def load_faiss() -> ModuleType:
    """Load faiss, set to as many threads as torch uses.

    Raises:
        ValueError: no faiss is installed, two packages claim the module, or the one there does not
            start.
    """
    packages = installed_faiss()
    if len(packages) > 1:
        raise ValueError(
            f"expected one faiss package, found {len(packages)}: {', '.join(packages)}; they "
            "overwrite each other's files. "
            "Remove all of them with `pip uninstall "
            f"{' '.join(package.split()[0] for package in packages)}`, "
            f"then install one: `pip install {preferred_faiss()}`"
        )
    try:
        faiss = importlib.import_module("faiss")
    except (ImportError, RuntimeError, OSError) as error:
        found = f"{packages[0]} is installed but does not start" if packages else "none is installed"
        again = " --force-reinstall" if packages else ""
        raise ValueError(
            f"evaluation needs a faiss package: {found} ({error}); `pip install{again} {preferred_faiss()}`"
        ) from error
    faiss.omp_set_num_threads(torch.get_num_threads())
    return faiss


def preferred_faiss() -> str:
    """The package that pyproject.toml asks for on this machine.

    faiss-gpu runs without a GPU as well; it has wheels for Linux on x86-64 only.
    """
    is_linux_on_x86 = sys.platform == "linux" and platform.machine() == "x86_64"
    return "faiss-gpu" if is_linux_on_x86 else "faiss-cpu"


def count_faiss_gpus() -> int | None:
    """GPUs that faiss could search on; None: the installed faiss was built without.

    Raises:
        ValueError: as `load_faiss`.
    """
    faiss = load_faiss()
    return int(faiss.get_num_gpus()) if hasattr(faiss, "StandardGpuResources") else None


def installed_faiss() -> list[str]:
    """The installed packages that own the module `faiss`, each as "name version"."""
    names = (
        "faiss",
        "faiss-cpu",
        "faiss-gpu",
        "faiss-gpu-cu11",
        "faiss-gpu-cu12",
        "faiss-gpu-cuvs",
        "faiss-gpu-cu12-cuvs",
        "faiss-gpu-cu13-cuvs",
        "faiss-cuda",
    )
    found = []
    for name in names:
        try:
            found.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
