"""What is measured: lists of cases, one for each kind of machine."""

from typing import Any, NamedTuple

import torch

from hybrid_kernels import available_divergences

VOCABULARIES = (32000, 50257, 128256, 151936, 262144)
OURS = "hybrid_kernels"
LINEAR = "hybrid_kernels, dense + sparse"
HYBRID = "hybrid_kernels, dense + sparse + entropy"
TWO_LAUNCHES = (
    "hybrid_kernels, callable advantages",
    "hybrid_kernels token_terms",
    "hybrid_kernels scoring",
)
TORCH = ("torch eager", "torch.compile")
SUPPORTS = (32, 128, 512, 1024)
TOP_K = "hybrid_kernels, top-K"
TOP_K_TORCH = ("torch eager, top-K", "torch.compile, top-K", "torch.topk")
TWO_TEACHERS = ("hybrid_kernels, two teachers", "torch eager, two teachers")
PEERS = ("speculators 0.9.0", "Liger 0.8.5")


class Case(NamedTuple):
    """One row of the results. `inputs` names logits other than the usual random ones; `size` is D
    where the problem is given by hidden states."""

    provider: str
    rows: int
    vocabulary: int
    dtype: torch.dtype = torch.bfloat16
    divergence: str = "reverse_kl"
    inputs: str = ""
    size: int = 0

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        parts = (self.provider, self.rows, self.vocabulary, dtype, self.divergence, self.inputs)
        parts += (f"D{self.size}" if self.size else "",)
        return "-".join(str(part) for part in parts if part)


# Arguments of `Problem.random` by the name of the inputs.
INPUTS: dict[str, dict[str, Any]] = {
    "": {},
    "close models": {"noise": 0.02},
    "half of the rows masked": {"masked": 0.5},
    **{f"K={size}": {"support": size} for size in SUPPORTS},
}


def quick() -> list[Case]:
    """Under two minutes on two cores."""
    return [
        Case(provider, 64, 32000, torch.float32, divergence)
        for divergence in ("reverse_kl", "jsd")
        for provider in ("copy", OURS, HYBRID, *TORCH)
    ]


def cpu() -> list[Case]:
    """The sizes of the targets, on any machine without a GPU."""
    main = [
        Case(provider, 256, 151936, dtype, divergence)
        for dtype in (torch.float32, torch.bfloat16)
        for divergence in ("reverse_kl", "jsd")
        for provider in ("copy", OURS, HYBRID, *TORCH)
    ]
    others = [Case(name, 256, 151936, torch.float32) for name in TWO_LAUNCHES]
    families = [
        Case(OURS, 256, 151936, torch.float32, name)
        for name in available_divergences()
        if name not in ("reverse_kl", "jsd")
    ]
    supports = [
        Case(name, 256, 151936, torch.float32, inputs=f"K={size}")
        for size in SUPPORTS
        for name in (TOP_K, *(TOP_K_TORCH if size in (128, 1024) else ()))
    ]
    several = [Case(name, 256, 151936, torch.float32) for name in TWO_TEACHERS]
    return main + others + families + supports + several


def gpu() -> list[Case]:
    """Ten minutes on an H200, with the tests before it. The most important cases come first."""
    cases = [Case("copy", 8192, vocabulary) for vocabulary in VOCABULARIES]
    cases += [
        Case(OURS, 8192, vocabulary, divergence=divergence)
        for divergence in available_divergences()
        for vocabulary in VOCABULARIES
    ]
    cases += [Case(HYBRID, 8192, vocabulary) for vocabulary in VOCABULARIES]
    cases += [
        Case(peer, 8192, vocabulary)
        for peer in (*PEERS, "torch eager")
        for vocabulary in VOCABULARIES
    ]
    cases += [Case(name, 8192, 151936) for name in TWO_LAUNCHES]
    cases += [Case(TOP_K, 8192, 151936, inputs=f"K={size}") for size in SUPPORTS]
    cases += [
        Case(name, 8192, 151936, inputs=f"K={size}") for size in (128, 1024) for name in TOP_K_TORCH
    ]
    cases += [Case(name, 8192, 151936) for name in TWO_TEACHERS]
    cases += [
        Case(OURS, 8192, 151936, inputs=inputs)
        for inputs, options in INPUTS.items()
        if inputs and "support" not in options
    ]
    cases += [
        Case(provider, rows, 151936)
        for rows in (1024, 4096, 16384, 65536)
        for provider in ("copy", OURS)
    ]
    cases += [Case(peer, 8192, 151936, divergence="jsd") for peer in (*PEERS, "torch eager")]
    cases += [
        Case(provider, 4096, 151936, torch.float32) for provider in ("copy", OURS, "torch eager")
    ]
    cases += [Case("torch.compile", 8192, vocabulary) for vocabulary in VOCABULARIES]
    cases += [Case("torch.compile, max-autotune", 8192, 151936)]
    return cases


def linear_cpu() -> list[Case]:
    """From hidden states, the sizes of the targets; TRL is what a user would take instead."""
    main = ("four GEMMs alone", LINEAR, "TRL 1.16, divergence + log-prob", "torch eager")
    others = (
        "hybrid_kernels, dense",
        "TRL 1.16, divergence",
        "hybrid_kernels, callable advantages",
        "hybrid_kernels, frozen weight",
        "hybrid_kernels, scoring",
    )
    sized: dict[str, Any] = {"rows": 256, "vocabulary": 151936, "size": 1024}
    cases = [Case(name, dtype=torch.float32, **sized) for name in (*main, *others)]
    large = {**sized, "rows": 2048}
    return cases + [Case(name, dtype=torch.float32, **large) for name in main[:2]]


def linear_gpu() -> list[Case]:
    """From hidden states, N=8192 and D=4096."""
    from bench.linear import LINEAR_PROVIDERS

    sized: dict[str, Any] = {"rows": 8192, "size": 4096}
    first = ("four GEMMs alone", LINEAR, "TRL 1.16, divergence + log-prob")
    cases = [Case(name, vocabulary=v, **sized) for v in (151936, 128256) for name in first]
    cases += [
        Case(name, vocabulary=151936, divergence=provider.divergences[-1], **sized)
        if "reverse_kl" not in provider.divergences
        else Case(name, vocabulary=151936, **sized)
        for name, provider in LINEAR_PROVIDERS.items()
        if name not in first
    ]
    return cases


SUITES = {
    "quick": quick,
    "cpu": cpu,
    "gpu": gpu,
    "linear-cpu": linear_cpu,
    "linear-gpu": linear_gpu,
}
