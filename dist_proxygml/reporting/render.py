"""Template rendering: markup and styles are in templates/, where a designer can edit them; Python passes plain data.

Inserted values are escaped for HTML, or by a given `escape`, unless they are `Markup`; an undefined name is an error.
Chosen: jinja2, which huggingface_hub and torch depend on anyway.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup


def render(
    template: str,
    *,
    escape: Callable[[object], str] | None = None,
    filters: Mapping[str, Callable[..., object]] | None = None,
    **data: object,
) -> str:
    """Render a template of templates/.

    Args:
        template: its file name.
        escape: escapes a text; None: for HTML and SVG.
        filters: in addition to "count", a number with commas, and "percent", a share in percent with two digits.
        data: the template's variables.
    """

    def finalize(value: Any) -> Any:
        return value if escape is None or isinstance(value, Markup) else Markup(escape(value))

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).with_name("templates")),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=finalize,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["count"] = lambda number: Markup(f"{number:,}")
    environment.filters["percent"] = lambda share, digits=2: Markup(f"{100 * share:.{digits}f}")
    environment.filters |= filters or {}
    return environment.get_template(template).render(data)
