"""The table of divergences agrees with the reference and with the torch backend."""

import math

import pytest
import torch

import cases
from cases import DIVERGENCES, every_divergence
from hybrid_kernels import Divergence
from hybrid_kernels.divergences import FAMILIES
from hybrid_kernels.reference import divergence_value
from hybrid_kernels.torch_backend.divergences import FORMS, Entries, settle, tilt

CASE = cases.make(30, (4,))
STUDENT, TEACHER = CASE.student.double(), CASE.teacher.double()
STUDENT[:, 0] -= 60  # which makes powers of the ratio of p and q extreme
TEACHER[:, 1] -= 60

each_family = pytest.mark.parametrize("name", FAMILIES)


def value_of(divergence, student=STUDENT, teacher=TEACHER):
    return divergence_value(student.log_softmax(-1), teacher.log_softmax(-1), divergence)


def form_of(divergence):
    """Value and logit gradient by a form of the torch backend, as the table describes it."""
    name, a = divergence.canonical()
    form, family = FORMS[name], FAMILIES[name]
    log_p, log_q = STUDENT.log_softmax(-1), TEACHER.log_softmax(-1)
    p, q, u = log_p.exp(), log_q.exp(), log_p - log_q
    entries = Entries(p, q, u, log_p)
    value, slope_sum = form.compare(entries, a, 0.0)
    value, slope_sum, log_s = settle(family, value, slope_sum, value.isfinite(), a)
    if family.tilted:
        tilt(entries, a, log_s)
    slopes = (p * u if family.has_u else 0) - (q if family.has_v else 0)
    return value[:, 0], slopes - p * slope_sum


@every_divergence
def test_slopes_follow_the_table(divergence):
    student = STUDENT.clone().requires_grad_()
    expected = value_of(divergence, student)
    expected.sum().backward()
    value, gradient = form_of(divergence)
    torch.testing.assert_close(value, expected.detach(), rtol=1e-5, atol=0)
    torch.testing.assert_close(gradient, student.grad, rtol=1e-4, atol=0)


@every_divergence
def test_sums_of_one_sweep_follow_the_table(divergence):
    family, d = FAMILIES[divergence.name], STUDENT - TEACHER
    shift = STUDENT.logsumexp(-1) - TEACHER.logsumexp(-1)
    student_d, teacher_d = ((z.softmax(-1) * d).sum(-1) - shift for z in (STUDENT, TEACHER))
    swept = family.student_d * student_d - family.teacher_d * teacher_d
    assert torch.allclose(swept, value_of(divergence)) == family.one_sweep
    assert (FORMS[divergence.name].small_value is not None) == family.one_sweep


@each_family
def test_terms_are_infinite_where_the_table_says(name):
    forbidding = STUDENT.clone(), TEACHER.clone()
    for side in forbidding:
        side[:, 2] = -math.inf
    divergences = [d for d in DIVERGENCES if d.name == name]
    by_teacher = [value_of(d, teacher=forbidding[1]) for d in divergences]
    by_student = [value_of(d, student=forbidding[0]) for d in divergences]
    family = FAMILIES[name]
    assert all((value == math.inf).all() for value in by_teacher) == family.student_d
    assert all((value == math.inf).all() for value in by_student) == family.teacher_d


@each_family
def test_a_linear_divergence_takes_an_unnormalised_p_and_no_q(name):
    if FAMILIES[name].linear:
        p, log_ratio = STUDENT.softmax(-1), STUDENT.log_softmax(-1) - TEACHER.log_softmax(-1)
        sums = FORMS[name].sums(Entries(3 * p, p * math.nan, log_ratio, p), 0.0)
        for x in sums:
            torch.testing.assert_close(x[:, 0], 3 * value_of(Divergence(name)))


@each_family
def test_limits_follow_the_table(name):
    parameter = FAMILIES[name].parameter
    for limit, other in parameter.limits.items() if parameter else ():
        assert Divergence(name, **{parameter.name: limit}).canonical() == (other, 0.0)
        near = next(x for x in (limit - 1e-6, limit + 1e-6) if parameter.allows(x))
        divergences = Divergence(name, **{parameter.name: near}), Divergence(other)
        value, limit_value = (value_of(d, STUDENT[:, 2:], TEACHER[:, 2:]) for d in divergences)
        if name == "jsd":
            value = value / (near * (1 - near))
        torch.testing.assert_close(value, limit_value, rtol=1e-3, atol=0)


def test_every_divergence_has_a_form_and_a_parameter_to_test_it_with():
    assert list(FORMS) == list(FAMILIES)
    tested = {divergence.name for divergence in DIVERGENCES if divergence.params}
    assert tested == {name for name, family in FAMILIES.items() if family.parameter}
