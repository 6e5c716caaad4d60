"""``bond recipes``: the recipes that come with the package, listed or printed."""

from __future__ import annotations

import ast
import difflib
import importlib.resources
import re
import sys
from pathlib import Path

from bond_plugin import options

_EPILOG = """\
examples:
  bond recipes                                        list them
  bond recipes reviews/jbond-cpu > my.yaml            a recipe to change
  bond recipes reviews/reward.py                      a file that recipes name
  cp -r "$(bond recipes --path)" recipes              all of them, where their own comments and paths expect them

A recipe is run with `bond train --recipe FILE`, a matrix (bench*.yaml) with `bond bench FILE`. The paths in a recipe
are relative to the folder that the command is run in; any of them can be given on the command line instead, such as
--reward.remote_url my_reward.py.
"""


def folder() -> Path:
    """Where the recipes are: in the installed package, or in the clone that it is installed from."""
    return Path(str(importlib.resources.files("bond_plugin") / "recipes")).resolve()


def found() -> dict[str, Path]:
    """Recipes and the files beside them, by their names below :func:`folder`, recipes first."""
    top = folder()
    paths = [path for kind in ("yaml", "py", "jinja") for path in sorted(top.glob(f"**/*.{kind}"))]
    return {path.relative_to(top).as_posix(): path for path in paths}


def purpose(path: Path) -> str:
    """What a file is for, in a line: a recipe's first comment, a module's first sentence."""
    text = path.read_text(encoding="utf-8")
    line = (ast.get_docstring(ast.parse(text)) or "") if path.suffix == ".py" else text.lstrip("{# ")
    return line.partition("\n")[0].rstrip(" :.")


def main(argv: list[str]) -> int:
    """List recipes, or print one. Returns the exit status (2 for an unknown name)."""
    about = "List the recipes that come with the package, or print one to the standard output."
    parser = options.parser("recipes", about, _EPILOG)
    parser.add_argument("name", nargs="?", metavar="NAME", help="print this file; .yaml may be left out")
    parser.add_argument("--path", action="store_true", help="print the folder that holds them")
    args = parser.parse_args(argv)
    if args.path:
        print(folder())
        return 0
    files, wanted = found(), args.name
    if wanted is None:
        width = max(map(len, files))
        print("\n".join(f"{name:<{width}}  {purpose(file)}" for name, file in files.items()), flush=True)
        return 0
    name = wanted if wanted in files else f"{wanted}.yaml"
    if name not in files:
        known = {short: file for file in reversed(files) for short in (Path(file).stem, file)}
        close = difflib.get_close_matches(wanted, known, n=1, cutoff=0.4)
        hint = f"; did you mean '{known[close[0]]}'?" if close else ""
        print(f"bond recipes: error: no recipe '{wanted}'{hint} (`bond recipes` lists them)", file=sys.stderr)
        return 2
    content = files[name].read_bytes()
    sys.stdout.buffer.write(content)
    sys.stdout.buffer.flush()
    named = re.findall(r"\brecipes/[\w./-]+", re.sub(r"#.*", "", content.decode()))  # in values
    missing = [path for path in sorted(set(named)) if not Path(path).exists()]
    if missing and name.endswith(".yaml"):
        print(
            f"bond: note: it reads {', '.join(missing)}, which is not below this folder: "
            'cp -r "$(bond recipes --path)" recipes',
            file=sys.stderr,
        )
    return 0
