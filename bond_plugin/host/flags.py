"""The host's parser, extended: our algorithms as choices, their settings as ``--bond.*``, recipes, dry runs.

The host builds its parser and checks its arguments under ``if __name__ == "__main__"``. So the extension
happens when that parser is asked to parse: it is recognised by ``--algo.advantage.estimator``.
"""

from __future__ import annotations

import argparse
import functools
import re
import sys
from dataclasses import dataclass
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from bond_plugin import recipe as recipes
from bond_plugin import registry
from bond_plugin.host import cpu, inputs, on_cpu
from bond_plugin.options import add_flag, at_least, last_value
from bond_plugin.words import did_you_mean

if TYPE_CHECKING:
    from bond_plugin.algorithms.base import Algorithm, RewardTransform

ESTIMATOR = "--algo.advantage.estimator"
POLICY_LOSS = "--actor.policy_loss_type"
TRANSFORM = "--reward.transform"
REWARD_CACHE = "--bond.reward_cache"


@dataclass
class Invocation:
    """What this process was asked to run, for the hooks that act later.

    Attributes:
        given: destinations of the flags that the user or the recipe gave.
        dry_run: print the configuration and stop before Ray starts.
        json: a file to write it to, too.
        caching: make a reward cache instead of training.
        args: the host's nested arguments, once the host has made them.
        critic: the value of ``--critic.model_name_or_path``, which the host forgets for estimators other than
            ``gae``.
    """

    given: frozenset[str]
    dry_run: bool
    json: str | None
    caching: bool
    args: SimpleNamespace | None = None
    critic: str | None = None


_current: Invocation | None = None


def current() -> Invocation | None:
    """The invocation of this process, or ``None`` where the host's parser has not run (in every worker)."""
    return _current


def algorithm_class(name: str) -> type[Algorithm] | None:
    """The algorithm ``name``, registered or an import path, or ``None`` if the name is one of the host's own."""
    if ":" not in name and name not in registry.names(registry.ADVANTAGE_ESTIMATORS):
        return None
    from bond_plugin.algorithms.base import Algorithm  # torch: only where an algorithm is wanted

    return registry.load_class(registry.ADVANTAGE_ESTIMATORS, name, Algorithm)


def transform_class(name: str) -> type[RewardTransform]:
    """The reward transform registered under ``name``."""
    from bond_plugin.algorithms.base import RewardTransform

    return registry.load_class(registry.REWARD_TRANSFORMS, name, RewardTransform)


@functools.cache  # once a process
def extend_parsers() -> None:
    """Let the host's parser know our flags as soon as it parses."""
    original = argparse.ArgumentParser.parse_args

    @functools.wraps(original)
    def parse_args(self: argparse.ArgumentParser, args: Any = None, namespace: Any = None) -> Any:
        if ESTIMATOR not in self._option_string_actions:
            if on_cpu():
                cpu.offer_fp32(self)
            return original(self, args, namespace)
        return _parse_host(self, list(sys.argv[1:] if args is None else args), namespace)

    argparse.ArgumentParser.parse_args = parse_args


