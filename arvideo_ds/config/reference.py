"""The reference of all settings, from the recipe schema: `arvideo settings` and docs/settings.md.

Types, defaults and allowed values come from pydantic's JSON schema, meanings from the descriptions
of the fields.
"""

from __future__ import annotations

import functools
import json
import re
import textwrap
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from arvideo_ds.config.load import nearest, sections_of
from arvideo_ds.config.objectives import OBJECTIVES, BaseObjective
from arvideo_ds.config.schema import RECIPES, Recipe
from arvideo_ds.errors import UserError

# Allowed names of settings whose type is text, by key: tables that plugins extend.
Choices = Mapping[str, Iterable[str]]
_TYPES = {"string": "text", "boolean": "true or false", "integer": "whole number"}
_TYPES |= {"object": "section"}
_BOUNDS = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}
_WIDTH = 88


@dataclass(frozen=True)
class Setting:
    """key: `section.key`, with N for a place in a list, as in data.sources.N.weight. objectives:
    those that have it, if not all do."""

    key: str
    type: str
    default: str
    meaning: str
    objectives: tuple[str, ...] = ()


@dataclass(frozen=True)
class Section:
    """A section of the recipes of some tasks."""

    name: str
    summary: str
    settings: tuple[Setting, ...]
    tasks: tuple[str, ...]

    @property
    def shared(self) -> bool:
        """Whether the recipes of all tasks have it."""
        return len(self.tasks) == len(RECIPES)

    @property
    def owners(self) -> str:
        return "all tasks" if self.shared else ", ".join(self.tasks)


def reference(choices: Choices) -> list[Section]:
    """All settings, first the sections that all tasks share. A section that differs between tasks,
    such as `evaluation`, is there once for each form."""
    found: dict[tuple[str, str, tuple[Setting, ...]], list[str]] = {}
    for task, recipe in RECIPES.items():
        for name, field in recipe.model_fields.items():
            owner = Recipe if name == "task" else recipe
            settings = tuple(_settings(owner, name, "", choices))
            found.setdefault((name, _summary(field.annotation), settings), []).append(task)
    sections = [Section(*section, tuple(tasks)) for section, tasks in found.items()]
    return sorted(sections, key=lambda section: not section.shared)


def _summary(annotation: Any) -> str:
    """The first paragraph of the docstring of a section."""
    sections = [annotation] if annotation is BaseObjective else sections_of(annotation, None)
    paragraphs = [(section.__doc__ or "").partition("\n\n")[0] for section in sections]
    return " ".join(" ".join(paragraphs).split())


def _settings(
    model: type[BaseModel], name: str, prefix: str, choices: Choices
) -> Iterator[Setting]:
    """A field, and the fields of the sections in it."""
    field, key = model.model_fields[name], prefix + name
    if field.annotation is BaseObjective:
        yield from _of_objectives(f"{key}.", choices, default=field.default.name)
        return
    sections = sections_of(field.annotation, None)
    if field.annotation not in sections:
        default = field.get_default(call_default_factory=True)
        yield Setting(
            key,
            _type(_schema(model)[name], choices.get(key, ())),
            "required" if default is PydanticUndefined else _word(default),
            " ".join((field.description or "").split()),
        )
        key += ".N"
    for section in sections:
        for inner in section.model_fields:
            yield from _settings(section, inner, f"{key}.", choices)


def _of_objectives(prefix: str, choices: Choices, *, default: str) -> Iterator[Setting]:
    """What all objectives have, then what some have. default: of `name`."""
    common = BaseObjective.model_fields
    for name in common:
        for setting in _settings(BaseObjective, name, prefix, choices):
            yield replace(setting, default=default) if name == "name" else setting
    owners: dict[Setting, list[str]] = {}
    for objective, model in OBJECTIVES.items():
        for name in (name for name in model.model_fields if name not in common):
            for setting in _settings(model, name, prefix, choices):
                owners.setdefault(setting, []).append(objective)
    yield from (replace(setting, objectives=tuple(names)) for setting, names in owners.items())


@functools.cache
def _schema(model: type[BaseModel]) -> dict[str, Any]:
    properties: dict[str, Any] = model.model_json_schema()["properties"]
    return properties


