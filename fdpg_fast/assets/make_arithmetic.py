"""Makes and measures the embedded arithmetic model: sums in, arithmetic/ out.

    python make_arithmetic.py train --out arithmetic
    python make_arithmetic.py measure --model arithmetic

A text is ``12+35=47`` and an end-of-text token. Every operand has one, two or three digits, which
is drawn first, so short and long sums come equally often. Training stops long before the sums are
learnt: what is wanted is a model that is right now and then.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Sequence
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, GPT2LMHeadModel, PreTrainedTokenizerFast

from fdpg_fast.assets.make_model import END, new_model, save

UNKNOWN = "<|unknown|>"
VOCABULARY = [END, UNKNOWN, *"0123456789", "+", "="]
CONTEXT = 16  # "999+999=1998" and the end are 13
DIGITS = (1, 2, 3)


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A token per character."""
    characters = Tokenizer(
        models.WordLevel({piece: i for i, piece in enumerate(VOCABULARY)}, unk_token=UNKNOWN)
    )
    characters.pre_tokenizer = pre_tokenizers.Split(Regex("."), behavior="isolated")
    characters.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=characters,
        bos_token=END,
        eos_token=END,
        unk_token=UNKNOWN,
        clean_up_tokenization_spaces=False,
    )


def draw_sum(rng: random.Random, digits: tuple[int, int] | None = None) -> tuple[str, str]:
    """``("12+35=", "47")``; a number of several digits does not begin with 0."""
    a, b = (
        rng.randrange(10 ** (n - 1) if n > 1 else 0, 10**n)
        for n in digits or (rng.choice(DIGITS), rng.choice(DIGITS))
    )
    return f"{a}+{b}=", str(a + b)


def rows_of(texts: Sequence[str], tokenizer: PreTrainedTokenizerFast) -> tuple[Tensor, Tensor]:
    """ids ``(B, T)`` padded with END, and which of them are part of a text, END included."""
    rows = [[*tokenizer.encode(text), tokenizer.eos_token_id] for text in texts]
    width = max(map(len, rows))
    ids = torch.tensor([row + [tokenizer.eos_token_id] * (width - len(row)) for row in rows])
    lengths = torch.tensor([len(row) for row in rows])
    return ids, torch.arange(width) < lengths[:, None]


def train(args: argparse.Namespace) -> None:
    torch.manual_seed(args.seed)
    rng = random.Random(args.seed)
    tokenizer = make_tokenizer()
    end: int = tokenizer.eos_token_id
    model = new_model(args, vocabulary=len(VOCABULARY), context=CONTEXT, end=end)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.rate, weight_decay=0.01)
    mean = 0.0
    for step in range(args.steps):
        for group in optimizer.param_groups:  # 100 steps of warm-up, then linearly to zero
            group["lr"] = args.rate * min(1.0, (step + 1) / 100, (1 - step / args.steps) / 0.5)
        ids, used = rows_of(["".join(draw_sum(rng)) for _ in range(args.batch)], tokenizer)
        logits = model(ids, use_cache=False).logits[:, :-1]
        loss = cross_entropy(logits[used[:, 1:]], ids[:, 1:][used[:, 1:]])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        mean += (float(loss.detach()) - mean) / (step % 500 + 1)
        if (step + 1) % 500 == 0:
            print(f"step {step + 1}: loss {mean:.4f}", flush=True)
            mean = 0.0
    save(model, tokenizer, args.out)
    # What is written is JSON with blanks for people; the files are read by programs.
    path = args.out / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text())), encoding="utf-8")


@torch.no_grad()
def log_prob_of_answers(
    model: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerFast, sums: Sequence[tuple[str, str]]
) -> Tensor:
    """``(B,)``: log-probability of the right answer, END included, given its sum."""
    ids, used = rows_of([prompt + answer for prompt, answer in sums], tokenizer)
    begins = torch.tensor([len(prompt) for prompt, _ in sums])
    used &= torch.arange(ids.shape[1]) >= begins[:, None]
    logits: Tensor = model(ids).logits
    logp = logits[:, :-1].log_softmax(-1).gather(2, ids[:, 1:, None])[..., 0]
    return (logp * used[:, 1:]).sum(1)


def measure(args: argparse.Namespace) -> None:
    """How likely the right answer is, which is pass@1, exactly: no sample is drawn."""
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    tokenizer = PreTrainedTokenizerFast.from_pretrained(args.model)
    rng = random.Random(args.seed + 1)
    everything = []
    print("| digits | pass@1 | pass@16 | 10 % | median | 90 % |")
    print("|---|---|---|---|---|---|")
    for digits in [(a, b) for a in DIGITS for b in DIGITS]:
        sums = [draw_sum(rng, digits) for _ in range(args.sums)]
        likely = log_prob_of_answers(model, tokenizer, sums).exp()
        everything.append(likely)
        show(f"{digits[0]} + {digits[1]}", likely)
    show("all", torch.cat(everything))


def show(name: str, likely: Tensor) -> None:
    passes = [(1 - (1 - likely) ** k).mean() for k in (1, 16)]
    columns = [*passes, *likely.quantile(torch.tensor([0.1, 0.5, 0.9]))]
    print("|", " | ".join([name, *(f"{float(value):.3f}" for value in columns)]), "|")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("do", choices=["train", "measure"])
    add = parser.add_argument
    add("--out", type=Path, help="train: folder for the model")
    add("--steps", type=int, default=700, help="train: length of the run")
    add("--batch", type=int, default=256, help="train: sums a step")
    add("--rate", type=float, default=3e-3, help="train: learning rate")
    add("--layers", type=int, default=2)
    add("--width", type=int, default=64)
    add("--heads", type=int, default=4)
    add("--model", type=Path, help="measure: folder of the model")
    add("--sums", type=int, default=1000, help="measure: sums of each pair of lengths")
    add("--threads", type=int, default=1)
    add("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.do == "train" and args.out is None:
        parser.error("train needs --out, the folder to write the model to")
    if args.do == "measure" and args.model is None:
        parser.error("measure needs --model, the folder of a model")
    (train if args.do == "train" else measure)(args)


if __name__ == "__main__":
    main()
