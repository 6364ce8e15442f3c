"""Write docs/settings.md from dist_proxygml/config.py: every setting with its values, its default and its meaning.

    python tools/settings_page.py

A test holds the page to this. Chosen: what pydantic says of the types (JSON Schema), so that no setting is forgotten.
"""

import inspect
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from dist_proxygml.backbones.build import build_backbone
from dist_proxygml.backbones.small_cnn import SmallCnn
from dist_proxygml.config import _DEEPSPEED_KEYS, Config, _sections_of

PAGE = Path(__file__).parents[1] / "docs" / "settings.md"
OPENING = """\
# Every setting

A run is described by one JSON file of the sections below; `--set section.key=VALUE` changes single settings of it. An
unknown setting is refused with the nearest name. `python -m dist_proxygml.init shards/mine --out mine.json`
writes a file to begin with, and says why each setting is as it is. This page is written by `python
tools/settings_page.py`.
"""
BOUNDS = {"minimum": "at least", "exclusiveMinimum": "above", "maximum": "at most", "exclusiveMaximum": "below"}
NUMBERS = {2: "two", 3: "three"}
TYPES = {"integer": "whole number", "string": "text", "boolean": "`true`, `false`", "null": "`null`"}


def settings_page() -> str:
    """The whole page."""
    schema = Config.model_json_schema()
    sections = schema["$defs"]
    lines = [OPENING, *_table("", schema, sections, Config)]
    for name, entry in schema["properties"].items():
        if "$ref" in entry:
            section = sections[_referred(entry)]
            model = Config.model_fields[name].annotation
            lines += [f"\n## {name}\n", f"{_sentence(section)}\n", *_table(f"{name}.", section, sections, model)]
    lines += ["\n## deepspeed\n", "Keys of DeepSpeed's own configuration, passed on as they are; others are refused.\n"]
    lines += [", ".join(f"`{key}` ({expected})" for key, expected in sorted(_DEEPSPEED_KEYS.items()))]
    lines += ["\n## Transforms\n", "`data.train_transform` and `data.test_transform` are one of these, by `name`."]
    for reference in sections["DataConfig"]["properties"]["train_transform"]["discriminator"]["mapping"].values():
        transform = sections[_referred({"$ref": reference})]
        name = transform["properties"]["name"]["const"]
        lines += [f"\n### {name}\n", f"{_sentence(transform)}\n", *_table("", transform, sections)]
    paragraphs = (inspect.getdoc(build_backbone) or "").split("\n\n")
    lines += ["\n## Backbones\n", "\n\n".join(paragraphs[1:-2])]  # without its first line, ranks and errors
    options = inspect.signature(SmallCnn).parameters.values()
    meaning = (inspect.getdoc(SmallCnn) or "").split("\n\n")[1]
    lines += ["\n### small_cnn\n", meaning, "\n| option | default |", "| --- | --- |"]
    lines += [f"| `{option.name}` | `{json.dumps(option.default)}` |" for option in options]
    lines.append("")
    return "\n".join(lines)


def _table(prefix: str, section: Mapping[str, Any], sections: Mapping[str, Any], model: Any = None) -> Iterator[str]:
    required = section.get("required", [])
    fields = {} if model is None else model.model_fields
    factories = {name: field.default_factory() for name, field in fields.items() if field.default_factory}
    yield "| setting | values | default | |"
    yield "| --- | --- | --- | --- |"
    for name, entry in section["properties"].items():
        reference = _referred(entry)
        if "description" not in entry and (reference is not None or name == "name"):
            continue  # a section with a table of its own, or the name of a transform
        default = "required" if name in required else f"`{json.dumps(entry.get('default', factories.get(name)))}`"
        values = _values(entry, sections)
        yield f"| `{prefix}{name}` | {values} | {default} | {_escaped(entry.get('description', ''))} |"
        nested = next((ref for option in entry.get("anyOf", ()) if (ref := _referred(option))), None)
        if nested is not None:
            (model_below,) = _sections_of(fields[name].annotation)
            yield from list(_table(f"{prefix}{name}.", sections[nested], sections, model_below))[2:]


def _values(entry: Mapping[str, Any], sections: Mapping[str, Any]) -> str:
    if "anyOf" in entry:
        return ", ".join(_values(option, sections) for option in entry["anyOf"])
    if "discriminator" in entry:
        return "[a transform](#transforms)"
    if "enum" in entry:
        return ", ".join(f"`{value}`" for value in entry["enum"])
    if "const" in entry:
        return f"`{entry['const']}`"
    if "$ref" in entry:
        return "object"
    if entry.get("type") == "array":
        if "items" in entry:
            return f"list of {_values(entry['items'], sections)}"
        return f"{NUMBERS[len(entry['prefixItems'])]} of {_values(entry['prefixItems'][0], sections)}"
    kind = TYPES.get(entry["type"], entry["type"])
    if "B|KiB" in entry.get("pattern", ""):
        kind = 'bytes such as "256 MiB"'
    limits = [f"{word} {entry[key]:,}" for key, word in BOUNDS.items() if key in entry]
    return " ".join([kind, *limits[:1]]) + (f" and {limits[1]}" if limits[1:] else "")


def _referred(entry: Mapping[str, Any]) -> str | None:
    return entry["$ref"].rpartition("/")[2] if "$ref" in entry else None


def _sentence(section: Mapping[str, Any]) -> str:
    return re.sub(r"\s+", " ", section["description"])


def _escaped(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")


if __name__ == "__main__":
    PAGE.write_text(settings_page(), encoding="utf-8")
