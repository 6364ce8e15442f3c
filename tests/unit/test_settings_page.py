"""docs/settings.md is what its tool writes, and has every setting."""

from collections.abc import Iterator

from pydantic import BaseModel

from dist_proxygml.config import Config, _sections_of
from tools.settings_page import PAGE, settings_page


def leaves(section: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Dotted names of all settings; transforms, which are named by their own fields, end there."""
    for name, field in section.model_fields.items():
        below = _sections_of(field.annotation)
        if len(below) == 1 and "transform" not in name:
            yield from leaves(below[0], f"{prefix}{name}.")
        else:
            yield prefix + name


def test_the_page_of_all_settings_is_up_to_date() -> None:
    assert PAGE.read_text(encoding="utf-8") == settings_page(), "run `python tools/settings_page.py`"


def test_every_setting_is_on_the_page_once_with_a_meaning() -> None:
    page = settings_page()
    names = list(leaves(Config))
    assert {"name", "data.stream.urls", "evaluation.recall_at", "data.train_transform"} <= set(names)
    rows = [line for line in page.partition("## Transforms")[0].splitlines() if line.startswith("| `")]
    assert [row for row in rows if not row.split(" | ")[-1].strip(" |")] == []
    found = [row.split("`")[1] for row in rows]
    optional = {name for name in found if any(other.startswith(f"{name}.") for other in found)}
    assert sorted(found) == sorted({*names, *optional})


def test_the_page_says_bounds_and_defaults() -> None:
    page = settings_page()
    assert "| `optimizer.betas` | two of number at least 0 and below 1 | `[0.9, 0.999]` |" in page
    assert "| `evaluation.recall_at` | list of whole number at least 1 | `[1, 2, 4, 8]` |" in page
    assert "| `training.epochs` | whole number at least 1 | required |" in page
    assert "### affine_jitter" in page
    assert "`gradient_clipping` (a number of at least 0)" in page
