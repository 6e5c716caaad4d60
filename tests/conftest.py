"""What the tests share: a tiny language model with prompts and a reward, and a way to run the real command."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from bond_plugin.recipe import nest as nested  # noqa: F401, tests import it from here

REPOSITORY = Path(__file__).resolve().parent.parent
LETTERS = "abcdefghijklmnopqrstuvwxyz "

REWARD = '''
import torch


def reward_func(queries, prompts, labels):
    """The share of vowels in the response."""
    rewards = []
    for query, prompt in zip(queries, prompts):
        text = query[len(prompt):].replace("<eos>", "").replace("<pad>", "")
        rewards.append(sum(letter in "aeiou" for letter in text) / max(1, len(text)))
    rewards = torch.tensor(rewards)
    return {"rewards": rewards, "scores": rewards, "extra_logs": {"step": rewards}}
'''


def load(path: Path) -> ModuleType:
    """A file outside the package as a module."""
    name = "_".join(path.relative_to(REPOSITORY).with_suffix("").parts)
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # where dataclasses look
    spec.loader.exec_module(module)
    return module


@dataclass(frozen=True)
class Tiny:
    """A folder with a 76,000-parameter Llama over letters, 400 prompts of four letters, and a reward."""

    folder: Path

    @property
    def model(self) -> Path:
        return self.folder / "model"

    @property
    def prompts(self) -> Path:
        return self.folder / "prompts.jsonl"

    @property
    def reward(self) -> Path:
        return self.folder / "reward.py"


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return make_tiny(tmp_path_factory.mktemp("tiny"))


def make_tiny(folder: Path) -> Tiny:
    """Write the model, the prompts and the reward into ``folder``."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    made = Tiny(folder)
    vocabulary = {"<pad>": 0, "<eos>": 1, **{letter: i + 2 for i, letter in enumerate(LETTERS)}}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<pad>"
    ).save_pretrained(made.model)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=131072,
        bos_token_id=1,
        eos_token_id=1,
        pad_token_id=0,
        tie_word_embeddings=True,
        initializer_range=0.08,
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(made.model)
    with made.prompts.open("w") as file:
        for i in range(400):
            text = "".join(LETTERS[(i * 7 + j * 3) % 26] for j in range(4))
            file.write(json.dumps({"input": text}) + "\n")
    made.reward.write_text(REWARD)
    return made


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files that run the real host come first: the light ones, which are short, end together whoever takes them."""
    long = {item.path for item in items if item.get_closest_marker("e2e")}
    items.sort(key=lambda item: item.path not in long)


@dataclass(frozen=True)
class Run:
    """A finished ``bond`` command."""

    status: int
    output: str
    folder: Path
    seconds: float

    @property
    def said(self) -> str:
        """The end of its output, for a failed assertion: what engines tell at their start would hide the error."""
        lines = (line for line in self.output.splitlines() if not re.search(" (INFO|WARNING) |Loading safe", line))
        return "\n".join(lines)[-6000:]

    @property
    def metrics(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.folder / "out" / "metrics.jsonl").read_text().splitlines()]


def clean_environment(**extra: str) -> dict[str, str]:
    """This process's environment without what a test may have left in it."""
    dropped = ("BOND_", "RAY_", "DS_", "VLLM_", "OMP_", "TORCHDYNAMO", "MASTER_", "RANK", "WORLD_SIZE", "LOCAL_RANK")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(dropped)}
    return {**kept, "HF_HUB_OFFLINE": "1", **extra}


#: Flags of a pooled J-BOND run, beside those of :func:`recipe_for`.
POOLED = {"bond.n_anchor_samples": 0, "rollout.n_samples_per_prompt": 4, "train.batch_size": 64}


def without(name: str) -> Callable[[Path], Any]:
    """What takes a file of a folder away."""
    return lambda folder: (folder / name).unlink()


def written(name: str, content: bytes) -> Callable[[Path], Any]:
    """What writes a file of a folder anew."""
    return lambda folder: (folder / name).write_bytes(content)


