"""Small problems for `compute-sanitizer`: every form, aligned rows and others, masked rows."""

import itertools

import torch

from hybrid_kernels import Mixture, TopK, hybrid_loss, token_terms


def main() -> None:
    generator = torch.Generator("cuda").manual_seed(0)
    for vocabulary, divergence in itertools.product((1000, 50_257), ("reverse_kl", "jsd")):
        shape = (3, vocabulary)
        student = torch.randn(shape, generator=generator, device="cuda").bfloat16()
        teacher = torch.randn(shape, generator=generator, device="cuda").bfloat16()
        student.requires_grad_()
        ids = torch.tensor([0, -100, vocabulary - 1], device="cuda")
        result = hybrid_loss(
            student, teacher, ids, torch.ones(3, device="cuda"), divergence=divergence
        )
        result.loss.backward()
        known = TopK.from_logits(teacher, 40, token_ids=ids.clamp(min=0))
        for other in (known, Mixture([(1.0, teacher), (0.5, teacher)])):
            hybrid_loss(student, other, ids, divergence=divergence).loss.backward()
        terms = token_terms(student, teacher, ids, divergence=divergence)
        assert terms.divergence is not None
        terms.divergence.sum().backward()
        assert student.grad is not None
        assert student.grad.isfinite().all()
    torch.cuda.synchronize()


if __name__ == "__main__":
    main()
