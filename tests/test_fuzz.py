"""Random calls of the public functions against float64.

A failure prints the simplest call that hypothesis finds, and `check(Case(...), "torch")` repeats
it. How far a result may be from float64 on the same rounded inputs follows from float64:

- its changes when the logits change as rounding to fp32 may change them (`Call.nudged`);
- `ARITHMETIC` of the terms that a value or a logit gradient is a sum of;
- the rounding to its dtype.

The bounds of logit gradients reach hidden states, weights and biases through products of
magnitudes.
"""

import copy
import inspect
import math
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import pytest
import torch
from hypothesis import Phase, assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

import hybrid_kernels
from calls import INF, NAN, Call, Case, Recipe, by_row, one_of, rarely, recipes, slope
from hybrid_kernels.torch_backend import sweep
from test_returns import looped_advantages, looped_returns
from tolerance import ARITHMETIC, ROUNDING, SUBNORMAL, written_and_scaled

on_each_backend = pytest.mark.usefixtures("poisoned_memory", "small_tiles", "cpu")
# Explanations take many more calls than the shrinking.
fuzz = settings(settings.get_profile("fuzz"), phases=set(Phase) - {Phase.explain})

TERMS = ("divergence", "log_prob", "entropy")
LARGE = 1e37  # larger numbers may overflow fp32 on their way


