"""dist_proxygml: ProxyGML metric learning with very many classes, on any number of ranks."""

from dist_proxygml.loss import LossTerms, ProxyGMLLoss

__all__ = ["LossTerms", "ProxyGMLLoss", "__version__"]
__version__ = "0.1.0"
