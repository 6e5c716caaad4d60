"""Offline sampling with vLLM, each engine in a process of its own, with GPUs of its own.

:func:`stream` starts ``python -m bond_plugin.offline.engine`` for each engine. On its standard input a process gets
the job, then the numbers of the chunks that it is to sample, and at the end ``null``; it sends the samples back, one
JSON line a chunk. vLLM keeps the memory it has taken until its process ends, so only a process of its own gives it
back.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
import queue
import subprocess
import tempfile
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
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
        queries: [n], prompt and response decoded together with special tokens: what a reward function gets.
        responses: [n], the responses decoded alone, special tokens included.
        log_probs: [n][tokens] in nats, of each response token where it was drawn, or ``None``.
    """

    prompt_ids: list[int]
    response_ids: list[list[int]]
    queries: list[str]
    responses: list[str]
    log_probs: list[list[float]] | None = None


def gpus() -> list[str]:
    """The GPUs that this process sees, as ``CUDA_VISIBLE_DEVICES`` names them."""
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return (named.split(",") if named else list(map(str, range(count))))[:count]


def count(tensor_parallel_size: int = 1, asked: int | None = None) -> int:
    """How many engines to start: ``asked``, or as many as there are GPUs for, and no more than that; at least one.

    Without a GPU ``asked``, or one.
    """
    there = len(gpus())
    room = there // tensor_parallel_size if there else asked or 1
    return max(1, min(asked or room, room))


