"""One f-DPG step as others would take it: the contenders of bench_step.py.

Each contender is built once from a model path and then steps: sample 256 continuations of the
prompt, score them under the target a(x) [x contains "dog"], weight them, and take one optimiser
step. All of them train the same model on the same prompt at the same batch size and length.
"""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import math
import os
import re
import tempfile
import threading
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.nn.functional import softplus

PROMPT = "Once upon a time"
WORD = re.compile(r"\bdog\b", re.IGNORECASE)


@dataclass(frozen=True)
class StepShape:
    """The work of one step: samples, sampled tokens each, and the learning rate."""

    samples: int = 256
    tokens: int = 40
    learning_rate: float = 3e-5


def contains_dog(texts: list[str]) -> torch.Tensor:
    return torch.tensor([float(bool(WORD.search(t))) for t in texts], dtype=torch.float64)


class PlainLoop:
    """What a careful person writes in plain PyTorch: `generate`, two forwards, autograd, Adam.

    Jensen-Shannon, leave-one-out baseline, Z averaged over all samples so far; micro-batches of 64
    so that the logits of the whole batch are never alive at once.
    """

    name = "plain PyTorch loop"

    def __init__(self, model_path: str, shape: StepShape, micro_batch: int = 64) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self.shape, self.micro_batch = shape, micro_batch
        self.tokenizer = AutoTokenizer.from_pretrained(model_path)
        self.policy = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32).eval()
        self.base = copy.deepcopy(self.policy).requires_grad_(False)
        self.optimiser = torch.optim.Adam(self.policy.parameters(), lr=shape.learning_rate)
        self.prompt = torch.tensor([self.tokenizer.encode(PROMPT)])
        self.z_sum, self.z_count = 0.0, 0
        self.satisfied = self.kl_to_base = float("nan")

    def _logprob(self, model: torch.nn.Module, tokens: torch.Tensor) -> torch.Tensor:
        start = self.prompt.shape[1]
        logits = model(tokens, use_cache=False).logits[:, start - 1 : -1]
        picked = torch.log_softmax(logits, -1).gather(-1, tokens[:, start:, None])[..., 0]
        eos = tokens[:, start:] == self.tokenizer.eos_token_id
        alive = eos.cumsum(-1) - eos.long() == 0  # up to the first EOS, included
        return (picked * alive).sum(-1, dtype=torch.float64)

    def step(self) -> None:
        n, start = self.shape.samples, self.prompt.shape[1]
        with torch.no_grad():
            tokens = self.policy.generate(
                self.prompt.expand(n, -1),
                attention_mask=torch.ones(n, start, dtype=torch.long),
                do_sample=True,
                top_k=0,
                top_p=1.0,
                temperature=1.0,
                max_new_tokens=self.shape.tokens,
                pad_token_id=self.tokenizer.eos_token_id,
            )
            parts = tokens.split(self.micro_batch)
            log_pi = torch.cat([self._logprob(self.policy, p) for p in parts])
            log_a = torch.cat([self._logprob(self.base, p) for p in parts])
            score = contains_dog(
                self.tokenizer.batch_decode(tokens[:, start:], skip_special_tokens=True)
            )
            log_p = log_a + score.log()
            self.z_sum += (log_p - log_pi).exp().sum().item()
            self.z_count += n
            self.satisfied = score.mean().item()
            self.kl_to_base = (log_pi - log_a).mean().item()
            if self.z_sum == 0:
                return
            log_t = log_pi - (log_p - math.log(self.z_sum / self.z_count))
            reward = -(math.log(2) - softplus(-log_t))
            weight = reward - (reward.sum() - reward) / (n - 1)
        self.optimiser.zero_grad()
        for part, w in zip(parts, weight.split(self.micro_batch), strict=True):
            (-(w * self._logprob(self.policy, part)).sum() / n).backward()
        self.optimiser.step()


