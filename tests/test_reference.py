"""The eager specification, against PyTorch's distributions and sums over few numbers."""

import math

import pytest
import torch
from torch.distributions import Categorical, kl_divergence
from torch.nn import functional as F

import cases
from hybrid_kernels import Divergence, available_divergences, reference

CASE = cases.make(50, (4,))
STUDENT, TEACHER = CASE.student.double(), CASE.teacher.double()
P, Q = Categorical(logits=STUDENT), Categorical(logits=TEACHER)


def mixture(beta):
    return Categorical(probs=beta * Q.probs + (1 - beta) * P.probs)


def jensen_shannon(beta):
    m = mixture(beta)
    return beta * kl_divergence(Q, m) + (1 - beta) * kl_divergence(P, m)


EXPECTED = {
    Divergence("reverse_kl"): kl_divergence(P, Q),
    Divergence("forward_kl"): kl_divergence(Q, P),
    Divergence("jeffreys"): kl_divergence(P, Q) + kl_divergence(Q, P),
    Divergence("jsd"): jensen_shannon(0.5),
    Divergence("jsd", beta=0.0): kl_divergence(Q, P),
    Divergence("jsd", beta=0.1): jensen_shannon(0.1),
    Divergence("jsd", beta=0.9): jensen_shannon(0.9),
    Divergence("jsd", beta=1.0): kl_divergence(P, Q),
    Divergence("skew_reverse_kl", alpha=0.2): kl_divergence(P, mixture(0.8)),
    Divergence("skew_reverse_kl", alpha=0.0): kl_divergence(P, Q),
    Divergence("skew_forward_kl", alpha=0.2): kl_divergence(Q, mixture(0.2)),
    Divergence("skew_forward_kl", alpha=0.0): kl_divergence(Q, P),
    Divergence("alpha", alpha=0.0): kl_divergence(Q, P),
    Divergence("alpha", alpha=1.0): kl_divergence(P, Q),
    # Four times the squared Hellinger distance, and half the chi-square.
    Divergence("alpha", alpha=0.5): 2 * (P.probs.sqrt() - Q.probs.sqrt()).square().sum(-1),
    Divergence("alpha", alpha=2.0): ((P.probs - Q.probs).square() / Q.probs).sum(-1) / 2,
    Divergence("renyi", alpha=0.5): -2 * (P.probs * Q.probs).sqrt().sum(-1).log(),
    Divergence("renyi", alpha=1.0): kl_divergence(P, Q),
    Divergence("renyi", alpha=2.0): (P.probs.square() / Q.probs).sum(-1).log(),
    Divergence("tv"): (P.probs - Q.probs).clamp(min=0).sum(-1),
}


def test_every_divergence_has_an_expectation():
    assert {divergence.name for divergence in EXPECTED} == set(available_divergences())


@pytest.mark.parametrize("divergence", EXPECTED, ids=cases.divergence_id)
def test_divergences(divergence):
    value = reference.token_terms(STUDENT, TEACHER, divergence=divergence).divergence
    torch.testing.assert_close(value, EXPECTED[divergence], rtol=1e-12, atol=1e-14)
    one_hot = [0.9, 0.05, 0.05], [0.2, 0.3, 0.5]
    p, q = (torch.tensor(values, dtype=torch.float64) for values in one_hot)
    value = reference.token_terms(p.log() + 3, q.log() - 5, divergence=divergence).divergence
    assert math.isclose(float(value), by_hand(divergence, *one_hot), rel_tol=1e-12)


def by_hand(divergence, p, q):
    def kl(a, b):
        return sum(x * math.log(x / y) for x, y in zip(a, b, strict=True))

    name, parameter = divergence.canonical()
    if name == "reverse_kl":
        return kl(p, q)
    if name == "forward_kl":
        return kl(q, p)
    if divergence.name == "jeffreys":
        return sum((x - y) * math.log(x / y) for x, y in zip(p, q, strict=True))
    if divergence.name == "tv":
        return sum(max(x - y, 0) for x, y in zip(p, q, strict=True))
    if divergence.name in ("alpha", "renyi"):
        a = parameter
        s = sum(x**a * y ** (1 - a) for x, y in zip(p, q, strict=True))
        return math.log(s) / (a - 1) if divergence.name == "renyi" else (1 - s) / (a * (1 - a))
    if divergence.name.startswith("skew"):
        a = parameter
        one, other = (p, q) if divergence.name == "skew_reverse_kl" else (q, p)
        return kl(one, [a * x + (1 - a) * y for x, y in zip(one, other, strict=True)])
    beta = parameter
    m = [beta * y + (1 - beta) * x for x, y in zip(p, q, strict=True)]
    return beta * kl(q, m) + (1 - beta) * kl(p, m)


