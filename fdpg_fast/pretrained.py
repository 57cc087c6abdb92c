"""A pretrained model as it comes from transformers: where the package has one, what its configs say
and leave out, and what is taken from it before it is used.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Any, Literal, get_args

import torch
import transformers
from torch import Tensor, nn

from fdpg_fast._build import refusal_of_gpu
from fdpg_fast.ops.matmul import gpu_has_bf16, has_16_bit_products

__all__ = [
    "EMBEDDED",
    "MADE_BY",
    "UNLIMITED",
    "Compute",
    "ModelError",
    "checkpoint_activations",
    "compute_of",
    "context_length",
    "counting_limit",
    "device_of",
    "embedded_model",
    "eos_ids_of",
    "expect_no_mask",
    "first_line",
    "no_progress_bar",
    "remove_dropout",
    "rope_limit",
    "why_not_loaded",
]

Compute = Literal["auto", "fp32", "bf16", "fp16"]

# Models inside the package: name -> folder of assets/.
EMBEDDED = {"default": "model", "embedded:arithmetic": "arithmetic"}

# Most tokens that a model can read, if nothing in it says how many.
UNLIMITED = 1 << 30

# Who made a saved model, in its generation config: the ids there that end a sample are all.
MADE_BY = "fdpg_fast"


class ModelError(RuntimeError):
    """A model that cannot be loaded or used; the message names it and the way out."""


def embedded_model(folder: str) -> str:
    path = Path(str(resources.files("fdpg_fast"))) / "assets" / folder
    if not (path / "config.json").is_file():
        raise ModelError(
            f"the embedded model is missing from {path}: the installation is incomplete. "
            "Install again, or name a model."
        )
    return str(path)


def why_not_loaded(name: str, error: Exception) -> str:
    if Path(name).is_dir():
        remedy = "Is it a folder that save_pretrained wrote, with config, weights and tokenizer?"
        if "trust_remote_code" in str(error):
            remedy = "Set trust_remote_code if you trust the Python code it brings."
        return f"model {name!r}: cannot be loaded: {first_line(error)}. {remedy}"
    return (
        f"model {name!r}: no such folder here, and as a Hugging Face name it cannot be loaded: "
        f"{first_line(error)}. Check the spelling; without a network give a local folder, set "
        "HF_HOME to a cache that has it, or leave the name empty for the embedded story model."
    )


def first_line(error: Exception) -> str:
    text = str(error).strip()
    return text.splitlines()[0].rstrip(".") if text else type(error).__name__


@contextlib.contextmanager
def no_progress_bar() -> Iterator[None]:
    """Of transformers, for reading or writing a file."""
    log = transformers.utils.logging
    shown = log.is_progress_bar_enabled()
    log.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            log.enable_progress_bar()


def device_of(name: str | torch.device) -> torch.device:
    if str(name) == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
        if name == "cuda" and (why := refusal_of_gpu(torch.cuda.get_device_capability())):
            name = "cpu"
            warnings.warn(f"the GPU is not used: {why}", RuntimeWarning, stacklevel=4)
    expected = "device: expected auto, cpu, cuda or cuda:N"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ModelError(f"{expected}, got {name!r}") from error
    if device.type not in ("cpu", "cuda"):
        raise ModelError(f"{expected}, got {str(name)!r}, which has no kernels of ours")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ModelError(f"device {name!r}: this torch sees no GPU. Use 'auto' or 'cpu'.")
    if device.type == "cuda" and (device.index or 0) >= (count := torch.cuda.device_count()):
        raise ModelError(f"device {str(name)!r}: expected cuda:0 to cuda:{count - 1}. Use 'auto'.")
    if device.type == "cuda" and (why := refusal_of_gpu(torch.cuda.get_device_capability(device))):
        raise ModelError(f"device {str(name)!r}: {why}")
    if device.type == "cuda" and device.index is None:  # as tensors there say of themselves
        return torch.device("cuda", torch.cuda.current_device())
    return device


def compute_of(wanted: str, device: torch.device) -> str:
    if wanted not in get_args(Compute):
        raise ModelError(f"compute: expected {', '.join(get_args(Compute))}, got {wanted!r}")
    if wanted != "auto":
        if wanted != "fp32" and device.type == "cpu" and not has_16_bit_products(wanted):
            warnings.warn(
                f"compute: torch has no {wanted} products for this CPU, and what it does instead "
                "can take a hundred times as long as fp32. Use compute fp32, which is also more "
                "exact.",
                RuntimeWarning,
                stacklevel=4,
            )
        return wanted
    return "bf16" if device.type == "cuda" and gpu_has_bf16(device) else "fp32"


def remove_dropout(model: nn.Module) -> None:
    """Set every dropout to zero: pi(x) must be one number, the same in each pass."""
    config = getattr(model, "config", None)
    for part in (config, *model.modules()):
        for name, value in list(vars(part).items()) if part is not None else []:
            if "drop" in name and isinstance(value, float):
                setattr(part, name, 0.0)
        if isinstance(part, nn.modules.dropout._DropoutNd):
            part.p = 0.0


def expect_no_mask(model: nn.Module) -> None:
    """Have transformers not ask, in every forward pass, whether a text without a mask begins or
    ends with its padding id. Here one may: as the begin-of-text token that the same id often is, or
    as padding on the right, which causal attention never sees."""
    for module in model.modules():
        if hasattr(module, "warn_if_padding_and_no_attention_mask"):
            vars(module)["warn_if_padding_and_no_attention_mask"] = _no_question


def _no_question(input_ids: Tensor, attention_mask: Tensor | None) -> None: ...


def checkpoint_activations(model: Any) -> None:
    options = {"use_reentrant": False}
    if hasattr(model, "activation_checkpointing_enable"):  # the name since transformers 5.2x
        model.activation_checkpointing_enable(activation_checkpointing_kwargs=options)
    else:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)


def context_length(config: Any, tokenizer: Any) -> int:
    # T5 knows of two tokens only how far apart they are: n_positions, and the length that its
    # tokenizer speaks of, are those that it was trained on.
    if hasattr(config, "relative_attention_num_buckets"):
        return UNLIMITED
    for name in ("max_position_embeddings", "n_positions", "max_seq_len"):
        length = getattr(config, name, None)
        if isinstance(length, int) and length > 0:
            return length
    length = getattr(tokenizer, "model_max_length", None)
    return length if isinstance(length, int) and 0 < length < UNLIMITED else UNLIMITED


def rope_limit(config: Any) -> int | None:
    """The longest text whose rotary positions do not depend on what it is batched with. Those of
    longrope are scaled once any text is longer; of dynamic NTK as well, but that limit is
    ``max_position_embeddings``, as of every model."""
    rope, name = getattr(config, "rope_parameters", None) or {}, "original_max_position_embeddings"
    each = [rope, *(own for own in rope.values() if isinstance(own, dict))]  # by kind of layer
    long = [own for own in each if own.get("rope_type") == "longrope"]
    return min((own.get(name) or getattr(config, name) for own in long), default=None)


def counting_limit(config: Any) -> int | None:
    """The longest text that Llama 4 reads right from slots. From position ``floor_scale - 1`` on it
    scales attention by the position, and asks the cache how many tokens are before it: one number,
    where each slot has its own, so theirs says 0."""
    scales = getattr(config, "attn_temperature_tuning", False)
    return config.floor_scale - 1 if scales else None


def eos_ids_of(model: Any, tokenizer: Any, vocab_size: int) -> tuple[int, ...]:
    """The ids that :meth:`LanguageModel.save` has written, or all that anything in the checkpoint
    calls end-of-text. Each source may name one or many, or (a config's default) one that the
    vocabulary does not have."""
    generation = getattr(model, "generation_config", None)
    saved_by_us = getattr(generation, "made_by", None) == MADE_BY
    ids: list[int] = []
    for source in (generation,) if saved_by_us else (generation, model.config, tokenizer):
        named = getattr(source, "eos_token_id", None)
        ids += named if isinstance(named, (list, tuple)) else [named] if named is not None else []
    return tuple(dict.fromkeys(i for i in ids if 0 <= i < vocab_size))
