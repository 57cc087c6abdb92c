"""Adapters of peft: pi and a over one copy of the weights, of which only the adapter learns."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from families import batch, double, language_model, reference_logprob
from tiny import write_tiny_model, write_tiny_t5
from torch import Tensor, nn

import fdpg_fast as fdpg
from fdpg_fast import trainer as training
from fdpg_fast.adapters import AdapterError
from fdpg_fast.cli import main
from fdpg_fast.config import ConfigError
from fdpg_fast.models import LanguageModel
from fdpg_fast.pretrained import Compute
from fdpg_fast.progress import SilentDisplay
from fdpg_fast.rollout import Rollout
from fdpg_fast.run_directory import RunDirectory, RunDirectoryError
from fdpg_fast.sampler import Sampler
from fdpg_fast.trainer import Trainer

pytest.importorskip("peft", reason="needs the optional package peft")
pytestmark = pytest.mark.usefixtures("one_thread")

EOS = tuple(range(6))
# Nats per token from fp64, by compute.
TOLERANCE: dict[Compute, float] = {"fp32": 1e-4, "bf16": 0.2, "fp16": 0.02}
PROMPTS = batch([7, 3, 9], [4], [1, 2, 3, 4, 5, 6, 7])


def draw(model: LanguageModel) -> Rollout:
    return Sampler(10, batch_size=8).draw(model, PROMPTS, 5, key=3)


def storage(model: LanguageModel) -> dict[int, Tensor]:
    return {p.data_ptr(): p for p in model.model.parameters()}


def disturb(model: LanguageModel, size: float = 0.1) -> LanguageModel:
    """As if it had learnt: LoRA starts with a factor of zero, which hides what ignores it."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_(noise.to(parameter.device), alpha=size)
    return model


@pytest.mark.parametrize("compute", TOLERANCE)
@pytest.mark.parametrize(
    "family", ["gpt2", "llama", "opt", "gpt_neox", "gemma2", "cohere", "t5_gated", "bart"]
)
def test_the_policy_is_the_base_until_it_learns(family: str, compute: Compute) -> None:
    """Bit for bit: with the fused head, by slots, and for tied and untied heads."""
    base = language_model(family, eos_ids=EOS, compute=compute)
    policy = base.with_adapter(rank=4)
    assert policy.compute == base.compute == compute
    assert policy.attention == base.attention
    assert policy.head is not None
    rollout = draw(base)
    assert torch.equal(policy.token_logprob(rollout), base.token_logprob(rollout))
    drawn = draw(policy)
    assert torch.equal(drawn.tokens, rollout.tokens)
    assert torch.equal(drawn.token_logprob, rollout.token_logprob)


def test_layers_of_an_adapter_are_by_the_kernels_that_those_of_the_base_are_by() -> None:
    policy = language_model("gpt2").with_adapter(rank=4)
    linear = [module for module in policy.model.modules() if isinstance(module, nn.Linear)]
    assert len(linear) > 8  # two for each layer of the base that has an adapter
    assert {type(module) for module in linear} == {type(policy.model.lm_head)} != {nn.Linear}


@pytest.mark.gpu
@pytest.mark.parametrize("family", ["gpt2", "llama", "t5"])
def test_adapters_learn_on_a_gpu(family: str) -> None:
    """In the compute that is usual there, by packed sequences where there is a kernel for them."""
    base = language_model(family, eos_ids=EOS, device="cuda", compute="auto")
    assert base.compute == "bf16"
    policy = base.with_adapter(rank=4)
    assert policy.packs == base.packs
    disturb(policy)
    rollout = draw(policy)
    truth = reference_logprob(double(policy), rollout).detach()
    assert (truth - base.token_logprob(rollout)).abs().max() > 0.05, "the adapter does nothing"
    for found in (rollout.token_logprob, policy.token_logprob(rollout)):
        torch.testing.assert_close(found.double(), truth, rtol=0, atol=TOLERANCE["bf16"])
    weights = torch.ones(len(rollout), dtype=torch.float64, device=policy.device)
    policy.accumulate_gradient(rollout, weights, denominator=1)
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in policy.parameters())
    assert all(p.grad is None for p in base.parameters())


