"""Recipes: the host's dotted flags as nested YAML.

    algo:
      advantage:
        estimator: jbond
    bond:
      beta: 0.5

is ``--algo.advantage.estimator jbond --bond.beta 0.5``. A recipe knows no keys of its own: what is valid is
what the parser knows.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from bond_plugin.options import last_value
from bond_plugin.words import did_you_mean

#: Names of arguments whose values are nobody's to read: ``--logger.wandb.key``.
_SECRET = ("key",)


class RecipeError(ValueError):
    """A recipe cannot be read, or holds a key that is no flag."""


def path_from(argv: list[str]) -> Path | None:
    """The value of ``--recipe`` in ``argv``; the last one wins."""
    if argv and argv[-1] == "--recipe":
        raise RecipeError("--recipe needs a file: --recipe FILE.yaml")
    path = last_value(argv, "--recipe")
    return Path(path) if path is not None else None


def read(path: Path) -> dict[str, Any]:
    """Flatten a recipe into dotted names and values, in the order of the file.

    Raises:
        RecipeError: no such file, no YAML mapping, or a key given twice.
    """
    import yaml

    if not path.is_file():
        raise RecipeError(f"--recipe {path}: no such file; `bond recipes` prints those of the package")
    try:
        content = yaml.load(path.read_text(), Loader=strict_loader(yaml))
    except yaml.YAMLError as error:
        raise RecipeError(f"--recipe {path}: not valid YAML: {error}") from error
    if not isinstance(content, dict):
        raise RecipeError(f"--recipe {path}: a recipe is a mapping of flags, found {type(content).__name__}")
    flat: dict[str, Any] = {}
    try:
        flatten(content, flat)
    except RecipeError as error:
        raise RecipeError(f"--recipe {path}: {error}") from error
    return flat


def flatten(node: dict, flat: dict[str, Any], prefix: str = "") -> None:
    """Add the dotted names and values of a nested mapping to ``flat``.

    Raises:
        RecipeError: a name that is there already.
    """
    for key, value in node.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict):
            flatten(value, flat, f"{name}.")
        elif name in flat:
            raise RecipeError(f"'{name}' is given twice")
        else:
            flat[name] = value


def nest(flat: dict[str, Any]) -> dict[str, Any]:
    """Dotted names as a recipe has them: what :func:`flatten` takes apart."""
    tree: dict[str, Any] = {}
    for name, value in flat.items():
        *path, last = name.split(".")
        node = tree
        for part in path:
            node = node.setdefault(part, {})
        node[last] = value
    return tree


def to_argv(flat: dict[str, Any], parser: argparse.ArgumentParser, path: Path) -> list[str]:
    """The command line that a recipe stands for.

    Raises:
        RecipeError: a key that is no flag (the nearest one is named), or a value that does not fit its kind.
    """
    known = {option[2:]: action for option, action in parser._option_string_actions.items() if option[:2] == "--"}
    for name in ("help", "recipe"):
        known.pop(name, None)
    argv: list[str] = []
    for name, value in flat.items():
        action = known.get(name)
        if action is None:
            raise RecipeError(f"--recipe {path}: unknown key '{name}'{did_you_mean(name, known, 0.5)}")
        if value is None:
            continue
        option = f"--{name}"
        if action.nargs == 0:
            if not isinstance(value, bool):
                raise RecipeError(f"--recipe {path}: '{name}' is true or false, got {value!r}")
            argv.append(f"{option}={'true' if value else 'false'}")
        elif isinstance(value, list):
            argv += [option, *map(_text, value)]
        else:
            argv += [option, _text(value)] if not _text(value).startswith("-") else [f"{option}={_text(value)}"]
    return argv


def expand_booleans(argv: list[str], parser: argparse.ArgumentParser) -> list[str]:
    """Resolve ``--switch=true`` and ``--switch=false``, so that a switch a recipe turns on can be turned off.

    The last word on a switch counts, as for any other flag.
    """
    words: dict[str, str] = {}
    rest: list[str] = []
    for token in argv:
        option, equals, value = token.partition("=")
        action = parser._option_string_actions.get(option)
        if action is None or action.nargs != 0 or option in ("-h", "--help"):
            rest.append(token)
            continue
        value = value.lower() if equals else "true"
        if value not in ("true", "false"):
            raise RecipeError(f"{option} is a switch: {option}, {option}=true or {option}=false")
        off = isinstance(action, argparse.BooleanOptionalAction) and option.startswith("--no-")
        words[action.option_strings[0] if off else option] = str((value == "true") != off).lower()
    for option, value in words.items():
        action = parser._option_string_actions[option]
        if value == "true":
            rest.append(option)
        elif isinstance(action, argparse.BooleanOptionalAction):
            rest.append(f"--no-{option[2:]}")
    return rest


def plain(args: Any) -> Any:
    """A run's nested arguments as mappings, lists and scalars; what is secret is left out."""
    if isinstance(args, SimpleNamespace):
        return {name: plain(value) for name, value in sorted(vars(args).items()) if name not in _SECRET}
    if isinstance(args, list | tuple):
        return [plain(value) for value in args]
    return args if isinstance(args, bool | int | float | str | None) else str(args)


def namespace(values: Any) -> Any:
    """Nested mappings as the host's nested arguments: the way back from :func:`plain`."""
    if isinstance(values, dict):
        return SimpleNamespace(**{name: namespace(value) for name, value in values.items()})
    return values


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    return str(value)


def strict_loader(yaml: Any) -> Any:
    """A loader to which a key given twice is an error, as it never is meant."""

    class Loader(yaml.SafeLoader):
        pass

    def mapping(loader: Any, node: Any) -> dict:
        seen = set()
        for key, _ in node.value:
            name = loader.construct_object(key)
            if name in seen:
                raise yaml.constructor.ConstructorError(None, None, f"'{name}' is given twice", key.start_mark)
            seen.add(name)
        return yaml.SafeLoader.construct_mapping(loader, node, deep=True)

    Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, mapping)
    return Loader
