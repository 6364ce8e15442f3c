"""What a head is: four choices that combine freely, and make most of the proxy losses in the literature.

    which proxies compete       topk: the image's k most similar; all; sampled: those of a share of the classes, drawn
                                anew in every step. The image's own class always does
    a class's score             sum, softmax or max over its competing proxies (class_scores.py)
    margin on the own class     none, or cosface, arcface, adaface (margins.py)
    scale                       a number, or learned

ProxyGML is top-k and sum; CosFace all and a margin; PartialFC sampled; SoftTriple all, softmax and a margin; normalised
softmax all and nothing else.
"""

from dataclasses import dataclass
from typing import Literal

from dist_proxygml.head.class_scores import ClassScore
from dist_proxygml.head.margins import Margin
from dist_proxygml.rules import check_head

Negatives = Literal["topk", "all", "sampled"]


@dataclass(frozen=True)
class Head:
    """The choices.

    Args:
        negatives: which proxies compete: "topk", "all" or "sampled".
        ratio, topk: of "topk": k = ceil(ratio * C * N), or k itself. Default: ratio 0.05.
        share: of "sampled": the share of the classes, in (0, 1].
        class_score: "sum", "softmax" or "max".
        gamma: temperature of the softmax over a class's proxies.
        margin: on the own class's score, or None.
        scale: softmax scale s; where it is learned, its first value.
        learn_scale: make it a parameter of the loss.

    Raises:
        ValueError: a setting out of range, or one that belongs to another choice.
    """

    negatives: Negatives = "topk"
    ratio: float | None = None
    topk: int | None = None
    share: float | None = None
    class_score: ClassScore = "sum"
    gamma: float = 0.1
    margin: Margin | None = None
    scale: float = 1.0
    learn_scale: bool = False

    def __post_init__(self) -> None:
        if self.negatives not in ("topk", "all", "sampled"):
            raise ValueError(f'expected negatives "topk", "all" or "sampled", got {self.negatives!r}')
        if self.class_score not in ("sum", "softmax", "max"):
            raise ValueError(f'expected class_score "sum", "softmax" or "max", got {self.class_score!r}')
        if not self.scale > 0 or not self.gamma > 0:
            raise ValueError(f"expected scale and gamma above 0, got {self.scale} and {self.gamma}")
        if not 0 < (1 if self.share is None else self.share) <= 1:
            raise ValueError(f"expected a share above 0 and at most 1, got {self.share}; change it")
        check_head(
            negatives=self.negatives,
            ratio=self.ratio,
            topk=self.topk,
            share=self.share,
            is_ratio_or_topk_needed=False,
        )

    def describe(self, num_classes: int, proxies_per_class: int, topk: int | None) -> str:
        """Name the head: the method where it has a name, and what it is made of."""
        num_proxies = num_classes * proxies_per_class
        competing = {
            "topk": f"the {topk or 0:,} most similar of {num_proxies:,} proxies",
            "all": f"all {num_proxies:,} proxies",
            "sampled": f"{self.share or 0:.3g} of {num_classes:,} classes, drawn in every step",
        }[self.negatives]
        parts = [competing]
        if proxies_per_class > 1:
            parts.append(f"{self.class_score} over {proxies_per_class} proxies per class")
        if self.margin is not None:
            parts.append(f"margin {self.margin.margin:g} ({self.margin.name})")
        parts.append(f"scale {self.scale:g}{' at first, learned' if self.learn_scale else ''}")
        return f"{self.name(proxies_per_class)}: {', '.join(parts)}"

    def name(self, proxies_per_class: int) -> str:
        """The method's name in the literature, as far as it has one."""
        kinds = {"cosface": "CosFace", "arcface": "ArcFace", "adaface": "AdaFace"}
        margin = None if self.margin is None else kinds[self.margin.name]
        if self.negatives == "topk":
            base = "ProxyGML" if self.class_score == "sum" or proxies_per_class == 1 else "top-k proxies"
            return base if margin is None else f"{base} with the margin of {margin}"
        if self.class_score == "softmax" and proxies_per_class > 1 and (margin or "CosFace") == "CosFace":
            base = "SoftTriple"
        else:
            base = margin or "normalised softmax"
        return base if self.negatives == "all" else f"{base} on sampled classes"
