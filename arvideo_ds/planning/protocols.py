"""Published numbers compared with those of the recipes, and written as one page.

`arvideo protocols` writes docs/protocols.md from docs/protocols.yaml, the numbers of papers and
official scripts. A recipe may differ from a published number where the file gives both values and a
reason. Every recipe is either in a section or in the list `own`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from arvideo_ds.config.load import load_recipe, parse, read_yaml, recipe_names
from arvideo_ds.config.schema import Recipe
from arvideo_ds.config.settings import Settings
from arvideo_ds.planning.plan import make_plan

Values = dict[str, Any]


class Claim(Settings):
    """Numbers that one source gives for some recipes of a section (all of them by default).

    here: keys whose value in the recipes differs on purpose. because: the reason.
    """

    recipes: tuple[str, ...] = ()
    source: str
    published: Annotated[Values, Field(min_length=1)]
    here: Values = Field(default_factory=dict)
    because: str = ""


class Section(Settings):
    title: str
    text: str = ""
    recipes: Annotated[tuple[str, ...], Field(min_length=1)]
    claims: Annotated[tuple[Claim, ...], Field(min_length=1)]


class Protocols(Settings):
    """The whole file. own: recipes without published numbers."""

    introduction: str
    own: tuple[str, ...]
    sections: Annotated[tuple[Section, ...], Field(min_length=1)]


def read_protocols(path: Path) -> Protocols:
    """Errors: `UserError` for a file that is missing, not YAML, or not of this form."""
    return parse(Protocols, read_yaml(path), path.name)


def numbers_of(name: str) -> Values:
    """Every number of a recipe by dotted key, and of its plan by name; tuples become lists.

    decoder.width, depth and heads are those of the model, also where the size table gives them.
    """
    recipe = load_recipe(name, [], Recipe)
    sections = recipe.model_dump(mode="json", exclude={"task", "phases"})
    numbers = {f"{s}.{key}": value for s, keys in sections.items() for key, value in keys.items()}
    if sources := numbers.pop("data.sources"):
        numbers |= {f"data.sources.{key}": [each[key] for each in sources] for key in sources[0]}
    decoder = recipe.transformer and recipe.transformer.decoder
    if decoder is not None:
        numbers |= {f"decoder.{key}": getattr(decoder, key) for key in ("width", "depth", "heads")}
    return numbers | json.loads(json.dumps(make_plan(recipe, world_size=1).as_dict()))


def all_numbers() -> dict[str, Values]:
    """`numbers_of` every recipe that comes with the package."""
    return {name: numbers_of(name) for name in recipe_names()}


def deviations(protocols: Protocols, numbers: Mapping[str, Values]) -> list[str]:
    """Errors, a sentence each: numbers, reasons, unknown names, unlisted recipes."""
    known, own = set(numbers), set(protocols.own)
    listed = {name for section in protocols.sections for name in section.recipes}
    wrong = [f"there is no recipe {name}." for name in sorted((listed | own) - known)]
    for name in sorted(known - listed - own):
        wrong.append(f"recipe {name} has no section of published numbers and is not under own.")
    for name in sorted(listed & own):
        wrong.append(f"recipe {name} is in a section and under own; remove one.")
    for section in protocols.sections:
        for claim in section.claims:
            wrong += _deviations_of(section, claim, numbers)
    return wrong


def _deviations_of(
    section: Section, claim: Claim, numbers_by_recipe: Mapping[str, Values]
) -> Iterable[str]:
    where = f"section '{section.title}', {claim.source}"
    for name in sorted(set(claim.recipes) - set(section.recipes)):
        yield f"{where}: {name} is not a recipe of the section."
    if bool(claim.here) != bool(claim.because):
        yield f"{where}: a deviation needs both `here` and `because`."
    for key, value in claim.here.items():
        if key not in claim.published:
            yield f"{where}: `here` gives {key}, `published` does not."
        elif claim.published[key] == value:
            yield f"{where}: {key} is {_word(value)} in both; remove it from `here`."
    for name in claim.recipes or section.recipes:
        numbers = numbers_by_recipe.get(name, {})
        for key, published in claim.published.items() if numbers else ():
            expected = claim.here.get(key, published)
            if key not in numbers:
                yield f"{where}: {name} has no {key}."
            elif not _same(numbers[key], expected):
                here = f" (here {_word(expected)}: {claim.because})" if key in claim.here else ""
                yield (
                    f"{name}: {key} is {_word(numbers[key])}, but {claim.source} says "
                    f"{_word(published)}{here}. Correct the recipe, or give `here` and `because` "
                    "in docs/protocols.yaml."
                )


def _same(value: Any, expected: Any) -> bool:
    """Equal as written; a product of rates may differ in its last digit."""
    if isinstance(value, float) and isinstance(expected, int | float):
        return math.isclose(value, expected, rel_tol=1e-12)
    return bool(value == expected) and isinstance(value, bool) == isinstance(expected, bool)


def page(protocols: Protocols, numbers: Mapping[str, Values]) -> str:
    """The text of docs/protocols.md."""
    sections = "\n".join(map(_section, protocols.sections))
    head = ["recipes", "videos per step", "clips per step"]
    head += ["peak lr", "warm-up lr", "final lr", "epochs", "warm-up epochs"]
    return f"""\
