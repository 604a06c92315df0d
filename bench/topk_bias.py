"""`python -m bench topk`: what top-K distillation losses do to the gradient, exactly, in float64.

For the reverse KL between synthetic next-token distributions: how far the expected logit gradient
of each variant is from that of the full vocabulary, what else is wrong with it, and how noisy the
two unbiased ones are. Values come from `hybrid_kernels.reference`, gradients from autograd, and
expectations over the sampled token are sums over all of them. Writes a table, a plot and the
figures.
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
# Of the first table: peaked models at K=128, and a teacher that rejects the tail at K=32.
SHOWN = {"peaked": 128, "teacher's tail 3 nats lower": 32}


class Models(NamedTuple):
    """Logits `[ROWS, V]` of both sides, float64."""

    student: Tensor
    teacher: Tensor


class Support(NamedTuple):
    """The student's best K entries: ids, a mask over the vocabulary, and what the teacher tells."""

    ids: Tensor
    inside: Tensor
    known: TopK


def models(scenario: str, vocabulary: int = VOCABULARY) -> Models:
    """Zipf's law with noise: the student has 0.97 to 0.98 of its mass on its best K entries.

    The teacher differs by noise of half a nat; in the second scenario by 0.15, but it gives all
    except the student's best 32 entries 3 nats less.
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


def support_of(both: Models, size: int) -> Support:
    ids = both.student.topk(size).indices
    inside = torch.zeros(both.student.shape, dtype=torch.bool).scatter_(-1, ids, True)
    return Support(ids, inside, TopK(ids, both.teacher.log_softmax(-1).gather(-1, ids)))


# -- the variants: the expected loss per row, as a function of the student's logits ----------------

Loss = Callable[[Tensor, Models, Support], Tensor]


def full(z: Tensor, both: Models, support: Support) -> Tensor:
    return _value(z, both.teacher)


def truncated(z: Tensor, both: Models, support: Support) -> Tensor:
    """sum_S p l: the entries outside are left out."""
    return torch.where(support.inside, _terms(z, both), 0.0).sum(-1)


def renormalised(z: Tensor, both: Models, support: Support) -> Tensor:
    return _value(z, support.known, "renormalize")


def masked(z: Tensor, both: Models, support: Support) -> Tensor:
    """The full gradient on S, 0 off it: a gradient that is not that of its value."""
    return _value(torch.where(support.inside, z, z.detach()), both.teacher)


def bucket(z: Tensor, both: Models, support: Support) -> Tensor:
    return _value(z, support.known)


def corrected(z: Tensor, both: Models, support: Support) -> Tensor:
    """The bucket, and what tokens y outside S add: (l_y - rho) log p(y), with weights p(y)."""
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


def _terms(z: Tensor, both: Models) -> Tensor:
    log_p = z.log_softmax(-1)
    return log_p.exp() * (log_p - both.teacher.log_softmax(-1))


def _surprise(both: Models, support: Support) -> Tensor:
    """l_v - rho outside S, 0 on it."""
    log_p, log_q = both.student.log_softmax(-1), both.teacher.log_softmax(-1)
    tails = [torch.where(support.inside, -torch.inf, x).logsumexp(-1) for x in (log_p, log_q)]
    rho = (tails[0] - tails[1])[..., None]
    return torch.where(support.inside, 0.0, log_p - log_q - rho)


# -- what is measured ------------------------------------------------------------------------------


def gradient(loss: Loss, both: Models, support: Support) -> Tensor:
    leaf = both.student.clone().requires_grad_()
    loss(leaf, both, support).sum().backward()
    assert leaf.grad is not None
    return leaf.grad


def compare(got: Tensor, truth: Tensor) -> dict[str, float]:
    """Medians over rows."""
    cosine = torch.cosine_similarity(got, truth, dim=-1)
    return {
        "bias": float(((got - truth).norm(dim=-1) / truth.norm(dim=-1)).median()),
        "cosine": float(cosine.median()),
        "norm": float((got.norm(dim=-1) / truth.norm(dim=-1)).median()),
        "row_sum": float((got.sum(-1).abs() / truth.norm(dim=-1)).max()),
    }


def variance(both: Models, support: Support, coefficients: Tensor) -> float:
    """Of c_y (1[v = y] - p), with c 0 on S: the part of a gradient that is sampled; a mean."""
    p = both.student.softmax(-1)
    square = (p * coefficients.square() * (1 - 2 * p + p.square().sum(-1, keepdim=True))).sum(-1)
    weighted = p * coefficients
    mean = weighted - p * weighted.sum(-1, keepdim=True)
    return float((square - mean.square().sum(-1)).mean())


def measure(scenario: str, size: int, vocabulary: int = VOCABULARY) -> list[dict]:
    """One row for each variant."""
    both = models(scenario, vocabulary)
    support = support_of(both, size)
    truth = gradient(full, both, support)
    same = Models(both.student, both.student)
    there = support_of(same, size)
    mass = float(torch.where(support.inside, both.student.softmax(-1), 0.0).sum(-1).median())
    log_ratio = both.student.log_softmax(-1) - both.teacher.log_softmax(-1)
    sampled = {
        "bucket + sampled tail": _surprise(both, support),
        # What makes the truncated loss unbiased, too.
        "truncated": torch.where(support.inside, 0.0, log_ratio + 1),
    }
    rows = []
    for name, loss in VARIANTS.items():
        at_rest = gradient(loss, same, there).norm(dim=-1) / truth.norm(dim=-1)
        noise = variance(both, support, sampled[name]) if name in sampled else None
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
    """The variants as Markdown, scenario by scenario."""
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
    """Relative bias of the expected gradient over K, one panel for each scenario."""
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
    folder.mkdir(parents=True, exist_ok=True)
    rows = [row for scenario in SHOWN for size in SIZES for row in measure(scenario, size)]
    (folder / "topk.json").write_text(json.dumps(rows, indent=1) + "\n")
    text = table(rows)
    (folder / "topk.md").write_text(text)
    plot(rows, folder / "topk.png")
    print(text)