@pytest.mark.parametrize(
    ("family", "peft", "target_modules", "options"),
    [
        ("gpt2", "lora", "all-linear", {}),
        ("llama", "lora", ["q_proj", "down_proj"], {"use_rslora": True}),
        ("gemma2", "lora", ["embed_tokens", "v_proj"], {}),
        ("llama", "lora", ["lm_head", "o_proj"], {}),
        ("llama", "lora", ["o_proj"], {"modules_to_save": ["lm_head"]}),
        ("opt", "lokr", "all-linear", {}),
        ("gpt_neox", "ia3", "all-linear", {"feedforward_modules": []}),
        ("t5", "lora", "all-linear", {}),
        ("bart", "lora", ["k_proj", "fc2"], {}),
    ],
)
@pytest.mark.filterwarnings("ignore:.*an adapter on the output layer:RuntimeWarning")
@pytest.mark.filterwarnings("ignore:.*a tied layer is part of the adapter:UserWarning")
def test_log_probs_and_gradients_are_those_of_fp64(
    family: str, peft: str, target_modules: Any, options: Mapping[str, Any]
) -> None:
    base = language_model(family, eos_ids=EOS)
    policy = base.with_adapter(peft, rank=4, target_modules=target_modules, options=options)
    disturb(policy)
    rollout = draw(policy)
    plain = double(policy)
    truth = reference_logprob(plain, rollout)
    assert (truth - base.token_logprob(rollout)).abs().max() > 0.05, "the adapter does nothing"
    for found in (rollout.token_logprob, policy.token_logprob(rollout)):
        torch.testing.assert_close(found.double(), truth.detach(), rtol=0, atol=1e-4)
    weights = torch.linspace(-1, 1, len(rollout), dtype=torch.float64)
    (-(weights * truth.sum(1)).sum() / 30).backward()
    expected = dict(plain.named_parameters())
    base.token_logprob(rollout)  # as between two micro-batches of the policy
    policy.accumulate_gradient(rollout, weights, denominator=30, micro_batch=4)
    own = policy.named_parameters()
    assert own
    for name, parameter in policy.model.named_parameters():
        if name not in own:
            assert parameter.grad is None, f"{name} is the base's"
            continue
        assert parameter.grad is not None, name
        true = expected[name].grad
        error = (parameter.grad.double() - true).abs().max()
        assert error <= 1e-4 * true.abs().max() + 1e-7, name


def test_weights_are_shared_and_the_base_does_not_notice() -> None:
    base = language_model("llama", eos_ids=EOS)
    before = {name: p.detach().clone() for name, p in base.model.named_parameters()}
    names, flags = list(before), [p.requires_grad for p in base.parameters()]
    policy = base.with_adapter(rank=2)
    proposal = policy.frozen_copy()
    for other in (policy, proposal):
        assert storage(base).keys() < storage(other).keys()
        own = {p.data_ptr() for p in other.parameters()}
        assert storage(other).keys() - own == storage(base).keys()
    assert not {p.data_ptr() for p in policy.parameters()} & storage(proposal).keys()
    assert all(p.requires_grad for p in policy.parameters())
    assert not any(p.requires_grad for p in proposal.parameters())
    assert list(base.named_parameters()) == names, "no module of the base was replaced"
    assert [p.requires_grad for p in base.parameters()] == flags

    rollout = draw(base)
    of_base = base.token_logprob(rollout)
    optimiser = torch.optim.AdamW(policy.parameters(), lr=0.1, weight_decay=0.1)
    for _ in range(3):
        policy.accumulate_gradient(rollout, torch.ones(15, dtype=torch.float64), denominator=15)
        optimiser.step()
    assert (policy.token_logprob(rollout) - of_base).abs().max() > 0.05
    assert torch.equal(base.token_logprob(rollout), of_base)
    assert torch.equal(proposal.token_logprob(rollout), of_base)
    assert all(torch.equal(p, before[name]) for name, p in base.named_parameters().items())
    proposal.copy_weights_from(policy)
    assert torch.equal(proposal.token_logprob(rollout), policy.token_logprob(rollout))


def test_an_adapter_on_the_output_layer_takes_the_plain_path_loudly() -> None:
    """`weight` of such a layer is the base's: the fused head would read past the adapter."""
    base = language_model("llama", eos_ids=EOS)
    with pytest.warns(RuntimeWarning, match="an adapter on the output layer"):
        policy = base.with_adapter(target_modules=["lm_head"])
    assert policy.head is None
    assert base.head is not None


