"""What `fdpg env` prints: what is installed, what is used, and why."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from importlib import metadata

import torch

from fdpg_fast._build import load, refusal_of_gpu
from fdpg_fast._version import __version__
from fdpg_fast.attention import attention_report
from fdpg_fast.ops.matmul import fuses, gpu_has_bf16, has_16_bit_products, library

__all__ = ["describe", "device_name", "versions"]

PACKAGES = ("torch", "transformers", "safetensors", "numpy", "jsonargparse", "rich", "matplotlib")


def versions() -> dict[str, str]:
    """Of the package, of Python, and of what decides a run's numbers."""
    return {
        "fdpg_fast": __version__,
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "transformers": metadata.version("transformers"),
    }


def device_name(device: torch.device) -> str:
    """``cpu, avx512, 2 threads`` or the GPU's name."""
    if device.type == "cuda":
        return f"{device}, {torch.cuda.get_device_name(device)}"
    return f"{device.type}, {load().cpu_isa()}, {torch.get_num_threads()} threads"


def describe() -> Iterator[tuple[str, str]]:
    """Rows ``(what, how it is)``."""
    compiled = load()
    yield "fdpg_fast", __version__
    yield "python", f"{platform.python_version()}, {platform.system()} {platform.machine()}"
    for package in PACKAGES:
        try:
            yield package, metadata.version(package)
        except metadata.PackageNotFoundError:
            yield package, "not installed"
    for name, value in compiled.build_info().items():
        yield f"build: {name}", str(value)
    lowered = os.environ.get("FDPG_CPU_ISA")
    why = f"by FDPG_CPU_ISA={lowered}" if lowered else "chosen at run time"
    yield "CPU instructions", f"{compiled.cpu_isa()}, {why}"
    ours, reason = library()
    head = "" if ours or not fuses() else "; a head's logits with their log-probs: ours"
    yield "fp32 products", reason + head
    yield "threads", f"{torch.get_num_threads()} of {os.cpu_count()} cores"
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            bf16 = "used" if gpu_has_bf16(torch.device("cuda", index)) else "not used: it has none"
            refusal = refusal_of_gpu(torch.cuda.get_device_capability(index))
            why = f"bf16 {bf16}" if refusal is None else f"not used: {refusal}"
            yield f"cuda:{index}", f"{torch.cuda.get_device_name(index)}; {why}"
    else:
        reason = "torch was built without CUDA" if torch.version.cuda is None else "no GPU found"
        yield "CUDA", f"not used: {reason}"
        slow = "" if has_16_bit_products("bf16") else ", and very slow on this one"
        yield "bf16", f"not used on CPUs unless --model.compute bf16 asks for it{slow}"
    for name, available, why in attention_report():
        yield f"attention: {name}", f"{'available' if available else 'not available'}: {why}"
