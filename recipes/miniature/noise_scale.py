"""How many responses until a gradient is more signal than noise: the noise scale of each method's first step.

    .venv/bin/python recipes/miniature/noise_scale.py mini --output runs/noise-scale

Responses of the policy, by default the initial one, are drawn once and given to all methods, 8 for each prompt: each
method has as many, source samples included (Algorithm 2 of J-BOND 6 + 2). The initial policy is the reference and the
anchor; `--policy FOLDER` takes a trained one, and then only methods that draw nothing of the anchor are compared.
What makes weights of the responses is what `bond train` runs: the algorithms' `select` and `advantages`, the
transforms' rewards. From the gradients g of independent batches,

    B = tr Cov(g) / |E g|^2,   in responses: that of a batch times its responses

is the "simple noise scale" of arXiv 1812.06162: with B responses a step is half signal, half noise. Needs mini/ (see
prepare.py) and, for vBoN, mini/rewards-8.jsonl (see bench.yaml); 16 batches take six minutes on two cores.
"""

from __future__ import annotations

import argparse
import math
import os
import random
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from miniature import reward as classifier
from stages import positive, write_rows
from torch import Tensor

from bond_plugin.algorithms import assemble
from bond_plugin.algorithms.base import AdvantageInputs, Algorithm
from bond_plugin.algorithms.bond import BOND, BONDConfig
from bond_plugin.algorithms.jbond import JBOND, JBONDConfig
from bond_plugin.algorithms.vbon import VBoN, VBoNConfig
from bond_plugin.bestofn.baselines import centre
from bond_plugin.offline.reward_cache import read_cache

RESPONSES = 8  # a prompt
NEW_TOKENS = 8
ROWS = 128  # at a time
FIRST = "REINFORCE"  # what the others are compared with


@dataclass(frozen=True)
class Known:
    """What is known of a batch.

    Attributes:
        rewards: ``[P, 8]`` float64.
        cached: ``[P, M]``, rewards of the initial policy.
        log_probs: ``[P, 8, A]`` float64, log pi of each token, 0 beyond a response's end.
        log_ratios: the same, log pi - log pi_ref.
    """

    rewards: Tensor
    cached: Tensor
    log_probs: Tensor
    log_ratios: Tensor


#: ``[P, 8]`` or ``[P, 8, A]``: what gradients of log pi of responses, or of their tokens, are multiplied by in the
#: mean over prompts.
Weights = Callable[[Known], Tensor]


def of_algorithm(algorithm: Algorithm) -> Weights:
    """The weights of an algorithm that takes its source samples from the end of a prompt's responses."""

    def weights(known: Known) -> Tensor:
        needs, generator = algorithm.needs(), torch.Generator().manual_seed(0)
        own, prompts = RESPONSES - needs.source_samples, len(known.rewards)
        source_rewards = known.rewards[:, own:]
        places = assemble.select(algorithm, own, source_rewards, generator).unsqueeze(-1)
        policy, ratios = (each.take_along_dim(places, dim=1) for each in (known.log_probs, known.log_ratios))
        under = {"policy": policy} | dict.fromkeys(needs.log_probs, policy - ratios)
        batch = AdvantageInputs(known.rewards[:, :own], source_rewards, under, generator)
        made = assemble.advantages(algorithm, batch).advantages
        rows = assemble.Rows(own, needs.selected_samples)
        each = made * rows.weights(rows.from_source(prompts)).unsqueeze(-1)
        return torch.zeros_like(known.log_probs).scatter_(1, places.expand(each.shape), each)

    return weights


def _per_token(values: Tensor) -> Tensor:
    return values if values.dim() == 3 else values.unsqueeze(-1)


def of_reward(change: Callable[[Known], Tensor]) -> Weights:
    """REINFORCE with a baseline of the prompt's other responses, on a reward that is made of the reward."""
    return lambda known: centre(change(known), "leave_one_out") / RESPONSES


