"""Offline sampling with vLLM, in a process of its own.

:func:`sample` starts ``python -m bond_plugin.host.engine``, hands it the job as JSON and reads the samples
back. vLLM keeps the memory it has taken until its process ends, so only a process of its own gives it back;
and two models can be sampled one after the other on one device.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from bond_plugin.host import ACTIVE_VARIABLE, DEVICE_VARIABLE, cpu

_TAIL_LINES = 25


class SamplingError(RuntimeError):
    """vLLM's process failed. The message ends with its traceback, or with the last lines of its log."""


@dataclass(frozen=True)
class Samples:
    """What a model wrote.

    Attributes:
        prompt_ids: [prompts][tokens], the prompt without special tokens, as the host feeds it.
        response_ids: [prompts][n][tokens], the response without its prompt, with the EOS token if it came.
        queries: [prompts][n], prompt and response decoded together with special tokens: what the host gives
            to a reward function.
    """

    prompt_ids: list[list[int]]
    response_ids: list[list[list[int]]]
    queries: list[list[str]]


def sample(
    model: str | Path,
    prompts: Sequence[str],
    n: int,
    max_new_tokens: int,
    temperature: float = 1.0,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Samples:
    """Draw ``n`` responses for each prompt from ``model``, with vLLM in a child process.

    Prompts are tokenised as the host does it (no special tokens added, no chat template). Sampling is from
    the model's own distribution at ``temperature``: no top-p, no top-k, and, other than in the host, no
    minimum length. The random numbers come from one stream for all requests, so they differ between
    prompts; the same arguments on the same machine give the same samples.

    Args:
        model: a folder with weights, configuration and tokenizer in Hugging Face's layout.
        prompts: texts, none empty.
        n: samples a prompt, at least 1.
        max_new_tokens: tokens after which a response is cut off.
        temperature: above 0.
        seed: of the engine's random numbers.
        progress: called with (responses finished, responses wanted) now and then.

    Returns:
        :class:`Samples`, in the order of ``prompts``.

    Raises:
        SamplingError: vLLM failed.
    """
    job = {
        "model": os.fspath(model),
        "prompts": list(prompts),
        "n": n,
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
        "seed": seed,
    }
    with tempfile.TemporaryDirectory(prefix="bond-sample-") as folder:
        paths = [Path(folder, name) for name in ("job.json", "samples.json", "log.txt")]
        paths[0].write_text(json.dumps(job), encoding="utf-8")
        command = [sys.executable, "-m", __spec__.name, os.fspath(paths[0]), os.fspath(paths[1])]
        error = ""
        with paths[2].open("wb") as log:
            child = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=log,
                env=_environment(),
                text=True,
            )
            try:
                assert child.stdout is not None
                for line in child.stdout:
                    message = json.loads(line)
                    if "error" in message:
                        error = message["error"]
                    elif progress is not None:
                        progress(message["done"], message["total"])
                status = child.wait()
            finally:
                child.kill()
                child.wait()
        if status != 0:
            text = error or paths[2].read_text(encoding="utf-8", errors="replace")
            tail = "\n".join(text.splitlines()[-_TAIL_LINES:])
            raise SamplingError(f"sampling from {model} failed (exit status {status}); it ended with:\n{tail}")
        return Samples(**json.loads(paths[1].read_text(encoding="utf-8")))


def _environment() -> dict[str, str]:
    """The child's environment: this package importable, and without a GPU what vLLM needs, hooks included."""
    import torch

    variables = dict(os.environ)
    variables.pop(ACTIVE_VARIABLE, None)
    variables.pop(DEVICE_VARIABLE, None)
    root = os.fspath(Path(__file__).resolve().parents[2])
    variables["PYTHONPATH"] = os.pathsep.join(filter(None, (root, variables.get("PYTHONPATH"))))
    # Models are folders; and the seed fixes the samples only while the engine lives in the child itself.
    defaults = {"HF_HUB_OFFLINE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_NO_USAGE_STATS": "1"}
    if not torch.cuda.is_available():
        defaults |= cpu.ENVIRONMENT | {ACTIVE_VARIABLE: "1", DEVICE_VARIABLE: "cpu"}
    return defaults | variables


class _Progress:
    """The part of tqdm's interface that vLLM uses, writing ``{"done", "total"}`` as JSON lines."""

    def __init__(self, stream: IO[str], total: int) -> None:
        self.stream, self.total, self.n = stream, total, 0
        self.format_dict = {"elapsed": 1.0}
        self.postfix = ""

    def update(self, count: int) -> None:
        self.n += count
        # If the parent is gone this raises BrokenPipeError, which ends the child too.
        print(json.dumps({"done": self.n, "total": self.total}), file=self.stream, flush=True)

    def refresh(self) -> None:
        pass

    def close(self) -> None:
        pass


def _dtype() -> str:
    """bfloat16, except on CPUs without instructions for it, where float32 is two to four times as fast."""
    import torch

    return "bfloat16" if torch.cuda.is_available() or cpu.native_bf16() else "float32"


def _run(job: dict[str, Any], stream: IO[str]) -> Samples:
    """The child's work: tokenise, sample, decode."""
    import torch
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(job["model"])
    prompt_ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in job["prompts"]]

    from vllm import LLM, SamplingParams  # takes long, and most of what can go wrong has gone wrong by now

    engine = LLM(
        model=job["model"],
        dtype=_dtype(),
        seed=job["seed"],
        enforce_eager=not torch.cuda.is_available(),
        # No longer than needed, so that a small cache suffices for a model with a long context.
        max_model_len=max(map(len, prompt_ids)) + job["max_new_tokens"],
    )
    parameters = SamplingParams(
        n=job["n"],
        temperature=job["temperature"],
        top_p=1.0,
        top_k=-1,
        max_tokens=job["max_new_tokens"],
        detokenize=False,
    )
    responses = len(prompt_ids) * job["n"]
    outputs = engine.generate(
        [{"prompt_token_ids": ids} for ids in prompt_ids],
        parameters,
        # vLLM puts its bar around an iterable too, while it reads the prompts: that one passes unchanged.
        use_tqdm=lambda *iterable, **_: iterable[0] if iterable else _Progress(stream, responses),
    )
    response_ids = [
        [list(completion.token_ids) for completion in sorted(output.outputs, key=lambda c: c.index)]
        for output in outputs
    ]
    queries = [
        [tokenizer.decode(prompt + response, skip_special_tokens=False) for response in responses]
        for prompt, responses in zip(prompt_ids, response_ids, strict=True)
    ]
    return Samples(prompt_ids, response_ids, queries)


def _main(job_path: str, result_path: str) -> None:
    # Libraries print to standard output as they like: keep it for the protocol, send theirs to the log.
    stream = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    try:
        samples = _run(json.loads(Path(job_path).read_text(encoding="utf-8")), stream)
    except BaseException:
        # What native libraries print while the process ends would bury the traceback in the log.
        print(json.dumps({"error": traceback.format_exc()}), file=stream, flush=True)
        raise
    Path(result_path).write_text(json.dumps(vars(samples)), encoding="utf-8")


if __name__ == "__main__":
    _main(*sys.argv[1:])