class Disco:
    """naver/disco's own tuner and its JS loss; its licence, for research only, is not ours."""

    name = "disco"

    def __init__(self, model_path: str, shape: StepShape) -> None:
        from disco.distributions import LMDistribution
        from disco.scorers import BooleanScorer
        from disco.tuners.losses import JSLoss
        from disco.tuners.tuner import Tuner

        with contextlib.redirect_stdout(None):
            base = LMDistribution(model_path, length=shape.tokens, device="cpu")
            policy = LMDistribution(model_path, length=shape.tokens, device="cpu", freeze=False)
        target = base * BooleanScorer(lambda s, _: torch.tensor(bool(WORD.search(s.text))))
        self.tuner = Tuner(
            policy,
            target,
            context_dataset=[PROMPT],
            loss=JSLoss(),
            features=[],
            n_contexts_per_step=1,
            n_samples_per_context=shape.samples,
            sampling_size=shape.samples,
            scoring_size=64,
            learning_rate=shape.learning_rate,
        )
        torch.autograd.set_detect_anomaly(False)  # it switches this on for the whole process

    def step(self) -> None:
        self.tuner._step()


class TrlRloo:
    """TRL's RLOO trainer with the word as reward and its KL penalty: its nearest thing to f-DPG.

    Its trainer owns its loop, so it runs in a thread of its own and a callback lets one optimiser
    step through at a time.
    """

    name = "TRL RLOO"

    def __init__(self, model_path: str, shape: StepShape, micro_batch: int = 64) -> None:
        os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
        from datasets import Dataset
        from transformers import AutoTokenizer, TrainerCallback
        from trl import RLOOConfig, RLOOTrainer

        begin, done = threading.Semaphore(0), threading.Semaphore(0)
        self.begin, self.done, self.error = begin, done, None

        class Gate(TrainerCallback):
            def on_step_begin(self, *args: object, **kwargs: object) -> None:
                begin.acquire()

            def on_step_end(self, *args: object, **kwargs: object) -> None:
                done.release()

        folder = tempfile.TemporaryDirectory()
        trainer = RLOOTrainer(
            model=model_path,
            reward_funcs=lambda completions, **_: contains_dog(completions).tolist(),
            args=RLOOConfig(
                output_dir=folder.name,
                per_device_train_batch_size=micro_batch,
                gradient_accumulation_steps=shape.samples // micro_batch,
                num_generations=shape.samples,
                max_completion_length=shape.tokens,
                max_steps=10_000,
                learning_rate=shape.learning_rate,
                top_k=0,
                temperature=1.0,
                beta=0.1,
                bf16=False,
                gradient_checkpointing=False,
                report_to=[],
                save_strategy="no",
                logging_strategy="no",
                use_cpu=True,
                disable_tqdm=True,
                dataloader_pin_memory=False,
            ),
            train_dataset=Dataset.from_dict({"prompt": [PROMPT] * 16}),
            processing_class=AutoTokenizer.from_pretrained(model_path, padding_side="left"),
            callbacks=[Gate()],
        )

        def run() -> None:
            try:
                with folder:
                    trainer.train()
            except Exception as error:
                self.error = error
                done.release()

        threading.Thread(target=run, daemon=True).start()

    def step(self) -> None:
        self.begin.release()
        self.done.acquire()
        if self.error is not None:
            raise self.error


CONTENDERS = {PlainLoop: None, TrlRloo: "trl", Disco: "disco"}  # and the module each one needs


def contenders(
    model_path: str, shape: StepShape
) -> tuple[dict[str, Callable[[], None]], list[str]]:
    """Name -> one step, for those that can run here, and the names of those that cannot."""
    steps, missing = {}, []
    for contender, module in CONTENDERS.items():
        if module is None or importlib.util.find_spec(module) is not None:
            steps[contender.name] = contender(model_path, shape).step
        else:
            missing.append(contender.name)
    return steps, missing
