"""Rules between settings, for a configuration and for the arguments of a call alike.

`section` is what a configuration puts before a setting's name ("proxies."); a call puts nothing there.
"""

import warnings
from collections.abc import Sequence


def check_ratio_or_topk(ratio: float | None, topk: int | None, *, section: str = "", at_least: int) -> None:
    """Raise ValueError where k is given both as a share and as a number, or in fewer than `at_least` of these ways."""
    num_given = (ratio is not None) + (topk is not None)
    if not at_least <= num_given <= 1:
        raise ValueError(
            f"expected {'exactly' if at_least else 'at most'} one of {section}ratio and {section}topk, got "
            f"ratio={ratio} and topk={topk}; {'remove' if num_given else 'set'} one"
        )


def check_head(
    *,
    negatives: str,
    ratio: float | None,
    topk: int | None,
    share: float | None,
    is_ratio_or_topk_needed: bool,
    section: str = "",
) -> None:
    """Raise ValueError where k or a share of the classes is given for another choice of `negatives`, or is missing."""
    if negatives == "topk":
        check_ratio_or_topk(ratio, topk, section=section, at_least=int(is_ratio_or_topk_needed))
    elif ratio is not None or topk is not None:
        raise ValueError(
            f'expected {section}ratio and {section}topk with {section}negatives "topk" only, got ratio={ratio} and '
            f'topk={topk} with "{negatives}"; remove them'
        )
    if (share is None) == (negatives == "sampled"):
        raise ValueError(
            f'expected {section}share with {section}negatives "sampled" and with nothing else, got {share} with '
            f'"{negatives}"; {"set" if share is None else "remove"} it'
        )


def check_search(negatives: str, *, selection: str, fused: bool, section: str = "") -> None:
    """Raise ValueError where settings of the search for the top-k are given, and there is none."""
    if negatives != "topk" and (fused or selection != "auto"):
        raise ValueError(
            f'expected {section}fused false and {section}selection "auto" with {section}negatives "{negatives}", got '
            f'{fused} and "{selection}", which are for "topk"; remove them'
        )


def check_classes(num_classes: int, *, share: float | None) -> None:
    """Raise ValueError where a class has no other one to be told from; warn where drawn classes are hardly ever any."""
    if num_classes == 1:
        raise ValueError(
            "expected at least two classes, got 1: without another class there are no negatives, and every loss and "
            "gradient is 0; add classes"
        )
    if share is not None and share * num_classes < 1:
        warnings.warn(
            f"a share of {share:g} of {num_classes:,} classes draws fewer than one: most steps compare images with the "
            f"classes of their batch alone; raise it to at least {2 / num_classes:.2g}",
            stacklevel=3,
        )


def check_margin(name: str | None, *, class_score: str, proxies_per_class: int, section: str = "") -> None:
    """Raise ValueError where a margin is one of angles, and the class score is no cosine."""
    if name in ("arcface", "adaface") and class_score == "sum" and proxies_per_class > 1:
        raise ValueError(
            f'expected {section}class_score "softmax" or "max" with the margin "{name}" and {proxies_per_class} '
            'proxies per class, got "sum", which is no cosine; change it, or take the margin "cosface"'
        )


def check_matryoshka(dims: Sequence[int], *, embedding_dim: int, setting: str) -> None:
    """Raise ValueError where the prefixes of an embedding are not ascending numbers of dimensions below its own."""
    if list(dims) != sorted(set(dims)) or not all(1 <= dim < embedding_dim for dim in dims):
        raise ValueError(
            f"expected {setting} ascending, from 1 to {embedding_dim - 1}, got {list(dims)}: the embedding's "
            f"{embedding_dim} dimensions always count; change them"
        )


def check_sparse_gradient(
    *, negatives: str, selection: str, regularization_weight: float, section: str = "", wanted_by: str, instead: str
) -> None:
    """Raise ValueError where the proxies' gradient, which `wanted_by` wants sparse, would be dense."""
    if negatives == "all":
        raise ValueError(
            f'expected {section}negatives "topk" or "sampled" with {wanted_by}, got "all", where every proxy has a '
            f"gradient; change it, or {instead}"
        )
    if selection == "gather":
        raise ValueError(
            f'expected {section}selection "auto", "candidates" or "histogram" with {wanted_by}, got "gather": the '
            f"gradient of a gathered bank is dense; change it, or {instead}"
        )
    if regularization_weight > 0:
        raise ValueError(
            f"expected {section}regularization_weight 0 with {wanted_by}, got {regularization_weight}: the regulariser "
            f"gives every proxy a gradient; set it to 0, or {instead}"
        )


def check_gallery_split(gallery_split: str | None, *, query_split: str | None, setting: str, of: str) -> None:
    """Raise ValueError where `setting` makes the queries, the split that `of` names, their own gallery."""
    if gallery_split is not None and gallery_split == query_split:
        raise ValueError(
            f"expected {setting} to be another split than {of}, got {query_split!r} for both, where every query would "
            f"find itself; remove {setting} to search each image among all others"
        )
