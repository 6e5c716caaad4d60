"""Whatever a file holds, its reader takes it for what it says, or has one error of its own that names the file."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from bond_plugin import recipe
from bond_plugin.bench import matrix, results
from bond_plugin.bench.document import Heading, Log, Paragraph, Table, Texts, to_html, to_markdown
from bond_plugin.cli.evaluate import _Run as EvaluatedRun
from bond_plugin.files import ContentError, parse_json, read_json
from bond_plugin.host import checkpoints, identity, metrics
from bond_plugin.offline import prompts, reward_cache
from bond_plugin.offline.measure import read_samples
from bond_plugin.schema import read_model

quick = settings(deadline=None, max_examples=120, suppress_health_check=list(HealthCheck), derandomize=True)

#: Values that no reader expects, as JSON and beyond it.
ODD = [
    "null", "true", "-1", "0", "1e400", "NaN", "-Infinity", "1" * 30, "1" * 5000, '""', '"x"', '"\\ud800"',
    '"\\u0000"', "[]", "{}", "[[1], [2, 3]]", '{"a": 1, "a": 2}', "[" * 60 + "]" * 60, "[" * 3000, '"2020-01-01"',
    "[null]", '[{"role": 1, "content": 2}]', '["x", 1]', "3.5",
]  # fmt: skip
BYTES = [b"", b"\x00", b"\xff", b"\xef\xbb\xbf", b"\n", b"\r", b'"', b"{", b"]", b",", b"\xe2\x80\xa8", b"9" * 40]


@st.composite
def spoilt(draw: st.DrawFn, whole: bytes) -> bytes:
    """``whole`` with one or two things about it changed: a value, a key, some bytes, its end; or arbitrary bytes."""
    kind = draw(st.sampled_from(["value", "value", "value", "key", "bytes", "cut", "twice", "any"]))
    place = draw(st.integers(0, len(whole)))
    match kind:
        case "value":
            return _with_value(whole, draw(st.integers(0, 10_000)), draw(st.sampled_from(ODD)))
        case "key":
            return _without_key(whole, draw(st.integers(0, 10_000)))
        case "bytes":
            return whole[:place] + draw(st.sampled_from(BYTES)) + whole[place + draw(st.integers(0, 3)) :]
        case "cut":
            return whole[:place]
        case "twice":
            return whole + whole
    return draw(st.binary(max_size=100))


def _places(value: Any, path: tuple = ()) -> list[tuple]:
    """The path of every value in nested lists and objects."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(place for key, one in inner for place in _places(one, (*path, key)))]


def _changed(whole: bytes, choice: int, change: Callable[[Any, Any], None]) -> bytes:
    """``whole``, JSON lines, with ``change`` made to one place of one line."""
    lines = [json.loads(line) for line in whole.splitlines()]
    number = choice % len(lines)
    places = _places(lines[number])[1:]
    if not places:
        return whole
    *path, last = places[choice % len(places)]
    node = lines[number]
    for part in path:
        node = node[part]
    change(node, last)
    return b"".join(json.dumps(line).encode() + b"\n" for line in lines)


def _with_value(whole: bytes, choice: int, value: str) -> bytes:
    def change(node: Any, last: Any) -> None:
        node[last] = "@@@"

    return _changed(whole, choice, change).replace(b'"@@@"', value.encode(), 1)


def _without_key(whole: bytes, choice: int) -> bytes:
    def change(node: Any, last: Any) -> None:
        del node[last]

    return _changed(whole, choice, change)


def lines(*rows: Any) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


