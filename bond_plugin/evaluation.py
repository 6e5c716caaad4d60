"""Compare two models on held-out prompts: reward, win rate, KL, and where Best-of-N of the first one stands.

The prompts are the population: every interval is a bootstrap over prompts of one value a prompt, which is
itself an average over samples. torch, transformers, vLLM and matplotlib are imported when they are needed.
"""

from __future__ import annotations

import importlib.util
import io
import json
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bond_plugin import fingerprints
from bond_plugin.files import write_whole

if TYPE_CHECKING:
    from torch import Tensor

    from bond_plugin.host.engine import Samples

#: The N of the Best-of-N levels that are reported, as far as there are samples for them.
BEST_OF = (2, 4, 8, 16)
LEVEL = 0.95

_REWARD_THREADS = 8
_SPOT_CHECKS = 4
_EXAMPLES = 4
_SAY_EVERY = 10.0  # seconds

Say = Callable[[str], None]
RewardFunction = Callable[[list[str], list[str], list[Any]], Mapping[str, Any]]

# Okabe and Ito's colours, which colour-blind readers can tell apart.
_BLUE, _ORANGE, _GREEN, _GREY = "#0072B2", "#D55E00", "#009E73", "#595959"


class EvaluationError(ValueError):
    """The models, the prompts or the reward cannot be evaluated. The message says why."""