class Truth:
    """The float64 results of a call, and how far from them ours may be.

    Attributes:
        fields, dz: the results; `dz` is the gradient of the student's logits.
        allowed: for each field.
        dz_allowed: for dz, `[..., 1]`.
        beyond: bool `[...]`, the rows with numbers that fp32 can't hold.
        unknown: the rows whose dz is not compared: these, and those of a student that is NaN.
        infinite: the rows whose dz can't be finite, as their divergence is not.
        scale: the least factor of a gradient that has been rounded to its dtype (1 or less). Before
            that, fp16 may overflow.
    """

    def __init__(self, call: Call) -> None:
        self.call, case, rows = call, call.case, call.case.rows
        self.logits, sizes = call.exact()
        self.fields, self.dz = call.reference(self.logits)
        nudged = call.nudged(self.logits, sizes)
        log_v, shares = 1 + math.log(case.vocabulary), sum(call.weights)
        units = {
            "divergence": shares * log_v,
            "student_mass": 1.0,
            "teacher_mass": 1.0,
            "loss": 0.0,
        }
        self.allowed, zero = {}, torch.zeros(rows).double()
        size = dict.fromkeys(TERMS, zero)
        for name, value in self.fields.items():
            if value is None:
                continue
            size[name] = torch.where(value.isfinite(), value, 0.0).abs()
            self.allowed[name] = ARITHMETIC * (size[name] + units.get(name, log_v))
            for fields, _ in nudged:
                self.allowed[name] += (fields[name] - value).abs().nan_to_num(INF)
            if value.shape == rows:
                self.allowed[name] = torch.where(call.valid, self.allowed[name], 0.0)
        factors, upstream = self._factors()
        corrections = zero
        if call.supports and "teacher_log_prob" in size:
            # log p(y) - log q(y), less that of the tail, may join the advantage.
            corrections = 2 * (size["log_prob"] + size["teacher_log_prob"])
        if case.is_loss:
            losses = ARITHMETIC * factors["divergence"] * corrections * size["log_prob"]
            for name in self.allowed.keys() & factors.keys():
                allowed = factors[name] * self.allowed[name]
                losses = losses + torch.where(factors[name] > 0, allowed, 0.0)
            self.allowed["loss"] += losses if case.reduction == "none" else losses.sum()
        terms = {
            "divergence": shares * (1 + size["divergence"]) + corrections,
            "log_prob": 1.0,
            "entropy": 1 + size["entropy"],
        }
        row = sum(factors[name] * upstream * term for name, term in terms.items())
        self.dz_allowed = ARITHMETIC * row[..., None] / by_row(call.options["temperature"])
        for _, dz in nudged:
            change = (dz - self.dz).abs().nan_to_num(INF)
            self.dz_allowed = self.dz_allowed + change.amax(-1, keepdim=True)
        self.dz_allowed = torch.where(call.valid[..., None], self.dz_allowed, 0.0)
        self.beyond = self._hidden_tails()
        for name in TERMS if corrections is zero else (*TERMS, "teacher_log_prob"):
            self.beyond = self.beyond | (size[name] > LARGE)
        limit = torch.finfo(call.sides[0].stored.dtype).max / 4 * self.scale
        is_large = (self.dz.abs() > min(LARGE, limit)).any(-1)
        if case.divergence == "renyi":  # whose terms lose their exponents next to a large log S
            is_large |= size["divergence"] > 1e3
        self.unknown = self.beyond | is_large | self.fields["entropy"].isnan()
        self.infinite = torch.zeros_like(self.beyond)
        value = self.fields["divergence"]
        if value is not None:
            if call.supports:
                # Where q > 0 in a tail that the student forbids, autograd has no slope; where it
                # nearly forbids it, the slope over p overflows fp32.
                self.unknown |= value > 1e15
            acts = (factors["divergence"] * upstream != 0) & ~self.unknown
            self.dz[acts & value.isnan()] = NAN  # autograd has numbers for some
            self.infinite = acts & ~value.isfinite() & ~self.dz.isfinite().all(-1)
        self.dz[self.unknown] = NAN

    def _factors(self) -> tuple[dict[str, Tensor], Tensor]:
        """The sizes of the factors of the terms in a row's loss, and of its upstream gradient."""
        call, case, options = self.call, self.call.case, self.call.options

        def per_row(value: Any) -> Tensor:
            value = torch.as_tensor(0.0 if value is None else value).double().expand(case.rows)
            return torch.where(call.valid, value, 0.0).abs()

        self.scale, scale = 1.0, 1.0
        if not case.is_loss:
            return {name: per_row(call.upstreams.get(name)) for name in TERMS}, per_row(1.0)
        if case.reduction == "mean":
            count = options["num_tokens"]
            scale = 1 / float(call.valid.sum().clamp(min=1) if count is None else count)
        advantages = options["advantages"]
        if callable(advantages):
            advantages = advantages(hybrid_kernels.HybridLoss(**self.fields))
        values = options["dense_weight"], advantages, options["entropy_weight"]
        factors = {n: scale * per_row(v) for n, v in zip(TERMS, values, strict=True)}
        upstream = per_row(1.0 if call.upstreams is None else call.upstreams)
        if case.linear or case.reduction == "none":
            self.scale = min(1.0, scale * min([1.0, *upstream[upstream > 0].tolist()]))
        return factors, upstream

    def _hidden_tails(self) -> Tensor:
        """The rows whose mass outside the support is not 0, but underflows in fp32."""
        call = self.call
        if not call.supports:
            return torch.zeros_like(call.valid)
        ids = torch.where(call.valid[..., None], call.supports[0].ids, -1)
        inside = (ids[..., None] == torch.arange(call.case.vocabulary)).any(-2)
        log_p = (self.logits[0] / by_row(call.options["temperature"])).log_softmax(-1)
        tail = log_p.masked_fill(inside, -INF).logsumexp(-1)
        return (tail > -INF) & (tail < -80.0)

    def gradients(self, roundings: int) -> list[tuple[Tensor, Tensor]]:
        """The gradients of the student's tensors, and how far from them ours may be.

        Args:
            roundings: of a gradient to its dtype.
        """
        student, dz = self.call.sides[0], self.dz
        head, dtype, allowed = student.head, student.stored.dtype, self.dz_allowed.expand(dz.shape)

        def rounded(truth: Tensor, allowed: Tensor, dtype: torch.dtype = dtype) -> Any:
            rounding = ROUNDING[dtype] * truth.abs() + 4 * SUBNORMAL[dtype]
            return truth, allowed + roundings * rounding

        def stored(truth: Tensor, allowed: Tensor) -> tuple[Tensor, Tensor]:
            leaf = torch.zeros_like(student.stored, dtype=torch.float64).requires_grad_()
            view = student.view(leaf)
            sums, bound = (
                torch.autograd.grad(view, leaf, t.contiguous(), retain_graph=True)[0]
                for t in (truth, allowed)
            )
            return sums, bound + ROUNDING[dtype] * sums.abs()  # of the sum of expanded rows

        if head is None:
            return [stored(*rounded(dz, allowed))]
        weight, shape = head.weight.double(), student.values.shape
        hidden = torch.where(self.call.valid[..., None], student.values.double(), 0.0)
        hidden, factor = (
            hidden.reshape(-1, shape[-1]),
            head.logit_scale * slope(head, self.logits[0]),
        )
        bound = allowed * factor.abs() + ARITHMETIC * abs(head.logit_scale) * dz.abs()
        d, bound = (t.reshape(-1, len(weight)) for t in (dz * factor, bound))
        of_hidden = rounded((d @ weight).view(shape), (bound @ weight.abs()).view(shape))
        results = [stored(*of_hidden), rounded(d.T @ hidden, bound.T @ hidden.abs())]
        if head.bias is not None:
            results.append(rounded(d.sum(0), bound.sum(0), head.bias.dtype))
        return results