def inputs_of(known: Known) -> AdvantageInputs:
    """All responses as the policy's, compared with the initial policy."""
    other = known.log_probs - known.log_ratios
    under = {"policy": known.log_probs, "anchor": other, "reference": other}
    return AdvantageInputs(known.rewards, known.rewards[:, :0], under, torch.Generator(), known.cached)


def whole_log_ratio(config: JBONDConfig) -> Weights:
    """The pooled form with the log-ratio of the whole response in all of its tokens."""

    def weights(known: Known) -> Tensor:
        batch = inputs_of(known)
        whole = {name: log_probs.sum(dim=-1, keepdim=True) for name, log_probs in batch.under.items()}
        found = JBOND(config).advantages(replace(batch, under=whole)).advantages / RESPONSES
        return found.expand(known.log_probs.shape)

    return weights


def methods(cache: str, moved: bool = False) -> dict[str, Weights]:
    """By name; ``cache`` is the file of vBoN's rewards, ``moved`` says that the policy is not the anchor any more."""
    made: dict[str, Weights] = {FIRST: of_reward(lambda known: known.rewards)}
    for n, beta in ((2, 0), (2, 0.5), (2, 1), (4, 0.5)):
        for normalised in (False, True):
            name = f"pooled J-BOND, N = {n}, beta {beta:g}" + (", normalised" if normalised else "")
            made[name] = of_algorithm(JBOND(JBONDConfig(n=n, beta=beta, normalised=normalised)))
    if moved:
        for beta in (0.5, 1):
            made[f"pooled J-BOND, N = 2, beta {beta:g}, whole log-ratio"] = whole_log_ratio(JBONDConfig(beta=beta))
        return made
    for n in (4, 16):
        vbon = VBoN(VBoNConfig(n=n, reward_cache=cache))

        def transformed(known: Known, vbon: VBoN = vbon) -> Tensor:
            return vbon.transform(inputs_of(known)).rewards

        made[f"vBoN, N = {n}"] = of_reward(transformed)
    one = {"baseline": "leave_one_out"}
    made |= {
        f"J-BOND, Algorithm 2, beta {beta:g}": of_algorithm(JBOND(JBONDConfig(beta=beta, n_anchor_samples=2, **one)))
        for beta in (0, 0.5, 0.9, 1)
    }
    made["J-BOND, 6 + 2 pooled, beta 0.5"] = of_algorithm(JBOND(JBONDConfig(n_anchor_samples=2, estimator="pooled")))
    settings = {"n_anchor_samples": 4, "anchor": "ema", **one}
    made |= {
        f"BOND, n = {n}, 4 + 4, beta {beta:g}": of_algorithm(BOND(BONDConfig(n=n, beta=beta, **settings)))
        for n in (2, 4)
        for beta in (0.5, 1)
    }
    return made


@dataclass(frozen=True)
class NoiseScale:
    """Of one method, from B batches.

    Attributes:
        signal: |E g|^2, without bias.
        noise: tr Cov(g) of a batch, without bias.
    """

    signal: float
    noise: float

    @property
    def ratio(self) -> float:
        """Signal to noise of a batch."""
        return self.signal / self.noise


def noise_scale(products: Tensor) -> NoiseScale:
    """From ``[B, B]``, the products of the gradients of B >= 2 independent batches with one another."""
    batches = len(products)
    if batches < 2:
        raise ValueError(f"a noise scale needs two batches or more, got {batches}")
    square = products.diagonal().mean()
    signal = (products.sum() - products.diagonal().sum()) / (batches * (batches - 1))
    return NoiseScale(signal.item(), (square - signal).item())