def _parse_host(parser: argparse.ArgumentParser, argv: list[str], namespace: Any) -> Any:
    global _current
    caching = parser.prog == CACHE
    parser.allow_abbrev = False
    if parser.prog.startswith("bond") and not caching:
        parser.prog = "bond train"
        parser.usage = "bond train [--recipe FILE.yaml] [--flag value ...]; --help explains every flag"
    parser._negative_number_matcher = re.compile(r"-\.?\d")  # argparse's own takes -1e-4 for a flag
    try:
        _add_choices(parser, ESTIMATOR, registry.ADVANTAGE_ESTIMATORS)
        _add_choices(parser, POLICY_LOSS, registry.POLICY_LOSSES)
        add_flags(parser, "launch", RUN_FLAGS)
        if not {"--help", "-h"} & set(argv):
            _limit_choices(parser)  # imports much, and the help does not show them
        if caching:
            parser.description, parser.epilog, parser.usage = _CACHE_DESCRIPTION, _CACHE_EPILOG, _CACHE_USAGE
            parser.formatter_class = argparse.RawDescriptionHelpFormatter
            add_flags(parser, "cache", CACHE_FLAGS)

        path = recipes.path_from(argv)
        from_recipe = recipes.read(path) if path else {}
        estimator = recipes.said(ESTIMATOR, argv, from_recipe) or parser.get_default(ESTIMATOR[2:])
        if ":" in estimator:  # an import path
            parser._option_string_actions[ESTIMATOR].choices.append(estimator)
        selected = algorithm_class(estimator)
        configured = [] if selected is None else [(estimator, "bond", selected)]
        transform = recipes.said(TRANSFORM, argv, from_recipe)
        if selected is not None and last_value(argv, TRANSFORM) is None and last_value(argv, ESTIMATOR) is not None:
            transform = None  # the recipe's goes with the estimator that the command line replaces
        if transform in registry.names(registry.REWARD_TRANSFORMS):  # if it is not, the parser says so
            if selected is not None:
                parser.error(
                    f"{TRANSFORM} {transform} is for the host's own estimators, not for {ESTIMATOR} {estimator}: "
                    "drop one of the two"
                )
            configured.append((transform, transform, transform_class(transform)))
        for one in configured:
            _add_config_flags(parser, *one)
        if path:
            from_recipe = _without_replaced(from_recipe, estimator, transform, parser)
            argv = recipes.to_argv(from_recipe, parser, path) + argv
        argv = recipes.expand_booleans(argv, parser)
    except (registry.RegistryError, recipes.RecipeError) as error:
        parser.error(str(error))

    parsed, unknown = parser.parse_known_args(argv, namespace)
    if unknown:
        parser.error(_explain_unknown(unknown, parser, estimator))
    if vars(parsed).get("reward.remote_url") == "":  # a recipe's is taken back; the host would call a nameless server
        vars(parsed)["reward.remote_url"] = None
    try:
        if caching:
            _settle_output(vars(parsed))
        for _, prefix, found in configured:
            found.Config.from_flags(vars(parsed), prefix)
    except ValueError as error:
        parser.error(str(error))
    given = frozenset(
        action.dest
        for token in argv
        if (action := parser._option_string_actions.get(token.partition("=")[0])) is not None
    )
    if parsed.json and not parsed.dry_run:
        parser.error("--json FILE is for --dry-run: add that, or drop it")
    _current = Invocation(given, parsed.dry_run, parsed.json, caching)
    del parsed.dry_run, parsed.json, parsed.recipe
    return parsed


def _without_replaced(
    flat: dict[str, Any], estimator: str, transform: str | None, parser: argparse.ArgumentParser
) -> dict[str, Any]:
    """A recipe without the settings of an algorithm or transform which the command line replaces; a line says so."""
    kept = dict(flat)
    for flag, now, group, classes in (
        (ESTIMATOR, estimator, "bond", algorithm_class),
        (TRANSFORM, transform, flat.get(TRANSFORM[2:]), transform_class),
    ):
        was = flat.get(flag[2:])
        if not isinstance(was, str) or was == now:
            continue
        found = classes(was)
        options = found.Config.options(group) if found is not None else {}
        aside = [name for name in kept if name in options and f"--{name}" not in parser._option_string_actions]
        if flag == TRANSFORM:
            aside.append(flag[2:])
        for name in aside:
            del kept[name]
        if aside:
            names = ", ".join(f"--{name}" for name in aside)
            print(f"bond: note: of the recipe {names} are set aside: they go with {flag} {was}", flush=True)
    return kept


def remember_arguments(original: Any, args: argparse.Namespace) -> SimpleNamespace:
    """Keep the host's nested arguments: the host goes on to complete them, and the launch reads them."""
    nested = original(args)
    _complete_older_hosts(nested)
    if _current is not None and hasattr(args, ESTIMATOR[2:]):
        _current.args = nested
        _current.critic = nested.critic.model_name_or_path
        refuse([*inputs.numbers(nested, _current.given), *inputs.stumbles(nested)])
    return nested