def check(case: Case, backend: str) -> None:
    """Compares a call with float64."""
    if backend == "triton" and "top-k" in case.teacher and case.invalid and case.invalid[0]:
        return  # the interpreter's argmax raises where all are NaN
    call = Call(case)
    inputs = [call.sides, call.supports, call.options, call.upstreams]
    before = copy.deepcopy(inputs)
    with cut(case.cut):
        (fields, leaves), (again, others) = call.ours(backend), call.ours(backend)
    assert equal(inputs, before), "an input has changed"
    assert equal(again, fields), "a second call has another result"
    gradients = [leaf.grad for leaf in leaves]
    assert equal([leaf.grad for leaf in others], gradients), "a second call has another gradient"
    for logits, made in call.from_logits:
        check_from_logits(call, logits, made)
    truth = Truth(call)
    for name, expected in truth.fields.items():
        assert (fields[name] is None) == (expected is None), name
        if expected is not None:
            assert fields[name].dtype == torch.float32, name
            skipped = truth.beyond.any() if expected.shape != case.rows else truth.beyond
            check_close(fields[name], expected, truth.allowed[name], name, skipped)
    student = call.sides[0]
    names = ["hidden states" if case.linear else "logits", "weight", "bias"]
    expected = truth.gradients(written_and_scaled(backend, student.stored))
    for name, leaf, (gradient, allowed) in zip(names, leaves, expected, strict=False):
        if leaf.grad is None:
            reached = case.is_loss or any(fields[term] is not None for term in call.upstreams)
            assert not (leaf.requires_grad and reached), f"no gradient of {name}"
            continue
        limit = torch.finfo(leaf.dtype).max / 4 * truth.scale
        unknown = ~(gradient.abs() < limit)
        got, gradient = leaf.grad, gradient.masked_fill(unknown, 0.0)
        check_close(got.masked_fill(unknown, 0.0), gradient, allowed, f"gradient of {name}")
        if not case.linear and not case.expanded[0]:
            finite = student.view(got).isfinite().all(-1)
            assert not (finite & truth.infinite).any(), "finite gradient of an infinite divergence"
            assert (finite | truth.unknown | truth.infinite).all(), "a weight of 0 times infinity"


def check_from_logits(call: Call, logits: Tensor, made: Any) -> None:
    scaled = logits.double() / by_row(call.options["temperature"])
    truth = scaled.log_softmax(-1).gather(-1, made.ids.clamp(min=0))
    spread = (scaled.amax(-1, keepdim=True) - scaled) if scaled.numel() else scaled
    spread = torch.where(spread.isfinite(), spread, 0.0).amax(-1, keepdim=True)
    left_out = (made.ids < 0) | ~call.valid[..., None]
    check_close(
        made.log_probs.masked_fill(left_out, 0.0),
        truth.masked_fill(left_out, 0.0),
        ARITHMETIC * (truth.abs() + spread),
        "TopK.from_logits",
    )


