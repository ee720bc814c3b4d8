"""YAML + overrides -> a validated `Recipe`, with errors that name file, key and remedy."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError
from typing_extensions import TypeVar

from arvideo_ds.config.objectives import OBJECTIVES, BaseObjective
from arvideo_ds.config.pretrain import PretrainRecipe
from arvideo_ds.config.schema import RECIPES, Recipe
from arvideo_ds.errors import UserError

# Folders of recipes that only others build on, and of grids of recipes (arvideo_ds/ablation).
_BASES, GRIDS = "bases", "grids"

# The loader in C takes an eighth of the time, where PyYAML was built with it.
_YamlLoader: type[yaml.SafeLoader] = getattr(yaml, "CSafeLoader", yaml.SafeLoader)

AnyRecipe = TypeVar("AnyRecipe", bound=Recipe, default=PretrainRecipe)
AnySchema = TypeVar("AnySchema", bound=BaseModel)


def recipes_dir() -> Path:
    """Folder of the recipes that come with the package."""
    return Path(str(resources.files("arvideo_ds"))) / "recipes"


def recipe_names(task: str | None = None) -> list[str]:
    """Names that `--recipe NAME` takes, of one task or of all; bases and grids excluded."""
    paths = [p for p in recipes_dir().rglob("*.yaml") if p.parent.name not in (_BASES, GRIDS)]
    return sorted(p.stem for p in paths if task is None or _task_of(_read_with_base(p)) == task)


def _task_of(tree: Mapping[str, Any]) -> Any:
    return tree.get("task", "pretrain")


def load_recipe(
    name_or_path: str,
    overrides: Sequence[str] = (),
    kind: type[AnyRecipe] = PretrainRecipe,  # type: ignore[assignment]
) -> AnyRecipe:
    """Read a recipe by name (`recipe_names`) or path, apply `section.key=value` overrides.

    Values of overrides are YAML: `train.precision=bf16`, `objective.cluster=[1,7,7]`. `kind` is the
    task's recipe class; `Recipe` accepts any.
    Errors: `UserError` for a missing file, bad YAML, an unknown key, a wrong type, another task or
    a contradiction.
    """
    path = _find_recipe(name_or_path)
    tree = with_overrides(_read_with_base(path), overrides)
    return validate(tree, f"recipe {path.name}" + (" with overrides" if overrides else ""), kind)


def validate(
    tree: Mapping[str, Any],
    origin: str,
    kind: type[AnyRecipe] = PretrainRecipe,  # type: ignore[assignment]
) -> AnyRecipe:
    """A nested mapping as a recipe; `origin` names it in error messages."""
    task = _task_of(tree)
    schema = RECIPES.get(task) if isinstance(task, str) else None
    if schema is None:
        raise UserError(f"{origin}: task={task!r}; expected one of: {', '.join(RECIPES)}.")
    if not issubclass(schema, kind):
        raise UserError(
            f"{origin} is to {schema.purpose}; start it with `arvideo {schema.script}`."
        )
    return parse(schema, tree, origin)


def parse(schema: type[AnySchema], tree: object, origin: str) -> AnySchema:
    """Validate a tree against any schema, with the errors of a recipe."""
    try:
        return schema.model_validate(tree)
    except ValidationError as error:
        section = tree.get("objective") if isinstance(tree, Mapping) else None
        objective = str((section if isinstance(section, Mapping) else {}).get("name", "arvideo"))
        known, descriptions = _settings_of(schema), _settings_of(schema, objective)
        # A square size is checked for both of its sides: one sentence is enough.
        messages = dict.fromkeys(
            f"{origin}: {_explain(e, known, descriptions, objective)}" for e in error.errors()
        )
        raise UserError("; ".join(messages)) from None
    except UserError as error:
        raise UserError(f"{origin}: {error}") from None


def _find_recipe(name_or_path: str) -> Path:
    path = Path(name_or_path)
    if path.suffix in (".yaml", ".yml") and path.is_file():
        return path
    is_name = name_or_path.replace("_", "").replace("-", "").isalnum()
    paths = recipes_dir().rglob(f"{name_or_path}.yaml") if is_name else ()
    recipe = next((path for path in paths if path.parent.name != GRIDS), None)
    if recipe is None:
        names = recipe_names()
        near = difflib.get_close_matches(name_or_path, names, n=1)
        hint = f" Did you mean '{near[0]}'?" if near else ""
        raise UserError(
            f"there is no recipe '{name_or_path}'.{hint} Give a file or one of: {', '.join(names)}."
        )
    return recipe


def read_yaml(path: Path) -> Any:
    """Errors: `UserError` for a file that cannot be read or is not YAML."""
    try:
        return yaml.load(path.read_text(encoding="utf-8"), _YamlLoader)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path}: {error}.") from None
    except yaml.YAMLError as error:
        raise UserError(f"{path} is not valid YAML: {' '.join(str(error).split())}.") from None


def _read_with_base(path: Path, seen: tuple[Path, ...] = ()) -> dict[str, Any]:
    """The file's tree merged over its `base:`, a file in its folder or a recipe's name or path."""
    path = path.resolve()
    if path in seen:
        chain = " -> ".join(p.name for p in (*seen, path))
        raise UserError(f"recipes are each other's base: {chain}. Remove one `base:`.")
    tree = read_yaml(path)
    if not isinstance(tree, dict):
        raise UserError(f"{path} must have sections such as `model:` and `train:`.")
    base = tree.pop("base", None)
    if base is None:
        return tree
    neighbours = (path.parent / f"{base}{suffix}" for suffix in ("", ".yaml"))
    try:
        base_path = next(filter(Path.is_file, neighbours), None) or _find_recipe(str(base))
    except UserError as error:
        raise UserError(f"{path} names base '{base}': {error}") from None
    return _merged(_read_with_base(base_path, (*seen, path)), tree)


def _merged(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    merged = dict(below)
    for key, value in above.items():
        old = merged.get(key)
        if isinstance(value, dict) and isinstance(old, list):
            merged[key] = _with_items(old, value, key)
        elif not (isinstance(value, dict) and isinstance(old, dict)):
            merged[key] = value
        elif key == "objective" and value.get("name", old.get("name")) != old.get("name"):
            merged[key] = value  # another objective has other settings
        else:
            merged[key] = _merged(old, value)
    return merged


def _with_items(items: list[Any], changed: dict[str, Any], key: str) -> list[Any]:
    """A list of sections with those that `changed` gives by number, such as data.sources.0."""
    merged = list(items)
    for number, value in changed.items():
        known = str(number).isdigit() and int(number) < len(items)
        if not (known and isinstance(value, dict)):
            raise UserError(
                f"{key}.{number} is not a section: {key} has {len(items)} of them, {key}.0 to "
                f"{key}.{len(items) - 1}."
            )
        merged[int(number)] = _merged(merged[int(number)], value)
    return merged


def with_overrides(tree: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """The tree with all overrides merged at once, so that their order does not matter."""
    above: dict[str, Any] = {}
    for override in overrides:
        dotted, equals, text = override.partition("=")
        keys = dotted.strip().split(".")
        if not equals or not all(keys):
            raise UserError(f"'{override}' is not an override; write section.key=value.")
        try:
            value = yaml.load(text, _YamlLoader)
        except yaml.YAMLError:
            raise UserError(f"the value in '{override}' is not valid YAML; quote it.") from None
        _require_sections(tree, keys, override, lists=True)
        _require_sections(above, keys, override)
        node = above
        for key in keys[:-1]:
            node = node.setdefault(key, {})
        node[keys[-1]] = value
    return _merged(tree, above)


def _require_sections(
    tree: dict[str, Any], keys: list[str], override: str, *, lists: bool = False
) -> None:
    """lists: whether a list may be one of sections, changed by number (`_with_items`)."""
    node: Any = tree
    for depth, key in enumerate(keys[:-1]):
        node = node.get(key, {})
        if lists and isinstance(node, list) and all(isinstance(item, dict) for item in node):
            return
        if not isinstance(node, dict):
            dotted = ".".join(keys[: depth + 1])
            raise UserError(f"'{override}': {dotted} is a value, not a section.")


def _explain(
    error: Any, known: Iterable[str], descriptions: Mapping[str, str | None], objective: str
) -> str:
    """One pydantic error in words: dotted key, value, remedy, description of the setting."""
    kind, value, dotted, shown = error["type"], error["input"], "", ""
    places: list[int] = []
    # pydantic's location also has positions in lists and branches of unions.
    for part in error["loc"]:
        longer = f"{dotted}.{part}" if dotted else str(part)
        if longer in known or (kind == "extra_forbidden" and part == error["loc"][-1]):
            # Positions before a key are those of sections in a list: data.sources.0.weight.
            shown = ".".join([*filter(None, [shown]), *(str(p - 1) for p in places), str(part)])
            dotted, places = longer, []
        elif isinstance(part, int):
            places.append(part + 1)
    if kind == "extra_forbidden" and dotted in known:
        return f"'{shown}' is not a setting of objective.name={objective}; remove it"
    if kind == "extra_forbidden" and dotted in RECIPES:
        return f"'{shown}' belongs to another task, `arvideo {RECIPES[dotted].script}`; remove it"
    if kind == "extra_forbidden":
        near = nearest(dotted, known)
        return f"unknown key '{shown}'" + (f"; did you mean '{near}'?" if near else "")
    if kind == "missing" and not places:
        message = f"'{shown}' is missing"
    else:
        message = f"{shown}={value!r}: {_remedy(error, shown, places)}"
    description = descriptions.get(dotted)
    return f"{message} ({dotted}: {' '.join(description.split())})" if description else message


def _remedy(error: Any, dotted: str, places: list[int]) -> str:
    kind, value = error["type"], error["input"]
    if kind == "missing":
        return f"value {places[-1]} of the list is missing"
    if kind == "model_type":
        return f"this is a section; write {dotted}.KEY=VALUE"
    numbers = re.findall(r"[\d.]+", value) if isinstance(value, str) else []
    if kind == "tuple_type" or (kind in _EXAMPLES and len(numbers) > 1):
        listed = ",".join(numbers) if len(numbers) > 1 else "2,7,7"
        return f"must be a list in brackets, such as {dotted}=[{listed}]"
    place = f"value {places[-1]} " if places else ""
    if kind in _EXAMPLES:
        what, example = _EXAMPLES[kind]
        return f"{place}must be {what}, such as {example if places else f'{dotted}={example}'}"
    message = error["msg"].removeprefix("Value error, ")
    return place + message.replace("Input should be", "must be")


# Kinds of pydantic's errors: the expected type, and an example.
_EXAMPLES = {
    **dict.fromkeys(("int_type", "int_parsing", "int_from_float"), ("a whole number", "16")),
    **dict.fromkeys(("float_type", "float_parsing"), ("a number", "0.5")),
    **dict.fromkeys(("bool_type", "bool_parsing"), ("true or false", "true")),
}


def nearest(key: str, known: Iterable[str]) -> str | None:
    """The known key most similar to `key`: by its whole path, else by its last part."""
    last = {name.rsplit(".", 1)[-1]: name for name in known}
    whole = difflib.get_close_matches(key, known, n=1, cutoff=0.75)
    part = difflib.get_close_matches(key.rsplit(".", 1)[-1], last, n=1)
    return next(iter([*whole, *(last[name] for name in part)]), None)


def _settings_of(
    model: type[BaseModel], objective: str | None = None, prefix: str = ""
) -> dict[str, str | None]:
    """The description of every `section.key`; of one objective's settings or of all."""
    settings = {}
    for name, field in model.model_fields.items():
        settings[prefix + name] = field.description
        for section in sections_of(field.annotation, objective):
            settings |= _settings_of(section, objective, f"{prefix}{name}.")
    return settings


def sections_of(annotation: Any, objective: str | None) -> list[type[BaseModel]]:
    if annotation is BaseObjective:
        return [schema for name, schema in OBJECTIVES.items() if objective in (None, name)]
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [section for kind in get_args(annotation) for section in sections_of(kind, objective)]