def refuse(problems: list[str]) -> None:
    """If there are any, print the list and exit with status 2."""
    if problems:
        lines = "\n".join(f"  - {problem}" for problem in problems)
        print(f"bond: error: this run cannot start:\n{lines}", file=sys.stderr, flush=True)
        raise SystemExit(2)


def _complete_older_hosts(args: SimpleNamespace) -> None:
    """What OpenRLHF 0.11.0 and 0.11.1 do, under the names of the flags of 0.11.2."""
    advantage = inputs.value(args, "algo.advantage")
    if advantage is None:
        return  # one of the host's other trainers
    corrects = getattr(advantage, "is_correction_enable", False)
    vars(advantage).setdefault("is_correction_level", "token" if corrects else "off")
    vars(args.actor).setdefault("loss_agg_mode", "token-mean")
    vars(args.algo.kl).setdefault("unbiased_gradient", False)


def _limit_choices(parser: argparse.ArgumentParser) -> None:
    """Names that the host would look up when its workers run already."""
    from deepspeed.runtime.config import DtypeEnum
    from torch.distributed import Backend
    from transformers.trainer_utils import SchedulerType

    # The two that are left out want a metric at each step, which the host does not give.
    schedulers = [one.value for one in SchedulerType if one.value not in ("reduce_lr_on_plateau", "greedy")]
    for option, choices in {
        "--actor.lr_scheduler": schedulers,
        "--critic.lr_scheduler": schedulers,
        "--ds.grad_accum_dtype": [
            name for name in DtypeEnum._value2member_map_ if isinstance(name, str) and "int" not in name
        ],
        "--vllm.sync_backend": [
            name for name in Backend.backend_list if name in ("nccl", "gloo", "xccl", "ucc", "mpi")
        ],
    }.items():
        action = parser._option_string_actions[option]
        action.choices, action.metavar = choices, action.metavar or "NAME"


def _add_choices(parser: argparse.ArgumentParser, option: str, group: str) -> None:
    action, names = parser._option_string_actions[option], registry.names(group)
    taken = sorted(set(names) & set(action.choices or ()))
    if taken:
        raise registry.RegistryError(
            f"the entry-point group '{group}' registers {', '.join(taken)}, which is a name of the host's own"
        )
    action.choices = [*(action.choices or ()), *names]
    if names:
        action.help = f"{action.help or ''} From installed plugins: {', '.join(names)}.".strip()
        if option == ESTIMATOR:
            action.help += " Or package.module:Class, a subclass of bond_plugin.algorithms.Algorithm."


