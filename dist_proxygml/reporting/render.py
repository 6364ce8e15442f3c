"""Templates filled in: markup and styles lie in templates/, for whoever designs them; Python passes plain data.

Whatever a template inserts is escaped for HTML, or by the `escape` of another language, unless it is `Markup`; a name
that is not passed is an error. Chosen: jinja2, which huggingface_hub and torch bring anyway.
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
    """A template of templates/, filled in.

    Args:
        template: its file's name.
        escape: makes a text harmless; None: for HTML and SVG.
        filters: besides "count", a number with commas, and "percent", a share in percent with two digits.
        data: by the names that the template uses.
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