def test_forward_and_reverse_kl_equal_those_of_torch():
    log_p, log_q = P.logits, Q.logits
    forward = F.kl_div(log_p, log_q, log_target=True, reduction="none").sum(-1)
    reverse = F.kl_div(log_q, log_p, log_target=True, reduction="none").sum(-1)
    torch.testing.assert_close(
        reference.token_terms(STUDENT, TEACHER, divergence="forward_kl").divergence, forward
    )
    torch.testing.assert_close(reference.token_terms(STUDENT, TEACHER).divergence, reverse)


@pytest.mark.parametrize("temperature", [1.0, 0.7, 2.0])
def test_the_other_terms(temperature):
    p, q = (Categorical(logits=logits / temperature) for logits in (STUDENT, TEACHER))
    ids = CASE.token_ids
    terms = reference.token_terms(STUDENT, TEACHER, ids, temperature=temperature)
    torch.testing.assert_close(terms.entropy, p.entropy())
    torch.testing.assert_close(terms.log_prob, p.log_prob(ids))
    torch.testing.assert_close(
        terms.log_prob, -F.cross_entropy(STUDENT / temperature, ids, reduction="none")
    )
    torch.testing.assert_close(terms.teacher_log_prob, q.log_prob(ids))
    torch.testing.assert_close(terms.logsumexp, (STUDENT / temperature).exp().sum(-1).log())


def test_a_teacher_floor_raises_and_does_not_renormalise():
    student = torch.zeros(1, 2, dtype=torch.float64)
    teacher = torch.tensor([[0.0, -math.inf]], dtype=torch.float64)
    ids = torch.tensor([1])
    terms = reference.token_terms(student, teacher, ids, teacher_floor=-3.0)
    assert math.isclose(float(terms.divergence), 0.5 * math.log(0.5) + 0.5 * (math.log(0.5) + 3))
    assert terms.teacher_log_prob == -3


def test_the_loss_is_the_weighted_sum_of_its_terms():
    ids, advantages = CASE.token_ids, CASE.advantages.double()
    advantages = advantages - 1
    options = {"dense_weight": 0.7, "entropy_weight": 0.2}
    per_token = 0.7 * kl_divergence(P, Q) - advantages * P.log_prob(ids) - 0.2 * P.entropy()
    for reduction, expected in (
        ("none", per_token),
        ("sum", per_token.sum()),
        ("mean", per_token.mean()),
    ):
        result = reference.hybrid_loss(
            STUDENT, TEACHER, ids, advantages, reduction=reduction, **options
        )
        torch.testing.assert_close(result.loss, expected)
    mask = torch.tensor([True, False, True, True])
    ids = torch.where(mask, ids, 0)
    ids[3] = -100
    arguments = (STUDENT, TEACHER, ids, advantages)
    result = reference.hybrid_loss(*arguments, mask=mask, **options)
    torch.testing.assert_close(result.loss, per_token[[0, 2]].mean())
    result = reference.hybrid_loss(*arguments, mask=mask, num_tokens=7, **options)
    torch.testing.assert_close(result.loss, per_token[[0, 2]].sum() / 7)


def test_autograd_finds_the_published_gradient():
    """It is p (l - KL) + A p - A 1[v = y]. Other tests rely on autograd of the reference."""
    student = STUDENT.clone().requires_grad_()
    ids, advantages = CASE.token_ids, CASE.advantages.double()
    loss = reference.hybrid_loss(student, TEACHER, ids, advantages, reduction="sum").loss
    loss.backward()
    log_ratio = P.logits - Q.logits
    a = advantages[:, None]
    expected = P.probs * (log_ratio - kl_divergence(P, Q)[:, None] + a) - a * F.one_hot(ids, 50)
    torch.testing.assert_close(student.grad, expected)
