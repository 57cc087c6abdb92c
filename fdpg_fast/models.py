"""A language model of transformers, as f-DPG needs it: log-probs, their gradient, decoding.

Causal models are here; encoder-decoder models, whose encoder reads the prompt, are
:class:`fdpg_fast.encoder_decoder.EncoderDecoderModel`, which :meth:`LanguageModel.load` and
:meth:`LanguageModel.from_model` return where the model is one.

Whatever checkpoint it comes from, a :class:`LanguageModel` has fp32 master weights, no dropout and
no sampling habits (temperature, top-k and the like in the checkpoint are dropped), and its
log-probs are fp32. At load it compares its fast paths (fused head, padded scoring, slot decoding)
with the plain forward pass of the model itself, on that model; a path that differs is not used,
and it says so. Nothing stands in for padded scoring: a model of which it differs is refused.

Shape legend: B samples, S sampled tokens (maximum), T = prompt + sample, V vocabulary, D hidden
size, b samples of one micro-batch and W tokens of the longest, n sampled tokens of it.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import math
import os
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, overload

import torch
import transformers
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from fdpg_fast import adapters, ops
from fdpg_fast.attention import (
    PACKED_KERNELS,
    SLOTS,
    Decoder,
    RecomputeDecoder,
    SlotCache,
    SlotDecoder,
    rounded_reach,
)
from fdpg_fast.layers import choose_layers
from fdpg_fast.ops.linear_head import project
from fdpg_fast.ops.matmul import exact_products, rounded_products, rounding_once
from fdpg_fast.packing import Packing, announced
from fdpg_fast.pretrained import (
    EMBEDDED,
    MADE_BY,
    Compute,
    ModelError,
    checkpoint_activations,
    compute_of,
    context_length,
    counting_limit,
    device_of,
    embedded_model,
    eos_ids_of,
    expect_no_mask,
    first_line,
    no_progress_bar,
    remove_dropout,
    rope_limit,
    why_not_loaded,
)
from fdpg_fast.rollout import Rollout
from fdpg_fast.self_test import PACKING_TOLERANCE, SelfTest, packing_error, require

__all__ = ["Head", "LanguageModel", "MicroBatch", "ModelError"]


# Tokens in one forward pass, padding included, without and with a gradient to keep activations for.
SCORE_TOKENS = 8192
GRADIENT_TOKENS = 4096

# Share of them that may be padding, in a micro-batch of more than so many tokens. CPU seconds of a
# gradient over 256 samples of up to 40 tokens, one core, 3.4 M weights (260 K weights):
#   lengths                     uniform        geometric, mean 10
#   4096 tokens whatever        2.20 (0.40)    1.56 (0.31)
#   by this rule                1.88 (0.32)    1.08 (0.21)
#   packed, text by text        2.19 (0.55)    1.38 (0.44)
PADDING, PADDED_TOKENS = 1 / 8, 1024


@dataclass(frozen=True)
class Head:
    """The output layer: ``logits = softcap * tanh(scale * (hidden W^T + bias) / softcap)``.

    Attributes:
        weight: ``(V, D)`` the live parameter, tied to the input embedding or not.
        bias: ``(V,)`` or None.
        scale: 1 for most families; Cohere multiplies, Granite divides.
        softcap: None for most families; Gemma 2 and later have one.
    """

    weight: Tensor
    bias: Tensor | None
    scale: float
    softcap: float | None

    def logits(self, hidden: Tensor, out: Tensor) -> Tensor:
        """``(N, D)`` to ``(N, V)`` before the soft cap, which is the kernels', without gradient, in
        ``out``."""
        return project(hidden, self.weight, self.bias, self.scale, out)


@dataclass(frozen=True)
class MicroBatch:
    """Some samples of a rollout: padded to the longest of them, or packed into one row."""

    tokens: Tensor  # (b, W) or (1, N) what the model reads; the last token predicts nothing
    positions: Tensor  # the same
    packing: Packing | None
    row: Tensor  # (n,) row of the rollout, of each sampled token
    column: Tensor  # (n,) 0..S-1, its place in the sample
    source: Tensor  # (n,) where the hidden state that predicts it is, in the flattened tokens
    target: Tensor  # (n,) its id


class LanguageModel:
    """One language model with its tokenizer: a policy, a proposal or a base.

    Make one with :meth:`load` or :meth:`from_model`.

    Attributes:
        model: the transformers model, fp32, in eval mode.
        tokenizer: its tokenizer, or None for a model that only ever sees token ids.
        device: where it computes.
        compute: ``"fp32"``, ``"bf16"`` or ``"fp16"`` (autocast; weights, logits and log-probs stay
            fp32, and products of the head take what :func:`rounded_products` says).
        attention: the attention function in use.
        name: what it was loaded from.
        eos_ids: the ids that end a sample (may be set; empty: only the length ends it).
        trust_remote_code: whether it was loaded with Python code of its checkpoint allowed.
        context_length: most tokens it can read.
        vocab_size: V.
        checks: what the self-test at load found, in nats per token.
        packs: whether micro-batches are packed, so that no padding is computed.
        scoring: the same in words, and why, for people.
    """

    own_attention: ClassVar[tuple[str, ...]] = SLOTS  # best first, of which "auto" takes one
    without_own_attention: ClassVar[str] = "sampling without a key-value cache"
    auto_class: ClassVar[str] = "AutoModelForCausalLM"  # of transformers, which loads it
    prompt_apart: ClassVar[bool] = False  # whether what writes a sample does not read its prompt

    def __init__(
        self,
        model: Any,
        tokenizer: Any = None,
        *,
        name: str = "",
        device: str | torch.device = "auto",
        compute: Compute = "auto",
        attention: str = "auto",
        activation_checkpointing: bool = False,
        eos_ids: Sequence[int] | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.trust_remote_code = False
        self.name = name or type(model).__name__
        self.device = device_of(device)
        self.compute = compute_of(compute, self.device)
        self.model: Any = model.to(device=self.device, dtype=torch.float32).eval()
        remove_dropout(self.model)
        expect_no_mask(self.model)
        choose_layers(self.model, self.device)

        config = self.model.config.get_text_config(decoder=True)
        self.layers: int = config.num_hidden_layers
        self.vocab_size: int = config.vocab_size
        self.context_length = context_length(config, tokenizer)
        self._read_at_most(
            rope_limit(config),
            "a text longer than that changes the rotary positions (longrope) of all in its batch, "
            "so their log-probs would depend on their neighbours",
        )
        if eos_ids is None:
            eos_ids = eos_ids_of(self.model, tokenizer, self.vocab_size)
        self.eos_ids = eos_ids
        self._replace_generation_config()

        accepted = inspect.signature(self.model.base_model.forward).parameters
        self._takes_positions = "position_ids" in accepted
        self._adapter: Any = None  # peft's model around `model`, if it has an adapter
        self._cache_name = "cache" if "cache" in accepted else "past_key_values"  # before 5.24
        self._fused: tuple[float, float | None] | None = None  # scale and softcap of a fused head
        self._logits: Tensor | None = None  # buffer of `logits`
        self._packed: dict[int, Tensor] = {}  # memory of `unchanging`
        self.activation_checkpointing = activation_checkpointing
        if activation_checkpointing:
            checkpoint_activations(self.model)
        self._stock_attention: str = self.model.config._attn_implementation
        self.attention = self._stock_attention
        self.packs, self._packed_kernel = False, ""
        self.checks = self._settle(attention)
        self.scoring = self._settle_packing()
        self._read_at_most(
            counting_limit(config) if self.has_cache else None,
            "beyond that it scales attention by a position that it counts itself, which is not "
            "that of a slot. Way out: --model.attention sdpa, which reads more, slowly",
        )

    # --- making one -----------------------------------------------------------------------------

    @classmethod
    def load(
        cls,
        name_or_path: str | os.PathLike[str] = "",
        *,
        device: str | torch.device = "auto",
        compute: Compute = "auto",
        attention: str = "auto",
        trust_remote_code: bool = False,
        activation_checkpointing: bool = False,
        eos_ids: Sequence[int] | None = None,
    ) -> LanguageModel:
        """Load a language model and its tokenizer.

        Args:
            name_or_path: a local folder or a Hugging Face name; empty or ``"default"``: the small
                story model that ships with the package; ``"embedded:arithmetic"``: its model of
                sums. It may be an adapter of the package peft.
            device: ``"auto"`` is the GPU if there is one.
            compute: ``"auto"`` is bf16 on a GPU that has it and fp32 elsewhere: on CPUs bf16 is not
                always faster, and it costs accuracy that every f-DPG weight exponentiates.
            attention: ``"auto"``, or a name that ``fdpg env`` lists.
            trust_remote_code: allow the checkpoint to bring Python code of its own.
            activation_checkpointing: recompute activations in the backward pass.
            eos_ids: the ids that end a sample, in place of the checkpoint's own.

        Raises:
            ModelError: the model cannot be found, read or used; the message says what to do.
            AdapterError: the same of an adapter.
        """
        name = os.fspath(name_or_path) or "default"
        if name.startswith("embedded:") and name not in EMBEDDED:
            raise ModelError(
                f"model {name!r}: not in the package, which has {', '.join(EMBEDDED)}."
            )
        source = adapter = embedded_model(EMBEDDED[name]) if name in EMBEDDED else name
        # No hub name looks like this, so do not wait a minute for the network to say so.
        is_path = source.startswith((".", "/", "~")) or source.count("/") > 1
        if is_path and not Path(source).is_dir():
            raise ModelError(
                f"model {name!r}: no such folder. Check the path; if a run's model has moved, "
                "say where to in its config.yaml."
            )
        with no_progress_bar():
            try:
                source = adapters.base_of(source) or source
                kind = _kind(
                    transformers.AutoConfig.from_pretrained(
                        source, trust_remote_code=trust_remote_code
                    )
                )
                model = getattr(transformers, kind.auto_class).from_pretrained(
                    source, dtype=torch.float32, trust_remote_code=trust_remote_code
                )
                tokenizer = transformers.AutoTokenizer.from_pretrained(
                    source, trust_remote_code=trust_remote_code
                )
            except adapters.AdapterError:
                raise
            except Exception as error:  # a checkpoint can be wrong in any way
                wanted = name if source == adapter else source
                raise ModelError(why_not_loaded(wanted, error)) from error
        loaded = kind(
            model,
            tokenizer,
            name=name,
            device=device,
            compute=compute,
            attention=attention,
            activation_checkpointing=activation_checkpointing,
            eos_ids=eos_ids,
        )
        loaded.trust_remote_code = trust_remote_code
        return loaded if adapter == source else loaded.with_saved_adapter(adapter)

    @classmethod
    def from_model(cls, model: Any, tokenizer: Any = None, **options: Any) -> LanguageModel:
        """Wrap a transformers model made elsewhere, with the options of :meth:`load` and ``name``.

        The model is changed in place: moved, cast to fp32, its dropout set to zero; it does not
        warn of texts without a mask; layers for which there are faster kernels, on a CPU our own,
        compute by them. To have it compiled, let ``torch.compile`` have its ``base_model`` or its
        layers: the output layer is computed here, and the whole is not called.
        """
        if not isinstance(model, nn.Module) or not hasattr(model, "config"):
            raise ModelError(
                "from_model: `model` expected a model of transformers, got "
                f"{type(model).__name__}. Way out: for a name or a folder, load"
            )
        return _kind(model.config)(model, tokenizer, **options)

    def trainable_copy(self) -> LanguageModel:
        """A copy with weights of its own that learn; of a model with an adapter, only the adapter
        is copied."""
        return self._copy(learns=True)

    def frozen_copy(self) -> LanguageModel:
        """The same with weights that do not learn."""
        return self._copy(learns=False)

    def _copy(self, learns: bool) -> LanguageModel:
        own = {id(parameter) for parameter in self.parameters()}
        shared = {id(p): p for p in self.model.parameters() if id(p) not in own}
        other = copy.copy(self)
        if self._adapter is None:
            other.model = copy.deepcopy(self.model)
        else:
            other._adapter = copy.deepcopy(self._adapter, shared)
            other.model = other._adapter.get_base_model()
        other.model.eval()
        for parameter in other.parameters():
            parameter.requires_grad_(learns)
            parameter.grad = None
        other._logits = None
        other._packed = {}
        return other

    def with_adapter(
        self,
        peft: str = "lora",
        *,
        rank: int = 16,
        alpha: int = 32,
        target_modules: str | Sequence[str] = "all-linear",
        options: Mapping[str, Any] | None = None,
        seed: int = 0,
    ) -> LanguageModel:
        """A model over the same weights, not copied and frozen there, with an adapter that learns.

        It starts as the same distribution. This model is not changed, and is not by what the
        adapter learns.

        Args:
            peft: the kind, as the package peft calls it.
            rank, alpha: of LoRA: the adapter is a product of two matrices of this rank, scaled by
                alpha / rank.
            target_modules: ends of names of the layers that get one; ``"all-linear"``: all linear
                layers but the output layer.
            options: further settings of peft's config for this kind; dropout is set to zero.
            seed: of the adapter's random weights.

        Raises:
            AdapterError: peft is not installed, or this adapter does not fit this model.
        """
        if self._adapter is not None:
            raise adapters.AdapterError(
                f"{self.name}: has an adapter already. Way out: train that one, or merge it into "
                "its model with peft's merge_and_unload and save the result"
            )
        adapted = adapters.attach(
            self.model,
            peft,
            rank=rank,
            alpha=alpha,
            target_modules=target_modules,
            options=options or {},
            seed=seed,
        )
        other = self._around(adapted)
        with self._plain_compute(), other._plain_compute():
            test = self._comparison()
            test.model = other  # what it says, against what its base does
            error = test.scoring_error()
        if not error <= test.tolerance:
            raise adapters.AdapterError(
                f"adapter {peft!r}: changes {self.name} before it has learnt anything, by "
                f"{error:.2g} nats: the policy must start as the base. Way out: the usual "
                "initial weights of this kind"
            )
        return other

    def with_saved_adapter(self, folder: str | os.PathLike[str]) -> LanguageModel:
        """A model over the same weights, not copied, with an adapter that :meth:`save` wrote.

        Raises:
            AdapterError: peft is not installed, or the adapter belongs to another model.
        """
        other = self._around(adapters.load(self.model, os.fspath(folder)))
        other.name = os.fspath(folder)
        return other

    def _around(self, adapted: Any) -> LanguageModel:
        """This model with the modules of peft's model ``adapted``."""
        other = copy.copy(self)
        other._adapter, other.model = adapted, adapted.get_base_model().eval()
        other._logits = None
        other._packed = {}
        remove_dropout(other.model)
        choose_layers(other.model, other.device)
        head = self.model.get_output_embeddings()
        if type(other.model.get_output_embeddings()) is not type(head):
            # The fused head reads the weight of the base, past any adapter.
            other._fused = None
            warnings.warn(
                f"{self.name}: an adapter on the output layer; using the model's own logits, which "
                "is right but slower and takes more memory.",
                RuntimeWarning,
                stacklevel=3,
            )
        other.checks = other.self_test()
        return other

    def copy_weights_from(self, other: LanguageModel) -> None:
        """Take the weights of a copy of this model."""
        theirs = other.named_parameters()
        with torch.no_grad():
            for name, parameter in self.named_parameters().items():
                parameter.copy_(theirs[name])

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write model and tokenizer for ``from_pretrained``: fp32 safetensors and JSON.

        The generation config says temperature 1, no truncation, and ``eos_ids``, so that
        ``generate`` of the saved model samples from the distribution that was trained, and
        :meth:`load` gives the same again. Of a model with an adapter the adapter alone is written,
        never merged; transformers loads it where peft is installed.
        """
        self._replace_generation_config()  # `eos_ids` may have been set since
        with no_progress_bar():
            if self._adapter is None:
                self.model.save_pretrained(folder)
            else:
                adapters.save(self._adapter, os.fspath(folder))
        if self.tokenizer is not None:
            self.tokenizer.save_pretrained(folder)

    def named_parameters(self) -> dict[str, nn.Parameter]:
        """The weights that are its own, tied ones once: all, or those of its adapter."""
        named = dict(self.model.named_parameters())
        if self._adapter is None:
            return named
        return {name: named[name] for name in adapters.names(self._adapter)}

    def parameters(self) -> list[nn.Parameter]:
        """The same without their names."""
        return list(self.named_parameters().values())

    # --- text -----------------------------------------------------------------------------------

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """The ids that end a sample."""
        return self._eos_ids

    @eos_ids.setter
    def eos_ids(self, ids: Sequence[int]) -> None:
        if unknown := [i for i in ids if i not in range(self.vocab_size)]:
            raise ModelError(
                f"{self.name}: `eos_ids` must be in 0..{self.vocab_size - 1}, got {unknown[0]!r}, "
                "which no sample could end with. Way out: ids of this model's own tokens, or none"
            )
        self._eos_ids = tuple(ids)

    def room(self, prompt_tokens: int) -> int:
        """How many tokens can be sampled after a prompt of so many; negative: it is too long."""
        return self.context_length - prompt_tokens

    @property
    def bos_prompt(self) -> tuple[int, ...]:
        """What stands for "no prompt": the begin-of-text token, else an end-of-text token."""
        config = self.model.config.get_text_config(decoder=True)
        for token in (
            getattr(self.tokenizer, "bos_token_id", None),
            getattr(config, "bos_token_id", None),
            *self.eos_ids,
        ):
            if isinstance(token, int) and 0 <= token < self.vocab_size:
                return (token,)
        raise ModelError(
            f"{self.name}: has neither a begin-of-text nor an end-of-text token to start a text "
            "with. Give a prompt, or a tokenizer with one of them."
        )

    def encode(self, text: str) -> list[int]:
        """The ids of a text to be continued: a begin-of-text token if the tokenizer adds one, never
        a token after the text."""
        if self.tokenizer is None:
            raise ModelError(f"{self.name}: has no tokenizer. Pass one to from_model.")
        bare: list[int] = self.tokenizer(text, add_special_tokens=False).input_ids
        full: list[int] = self.tokenizer(text).input_ids
        for start in range(len(full) - len(bare) + 1):
            if full[start : start + len(bare)] == bare:
                return full[: start + len(bare)]
        return full

    def decode(self, tokens: Sequence[Sequence[int]] | Tensor) -> list[str]:
        """One text per row, special tokens left out; with no tokenizer, the ids as numbers."""
        rows = tokens.tolist() if isinstance(tokens, Tensor) else list(tokens)
        if self.tokenizer is None:
            return [" ".join(map(str, row)) for row in rows]
        return [
            self.tokenizer.decode(row, skip_special_tokens=True, clean_up_tokenization_spaces=False)
            for row in rows
        ]

    # --- forward pass ---------------------------------------------------------------------------

    @property
    def has_cache(self) -> bool:
        """Whether sampling keeps keys and values, rather than reading the text at every step."""
        return self.attention in SLOTS

    @property
    def is_compiled(self) -> bool:
        """Whether ``torch.compile`` has had a part of what :meth:`hidden` calls, whose operations
        nobody sees."""
        dynamo = sys.modules.get("torch._dynamo")  # whose import takes a second
        called = self.model if self._fused is None else self.model.base_model
        return dynamo is not None and any(
            isinstance(module, dynamo.OptimizedModule)
            or module._compiled_call_impl is not None
            or hasattr(module.forward, "_torchdynamo_orig_callable")
            for module in called.modules()
        )

    @property
    def mixes_experts(self) -> bool:
        """Whether tokens are multiplied in groups that depend on all of a batch."""
        config = self.model.config.get_text_config(decoder=True)
        names = ("num_experts_per_tok", "num_experts")  # the latter of Switch
        return any(getattr(config, name, None) is not None for name in names)

    @property
    def head(self) -> Head | None:
        """The output layer as one formula, or None for a family whose head is not of that form."""
        if self._fused is None:
            return None
        layer = self.model.get_output_embeddings()
        return Head(layer.weight, getattr(layer, "bias", None), *self._fused)

    @property
    def softcap(self) -> float | None:
        """Bounds what :meth:`logits` returns, if not None: the kernels do it as they read."""
        return None if self._fused is None else self._fused[1]

    def hidden(
        self, tokens: Tensor, positions: Tensor, cache: Any = None, packing: Packing | None = None
    ) -> Tensor:
        """The last hidden states ``(b, W, D)`` fp32 of ``tokens`` ``(b, W)`` at ``positions``.

        With ``packing`` the tokens are ``(1, N)``, several sequences one after the other.

        For a family without a fused head these are the logits ``(b, W, V)``: :meth:`logits` and
        the scoring below know.
        """
        module = self.model if self._fused is None else self.model.base_model
        options: dict[str, Any] = {"use_cache": cache is not None}
        if cache is not None:
            options[self._cache_name] = cache
        if self._takes_positions:
            options["position_ids"] = positions
        with self._autocast(), announced(packing):
            out = module(input_ids=tokens, **options)
        states: Tensor = out.logits if self._fused is None else out.last_hidden_state
        return states.float()

    @torch.no_grad()
    def logits(self, hidden: Tensor) -> Tensor:
        """Logits ``(N, V)`` of ``hidden`` ``(N, D)``, in memory that the next call may write to;
        :attr:`softcap` is yet to be applied to them."""
        head = self.head
        if head is None:
            return hidden
        rows, words = hidden.shape[0], self.vocab_size
        if self._logits is None or self._logits[:rows].shape != (rows, words):
            # Rows begin on a cache line: MKL is slow where an odd vocabulary lets them drift.
            with torch.inference_mode(False):  # or it could never be written outside of it
                self._logits = hidden.new_empty(rows, -(-words // 64) * 64)[:, :words]
        with self._head_products(), torch.autocast(self.device.type, enabled=False):
            return head.logits(hidden, out=self._logits[:rows])

    def _autocast(self) -> torch.autocast:
        dtype = torch.float16 if self.compute == "fp16" else torch.bfloat16
        return torch.autocast(self.device.type, dtype=dtype, enabled=self.compute != "fp32")

    def _apart(self) -> torch.autocast:
        """Outside any autocast of the caller's, which would round what a gradient goes back through
        in fp32, and whose copies of weights would outlive them."""
        return torch.autocast(self.device.type, enabled=False, cache_enabled=False)

    def _head_products(self) -> contextlib.AbstractContextManager[None]:
        # A CPU would round to bf16, which is less than fp16 promises.
        if self.compute == "bf16" or (self.compute == "fp16" and self.device.type == "cuda"):
            return rounded_products(self.device)
        return contextlib.nullcontext()

    @contextlib.contextmanager
    def unchanging(self) -> Iterator[None]:
        """While in here the weights do not change, and nothing records a gradient: each weight is
        rounded to 16 bits once, if at all, and not again at every step of a draw."""
        if self.compute == "fp32":
            yield
            return
        # Autocast keeps the rounded copy of a weight only if that could learn.
        weights = self.model.parameters()
        frozen = [p for p in weights if not p.requires_grad and p.is_floating_point()]
        try:
            for weight in frozen:
                weight.requires_grad_(True)
            with torch.no_grad(), self._autocast(), contextlib.ExitStack() as stack:
                if self.compute == "bf16":
                    stack.enter_context(rounding_once(self.device, self._packed))
                if self.device.type == "cuda":
                    self._round_weights()
                yield
        finally:
            for weight in frozen:
                weight.requires_grad_(False)
            torch.clear_autocast_cache()  # if the caller's own autocast goes on, copies would stay

    def _round_weights(self) -> None:
        """Has autocast keep what linear layers multiply by, so that a step does not round them, be
        it the first: a CUDA graph would round them whenever it is replayed, as it does those of
        layers that are not called with rows alone."""
        head = None if self._fused is None else self.model.get_output_embeddings()
        for module in self.model.modules():
            if type(module) in (nn.Linear, Conv1D) and module is not head:
                size = module.weight.shape[0 if isinstance(module, Conv1D) else 1]
                module(module.weight.new_empty(0, size))

    def decoder(
        self,
        slots: int,
        length: int,
        prompts: Sequence[Sequence[int]],
        reuse: Decoder | None = None,
    ) -> Decoder:
        """A decoder for ``slots`` texts, of which it reads up to ``length`` tokens, that will begin
        with ``prompts``; ``reuse`` lends its memory."""
        if not self.has_cache:
            return RecomputeDecoder(self, slots, length)
        # Few lengths, so that prompts of another width at every step find memory that fits.
        length = min(self.context_length, rounded_reach(length, self.device))
        cache = reuse.cache if isinstance(reuse, SlotDecoder) else None
        size = (self.layers, slots, length, self.device)
        if type(cache) is not SlotCache or not cache.fits(*size):
            cache = SlotCache(*size)
        return SlotDecoder(self, cache)

    # --- log-probs ------------------------------------------------------------------------------

    @overload
    def token_logprob(
        self, rollout: Rollout, *, micro_batch: int | None = None, entropy: Literal[False] = False
    ) -> Tensor: ...

    @overload
    def token_logprob(
        self, rollout: Rollout, *, micro_batch: int | None = None, entropy: Literal[True]
    ) -> ops.TokenLogprob: ...

    @torch.no_grad()
    def token_logprob(
        self, rollout: Rollout, *, micro_batch: int | None = None, entropy: bool = False
    ) -> Tensor | ops.TokenLogprob:
        """The log-prob of every sampled token, given what stands before it.

        Args:
            rollout: samples; which model drew them does not matter.
            micro_batch: samples per forward pass; None: as many as make ``SCORE_TOKENS`` tokens.
                The result does not depend on it beyond fp32 rounding.
            entropy: return also the log-sum-exp and the entropy of each prediction.

        Returns:
            ``(B, S)`` fp32 log-probs in nats, 0 past each length; with ``entropy``, a
            ``TokenLogprob`` of three such tensors.
        """
        shape = (len(rollout), rollout.token_logprob.shape[1])
        count = 3 if entropy else 1
        empty = torch.zeros(shape, dtype=torch.float32, device=self.device)
        results = [empty.clone() for _ in range(count)]
        with self._apart():
            for batch in self._micro_batches(rollout, None, micro_batch, SCORE_TOKENS):
                scored = self._score(batch, entropy)
                for result, values in zip(results, scored, strict=False):
                    assert values is not None  # entropy is the third, there if asked for
                    result[batch.row, batch.column] = values
        return ops.TokenLogprob(*results) if entropy else results[0]

    def sequence_logprob(self, rollout: Rollout, *, micro_batch: int | None = None) -> Tensor:
        """log pi(x | prompt) of each sample, ``(B,)`` fp64, without gradient."""
        values = self.token_logprob(rollout, micro_batch=micro_batch)
        return ops.sequence_logprob(values, rollout.lengths)

    @torch.inference_mode(False)  # whatever the caller is in: with no gradient recorded, all
    @torch.enable_grad()  # weights but the head's would get none, without a word
    def accumulate_gradient(
        self,
        rollout: Rollout,
        weights: Tensor,
        *,
        denominator: int,
        micro_batch: int | None = None,
    ) -> Tensor:
        """Add the gradient of ``-(1 / denominator) sum_i weights_i log pi(x_i)`` to ``.grad``.

        This is the estimate of grad D_f(pi || p) of f-DPG (arXiv 2302.08215, Theorem 1), with
        ``weights`` as ``ops.fdiv_weights`` returns them.

        Args:
            rollout: samples.
            weights: ``(B,)`` fp64. A sample with weight 0 costs nothing and adds nothing.
            denominator: usually the samples of the whole step.
            micro_batch: samples per forward and backward pass; None: as many as make
                ``GRADIENT_TOKENS`` tokens. It changes memory, not the gradient.

        Returns:
            ``(B, S)`` fp32 log-probs under the weights of now, detached: 0 past each length, NaN
            for samples of weight 0, which were not computed.

        Raises:
            ValueError: a weight is not finite, or they or ``denominator`` do not fit.
        """
        if weights.shape != (len(rollout),):
            raise ValueError(
                f"accumulate_gradient: `weights` must have shape [{len(rollout)}], one for each "
                f"sample, got {list(weights.shape)}"
            )
        if not denominator > 0:  # weights over it would be infinite
            raise ValueError(
                f"accumulate_gradient: `denominator` must be above 0, got {denominator}. It is "
                "usually the samples of the step"
            )
        weights = weights.to(self.device)
        if not bool(torch.isfinite(weights).all()):
            worst = int((~torch.isfinite(weights)).nonzero()[0])
            raise ValueError(
                f"accumulate_gradient: `weights` must be finite, got {float(weights[worst])} for "
                f"sample {worst}. Look at its log score and log Z; clip the reward or the ratio."
            )
        coefficient = (-weights / denominator).float()
        used = (weights != 0).cpu()
        shape = (len(rollout), rollout.token_logprob.shape[1])
        result = torch.zeros(shape, dtype=torch.float32, device=self.device)
        skipped = (~used).to(self.device)[:, None]
        inside = torch.arange(result.shape[1], device=self.device) < rollout.lengths[:, None]
        result.masked_fill_(skipped & inside, torch.nan)
        with self._apart(), self._checkpointing(), self._scaled(coefficient) as scaled:
            for batch in self._micro_batches(rollout, used, micro_batch, GRADIENT_TOKENS):
                result[batch.row, batch.column] = self._backward(
                    batch, scaled[batch.row], rollout.lse[batch.row, batch.column]
                )
        return result

    @contextlib.contextmanager
    def _checkpointing(self) -> Iterator[None]:
        """Recompute activations, if asked for: layers do so when they are told that they train.
        What is inside them is not told, for in train mode it may add noise (routers of Mixtral),
        draw (experts of PhiMoE) or compute another thing (Gemma 3n), and pi(x) is one number."""
        self.model.eval()
        for module in self.model.modules() if self.activation_checkpointing else ():
            module.training = getattr(module, "gradient_checkpointing", False)
        try:
            yield
        finally:
            self.model.eval()

    @contextlib.contextmanager
    def _scaled(self, coefficient: Tensor) -> Iterator[Tensor]:
        """``coefficient`` times a factor that ``.grad`` is divided by at the end, for fp16, which
        has no number below 6e-8, where gradients of a mean over samples are, nor above 65504.

        With it no element of the gradient that enters the model is above 1/8. The coefficients are
        known, so the factor is too, and no search by trial and error is needed as for a loss scale;
        it is a power of two, so it rounds nothing; and the device is not asked. A gradient that
        overflows all the same, far down in the model, is infinite, and the step is refused.
        """
        if self.compute != "fp16":
            yield coefficient
            return
        bound = coefficient.abs().amax()  # of the gradient of the logits
        if (head := self.head) is not None:
            bound = 2 * abs(head.scale) * bound * head.weight.detach().abs().amax()
        exponent = torch.frexp(bound).exponent.clamp(min=-60)  # fp32 ends as well
        scale = torch.ldexp(torch.ones_like(bound), -3 - exponent)
        self._multiply_gradient(scale)
        yield coefficient * scale
        self._multiply_gradient(1 / scale)

    def _multiply_gradient(self, factor: Tensor) -> None:
        for parameter in self.parameters():
            if parameter.grad is not None:
                parameter.grad.mul_(factor)

    def _states(self, batch: MicroBatch) -> Tensor:
        """The hidden states ``(n, D)`` that predict the sampled tokens of a micro-batch."""
        states = self.hidden(batch.tokens, batch.positions, packing=batch.packing)
        return states.flatten(0, 1)[batch.source]

    def _score(self, batch: MicroBatch, entropy: bool) -> ops.TokenLogprob:
        """Log-probs ``(n,)`` of the sampled tokens of a micro-batch."""
        states = self._states(batch)
        head = self.head
        if head is None:
            return ops.token_logprob(states, batch.target, entropy=entropy)
        with self._head_products():
            return ops.linear_logprob(
                states,
                head.weight,
                batch.target,
                bias=head.bias,
                scale=head.scale,
                softcap=head.softcap,
                entropy=entropy,
            )

    def _backward(self, batch: MicroBatch, coefficient: Tensor, lse_hint: Tensor) -> Tensor:
        """Add the gradient of sum_n coefficient[n] logp[n]; return logp ``(n,)``, detached."""
        states = self._states(batch)
        head = self.head
        if head is None:
            logp = ops.token_logprob(states, batch.target).logp
            logp.backward(coefficient)
            return logp.detach()
        # The coefficients are known, so the head's gradient is ready when its logits are.
        weight, bias = head.weight, head.bias
        bias_learns = bias is not None and bias.requires_grad
        with self._head_products():
            result = ops.policy_gradient(
                states,
                weight,
                batch.target,
                coefficient,
                bias=bias,
                scale=head.scale,
                softcap=head.softcap,
                lse_hint=lse_hint,
                need_hidden=states.requires_grad,
                need_weight=weight.requires_grad,
                need_bias=bias_learns,
                add_to_weight=weight.grad,
                add_to_bias=None if bias is None else bias.grad,
            )
        if weight.requires_grad:
            weight.grad = result.weight
        if bias is not None and bias_learns:
            bias.grad = result.bias
        if states.requires_grad:
            states.backward(result.hidden)
        return result.logp

    def _micro_batches(
        self, rollout: Rollout, used: Tensor | None, micro_batch: int | None, budget: int
    ) -> Iterator[MicroBatch]:
        """The samples of a rollout, or those marked ``used``, longest first: rows of like length
        share a batch, so little padding is computed, and too much memory shows at once."""
        self._check_batches(rollout, micro_batch)
        prompt_lengths, lengths = rollout.prompt_lengths.cpu(), rollout.lengths.cpu()
        widths = prompt_lengths + lengths - 1
        order = torch.argsort(widths, descending=True, stable=True)
        if used is not None:
            order = order[used[order]]
        tokens = rollout.tokens.to(self.device)
        packs = self.packs and not self.is_compiled  # which compiles for each packing anew
        while len(order):
            size = micro_batch or _size(widths[order], budget, packs)
            rows, order = order[:size], order[size:]
            yield self._micro_batch(tokens, rows, prompt_lengths[rows], lengths[rows], packs)

    def _micro_batch(
        self,
        tokens: Tensor,
        rows: Tensor,
        prompt_lengths: Tensor,
        lengths: Tensor,
        packs: bool = False,
    ) -> MicroBatch:
        widths = prompt_lengths + lengths - 1
        width = int(widths.max())
        inside = torch.arange(int(lengths.max())) < lengths[:, None]
        i, column = inside.nonzero(as_tuple=True)
        start = prompt_lengths[i]  # where the sample starts in its text
        packing = None
        if packs:
            packing = Packing.of(widths, self.device, self._packed_kernel)
            text, position = (torch.arange(width) < widths[:, None]).nonzero(as_tuple=True)
            text, position = text[None], position[None]
            begin = (widths.cumsum(0) - widths)[i]  # where the text starts in what is read
        else:
            text, position = torch.arange(len(rows))[:, None], torch.arange(width)[None]
            begin = i * width
        # A copy that blocks would wait for the micro-batch before.
        i, column, start, begin, rows, text, position = (
            x.to(self.device, non_blocking=True)
            for x in (i, column, start, begin, rows, text, position)
        )
        return MicroBatch(
            tokens=tokens[rows[text], position],
            positions=position.expand(len(text), -1),
            packing=packing,
            row=rows[i],
            column=column,
            source=begin + start + column - 1,
            target=tokens[rows[i], start + column],
        )

    def _check_batches(self, rollout: Rollout, micro_batch: int | None) -> None:
        """Refuse a size that cannot be, and a token id that the model does not have. On a GPU the
        latter would be a question to the device in the middle of a step; there the sampler and
        Prompts have looked already."""
        if micro_batch is not None and micro_batch < 1:
            raise ValueError(f"micro_batch: expected at least 1 sample, got {micro_batch}")
        if rollout.tokens.device.type != "cpu" or rollout.tokens.numel() == 0:
            return
        low, high = rollout.tokens.aminmax()
        if low < 0 or high >= self.vocab_size:
            row, column = (
                ((rollout.tokens < 0) | (rollout.tokens >= self.vocab_size)).nonzero()[0].tolist()
            )
            raise ValueError(
                f"token_logprob: `rollout.tokens` must be in 0..{self.vocab_size - 1}, got "
                f"{int(rollout.tokens[row, column])} in row {row}, column {column}. Samples and "
                f"model must share one tokenizer ({self.name})."
            )

    def _read_at_most(self, limit: int | None, why: str) -> None:
        """Lowers :attr:`context_length` to a limit, if that is one, and says why."""
        if limit is None or limit >= self.context_length:
            return
        warnings.warn(
            f"{self.name}: reads up to {limit} tokens here, not {self.context_length}: {why}.",
            RuntimeWarning,
            stacklevel=4,
        )
        self.context_length = limit

    # --- trust, but measure ---------------------------------------------------------------------

    def self_test(self) -> dict[str, float]:
        """Compare the fast paths with the plain forward pass of each text alone, in fp32.

        Returns:
            Largest differences of log-probs in nats: ``head`` (if fused), ``scoring`` (rows padded
            on the right), ``decoding`` (slots at unequal positions, and past a sliding window, if
            used), and ``tolerance``; ``packing`` (if used): a mean difference, in the compute that
            the kernel is used with.

        Raises:
            ModelError: one of them is above the tolerance.
        """
        with self._plain_compute():
            found = self._comparison().measure()
        if self.packs:
            found["packing"] = packing_error(self, self._packed_kernel)
            require(self.name, "packing", found["packing"], PACKING_TOLERANCE[self.compute])
        return found

    def _comparison(self) -> SelfTest:
        return SelfTest(self)

    def _settle(self, wanted: str) -> dict[str, float]:
        """Choose the head and the attention, each only if it agrees with the model itself."""
        with self._plain_compute():
            test = self._comparison()
            test.require_causal()
            self._fused = self._find_head(test)
            if self._fused is None:
                warnings.warn(
                    f"{self.name}: its output layer is not a known formula; using the model's own "
                    "logits, which is right but slower and takes more memory.",
                    RuntimeWarning,
                    stacklevel=4,
                )
            if wanted in ("auto", *self.own_attention):
                names = self.own_attention if wanted == "auto" else (wanted,)
                problem = self._try_slots(names, test)
                if problem and wanted != "auto":
                    raise ModelError(f"{self.name}: attention {wanted!r} does not fit: {problem}")
                if problem:
                    warnings.warn(
                        f"{self.name}: {self.without_own_attention}, which is right but slow: "
                        f"{problem}.",
                        RuntimeWarning,
                        stacklevel=4,
                    )
            else:
                self._use_attention(wanted)
            return test.measure()

    def _settle_packing(self) -> str:
        """Pack if that is right and worth it here; returns :attr:`scoring`."""
        if self.device.type == "cpu":
            return "padded: kernels for packed sequences need a GPU"
        if self.attention not in SLOTS:
            return f"padded: {self.attention} does not keep packed sequences apart"
        if self.compute == "fp32":
            return "padded: kernels for packed sequences take fp16 and bf16"
        problems: list[str] = []
        for self._packed_kernel in PACKED_KERNELS:
            try:
                error = packing_error(self, self._packed_kernel)
                problem = f"packed sequences differ from single ones by {error:.2g} nats"
            except Exception as refusal:  # of a family or a kernel; padded rows are right
                error, problem = math.inf, first_line(refusal)
            if error <= PACKING_TOLERANCE[self.compute]:
                self.packs, self.checks["packing"] = True, error
                why = f" ({'; '.join(problems)})" if problems else ""
                return f"packed, by {self._packed_kernel}{why}"
            problems.append(f"{self._packed_kernel}: {problem}")
        warnings.warn(
            f"{self.name}: scoring padded rows, which is right but slower: {'; '.join(problems)}.",
            RuntimeWarning,
            stacklevel=4,
        )
        return f"padded: {'; '.join(problems)}"

    def _use_attention(self, name: str) -> None:
        try:
            self.model.set_attn_implementation(name)
        except (ValueError, ImportError, KeyError) as error:
            raise ModelError(
                f"{self.name}: cannot use attention {name!r}: {first_line(error)}. `fdpg env` "
                "lists what there is; 'auto' chooses."
            ) from error
        self.attention = name

    def _try_slots(self, names: Sequence[str], test: SelfTest) -> str | None:
        """Use the first slot attention that is right for this model; else say why none is."""
        family, problem = type(self.model).__name__, None
        if not self.model._can_set_attn_implementation():
            return f"{family} does not let its attention be replaced"
        for name in names:
            try:
                self._use_attention(name)
                error = max(test.scoring_error(), test.decoding_error())
                if error <= test.tolerance:
                    return None
                problem = f"{family} differs by {error:.2g} nats"
            except Exception as error:  # an unknown family may fail in any way; stock is right
                problem = f"{family} fails with {type(error).__name__}: {first_line(error)}"
        self._use_attention(self._stock_attention)
        return problem

    @contextlib.contextmanager
    def _plain_compute(self) -> Iterator[None]:
        """fp32, not TF32, without gradients: the computation is compared, not its rounding."""
        compute, self.compute = self.compute, "fp32"
        try:
            with torch.no_grad(), self._apart(), exact_products(self.device):
                yield
        finally:
            self.compute = compute

    @contextlib.contextmanager
    def stock_attention(self) -> Iterator[None]:
        """With transformers' attention where ours is in use."""
        attention = self.attention
        if attention in self.own_attention:
            self._use_attention(self._stock_attention)
        try:
            yield
        finally:
            if attention in self.own_attention:
                self._use_attention(attention)

    def _find_head(self, test: SelfTest) -> tuple[float, float | None] | None:
        """The (scale, softcap) that turns hidden states into this model's logits, if any does.

        One name can mean opposite things in two families (Granite divides by ``logits_scaling``,
        others multiply), so numbers decide, not names.
        """
        if getattr(self.model.get_output_embeddings(), "weight", None) is None:
            return None
        config = self.model.config.get_text_config(decoder=True)
        names = ("logit_scale", "logits_scaling", "lm_head_multiplier", "output_multiplier")
        found = [getattr(config, name, None) for name in names]
        factors = [float(x) for x in found if isinstance(x, (int, float)) and x]
        factors.append(getattr(config, "hidden_size", 1) ** -0.5)  # T5
        softcap = getattr(config, "final_logit_softcapping", None)
        try:
            for scale in dict.fromkeys([1.0, *factors, *(1.0 / x for x in factors)]):
                self._fused = (scale, None if softcap is None else float(softcap))
                if test.head_error() <= test.tolerance:
                    return self._fused
        except (RuntimeError, AttributeError):  # hidden states of another width, or unnamed
            pass
        finally:
            self._fused = None
        return None

    def _replace_generation_config(self) -> None:
        """Drop the checkpoint's temperature, top-k and the rest: samples are draws from pi."""
        if getattr(self.model, "generation_config", None) is None:
            return
        old = self.model.generation_config
        self.model.generation_config = transformers.GenerationConfig(
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            bos_token_id=old.bos_token_id,
            eos_token_id=list(self.eos_ids) or None,
            pad_token_id=old.pad_token_id,
            decoder_start_token_id=old.decoder_start_token_id,
            made_by=MADE_BY,
        )


def _size(longest_first: Tensor, budget: int, packs: bool) -> int:
    """How many of the texts of these lengths the next micro-batch reads."""
    computed = needed = longest_first.cumsum(0)
    if not packs:
        computed = torch.arange(1, len(longest_first) + 1) * longest_first[0]
    dense = (needed >= (1 - PADDING) * computed) | (computed <= PADDED_TOKENS)
    return max(1, int((dense & (computed <= budget)).sum()))


def _kind(config: Any) -> type[LanguageModel]:
    if not getattr(config, "is_encoder_decoder", False):
        return LanguageModel
    from fdpg_fast.encoder_decoder import EncoderDecoderModel  # which is a LanguageModel itself

    return EncoderDecoderModel
