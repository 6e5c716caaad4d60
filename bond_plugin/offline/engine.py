"""Offline sampling with vLLM, in a process of its own.

:func:`stream` starts ``python -m bond_plugin.offline.engine``, hands it the job as JSON on its standard input and
reads the samples back, one JSON line a chunk; :func:`sample` waits for all of them. vLLM keeps the memory it
has taken until its process ends, so only a process of its own gives it back; and two models can be sampled
one after the other on one device.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from bond_plugin.host import ACTIVE_VARIABLE, DEVICE_VARIABLE, cpu, python

_TAIL_LINES = 25
_SAY_EVERY = 10.0  # seconds between two lines of progress
_REPORT_EVERY = 0.2  # seconds between two reports of progress: they must never fill the pipe

Progress = Callable[[int, int], None]


class SamplingError(RuntimeError):
    """vLLM's process failed. The message ends with its traceback, or with the last lines of its log."""


@dataclass(frozen=True)
class PromptSamples:
    """What a model wrote to one prompt.

    Attributes:
        prompt_ids: [tokens], what was kept of the prompt, without special tokens.
        response_ids: [n][tokens], the response without its prompt, with the EOS token if it came.
        queries: [n], prompt and response decoded together with special tokens: what the host gives to a reward
            function.
        responses: [n], the responses decoded alone, special tokens included.
        log_probs: [n][tokens] in nats, of each response token where it was drawn, or ``None``.
    """

    prompt_ids: list[int]
    response_ids: list[list[int]]
    queries: list[str]
    responses: list[str]
    log_probs: list[list[float]] | None = None


def sample(model: str | Path, prompts: Sequence[str], n: int, **how: Any) -> list[PromptSamples]:
    """Draw ``n`` responses for each prompt from a model's own distribution: no top-p, top-k or least length.

    Arguments and errors as for :func:`stream` without ``chunk``: the random numbers come from one stream for all
    requests. So the same arguments on the same machine give the same samples, and other prompts give others.
    """
    return list(itertools.chain.from_iterable(stream(model, prompts, n, **how)))


