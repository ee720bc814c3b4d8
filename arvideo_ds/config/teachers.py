"""What the settings of a teacher share: a frozen model that a run learns from."""

from __future__ import annotations

from arvideo_ds.config.settings import Settings
from arvideo_ds.config.sizes import SIZES, Size
from arvideo_ds.errors import UserError

# objective.teacher: the moving average of the run's own weights.
EMA = "ema"


def teacher_size(section: str, teacher: str | None, size: str | None) -> Size | None:
    """Shape of a teacher, if there is one. Errors: `UserError` where its size is unknown."""
    if teacher is None:
        return None
    if size is None:
        raise UserError(
            f"{section}.teacher={teacher} has neither a recipe.yaml nor a config.json that gives "
            f"its size. Set {section}.teacher_size, such as B."
        )
    return SIZES[size]


def check_teacher(section: str, settings: Settings) -> None:
    """Errors: `UserError` for settings that contradict each other.

    settings: with `teacher`, and with settings of it whose names begin with `teacher_`.
    """
    fields = type(settings).model_fields
    values = {name: getattr(settings, name) for name in fields if name.startswith("teacher")}
    if values["teacher_size"] not in (None, *SIZES):
        raise UserError(
            f"{section}.teacher_size={values['teacher_size']} is not one of {', '.join(SIZES)}."
        )
    given = [name for name, value in values.items() if value != fields[name].default]
    if given and values["teacher"] is None:
        listed = ", ".join(f"{section}.{name}" for name in given)
        raise UserError(
            f"{listed} describe a teacher, and {section}.teacher names none. Set it, or remove "
            "them."
        )
