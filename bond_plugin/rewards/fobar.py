"""FOBAR: is an answer reached going forward, and does it lead back to the question (arXiv 2308.07758).

    P_f(A) = share of chains of thought that end in A
    P_b(A) = share of chains that find a masked number of the question when told A
    P(A)  ~  P_f(A)^alpha P_b(A)^(1 - alpha)

Chains come from a server of OpenAI's chat interface, such as ``vllm serve``. Each number of the question is masked in
turn. Shares of backward chains are (found + e) / (all + e), e = 1e-8, as in the paper: where no answer leads back,
the forward share alone decides. A question without a number has P_b = 1 for all answers.

`reward_func` draws forward chains itself, once a question, and does not divide by the sum over answers, which is the
same for all responses to a prompt. `weigh` takes the responses themselves as the forward chains, and divides. Equal
answers of a question share their backward chains. They are read and compared by math-verify.

Settings, by environment variables: BOND_FOBAR_URL, such as http://localhost:8000/v1; BOND_FOBAR_MODEL, if it serves
several; BOND_FOBAR_ALPHA (0.5), BOND_FOBAR_CHAINS (8) a question, BOND_FOBAR_TOKENS (512) and BOND_FOBAR_TEMPERATURE
(0.7) of a chain; and BOND_REWARD_QUESTION of ``calls.py``.
"""

from __future__ import annotations

import functools
import os
import re
import threading
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch

from bond_plugin.rewards.answers import Answer, read, same
from bond_plugin.rewards.calls import number, parts, setting

URL, MODEL, ALPHA = "BOND_FOBAR_URL", "BOND_FOBAR_MODEL", "BOND_FOBAR_ALPHA"
CHAINS, TOKENS, TEMPERATURE = "BOND_FOBAR_CHAINS", "BOND_FOBAR_TOKENS", "BOND_FOBAR_TEMPERATURE"
BACKWARD_QUESTION = "{masked}\nThe answer to the question above is {answer}. What is the value of the unknown x?"
EPSILON = 1e-8
_AT_ONCE = 32  # answers that are scored at the same time, as many as the host scores

_NUMBER = re.compile(r"(?<![\w.])\d+(?:,\d{3})*(?:\.\d+)?(?!\w|\.\d)")
_making = threading.Lock()


def masked(question: str) -> list[tuple[str, str]]:
    """For each number of a question: the question with x in its place, and the number."""
    return [(f"{question[: m.start()]}x{question[m.end() :]}", m[0]) for m in _NUMBER.finditer(question)]


def score(forward: float, found: int, chains: int, alpha: float) -> float:
    """P_f^alpha P_b^(1 - alpha), with ``found`` of ``chains`` backward chains, 0 of 0 where there is no number."""
    return forward**alpha * ((found + EPSILON) / (chains + EPSILON)) ** (1 - alpha)


class Server:
    """A model behind OpenAI's chat interface."""

    def __init__(self) -> None:
        import openai

        url = setting(URL, "the address of a server of OpenAI's interface, such as http://localhost:8000/v1")
        self._client = openai.OpenAI(base_url=url, api_key=os.environ.get("OPENAI_API_KEY", "none"), max_retries=5)
        self._model = os.environ.get(MODEL) or self._client.models.list().data[0].id
        self.alpha, self.chains = number(ALPHA, 0.5, 0, 1), number(CHAINS, 8, 1)
        self._limits = {"max_tokens": number(TOKENS, 512, 1), "temperature": number(TEMPERATURE, 0.7, 0)}

    def answers(self, question: str) -> list[Answer | None]:
        """Those of ``BOND_FOBAR_CHAINS`` chains; ``None`` for a chain that ends in none."""
        asked = [{"role": "user", "content": question}]
        made = self._client.chat.completions.create(model=self._model, messages=asked, n=self.chains, **self._limits)
        return [read(choice.message.content or "") for choice in made.choices]

    def backward(self, question: str, answer: Answer) -> tuple[int, int]:
        """How many backward chains find the number that was masked, and how many were drawn."""
        found = drawn = 0
        for text, hidden in masked(question):
            ends = self.answers(BACKWARD_QUESTION.format(masked=text, answer=answer.words))
            wanted = read(hidden)
            found += sum(end is not None and same(wanted, end) for end in ends)
            drawn += len(ends)
        return found, drawn


class Asked:
    """A question: how its forward chains end, drawn if not given, and its answers' scores, each found once."""

    def __init__(self, question: str, forward: Sequence[Answer | None] | None = None) -> None:
        self._question, self._forward, self._lock = question, forward, threading.Lock()
        self.known: list[tuple[Answer, Future[float]]] = []

    def score(self, answer: Answer | None, server: Server) -> float:
        """0 without an answer. Different answers may be scored at the same time; an equal one waits for the first."""
        if answer is None:
            return 0.0
        with self._lock:
            if self._forward is None:
                self._forward = server.answers(self._question) if server.alpha > 0 else []
            found = next((value for known, value in self.known if same(known, answer)), None)
            if found is None:
                self.known.append((answer, mine := Future()))
        if found is not None:
            return found.result()
        try:
            agree = sum(end is not None and same(answer, end) for end in self._forward)
            back = server.backward(self._question, answer) if server.alpha < 1 else (0, 0)
            mine.set_result(score(agree / max(1, len(self._forward)), *back, server.alpha))
        except BaseException as error:
            mine.set_exception(error)
        return mine.result()


_server = functools.cache(Server)
_asked = functools.cache(Asked)


def weigh(question: str, responses: Sequence[str]) -> list[float]:
    """P of each response's answer among those of all responses to a question: the largest is Best-of-N's choice.

    In [0, 1] each, 0 without an answer. Responses of equal answers have equal values.
    """
    with _making:
        server = _server()
    answers = [read(response) for response in responses]
    asked = Asked(question, answers)
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        scores = list(pool.map(lambda answer: asked.score(answer, server), answers))
    total = sum(value.result() for _, value in asked.known)
    return [value / total if total else 0.0 for value in scores]


def reward_func(queries: list[str], prompts: list[str], labels: list[Any]) -> dict[str, Any]:
    """Score each query (prompt and response, decoded with special tokens); labels are not used.

    Returns:
        `rewards` and `scores`: float32 [len(queries)], in [0, 1], 0 without an answer. `extra_logs`: empty.

    Raises:
        ValueError, ImportError, openai.OpenAIError: a setting, math-verify is missing, the server failed.
    """
    with _making:
        server = _server()
    found = []
    for query, prompt in zip(queries, prompts, strict=True):
        question, response = parts(query, prompt)
        with _making:
            asked = _asked(question)
        found.append(asked.score(read(response), server))
    rewards = torch.tensor(found, dtype=torch.float32)
    return {"rewards": rewards, "scores": rewards, "extra_logs": {}}
