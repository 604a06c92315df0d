"""Every way to ask for a second or forward-mode derivative is an error, and never 0."""

import itertools
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch.autograd import forward_ad

import cases
import hybrid_kernels

pytestmark = pytest.mark.native  # it doesn't matter which backend computed the first derivative


class Differentiable(NamedTuple):
    """A scalar function of tensors, each of which has a gradient."""

    function: Callable[..., torch.Tensor]
    inputs: tuple[torch.Tensor, ...]

    def gradients(self, upstream=None):
        gradients = torch.autograd.grad(
            self.function(*self.inputs), self.inputs, upstream, create_graph=True
        )
        return sum(gradient.square().sum() for gradient in gradients)


def penalty(of):
    """Of an input that is the result of something else, too."""
    inputs = [torch.zeros_like(tensor).requires_grad_() for tensor in of.inputs]
    moved = tuple(x + tensor for x, tensor in zip(inputs, of.inputs, strict=True))
    of._replace(inputs=moved).gradients().backward()


def penalty_beside_another(of):
    total = of.gradients() + sum(tensor.pow(3).sum() for tensor in of.inputs)
    return torch.autograd.grad(total, of.inputs)


def by_one_input(of):
    return torch.autograd.grad(of.gradients(), of.inputs[-1])


def by_the_upstream_gradient(of):
    upstream = torch.ones((), device=of.inputs[0].device, requires_grad=True)
    return torch.autograd.grad(of.gradients(upstream), upstream)


def hessian(of):
    return torch.autograd.functional.hessian(of.function, of.inputs)


def hessian_vector_product(of):
    return torch.autograd.functional.hvp(of.function, of.inputs, of.inputs)


def jacobian_vector_product(of):
    return torch.autograd.functional.jvp(of.function, of.inputs, of.inputs)


def functional_hessian(of):
    return torch.func.hessian(of.function)(*of.inputs)


FUNCTIONS = [
    "hybrid_loss",
    "token_terms",
    "linear_hybrid_loss",
    "linear_hybrid_loss-none",
    "linear_token_terms",
]
WAYS = [
    penalty,
    penalty_beside_another,
    by_one_input,
    by_the_upstream_gradient,
    hessian,
    hessian_vector_product,
    jacobian_vector_product,
    functional_hessian,
]


def differentiable(name, backend, device):
    case = cases.make(7, (2, 2), device=device)
    inputs = (case.student,)
    if name.startswith("linear"):
        generator = torch.Generator().manual_seed(0)
        sides = (torch.randn(*shape, generator=generator) for shape in ((2, 2, 3), (7, 3)))
        inputs = tuple(side.to(device) for side in sides)
    entry_point = getattr(hybrid_kernels, name.removesuffix("-none"))
    options = {"backend": backend} | ({"reduction": "none"} if name.endswith("-none") else {})

    def function(*student):
        result = entry_point(*student, case.teacher, case.token_ids, **options)
        return (result.divergence if "terms" in name else result.loss).sum()

    return Differentiable(function, tuple(tensor.requires_grad_() for tensor in inputs))


@pytest.mark.parametrize(("way", "function"), [*itertools.product(WAYS, FUNCTIONS)])
def test_second_derivatives_raise(way, function, backend, device):
    # The gradient must not silently count as a constant.
    refused = r"second derivative|inside of a transform of torch.func"
    with pytest.raises((RuntimeError, ValueError), match=refused):
        way(differentiable(function, backend, device))


def test_a_first_derivative_with_a_graph(backend, device):
    of = differentiable("linear_hybrid_loss", backend, device)
    plain = torch.autograd.grad(of.function(*of.inputs), of.inputs)
    for gradient, expected in zip(
        torch.autograd.grad(of.function(*of.inputs), of.inputs, create_graph=True),
        plain,
        strict=True,
    ):
        assert torch.equal(gradient, expected)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_forward_mode_is_refused(function, backend, device):
    of = differentiable(function, backend, device)
    inputs = tuple(tensor.detach() for tensor in of.inputs)
    with pytest.raises(ValueError, match=r"inside of a transform of torch\.func"):
        torch.func.jvp(of.function, inputs, inputs)
    parts = "has a tangent, but there is no forward-mode derivative"
    with forward_ad.dual_level(), pytest.raises(ValueError, match=parts):
        of.function(*(forward_ad.make_dual(tensor, tensor) for tensor in inputs))
