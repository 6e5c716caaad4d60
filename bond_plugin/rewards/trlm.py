"""TRLM: how well a response tells its query, log P(query | response) per token (arXiv 2412.02626).

    Fo    (1/T) sum_t log P_Fo(q_t | prompt(response), q_<t)             an ordinary model, asked for the question
    Ba    (1/T) sum_t log P_Ba(q_t | reversed response, q_T, ..., q_t+1)  a model of the reversed order of tokens
    FoBa  the mean of both

T is the number of the query's tokens, so that rewards of short and long prompts are comparable. ``reverse.py``
prepares the training of Ba.

Settings, by environment variables: BOND_TRLM_FORWARD, a model's folder, for Fo; BOND_TRLM_BACKWARD, a folder, for Ba,
with BOND_TRLM_TOKENIZER, the folder of the tokenizer whose tokens were reversed; both for FoBa.
BOND_TRLM_PROMPT is what Fo is asked, with ``{response}`` in it. BOND_TRLM_DEVICE (cpu), BOND_TRLM_BATCH (8), and
BOND_REWARD_QUESTION of ``calls.py``.
"""

from __future__ import annotations

import functools
import os
import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from bond_plugin.offline import likelihood
from bond_plugin.rewards.calls import Batches, loaded, number, parts, setting

FORWARD, BACKWARD, TOKENIZER = "BOND_TRLM_FORWARD", "BOND_TRLM_BACKWARD", "BOND_TRLM_TOKENIZER"
PROMPT, DEVICE, BATCH = "BOND_TRLM_PROMPT", "BOND_TRLM_DEVICE", "BOND_TRLM_BATCH"
DEFAULT_PROMPT = "{response}\n\nThe text above answers this question:\n"

_loading = threading.Lock()
#: Tokens that are given, and those whose probability is asked for.
Row = tuple[list[int], list[int]]


def ids(tokenizer: Any, text: str, start: bool = False) -> list[int]:
    """A text's tokens, with those the tokenizer begins a text with if ``start``."""
    return tokenizer(text, add_special_tokens=start)["input_ids"]


def reversed_row(tokenizer: Any, question: str, response: str) -> Row:
    """What a backward model is given and asked, in training and in scoring: EOS, then the last token first."""
    return [tokenizer.eos_token_id, *reversed(ids(tokenizer, response))], ids(tokenizer, question)[::-1]


def mean_log_probs(model: Any, rows: Sequence[Row]) -> Tensor:
    """The mean log-probability of each row's asked tokens after those given, ``[len(rows)]`` float32, on the CPU.

    Raises ValueError if a row has more tokens than the model has positions.
    """
    given, asked = zip(*rows, strict=True)
    longest = max(len(one) + len(other) for one, other in rows)
    most = getattr(model.config, "max_position_embeddings", None)
    if most is not None and longest > most:
        raise ValueError(f"query and response are {longest} tokens, {model.config.name_or_path} takes {most}")
    found = likelihood.measure([model], given, [[one] for one in asked], distributions=False)
    return (found.log_probs[0, :, 0] / torch.tensor(list(map(len, asked)))).float()


@functools.cache
def _directions() -> list[tuple[Callable[[str, str], Row], Batches]]:
    """For each model: how its row is made of question and response, and how rows are scored."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    device = os.environ.get(DEVICE, "cpu")
    prompt = os.environ.get(PROMPT, DEFAULT_PROMPT)
    if "{response}" not in prompt:
        raise ValueError(f"the environment variable {PROMPT} must have {{response}} in it, got '{prompt}'")

    def scored(folder: str) -> Batches:
        model = loaded(AutoModelForCausalLM, folder, device)
        return Batches(functools.partial(mean_log_probs, model), number(BATCH, 8, 1))

    found: list[tuple[Callable[[str, str], Row], Batches]] = []
    if folder := os.environ.get(FORWARD):
        forward = AutoTokenizer.from_pretrained(folder)

        def asked(question: str, response: str) -> Row:
            return ids(forward, prompt.replace("{response}", response), start=True), ids(forward, question)

        found.append((asked, scored(folder)))
    if folder := os.environ.get(BACKWARD):
        tokenizer = AutoTokenizer.from_pretrained(
            setting(TOKENIZER, f"the folder of the tokenizer whose tokens {BACKWARD} learned in reverse")
        )
        found.append((functools.partial(reversed_row, tokenizer), scored(folder)))
    if not found:
        raise ValueError(f"set the environment variable {FORWARD}, {BACKWARD} or both to a model's folder")
    return found


def reward_func(queries: list[str], prompts: list[str], labels: list[Any]) -> dict[str, Any]:
    """Score each query (prompt and response, decoded with special tokens); labels are not used.

    Returns:
        `rewards`: nats a token, float32 [len(queries)], at most 0. `scores`: their exponential, in (0, 1].
        `extra_logs`: empty.

    Raises:
        ValueError: a setting, a prompt or a length; see `parts` and `mean_log_probs`.
    """
    with _loading:
        directions = _directions()
    pairs = [parts(query, prompt) for query, prompt in zip(queries, prompts, strict=True)]
    found = [torch.stack(score([row(*pair) for pair in pairs])) for row, score in directions]
    rewards = torch.stack(found).mean(dim=0)
    return {"rewards": rewards, "scores": rewards.exp(), "extra_logs": {}}
