"""Template rendering: markup and styles are in templates/, where a designer can edit them; Python passes plain data.

Inserted values are escaped for HTML, or by a given `escape`, unless they are `Markup`; an undefined name is an error.
Chosen: jinja2, which huggingface_hub and torch depend on anyway.
"""

import contextlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from dist_proxygml.storage.files import read_file

_MAX_CHARACTERS = 400_000  # of a text that is quoted whole


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


def format_seconds(seconds: float) -> str:
    """Format a duration with at most two units: 3725 -> "1 h 2 min"."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60:,} h {minutes % 60} min"


def read_makers(folder: str | Path | None) -> str | None:
    """The makers of images, where their folder names them: pictures must not travel without them. A link, which may
    lead to anything, is not followed.
    """
    with contextlib.suppress(OSError, ValueError):  # a location that is no folder here
        path = Path(folder or "", "ATTRIBUTION.md")
        if folder and not path.is_symlink():
            return quoted(read_file(path).decode("utf-8", "replace"))
    return None


def quoted(text: str) -> str:
    """A text that is quoted whole; its beginning where it is very long."""
    if len(text) <= _MAX_CHARACTERS:
        return text
    return f"{text[:_MAX_CHARACTERS]}\n… {len(text) - _MAX_CHARACTERS:,} more characters"
