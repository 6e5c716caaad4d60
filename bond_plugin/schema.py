"""Files as pydantic models, and what is wrong with one in words of the file."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from bond_plugin.files import ContentError, read_json
from bond_plugin.words import did_you_mean, shorten


class Strict(BaseModel):
    """A mapping without other keys than these; numbers are numbers, not texts."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, arbitrary_types_allowed=True)


class Open(Strict):
    """Other keys are kept."""

    model_config = ConfigDict(extra="allow")


_Model = TypeVar("_Model", bound=Strict)


def read_model(path: Path, model: type[_Model]) -> _Model | None:
    """The content of a JSON file as ``model`` has it; ``None`` if there is no such file.

    Raises:
        ContentError: it is something else. The message names the file and the place in it.
    """
    content = read_json(path)
    try:
        return None if content is None else model.model_validate(content)
    except ValidationError as error:
        raise ContentError(f"{path}: {explain(error, model)}") from error


def explain(error: ValidationError, model: type[BaseModel]) -> str:
    """The first thing that is wrong: the place by its dotted name, then what it is.

    Args:
        error: of validating for ``model``.
        model: its fields, and those of the models in it, are what an unknown key may have been meant to be.
    """
    first = error.errors()[0]
    *path, last = [part for part in first["loc"] if part != "[key]"] or [""]
    place = ".".join(map(str, path))
    within = f"{place}: " if place else ""
    if first["type"] == "missing":
        return f"{within}'{last}' is missing"
    if first["type"] == "extra_forbidden":
        return f"{within}unknown key '{last}'{did_you_mean(str(last), sorted(_names(model)))}"
    place = f"{place}.{last}".strip(".")
    said = first["msg"].removeprefix("Value error, ").replace("Input should be", "must be")
    got = "" if first["type"] == "value_error" else f", got {shorten(first['input'], 60)}"
    return f"{place}: {said}{got}" if place else f"{said}{got}"


def _names(model: Any) -> set[str]:
    """The fields of a model, and of all models in it."""
    if not (isinstance(model, type) and issubclass(model, BaseModel)):
        return set().union(*map(_names, getattr(model, "__args__", ())))
    inner = (_names(field.annotation) for field in model.model_fields.values())
    return set(model.model_fields).union(*inner)
