"""Rewards as training has them: of a Python file, of servers, or of a reward model, through the host's own code."""

from __future__ import annotations

import asyncio
import contextlib
import sys
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from bond_plugin.host import cpu
from bond_plugin.host.inputs import import_folders
from bond_plugin.host.rewards import RewardError, checked, failed, finite
from bond_plugin.offline import fingerprints
from bond_plugin.offline.engine import PromptSamples

if TYPE_CHECKING:
    from torch import Tensor

_AT_ONCE = 32  # calls to the reward

#: (prompt, label, samples of the prompt) to the rewards of the samples.
Score = Callable[[str, Any, PromptSamples], Sequence[float]]


def scorer(args: SimpleNamespace, tokenizer: Any) -> Score:
    """How the host would score: with a Python file or servers, or without these a reward model.

    Raises RewardError if they cannot be loaded.
    """
    try:
        if args.reward.remote_url:
            return remote_score(args.reward.remote_url)
        return ModelScore(args, tokenizer.pad_token_id)
    except (Exception, SystemExit) as error:
        name = ", ".join(args.reward.remote_url or [args.reward.model_name_or_path])
        raise RewardError(f"the reward ({name}) cannot be loaded: {error!r}") from error


def rewards(score: Score, pairs: Sequence[tuple[str, Any]], drawn: Sequence[PromptSamples]) -> Tensor:
    """Rewards of K samples of each of P prompts, ``[P, K]`` float64. Raises RewardError, which names the prompt."""
    import torch

    rows = [
        [finite(value, prompt) for value in score(prompt, label, samples)]
        for (prompt, label), samples in zip(pairs, drawn, strict=True)
    ]
    return torch.tensor(rows, dtype=torch.float64)


def try_out(score: Score, pair: tuple[str, Any], tokenizer: Any) -> None:
    """Score a prompt without a response, as :func:`rewards`: what the reward misses shows before the sampling."""
    rewards(score, [pair], [of_texts(pair[0], [""], tokenizer)])


def of_texts(prompt: str, responses: Sequence[str], tokenizer: Any = None) -> PromptSamples:
    """Responses that are there as texts, as samples; without a tokenizer they have no tokens."""

    def ids(text: str) -> list[int]:
        return [] if tokenizer is None else tokenizer(text=text, add_special_tokens=False)["input_ids"]

    return PromptSamples(ids(prompt), list(map(ids, responses)), [prompt + one for one in responses], list(responses))


def identity(args: SimpleNamespace) -> dict[str, Any]:
    """What a reward is, by content where it has one: two of the same identity give the same rewards."""
    if not args.reward.remote_url:
        name = args.reward.model_name_or_path
        return {
            "kind": "model",
            "name": name,
            "sha256": fingerprints.of_model(name),
            "normalize_enable": args.reward.normalize_enable,
            "value_head_prefix": args.ds.value_head_prefix,
        }
    first = args.reward.remote_url[0]
    if first.endswith(".py"):
        return {"kind": "Python file", "name": first, "sha256": fingerprints.of_file(first)}
    return {"kind": "server", "url": ",".join(sorted(args.reward.remote_url))}


def room_beside(score: Score, gpus: int) -> dict[str, Any]:
    """Arguments of vLLM's engines that leave a reward model its place on a GPU that one of them uses too.

    They are all engines': which of them draws a sample must not matter. The engines use the first ``gpus``.
    """
    if not (isinstance(score, ModelScore) and score.device.type == "cuda" and score.device.index < gpus):
        return {}
    import torch

    free, total = torch.cuda.mem_get_info(score.device)
    return {"gpu_memory_utilization": round(min(0.9, free / total - 0.1), 2)}


def sampling(args: SimpleNamespace, score: Score, engines: int, width: int) -> dict[str, Any]:
    """Arguments of :func:`~bond_plugin.offline.engine.stream`: to sample as a training with the host's ``args`` does.

    ``engines`` of ``width`` GPUs each sample side by side, and the reward has its place beside them.
    """
    return {
        "max_new_tokens": args.rollout.max_new_tokens,
        "max_len": args.data.max_len,
        "temperature": args.rollout.temperature,
        "use_fast_tokenizer": not args.data.disable_fast_tokenizer,
        "engines": engines,
        "tensor_parallel_size": width,
        "engine": room_beside(score, engines * width),
    }


def remote_score(urls: list[str]) -> Score:
    """Rewards of ``--reward.remote_url``, through the host's own calls of it, one query each.

    Raises RewardError, when it is called, if the reward raised (the cause), or returned no single number.
    """
    from openrlhf.utils.agent import SingleTurnAgentExecutor

    sys.path += [folder for folder in import_folders(urls) if folder not in sys.path]
    host = SingleTurnAgentExecutor(urls)
    fetch = host._fetch_rewards_via_func if host.reward_func else host._fetch_rewards_via_http

    async def every(prompt: str, label: Any, samples: PromptSamples) -> list[float]:
        places = asyncio.Semaphore(_AT_ONCE)

        async def one(query: str) -> float:
            async with places:
                try:
                    (found,) = await fetch([query], [prompt], [label])
                    return checked(found)["rewards"]
                except Exception as error:
                    raise failed(", ".join(urls), prompt, error) from error

        return list(await asyncio.gather(*map(one, samples.queries)))

    return lambda *sample: asyncio.run(every(*sample))


class ModelScore:
    """Rewards of ``--reward.model_name_or_path``, loaded and called as the host's reward model actor does."""

    def __init__(self, args: SimpleNamespace, pad_token_id: int) -> None:
        import torch

        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        with contextlib.nullcontext() if count else cpu.flash_attn_stand_in():
            from openrlhf.models import get_llm_for_sequence_regression
        # vLLM's engines take the first devices.
        self.device = torch.device("cuda", count - 1) if count else torch.device("cpu")
        self._pad, self._rows = pad_token_id, args.rollout.micro_batch_size
        self._model = get_llm_for_sequence_regression(
            args.reward.model_name_or_path,
            "reward",
            normalize_reward=args.reward.normalize_enable,
            attn_implementation=args.ds.attn_implementation,
            experts_implementation=args.ds.experts_implementation,
            param_dtype=args.ds.param_dtype,
            load_in_4bit=args.ds.load_in_4bit,
            value_head_prefix=args.ds.value_head_prefix,
        )
        self._model.to(self.device).eval()

    def __call__(self, prompt: str, label: Any, samples: PromptSamples) -> list[float]:
        import torch

        found: list[float] = []
        whole = [torch.tensor(samples.prompt_ids + ids) for ids in samples.response_ids]
        for start in range(0, len(whole), self._rows):
            rows = whole[start : start + self._rows]
            sequences = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=self._pad)
            mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
            with torch.no_grad():
                values = self._model(sequences.to(self.device), mask.to(self.device), pad_sequence=True)
            found += values.float().flatten().tolist()
        return found