def stream(
    model: str | Path,
    prompts: Sequence[str],
    n: int,
    *,
    max_new_tokens: int | None,
    temperature: float,
    seed: int,
    max_len: int | None = None,
    min_new_tokens: int = 0,
    chunk: int | None = None,
    use_fast_tokenizer: bool = True,
    log_probs: bool = False,
    engine: dict[str, Any] | None = None,
    progress: Progress | None = None,
) -> Iterator[list[PromptSamples]]:
    """Draw ``n`` responses for each prompt as the host's rollouts do, and yield them a chunk of prompts at a time.

    Each response has a random seed of its own, made of ``seed``, its prompt and its place among the n. So what
    is drawn does not depend on which other prompts are asked for, but for rounding: a model's log-probabilities
    depend a little on what is computed beside them. Chunks are sampled one after the other, each alone, so with
    the same chunks the same machine gives the same samples. While a chunk is being used, the next is sampled.

    Args:
        model: a folder, or a name that Hugging Face's hub knows.
        prompts: texts, none empty, as the host gives them to its engines, templates applied. Tokenised without
            special tokens; only the last tokens are kept of one that leaves no room for the response.
        n: samples a prompt, at least 1.
        max_new_tokens: tokens after which a response is cut off; ``None`` for as many as ``max_len`` leaves.
        temperature: above 0.
        seed: see above.
        max_len: tokens of prompt and response together; ``None`` cuts no prompt.
        min_new_tokens: no EOS token before so many tokens.
        chunk: prompts in a chunk, at least 1; ``None`` for all at once, without seeds of their own.
        use_fast_tokenizer: as the host's ``--data.disable_fast_tokenizer`` says.
        log_probs: whether they are wanted; of the distribution that is sampled from, temperature included.
        engine: further arguments of ``vllm.LLM``.
        progress: called with (responses finished, responses wanted) now and then.

    Yields:
        Lists of :class:`PromptSamples`, ``chunk`` long but for the last, in the order of ``prompts``. Close the
        generator to stop the sampling.

    Raises:
        SamplingError: vLLM failed.
    """
    job = {
        "model": os.fspath(model),
        "prompts": list(prompts),
        "n": n,
        "max_new_tokens": max_new_tokens,
        "max_len": max_len,
        "temperature": temperature,
        "min_new_tokens": min_new_tokens,
        "seed": seed,
        "chunk": chunk,
        "tokenizer": {"trust_remote_code": True, "use_fast": use_fast_tokenizer},
        "log_probs": log_probs,
        "engine": {"trust_remote_code": True, "seed": seed, **(engine or {})},
    }
    error = ""
    with tempfile.TemporaryFile() as log:
        child = subprocess.Popen(
            [python(), "-m", __spec__.name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            env=_environment(job["model"]),
            encoding="utf-8",
        )
        try:
            assert child.stdin is not None and child.stdout is not None
            with contextlib.suppress(BrokenPipeError), child.stdin:  # a child that is dead has its say below
                json.dump(job, child.stdin)
            for line in child.stdout:
                if not line.endswith("\n"):
                    break  # it died while it wrote
                message = json.loads(line)
                if "samples" in message:
                    yield [PromptSamples(**one) for one in message["samples"]]
                elif "error" in message:
                    error = message["error"]
                elif progress is not None:
                    progress(message["done"], message["total"])
            status = child.wait()
        finally:
            child.kill()
            child.wait()
            child.stdout.close()
        if status != 0:
            log.seek(0)
            text = error or log.read().decode("utf-8", errors="replace")
            tail = "\n".join(text.splitlines()[-_TAIL_LINES:])
            raise SamplingError(f"sampling from {job['model']} failed (exit status {status}); it ended with:\n{tail}")


def chunk_of(samples: int, responses: int | None = None) -> int:
    """How many prompts are sampled at a time: ``responses`` altogether, or as many as suit the device."""
    import torch

    return -(-(responses or (4096 if torch.cuda.is_available() else 512)) // samples)


def remaining(
    prompts: Sequence[str],
    there: Callable[[int], bool],
    draw: Callable[[list[str]], Generator[list[PromptSamples]]],
    chunk: int,
) -> Iterator[tuple[int, PromptSamples]]:
    """Sample the prompts that an interrupted run has left.

    Chunks are of the whole list of prompts, and one that is there in part is drawn again as a whole, so that its
    samples are computed as they would have been without the interruption.

    Args:
        prompts: all of them.
        there: whether the i-th is done; asked again before its samples are given.
        draw: a list of prompts to their samples, ``chunk`` prompts at a time and in order: :func:`stream`.
        chunk: prompts in a chunk.

    Yields:
        The places of prompts that are not there, each with its samples. Close it to stop the sampling.
    """
    chunks = [range(len(prompts))[start : start + chunk] for start in range(0, len(prompts), chunk)]
    wanted = [i for part in chunks if not all(map(there, part)) for i in part]
    if wanted:
        with contextlib.closing(draw([prompts[i] for i in wanted])) as drawn:
            for i, samples in zip(wanted, itertools.chain.from_iterable(drawn), strict=True):
                if not there(i):
                    yield i, samples


def ticker(say: Callable[[str], None], what: str, unit: str = "responses") -> Progress:
    """A progress callback that says (done, total) at most every few seconds."""
    started = last = time.monotonic()

    def tick(done: int, total: int) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last >= _SAY_EVERY and done < total:
            last = now
            say(f"{what}: {done} of {total} {unit} after {now - started:.0f} s")

    return tick


def _environment(model: str) -> dict[str, str]:
    """The child's environment: this package importable, and without a GPU what vLLM needs, hooks included.

    Nothing is looked up elsewhere for a model that is a folder; a name may have to be fetched from the hub first.
    """
    import torch

    ours = (ACTIVE_VARIABLE, DEVICE_VARIABLE)
    variables = {name: value for name, value in os.environ.items() if name not in ours}
    root = os.fspath(Path(__file__).resolve().parents[2])
    variables["PYTHONPATH"] = os.pathsep.join(filter(None, (root, variables.get("PYTHONPATH"))))
    # The seed fixes the samples only while the engine lives in the child itself.
    defaults = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_NO_USAGE_STATS": "1"}
    if Path(model).is_dir():
        defaults["HF_HUB_OFFLINE"] = "1"
    if not torch.cuda.is_available():
        defaults |= cpu.ENVIRONMENT | {ACTIVE_VARIABLE: "1", DEVICE_VARIABLE: "cpu"}
    return defaults | variables


class _Progress:
    """The part of tqdm's interface that vLLM uses, writing ``{"done", "total"}`` as JSON lines."""

    def __init__(self, stream: IO[str], done: int, total: int) -> None:
        self.stream, self.total, self.n = stream, total, done
        self.format_dict = {"elapsed": 1.0}
        self._reported = 0.0

    def update(self, count: int) -> None:
        self.n += count
        now = time.monotonic()
        if now - self._reported >= _REPORT_EVERY or self.n == self.total:
            self._reported = now
            # If the parent is gone this raises BrokenPipeError, which ends the child too.
            _send(self.stream, {"done": self.n, "total": self.total})

    def refresh(self) -> None:
        pass

    close = refresh


def _send(stream: IO[str], message: dict[str, Any]) -> None:
    print(json.dumps(message), file=stream, flush=True)


def _work(job: dict[str, Any], stream: IO[str]) -> None:
    """The child's side: tokenise, sample a chunk at a time, decode, send."""
    import torch
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(job["model"], **job["tokenizer"])
    requests = [prompt_tokens(tokenizer, text, job["max_new_tokens"], job["max_len"]) for text in job["prompts"]]

    from vllm import LLM, SamplingParams  # takes long, and most of what can go wrong has gone wrong by now

    gpu = torch.cuda.is_available()
    engine = LLM(
        model=job["model"],
        # On CPUs without instructions for bfloat16, float32 is two to four times as fast.
        dtype="bfloat16" if gpu or cpu.native_bf16() else "float32",
        enforce_eager=not gpu,
        # No longer than needed, so that a small cache suffices for a model with a long context.
        max_model_len=max(len(ids) + room for ids, room in requests),
        **({"logprobs_mode": "processed_logprobs"} if job["log_probs"] else {}),
        # vLLM 0.29 cannot compute half a prompt whose request has a seed of its own on a CPU.
        **({} if gpu else {"enable_chunked_prefill": False}),
        **job["engine"],
    )
    n, total, chunk = job["n"], len(requests) * job["n"], job["chunk"] or len(requests)
    for start in range(0, len(requests), chunk):
        part = range(len(requests))[start : start + chunk]
        if job["chunk"]:  # a request a response
            asked = [(i, {"seed": seed(job["seed"], job["prompts"][i], j)}) for i in part for j in range(n)]
            # What earlier chunks left behind must not change how this one is computed.
            engine.reset_prefix_cache()
        else:
            asked = [(i, {"n": n}) for i in part]
        outputs = engine.generate(
            [{"prompt_token_ids": requests[i][0]} for i, _ in asked],
            [
                SamplingParams(
                    temperature=job["temperature"],
                    top_p=1.0,
                    top_k=-1,
                    min_tokens=job["min_new_tokens"],
                    max_tokens=requests[i][1],
                    detokenize=False,
                    logprobs=0 if job["log_probs"] else None,
                    **own,
                )
                for i, own in asked
            ],
            # vLLM puts its bar around an iterable too, while it reads the prompts: that one passes unchanged.
            use_tqdm=lambda *iterable, _done=start * n, **_: (
                iterable[0] if iterable else _Progress(stream, _done, total)
            ),
        )
        completions = (one for output in outputs for one in sorted(output.outputs, key=lambda one: one.index))
        drawn = []
        for i in part:
            ids, of_prompt = requests[i][0], list(itertools.islice(completions, n))
            responses = [list(one.token_ids) for one in of_prompt]
            queries = [tokenizer.decode(ids + response, skip_special_tokens=False) for response in responses]
            texts = [tokenizer.decode(response, skip_special_tokens=False) for response in responses]
            known = None
            if job["log_probs"]:
                known = [
                    [at[token].logprob for token, at in zip(one.token_ids, one.logprobs, strict=True)]
                    for one in of_prompt
                ]
            drawn.append(vars(PromptSamples(ids, responses, queries, texts, known)))
        _send(stream, {"samples": drawn})


def prompt_tokens(
    tokenizer: Any, prompt: str, max_new_tokens: int | None, max_len: int | None
) -> tuple[list[int], int]:
    """What the host keeps of a prompt's tokens, and how many tokens the response may have."""
    ids, room = tokenizer(text=prompt, add_special_tokens=False)["input_ids"], max_new_tokens
    if max_len is None:
        return ids, room
    if room is None:
        room = max(1, max_len - len(ids))
    return ids[-(max_len - room) :], room


def seed(*parts: object) -> int:
    """A 63-bit seed from anything that has a repr."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "big") >> 1


def _main() -> None:
    # Libraries print to standard output as they like: keep it for the protocol, send theirs to the log.
    stream = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    try:
        _work(json.loads(sys.stdin.buffer.read()), stream)
    except BaseException:
        # What native libraries print while the process ends would bury the traceback in the log.
        _send(stream, {"error": traceback.format_exc()})
        raise


if __name__ == "__main__":
    _main()