def _type(schema: Mapping[str, Any], names: Iterable[str] = ()) -> str:
    """A JSON schema in words."""
    if "anyOf" in schema:
        return ", or ".join(dict.fromkeys(_type(kind, names) for kind in schema["anyOf"]))
    kind = schema.get("type", "object")
    if "const" in schema:
        words = _word(schema["const"])
    elif allowed := schema.get("enum", names if kind == "string" else ()):
        words = f"one of {', '.join(map(_word, allowed))}"
    elif items := [_type(item) for item in schema.get("prefixItems", ())]:
        each = f"each {items[0]}" if len(set(items)) == 1 else "; ".join(items)
        words = f"list of {len(items)}, {each}"
    elif kind == "array":
        words = f"list, each {_type(schema['items'])}"
    else:
        bounds = [f"{sign} {schema[name]:g}" for name, sign in _BOUNDS.items() if name in schema]
        words = f"{_TYPES.get(kind, kind)} {' and '.join(bounds)}".strip()
    return words


def _word(value: Any) -> str:
    """As in a recipe."""
    return value if isinstance(value, str) else json.dumps(value)


def find(query: str, sections: Iterable[Section]) -> list[Section]:
    """The settings of a key, of a section, or of a task without the sections that all share.

    Errors: `UserError` for an unknown name, with the most similar key.
    """
    sections = list(sections)
    if query in RECIPES:
        return [s for s in sections if query in s.tasks and not s.shared]
    key = re.sub(r"\.\d+(?=\.|$)", ".N", query)
    found = []
    for section in sections:
        settings = tuple(s for s in section.settings if f"{s.key}.".startswith(f"{key}."))
        found += [replace(section, settings=settings)] if settings else []
    if not found:
        near = nearest(key, {s.key for section in sections for s in section.settings})
        hint = f" Did you mean '{near}'?" if near else ""
        raise UserError(
            f"there is no setting, section or task '{query}'.{hint} `arvideo settings` lists the "
            "sections."
        )
    return found


def listing(sections: Iterable[Section]) -> str:
    """The sections, a line each."""
    rows = [f"{s.name:<11}{len(s.settings):>3}  {s.owners:<28}{s.summary}" for s in sections]
    return "\n".join(rows)


def describe(sections: Iterable[Section]) -> str:
    """Every setting with its type, default and meaning, for a terminal."""
    return "\n\n".join(
        "\n".join(_lines(setting, section)) for section in sections for setting in section.settings
    )


def _lines(setting: Setting, section: Section) -> Iterator[str]:
    yield setting.key
    rows = {"tasks": section.owners, "objectives": ", ".join(setting.objectives)}
    rows |= {"type": setting.type, "default": setting.default, "meaning": setting.meaning}
    for name, text in rows.items():
        lines = textwrap.wrap(text, _WIDTH, break_on_hyphens=False)
        for number, line in enumerate(lines):
            yield f"  {'' if number else name:<11}{line}"


def page(sections: list[Section]) -> str:
    """The text of docs/settings.md."""
    forms = Counter(section.name for section in sections)
    parts = "\n".join(_part(section, repeated=forms[section.name] > 1) for section in sections)
    return f"""\
<!-- Written by `arvideo settings --write` from the recipe schema; do not edit. -->
# Settings

Every key of a recipe, with its type, default and meaning. In a terminal, `arvideo settings
data.crop` prints one of them, `arvideo settings data` a section, `arvideo settings finetune` the
sections that only some tasks have.

A recipe is a YAML file with these sections; `base: NAME` merges it over another recipe. On the
command line, `section.key=value` overrides a key. Values are YAML: `data.size=128`,
`objective.cluster=[1,7,7]`, `data.stride=null`. N is a place in a list, counted from 0, as in
`data.sources.0.weight=2`. An unknown key is an error. The numbers of published recipes, each with
its source: [protocols.md](protocols.md).

{parts}"""


def _part(section: Section, *, repeated: bool) -> str:
    heading = f"{section.name} ({section.owners})" if repeated else section.name
    lines = [f"## {heading}", "", f"Tasks: {section.owners}. {section.summary}".strip(), ""]
    lines += ["| key | type | default | meaning |", "| --- | --- | --- | --- |"]
    for setting in section.settings:
        only = f" ({', '.join(setting.objectives)})" if setting.objectives else ""
        meaning = re.sub(r"docs/(\w+\.md)", r"[\1](\1)", setting.meaning)
        cells = (f"`{setting.key}`{only}", setting.type, f"`{setting.default}`", meaning)
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join([*lines, ""])
