"""What is installed, and which versions and devices are known to go wrong."""

from __future__ import annotations

import platform
import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

import torch
from packaging.version import Version


PACKAGES = (
    "torch",
    "transformers",
    "trl",
    "accelerate",
    "datasets",
    "deepspeed",
    "peft",
    "triton",
    "flash-attn",
    "flash-attn-3",
    "flash-attn-4",
    "kernels",
    "flash-linear-attention",
    "causal-conv1d",
    "liger-kernel",
)
HOPPER = 9  # major compute capability
FLASH_2 = ("sdpa", "eager", "torch_varlen", "flash_attention_2", "kernels-community/flash-attn2")
"""Attention that runs FlashAttention 2 on trees on an H100."""


@dataclass(frozen=True, slots=True)
class Gpu:
    """One CUDA device."""

    name: str
    capability: tuple[int, int]  # compute capability
    memory_bytes: int


@dataclass(frozen=True, slots=True)
class Environment:
    """Software and hardware of this machine."""

    system: str  # operating system and processor
    python: str
    cuda: str | None  # version that PyTorch was built for
    driver: str | None  # version of the NVIDIA driver
    gpus: tuple[Gpu, ...]
    packages: dict[str, str | None]  # version by package; `None` if it is not installed
    problems: tuple[str, ...]  # what is known to go wrong, with the way out

    @classmethod
    def detect(cls) -> Environment:
        """Read what is installed on this machine."""
        packages = {name: _version(name) for name in PACKAGES}
        found = map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))
        gpus = tuple(Gpu(gpu.name, (gpu.major, gpu.minor), gpu.total_memory) for gpu in found)
        driver = _driver()
        return cls(
            system=f"{platform.system()} {platform.machine()}",
            python=platform.python_version(),
            cuda=torch.version.cuda,
            driver=driver,
            gpus=gpus,
            packages=packages,
            problems=tuple(known_problems(packages, gpus, driver, torch.version.cuda)),
        )


def known_problems(
    packages: Mapping[str, str | None], gpus: Sequence[Gpu], driver: str | None, cuda: str | None
) -> Iterator[str]:
    """Yield what is known to go wrong with these versions and devices, with the way out; `cuda` is PyTorch's."""
    has_hopper = any(gpu.capability[0] == HOPPER for gpu in gpus)
    if has_hopper and packages.get("flash-linear-attention") and _within(packages.get("triton"), "3.4", "3.7.1"):
        yield (
            f"Triton {packages['triton']} compiles the backward pass of flash-linear-attention's "
            "chunk_gated_delta_rule wrongly on Hopper (fla-org/flash-linear-attention#640 and #826). N-pass has the "
            "same error, so that `verify` cannot see it. Install triton>=3.7.1."
        )
    if _within(packages.get("flash-attn"), "0", "2.7"):
        yield f"flash-attn {packages['flash-attn']} lacks what tree attention needs. Install flash-attn>=2.7."
    if gpus and _within(packages.get("torch"), "0", "2.7"):
        yield (
            f"PyTorch {packages['torch']}: with 2.6, FlexAttention gave wrong gradients of keys that are not "
            "contiguous (pytorch/pytorch#146377). Install torch>=2.7, or use no flex_attention and no softcap."
        )
    if packages.get("trl") == "1.15.0":
        yield "TRL 1.15.0 cannot train on a machine without Triton. Install another release."
    if driver is not None and cuda is None:
        yield (
            f"The NVIDIA driver {driver} is installed, but PyTorch {packages.get('torch')} was built without CUDA. "
            "Install a CUDA build of PyTorch."
        )
    elif driver is not None and not gpus:
        yield f"PyTorch sees no GPU, though the NVIDIA driver {driver} is installed. Is CUDA_VISIBLE_DEVICES empty?"
    if any(gpu.capability < (8, 0) for gpu in gpus):
        yield "Flash attention needs a GPU of compute capability 8.0 or higher: older ones run the slow block path."


def faster_kernel(implementation: str, gpus: Sequence[Gpu], packages: Mapping[str, str | None]) -> str | None:
    """Return how attention gets faster on these GPUs, and by how much; `None` where nothing faster is known."""
    if implementation not in FLASH_2 or not gpus or any(gpu.capability[0] != HOPPER for gpu in gpus):
        return None
    way = "load" if packages.get("flash-attn-3") else "install flash-attn-3 and load"
    return (
        f"{way} the model with attn_implementation='flash_attention_3'. On this GPU, FlashAttention 3 is published as "
        "1.5 to 2 times as fast forward and 1.5 to 1.75 times backward as FlashAttention 2, which runs now."
    )


def _within(found: str | None, first: str, end: str) -> bool:
    return found is not None and Version(first) <= Version(found) < Version(end)


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _driver() -> str | None:
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    query = [program, "--query-gpu=driver_version", "--format=csv,noheader"]
    found = subprocess.run(query, capture_output=True, text=True, check=False)
    return found.stdout.split("\n")[0].strip() or None if found.returncode == 0 else None