<!-- Written by `arvideo protocols` from docs/protocols.yaml; do not edit. -->
# Published numbers and ours

{protocols.introduction.strip()}

{sections}
## The resulting schedules

Effective rates, as the run's header prints them: the keys x videos per step / 256.

{_table(head, _schedules(protocols, numbers))}
## Recipes without published numbers

{_listed(protocols.own)}.
"""


def _section(section: Section) -> str:
    text = f"{section.text.strip()}\n\n" if section.text else ""
    table = _table(
        ["source", "recipes", "as published", "different here"], map(_row, section.claims)
    )
    return f"## {section.title}\n\nRecipes: {_listed(section.recipes)}.\n\n{text}{table}"


def _row(claim: Claim) -> list[str]:
    same = [f"`{k}` {_word(v)}" for k, v in claim.published.items() if k not in claim.here]
    other = [
        f"`{key}` **{_word(value)}** for {_word(claim.published[key])}"
        for key, value in claim.here.items()
    ]
    reason = f"{', '.join(other)}: {claim.because}" if other else ""
    return [claim.source, _listed(claim.recipes) or "all", ", ".join(same), reason]


def _schedules(protocols: Protocols, numbers: Mapping[str, Values]) -> Iterable[list[str]]:
    """A row per schedule, for all recipes of a section that have it."""
    for section in protocols.sections:
        rows: dict[tuple[str, ...], list[str]] = {}
        for name in section.recipes:
            rows.setdefault(_schedule(numbers[name]), []).append(name)
        yield from ([_listed(names), *schedule] for schedule, names in rows.items())


def _schedule(numbers: Values) -> tuple[str, ...]:
    warmup = numbers["warmup_steps"] / numbers["steps"] * numbers["epochs"]
    counts = (str(numbers[key]) for key in ("videos_per_step", "total_batch"))
    rates = (f"{numbers[key]:.3g}" for key in ("lr", "warmup_lr", "min_lr"))
    return (*counts, *rates, f"{numbers['epochs']:.4g}", f"{round(warmup, 1):g}")


def _table(head: list[str], rows: Iterable[Iterable[str]]) -> str:
    lines: list[Iterable[str]] = [head, ["---"] * len(head), *rows]
    cells = (" | ".join(cell.replace("|", "\\|") for cell in line) for line in lines)
    return "".join(f"| {line} |\n" for line in cells)


def _word(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    return value if isinstance(value, str) else json.dumps(value)


def _listed(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)