def other_words(folder: Path) -> None:
    """Exchange two words of a model's tokenizer."""
    path = folder / "tokenizer.json"
    found = json.loads(path.read_text())
    vocabulary = found["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    path.write_text(json.dumps(found))


def with_flags(base: dict[str, Any], flags: dict[str, Any]) -> dict[str, Any]:
    """``base`` with other flags; its own of an algorithm that they replace are dropped."""
    estimator = "algo.advantage.estimator"
    if flags.get(estimator, base[estimator]) != base[estimator] or (estimator in flags and flags[estimator] is None):
        base = {name: value for name, value in base.items() if not name.startswith("bond.")}
    return {**base, **flags}


def recipe_for(tiny: Tiny) -> dict[str, Any]:
    """Flags of a small run of Algorithm 2 of J-BOND: 16 prompts a step, one optimiser step each."""
    return {
        "actor.model_name_or_path": str(tiny.model),
        "actor.num_gpus_per_node": 1,
        "actor.adam.lr": 2e-3,
        "actor.lr_scheduler": "constant",
        "actor.lr_warmup_ratio": 0.0,
        "algo.advantage.estimator": "jbond",
        "bond.n_anchor_samples": 2,
        "data.prompt_dataset": str(tiny.prompts),
        "data.input_key": "input",
        "data.max_len": 32,
        "data.max_samples": 48,
        "ds.zero_stage": 2,
        "reward.remote_url": str(tiny.reward),
        "rollout.batch_size": 16,
        "rollout.micro_batch_size": 8,
        "rollout.n_samples_per_prompt": 1,
        "rollout.max_new_tokens": 10,
        "train.batch_size": 16,
        "train.micro_batch_size": 8,
        "vllm.num_engines": 1,
    }


def moved_model(source: Path, folder: Path, seed: int, scale: float) -> Path:
    """A model with the tokenizer of ``source``, its weights some way off."""
    import torch
    from transformers import AutoModelForCausalLM

    shutil.copytree(source, folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(scale * torch.randn(weight.shape, generator=generator).to(weight.dtype))
    model.save_pretrained(folder)
    return folder


def to_argv(flags: dict[str, Any]) -> list[str]:
    """``--name value`` for each; True is a switch, None drops the flag, a list is several values."""
    argv: list[str] = []
    for name, value in flags.items():
        if value is True:
            argv.append(f"--{name}")
        elif isinstance(value, list):
            argv += [f"--{name}", *map(str, value)]
        elif value is not None and value is not False:
            argv += [f"--{name}", str(value)]
    return argv


def execute(command: list[str], folder: Path, timeout: float = 400, **environment: str) -> Run:
    """Run a command to its end, its output in ``folder/log.txt``."""
    folder.mkdir(parents=True, exist_ok=True)
    log = folder / "log.txt"
    started = time.time()
    with log.open("w") as file:
        try:
            status = subprocess.run(
                command,
                cwd=folder,
                env=clean_environment(**environment),
                stdout=file,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                timeout=timeout,
            ).returncode
        except subprocess.TimeoutExpired:
            status = -1
    return Run(status, log.read_text(errors="replace"), folder, time.time() - started)


@pytest.fixture(scope="session")
def forks() -> Iterator[dict[str, str]]:
    """The environment in which Ray's workers are copies of one process that has the host's imports."""
    from bond_plugin.host import PYTHON_VARIABLE, cpu

    if torch_has_gpu():
        yield {}
        return
    variables = clean_environment(**cpu.ENVIRONMENT, BOND_DEVICE="cpu", BOND_ACTIVE="1", OMP_NUM_THREADS="1")
    with load(REPOSITORY / "benchmarks" / "prefork.py").Server(variables) as server:
        yield {PYTHON_VARIABLE: str(server.python)}


@contextmanager
def reward_server(
    answer: Callable[[dict[str, Any]], dict[str, Any]], kind: str = "application/json"
) -> Iterator[str]:
    """The address of a server as OpenRLHF asks one for rewards: ``answer`` makes the reply of what was posted."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            body = json.dumps(answer(asked)).encode()
            self.send_response(200)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_port}/score"
        running.shutdown()


def python_of(forks: dict[str, str]) -> str:
    """The executable that starts copies of the process of :func:`forks`; where there is none, this one's."""
    return next(iter(forks.values()), sys.executable)


def torch_has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


@pytest.fixture(scope="session")
def bond_command(forks: dict[str, str]) -> Callable[..., Run]:
    """``bond_command(folder, "cache", *argv)``: run a ``bond`` command that samples with vLLM.

    It and its engines are copies, as the processes of :func:`bond` are.
    """

    def run(folder: Path, *argv: object, **environment: str) -> Run:
        command = [python_of(forks), "-m", "bond_plugin", *map(str, argv)]
        done = execute(command, folder, **{"OMP_NUM_THREADS": "1", **environment, **forks})
        assert done.status == 0, f"bond {argv[0]} failed ({done.seconds:.0f} s):\n{done.said}"
        return done

    return run


@pytest.fixture(scope="session")
def bond(tiny: Tiny, forks: dict[str, str]) -> Callable[..., Run]:
    """``bond(folder, **flags)``: run ``bond train`` on the tiny model; flags with dots are given as a dict.

    To save time its processes are copies of one that has the imports (benchmarks/prefork.py). Where they could not
    be, with other packages on the path or in a cluster that is there already, they are started as users start them;
    a test that knows better gives it ``**forks``, and the workers are copies.
    """

    def run(folder: Path, flags: dict[str, Any] | None = None, check: bool = True, **environment: str) -> Run:
        folders = {"ckpt.output_dir": str(folder / "out"), "ckpt.path": str(folder / "ckpt")}
        wanted = with_flags({**recipe_for(tiny), **folders}, flags or {})
        # One thread, so that runs with one and two ranks compute (and so sample) the same.
        environment = {"OMP_NUM_THREADS": "1", **environment}
        python = sys.executable
        if not {"PYTHONPATH", "RAY_ADDRESS"} & set(environment):
            python = python_of(forks)
            environment |= forks
        done = execute([python, "-m", "bond_plugin", "train", *to_argv(wanted)], folder, **environment)
        if check:
            assert done.status == 0, f"bond train failed ({done.seconds:.0f} s):\n{done.said}"
        return done

    return run


#: Of a run that others are compared with. Three steps an episode.
STEPS = 18
SAME = {"data.max_samples": 48, "actor.adam.lr": 4e-3, "bond.eta": 0.1}


@pytest.fixture(scope="session")
def trained(bond: Callable[..., Run], tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The run that others are compared with: 18 steps, checkpoints every 8, the anchor saved."""
    folder = tmp_path_factory.mktemp("trained")
    kept = {"ckpt.save_steps": 8, "bond.save_anchor": True, "logger.tensorboard_dir": str(folder / "tensorboard")}
    return bond(folder, {**SAME, "train.num_episodes": STEPS // 3, **kept})


def goes_on_as(steps: list[dict[str, Any]], undisturbed: list[dict[str, Any]]) -> None:
    """Hold the steps of a resumed run of Algorithm 2 to those of one that was not disturbed."""
    for mine, theirs in zip(steps, undisturbed, strict=True):
        for name in ("reward/policy", "reward/anchor", "bond/loss", "bond/kl_anchor", "bond/anchor_distance",
                     "actor_grad_norm", "bond/kl_ref", "bond/win_rate"):  # fmt: skip
            assert mine[name] == pytest.approx(theirs[name], rel=1e-4, abs=1e-5), (mine["step"], name)


@pytest.fixture
def dry(tiny: Tiny, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable]:
    """``dry(flags, extra)``: ``bond train --dry-run`` in this process; returns (status, printed).

    ``command`` names another subcommand that takes the same flags. Without ``dry_run``, only for flags with
    which no run could start: Ray would start here.
    """
    monkeypatch.setenv("BOND_DEVICE", "cpu")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(sys, "argv", list(sys.argv))

    def run(
        flags: dict[str, Any] | None = None,
        extra: tuple[str, ...] = (),
        base: bool = True,
        command: str = "train",
        dry_run: bool = True,
    ) -> Any:
        from bond_plugin.cli.main import main

        wanted = with_flags(recipe_for(tiny), flags or {}) if base else flags or {}
        capfd.readouterr()
        try:
            status = main([command, *to_argv(wanted), *["--dry-run"] * dry_run, *extra])
        except SystemExit as stop:
            status = stop.code
            if isinstance(status, str):
                print(status)
                status = 1
        printed = capfd.readouterr()
        return SimpleNamespace(status=status or 0, out=printed.out, text=printed.out + printed.err)

    yield run


@pytest.fixture(scope="session")
def reward_cache(tiny: Tiny, bond_command: Callable[..., Run], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What ``bond cache`` makes for vBoN on the tiny model: 64 samples for each prompt."""
    folder = tmp_path_factory.mktemp("cache")
    vbon = {"algo.advantage.estimator": "reinforce", "reward.transform": "vbon"}
    cached = {"cache.output": str(folder / "rewards.jsonl"), "cache.samples": 64}
    bond_command(folder, "cache", *to_argv(with_flags(recipe_for(tiny), {**vbon, **cached})))
    return folder / "rewards.jsonl"