PROMPTS = lines({"input": "a", "answer": 1}, {"input": "b", "answer": 2.5}, {"input": "c", "answer": None})
CHATS = lines({"input": [{"role": "user", "content": "a"}], "answer": ["x"]}, {"input": "b", "answer": []})
CACHE = lines(
    {"bond_cache": 1, "model": {"name": "m", "sha256": "0"}, "temperature": 1.0, "samples": 2, "seed": 0},
    {"prompt": "a", "label": {"x": 1}, "responses": ["x", "y"], "rewards": [0.5, 1]},
    {"prompt": "b", "rewards": [1, 2.0]},
)
SAMPLES = lines({"prompt": "a", "text": "x", "reward": 1}, {"prompt": "a", "text": "y", "reward": 0.5})
METRICS = lines({"step": 1, "time": 2.0, "reward": 1.5}, {"step": 2, "reward": None, "bond/kl_ref": 3})
RUN = lines({"flags": {"train.seed": 1}, "prompts": {"a": "0"}, "model": {"m": None}, "rewards": {}})
TRAINED = lines(
    {"data": {"apply_chat_template": False, "input_template": None, "max_len": 9}, "ds": {"param_dtype": "bf16"}}
)
KEPT = lines({"prompt_ids": [[1], [2, 3]], "response_ids": [[[1]], [[2]]], "queries": [["a"], ["b"]], "rewards": [1]})
MEASURED = {
    **{key: [0.5, 1] for key in results.PER_PROMPT},
    "backward_kl": {"4": [1, 2]},
    "forward_kl": {"4": [1, 2]},
    "distinct_1": 0.5,
    "distinct_2": 0.5,
    "pass_at": {},
}
SAMPLE = {"prompt": "a", "response": "b", "reward": 1.0}
REFERENCE = lines(
    {
        **{key: key for key in ("title", "command", "model", "reward")},
        "max_new_tokens": 8, "temperature": 1.0, "quantile_samples": 2, "bon_levels": [4], "prompts": ["a", "b"],
        "rewards": [[1, 2], [3, 4]], "evaluation": MEASURED, "examples": [SAMPLE],
    }
)  # fmt: skip
CURVE = {"generated_tokens": [1, 2], "reward": [0.5, None], "kl": [0, 1], "log_quantile": [None, None]}
COSTS = {"steps": 2, "generated_tokens": 2, "seconds": 1.0, "peak_memory_gib": None, "curve": CURVE}
CELL = {"method": "jbond", "label": "J", "strength": {"eta": 1}, "seed": 1, "flags": {"bond.eta": 1}}
RESULTS = lines(
    {"cell": "a", **CELL, "status": "done", "training": COSTS, "evaluation": MEASURED, "examples": [SAMPLE]},
    {"cell": "b", **CELL, "status": "failed", "error": "x"},
)
MATRIX = lines(
    {
        "title": "t", "common": {"a": {"b": 1}, "actor.model_name_or_path": "m"}, "seeds": [1, 2],
        "evaluation": {"prompts": "p", "samples": 4, "bon_levels": [4], "quantile_samples": 8},
        "methods": {"x": {"label": "X", "flags": {"c": True}, "strength": {"d": [1, 2]}, "seeds": [3]}, "y": None},
    }
)  # fmt: skip


def read_prompts(path: Path) -> Any:
    flags = ("--data.input_key", "--data.label_key", "--data.apply_chat_template")
    reader = prompts.Lines(("input", "answer"), flags, True, lambda chat: str(chat), table=True)
    return prompts.read_rows(path, reader)


def read_reference(path: Path) -> Any:
    (path.parent / "results.jsonl").write_bytes(RESULTS)
    return results.read_results(path.parent)


def read_cells(path: Path) -> Any:
    (path.parent / "reference.json").write_bytes(REFERENCE)
    return results.read_results(path.parent)


