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
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

from bond_plugin.files import open_file
from bond_plugin.options import last_value
from bond_plugin.words import did_you_mean, reason

#: Names of arguments whose values are nobody's to read: ``--logger.wandb.key``.
_SECRET = ("key",)

#: Flags of several values in one word, which a recipe may give as a list.
_WITH_COMMAS = (
    "data.prompt_dataset",
    "data.prompt_probs",
    "eval.dataset",
    "reward.remote_url",
    "reward.model_name_or_path",
)
#: What YAML 1.1 takes for true and false.
_SWITCH = dict.fromkeys(("true", "yes", "on"), True) | dict.fromkeys(("false", "no", "off"), False)


class RecipeError(ValueError):
    """A recipe cannot be read, or holds a key that is no flag."""


def is_on(value: Any) -> bool | None:
    """Whether a switch that a recipe gives is on; ``None`` if that is no word for it."""
    return _SWITCH.get(str(value).lower())


def path_from(argv: list[str]) -> Path | None:
    """The value of ``--recipe`` in ``argv``; the last one wins."""
    if argv and argv[-1] == "--recipe":
        raise RecipeError("--recipe needs a file: --recipe FILE.yaml")
    path = last_value(argv, "--recipe")
    return Path(path) if path is not None else None


def read(path: Path) -> dict[str, Any]:
    """Flatten a recipe into dotted names and values, in the order of the file.

    A value is the text that the file has, ``None`` for null, ``~`` or nothing; or a list of such. Raises RecipeError
    for a file that :func:`load` cannot read, no mapping, or a key given twice.
    """
    flat: dict[str, Any] = {}
    try:
        content = load(path, typed=False)
        if not isinstance(content, dict):
            found = "nothing" if content is None else type(content).__name__
            raise RecipeError(f"a recipe is a mapping of flags, found {found}")
        flatten(content, flat)
    except RecipeError as error:
        raise RecipeError(f"--recipe {path}: {error}") from error
    return flat


