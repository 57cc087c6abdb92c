"""A language model small enough for tests of everything around it: 20 words, two layers, random.

Written to a folder as `save_pretrained` would, so that it is loaded the way a user's model is.
"""

from __future__ import annotations

from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

WORDS = [
    "<end>",
    "once",
    "there",
    "was",
    "a",
    "dog",
    "cat",
    "she",
    "he",
    "her",
    "his",
    "ran",
    "sat",
    "big",
    "small",
    "sun",
    "moon",
    "and",
    "the",
    "saw",
]


def write_tiny_model(folder: Path, *, seed: int = 0, context: int = 32) -> Path:
    """A GPT-2 whose samples are nearly uniform over WORDS; `<end>` starts and ends a text."""
    vocabulary = {word: i for i, word in enumerate(WORDS)}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="a"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.decoder = decoders.WordPiece(prefix="##")  # joins words with spaces
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, bos_token="<end>", eos_token="<end>", pad_token="<end>"
    )
    config = transformers.GPT2Config(
        vocab_size=len(WORDS),
        n_positions=context,
        n_embd=16,
        n_layer=2,
        n_head=2,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = transformers.GPT2LMHeadModel(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
