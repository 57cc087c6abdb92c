"""Drawing samples: ours against the ways others take with transformers, and against the hardware.

Nobody stops early, so all draw the same number of tokens; but for `test_lengths`, which is about
samples that do. `generate` gives tokens alone; f-DPG also
needs their log-probs. Ours has them; TRL reads every sample once more; disco keeps the logits of
all steps and takes their log_softmax. Both are written here as the calls of transformers that they
come down to, so neither needs to be installed.

`roofline` is what cannot be avoided, each part at the speed this machine has for it: the products
of every step in their shapes with the model's own weights, reading the live keys and values, and
reading the logits. The GPT-2-shaped model has random weights, which speed does not depend on.

Bytes of ours, in a step of B samples that see t tokens: the W weights of linear layers and head, in
the type they are multiplied in; in each layer t + 1 keys and values of each sample, t read and one
written; B V fp32 logits, written and read. FLOPs: 2 W a sample, and 4 a number of each query head
for each of its t keys. Over the steps t is P, P + 1, and so on, for a prompt of P tokens, which is
read once and left out, as are embeddings, norms and activations.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import peers
import pytest
import torch
from conftest import Contest
from scipy.optimize import brentq
from shapes import NEEDS_CUDA, require_products
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.pytorch_utils import Conv1D

from fdpg_fast.models import LanguageModel
from fdpg_fast.ops.matmul import has_rounded_products, packed_like, product, rounded_products
from fdpg_fast.rollout import PromptBatch, Rollout
from fdpg_fast.sampler import Sampler

SHARED = Path(os.environ.get("FDPG_SHARED", Path(__file__).parents[2] / "shared")) / "models"
STORIES = {  # and the speed-up over `generate` that is asked for
    "tinystories-instruct-3M-chat-gpt2": 4.0,
    "stories260K": 2.0,
}


class Drawn:
    """A model and the work to be done with it: `samples` of `tokens` after one prompt."""

    def __init__(self, plain: Any, prompt: tuple[int, ...], samples: int, tokens: int) -> None:
        self.plain, self.device = plain.eval(), plain.device
        self.prompt, self.samples, self.tokens = prompt, samples, tokens
        self.prompts = PromptBatch(torch.tensor([0]), (prompt,), ("",))
        self.key = 0

    def ours(
        self,
        compute: Literal["fp32", "bf16"] = "fp32",
        *,
        eos_ids: tuple[int, ...] = (),
        slots: int | None = None,
    ) -> Callable[[], Rollout]:
        model = LanguageModel.from_model(
            copy.deepcopy(self.plain).float(), compute=compute, eos_ids=eos_ids, device=self.device
        )
        sampler = Sampler(self.tokens, slots or self.samples)

        def draw() -> Rollout:
            self.key += 1
            return sampler.draw(model, self.prompts, self.samples, self.key)

        return draw

    def generate(self, **options: Any) -> Any:
        rows = torch.tensor([self.prompt], device=self.device).expand(self.samples, -1)
        return self.plain.generate(
            rows,
            attention_mask=torch.ones_like(rows),
            do_sample=True,
            top_k=0,
            top_p=1.0,
            temperature=1.0,
            max_new_tokens=self.tokens,
            eos_token_id=None,
            pad_token_id=0,
            **options,
        )

    @torch.no_grad()
    def second_pass(self) -> Tensor:
        """What TRL does: log-probs of micro-batches of 64, as logit - logsumexp."""
        parts = []
        for rows in self.generate().split(64):
            kept = self.plain(rows, use_cache=False, logits_to_keep=self.tokens + 1).logits[:, :-1]
            sampled = rows[:, -self.tokens :, None]
            parts.append(kept.gather(-1, sampled)[..., 0] - kept.logsumexp(-1))
        return torch.cat(parts)

    @torch.no_grad()
    def kept_scores(self) -> Tensor:
        """What disco does: log_softmax of the logits of every step, stacked."""
        out = self.generate(output_scores=True, return_dict_in_generate=True)
        scores = torch.stack(out.scores, dim=1).log_softmax(-1)
        return scores.gather(-1, out.sequences[:, -self.tokens :, None])[..., 0]

    def hardware(self, dtype: torch.dtype, *, reads: bool) -> Callable[[], None]:
        """The products of every step, layers in `dtype` and the head with fp32 logits; with
        ``reads``, the live cache and the logits are read too.

        Where the sampler packs weights in bf16, which are fp32 between draws, so does this: once.
        """
        weights = _weights_of_layers(self.plain.base_model)
        head = self.plain.get_output_embeddings().weight.detach().t()
        rows, rounded = self.samples, dtype == torch.bfloat16
        packs = rounded and head.is_cpu and has_rounded_products()
        if not packs:
            weights = [weight.to(dtype) for weight in weights]
        packed = [packed_like(weight) for weight in (*weights, head)] if packs else []

        def new(width: int, dtype: torch.dtype) -> Tensor:
            return torch.ones(rows, width, dtype=dtype, device=self.device)

        inputs = {k: new(k, dtype) for k in {len(w) for w in weights}}
        outputs = {m: new(m, dtype) for m in {w.shape[1] for w in weights}}
        ends = [(inputs[len(w)], outputs[w.shape[1]]) for w in weights]
        logits = new(head.shape[1], head.dtype)
        ends.append((new(len(head), dtype if packs else head.dtype), logits))
        config = self.plain.config
        heads = config.num_attention_heads
        key_heads = getattr(config, "num_key_value_heads", heads)
        per_token = 2 * config.num_hidden_layers * rows * key_heads * config.hidden_size // heads
        tokens = len(self.prompt) + self.tokens
        cache = torch.zeros(tokens * per_token, dtype=dtype, device=self.device)

        def run() -> None:
            factors = [*weights, head]
            for to, factor in zip(packed, factors, strict=False):
                torch.ops.fdpg.matmul_pack_(to, factor)
            with rounded_products(head.device) if rounded else contextlib.nullcontext():
                for step in range(self.tokens):
                    for factor, (states, out) in zip(packed or factors, ends, strict=True):
                        if packs:
                            torch.ops.fdpg.matmul_(out, states, factor)
                        else:
                            product(states, factor, out=out)
                    if reads:
                        live = (len(self.prompt) + step) * per_token
                        cache[:live].view(torch.int32).sum(dtype=torch.int32)
                        logits.view(-1).view(torch.int32).sum(dtype=torch.int32)

        return run

    def least(self, dtype: torch.dtype) -> dict[str, float]:
        """What a draw moves and computes, as counted above."""
        head = self.plain.get_output_embeddings().weight
        linear = (*_weights_of_layers(self.plain.base_model), head)
        weights = sum(weight.numel() for weight in linear)
        config, rows, steps = self.plain.config, self.samples, self.tokens
        numbers = config.num_hidden_layers * config.hidden_size  # of a token's query heads
        heads = config.num_attention_heads
        kept = 2 * numbers * getattr(config, "num_key_value_heads", heads) // heads
        seen = steps * len(self.prompt) + steps * (steps - 1) // 2
        logits = steps * rows * config.vocab_size
        return {
            "bytes_moved": dtype.itemsize * (steps * weights + (seen + steps) * rows * kept)
            + 2 * 4 * logits,
            "flops": 2 * weights * rows * steps + 4 * seen * rows * numbers,
        }

    def check(self, rollout: Rollout, tolerance: float = 1e-3, *, whole: bool = True) -> None:
        """Every sample is whole, and its log-probs are the model's own."""
        assert not whole or (rollout.lengths == self.tokens).all()
        rows, lengths = rollout.tokens[:4], rollout.lengths[:4, None]
        with torch.no_grad():
            logp = self.plain(rows, use_cache=False).logits.float().log_softmax(-1)[:, :-1]
        expected = logp.gather(-1, rows[:, 1:, None])[:, -self.tokens :, 0]
        inside = torch.arange(self.tokens, device=self.device) < lengths
        torch.testing.assert_close(
            rollout.token_logprob[:4], expected.where(inside, 0.0), rtol=0, atol=tolerance
        )