def flatten(node: dict, flat: dict[str, Any], prefix: str = "") -> None:
    """Add the dotted names and values of a nested mapping to ``flat``.

    Raises RecipeError for a name that is there already, or a mapping that is nested too deeply.
    """
    if prefix.count(".") > _DEEPEST:  # by aliases: the loader counts what is written
        raise RecipeError(f"nested deeper than {_DEEPEST} levels")
    for key, value in node.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict):
            flatten(value, flat, f"{name}.")
        elif name in flat:
            raise RecipeError(f"'{name}' is given twice")
        elif len(flat) >= _MOST:  # by aliases of aliases
            raise RecipeError(f"it has more than {_MOST:,} flags")
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

    Raises RecipeError for a key that is no flag (it names the nearest), or a value that does not fit its kind.
    """
    known = {option[2:]: action for option, action in parser._option_string_actions.items() if option[:2] == "--"}
    for name in ("help", "recipe"):
        known.pop(name, None)
    argv: list[str] = []
    for name, value in flat.items():
        action, option = known.get(name), f"--{name}"
        if action is None:
            raise RecipeError(f"--recipe {path}: unknown key '{name}'{did_you_mean(name, known, 0.5)}")
        if value is None:
            continue
        if action.nargs == 0:
            on = is_on(value)
            if on is None:
                raise RecipeError(f"--recipe {path}: '{name}' is true or false, got {value}")
            argv.append(f"{option}={str(on).lower()}")
        elif isinstance(value, str):
            argv += [f"{option}={value}"] if value.startswith("-") else [option, value]
        elif name in _WITH_COMMAS and all(isinstance(one, str) for one in value):
            argv.append(f"{option}={','.join(value)}")
        elif action.nargs is None:
            raise RecipeError(f"--recipe {path}: '{name}' is one value, not a list")
        elif not all(isinstance(one, str) for one in value):
            raise RecipeError(f"--recipe {path}: the values of '{name}' are texts or numbers, not null or a list")
        elif isinstance(action.nargs, int) and len(value) != action.nargs:
            raise RecipeError(f"--recipe {path}: '{name}' takes {action.nargs} values, got {len(value)}")
        else:
            argv += [option, *value]
    return argv


def expand_booleans(argv: list[str], parser: argparse.ArgumentParser) -> list[str]:
    """Resolve ``--switch=true`` and ``--switch=false``, so that a switch a recipe turns on can be turned off.

    The last word on a switch counts, as for any other flag.
    """
    switches: dict[argparse.Action, bool] = {}
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
        switches[action] = (value == "true") != off
    for action, on in switches.items():
        option = action.option_strings[0]
        if on:
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


def said(option: str, argv: list[str], flat: dict[str, Any]) -> str | None:
    """What the command line, else the recipe says of a flag with one value; ``None`` if neither does."""
    value = last_value(argv, option)
    value = flat.get(option[2:]) if value is None else value
    return value if isinstance(value, str) else None  # a list is for the parser to refuse


# The file.

_LARGEST = 2**20  # bytes
_MOST = 10_000  # names
_DEEPEST = 50  # mappings and lists in one another

#: What is a number or a boolean where types are wanted: first characters, the whole, and how it is read.
_TYPES = {
    "bool": ("tTfF", "(true|True|TRUE|false|False|FALSE)$", lambda text: text.lower() == "true"),
    "int": ("-+0123456789", "[-+]?(0|[1-9](_?[0-9]){0,17})$", int),
    "float": ("-+.0123456789", r"[-+]?([0-9](_?[0-9])*\.[0-9]*|\.[0-9]+)([eE][-+][0-9]+)?$", float),
}


def load(path: Path, typed: bool) -> Any:
    """The content of a YAML file, in UTF-8 and of at most 1 MiB; ``typed``: see :func:`strict_loader`.

    Raises RecipeError, to follow the file's name: what is wrong, and in which line if it is in one.
    """
    import yaml

    try:
        with open_file(path) as file:
            content = file.read(_LARGEST + 1)
    except OSError as error:
        hint = "; `bond recipes` prints those of the package" if isinstance(error, FileNotFoundError) else ""
        raise RecipeError(f"{reason(error)}{hint}") from error
    except ValueError as error:  # a null byte in its name
        raise RecipeError(str(error)) from error
    if len(content) > _LARGEST:
        raise RecipeError("larger than 1 MiB, which is no file of flags")
    try:
        return yaml.load(content.decode("utf-8-sig"), Loader=strict_loader(yaml, typed))
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise RecipeError(f"line {line} is not UTF-8; save the file in that encoding") from error
    except (yaml.YAMLError, ValueError, OverflowError) as error:  # the last two: of numbers in escapes and directives
        said = str(error).replace('in "<unicode string>", ', "in ")
        raise RecipeError(f"not valid YAML: {said}") from error


def strict_loader(yaml: Any, typed: bool) -> Any:
    """A loader to which a key given twice is an error, as it never is meant, and nesting deeper than any flag is one.

    ``typed``: numbers, ``true`` and ``false`` are what they are, so far as all versions of YAML agree: ``off``,
    ``0123`` and ``1:30`` are texts. Without, every value is the text that is written. Either way keys are texts, and
    ``null``, ``~`` and nothing are ``None``.
    """
    tag, wrong = "tag:yaml.org,2002:", yaml.composer.ComposerError

    class Loader(yaml.SafeLoader):
        yaml_constructors: ClassVar = {None: yaml.SafeLoader.construct_undefined}  # of tags that are not below
        yaml_implicit_resolvers: ClassVar = {}

        def compose_node(self, parent: Any, index: Any) -> Any:
            if len(self.marks) > _DEEPEST:
                raise wrong(None, None, f"nested deeper than {_DEEPEST} levels", self.marks[-1])
            return super().compose_node(parent, index)

        def construct_mapping(self, node: Any, deep: bool = False) -> dict:
            merged, own = {}, {}
            for key, value in node.value:
                found = self.construct_object(value)
                if key.tag == f"{tag}merge":
                    for mapping in found if isinstance(found, list) else [found]:
                        if not isinstance(mapping, dict):
                            raise wrong(None, None, "<< takes a mapping, or a list of some", key.start_mark)
                        merged = {**mapping, **merged}
                elif not isinstance(key, yaml.ScalarNode):
                    raise wrong(None, None, "a key must be a text", key.start_mark)
                elif key.value in own:
                    raise wrong(None, None, f"'{key.value}' is given twice", key.start_mark)
                else:
                    own[key.value] = found
            return {**merged, **own}

    Loader.add_constructor(f"{tag}map", Loader.construct_mapping)
    Loader.add_constructor(f"{tag}seq", Loader.construct_sequence)
    Loader.add_constructor(f"{tag}str", Loader.construct_scalar)
    Loader.add_constructor(f"{tag}merge", Loader.construct_scalar)  # where it is a value
    Loader.add_constructor(f"{tag}null", lambda loader, node: None)
    Loader.add_implicit_resolver(f"{tag}null", re.compile("(~|null|Null|NULL|)$"), ["~", "n", "N", ""])
    Loader.add_implicit_resolver(f"{tag}merge", re.compile("<<$"), ["<"])
    for name, (first, pattern, read_as) in _TYPES.items() if typed else ():
        Loader.add_implicit_resolver(f"{tag}{name}", re.compile(pattern), list(first))
        Loader.add_constructor(f"{tag}{name}", lambda loader, node, read_as=read_as: read_as(node.value))
    return Loader