#: Our flags that do not depend on the algorithm, as ``add_argument`` takes them; the default says the type.
#: docs/pages.py lists them.
RUN_FLAGS: dict[str, dict[str, Any]] = {
    "--recipe": {
        "metavar": "FILE.yaml",
        "help": "take flags from a recipe: the dotted flags as nested YAML. Flags on the command line win",
    },
    "--dry-run": {
        "action": "store_true",
        "help": "check everything, print the final configuration and the state of each hook, and stop before Ray",
    },
    "--json": {"metavar": "FILE.json", "help": "write what --dry-run prints to a file as JSON, too"},
    TRANSFORM: {
        "help": "replace the reward by one that is made of it, under any of the host's own estimators; the "
        "transform's own flags appear with it",
    },
    "--bond.device": {
        "choices": ("auto", "cpu", "cuda"),
        "default": "auto",
        "help": "auto: cuda if this machine sees a GPU or RAY_ADDRESS names a cluster, else cpu",
    },
    "--bond.strict": {
        "action": "store_true",
        "help": "flags of the script that have no meaning under the algorithm are errors; without, they are set "
        "aside, and a line at the start names each",
    },
    "--reward.timeout": {
        "type": float,
        "metavar": "SECONDS",
        "help": "end the run when the reward of one response takes longer (default: wait, and say so once a minute)",
    },
    "--bond.require_checkpoint": {
        "action": "store_true",
        "help": "with --ckpt.load_enable: stop if --ckpt.path holds no whole checkpoint, instead of starting at step "
        "0",
    },
    "--ckpt.save_on_stop": {
        "action": "store_true",
        "help": "on Ctrl-C or SIGTERM to this command finish the step, save a checkpoint, and only then end; a "
        "second one ends at once",
    },
    "--ref.model_name_or_path": {
        "help": "another model than the initial policy for the reference: of the host's own estimators their KL is "
        "to it, and algorithms that ask for a teacher have it there. Of any size, with the policy's vocabulary",
    },
    "--ref.update": {
        "choices": ("none", "ema", "periodic"),
        "default": "none",
        "help": "for the host's own estimators: the reference of the KL follows the policy, as its moving average "
        "or as a copy of it from time to time, instead of staying the initial policy. It is kept beside the "
        "policy in fp32, so no reference model is loaded",
    },
    "--ref.eta": {"default": 0.02, "help": "step of --ref.update ema each optimiser step, in (0, 1]"},
    "--ref.interval": {"default": 50, "help": "optimiser steps between two copies of --ref.update periodic, >= 1"},
    "--bond.logits_mb": {
        "default": 256.0,
        "metavar": "MIB",
        "help": "of the policy and the reference only the logits of response tokens are computed, at most so many "
        "MiB of them in fp32 at a time: the same numbers, faster and from less memory, for every estimator. 0: the "
        "host's own way, all tokens at once (default: %(default)g)",
    },
    "--bond.sync_mb": {
        "default": 256.0,
        "metavar": "MIB",
        "help": "weights go to the rollout engines this much at a time, instead of one tensor after the other. 0: "
        "the host's own way (default: %(default)g)",
    },
    "--bond.save_anchor": {
        "default": False,
        "help": "save the anchor beside the final policy, in <ckpt.output_dir>/anchor",
    },
    "--bond.cache_samples": {
        "default": 0,
        "metavar": "M",
        "help": f"how many samples a prompt of {REWARD_CACHE} are used; 0: as many as every prompt has",
    },
    "--bond.reward_cache_mismatch": {
        "choices": ("error", "warn"),
        "default": "error",
        "help": f"what to do when {REWARD_CACHE} was made with another model, reward, temperature, length or "
        "template",
    },
}


#: The name under which ``bond cache`` runs the host's parser.
CACHE = "bond cache"

_CACHE_DESCRIPTION = """\
Sample M responses a prompt from the initial policy, score them by the run's reward, and write a file of JSON lines
that `bond train --bond.reward_cache FILE` reads: once for all runs with the same prompts, model and reward.

Takes the flags, or the recipe, of the training run, so that prompts, template, tokenizer, sampling and reward are the
same; those that say nothing about them are checked and not used. If it is interrupted, the same command goes on
where it was. Needs no Ray.
"""

_CACHE_USAGE = f"{CACHE} [the flags of the training run] --cache.output FILE [--cache.samples M] [--cache.seed S]"
_CACHE_EPILOG = """\
examples:
  bond cache --recipe FILE.yaml --cache.output rewards.jsonl
  bond train --recipe FILE.yaml --bond.reward_cache rewards.jsonl
"""


