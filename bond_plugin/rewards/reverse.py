"""What the host's ``train_sft`` needs to train a backward model for ``trlm.py``: reversed tokens and their reader.

    python -m bond_plugin.rewards.reverse MODEL DATA --output FOLDER

reads JSON lines with a prompt and a response, and writes FOLDER/data.jsonl, each row's tokens in reverse and written
as numbers, and FOLDER/model: MODEL with a tokenizer that reads such numbers as the tokens they stand for. Reversed
text would be no substitute: its tokens are others.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from bond_plugin.files import parse_json, write_whole
from bond_plugin.rewards.trlm import reversed_row

EOS = "eos"


def number_tokenizer(size: int, eos: int) -> Any:
    """A tokenizer of texts such as ``17 4 512``: each word is the token of that number, ``eos`` the one that ends."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {EOS if token == eos else str(token): token for token in range(size)}
    made = Tokenizer(models.WordLevel(words))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token=EOS, pad_token=EOS)


def written(tokens: list[int], eos: int) -> str:
    return " ".join(EOS if token == eos else str(token) for token in tokens)


def main(argv: list[str]) -> int:
    """Write the data and the model. Returns the exit status (2 for data that cannot be used)."""
    parser = argparse.ArgumentParser(
        prog="python -m bond_plugin.rewards.reverse", description=__doc__.splitlines()[0]
    )
    parser.add_argument("model", help="folder of a causal language model: the start, and the tokenizer")
    parser.add_argument("data", type=Path, help="JSON lines with a prompt and a response each")
    parser.add_argument("--output", type=Path, required=True, help="folder to write data.jsonl and model/ into")
    parser.add_argument("--prompt-key", default="prompt", help="default: prompt")
    parser.add_argument("--response-key", default="response", help="default: response")
    parser.add_argument("--from-scratch", action="store_true", help="random weights, of the model's shape")
    args = parser.parse_args(argv)
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    eos, lines, longest = tokenizer.eos_token_id, [], 0
    for number, line in enumerate(args.data.read_bytes().splitlines(), 1):
        try:
            row = parse_json(line)
            given, asked = reversed_row(tokenizer, row[args.prompt_key].strip(), row[args.response_key].strip())
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            wanted = f"'{args.prompt_key}' and '{args.response_key}' must be texts"
            print(f"{args.data}, line {number}: {wanted} ({error!r})", file=sys.stderr)
            return 2
        lines.append(json.dumps({"response": written(given, eos), "query": " " + written(asked, eos)}) + "\n")
        longest = max(longest, len(given) + len(asked) + 1)
    if args.from_scratch:
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(args.model))
    else:
        model = AutoModelForCausalLM.from_pretrained(args.model)
    model.save_pretrained(args.output / "model")
    number_tokenizer(model.config.vocab_size, eos).save_pretrained(args.output / "model")
    write_whole(args.output / "data.jsonl", "".join(lines))
    print(
        f"{args.output}: {len(lines)} rows, the longest of {longest} tokens: train with --data.max_len {longest + 1}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