class Vllm:
    """A draw by vLLM, with the log-probs of what was drawn. Its engine starts with the first."""

    def __init__(self, drawn: Drawn, folder: Path) -> None:
        self.drawn, self.folder = drawn, folder

    @functools.cached_property
    def engine(self) -> Any:
        from vllm import LLM

        self.drawn.plain.save_pretrained(self.folder)
        return LLM(
            str(self.folder),
            skip_tokenizer_init=True,
            dtype="bfloat16",
            max_model_len=len(self.drawn.prompt) + self.drawn.tokens,
            max_num_seqs=self.drawn.samples,
            gpu_memory_utilization=0.4,  # the others are on the same GPU
        )

    def draw(self) -> object:
        from vllm import SamplingParams

        prompts = [{"prompt_token_ids": list(self.drawn.prompt)}] * self.drawn.samples
        wanted = SamplingParams(
            max_tokens=self.drawn.tokens, ignore_eos=True, logprobs=0, detokenize=False
        )
        drawn = self.engine.generate(prompts, wanted, use_tqdm=False)
        assert all(len(text.outputs[0].token_ids) == self.drawn.tokens for text in drawn)
        return drawn


def _weights_of_layers(model: nn.Module) -> list[Tensor]:
    """``(in, out)`` of every linear layer."""
    weights = []
    for module in model.modules():
        if isinstance(module, nn.Linear):
            weights.append(module.weight.detach().t())
        elif isinstance(module, Conv1D):
            weights.append(module.weight.detach())
    return weights