def test_dropout_of_an_adapter_is_off() -> None:
    base = language_model("llama", eos_ids=EOS)
    policy = disturb(base.with_adapter(options={"lora_dropout": 0.5}))
    rates = [m.p for m in policy.model.modules() if isinstance(m, nn.Dropout)]
    assert rates
    assert set(rates) == {0.0}
    rollout = draw(base)
    still = policy.token_logprob(rollout)
    policy.model.train()
    assert torch.equal(policy.token_logprob(rollout), still)


def test_recomputed_activations_have_the_adapter() -> None:
    plain = disturb(language_model("llama", eos_ids=EOS).with_adapter(rank=2))
    saving = language_model("llama", eos_ids=EOS, activation_checkpointing=True)
    saving = disturb(saving.with_adapter(rank=2))
    rollout = draw(plain)
    weights = torch.randn(len(rollout), dtype=torch.float64)
    for model in (plain, saving):
        model.accumulate_gradient(rollout, weights, denominator=1)
    for a, b in zip(plain.parameters(), saving.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-5, atol=1e-5 * float(a.grad.abs().max()))


def test_what_cannot_be_an_adapter_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    base = language_model("llama", eos_ids=EOS)
    for settings, message in (
        ({"peft": "loraa"}, "peft has no such kind"),
        ({"peft": "prompt_tuning"}, "adds to the prompt"),
        ({"peft": "adalora"}, "its ranks change"),
        ({"target_modules": ["c_attn"]}, r"c_attn.* not found.*Way out: other target modules"),
        ({"options": {"rnk": 3}}, "unknown option 'rnk'"),
        ({"options": {"bias": "all"}}, "also trains weights of the base"),
        ({"options": {"init_lora_weights": False}}, "before it has learnt anything, by"),
    ):
        if "bias" in str(settings):
            base = language_model("opt", eos_ids=EOS)  # a family with biases
        with pytest.raises(AdapterError, match=message):
            base.with_adapter(**settings)
    with pytest.raises(AdapterError, match="has an adapter already"):
        base.with_adapter().with_adapter()
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(AdapterError, match="pip install peft"):
        base.with_adapter()


# ---- files and runs -----------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_tiny_model(tmp_path / "base")


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # of peft 0.21
@pytest.mark.parametrize("compute", TOLERANCE)
@pytest.mark.parametrize("kind", ["CausalLM", "Seq2SeqLM"])
def test_save_and_load(kind: str, compute: Compute, tmp_path: Path) -> None:
    import peft

    write = {"CausalLM": write_tiny_model, "Seq2SeqLM": write_tiny_t5}[kind]
    folder = write(tmp_path / "base")
    policy = disturb(LanguageModel.load(folder, compute=compute).with_adapter(rank=2))
    rollout = Sampler(8).draw(policy, batch([1, 2]), 6, key=0)
    scored = policy.token_logprob(rollout)
    saved = tmp_path / "adapter"
    policy.save(saved)
    assert not (saved / "model.safetensors").exists(), "the base's weights are not written"
    assert not list(saved.glob("*.bin")), "no pickle"
    assert (saved / "tokenizer.json").is_file()
    assert all(p.requires_grad for p in policy.parameters()), "it can go on learning"

    again = LanguageModel.load(saved, compute=compute)
    assert again.name == str(saved)
    assert again.named_parameters().keys() == policy.named_parameters().keys()
    assert torch.equal(again.token_logprob(rollout), scored)
    on_base = LanguageModel.load(folder, compute=compute).with_saved_adapter(saved)
    assert torch.equal(on_base.token_logprob(rollout), scored)
    for theirs in (
        getattr(peft, f"AutoPeftModelFor{kind}"),
        getattr(transformers, f"AutoModelFor{kind}"),
    ):
        plain = theirs.from_pretrained(saved).eval()
        with torch.no_grad():
            truth = reference_logprob(plain.double(), rollout)
        torch.testing.assert_close(scored.double(), truth, rtol=0, atol=TOLERANCE[compute])
    # A copy of what was loaded goes on learning from there.
    more = again.trainable_copy()
    assert torch.equal(more.token_logprob(rollout), scored)
    assert all(p.requires_grad for p in more.parameters())
    assert storage(again).keys() & storage(more).keys()


