"""The named shapes that benchmarks share: rows of logits (N), vocabulary (V), hidden size (D)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pytest
import torch

from fdpg_fast.ops.matmul import has_16_bit_products

__all__ = ["NEEDS_CUDA", "SHAPES", "Shape", "places", "require_products"]


NEEDS_CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def require_products(compute: str, device: str = "cpu") -> None:
    """Skips a contest in bf16 on a CPU for which torch has no products of it: it takes hours."""
    if device == "cpu" and compute == "bf16" and not has_16_bit_products("bf16"):
        pytest.skip("torch has no bf16 products for this CPU")


@dataclass(frozen=True)
class Shape:
    """Legend: ``rows`` N, ``vocab`` V, ``hidden`` D of the head that makes the logits."""

    rows: int
    vocab: int
    hidden: int

    def __str__(self) -> str:
        return f"[{self.rows}, {self.vocab}]"


SHAPES = {
    # One decoding step of 256 samples of the story models: 14 MB of fp32 logits.
    "stories": Shape(256, 14019, 128),
    # GPT-2: a chunk of the fused head (13 MB), a decoding step (51 MB), a micro-batch (206 MB).
    "gpt2_chunk": Shape(64, 50257, 768),
    "gpt2_decode": Shape(256, 50257, 768),
    "gpt2": Shape(1024, 50257, 768),
    # For machines with an accelerator.
    "gpt2_8k": Shape(8192, 50257, 768),
    "llama3_decode": Shape(256, 128256, 2048),
    "llama3_1b": Shape(2048, 128256, 2048),
    "llama3_8b": Shape(4096, 128256, 4096),
    "gemma2": Shape(2304, 256000, 2304),
}


def places(cpu: Sequence[str], cuda: Sequence[str]) -> list[object]:
    """Parameters ``(name, device)``; those of a GPU are skipped without one."""
    return [
        *(pytest.param(name, "cpu") for name in cpu),
        *(pytest.param(name, "cuda", marks=NEEDS_CUDA) for name in cuda),
    ]