@pytest.mark.parametrize("name", STORIES)
def test_stories(contest: Contest, name: str) -> None:
    folder = SHARED / name
    if not folder.is_dir():
        pytest.skip("needs the story models beside the checkout")
    prompt = tuple(AutoTokenizer.from_pretrained(folder).encode("Once upon a time"))
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    drawn = Drawn(plain, prompt, samples=256, tokens=64)
    ours = drawn.ours()
    drawn.check(ours())
    contest.run(
        ours,
        {
            "roofline": drawn.hardware(torch.float32, reads=True),
            "generate": drawn.generate,
            "generate, static cache": lambda: drawn.generate(cache_implementation="static"),
            "TRL's way": drawn.second_pass,
            "disco's way": drawn.kept_scores,
        },
        **drawn.least(torch.float32),
        bars={"generate": STORIES[name]},
        shape=f"{drawn.samples} samples x {drawn.tokens} tokens",
        dtype="fp32",
        least_rounds=3,
        tokens=drawn.samples * drawn.tokens,
    )


def ending(plain: GPT2LMHeadModel, longest: int, mean: float) -> GPT2LMHeadModel:
    """The model with one probability of token 0, whatever was written: such that samples of up to
    ``longest`` tokens that end with it have ``mean``."""
    head, norm = plain.lm_head.weight.detach().double(), plain.transformer.ln_f
    likely = brentq(lambda p: sum((1 - p) ** t for t in range(longest)) - mean, 1e-6, 1 - 1e-6)
    along = head @ head[0]
    factor = brentq(lambda c: torch.softmax(c * along, 0)[0].item() - likely, 0.0, 1e4)
    with torch.no_grad():
        norm.weight.zero_()
        norm.bias.copy_(factor * head[0])
    return plain


# Samples on slots. With no more samples than slots nothing is refilled: the longest takes four
# times the steps of a mean one, and fewer slots make these cheaper, not fewer.
LENGTHS = [
    (1024, 64, "cpu"),
    (1024, 256, "cpu"),
    (256, 64, "cpu"),
    (256, 256, "cpu"),
    pytest.param(8192, 1024, "cuda", marks=NEEDS_CUDA),
    pytest.param(1024, 1024, "cuda", marks=NEEDS_CUDA),
]


