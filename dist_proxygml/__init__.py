"""dist_proxygml: ProxyGML metric learning with very many classes, on any number of ranks."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dist_proxygml.loss import LossTerms, ProxyGMLLoss

__all__ = ["LossTerms", "ProxyGMLLoss", "__version__"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """The loss, imported when it is asked for: building shards and submitting jobs do without torch (PEP 562)."""
    if name in ("LossTerms", "ProxyGMLLoss"):
        from dist_proxygml import loss

        return getattr(loss, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