def check_close(
    got: Tensor, truth: Tensor, allowed: Tensor, name: str, skipped: Any = False
) -> None:
    assert got.shape == truth.shape, name
    got = got.detach().double()
    same = (
        (got == truth) | (got.isnan() & truth.isnan()) | (truth.isfinite() & (truth.abs() > LARGE))
    )
    near = (got - truth).abs() <= torch.where(allowed.isnan(), INF, allowed)
    off = ~(same | near | skipped)
    if off.any():
        allowed = float(allowed.expand(off.shape)[off][0])
        raise AssertionError(
            f"{name}{off.nonzero()[0].tolist()}: got {float(got[off][0])!r}, float64 has "
            f"{float(truth[off][0])!r}, allowed {allowed:.3g}; {int(off.sum())} of {off.numel()}"
        )


def equal(a: Any, b: Any) -> bool:
    """Whether all tensors have the same numbers and NaN."""
    if isinstance(a, Tensor):
        same = a.dtype == b.dtype and a.shape == b.shape
        return same and bool(((a == b) | (a.isnan() & b.isnan())).all())
    if isinstance(a, dict):
        return equal([*a.values()], [*b.values()])
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(equal, a, b))
    return equal(vars(a), vars(b)) if hasattr(a, "__dataclass_fields__") else callable(a) or a == b


def cut(name: str) -> Any:
    """Lets the torch backend take rows in blocks of a few entries, or one by one."""
    if name == "blocks":
        return patch.object(sweep, "block_elements", lambda: 64)
    return patch.object(sweep, "LONG_ROW", 1 if name == "long rows" else sweep.LONG_ROW)


@pytest.fixture
def cpu(device):
    if device != "cpu":
        pytest.skip("a GPU would compile kernels for every example")


@on_each_backend
@fuzz
@given(case=recipes(Case))
def test_losses_and_terms(case, backend):
    check(case, backend)


# -- what is refused ------------------------------------------------------------------------------

# Something that an argument can't be, made from the leading shape and V.
WRONG = {
    "student_logits": lambda rows, v: torch.zeros(*rows, v).double(),
    "student_hidden": lambda rows, v: torch.zeros(*rows, v).double(),
    "student_weight": lambda rows, v: torch.zeros(v, 99),
    "student_bias": lambda rows, v: torch.zeros(v + 1),
    "teacher": lambda rows, v: torch.zeros(*rows, v + 1),
    "token_ids": lambda rows, v: torch.zeros(*rows, 2).long(),
    "advantages": lambda rows, v: torch.zeros(*rows, 2),
    "mask": lambda rows, v: torch.ones(*rows, 2),
    "dense_weight": lambda rows, v: torch.zeros(*rows, 2),
    "entropy_weight": lambda rows, v: NAN,
    "temperature": lambda rows, v: 0.0,
    "num_tokens": lambda rows, v: -1.0,
    "divergence": lambda rows, v: "kl",
    "reduction": lambda rows, v: "median",
    "tail": lambda rows, v: "none",
    "teacher_floor": lambda rows, v: 0.5,
    "softcap": lambda rows, v: 0.0,
    "logit_scale": lambda rows, v: INF,
    "chunk_rows": lambda rows, v: 0,
    "logits_dtype": lambda rows, v: torch.float64,
    "grad_filter": lambda rows, v: -1.0,
    "drop_masked": lambda rows, v: None,
    "backend": lambda rows, v: "cuda",
}


@on_each_backend
@given(case=recipes(Case), number=st.integers(0, 99))
def test_a_wrong_argument_is_named(case, number, backend):
    call, function = Call(case), getattr(hybrid_kernels, case.function)
    names = [name for name in inspect.signature(function).parameters if name in WRONG]
    name = names[number % len(names)]
    assume(name != "advantages" or case.ids is not None)
    call.wrong = {name: WRONG[name](case.rows, case.vocabulary)}
    with pytest.raises(ValueError, match=f"^{name}: "):
        call.ours(backend)


# -- the sparse term ------------------------------------------------------------------------------