def sample(model: str | Path, prompts: Sequence[str], n: int, *, engines: int = 1, **how: Any) -> list[PromptSamples]:
    """Draw ``n`` responses for each prompt from a model's own distribution: no top-p, top-k or least length.

    As :func:`stream`; each engine has every ``engines``-th prompt, all at once.
    """
    striped = [place for first in range(engines) for place in range(first, len(prompts), engines)]
    chunk = max(1, -(-len(prompts) // engines))
    drawn = stream(model, [prompts[place] for place in striped], n, chunk=chunk, engines=engines, **how)
    by_place = dict(zip(striped, itertools.chain.from_iterable(drawn), strict=True))
    return [by_place[place] for place in range(len(prompts))]


def stream(
    model: str | Path,
    prompts: Sequence[str],
    n: int,
    *,
    chunk: int,
    max_new_tokens: int | None,
    temperature: float,
    seed: int,
    max_len: int | None = None,
    min_new_tokens: int = 0,
    use_fast_tokenizer: bool = True,
    log_probs: bool = False,
    engines: int = 1,
    tensor_parallel_size: int = 1,
    engine: dict[str, Any] | None = None,
    progress: Progress | None = None,
) -> Iterator[list[PromptSamples]]:
    """Draw ``n`` responses for each prompt as the host's rollouts do, and yield them a chunk of prompts at a time.

    Each response has a random seed of its own, made of ``seed``, its prompt and its place among the prompt's: what is
    drawn does not depend on the other prompts, but for rounding. A chunk is sampled by one engine, alone, so the same
    chunks give the same samples on the same machine, whatever the number of engines. While chunks are being used,
    others are sampled: two for each engine.

    Args:
        model: a folder, or a name that Hugging Face's hub knows.
        prompts: texts, none empty, templates applied. Tokenised without special tokens; only the last tokens are kept
            of one that leaves no room for the response.
        n: samples a prompt, at least 1.
        chunk: prompts in a chunk, at least 1.
        max_new_tokens: tokens after which a response is cut off; ``None`` for as many as ``max_len`` leaves.
        temperature: above 0.
        max_len: tokens of prompt and response together; ``None`` cuts no prompt.
        min_new_tokens: no EOS token before so many tokens.
        log_probs: whether they are wanted; of the distribution that is sampled from, temperature included.
        engines: how many; see :func:`count`. No more are started than there are chunks.
        tensor_parallel_size: GPUs of each engine. The first has the first.
        engine: further arguments of ``vllm.LLM``.
        progress: called with (responses finished, responses wanted) now and then.

    Yields:
        Lists of :class:`PromptSamples`, ``chunk`` long but for the last, in the order of ``prompts``. Close the
        generator to stop the sampling.

    Raises:
        SamplingError: vLLM failed in one of the engines. The others have ended then.
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
        "engine": {"trust_remote_code": True, "seed": seed, "tensor_parallel_size": tensor_parallel_size},
    }
    job["engine"] |= engine or {}
    chunks, devices = -(-len(prompts) // chunk), gpus()
    inbox: queue.SimpleQueue[tuple[_Child, dict[str, Any] | None]] = queue.SimpleQueue()
    children: list[_Child] = []
    ready: dict[int, list[dict[str, Any]]] = {}
    try:
        for e in range(min(engines, chunks)):
            mine = devices[e * tensor_parallel_size : (e + 1) * tensor_parallel_size]
            share = {"CUDA_VISIBLE_DEVICES": ",".join(mine)} if mine else {}
            children.append(_Child(_environment(job["model"]) | share, inbox))
        for child in children:
            child.send(job)
        given = 0
        for wanted in range(chunks):
            while given < min(chunks, wanted + 2 * len(children)):
                least = min(children, key=lambda child: child.has)
                least.has += 1
                least.send(given)
                given += 1
            while wanted not in ready:
                child, message = inbox.get()
                if message is None:
                    raise SamplingError(_death(job["model"], children, child))
                if "samples" in message:
                    ready[message["chunk"]] = message["samples"]
                    child.has -= 1
                elif "error" in message:
                    child.error = message["error"]
                else:
                    child.done = message["done"]
                    if progress is not None:
                        progress(sum(child.done for child in children), len(prompts) * n)
            yield [PromptSamples(**one) for one in ready.pop(wanted)]
        for child in children:
            child.send(None)
        for child in children:
            child.process.wait()
    finally:
        for child in children:
            child.process.kill()
        for child in children:
            child.close()


class _Child:
    """An engine's process, as its parent has it.

    ``has`` chunks that it has not sent back; ``done`` responses; the ``error`` that it sent.
    """

    def __init__(self, environment: dict[str, str], inbox: queue.SimpleQueue) -> None:
        self.has, self.done, self.error = 0, 0, ""
        self.log = tempfile.TemporaryFile()  # noqa: SIM115, `close` closes it
        self.process = subprocess.Popen(
            [python(), "-m", __spec__.name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            env=environment,
            encoding="utf-8",
        )
        self._reader = threading.Thread(target=self._read, args=(inbox,), daemon=True)
        self._reader.start()

    def _read(self, inbox: queue.SimpleQueue) -> None:
        for line in self.process.stdout:
            if line.endswith("\n"):  # else it died while it wrote
                inbox.put((self, json.loads(line)))
        inbox.put((self, None))

    def send(self, order: Any) -> None:
        with contextlib.suppress(BrokenPipeError):  # of one that is dead the reader says so
            _send(self.process.stdin, order)

    def close(self) -> None:
        """Once it was killed or has ended."""
        self.process.wait()
        self._reader.join()
        self.process.stdout.close()
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        self.log.close()


def _death(model: str, children: list[_Child], child: _Child) -> str:
    status = child.process.wait()
    child.log.seek(0)
    text = child.error or child.log.read().decode("utf-8", errors="replace")
    tail = "\n".join(text.splitlines()[-_TAIL_LINES:])
    which = f"engine {children.index(child) + 1} of {len(children)}, " if len(children) > 1 else ""
    return f"sampling from {model} failed ({which}exit status {status}); it ended with:\n{tail}"


def chunk_of(samples: int, responses: int | None = None, most: int = 2**31) -> int:
    """How many prompts are sampled at a time: ``responses`` altogether, or what suits the device, up to ``most``."""
    import torch

    return -(-(responses or min(4096 if torch.cuda.is_available() else 512, most)) // samples)


def remaining(
    prompts: Sequence[str],
    there: Callable[[int], bool],
    draw: Callable[[list[str]], Generator[list[PromptSamples]]],
    chunk: int,
) -> Iterator[tuple[int, PromptSamples]]:
    """The places of the prompts that an interrupted run has left, each with its samples. Close it to stop sampling.

    A chunk of the whole list that is there in part is drawn again as a whole, so that its samples are computed as
    they would have been without the interruption.

    Args:
        there: whether the i-th is done; asked again before its samples are given.
        draw: a list of prompts to their samples, ``chunk`` prompts at a time and in order: :func:`stream`.
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

    Nothing is looked up elsewhere for a model that is a folder.
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


def _send(stream: IO[str], message: Any) -> None:
    print(json.dumps(message), file=stream, flush=True)


def _work(job: dict[str, Any], chunks: Iterable[int], stream: IO[str]) -> None:
    """The child's side: tokenise, sample a chunk at a time, decode, send."""
    import torch
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(job["model"], **job["tokenizer"])
    requests = [prompt_tokens(tokenizer, text, job["max_new_tokens"], job["max_len"]) for text in job["prompts"]]

    from tqdm import tqdm
    from vllm import LLM, SamplingParams  # takes long, and most of what can go wrong has gone wrong by now

    class Told(tqdm):
        """vLLM's progress, for the parent. If that is gone this raises BrokenPipeError, which ends the child too."""

        monitor_interval = 0  # no thread that sends too

        def display(self, *_: Any, **__: Any) -> None:
            _send(stream, {"done": done + self.n})

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
    n, done, seeds = job["n"], 0, _seeds(job["seed"], job["prompts"], job["n"])
    for chunk in chunks:
        part = range(len(requests))[chunk * job["chunk"] : (chunk + 1) * job["chunk"]]
        asked = [(i, own) for i in part for own in seeds[i]]  # a request a response
        # What earlier chunks left behind must not change how this one is computed.
        engine.reset_prefix_cache()
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
                    seed=own,
                )
                for i, own in asked
            ],
            # vLLM puts its bar around an iterable too, while it reads the prompts: that one passes unchanged.
            use_tqdm=lambda *given, **bar: given[0] if given else Told(mininterval=_REPORT_EVERY, **bar),
        )
        done += len(asked)
        completions = (output.outputs[0] for output in outputs)
        drawn = []
        for i in part:
            ids, of_prompt = requests[i][0], list(itertools.islice(completions, n))
            responses = [list(one.token_ids) for one in of_prompt]
            queries = [tokenizer.decode(ids + response, skip_special_tokens=False) for response in responses]
            texts = [tokenizer.decode(response, skip_special_tokens=False) for response in responses]
            pairs = (zip(one.token_ids, one.logprobs, strict=True) for one in of_prompt)
            known = [[at[token].logprob for token, at in each] for each in pairs] if job["log_probs"] else None
            drawn.append(vars(PromptSamples(ids, responses, queries, texts, known)))
        _send(stream, {"chunk": chunk, "samples": drawn})


def _seeds(of_job: int, prompts: list[str], n: int) -> list[list[int]]:
    """Of each prompt's samples. A prompt that is there again has others."""
    seen: Counter[str] = Counter()
    found = []
    for prompt in prompts:
        found.append([seed(of_job, prompt, seen[prompt] + j) for j in range(n)])
        seen[prompt] += n
    return found


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
    orders: queue.SimpleQueue[Any] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(orders,), daemon=True).start()
    try:
        _work(orders.get(), iter(orders.get, None), stream)
    except BaseException:
        # What native libraries print while the process ends would bury the traceback in the log.
        _send(stream, {"error": traceback.format_exc()})
        raise


def _listen(orders: queue.SimpleQueue) -> None:
    """Pass on what the parent sends, up to its last word. When the parent has gone, end the process at once."""
    with open(0, "rb", closefd=False) as lines:  # not sys.stdin, which Python closes while this waits for a line
        for line in lines:
            orders.put(json.loads(line))
            if line == b"null\n":
                return
    os._exit(1)


if __name__ == "__main__":
    _main()
