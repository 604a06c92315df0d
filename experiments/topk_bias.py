"""`python -m experiments topk`: what top-K distillation losses do to the gradient.

The loss is the reverse KL between synthetic next-token distributions. For each variant: how far its
expected logit gradient is from the gradient over the full vocabulary, whether it sums to 0 over the
vocabulary and vanishes at p = q, and how noisy the two unbiased variants are. Everything is exact
in float64: values come from `hybrid_kernels.reference`, gradients from autograd, and expectations
over the sampled token are sums over the vocabulary.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from hybrid_kernels import TopK, reference

ROWS, VOCABULARY = 8, 50_000
SIZES = (8, 16, 32, 64, 128, 256, 512, 1024)
# The scenarios, and the K that the table shows for each.
SHOWN = {"peaked": 128, "teacher's tail 3 nats lower": 32}


class Models(NamedTuple):
    """Float64 logits `[ROWS, V]`."""

    student: Tensor
    teacher: Tensor


class StudentTopK(NamedTuple):
    """The support S of a top-K loss, which is the student's best K entries.

    Attributes:
        inside: bool `[ROWS, V]`, whether an entry is in S.
        teacher: the teacher's log-probabilities on S, `[ROWS, K]`.
    """

    inside: Tensor
    teacher: TopK


def models(scenario: str, vocabulary: int = VOCABULARY) -> Models:
    """Models after Zipf's law with noise; the student's best K entries hold 97 to 98 % of its mass.

    The teacher's logits differ from the student's by noise of 0.5 nats where models are "peaked",
    of 0.15 nats otherwise. There the teacher also rejects all but the student's best 32 entries, by
    3 nats.
    """
    generator = torch.Generator().manual_seed(0)
    shape = (ROWS, vocabulary)
    rank = torch.arange(1, vocabulary + 1, dtype=torch.float64).log()
    exponent, difference = (1.75, 0.5) if scenario == "peaked" else (1.9, 0.15)
    noise = torch.randn(shape, generator=generator, dtype=torch.float64)
    student = -exponent * rank + 0.5 * noise
    teacher = student + difference * torch.randn(shape, generator=generator, dtype=torch.float64)
    if scenario != "peaked":
        best = torch.zeros(shape, dtype=torch.bool).scatter_(-1, student.topk(32).indices, True)
        teacher = torch.where(best, teacher, teacher - 3)
    return Models(student, teacher)


def student_top_k(both: Models, size: int) -> StudentTopK:
    ids = both.student.topk(size).indices
    inside = torch.zeros(both.student.shape, dtype=torch.bool).scatter_(-1, ids, True)
    return StudentTopK(inside, TopK(ids, both.teacher.log_softmax(-1).gather(-1, ids)))


# -- the variants: expected losses per row -------------------------------------------------------

# A function of the student's logits, in which a gradient is taken, of the models and of S.
Loss = Callable[[Tensor, Models, StudentTopK], Tensor]


def full(z: Tensor, both: Models, support: StudentTopK) -> Tensor:
    return _value(z, both.teacher)


def truncated(z: Tensor, both: Models, support: StudentTopK) -> Tensor:
    """sum_S p l, with l = log p - log q."""
    log_p = z.log_softmax(-1)
    terms = log_p.exp() * (log_p - both.teacher.log_softmax(-1))
    return torch.where(support.inside, terms, 0.0).sum(-1)


def renormalised(z: Tensor, both: Models, support: StudentTopK) -> Tensor:
    return _value(z, support.teacher, "renormalize")


def masked(z: Tensor, both: Models, support: StudentTopK) -> Tensor:
    """The full loss, whose gradient is set to 0 outside S."""
    return _value(torch.where(support.inside, z, z.detach()), both.teacher)


def bucket(z: Tensor, both: Models, support: StudentTopK) -> Tensor:
    return _value(z, support.teacher)


def corrected(z: Tensor, both: Models, support: StudentTopK) -> Tensor:
    """The bucket and, for tokens y sampled outside S, the expectation of (l_y - rho) log p(y)."""
    log_p = z.log_softmax(-1)
    weights = (log_p.exp() * _surprise(both, support)).detach()
    return bucket(z, both, support) + (weights * log_p).sum(-1)


VARIANTS: dict[str, Loss] = {
    "truncated": truncated,
    "masked": masked,
    "renormalised": renormalised,
    "bucket": bucket,
    "bucket + sampled tail": corrected,
}


def _value(z: Tensor, teacher: Tensor | TopK, tail: str = "bucket") -> Tensor:
    value = reference.token_terms(z, teacher, tail=tail).divergence
    assert value is not None
    return value


def _surprise(both: Models, support: StudentTopK) -> Tensor:
    """l_v - rho outside S and 0 on S; rho is the log-ratio of the two tails' masses."""
    log_p, log_q = both.student.log_softmax(-1), both.teacher.log_softmax(-1)
    tails = [torch.where(support.inside, -torch.inf, x).logsumexp(-1) for x in (log_p, log_q)]
    rho = (tails[0] - tails[1])[..., None]
    return torch.where(support.inside, 0.0, log_p - log_q - rho)


# -- what is measured ------------------------------------------------------------------------------


