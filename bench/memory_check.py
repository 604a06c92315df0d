"""Small problems for `compute-sanitizer`: each form of the kernels, rows aligned or not, masks."""

import itertools
import sys

import torch

from bench.providers import random_options
from hybrid_kernels import Mixture, TopK, hybrid_loss, token_terms


def main(device: str) -> None:
    options = random_options(device)
    for vocabulary, divergence in itertools.product((1000, 50_257), ("reverse_kl", "jsd")):
        shape = (3, vocabulary)
        student = torch.randn(shape, **options).bfloat16().requires_grad_()
        teacher = torch.randn(shape, **options).bfloat16()
        ids = torch.tensor([0, -100, vocabulary - 1], device=device)
        advantages = torch.ones(3, device=device)
        hybrid_loss(student, teacher, ids, advantages, divergence=divergence).loss.backward()
        top_k = TopK.from_logits(teacher, 40, token_ids=ids.clamp(min=0))
        for swept in (top_k, Mixture([(1.0, teacher), (0.5, teacher)])):
            hybrid_loss(student, swept, ids, divergence=divergence).loss.backward()
        terms = token_terms(student, teacher, ids, divergence=divergence)
        assert terms.divergence is not None
        terms.divergence.sum().backward()
        assert student.grad is not None
        assert device == "meta" or student.grad.isfinite().all()


if __name__ == "__main__":
    main(sys.argv[1])
    torch.cuda.synchronize()