def compare(products: Tensor, first: Tensor) -> list[float] | None:
    """Signal to noise of a batch beside the first method's, and the ends of a 95 % interval.

    The interval is a jackknife's over batches, of the logarithm; both methods had the same batches. ``None`` where
    the batches are too few to tell a signal.
    """

    def ratio(kept: list[int]) -> float:
        one, other = (noise_scale(each[kept][:, kept]) for each in (products, first))
        return one.ratio / other.ratio if min(one.signal, other.signal) > 0 else math.nan

    batches = range(len(products))
    left_out = torch.tensor([ratio([b for b in batches if b != out]) for out in batches], dtype=torch.float64).log()
    error = ((len(batches) - 1) * left_out.var(correction=0)).sqrt().item()
    middle = ratio(list(batches))
    if math.isnan(error) or math.isnan(middle):
        return None
    return [middle * math.exp(step * 1.96 * error) for step in (0, -1, 1)]


class Drawn:
    """Responses of a model to prompts, a fixed number each, prompts padded left and responses right.

    Attributes:
        ids, mask: ``[rows, tokens]``.
        trained: ``[rows, NEW_TOKENS]``, 1 on tokens of the response, EOS included.
        texts: [rows], prompt and response.
    """

    def __init__(self, model: Any, tokenizer: Any, prompts: list[str]) -> None:
        # Whatever the tokenizer's own side: a trained model's is the right one, where the host's train_sft pads.
        given = tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left", add_special_tokens=False)
        with torch.inference_mode():
            self.ids = model.generate(
                **given,
                do_sample=True,
                temperature=1.0,
                top_k=0,
                top_p=1.0,
                min_new_tokens=1,
                max_new_tokens=NEW_TOKENS,
                num_return_sequences=RESPONSES,
            ).clone()
        prompt_mask = given["attention_mask"].repeat_interleave(RESPONSES, dim=0)
        new = self.ids[:, prompt_mask.shape[1] :]
        before = (new == tokenizer.eos_token_id).long().cumsum(dim=1) - (new == tokenizer.eos_token_id).long()
        self.trained = (before == 0).long()
        self.mask = torch.cat([prompt_mask, self.trained], dim=1)
        rows = zip(self.ids, self.mask.bool(), strict=True)
        self.texts = [tokenizer.decode(row[kept]) for row, kept in rows]

    def log_probs(self, model: Any, rows: Tensor) -> Tensor:
        """log pi of each token of the response, for the numbers ``[n]`` of some rows: ``[n, NEW_TOKENS]``."""
        mask, steps = self.mask[rows], self.trained.shape[1]
        logits = model(
            input_ids=self.ids[rows],
            attention_mask=mask,
            position_ids=(mask.cumsum(dim=-1) - 1).clamp(min=0),
            logits_to_keep=steps + 1,
            use_cache=False,
        ).logits[:, :-1]
        chosen = logits.log_softmax(dim=-1).gather(-1, self.ids[rows][:, -steps:, None])[..., 0]
        return chosen * self.trained[rows]

    def all_log_probs(self, model: Any) -> Tensor:
        """The same of all rows, prompt by prompt, without gradient: ``[P, 8, NEW_TOKENS]`` float64."""
        with torch.inference_mode():
            found = [self.log_probs(model, rows) for rows in torch.arange(len(self.ids)).split(ROWS)]
        return torch.cat(found).double().clone().reshape(-1, RESPONSES, self.trained.shape[1])

    def gradient(self, model: Any, weights: Tensor) -> Tensor:
        """Of the sum of weights x log pi, ``[rows]`` of responses or ``[rows, NEW_TOKENS]`` of tokens; flat."""
        model.zero_grad()
        weights = _per_token(weights.unsqueeze(0))[0]
        for rows in weights.any(dim=-1).nonzero()[:, 0].split(ROWS):
            (self.log_probs(model, rows) * weights[rows]).sum().backward()
        return torch.cat([weight.grad.flatten() for weight in model.parameters()])


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path, help="folder that prepare.py made")
    parser.add_argument("--cache", type=Path, help="file of vBoN's rewards (default: DIRECTORY/rewards-8.jsonl)")
    parser.add_argument("--policy", type=Path, help="folder of a trained policy (default: the initial policy)")
    parser.add_argument("--batches", type=positive, default=16, help="independent ones, 3 or more (default: 16)")
    parser.add_argument("--prompts", type=positive, default=64, help="a batch, 8 responses each (default: 64)")
    parser.add_argument("--seed", type=int, default=0, help="of prompts and samples (default: 0)")
    parser.add_argument("--output", type=Path, default=Path("runs/noise-scale"), help="folder (default: %(default)s)")
    given = parser.parse_args(arguments)
    given.cache = given.cache or given.directory / "rewards-8.jsonl"
    if given.batches < 3:
        parser.error("--batches must be at least 3: a noise scale compares batches, and leaves out each in turn")
    if given.policy is not None and not (given.policy / "config.json").exists():
        parser.error(f"--policy {given.policy} is no folder of a model")
    for path, made_by in ((given.directory / "model", "prepare.py"), (given.cache, "`bond cache`, see bench.yaml")):
        if not path.exists():
            parser.error(f"{path} is not there: it is made by {made_by}")
    return given