def gradient(loss: Loss, both: Models, support: StudentTopK) -> Tensor:
    leaf = both.student.clone().requires_grad_()
    loss(leaf, both, support).sum().backward()
    assert leaf.grad is not None
    return leaf.grad


def compare(got: Tensor, truth: Tensor) -> dict[str, float]:
    """Medians over rows, relative to the norm of the true gradient; of the row sums the largest."""
    cosine, norm = torch.cosine_similarity(got, truth, dim=-1), truth.norm(dim=-1)
    return {
        "bias": float(((got - truth).norm(dim=-1) / norm).median()),
        "cosine": float(cosine.median()),
        "norm": float((got.norm(dim=-1) / norm).median()),
        "row_sum": float((got.sum(-1).abs() / norm).max()),
    }


def variance(both: Models, coefficients: Tensor) -> float:
    """The variance of the sampled part of a gradient, c_y (1[v = y] - p_v); a mean over rows.

    The coefficients c are 0 on S.
    """
    p = both.student.softmax(-1)
    square = (p * coefficients.square() * (1 - 2 * p + p.square().sum(-1, keepdim=True))).sum(-1)
    weighted = p * coefficients
    mean = weighted - p * weighted.sum(-1, keepdim=True)
    return float((square - mean.square().sum(-1)).mean())


def measure(scenario: str, size: int, vocabulary: int = VOCABULARY) -> list[dict]:
    """One row of results for each variant."""
    both = models(scenario, vocabulary)
    support = student_top_k(both, size)
    truth = gradient(full, both, support)
    equal = Models(both.student, both.student)
    equal_support = student_top_k(equal, size)
    mass = float(torch.where(support.inside, both.student.softmax(-1), 0.0).sum(-1).median())
    log_ratio = both.student.log_softmax(-1) - both.teacher.log_softmax(-1)
    sampled = {
        "bucket + sampled tail": _surprise(both, support),
        # With this the truncated loss would be unbiased, too.
        "truncated": torch.where(support.inside, 0.0, log_ratio + 1),
    }
    rows = []
    for name, loss in VARIANTS.items():
        at_rest = gradient(loss, equal, equal_support).norm(dim=-1) / truth.norm(dim=-1)
        coefficients = sampled.get(name)
        noise = None if coefficients is None else variance(both, coefficients)
        rows.append(
            {
                "scenario": scenario,
                "k": size,
                "student_mass": mass,
                "variant": name,
                **compare(gradient(loss, both, support), truth),
                "at_p_equals_q": float(at_rest.max()),
                "sampled_variance": noise,
            }
        )
    return rows


def table(rows: list[dict]) -> str:
    """A Markdown table for each scenario, with a line for each variant."""
    lines = []
    for scenario in dict.fromkeys(row["scenario"] for row in rows):
        chosen = [r for r in rows if (r["scenario"], r["k"]) == (scenario, SHOWN[scenario])]
        first = chosen[0]
        lines += [
            "",
            f"{scenario}: V={VOCABULARY:,}, K={first['k']} of the student, "
            f"P={first['student_mass']:.3f}",
            "",
            "| variant | cosine | relative bias | norm | row sum | gradient at p = q |",
            "|---|---|---|---|---|---|",
        ]
        lines += [
            f"| {r['variant']} | {r['cosine']:.4f} | {r['bias']:.2g} | {r['norm']:.2f} | "
            f"{r['row_sum']:.1g} | {r['at_p_equals_q']:.1g} |"
            for r in chosen
        ]
        noise = {r["variant"]: r["sampled_variance"] for r in chosen}
        ratio = noise["truncated"] / noise["bucket + sampled tail"]
        lines += [
            "",
            f"Tokens sampled outside the support make the truncated loss unbiased, too, with "
            f"{ratio:.0f} times the variance that they add to the bucket.",
        ]
    return "\n".join(lines[1:]) + "\n"


def plot(rows: list[dict], path: Path) -> None:
    """Plots the relative bias of the expected gradient against K, in one panel per scenario."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    scenarios = list(dict.fromkeys(row["scenario"] for row in rows))
    figure, axes = plt.subplots(1, len(scenarios), figsize=(10, 3.8), layout="constrained")
    for axis, scenario in zip(axes, scenarios, strict=True):
        for name in VARIANTS:
            points = [
                (r["k"], r["bias"])
                for r in rows
                if (r["scenario"], r["variant"]) == (scenario, name)
            ]
            axis.plot(*zip(*points, strict=True), "o-", label=name, markersize=4)
        axis.set(
            xscale="log", yscale="log", xlabel="K (the student's best entries)", title=scenario
        )
        axis.set_xticks(SIZES, [str(size) for size in SIZES])
        axis.minorticks_off()
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("relative bias of the expected gradient")
    axes[-1].legend(fontsize=8, frameon=False)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main(folder: Path) -> None:
    """Measures all sizes and writes `topk.json`, `topk.md` and `topk.png`."""
    rows = [row for scenario in SHOWN for size in SIZES for row in measure(scenario, size)]
    (folder / "topk.json").write_text(json.dumps(rows, indent=1) + "\n")
    text = table(rows)
    (folder / "topk.md").write_text(text)
    plot(rows, folder / "topk.png")
    print(text)
