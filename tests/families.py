"""Tiny random models of many families, and the plain fp64 log-probs that all must agree with.

The weights are larger than at initialisation, so that a wrong mask, position or scale shows: with
the usual ones every prediction is nearly uniform and the differences hide in the rounding.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, PreTrainedModel

from fdpg_fast.models import LanguageModel
from fdpg_fast.pretrained import Compute
from fdpg_fast.rollout import PromptBatch, Rollout

VOCAB = 61  # prime: nothing is aligned by luck

_GPT = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 40}
_OPT = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 40,
}
_LLAMA = {**_OPT, "intermediate_size": 48, "num_key_value_heads": 2}

_T5 = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "n_positions": 40}

# family -> what its config is made from. Windows are shorter than the samples, so that they matter.
CONFIGS: dict[str, dict[str, Any]] = {
    "gpt2": _GPT,
    "llama": _LLAMA,
    "opt": {**_OPT, "ffn_dim": 48, "word_embed_proj_dim": 32},
    "qwen2": {
        **_LLAMA,
        "use_sliding_window": True,
        "sliding_window": 6,
        "max_window_layers": 1,
    },
    "gpt_neox": {**_OPT, "intermediate_size": 48},
    "mistral": {**_LLAMA, "sliding_window": 6},
    "qwen3": {**_LLAMA, "head_dim": 8},
    "phi": {**_OPT, "intermediate_size": 48},
    "gemma3_text": {**_LLAMA, "head_dim": 8, "sliding_window": 6},
    "gemma2": {**_LLAMA, "head_dim": 8, "sliding_window": 6, "final_logit_softcapping": 3.0},
    "cohere": {**_LLAMA, "logit_scale": 0.25},
    "granite": {**_LLAMA, "logits_scaling": 3.0},
    "gpt_oss": {
        **_LLAMA,
        "head_dim": 8,
        "sliding_window": 6,
        "num_local_experts": 3,
        "num_experts_per_tok": 2,
    },
    "mixtral": {**_LLAMA, "num_local_experts": 3, "router_jitter_noise": 0.3},
    "phimoe": {**_LLAMA, "num_local_experts": 3},
    "phi3": {
        **_LLAMA,
        "original_max_position_embeddings": 16,
        "rope_parameters": {
            "rope_type": "longrope",
            "rope_theta": 10000.0,
            "short_factor": [1.0] * 4,
            "long_factor": [4.0] * 4,
        },
    },
    # Families that the slot cache does not fit.
    "falcon": {**_OPT, "new_decoder_architecture": False},
    "bloom": {"hidden_size": 32, "n_layer": 2, "n_head": 4},
    "gpt_neo": {
        "hidden_size": 32,
        "num_layers": 2,
        "num_heads": 4,
        "max_position_embeddings": 40,
        "attention_types": [[["global", "local"], 1]],
        "window_size": 6,
    },
    # Encoder-decoder models, whose prompt the encoder reads.
    "t5": _T5,
    "t5_gated": {  # 1.1 and Flan: its output layer is not the embedding
        **_T5,
        "model_type": "t5",
        "num_decoder_layers": 3,
        "feed_forward_proj": "gated-gelu",
        "tie_word_embeddings": False,
    },
    "mt5": _T5,
    "umt5": _T5,
    "bart": {
        "d_model": 32,
        "encoder_layers": 1,
        "decoder_layers": 2,
        "encoder_attention_heads": 4,
        "decoder_attention_heads": 4,
        "encoder_ffn_dim": 48,
        "decoder_ffn_dim": 48,
        "max_position_embeddings": 40,
        "forced_eos_token_id": None,
    },
}
ENCODER_DECODER = ("t5", "t5_gated", "bart")


def tiny(family: str, *, vocab: int = VOCAB, seed: int = 0, **changes: Any) -> Any:
    """A random transformers model of a family, in train mode, with the family's own dropout."""
    settings = {"model_type": family, **CONFIGS[family], **changes}
    config = AutoConfig.for_model(vocab_size=vocab, **settings)
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        if isinstance(getattr(config, name, None), int):
            setattr(config, name, 0)
    with torch.random.fork_rng(range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        if config.is_encoder_decoder:
            return _encoder_decoder(family, config)
        model = AutoModelForCausalLM.from_config(config)
        with torch.no_grad():
            for weight in model.parameters():
                if weight.ndim >= 2:
                    weight.mul_(4.0)
    return model


def _encoder_decoder(family: str, config: Any) -> Any:
    """Both texts matter to what is predicted, and so do positions and the head's scale or bias."""
    config.decoder_start_token_id = 3
    model = AutoModelForSeq2SeqLM.from_config(config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "relative_attention_bias" in name:
                weight.normal_()
            elif weight.ndim >= 2 and family == "bart":
                weight.mul_(8.0)
        if family == "bart":
            model.final_logits_bias.normal_()
        if family == "t5_gated":
            model.lm_head.weight = torch.nn.Parameter(torch.randn_like(model.lm_head.weight) / 4)
    return model


def language_model(
    family: str,
    *,
    eos_ids: Sequence[int] = (0,),
    changes: dict[str, Any] | None = None,
    device: str = "cpu",
    compute: Compute = "fp32",
    **options: Any,
) -> LanguageModel:
    """The same, wrapped; ``changes`` are the config's, the rest the wrapper's."""
    model = tiny(family, **(changes or {}))
    return LanguageModel.from_model(
        model, name=family, eos_ids=eos_ids, device=device, compute=compute, **options
    )


def batch(*prompts: Sequence[int]) -> PromptBatch:
    """Prompts given as ids."""
    return PromptBatch(
        ids=torch.arange(len(prompts)),
        tokens=tuple(tuple(prompt) for prompt in prompts),
        texts=tuple(" ".join(map(str, prompt)) for prompt in prompts),
    )


def double(model: LanguageModel) -> Any:
    """The transformers model alone, in fp64, with the attention it would have without us."""
    plain = copy.deepcopy(model.model)
    if model.attention != model._stock_attention:
        for part in plain.modules():  # each: see EncoderDecoderModel._use_attention
            if isinstance(part, PreTrainedModel):
                part.set_attn_implementation("eager")
    if model.name == "gpt_oss":
        plain.set_experts_implementation("eager")  # the grouped product knows no fp64
    return plain.double()


def reference_logprob(plain: Any, rollout: Rollout) -> Tensor:
    """``(B, S)`` log-probs of the sampled tokens, each sample alone, no padding, no cache."""
    rows = []
    for tokens, prompt, length in zip(
        rollout.tokens, rollout.prompt_lengths.tolist(), rollout.lengths.tolist(), strict=True
    ):
        text = tokens[: prompt + length]
        if plain.config.is_encoder_decoder:
            written = text[prompt - 1 : -1].clone()
            written[0] = plain.config.decoder_start_token_id
            logits = plain(
                input_ids=text[None, :prompt], decoder_input_ids=written[None], use_cache=False
            ).logits[0]
            logp = torch.log_softmax(logits.double(), dim=-1)
        else:
            logits = plain(input_ids=text[None], use_cache=False).logits[0]
            logp = torch.log_softmax(logits.double(), dim=-1)[prompt - 1 : -1]
        picked = logp.gather(1, text[prompt:, None])[:, 0]
        rows.append(torch.nn.functional.pad(picked, (0, rollout.token_logprob.shape[1] - length)))
    return torch.stack(rows)
