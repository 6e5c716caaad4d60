"""The reader of recipes: a value reaches its flag as it is written, and a file that is no use has one clear error."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import POOLED, nested
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from bond_plugin import recipe
from bond_plugin.bench import matrix
from bond_plugin.recipe import RecipeError

quick = settings(deadline=None, max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])


def flags() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--a.value")
    parser.add_argument("--a.number", type=int)
    parser.add_argument("--a.values", nargs="*")
    parser.add_argument("--a.on", action="store_true")
    parser.add_argument("--a.kept", action=argparse.BooleanOptionalAction, default=True)
    return parser


def parsed(path: Path) -> dict[str, Any]:
    """What the flags are after a recipe, without those that it says nothing of."""
    parser = flags()
    argv = recipe.expand_booleans(recipe.to_argv(recipe.read(path), parser, path), parser)
    found = vars(parser.parse_args(argv))
    return {name: value for name, value in found.items() if value != parser.get_default(name)}


def write(folder: Path, content: str | bytes) -> Path:
    path = folder / "recipe.yaml"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


AS_WRITTEN = [
    "off", "no", "yes", "on", "Off", "1.10", "0123", "1:30", "1e-4", "1.0e-4", "0x1f", "0o17", "1_000", "2024-01-01",
    "NaN", ".inf", "true", "True", "=", "<<", "a b", "a#b", "C:\\x", "-5",
    "-1e-4", "-x", "+1", "1.", "é", "{{x}}", "%s",
]  # fmt: skip


@pytest.mark.parametrize("text", AS_WRITTEN)
def test_a_value_reaches_its_flag_as_it_is_written(text: str, tmp_path: Path) -> None:
    written = f'"{text}"' if text.startswith(("{", "%")) else text
    written = written.replace("\\", "\\\\") if written.startswith('"') else written
    assert parsed(write(tmp_path, f"a: {{value: {written}}}")) == {"a.value": text}
    assert parsed(write(tmp_path, f"a:\n  value: {written}\n  # a comment\n")) == {"a.value": text}
    assert parsed(write(tmp_path, f"a.value: '{text}'")) == {"a.value": text}


@pytest.mark.parametrize(("content", "found"), [
    ("a: {value: ~, number: null, values: , 'on': true}", {"a.on": True}),
    ("a: {value: 'null', number: 0123}", {"a.value": "null", "a.number": 123}),
    ("a: {value: '', kept: false}", {"a.value": "", "a.kept": False}),
    ("a: {on: false, kept: TRUE}", {}),
    ("a: {values: [off, 1.10, 'null', '']}", {"a.values": ["off", "1.10", "null", ""]}),
    ("a:\n  values:\n  - 1e-4\n  - a b\n", {"a.values": ["1e-4", "a b"]}),
    ("a: {values: one}", {"a.values": ["one"]}),
    ("a: {value: !!str 012}", {"a.value": "012"}),
    ("a: {value: &x 1.10, values: [*x, *x]}", {"a.value": "1.10", "a.values": ["1.10", "1.10"]}),
    ("a: {<<: {value: off, number: 1}, number: 2}", {"a.value": "off", "a.number": 2}),
    ("a:\n  <<: [{value: x}, {value: y, number: 3}]\n", {"a.value": "x", "a.number": 3}),
    ("a: {value: |\n  one\n  two\n}\n".replace("{", "\n ").replace("}", ""), {"a.value": "one\ntwo\n"}),
    (b"\xef\xbb\xbfa: {value: x}", {"a.value": "x"}),
])  # fmt: skip
def test_what_a_recipe_means(content: str | bytes, found: dict[str, Any], tmp_path: Path) -> None:
    assert parsed(write(tmp_path, content)) == found


def test_a_mapping_is_written_once_and_merged_into_another(tmp_path: Path) -> None:
    path = write(tmp_path, "actor:\n  adam: &adam {lr: 1e-4, eps: 1.0e-2}\ncritic:\n  adam: {<<: *adam, lr: 9e-6}\n")
    assert recipe.read(path) == {
        "actor.adam.lr": "1e-4", "actor.adam.eps": "1.0e-2", "critic.adam.lr": "9e-6", "critic.adam.eps": "1.0e-2"
    }  # fmt: skip


UNREADABLE: dict[str, tuple[str | bytes, str]] = {
    "deep, in brackets": ("a: " + "[" * 1000, "nested deeper than 50 levels\n  in line 1, column 53"),
    "deep, in lines": ("\n".join(" " * i + "a:" for i in range(1000)), "nested deeper than 50 levels\n  in line 51"),
    "deep, by aliases": (
        "\n".join(["k0: &k0 {a: 1}", *(f"k{i}: &k{i} {{a: *k{i - 1} }}" for i in range(1, 3000))]),
        "nested deeper than 50 levels",
    ),
    "in itself": ("a: &x {b: *x}", "recursive node\n  in line 1"),
    "in itself, a list": ("a: &x [*x]", "recursive node\n  in line 1"),
    "UTF-16": ("a: 1".encode("utf-16"), "line 1 is not UTF-8"),
    "UTF-16 without a mark": ("a: 1".encode("utf-16-le"), "unacceptable character #x0000"),
    "latin-1": ("a: 1\nb: é".encode("latin-1"), "line 2 is not UTF-8"),
    "tab": ("a: 1\n\tb: 2", "'\\t' that cannot start any token\n  in line 2"),
    "not finished": ("a: {b: [", "not valid YAML: while parsing a flow node"),
    "two of them": ("a: 1\n---\nb: 1", "single document"),
    "no such alias": ("a: *x", "undefined alias 'x'\n  in line 1"),
    "escape": ('a: "\\U00110000"', "not valid YAML"),
    "version": (f"%YAML 1{'1' * 5000}.1\n---\na: 1", "not valid YAML"),
    "tag": ("a: !!int 3", "the tag 'tag:yaml.org,2002:int'\n  in line 1"),
    "tag of Python": ("a: !!python/name:os.system x", "the tag 'tag:yaml.org,2002:python/name:os.system'"),
    "twice": ("a:\n  b: 1\n  b: 2", "'b' is given twice\n  in line 3"),
    "twice, where it is merged": ("a: {<<: {b: 1, b: 2}}", "'b' is given twice\n  in line 1"),
    "twice, dotted": ("a: {b: 1}\na.b: 2", "'a.b' is given twice"),
    "merging no mapping": ("a: {<<: [{b: 1}, 3]}", "<< takes a mapping, or a list of some\n  in line 1"),
    "a list as key": ("[a]: 1", "a key must be a text\n  in line 1"),
    "large": (b"a: " + b"x" * 2**20, "larger than 1 MiB"),
    "empty": ("# nothing\n", "a recipe is a mapping of flags, found nothing"),
    "text": ("hello", "a recipe is a mapping of flags, found str"),
}


@pytest.mark.parametrize("name", UNREADABLE)
def test_a_file_that_is_no_use_has_one_error_with_its_name(name: str, tmp_path: Path) -> None:
    content, says = UNREADABLE[name]
    path = write(tmp_path, content)
    with pytest.raises(RecipeError) as caught:
        recipe.read(path)
    assert str(caught.value).startswith(f"--recipe {path}: ")
    assert says in str(caught.value)
    if name.startswith(
        ("in itself", "deep, in", "UTF", "latin", "tab", "not", "escape", "version", "twice, where", "large")
    ):
        with pytest.raises(RecipeError):
            recipe.load(path, typed=True)


def test_a_large_file_is_refused_before_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "huge.yaml"
    with path.open("wb") as file:
        file.truncate(10 * 2**30)  # of which nothing lies on the disk
    with pytest.raises(RecipeError, match="larger than 1 MiB"):
        recipe.read(path)


def test_no_file(tmp_path: Path) -> None:
    for path, says in (
        (tmp_path / "gone.yaml", "no such file"),
        (tmp_path, "a folder, not a file"),
        (tmp_path / ("x" * 300), "File name too long"),
    ):
        with pytest.raises(RecipeError, match=says):
            recipe.read(path)


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads every file")
def test_a_file_without_permission(tmp_path: Path) -> None:
    path = write(tmp_path, "a: 1")
    path.chmod(0)
    with pytest.raises(RecipeError, match="Permission denied"):
        recipe.read(path)


@pytest.mark.parametrize(("content", "says"), [
    ("a: {on: maybe}", "'a.on' is true or false, got maybe"),
    ("a: {kept: 1}", "'a.kept' is true or false, got 1"),
    ("a: {on: [true]}", "'a.on' is true or false, got ['true']"),
    ("a: {values: [[1]]}", "the values of 'a.values' are texts or numbers, not null or a list"),
    ("a: {values: [1, null]}", "the values of 'a.values' are texts or numbers"),
    ("a: {values: [{b: 1}]}", "the values of 'a.values' are texts or numbers"),
    ("on: 3", "unknown key 'on'"),
    ("~: 3", "unknown key '~'"),
    ("a: {valeu: 3}", "unknown key 'a.valeu'; did you mean 'a.value'?"),
])  # fmt: skip
def test_a_recipe_that_is_no_command_line(content: str, says: str, tmp_path: Path) -> None:
    path = write(tmp_path, content)
    with pytest.raises(RecipeError) as caught:
        recipe.to_argv(recipe.read(path), flags(), path)
    assert str(caught.value).startswith(f"--recipe {path}: ")
    assert says in str(caught.value)


#: Texts that look like YAML, so that not all of them end at the first character.
yamlish = st.lists(
    st.sampled_from([
        "a", "b", ":", ": ", "\n", "  ", "- ", "-", "[", "]", "{", "}", ",", "&x ", "*x", "<<", "|", ">", "'", '"',
        "\\U0011", "\\x", "!!int ", "!!set ", "!", "%YAML 1.1", "---", "...", "?", "#", "~", "0", "1.5", "\t", "\x00",
        "\ufeff", "true", "null", "é", "=", "@", "`",
    ]),
    max_size=30,
).map("".join)  # fmt: skip


@quick
@given(
    content=st.one_of(
        st.binary(max_size=200), st.text(max_size=200).map(lambda t: t.encode("utf-8")), yamlish.map(str.encode)
    )
)
@example(content=b"? [a]\n: 1")
@example(content=b"? &x a\n: *x\n*x : 1")
def test_any_file_is_flags_or_an_error(content: bytes, tmp_path: Path) -> None:
    path = write(tmp_path, content)
    for read in (recipe.read, lambda path: recipe.load(path, typed=True)):
        try:
            found = read(path)
        except RecipeError as error:
            assert str(error)
        else:
            if read is recipe.read:
                assert all(isinstance(name, str) for name in found)
                assert all(value is None or isinstance(value, str | list) for value in found.values())


texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=30).filter(lambda text: text != "--")


@quick
@given(value=texts, values=st.lists(texts.filter(lambda text: not text.startswith("-")), max_size=3))
def test_a_value_reaches_its_flag_as_it_was_dumped(value: str, values: list[str], tmp_path: Path) -> None:
    dumped = yaml.safe_dump({"a": {"value": value, "values": values}})
    assert parsed(write(tmp_path, dumped)) == {"a.value": value, "a.values": values}


@quick
@given(value=st.from_regex(r"[A-Za-z0-9.+/_=<~-][A-Za-z0-9.:+/_=<~-]*[A-Za-z0-9.+/_=<~-]", fullmatch=True))
def test_a_plain_value_reaches_its_flag_as_it_is_written(value: str, tmp_path: Path) -> None:
    if value not in ("null", "Null", "NULL", "--", "---", "..."):
        assert parsed(write(tmp_path, f"a:\n  value: {value}\n"))["a.value"] == value


# In the commands.


@pytest.mark.parametrize(("content", "name", "value"), [
    ("algo: {advantage: {is_correction_level: off}}", "algo.advantage.is_correction_level", "off"),
    ("ds: {zpg: 0123}", "ds.zpg", 123),
    ("actor: {adam: {eps: 1e-4}}", "actor.adam.eps", 1e-4),
    ("data: {input_template: '{} 1:30'}", "data.input_template", "{} 1:30"),
    ("logger: {wandb: {project: 1.10}}", "logger.wandb.project", "1.10"),
    ("actor: {adam: {betas: [9e-1, 0.95]}}", "actor.adam.betas", [0.9, 0.95]),
    ("bond: {device: cpu, strict: null}", "bond.device", "cpu"),
])  # fmt: skip
def test_training_reads_what_is_written(dry: Any, content: str, name: str, value: Any, tmp_path: Path) -> None:
    done = dry(POOLED, extra=("--recipe", str(write(tmp_path, content))))
    assert done.status == 0, done.text
    node = yaml.safe_load(done.out[done.out.index("configuration:") :])["configuration"]
    for part in name.split("."):
        node = node[part]
    assert node == value


@pytest.mark.parametrize(("content", "says"), [
    ("algo: {advantage: {estimator: [jbond, rloo]}}", "'algo.advantage.estimator' is one value"),
    ("algo: {advantage: {estimator: 3}}", "invalid choice: '3'"),
    ("reward: {transform: [vbon]}", "'reward.transform' is one value"),
    ("bond: {device: [cpu]}", "'bond.device' is one value, not a list"),
    ("train: {seed: 1:30}", "invalid int value: '1:30'"),
    ("reward: {clip_range: [-1e-4, x]}", "invalid float value: 'x'"),
])  # fmt: skip
def test_training_refuses_what_is_written(dry: Any, content: str, says: str, tmp_path: Path) -> None:
    path = write(tmp_path, content)
    done = dry({"algo.advantage.estimator": None}, extra=("--recipe", str(path)))
    assert done.status == 2
    assert says in done.text
    assert "Traceback" not in done.text


def test_a_cell_of_a_matrix_is_the_recipe_of_its_flags(tmp_path: Path) -> None:
    path = tmp_path / "bench.yaml"
    path.write_text(
        "common: &all {a: {value: off, kept: false}}\nevaluation: {prompts: p, samples: 4}\nseeds: [1]\n"
        "methods:\n  one: {flags: {<<: *all, a.number: 0123}, strength: {a.values: [[1e-4, 2.50]]}}\n"
        "  two: {strength: [{a: {on: true, value: null}}]}\n"
    )
    one, two = matrix.read(path).cells
    recipes = [write(tmp_path, yaml.safe_dump(nested(cell.flags), sort_keys=False)) for cell in (one,)]
    assert parsed(recipes[0]) == {"a.value": "off", "a.kept": False, "a.number": 123, "a.values": ["1e-4", "2.5"]}
    assert parsed(write(tmp_path, yaml.safe_dump(nested(two.flags)))) == {"a.on": True, "a.kept": False}