@dataclass(frozen=True, repr=False)
class Responses(Recipe):
    """The arguments of `returns_to_go` and `sparse_advantages`. `unknown` are the shares of costs
    and rewards that are NaN; `rewards` is how many are named, 0 for a tensor."""

    batch: int = one_of(*range(1, 7))
    longest: int = one_of(*range(10))
    seed: int = one_of(*range(2**12))
    dtype: str = rarely("float32", "bfloat16", "float64", "float16")
    mask: str = one_of("bool", "int64", "float32")
    packed: bool = one_of(False, True)
    gamma: float = one_of(1.0, 0.0, 0.9, 0.5, 1e-3)
    weights: tuple[float, float] = one_of((1.7, 1.0), (1.0, 0.0), (-0.3, 0.5), (0.0, 2.0))
    baseline: str = one_of(
        "none", "leave_one_out", "group_mean", "per_token_leave_one_out", "[B]", "[B, 1]", "[B, T]"
    )
    groups: str = one_of("all", "size", "ids")
    rewards: int = one_of(1, 0, 2, 3)
    unknown: tuple[float, float] = one_of((0.0, 0.0), (0.2, 0.0), (0.0, 0.2), (0.3, 0.3))


def check_returns(case: Responses) -> None:
    """Compares with loops in float64."""
    batch, longest, gamma, (weight, dense) = case.batch, case.longest, case.gamma, case.weights
    generator = torch.Generator().manual_seed(case.seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    def chance(share: float, *shape: int) -> Tensor:
        return torch.rand(shape, generator=generator) < share

    lengths = torch.randint(0, longest + 1, (batch,), generator=generator)
    in_use = torch.arange(longest) < lengths[:, None]
    mask = in_use & chance(0.8, batch, longest)
    costs = normal(batch, longest).to(getattr(torch, case.dtype))
    costs = costs.masked_fill(~mask | chance(case.unknown[0], batch, longest), NAN)
    rewards = normal(3, batch).masked_fill(chance(case.unknown[1], 3, batch), NAN)
    named = {str(i): (rewards[i], (0.5, -2.0, 0.0)[i]) for i in range(case.rewards)}
    keys, options = torch.zeros(batch), {}
    if case.groups == "ids":
        options["group_ids"] = keys = torch.tensor([7, -3, 2**40])[(3 * normal(batch)).long() % 3]
    elif case.groups == "size":
        divisors = [n for n in range(1, batch + 1) if batch % n == 0]
        options["group_size"] = divisors[case.seed % len(divisors)]
        keys = torch.arange(batch) // options["group_size"]
    baseline = truth = case.baseline
    if baseline.startswith("["):
        baseline = truth = normal(batch, longest if baseline == "[B, T]" else 1)
        if case.packed and case.baseline == "[B, T]":
            baseline = truth[in_use]
            assume(len(baseline) != batch)  # which means [B]
        elif case.packed or case.baseline == "[B]":
            baseline = truth[:, 0]
    given, valid, bounds = costs, mask.to(getattr(torch, case.mask)), None
    if case.packed:
        given, valid = costs[in_use], valid[in_use]
        bounds = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
    exact, pairs = costs.double(), list(named.values()) or [(rewards[0], 1.0)]
    returns = looped_returns(exact, mask, gamma)
    advantages = looped_advantages(exact, pairs, mask, weight, gamma, dense, keys.tolist(), truth)
    if case.packed:
        returns, advantages = returns[in_use], advantages[in_use]
    allowed = ARITHMETIC * (1 + exact.nan_to_num().abs().sum())
    got = hybrid_kernels.returns_to_go(given, valid, gamma, bounds)
    check_close(got, returns, allowed, "returns")
    options |= {"reward_weight": weight, "dense_weight": dense, "gamma": gamma}
    options |= {"baseline": baseline, "cu_seqlens": bounds}
    got = hybrid_kernels.sparse_advantages(given, named or rewards[0], valid, **options)
    assert got.dtype == torch.float32
    check_close(got, advantages, allowed, "advantages")


@fuzz
@given(case=recipes(Responses))
def test_returns_and_advantages(case):
    check_returns(case)
