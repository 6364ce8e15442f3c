"""dist_proxygml: ProxyGML metric learning with very many classes, on any number of ranks."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dist_proxygml.head.choices import Head
    from dist_proxygml.head.loss import ProxyGMLLoss, ProxyLoss
    from dist_proxygml.head.margins import Margin
    from dist_proxygml.head.reference import LossTerms
    from dist_proxygml.inference.embedder import Embedder
    from dist_proxygml.inference.retrieval_index import Index, SearchResult

__all__ = ["Embedder", "Head", "Index", "LossTerms", "Margin", "ProxyGMLLoss", "ProxyLoss", "SearchResult"]
__version__ = "0.1.0"

_MODULES = {
    "Embedder": "inference.embedder",
    "Head": "head.choices",
    "Index": "inference.retrieval_index",
    "LossTerms": "head.reference",
    "Margin": "head.margins",
    "ProxyGMLLoss": "head.loss",
    "ProxyLoss": "head.loss",
    "SearchResult": "inference.retrieval_index",
}


def __getattr__(name: str) -> Any:
    """Import a public name on first use: building shards and submitting jobs do without torch
    (PEP 562).
    """
    if name in _MODULES:
        return getattr(import_module(f"dist_proxygml.{_MODULES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
