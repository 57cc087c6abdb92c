"""The named shapes that benchmarks share: rows of logits (N), vocabulary (V), hidden size (D)."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["SHAPES", "Shape"]


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
    "llama3_1b": Shape(2048, 128256, 2048),
    "llama3_8b": Shape(4096, 128256, 4096),
    "gemma2": Shape(2304, 256000, 2304),
}
