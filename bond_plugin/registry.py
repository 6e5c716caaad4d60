"""The entry-point groups through which algorithms, losses and plugins are found.

An algorithm is one file plus one entry point, in this distribution or in anybody's. A name that two distributions
claim, or an entry that cannot be imported, stops the run.
"""

from __future__ import annotations

import os
import sys
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import Any

PLUGINS = "openrlhf.plugins"
ADVANTAGE_ESTIMATORS = "openrlhf.advantage_estimators"
POLICY_LOSSES = "openrlhf.policy_losses"
REWARD_TRANSFORMS = "openrlhf.reward_transforms"

OWN_LOSS = "own"
"""As the name of a policy loss: the algorithm's method ``loss``."""


class RegistryError(RuntimeError):
    """An entry-point group is not usable: a duplicate name, or an entry that does not import."""


@cache
def names(group: str) -> dict[str, EntryPoint]:
    """The entries of ``group`` by name, in order, none of them imported. Raises RegistryError if two share a name."""
    found: dict[str, EntryPoint] = {}
    for entry in entry_points(group=group):
        other = found.get(entry.name)
        if other is not None and other.value != entry.value:
            raise RegistryError(
                f"two installed packages both register '{entry.name}' in the entry-point group '{group}': "
                f"{_origin(other)} and {_origin(entry)}. Uninstall one of them or rename its entry point."
            )
        found[entry.name] = entry
    return dict(sorted(found.items()))


def load(group: str, name: str) -> Any:
    """The object that ``name`` stands for in ``group``; ``package.module:Name`` for itself, here too.

    Raises RegistryError if the name is not registered, or importing it fails (the cause is chained).
    """
    known = names(group)
    if ":" in name:
        if os.getcwd() not in sys.path:
            sys.path.insert(0, os.getcwd())
        known = {name: EntryPoint(name, name, group)}
    if name not in known:
        raise RegistryError(
            f"'{name}' is not registered in the entry-point group '{group}' (known: {', '.join(known) or 'none'})"
        )
    entry = known[name]
    try:
        return entry.load()
    except Exception as error:
        raise RegistryError(
            f"'{name}' in the entry-point group '{group}' ({_origin(entry)}) cannot be imported: {error!r}"
        ) from error


def policy_loss(name: str, algorithm: Any) -> Any:
    """The policy loss ``name``, of ours or anybody's; ``own`` is the method of the algorithm."""
    return algorithm.loss if name == OWN_LOSS and algorithm is not None else load(POLICY_LOSSES, name)


def load_class(group: str, name: str, base: type) -> Any:
    """The subclass of ``base`` that ``name`` stands for. Raises RegistryError as :func:`load`, or if it is none."""
    found = load(group, name)
    if not (isinstance(found, type) and issubclass(found, base)):
        raise RegistryError(f"'{name}' in '{group}' must be a subclass of bond_plugin.algorithms.{base.__name__}")
    return found


def _origin(entry: EntryPoint) -> str:
    if entry.name == entry.value:
        return "an import path"
    dist = entry.dist.metadata["Name"] if entry.dist is not None else "an unnamed distribution"
    return f"{entry.value} from {dist}"