def main(arguments: list[str] | None = None) -> None:
    """Measure, print the table, write it."""
    import transformers

    given = parse(arguments)
    torch.manual_seed(given.seed)
    transformers.utils.logging.disable_progress_bar()
    tokenizer = transformers.AutoTokenizer.from_pretrained(given.directory / "model")
    model = transformers.AutoModelForCausalLM.from_pretrained(given.directory / "model", dtype=torch.float32).eval()
    initial = model
    if given.policy is not None:
        model = transformers.AutoModelForCausalLM.from_pretrained(given.policy, dtype=torch.float32).eval()
    cache = read_cache(given.cache)
    prompts = list(cache)
    if given.batches * given.prompts > len(prompts):
        raise SystemExit(
            f"{given.batches} batches of {given.prompts} prompts are more than the {len(prompts)} in {given.cache}: "
            "give a smaller --batches or --prompts"
        )
    random.Random(given.seed).shuffle(prompts)
    os.environ["BOND_REVIEWS_DIR"] = str(given.directory)  # where the classifier is, see reward.py

    named = methods(str(given.cache), moved=given.policy is not None)
    gradients: dict[str, list[Tensor]] = {name: [] for name in named}
    started = time.monotonic()
    for batch in range(given.batches):
        chosen = prompts[batch * given.prompts : (batch + 1) * given.prompts]
        drawn = Drawn(model, tokenizer, chosen)
        scores = classifier.reward_func(drawn.texts, drawn.texts, [""] * len(drawn.texts))["rewards"]
        log_probs = drawn.all_log_probs(model)
        log_ratios = log_probs - (drawn.all_log_probs(initial) if initial is not model else log_probs)
        known = Known(scores.double().reshape(-1, RESPONSES), cache.rewards(chosen), log_probs, log_ratios)
        for name, weights in named.items():
            gradients[name].append(drawn.gradient(model, (weights(known) / len(chosen)).flatten(0, 1)))
        left = (time.monotonic() - started) / (batch + 1) * (given.batches - batch - 1)
        print(f"batch {batch + 1} of {given.batches}, about {left:.0f} s left", file=sys.stderr)

    products = {name: ((every := torch.stack(found)) @ every.T).double() for name, found in gradients.items()}
    rows = []
    print(f"{'method':48} {'noise scale':>13}  signal to noise beside {FIRST}'s")
    for name, each in products.items():
        found, beside = noise_scale(each), compare(each, products[FIRST])
        scale = given.prompts * RESPONSES / found.ratio if beside else None
        rows.append({"method": name, "noise_scale": scale, "beside": beside})
        told = (
            "{:13,.0f}  {:.2f} [{:.2f}, {:.2f}]".format(scale, *beside)
            if beside
            else "no signal told: more --batches"
        )
        print(f"{name:48} {told}")
    given.output.mkdir(parents=True, exist_ok=True)
    write_rows(given.output / "noise_scale.jsonl", rows)


if __name__ == "__main__":
    main()
