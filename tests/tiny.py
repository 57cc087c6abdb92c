"""A language model small enough for tests of everything around it: 20 words, two layers, random.

Written to a folder as `save_pretrained` would, so that it is loaded the way a user's model is.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

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


def _tokenizer() -> transformers.PreTrainedTokenizerFast:
    vocabulary = {word: i for i, word in enumerate(WORDS)}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="a"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.decoder = decoders.WordPiece(prefix="##")  # joins words with spaces
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, bos_token="<end>", eos_token="<end>", pad_token="<end>"
    )


def write_tiny_model(folder: Path, *, seed: int = 0, context: int = 32) -> Path:
    """A GPT-2 whose samples are nearly uniform over WORDS; `<end>` starts and ends a text."""
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
    with torch.random.fork_rng(range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        model = transformers.GPT2LMHeadModel(config)
    return _write(folder, model, _tokenizer())


def write_tiny_t5(folder: Path, *, seed: int = 0) -> Path:
    """The same of a T5, whose tokenizer ends what the encoder reads with `<end>`."""
    tokenizer = _tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="$A <end>", special_tokens=[("<end>", 0)]
    )
    config = transformers.T5Config(
        vocab_size=len(WORDS),
        d_model=16,
        d_kv=8,
        d_ff=32,
        num_layers=2,
        num_heads=2,
        n_positions=32,
        eos_token_id=0,
        pad_token_id=0,
        decoder_start_token_id=0,
    )
    with torch.random.fork_rng(range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        model = transformers.T5ForConditionalGeneration(config)
    return _write(folder, model, tokenizer)


def _write(folder: Path, model: Any, tokenizer: Any) -> Path:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