@dataclass(frozen=True)
class Estimate:
    """A mean over prompts with its 95 % bootstrap interval."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class Evaluation:
    """The result of :func:`evaluate`.

    Attributes:
        before, after: the two models' folders.
        prompts, samples, kl_samples: how many prompts, samples a prompt of each model, and samples a prompt
            that the KL was computed on.
        max_new_tokens, temperature, seed: the sampling.
        reward_before, reward_after: mean reward.
        gain: reward of ``after`` minus reward of ``before``, prompt by prompt.
        win_rate: share of the pairs of samples of a prompt in which ``after`` has the higher reward, a tie
            counting one half; in [0, 1].
        kl: KL(after || before) of whole responses, in nats.
        best_of: N to the mean reward of Best-of-N of ``before``.
        length_before, length_after: mean response length in tokens, EOS included.
        examples: a few prompts, each with one sample of either model and their rewards.
    """

    before: str
    after: str
    prompts: int
    samples: int
    kl_samples: int
    max_new_tokens: int
    temperature: float
    seed: int
    reward_before: Estimate
    reward_after: Estimate
    gain: Estimate
    win_rate: Estimate
    kl: Estimate
    best_of: dict[int, Estimate]
    length_before: float
    length_after: float
    examples: list[dict[str, Any]]

    def to_json(self) -> str:
        """The result as a JSON object, indented; the keys of ``best_of`` become strings."""
        return json.dumps(asdict(self), indent=2, ensure_ascii=False)


def evaluate(
    before: str | Path,
    after: str | Path,
    prompts: Sequence[str],
    reward: str | Path,
    *,
    labels: Sequence[Any] | None = None,
    samples: int = 16,
    max_new_tokens: int = 32,
    temperature: float = 1.0,
    kl_samples: int = 2,
    seed: int = 0,
    cache_dir: str | Path | None = None,
    say: Say | None = None,
) -> Evaluation:
    """Sample both models on the same prompts, score the samples, and compute the KL between the models.

    Args:
        before: folder of the initial policy.
        after: folder of the trained policy; the same tokenizer and vocabulary.
        prompts: held-out prompts, raw text as the host feeds it to the policy.
        reward: a Python file with ``reward_func(queries, prompts, labels)``, as for ``--reward.remote_url``.
        labels: one a prompt, handed to the reward function; empty strings if not given, as in the host.
        samples: samples a prompt from each model, at least 1.
        max_new_tokens: the length at which responses are cut off.
        temperature: of the sampling, and of the distributions whose KL is computed.
        kl_samples: samples a prompt of ``after`` on which the KL is computed, 1 to ``samples``.
        seed: of the sampling; ``after`` is sampled with ``seed + 1``, so that the two are independent.
        cache_dir: where samples and rewards are kept, so that a second call with the same models and settings
            reuses them. ``None`` keeps nothing.
        say: takes progress messages.

    Returns:
        :class:`Evaluation`.

    Raises:
        EvaluationError: different tokenizers, or an unusable reward file, or a reward that fails.
        bond_plugin.host.engine.SamplingError: vLLM failed.
    """
    from bond_plugin.bestofn.estimates import expected_max, win_rate

    say = say or (lambda message: None)
    if not prompts:
        raise EvaluationError("there are no prompts")
    if not 1 <= kl_samples <= samples:
        raise EvaluationError(f"kl_samples must be from 1 to samples = {samples}, got {kl_samples}")
    labels = [""] * len(prompts) if labels is None else list(labels)
    reward_func = load_reward(reward)
    cache = None if cache_dir is None else Path(cache_dir)

    drawn, rewards = [], []
    for name, model, model_seed in (("before", before, seed), ("after", after, seed + 1)):
        settings = {
            "model": fingerprint(model),
            "prompts": list(prompts),
            "samples": samples,
            "max_new_tokens": max_new_tokens,
            "temperature": temperature,
            "seed": model_seed,
        }
        one = _cached_samples(name, model, settings, cache, say)
        drawn.append(one)
        rewards.append(_cached_rewards(name, one, settings, reward, reward_func, prompts, labels, cache, say))
    if drawn[0].prompt_ids != drawn[1].prompt_ids:
        raise EvaluationError(f"{before} and {after} tokenize the prompts differently: a KL would mean nothing")

    say(f"KL: {len(prompts) * kl_samples} responses of the trained policy under both models")
    responses = [ids[:kl_samples] for ids in drawn[1].response_ids]
    kl = response_kl(after, before, drawn[1].prompt_ids, responses, temperature, _ticker(say, "KL"))

    reward_before, reward_after = rewards
    lengths = [[len(ids) for per_prompt in one.response_ids for ids in per_prompt] for one in drawn]
    return Evaluation(
        before=os.fspath(before),
        after=os.fspath(after),
        prompts=len(prompts),
        samples=samples,
        kl_samples=kl_samples,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        seed=seed,
        reward_before=_estimate(reward_before.mean(dim=-1)),
        reward_after=_estimate(reward_after.mean(dim=-1)),
        gain=_estimate(reward_after.mean(dim=-1) - reward_before.mean(dim=-1)),
        win_rate=_estimate(win_rate(reward_after, reward_before)),
        kl=_estimate(kl.mean(dim=-1)),
        best_of={n: _estimate(expected_max(reward_before, n)) for n in BEST_OF if n <= samples},
        length_before=sum(lengths[0]) / len(lengths[0]),
        length_after=sum(lengths[1]) / len(lengths[1]),
        examples=[
            {
                "prompt": prompts[i],
                "before": drawn[0].queries[i][0],
                "reward_before": reward_before[i, 0].item(),
                "after": drawn[1].queries[i][0],
                "reward_after": reward_after[i, 0].item(),
            }
            for i in range(min(_EXAMPLES, len(prompts)))
        ],
    )


def _estimate(values: Tensor) -> Estimate:
    from bond_plugin.bestofn.estimates import bootstrap_interval

    return Estimate(values.double().mean().item(), *bootstrap_interval(values, LEVEL))


def _ticker(say: Say, what: str) -> Callable[[int, int], None]:
    """A progress callback that says (done, total) at most every few seconds."""
    started = last = time.monotonic()

    def tick(done: int, total: int) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last >= _SAY_EVERY and done < total:
            last = now
            say(f"{what}: {done} of {total} responses after {now - started:.0f} s")

    return tick


# Prompts.


def read_prompts(
    path: Path, key: str, label_key: str | None, flags: tuple[str, str] = ("--input-key", "--label-key")
) -> tuple[list[str], list[Any] | None]:
    """The prompts of a file of JSON lines, and a label each if ``label_key`` is given.

    Args:
        path: the file; empty lines are passed over.
        key, label_key: the keys of prompt and label.
        flags: where these two are set, for the messages.

    Raises:
        EvaluationError: the first line that is no use.
    """
    if not path.is_file():
        raise EvaluationError(f"{path}: no such file")
    prompts, labels = [], []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            item = json.loads(line)
        except json.JSONDecodeError as error:
            raise EvaluationError(f"{path}, line {number} is not JSON: {error}") from error
        for flag, wanted in zip(flags, (key, label_key), strict=True):
            if wanted is not None and (not isinstance(item, dict) or wanted not in item):
                has = f"it has {', '.join(map(repr, item))}" if isinstance(item, dict) else "it is no object"
                raise EvaluationError(f"{path}, line {number} has no key '{wanted}' ({has}): set {flag}")
        if not isinstance(item[key], str) or not item[key]:
            raise EvaluationError(f"{path}, line {number}: '{key}' must be non-empty text (apply a chat template)")
        prompts.append(item[key])
        labels.append(item[label_key] if label_key is not None else None)
    if not prompts:
        raise EvaluationError(f'{path} is empty: it needs at least one line like {{"{key}": "..."}}')
    return prompts, labels if label_key is not None else None


# Rewards.


def load_reward(path: str | Path) -> RewardFunction:
    """The ``reward_func`` of a Python file, loaded as the host loads it.

    Raises:
        EvaluationError: no such file, it cannot be imported, or it does not define ``reward_func``.
    """
    path = Path(path)
    if not path.is_file():
        raise EvaluationError(f"{path}: no such file")
    spec = importlib.util.spec_from_file_location("reward_func", path)
    if spec is None or spec.loader is None:
        raise EvaluationError(f"{path} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise EvaluationError(f"{path} cannot be imported: {error!r}") from error
    function = getattr(module, "reward_func", None)
    if not callable(function):
        raise EvaluationError(f"{path} does not define reward_func(queries, prompts, labels)")
    return function


def score(reward_func: RewardFunction, queries: Sequence[str], prompts: Sequence[str], labels: Sequence) -> Tensor:
    """The rewards of ``queries``, one call each and from several threads, as the host calls it.

    Args:
        queries, prompts, labels: equally long.

    Returns:
        ``[len(queries)]`` float64.

    Raises:
        EvaluationError: the function raised, or returned no single finite number under ``rewards``.
    """
    import torch

    def one(query: str, prompt: str, label: Any) -> float:
        try:
            result = reward_func([query], [prompt], [label])
        except Exception as error:
            raise EvaluationError(f"reward_func failed on the prompt {prompt!r}: {error}") from error
        try:
            (value,) = torch.as_tensor(result["rewards"], dtype=torch.float64).reshape(-1).tolist()
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise EvaluationError(
                f"reward_func must return a dict whose 'rewards' holds one number a query, got {result!r}"
            ) from error
        if not math.isfinite(value):
            raise EvaluationError(f"the reward of {query!r} is {value}")
        return value

    with ThreadPoolExecutor(_REWARD_THREADS) as pool:
        return torch.tensor(list(pool.map(one, queries, prompts, labels)), dtype=torch.float64)


# What is kept between calls.


def fingerprint(model: str | Path) -> str:
    """A hash that changes when any file of a model's folder does: names, sizes and modification times.

    Raises:
        EvaluationError: it is not a folder.
    """
    folder = Path(model)
    if not folder.is_dir():
        raise EvaluationError(f"{folder}: no such folder")
    files = sorted(path for path in folder.iterdir() if path.is_file())
    return fingerprints.of_value([(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files])


def _read(path: Path | None) -> Any:
    return json.loads(path.read_text(encoding="utf-8")) if path is not None and path.is_file() else None


def _write(path: Path | None, value: Any) -> None:
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, json.dumps(value))


def _cached_samples(name: str, model: str | Path, settings: dict[str, Any], cache: Path | None, say: Say) -> Samples:
    from bond_plugin.host import engine

    path = None if cache is None else cache / f"samples-{name}-{fingerprints.of_value(settings)}.json"
    kept = _read(path)
    if kept is not None:
        say(f"{name}: samples reused from {path}")
        return engine.Samples(**kept)
    prompts, count = settings["prompts"], settings["samples"]
    say(f"{name}: sampling {len(prompts)} prompts x {count} from {model} (vLLM starts first)")
    started = time.monotonic()
    drawn = engine.sample(
        model,
        prompts,
        count,
        settings["max_new_tokens"],
        settings["temperature"],
        settings["seed"],
        _ticker(say, name),
    )
    tokens = sum(len(ids) for per_prompt in drawn.response_ids for ids in per_prompt)
    say(f"{name}: {len(prompts) * count} responses, {tokens:,} tokens in {time.monotonic() - started:.0f} s")
    _write(path, vars(drawn))
    return drawn


def _cached_rewards(
    name: str,
    drawn: Samples,
    settings: dict[str, Any],
    reward: str | Path,
    reward_func: RewardFunction,
    prompts: Sequence[str],
    labels: Sequence[Any],
    cache: Path | None,
    say: Say,
) -> Tensor:
    """``[prompts, samples]``. Kept rewards are used if they still hold for a few queries.

    The file's content is part of the key; what it reads itself (a classifier, a server) cannot be.
    """
    import torch

    count = settings["samples"]
    queries = [query for per_prompt in drawn.queries for query in per_prompt]
    of_query = [prompt for prompt in prompts for _ in range(count)]
    label_of_query = [label for label in labels for _ in range(count)]
    key = fingerprints.of_value([settings, list(labels), Path(reward).read_text(encoding="utf-8")])
    path = None if cache is None else cache / f"rewards-{name}-{key}.json"
    kept = _read(path)
    if kept is not None:
        values = torch.tensor(kept, dtype=torch.float64)
        checks = range(0, len(queries), max(1, len(queries) // _SPOT_CHECKS))
        again = score(reward_func, *([column[i] for i in checks] for column in (queries, of_query, label_of_query)))
        if torch.allclose(again, values[list(checks)], rtol=1e-6, atol=1e-9):
            say(f"{name}: rewards reused from {path}")
            return values.reshape(len(prompts), count)
        say(f"{name}: the reward gives other values than before; scoring again")
    started = time.monotonic()
    values = score(reward_func, queries, of_query, label_of_query)
    mean, seconds = values.mean().item(), time.monotonic() - started
    say(f"{name}: {len(queries)} rewards in {seconds:.0f} s, mean {mean:.3f}")
    _write(path, values.tolist())
    return values.reshape(len(prompts), count)


# KL between the models.


def response_kl(
    model: str | Path,
    other: str | Path,
    prompt_ids: Sequence[Sequence[int]],
    response_ids: Sequence[Sequence[Sequence[int]]],
    temperature: float = 1.0,
    progress: Callable[[int, int], None] | None = None,
) -> Tensor:
    """An unbiased estimate of KL(model || other) of whole responses, from responses of ``model``.

    The next token's KL is summed exactly over the vocabulary at each position of a sampled response, and
    these are added up over the response (a Rao-Blackwellised estimate: same mean as log π(y) - log π'(y),
    less variance, never negative):

        sum_t sum_v π(v | x, y_<t) ( log π(v | x, y_<t) - log π'(v | x, y_<t) )

    Both models run in transformers, in float32 without a GPU and in their own dtype with one; logits are
    float32. Both are in memory at the same time.

    Args:
        model, other: folders of models with one vocabulary.
        prompt_ids: [prompts][tokens].
        response_ids: [prompts][s][tokens], sampled from ``model`` at ``temperature``; EOS included.
        temperature: divides the logits of both.
        progress: called with (responses done, responses in all).

    Returns:
        ``[prompts, s]`` float64, in nats.

    Raises:
        EvaluationError: the models' vocabularies differ in size.
    """
    from bond_plugin import likelihood

    try:
        models = likelihood.load(model, other)
    except likelihood.VocabularyError as error:
        raise EvaluationError(str(error)) from error
    return likelihood.measure(models, prompt_ids, response_ids, temperature, progress).kl


# What a reader sees.


def best_of_n_kl(n: int) -> float:
    """The largest KL(Best-of-n || model) possible, log n - (n - 1) / n, in nats (arXiv 2407.14622)."""
    return math.log(n) - (n - 1) / n


def format_table(result: Evaluation) -> str:
    """The result as a plain text table of at most 80 columns, ending without a newline."""

    def row(name: str, reward: Estimate, kl: str, length: str) -> str:
        return f"{name:<18}{reward.mean:>9.3f}   {_interval(reward):<20}{kl:<22}{length:>6}".rstrip()

    kl = f"{result.kl.mean:.2f} {_interval(result.kl, 2)}"
    lines = [
        f"{result.prompts} held-out prompts x {result.samples} samples, "
        f"at most {result.max_new_tokens} new tokens, temperature {result.temperature:g}",
        "",
        f"{'':<18}{'reward':>9}   {'95 % interval':<20}{'KL to initial, nats':<22}{'tokens':>6}",
        row("initial policy", result.reward_before, "0", f"{result.length_before:.1f}"),
    ]
    lines += [
        row(f"  its Best-of-{n}", level, f"at most {best_of_n_kl(n):.2f}", "")
        for n, level in sorted(result.best_of.items())
    ]
    lines += [
        row("trained policy", result.reward_after, kl, f"{result.length_after:.1f}"),
        "",
        f"{'gain':<18}{result.gain.mean:>+9.3f}   {_interval(result.gain)}   prompt by prompt",
        f"{'win rate':<18}{result.win_rate.mean:>9.3f}   {_interval(result.win_rate)}   "
        "trained against initial, ties 1/2",
        "",
        _verdict(result),
    ]
    return "\n".join(lines)


def _interval(estimate: Estimate, digits: int = 3) -> str:
    return f"[{estimate.low:.{digits}f}, {estimate.high:.{digits}f}]"


def _verdict(result: Evaluation) -> str:
    if result.gain.low <= 0 <= result.gain.high:
        return "No difference in reward can be told from these samples."
    if result.gain.high < 0:
        return "The trained policy has less reward than the initial policy."
    levels = {1: result.reward_before, **result.best_of}
    reached = max(n for n, level in levels.items() if n == 1 or level.mean <= result.reward_after.mean)
    missed = [n for n in sorted(levels) if n > reached]
    below = "one sample" if reached == 1 else f"Best-of-{reached}"
    if not missed:
        return f"A trained sample is worth more than {below} of the initial policy."
    return f"A trained sample stands between {below} and Best-of-{missed[0]} of the initial policy."


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """The objects of a ``metrics.jsonl``, by step; a line cut short by a kill is left out.

    Raises:
        EvaluationError: no such file, or no line of it has a step.
    """
    path = Path(path)
    if not path.is_file():
        raise EvaluationError(f"{path}: no such file")
    by_step: dict[float, dict[str, Any]] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            values = json.loads(line)
            by_step[values["step"]] = values
        except (json.JSONDecodeError, KeyError, TypeError):
            continue
    if not by_step:
        raise EvaluationError(f"{path} has no line with a step: is it the metrics.jsonl of a run?")
    return [by_step[step] for step in sorted(by_step)]


def plot_curves(metrics_path: str | Path, output_png: str | Path, evaluation: Evaluation | None = None) -> None:
    """Draw reward, KL and expected log quantile over the steps of a run, each raw and smoothed.

    Args:
        metrics_path: a run's ``metrics.jsonl``: one JSON object a line with ``step`` and any of
            ``reward/policy``, ``reward/anchor``, ``bond/kl_ref``, ``bond/kl_anchor``, ``bond/log_quantile``.
        output_png: the picture to write; an existing one is replaced.
        evaluation: adds the held-out rewards of both models and of Best-of-N as level lines.

    Raises:
        EvaluationError: see :func:`read_metrics`.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    metrics = read_metrics(metrics_path)
    figure = Figure(figsize=(15, 4.8), layout="constrained")
    FigureCanvasAgg(figure)
    reward, kl, quantile = figure.subplots(1, 3)
    _curve(reward, metrics, "reward/anchor", "anchor", _ORANGE)
    _curve(reward, metrics, "reward/policy", "policy", _BLUE)
    if evaluation is not None:
        _levels(reward, evaluation)
    _curve(kl, metrics, "bond/kl_ref", "to the initial policy", _BLUE)
    _curve(kl, metrics, "bond/kl_anchor", "to the anchor", _ORANGE)
    _curve(quantile, metrics, "bond/log_quantile", "policy among anchor samples", _GREEN)
    labels = (
        (reward, "Reward of the training samples", "reward (mean of a step)"),
        (kl, "KL of the policy", "KL (nats a response)"),
        (quantile, "Quantile", "expected log quantile (nats)"),
    )
    for axes, title, unit in labels:
        axes.set(title=title, xlabel="step", ylabel=unit)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(frameon=False, loc="best")
        else:
            axes.text(0.5, 0.5, "not logged in this run", transform=axes.transAxes, ha="center", color=_GREY)
    figure.suptitle(f"{len(metrics)} steps: thin lines are single steps, thick lines their moving average")
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=120, format="png")
    write_whole(Path(output_png), buffer.getvalue())