def test_adapters_without_their_base_say_so(folder: Path, tmp_path: Path) -> None:
    saved = tmp_path / "adapter"
    LanguageModel.load(folder).with_adapter(rank=2).save(saved)
    config = json.loads((saved / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = None
    (saved / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(AdapterError, match="does not say which model it belongs to"):
        LanguageModel.load(saved)
    with pytest.raises(AdapterError, match="load the model that it was trained on"):
        language_model("llama").with_saved_adapter(saved)


SETTINGS: dict[str, Any] = {
    "peft": "lora",
    "rank": 4,
    "max_new_tokens": 6,
    "samples_per_prompt": 32,
    "learning_rate": 3e-2,
    "steps": 4,
    "evaluation_samples": 0,
    "display": SilentDisplay(),
    "prompts": "once there was",
}


@pytest.fixture
def no_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "write_report", lambda runs, path: path)


def dogs(folder: Path, compute: Compute = "fp32") -> fdpg.Target:
    return fdpg.load(str(folder), compute=compute).constrain({fdpg.contains("dog"): 1.0})


@pytest.mark.usefixtures("no_plots")
@pytest.mark.parametrize(("lagging", "compute"), [(False, "fp32"), (True, "fp32"), (True, "bf16")])
def test_resuming_changes_nothing(
    folder: Path, tmp_path: Path, lagging: bool, compute: Compute
) -> None:
    settings = {**SETTINGS, "adaptive_proposal": lagging, "proposal_every": 1}
    whole = Trainer(dogs(folder, compute), out=tmp_path / "whole", **settings)
    whole.train()
    start = {name: p.detach().clone() for name, p in whole.base.named_parameters().items()}
    half = Trainer(dogs(folder, compute), out=tmp_path / "half", **{**settings, "steps": 2})
    half.train()
    rest = Trainer(dogs(folder, compute), out=tmp_path / "half", resume=True, **settings)
    assert rest.steps_done == 2
    rest.train()
    for name, parameter in rest.parameters.items():
        assert torch.equal(parameter, whole.parameters[name]), name
        assert "lora" in name
    fresh = fdpg.load(str(folder)).model.named_parameters()
    assert all(torch.equal(start[name], fresh[name]) for name in fresh)
    newest = RunDirectory(tmp_path / "half").checkpoints / "step-000004"
    size = (newest / "policy.safetensors").stat().st_size
    assert size < 4 * sum(p.numel() for p in whole.base.parameters()), "adapters only"
    with pytest.raises(RunDirectoryError, match=r"started with another adapter\.rank"):
        Trainer(
            dogs(folder, compute), out=tmp_path / "half", resume=True, **{**settings, "rank": 8}
        )


@pytest.mark.usefixtures("no_plots")
def test_a_run_is_sampled_and_evaluated(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In the compute that is usual on a GPU."""
    out = tmp_path / "run"
    config = fdpg.Config.read(
        {
            "model": {"name": str(folder), "compute": "bf16"},
            "adapter": {"peft": "lora", "rank": 2},
            "target": {"constrain": [{"contains": "dog"}]},
            "prompts": {"source": "once there was"},
            "sampling": {"max_new_tokens": 6, "samples_per_prompt": 16},
            "run": {"steps": 1, "evaluation_samples": 0},
        }
    )
    run = Trainer.from_config(config, out=out, display=SilentDisplay())
    run.train()
    assert "adapter of 0.00 M weights on" in run.header()["model"]
    assert main(["sample", str(out), "-n", "2"]) == 0
    assert main(["evaluate", str(out), "--samples", "16"]) == 0
    assert "written to" in capsys.readouterr().out


def test_a_missing_kind_is_told_before_anything_is_drawn(folder: Path) -> None:
    with pytest.raises(AdapterError, match="peft has no such kind"):
        Trainer(dogs(folder), **{**SETTINGS, "peft": "lorra"})
    with pytest.raises(ConfigError, match=r"`adapter\.rank` expected at least 1"):
        Trainer(dogs(folder), **{**SETTINGS, "rank": 0})


def test_the_embedded_model_takes_an_adapter() -> None:
    base = LanguageModel.load(device="cpu")
    assert base.with_adapter(rank=2).checks["scoring"] <= base.checks["tolerance"]