READERS: dict[str, tuple[bytes, str, Callable[[Path], Any], type[Exception]]] = {
    "prompts": (PROMPTS, "p.jsonl", read_prompts, prompts.DataError),
    "conversations": (CHATS.splitlines(keepends=True)[0] * 2, "p.jsonl", read_prompts, prompts.DataError),
    "reward cache": (CACHE, "r.jsonl", reward_cache.read_cache, ContentError),
    "samples of others": (SAMPLES, "r.jsonl", reward_cache.read_cache, ContentError),
    "metrics": (METRICS, "metrics.jsonl", metrics.read, ContentError),
    "bond_run.json": (RUN, "bond_run.json", lambda path: read_model(path, identity._Run), ContentError),
    "run.json": (TRAINED, "run.json", lambda path: read_model(path, EvaluatedRun), ContentError),
    "samples": (KEPT, "s.json", read_samples, ContentError),
    "any JSON": (RUN, "x.json", read_json, ContentError),
    "reference": (REFERENCE, "reference.json", read_reference, results.ResultsError),
    "results": (RESULTS, "results.jsonl", read_cells, results.ResultsError),
    "matrix": (MATRIX, "m.yaml", matrix.read, matrix.MatrixError),
    "recipe": (MATRIX, "m.yaml", recipe.read, recipe.RecipeError),
}


@pytest.mark.parametrize("name", READERS)
def test_the_whole_file_is_read(name: str, tmp_path: Path) -> None:
    whole, file, read, _ = READERS[name]
    (tmp_path / file).write_bytes(whole)
    assert read(tmp_path / file)


@pytest.mark.parametrize("name", READERS)
def test_a_spoilt_file_is_read_or_has_one_error_with_its_name(name: str, tmp_path: Path) -> None:
    whole, file, read, error_class = READERS[name]
    path = tmp_path / file
    refused = 0

    @quick
    @given(content=spoilt(whole))
    def check(content: bytes) -> None:
        nonlocal refused
        path.write_bytes(content)
        try:
            read(path)
        except error_class as error:
            refused += 1
            assert str(path) in str(error), str(error)
            assert len(str(error)) < 3000

    check()
    assert refused > 20


@quick
@given(content=st.one_of(st.binary(max_size=80), spoilt(PROMPTS.splitlines()[0])))
@example(b'{"a": 1e309}')
@example(b'{"a": 1, "a": 1}')
@example(b'{"a": "\\ud83d"}')
def test_what_is_read_as_json_says_the_same_to_every_reader(content: bytes) -> None:
    """Written again it is the same, so nothing was lost: no key twice, no NaN, no half of a character."""
    try:
        found = parse_json(content)
    except ValueError:
        return

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        assert len(dict(pairs)) == len(pairs)
        return dict(pairs)

    again = json.dumps(found, ensure_ascii=False, allow_nan=False).encode()
    assert parse_json(again) == found == json.loads(content.decode("utf-8-sig"), object_pairs_hook=unique)


@quick
@given(
    content=st.one_of(st.binary(max_size=300), st.sampled_from([b"", b"\n", b"..", b"global_step1\n", b"x" * 300]))
)
def test_any_latest_is_a_checkpoint_or_an_error(content: bytes, tmp_path: Path) -> None:
    args = SimpleNamespace(critic=SimpleNamespace(model_name_or_path=None))
    (tmp_path / "_actor" / "global_step1").mkdir(parents=True, exist_ok=True)
    (tmp_path / "_actor" / "latest").write_bytes(content)
    try:
        found = checkpoints.latest(args, tmp_path / "_actor")
    except checkpoints.CheckpointError as error:
        assert str(tmp_path / "_actor" / "latest") in str(error)
    else:
        assert found == "global_step1"


texts = st.text(max_size=40)


@quick
@given(title=texts, rows=st.lists(st.tuples(texts, texts), max_size=3), log=texts)
def test_any_text_is_a_document(title: str, rows: list[tuple[str, str]], log: str) -> None:
    blocks = [Heading(title), Paragraph(log), Table(title, (title, log), rows), Texts(title, rows), Log(title, log)]
    page = to_html(title, blocks)
    assert "<script" not in page.lower().replace("&lt;script", "")
    assert to_markdown(title, blocks, "figures").startswith("# ")