CACHE_FLAGS: dict[str, dict[str, Any]] = {
    "--cache.output": {
        "metavar": "FILE.jsonl",
        "help": f"the file to write, or to go on with (default: what {REWARD_CACHE} says)",
    },
    "--cache.samples": {
        "default": 300,
        "metavar": "M",
        "help": "samples a prompt; the vBoN paper found about 300 to be enough (default: %(default)s)",
    },
    "--cache.seed": {
        "default": 0,
        "metavar": "S",
        "help": "of the sampling: the same seed gives the same samples (default: %(default)s)",
    },
    "--cache.responses": {
        "default": True,
        "help": "write the responses beside their rewards; training does not read them (default: yes)",
    },
    "--cache.log_probs": {
        "default": False,
        "help": "write each response's tokens and their log-probabilities too, for algorithms that train on stored "
        "responses (default: no)",
    },
    "--cache.responses_key": {
        "metavar": "COLUMN",
        "help": "sample nothing: take the responses from this column of the prompt data, a list of texts (or one); "
        "of those that fit --rollout.max_new_tokens the first M a prompt",
    },
    "--cache.rewards_key": {
        "metavar": "COLUMN",
        "help": "score nothing: take the rewards of those responses from this column, a list as long (or one number)",
    },
    "--cache.chunk": {
        "default": 0,
        "metavar": "RESPONSES",
        "help": "how many responses are sampled at a time, rounded up to whole prompts: what is lost when it is "
        "stopped (default: 4096 with a GPU, 512 without)",
    },
}


def add_flags(parser: argparse.ArgumentParser, title: str, flags: dict[str, dict[str, Any]]) -> None:
    group = parser.add_argument_group(f"openrlhf-bond: {title}")
    for option, said in flags.items():
        default, kind = said.get("default"), {}
        if isinstance(default, bool):
            kind = {"action": argparse.BooleanOptionalAction}
        elif default is not None:
            kind = {"type": type(default)}
        elif option == TRANSFORM:
            kind = {"choices": list(registry.names(registry.REWARD_TRANSFORMS))}
        group.add_argument(option, **kind, **said)


def _settle_output(values: dict[str, Any]) -> None:
    """The run's reward cache and the file to write are each other's default."""
    output, read = "cache.output", REWARD_CACHE[2:]
    values[output] = values[output] or values.get(read)
    if not values[output]:
        raise ValueError(f"--{output} is missing: the file to write, for {REWARD_CACHE} of the training run")
    if read in values:
        values[read] = values[read] or values[output]
    if bool(values["cache.responses_key"]) != bool(values["cache.rewards_key"]):
        raise ValueError("--cache.responses_key and --cache.rewards_key go together: give both, or neither")
    at_least(values, {"cache.samples": 1, "cache.seed": 0, "cache.chunk": 0})
    if values["cache.seed"] >= 2**32:
        raise ValueError(f"--cache.seed must be below 2^32, got {values['cache.seed']}")


def _add_config_flags(parser: argparse.ArgumentParser, name: str, prefix: str, found: type) -> None:
    group = parser.add_argument_group(f"openrlhf-bond: {name} ({found.__module__})")
    for dotted, f in found.Config.options(prefix).items():
        option = f"--{dotted}"
        if option in parser._option_string_actions:
            raise registry.RegistryError(
                f"'{name}' defines {option}, which every algorithm has already; rename the field"
            )
        add_flag(group, dotted, f)


def _explain_unknown(unknown: list[str], parser: argparse.ArgumentParser, estimator: str) -> str:
    algorithms, transforms = registry.names(registry.ADVANTAGE_ESTIMATORS), registry.names(registry.REWARD_TRANSFORMS)
    known = [
        *((f"{ESTIMATOR} {name}", algorithm_class(name).Config.options("bond")) for name in algorithms),
        *((f"{TRANSFORM} {name}", transform_class(name).Config.options(name)) for name in transforms),
    ]
    messages = []
    for token in unknown:
        option = token.partition("=")[0]
        owners = [owner for owner, options in known if option[2:] in options]
        if not option.startswith("--"):
            messages.append(f"unexpected argument '{token}'")
        elif owners:
            messages.append(
                f"{option} belongs to {' and '.join(owners)}, but {ESTIMATOR} is {estimator}: pass "
                f"{' or '.join(owners)}, or drop {option}"
            )
        else:
            messages.append(f"unknown flag {option}{did_you_mean(option, parser._option_string_actions)}")
    return "; ".join(messages)
