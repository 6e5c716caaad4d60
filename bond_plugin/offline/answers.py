"""The final answer of a response, for votes: what the user's function finds, or what stands in \\boxed{} or last."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path

from bond_plugin.words import reason, shorten

_FUNCTION = "answer_func"

#: A response to its answer, ``None`` for none; equal answers are equal texts.
Parser = Callable[[str], str | None]


class SelectionError(RuntimeError):
    """The user's function cannot be loaded, failed or gave no text; or rewards with which no response is selected."""


def boxed_or_last_line(response: str) -> str | None:
    """What stands in the last ``\\boxed{}``, else the last line, as the host's checker of sums writes answers."""
    from openrlhf.utils.math_utils import extract_boxed_answer, mathd_normalize_answer

    found = extract_boxed_answer(response)
    if found is None:
        found = next((line for line in reversed(response.splitlines()) if line.strip()), "")
    return mathd_normalize_answer(found) or None


def parser(file: Path | None) -> Parser:
    """The parser of a Python file that defines ``answer_func(response) -> str | None``, or our own without a file.

    Raises:
        SelectionError: it cannot be loaded, or fails on an empty response. Later calls raise it as well.
    """
    if file is None:
        return boxed_or_last_line
    spec = importlib.util.spec_from_file_location("bond_answers", file)
    try:
        if spec is None:
            raise SelectionError(f"{file}: name a Python file (.py) that defines {_FUNCTION}(response)")
        module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)  # there dataclasses look
        spec.loader.exec_module(module)
    except OSError as error:
        raise SelectionError(f"{file}: {reason(error)}") from error
    except (Exception, SystemExit) as error:
        raise error if isinstance(error, SelectionError) else SelectionError(f"{file}: {error!r}") from error
    function = getattr(module, _FUNCTION, None)
    if not callable(function):
        raise SelectionError(f"{file} defines no {_FUNCTION}(response)")

    def parse(response: str) -> str | None:
        try:
            found = function(response)
        except Exception as error:
            raise SelectionError(f"{file} failed on the response {shorten(response)}: {error!r}") from error
        if found is not None and not isinstance(found, str):
            raise SelectionError(
                f"{file} must give a text or None, and gave {shorten(found)} for {shorten(response)}"
            )
        return found or None

    parse("")
    return parse
