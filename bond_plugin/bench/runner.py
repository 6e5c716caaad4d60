"""Runs the cells of a matrix: check all, measure the reference, then train and measure cell by cell.

A folder of results holds ``matrix.yaml`` (a copy), ``reference.json``, ``results.jsonl`` (rewritten after each
cell), and for each cell ``cells/<name>/`` with its log, metrics, policy and ``result.json``. A cell whose
``result.json`` was made with the same flags, evaluation and reference is finished; all others are run, from the part
that is missing. So the same command goes on where it was stopped, and tries failed cells again.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import queue
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

from bond_plugin import __version__
from bond_plugin import recipe as recipes
from bond_plugin.bench.matrix import Cell, Matrix
from bond_plugin.files import Busy, ContentError, lock, read_json, write_json, write_whole
from bond_plugin.host import metrics, python
from bond_plugin.offline import fingerprints
from bond_plugin.offline.prompts import DataError, Lines, read_rows

_SAMPLES = "reference-samples.json"
_ERROR_LINES = 12
_LOOK_EVERY = 0.5  # seconds, whether a process has ended
_MEMORY_EVERY = 10.0  # seconds: reading it costs a tenth of a second a process
#: Ray's colours and prefixes.
_NOISE = re.compile(r"\x1b\[[0-9;]*m|^(\x1b\[[0-9;]*m)?\(.*? pid=.*?\)\S* ", re.MULTILINE)
#: The last line of a traceback, unless it only says that a worker of Ray's has ended.
_EXCEPTION = re.compile(r"\s*(?!ray\.exceptions\.)[\w.]*(Error|Exception)(\(.*\))?: ")
#: Flags that say what is compared: every cell must have them alike.
_SHARED = (
    "actor.model_name_or_path",
    "data.prompt_dataset",
    "rollout.max_new_tokens",
    "rollout.temperature",
    "reward.remote_url",
    "reward.model_name_or_path",
)
#: Likewise; they also say what is put around the held-out prompts.
_TEMPLATES = ("data.apply_chat_template", "data.input_template")


class BenchError(RuntimeError):
    """The comparison cannot go on. The message says why and what to do."""


@dataclass
class Processes:
    """Runs processes; once ``stopped`` is set, they are ended, and no more are started."""

    stopped: threading.Event = field(default_factory=threading.Event)

    def run(
        self, what: str, arguments: Sequence[str], log: Path, variables: Mapping[str, str] = {}, memory: bool = False
    ) -> float | None:
        """Run ``python arguments``, its output in ``log``; ``what`` it is is for the message.

        With ``memory`` returns the largest memory of its processes together in GiB (proportional set size, so that
        what they share counts once). Raises BenchError if it failed, with what its log says, or was not started.
        """
        if self.stopped.is_set():
            raise BenchError("stopped")
        with log.open("wb") as file:
            process = subprocess.Popen(
                [python(), *arguments], stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT,
                env={**os.environ, **variables}, start_new_session=True,
            )  # fmt: skip
        peak, looked = None, time.monotonic() - _MEMORY_EVERY + 2 * _LOOK_EVERY
        try:
            while process.poll() is None:
                if memory and time.monotonic() - looked >= _MEMORY_EVERY:
                    used, looked = _memory(process.pid), time.monotonic()
                    peak = used if peak is None else max(peak, used)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(timeout=_LOOK_EVERY)
                if self.stopped.is_set():
                    process.terminate()
        finally:
            process.terminate()  # if this was interrupted
        if process.returncode != 0:
            said = _error(log.read_text(errors="replace"))
            raise BenchError(f"{what} ended with status {process.returncode}: {said}")
        return peak


def _memory(pid: int) -> float:
    """GiB of a process and of all that it has started."""
    import psutil

    total, waiting, seen = 0, [pid], set()
    copies = Path(python()).parent / "copies"  # benchmarks/prefork.py: process ids of those that others stand for
    while waiting:
        one = waiting.pop()
        if one in seen:
            continue
        seen.add(one)
        with contextlib.suppress(psutil.Error):
            process = psutil.Process(one)
            total += process.memory_full_info().pss
            waiting += [child.pid for child in process.children()]
        with contextlib.suppress(OSError, ValueError):
            waiting.append(int((copies / str(one)).read_text()))
    return total / 2**30


@dataclass
class Runner:
    """Checks, trains and measures the cells of a matrix: see :func:`opened`."""

    matrix: Matrix
    output: Path  # the folder of results
    rows: list[dict[str, Any]]  # held-out prompts
    say: Callable[[str], None]  # takes messages, one for each cell among them
    parallel: int = 0  # cells at a time; 0 finds out
    keep_policies: bool = False  # keep trained weights (they are deleted after they were measured otherwise)
    command: str = "bond bench"  # what made the results, for the report
    processes: Processes = field(default_factory=Processes)
    #: By cell, the host's nested arguments, and how many GPUs the run takes.
    configurations: dict[str, dict[str, Any]] = field(default_factory=dict)
    _contents: dict[str, str | None] = field(default_factory=dict)  # hashes of files and models by path
    free: queue.SimpleQueue[dict[str, str]] = field(default_factory=queue.SimpleQueue)  # of the slots

    # Before anything expensive starts.

    def check(self) -> None:
        """Resolve every cell's flags as the host would, without starting it, and see that all compare alike.

        Raises BenchError with all the cells that cannot run, each with its reason.
        """
        first, *_ = cells = self.matrix.cells
        self.say(f"checking the flags of {len(cells)} cells")
        (self.output / "checks").mkdir(exist_ok=True)
        with ThreadPoolExecutor(max_workers=max(1, (os.cpu_count() or 1) // 2)) as pool:
            problems = [problem for problem in pool.map(self._check, cells) if problem]
        if problems:
            raise BenchError("these cells cannot run:\n  " + "\n  ".join(problems))
        for cell, name in itertools.product(cells, (*_SHARED, *_TEMPLATES)):
            mine, theirs = (_get(self.configurations[one.name], name) for one in (cell, first))
            if mine != theirs:
                raise BenchError(
                    f"cells that are compared must have the same --{name}: {mine!r} in '{cell.name}', {theirs!r} in "
                    f"'{first.name}'"
                )

    def _check(self, cell: Cell) -> str | None:
        """Find out the configuration of a cell, or why it cannot run."""
        path = self.output / "checks" / f"{cell.folder}.json"
        key = fingerprints.of_value([cell.flags, cell.seed, sys.executable, __version__])
        known = _kept(path, key)
        if known is None:
            said = path.with_suffix(".run.json")
            try:
                arguments = [*self._train(cell), "--dry-run", "--json", str(said)]
                self.processes.run(cell.name, arguments, path.with_suffix(".log"))
            except BenchError as error:
                return str(error)
            found = read_json(said)
            known = {"key": key, "configuration": {**found["configuration"], "gpu_slots": found["gpu_slots"]}}
            write_json(path, known)
        self.configurations[cell.name] = known["configuration"]
        return None

    # The reference.

    def reference(self) -> str:
        """Measure the reference unless that is done. Returns what identifies it."""
        configuration = self.configurations[self.matrix.cells[0].name]
        key, path = self._reference_key(configuration), self.output / "reference.json"
        said = {"title": self.matrix.title, "command": self.command}  # others need no other samples
        known = _kept(path, key)
        if known is None:
            self.say(f"reference: {len(self.rows)} prompts x {self.matrix.evaluation.reference_samples} samples")
            found = self._measure(None, self.output, configuration)
            found.pop("cached_tokens")
            rewards, reward = read_json(self.output / _SAMPLES)["rewards"], configuration["reward"]
            known = {
                "key": key,
                **said,
                "model": configuration["actor"]["model_name_or_path"],
                "reward": ", ".join(reward["remote_url"] or [reward["model_name_or_path"]]),
                "max_new_tokens": configuration["rollout"]["max_new_tokens"],
                "temperature": configuration["rollout"]["temperature"],
                "quantile_samples": self.matrix.evaluation.quantile_samples,
                "bon_levels": self.matrix.evaluation.bon_levels,
                "rewards": [[float(f"{value:.6g}") for value in row] for row in rewards],
                **found,
            }
        write_json(path, known | said)
        return key

    def _reference_key(self, configuration: dict[str, Any]) -> str:
        labels = None if self.matrix.evaluation.label_key is None else [row["label"] for row in self.rows]
        templates = [_get(configuration, name) for name in _TEMPLATES]
        model = configuration["actor"]["model_name_or_path"]
        return fingerprints.of_value(
            [
                fingerprints.of_model(model),
                self.matrix.evaluation.model_dump(),
                [row["input"] for row in self.rows],
                labels,
                {name: _get(configuration, name) for name in _SHARED},
                [fingerprints.of_file(path) for path in configuration["reward"]["remote_url"] or [] if ".py" in path],
                *([templates, fingerprints.of_tokenizer(model)] if any(templates) else []),
            ]
        )

    # A cell.

    def finished(self, cell: Cell, reference: str) -> dict[str, Any] | None:
        """The result of a cell, if it has one that was made with what it would be made with now."""
        found = _kept(self._folder(cell) / "result.json", self._key(cell, reference))
        if found is None or found["status"] != "done":
            return None
        del found["key"]
        return found | {"label": cell.label}  # another label needs no other run

    def cell(self, cell: Cell, reference: str) -> dict[str, Any]:
        """Train and measure one cell; its result, which may be a failure."""
        folder = self._folder(cell)
        folder.mkdir(parents=True, exist_ok=True)
        result: dict[str, Any] = {
            "cell": cell.name,
            "method": cell.method,
            "label": cell.label,
            "strength": cell.strength,
            "seed": cell.seed,
            "flags": cell.own,
        }
        variables = self.free.get()
        try:
            training = self._trained(cell, folder, variables)
            found = self._measure(str(folder / "policy"), folder, self.configurations[cell.name], variables)
            result |= {
                "status": "done",
                "training": training | {"cached_tokens": found["cached_tokens"]},
                "examples": found["examples"],
                "evaluation": found["evaluation"],
            }
            if not self.keep_policies:
                shutil.rmtree(folder / "policy")
        except BenchError as error:
            if self.processes.stopped.is_set():
                raise
            result |= {"status": "failed", "error": str(error)}
        finally:
            self.free.put(variables)
        write_json(folder / "result.json", {"key": self._key(cell, reference), **result})
        return result

    def _trained(self, cell: Cell, folder: Path, variables: Mapping[str, str]) -> dict[str, Any]:
        """What a cell's training logged and cost; it is run unless its policy is there."""
        path, key = folder / "trained.json", self._training_key(cell)
        known = _kept(path, key)
        if known is not None and (folder / "policy").is_dir():
            return known["training"]
        for old in ("policy", "run", "checkpoints"):
            shutil.rmtree(folder / old, ignore_errors=True)
        started = time.monotonic()
        peak = self.processes.run("training", self._train(cell), folder / "train.log", variables, memory=True)
        seconds = time.monotonic() - started
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)
        policy = (folder / "run").rename(folder / "policy")
        training = _training(policy / "metrics.jsonl")
        (policy / "metrics.jsonl").replace(folder / "metrics.jsonl")
        training |= {"seconds": round(seconds, 1), "peak_memory_gib": None if peak is None else round(peak, 2)}
        write_json(path, {"key": key, "training": training})
        return training

    def _measure(
        self, model: str | None, folder: Path, configuration: dict[str, Any], variables: Mapping[str, str] = {}
    ) -> Any:
        """What :mod:`bond_plugin.bench.measure` finds of a model; its log goes into ``folder``."""
        job, output = folder / "measure.job.json", folder / "measured.json"
        description = {
            "model": model,
            "output": str(output),
            "reference_samples": str(self.output / _SAMPLES),
            "rows": self.rows,
            "configuration": configuration,
            "evaluation": self.matrix.evaluation.model_dump(),
        }
        write_json(job, description)
        try:
            arguments = ["-m", "bond_plugin.bench.measure", str(job)]
            self.processes.run("measuring", arguments, folder / "measure.log", variables)
            return read_json(output)
        finally:
            job.unlink()
            output.unlink(missing_ok=True)

    def _train(self, cell: Cell) -> list[str]:
        import yaml

        folder = self._folder(cell)
        folder.mkdir(parents=True, exist_ok=True)
        recipe = folder / "recipe.yaml"
        nested = recipes.nest(cell.flags)
        recipe.write_text(f"# {cell.name}, made by bond bench\n" + yaml.safe_dump(nested, sort_keys=False))
        return [
            "-m", "bond_plugin", "train", "--recipe", str(recipe), "--train.seed", str(cell.seed),
            "--ckpt.output_dir", str(folder / "run"), "--ckpt.path", str(folder / "checkpoints"),
        ]  # fmt: skip

    def _folder(self, cell: Cell) -> Path:
        return self.output / "cells" / cell.folder

    def _key(self, cell: Cell, reference: str) -> str:
        return fingerprints.of_value([self._training_key(cell), reference])

    def _training_key(self, cell: Cell) -> str:
        """Of the flags, and of what is in the files and models that they name (folders of other kinds: the name)."""
        # Not Path.exists: to it "" is this folder, and a template may be too long for a name.
        named = {k: value for k, value in cell.flags.items() if isinstance(value, str) and os.path.exists(value)}
        for path in set(named.values()) - self._contents.keys():
            contents = fingerprints.of_file if os.path.isfile(path) else fingerprints.of_model
            self._contents[path] = contents(path)
        return fingerprints.of_value(
            [cell.flags, cell.seed, {name: self._contents[path] for name, path in named.items()}]
        )

    # Several at once.

    def slots(self) -> list[dict[str, str]]:
        """The variables of the runs that go at a time: as many as asked, or as the GPUs allow.

        On a machine with GPUs and without a cluster, each sees those that no other has.
        """
        cluster, configurations = "RAY_ADDRESS" in os.environ, self.configurations.values()
        if not cluster and all(found["bond"]["device"] == "cpu" for found in configurations):
            return [{}] * (self.parallel or max(1, (os.cpu_count() or 1) // 4))
        gpus, needed = _gpus(), max(1, *(sum(found["gpu_slots"].values()) for found in configurations))
        width = self.parallel or max(1, gpus // needed)
        if cluster:
            return [{}] * width
        shares = [range(gpus)[i * needed : (i + 1) * needed] for i in range(width)]
        return [{"CUDA_VISIBLE_DEVICES": ",".join(map(str, share))} if share else {} for share in shares]

    def run(self) -> int:
        """Train and measure what is not finished, after :meth:`check`. Returns how many cells have failed.

        Raises:
            BenchError: it was stopped, or the reference cannot be measured.
            ResultsError: a finished cell has another result than this version writes.
        """
        from bond_plugin.bench import results as stored  # torch: not before anything is to be run

        reference, cells = self.reference(), self.matrix.cells
        results: dict[str, dict[str, Any] | None] = {}
        for cell in (*cells, *self.matrix.others):
            found = results[cell.name] = self.finished(cell, reference)
            if found is not None:
                context = {"prompts": len(self.rows), "levels": self.matrix.evaluation.bon_levels}
                stored.checked(stored.Result, found, f"{self._folder(cell) / 'result.json'}:", context)
        waiting = [cell for cell in cells if results[cell.name] is None]
        done = len(cells) - len(waiting)
        if done:
            self.say(f"{done} of {len(cells)} cells are finished already")
        slots = self.slots()
        for slot in slots:
            self.free.put(slot)
        started = time.monotonic()
        self._write(results)
        with ThreadPoolExecutor(max_workers=len(slots)) as pool:
            try:
                futures = [pool.submit(self.cell, cell, reference) for cell in waiting]
                for count, future in enumerate(as_completed(futures), start=1):
                    result = future.result()
                    results[result["cell"]] = result
                    self._write(results)
                    pace = _pace(time.monotonic() - started, count, len(slots), results.values())
                    left = pace * (len(waiting) - count)
                    rest = f"; about {timedelta(seconds=int(left))} left" if count < len(waiting) else ""
                    self.say(f"{done + count}/{len(cells)} {result['cell']}: {self._said(result)}{rest}")
            except BaseException:
                self.processes.stopped.set()
                pool.shutdown(wait=False, cancel_futures=True)
                raise
        return sum(result is not None and result["status"] == "failed" for result in results.values())

    def _write(self, results: dict[str, dict[str, Any] | None]) -> None:
        lines = [json.dumps(one, ensure_ascii=False) + "\n" for one in results.values() if one is not None]
        write_whole(self.output / "results.jsonl", "".join(lines))

    def _said(self, result: dict[str, Any]) -> str:
        if result["status"] == "failed":
            return f"FAILED: {result['error'].splitlines()[0]} (log in {self.output / 'cells'})"
        mean = {key: sum(v) / len(v) for key, v in result["evaluation"].items() if isinstance(v, list)}
        return (
            f"reward {mean['reward']:.3f}, KL {mean['kl']:.2f}, win rate {mean['win_rate']:.3f}; "
            f"{result['training']['seconds']:.0f} s"
        )


@contextlib.contextmanager
def opened(matrix: Matrix, output: Path, say: Callable[[str], None], **options: Any) -> Iterator[Runner]:
    """The :class:`Runner` of a matrix, while no other one writes its folder.

    Raises BenchError if the held-out prompts are of no use, or another process writes the folder.
    """
    given, template = matrix.evaluation, "data.apply_chat_template"
    names = ("evaluation.input_key", "evaluation.label_key", f"{template} in 'common'")
    chat = recipes.is_on(matrix.cells[0].flags.get(template))
    try:
        rows = read_rows(Path(given.prompts), Lines((given.input_key, given.label_key), names, chat))
        held = lock(output)
    except DataError as error:
        raise BenchError(f"evaluation.prompts {error}") from error
    except Busy as error:
        raise BenchError(f"{error}: wait for it, or name another folder") from error
    except OSError as error:
        raise BenchError(f"--output-dir {output}: {error.strerror}; name a folder on another file system") from error
    with held:
        yield Runner(matrix, output, rows, say, **options)


def _kept(path: Path, key: str) -> Any:
    """The content of a JSON file that was made with what ``key`` is the hash of, or ``None``."""
    known = read_json(path) or {}
    return known if known.get("key") == key else None


def _pace(seconds: float, count: int, width: int, results: Iterable[dict | None]) -> float:
    """Seconds a cell: what ``count`` cells took, but no less than those that were neither resumed nor failed."""
    trained = [one["training"]["seconds"] for one in results if one is not None and one["status"] == "done"]
    whole = sum(trained) / len(trained) / width if trained else 0.0
    return max(seconds / count, whole)


def _training(path: Path) -> dict[str, Any]:
    """What a run logged, as far as the report shows it."""
    try:
        lines = metrics.read(path)
    except FileNotFoundError as error:
        raise BenchError("the run logged no step: was there as much data as one rollout takes?") from error
    except ContentError as error:
        raise BenchError(f"the run logged no step that can be read: {error}") from error

    def column(*names: str) -> list[float | None]:
        found = []
        for line in lines:
            value = next((line[name] for name in names if isinstance(line.get(name), (int, float))), None)
            found.append(None if value is None else float(f"{value:.5g}"))
        return found

    # The host's is the mean over tokens; ours that of whole responses.
    kl = column("bond/kl_ref")
    if kl[-1] is None:
        lengths = column("response_length")
        kl = [None if None in pair else pair[0] * pair[1] for pair in zip(column("kl"), lengths, strict=True)]
    tokens = [int(total) for total in itertools.accumulate(line.get("rollout/generated_tokens", 0) for line in lines)]
    return {
        "steps": len(lines),
        "generated_tokens": tokens[-1],
        "curve": {
            "generated_tokens": tokens,
            "reward": column("reward/policy", "reward"),
            "kl": kl,
            "log_quantile": column("bond/log_quantile"),
        },
    }


def _gpus() -> int:
    """GPUs of the cluster at RAY_ADDRESS, or of this machine; asked in a process of its own, which frees them."""
    code = (
        "import ray; ray.init(logging_level='ERROR'); print('GPUS', int(ray.cluster_resources().get('GPU', 0)))"
        if "RAY_ADDRESS" in os.environ
        else "import torch; print('GPUS', torch.cuda.device_count())"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    counts = [line.split()[1] for line in said.stdout.splitlines() if line.startswith("GPUS ")]
    if not counts:
        raise BenchError(f"cannot count the GPUs: {_error(said.stderr)}")
    return int(counts[0])


def _error(text: str) -> str:
    """The part of a log that says what went wrong: our own message, else the last exception, else the last lines."""
    lines = [line for line in _NOISE.sub("", text).splitlines() if line.strip()]
    for i, line in enumerate(lines):
        if line.startswith("bond: error:") or ": error: " in line[:60]:
            return "\n".join(lines[i : i + _ERROR_LINES])
    for line in reversed(lines):
        if _EXCEPTION.match(line):
            return line.strip()
    return "\n".join(lines[-_ERROR_LINES:])


def _get(configuration: dict[str, Any], name: str) -> Any:
    group, key = name.split(".")
    return configuration[group].get(key)
