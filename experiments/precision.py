"""`python -m experiments precision`: what the precision of the logits does to the gradient.

Hidden states and weights are bf16; errors are measured against the gradient in float64 of the same
rounded inputs. The closer the models, the smaller their log-ratios, and the larger the relative
error that rounding the logits to bf16 leaves in them.
"""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.linear import LINEAR_PROVIDERS, LinearProblem
from bench.measure import relative_error
from hybrid_kernels import reference

# Distances of the two models' logits, in nats.
NOISES = (1.0, 0.3, 0.1, 0.03)
ROWS, VOCABULARY, SIZE = 32, 32768, 512
# The ways to compute the gradient, as `bench/linear.py` names them.
PROVIDERS = {
    "fp32 logits": "hybrid_kernels, dense",
    "bf16 logits": "hybrid_kernels, dense, bf16 logits",
    "TRL 1.16": "TRL 1.16, divergence",
    "eager, bf16 logits": "torch eager, dense",
}


def _true_gradients(problem: LinearProblem) -> tuple[Tensor, Tensor]:
    assert isinstance(problem.teacher.weight, Tensor)
    leaves = (problem.hidden, problem.weight)
    hidden, weight = (t.detach().double().requires_grad_() for t in leaves)
    theirs = problem.teacher.hidden.double() @ problem.teacher.weight.double().T
    reference.hybrid_loss(hidden @ weight.T, theirs).loss.backward()
    assert hidden.grad is not None
    assert weight.grad is not None
    return hidden.grad, weight.grad


def measure() -> list[dict[str, Any]]:
    """Relative L2 errors of both gradients, for each provider and distance of the models."""
    rows = []
    for noise in NOISES:
        problem = LinearProblem.random(
            ROWS, VOCABULARY, SIZE, torch.bfloat16, "reverse_kl", noise=noise
        )
        truths = _true_gradients(problem)
        for name, provider in PROVIDERS.items():
            if LINEAR_PROVIDERS[provider].missing():
                continue
            LINEAR_PROVIDERS[provider].make(problem)()
            gradients = (problem.hidden.grad, problem.weight.grad)
            errors = [
                relative_error(gradient, truth)
                for gradient, truth in zip(gradients, truths, strict=True)
                if gradient is not None
            ]
            rows.append({"noise": noise, "logits": name, "hidden": errors[0], "weight": errors[1]})
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    names = list(dict.fromkeys(row["logits"] for row in rows))
    lines = [
        f"Relative L2 error of the gradients of hidden states and weight, reverse KL, bf16 inputs, "
        f"N={ROWS}, V={VOCABULARY:,}, D={SIZE}, against float64 on the same rounded inputs.",
        "",
        "| distance of the logits (nats) | " + " | ".join(names) + " |",
        "|---" * (len(names) + 1) + "|",
    ]
    for noise in dict.fromkeys(row["noise"] for row in rows):
        errors = {row["logits"]: row for row in rows if row["noise"] == noise}
        cells = [f"{errors[name]['hidden']:.1e}, {errors[name]['weight']:.1e}" for name in names]
        lines.append(f"| {noise:g} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main(folder: Path) -> None:
    rows = measure()
    (folder / "precision.json").write_text(json.dumps(rows, indent=1) + "\n")
    (folder / "precision.md").write_text(table(rows))
    print(table(rows))
