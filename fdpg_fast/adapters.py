"""Adapters of the package peft (LoRA and its relatives) on weights that are not copied.

A model with an adapter is a second tree of modules over the same weights: the tree of the base has
no adapter in it, so a(x) and pi(x) need no switch, and nothing can be merged by mistake. peft is
optional, and imported only here.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import json
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.utils.peft_utils import find_adapter_config_file

__all__ = ["AdapterError", "attach", "base_of", "load", "names", "save"]


class AdapterError(RuntimeError):
    """An adapter that cannot be made or read; the message names it and the way out."""


def config_class(kind: str) -> type[Any]:
    """What peft configures a kind of adapter with.

    Raises:
        AdapterError: peft is missing, or the kind cannot be used.
    """
    mapping = _peft().mapping.PEFT_TYPE_TO_CONFIG_MAPPING
    kinds: dict[str, type[Any]] = {str(k.value).lower(): v for k, v in mapping.items()}
    made = kinds.get(kind.lower())
    if made is None:
        raise AdapterError(f"adapter {kind!r}: peft has no such kind. It has: {', '.join(kinds)}")
    if kind.lower() == "adalora":
        raise AdapterError("adapter 'adalora': its ranks change while it learns. Way out: lora")
    return made


def attach(
    model: Any,
    kind: str,
    *,
    rank: int,
    alpha: float,
    target_modules: str | Sequence[str],
    options: Mapping[str, Any],
    seed: int,
) -> Any:
    """A new adapter over the weights of ``model``, which is left as it is.

    Args:
        model: a transformers model.
        kind: as peft calls it, in any case: ``"lora"``.
        rank, alpha: given to kinds that have them.
        target_modules: ends of names of the layers that get one, or ``"all-linear"``.
        options: further settings of the kind's config class in peft.
        seed: of its random weights.

    Returns:
        The ``PeftModel``; its ``get_base_model()`` is the tree with the adapter in it.

    Raises:
        AdapterError: peft is missing, or cannot make this adapter for this model.
    """
    peft, made = _peft(), config_class(kind)
    known = {field.name for field in dataclasses.fields(made)}
    targets = target_modules if isinstance(target_modules, str) else list(target_modules)
    given = {"r": rank, "lora_alpha": alpha, "alpha": alpha, "target_modules": targets}
    settings = {name: value for name, value in given.items() if name in known} | dict(options)
    unknown = [name for name in settings if name not in known]
    if unknown:
        raise AdapterError(
            f"adapter {kind!r}: unknown option {unknown[0]!r}. {made.__name__} has: "
            f"{', '.join(sorted(known))}"
        )
    try:
        task = "SEQ_2_SEQ_LM" if model.config.is_encoder_decoder else "CAUSAL_LM"
        config = made(task_type=task, **settings)
        if config.is_prompt_learning:
            raise ValueError("it adds to the prompt, where f-DPG needs one in the layers")
        # Named, or torch warns where there are many.
        with torch.random.fork_rng(range(torch.cuda.device_count())), _quiet():
            torch.manual_seed(seed)
            adapted = peft.get_peft_model(_second_tree(model), config)
    except Exception as error:  # peft raises many types, all of them for bad settings
        raise AdapterError(
            f"adapter {kind!r}: cannot be put on {type(model).__name__}: {error}. Way out: other "
            "target modules or options; `print(model)` shows the names of the layers"
        ) from error
    own = set(names(adapted))
    named = adapted.get_base_model().named_parameters()
    borrowed = [name for name, p in named if p.requires_grad and name not in own]
    if borrowed:
        raise AdapterError(
            f"adapter {kind!r}: also trains weights of the base, such as {borrowed[0]}, which the "
            "base a(x) must keep. Way out: leave out the option that asks for it, such as `bias`"
        )
    return adapted


def load(model: nn.Module, folder: str) -> Any:
    """An adapter that was saved, over the weights of ``model``, which is left as it is.

    Raises:
        AdapterError: peft is missing, or the adapter is not one for this model.
    """
    peft = _peft()
    try:
        with _quiet():
            return peft.PeftModel.from_pretrained(_second_tree(model), folder)
    except Exception as error:
        raise AdapterError(
            f"adapter {folder!r}: cannot be put on {type(model).__name__}: {error}. Way out: load "
            "the model that it was trained on"
        ) from error


def save(adapted: Any, folder: str) -> None:
    """Write the adapter alone, and the name of the base it belongs to."""
    for config in adapted.peft_config.values():
        base = config.base_model_name_or_path
        if base and Path(base).is_dir():
            config.base_model_name_or_path = str(Path(base).resolve())
    # Not "auto", which asks the hub whether the embeddings have grown.
    adapted.save_pretrained(folder, save_embedding_layers=False)


def names(adapted: Any) -> list[str]:
    """The parameters that are the adapter's own, as ``get_base_model()`` names them."""
    named = adapted.get_base_model().named_parameters()
    return [name for name, _ in named if adapted.active_adapter in name.split(".")]


def base_of(name_or_path: str) -> str | None:
    """The name of the model that an adapter belongs to; None if it is no adapter."""
    found = find_adapter_config_file(name_or_path)
    if found is None:
        return None
    base = json.loads(Path(found).read_text(encoding="utf-8")).get("base_model_name_or_path")
    if not base:
        raise AdapterError(
            f"adapter {name_or_path!r}: does not say which model it belongs to. Way out: put the "
            "model's name or folder in adapter_config.json, as base_model_name_or_path"
        )
    return str(base)


def _second_tree(model: nn.Module) -> nn.Module:
    """The same modules over the same storage, frozen; tied weights stay tied."""
    shared = {id(p): nn.Parameter(p.detach(), requires_grad=False) for p in model.parameters()}
    return copy.deepcopy(model, shared)


def _peft() -> Any:
    try:
        import peft
    except ImportError as error:
        raise AdapterError(
            "adapters need the package peft, which is not installed. Way out: pip install peft"
        ) from error
    return peft


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without what peft says that no user of ours can act on."""
    with warnings.catch_warnings():
        # It sets fan_in_fan_out as GPT-2's layers need it, and says so.
        warnings.filterwarnings("ignore", message="fan_in_fan_out is set to")
        # It uses names that transformers is about to drop.
        warnings.filterwarnings("ignore", category=FutureWarning)
        yield