@pytest.mark.parametrize(("samples", "slots", "device"), LENGTHS)
def test_lengths(contest: Contest, samples: int, slots: int, device: str) -> None:
    """Lengths by a geometric law with a mean a quarter of the longest, against as many tokens of
    samples of which none ends early, on as many slots: what waiting for the longest costs."""
    torch.manual_seed(0)
    # The shape of the larger story model.
    config = GPT2Config(vocab_size=14019, n_positions=512, n_embd=128, n_layer=8, n_head=16)
    plain, tokens = GPT2LMHeadModel(config).eval().to(device), 64
    drawn = Drawn(ending(plain, tokens, tokens / 4), (464,), samples, tokens)
    draw = drawn.ours(eos_ids=(0,), slots=slots)
    rollout = draw()
    drawn.check(rollout, whole=False)
    assert rollout.lengths.double().mean() == pytest.approx(tokens / 4, rel=0.2)
    draws = max(1, 4 * slots // samples)  # or the others would not fill the slots
    whole = Drawn(plain, (464,), draws * samples // 4, tokens)
    contest.run(
        lambda: [draw() for _ in range(draws)],
        {"nobody ends early": whole.ours(slots=slots)},
        bars={"nobody ends early": 0.85},
        shape=f"{samples} samples of {tokens // 4} tokens on {slots} slots",
        dtype="fp32",
        least_rounds=3,
        tokens=draws * samples * tokens // 4,
    )


@pytest.mark.parametrize("compute", ["fp32", "bf16"])
def test_gpt2(contest: Contest, compute: Literal["fp32", "bf16"]) -> None:
    require_products(compute)
    torch.manual_seed(0)
    drawn = Drawn(GPT2LMHeadModel(GPT2Config()), (464,), samples=64, tokens=64)
    ours, fp32 = drawn.ours(compute), drawn.ours("fp32")
    drawn.check(fp32())
    dtype = torch.float32 if compute == "fp32" else torch.bfloat16
    others: dict[str, Callable[[], object]] = {
        "matrix products": drawn.hardware(dtype, reads=False),
        "roofline": drawn.hardware(dtype, reads=True),
    }
    if compute == "fp32":
        others["generate"] = drawn.generate
        others["generate, static cache"] = lambda: drawn.generate(cache_implementation="static")
        others["TRL's way"] = drawn.second_pass
        others["disco's way"] = drawn.kept_scores
    else:
        others["ours in fp32"] = fp32
    contest.run(
        ours,
        others,
        **drawn.least(dtype),
        bars={"matrix products": 1 / 1.5} if compute == "fp32" else {"ours in fp32": 2.0},
        shape=f"{drawn.samples} samples x {drawn.tokens} tokens",
        dtype=compute,
        least_rounds=3,
        tokens=drawn.samples * drawn.tokens,
    )


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=NEEDS_CUDA)])
def test_t5(contest: Contest, device: str) -> None:
    """Samples of some articles, which have one length, so that `generate` need not pad."""
    torch.manual_seed(0)
    config = T5Config(num_layers=6, d_kv=64, decoder_start_token_id=0)  # of t5-small
    plain = T5ForConditionalGeneration(config).eval().to(device)
    articles, each, tokens = torch.randint(2, config.vocab_size, (16, 128)), 8, 32
    model = LanguageModel.from_model(
        copy.deepcopy(plain), compute="fp32", eos_ids=(), device=device
    )
    texts = tuple(map(tuple, articles.tolist()))
    prompts = PromptBatch(torch.arange(len(texts)), texts, ("",) * len(texts))
    sampler = Sampler(tokens, len(texts) * each)
    key = 0

    def ours() -> Rollout:
        nonlocal key
        key += 1
        return sampler.draw(model, prompts, each, key)

    def generate(**options: Any) -> Any:
        return plain.generate(
            articles.to(device),
            num_return_sequences=each,
            do_sample=True,
            top_k=0,
            top_p=1.0,
            temperature=1.0,
            min_new_tokens=tokens,
            max_new_tokens=tokens,
            eos_token_id=None,
            pad_token_id=0,
            **options,
        )

    rollout = ours()
    sampled = rollout.tokens[:, -tokens:]
    with torch.no_grad():
        written = torch.nn.functional.pad(sampled[:, :-1], (1, 0))
        read = articles.to(device).repeat_interleave(each, 0)
        logits = plain(input_ids=read, decoder_input_ids=written).logits
    expected = logits.log_softmax(-1).gather(-1, sampled[..., None])[..., 0]
    torch.testing.assert_close(rollout.token_logprob, expected, rtol=0, atol=1e-3)
    assert len(generate()) == len(sampled)
    contest.run(
        ours,
        {
            "generate": generate,
            "generate, static cache": lambda: generate(cache_implementation="static"),
        },
        shape=f"{len(texts)} prompts of 128 tokens x {each} samples x {tokens} tokens",
        dtype="fp32",
        device=device,
        least_rounds=3,
        tokens=len(sampled) * tokens,
    )


# Config -> samples, tokens, and the tokens per second that were asked for of an H100.
GPU = {
    "gpt2": (GPT2Config(), 1024, 64, 450_000),
    "llama3_1b": (
        LlamaConfig(
            hidden_size=2048,
            intermediate_size=8192,
            num_hidden_layers=16,
            num_attention_heads=32,
            num_key_value_heads=8,
            vocab_size=128256,
            max_position_embeddings=8192,
            tie_word_embeddings=True,
        ),
        1024,
        256,
        80_000,
    ),
}


@NEEDS_CUDA
@pytest.mark.parametrize("name", GPU)
def test_gpu(contest: Contest, name: str, tmp_path: Path) -> None:
    """In bf16. Weights are random, which speed does not depend on."""
    config, samples, tokens, wanted = GPU[name]
    torch.manual_seed(0)
    with torch.device("cuda"):
        plain = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    drawn = Drawn(plain, (464,), samples, tokens)
    ours = drawn.ours("bf16")
    drawn.check(ours(), tolerance=0.1)  # both in bf16
    engines = {"vllm": Vllm(drawn, tmp_path)}
    others, out = peers.taking_part(engines, "cuda", Vllm.draw)
    if name == "gpt2":
        others["disco's way"] = drawn.kept_scores
    else:
        out["disco's way"] = "keeps 67 GB of logits, and as many of log-probs"
    contest.run(
        ours,
        {
            "roofline": drawn.hardware(torch.bfloat16, reads=True),
            "generate": drawn.generate,
            "generate, static cache": lambda: drawn.generate(cache_implementation="static"),
            "TRL's way": drawn.second_pass,
            **others,
        },
        **drawn.least(torch.bfloat16),
        bars={"generate": 10.0} if name == "gpt2" else {},
        shape=f"{samples} samples x {tokens} tokens",
        dtype="bf16",
        device="cuda",
        least_rounds=2,
        tokens=samples * tokens,
        tokens_per_second_bar=wanted,
        took_no_part=out,
    )