def _curve(axes: Any, metrics: list[dict[str, Any]], key: str, label: str, colour: str) -> None:
    points = [
        (line["step"], line[key])
        for line in metrics
        if isinstance(line.get(key), (int, float)) and math.isfinite(line[key])
    ]
    if not points:
        return
    steps, values = zip(*points, strict=True)
    reach = max(1, len(values) // 20)  # to either side: a tenth of the run altogether
    smooth = []
    for i in range(len(values)):
        window = values[max(0, i - reach) : i + reach + 1]
        smooth.append(sum(window) / len(window))
    axes.plot(steps, values, color=colour, alpha=0.25, linewidth=1)
    axes.plot(steps, smooth, color=colour, linewidth=2, label=label, marker="o" if len(values) == 1 else None)


def _levels(axes: Any, result: Evaluation) -> None:
    """Held-out rewards as horizontal lines, named at the right edge of the panel."""
    levels = [
        ("before", result.reward_before.mean, _GREY, "-"),
        ("after", result.reward_after.mean, _BLUE, "-"),
    ]
    levels += [(f"Best-of-{n}", level.mean, _GREY, ":") for n, level in sorted(result.best_of.items())]
    for _, height, colour, style in levels:
        axes.axhline(height, color=colour, linestyle=style, linewidth=1.2)
    # Names of levels that lie close together are moved apart, a line's height each.
    low, high = axes.get_ylim()
    step, floor = (high - low) * 0.05, low
    for name, height, colour, _ in sorted(levels, key=lambda level: level[1]):
        floor = max(floor + step, height)
        axes.annotate(
            f"{name} {height:.2f}",
            (1.01, floor),
            xycoords=axes.get_yaxis_transform(),
            va="center",
            fontsize=8,
            color=colour,
            annotation_clip=False,
        )
    axes.annotate("held-out:", (1.01, 1.03), xycoords="axes fraction", fontsize=8, color=_GREY)
