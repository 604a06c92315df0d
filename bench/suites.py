"""The cases that are measured on a CPU; `gpu/stages.py` lists those for a GPU."""

from typing import Any, NamedTuple

import torch

from hybrid_kernels import available_divergences

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


class Case(NamedTuple):
    """What one row of the results is measured on.

    Attributes:
        provider: a key of `PROVIDERS` or, from hidden states, of `LINEAR_PROVIDERS`.
        rows: N.
        vocabulary: V.
        dtype: of the inputs.
        divergence: its name.
        inputs: a key of `INPUTS`; empty for ordinary logits.
        size: D from hidden states; 0 from logits.
    """

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


# Arguments of `Problem.random`.
INPUTS: dict[str, dict[str, Any]] = {
    "": {},
    "close models": {"noise": 0.02},
    "half of the rows masked": {"masked": 0.5},
    **{f"K={size}": {"support": size} for size in SUPPORTS},
}


def quick() -> list[Case]:
    """A suite that takes less than two minutes on two cores."""
    return [
        Case(provider, 64, 32000, torch.float32, divergence)
        for divergence in ("reverse_kl", "jsd")
        for provider in ("copy", OURS, HYBRID, *TORCH)
    ]


def cpu() -> list[Case]:
    """Problems with 256 rows of V=151,936."""
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


def linear_cpu() -> list[Case]:
    """Problems from hidden states, with V=151,936 and D=1,024."""
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


SUITES = {
    "quick": quick,
    "cpu": cpu,
    "linear-cpu": linear_cpu,
}
