"""A call of a public function: its arguments, checked and flattened to rows, once.

`LogitCall` has a student given by logits, `LinearCall` one given by hidden states and an output
layer. Both measure statistics and differentiate a loss; what the public functions make of that is
the same for both.
"""

from abc import ABC, abstractmethod
from typing import NamedTuple

import torch
from torch import Tensor

from hybrid_kernels import backends, checks, ops, validate
from hybrid_kernels.divergences import Divergence
from hybrid_kernels.linear import gemm
from hybrid_kernels.linear import ops as linear_ops
from hybrid_kernels.linear.heads import Head, LinearStudent
from hybrid_kernels.linear.rows import Chunking, Heads, LinearRows
from hybrid_kernels.objective import Objective, RowLoss
from hybrid_kernels.rows import FIELDS, Rows, per_row
from hybrid_kernels.types import (
    IGNORED_TOKEN,
    HybridLoss,
    LinearTeacher,
    Teacher,
    TokenTerms,
    TopK,
)


class Comparison(NamedTuple):
    """How the student is compared with a teacher, as the caller gave it."""

    teacher: Teacher | None
    divergence: str | Divergence
    temperature: float | Tensor
    tail: str
    teacher_floor: float | None


class Context(NamedTuple):
    """The other arguments that all functions share, as the caller gave them."""

    token_ids: Tensor | None
    mask: Tensor | None
    process_group: object | None
    backend: str

    def valid_rows(self, shape: checks.CallShape) -> Tensor | None:
        """Bool `[N]`, the rows that count; None where neither argument can mask one.

        Raises:
            ValueError: `token_ids` or `mask` does not fit the call.
        """
        valid = None
        if self.token_ids is not None:
            checks.token_ids(self.token_ids, shape)
            valid = self.token_ids.reshape(-1) != IGNORED_TOKEN
        if self.mask is not None:
            checks.row_mask(self.mask, shape)
            unmasked = self.mask.reshape(-1) != 0
            valid = unmasked if valid is None else unmasked & valid
        return valid


class Call(ABC):
    """The part of a call that does not depend on how the student is given.

    Attributes:
        shape: what the caller's tensors have in common.
        rows: everything the operators need.
        members: the teachers, without their weights.
        wants_gradient: whether any of the student's tensors wants one.
    """

    rows: Rows
    wants_gradient: bool

    def __init__(
        self,
        shape: checks.CallShape,
        valid: Tensor | None,
        comparison: Comparison,
        context: Context,
    ) -> None:
        checks.choice("tail", comparison.tail, validate.TAILS)
        validate.teacher_floor(comparison.teacher_floor)
        temperature = checks.row_values("temperature", comparison.temperature, shape, positive=True)
        weighted_members = validate.teacher(comparison.teacher, shape)
        self.shape, self.members = shape, [member for _, member in weighted_members]
        self.has_teacher = comparison.teacher is not None
        shares = tuple(weight for weight, _ in weighted_members)
        supports = [member for member in self.members if isinstance(member, TopK)]
        support = token_log_prob = None
        name, parameter = validate.divergence(comparison.divergence).canonical()
        backend = backends.resolve(context.backend, shape.device)
        if supports:
            support = supports[0].ids.reshape(-1, supports[0].ids.shape[-1]).contiguous()
            token_log_prob = _mean_token_log_prob(supports, shares, comparison.teacher_floor)
            if backend == "triton":
                validate.support_size(support.shape[-1])
        token_ids, floor = context.token_ids, comparison.teacher_floor
        of_rows = None
        if isinstance(temperature, Tensor):
            of_rows, temperature = _row_temperature(temperature, valid, shape), 1.0
        self._fields = {
            "shares": shares,
            "support": support,
            "token_log_prob": token_log_prob,
            "token_ids": None if token_ids is None else token_ids.reshape(-1).contiguous(),
            "valid": valid,
            "row_temperature": of_rows,
            "divergence": name,
            "parameter": parameter,
            "temperature": temperature,
            "teacher_floor": None if floor is None else float(floor),
            "tail": comparison.tail,
            "resolution": max([0.0, *(member.resolution for member in supports)]),
            "group": validate.process_group(context.process_group),
            "backend": backend,
        }

    def _rows(self, student: Tensor, teachers: list[Tensor]) -> Rows:
        """The problem of the operators. Teachers without logits are top-K ones."""
        if not teachers:
            log_probs = [m.log_probs for m in self.members if isinstance(m, TopK)]
            teachers = [one.reshape(-1, one.shape[-1]).float().contiguous() for one in log_probs]
        return Rows(student, tuple(teachers), **self._fields)

    @abstractmethod
    def measure(self, keep: bool = False) -> Tensor:
        """The statistics of all rows, without a gradient.

        Args:
            keep: whether to keep what the gradient of a summed loss can use again.
        """

    @abstractmethod
    def differentiable(self) -> Tensor:
        """The statistics; divergence, log p(y) and entropy are differentiable."""

    @abstractmethod
    def differentiate(
        self, loss: RowLoss, statistics: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """The differentiable loss, the statistics, and the norm that a filter dropped.

        Args:
            loss: what to differentiate.
            statistics: those of the rows, where `measure` was called before.
        """

    def token_terms(self) -> TokenTerms:
        """What `token_terms` returns."""
        return self._terms(self.differentiable())

    def hybrid_loss(self, objective: Objective) -> HybridLoss:
        """What `hybrid_loss` returns."""
        rows = self.rows
        objective = objective.checked(self.shape, self.has_teacher, rows.token_ids is not None)
        advantages, statistics, dropped = objective.advantages, None, None
        if callable(advantages):
            with torch.no_grad():
                summed = objective.reduction != "none"
                statistics = self.measure(keep=self.wants_gradient and summed)
                # A copy: the function may work in place, and the gradient needs the statistics.
                advantages = advantages(self._terms(statistics.clone()))
            advantages = checks.row_values("advantages", advantages, self.shape)
        loss = objective.of_rows(advantages, rows.valid, self.shape)
        if self.wants_gradient:
            value, statistics, dropped = self.differentiate(loss, statistics)
        else:
            statistics = self.measure() if statistics is None else statistics
            value = loss.value(statistics, rows.valid)
        terms = self._terms(statistics.detach())
        return HybridLoss(
            loss=value if loss.summed else value.view(self.shape.leading),
            divergence=terms.divergence,
            log_prob=terms.log_prob,
            teacher_log_prob=terms.teacher_log_prob,
            entropy=terms.entropy,
            student_mass=terms.student_mass,
            teacher_mass=terms.teacher_mass,
            dropped_norm=dropped,
        )

    def _terms(self, statistics: Tensor) -> TokenTerms:
        """The statistics that the caller asked for, in the caller's shape."""

        def field(index: int, is_known: bool = True) -> Tensor | None:
            return statistics[index].view(self.shape.leading) if is_known else None

        def detached(index: int, is_known: bool = True) -> Tensor | None:
            return statistics.detach()[index].view(self.shape.leading) if is_known else None

        has_teacher, has_tokens = self.has_teacher, self.rows.token_ids is not None
        entropy, logsumexp = field(FIELDS.entropy), detached(FIELDS.logsumexp)
        assert entropy is not None
        assert logsumexp is not None
        on_support = self.rows.support is not None
        return TokenTerms(
            divergence=field(FIELDS.divergence, has_teacher),
            log_prob=field(FIELDS.log_prob, has_tokens),
            teacher_log_prob=detached(FIELDS.teacher_log_prob, has_teacher and has_tokens),
            entropy=entropy,
            logsumexp=logsumexp,
            student_mass=detached(FIELDS.student_mass, on_support),
            teacher_mass=detached(FIELDS.teacher_mass, on_support),
        )


class LogitCall(Call):
    """A call whose student is given by logits `[..., V]`."""

    def __init__(
        self,
        student_logits: Tensor,
        comparison: Comparison,
        context: Context,
        inplace: bool = False,
    ) -> None:
        validate.no_transforms("student_logits")
        validate.student(student_logits)
        validate.no_tangents("student_logits", student_logits)
        shape = checks.CallShape(
            student_logits.shape[:-1],
            student_logits.device,
            student_logits.shape[-1],
            context.process_group is not None,
        )
        super().__init__(shape, context.valid_rows(shape), comparison, context)
        self.inplace = validate.inplace(inplace, student_logits)
        self.wants_gradient = torch.is_grad_enabled() and student_logits.requires_grad
        logits = [
            _teacher_logits(m, shape.vocabulary) for m in self.members if not isinstance(m, TopK)
        ]
        names = ["student_logits"] + ["teacher"] * len(logits)
        student, *teachers = _as_rows([student_logits, *logits], names)
        self.rows = self._rows(student, teachers)

    def measure(self, keep: bool = False) -> Tensor:
        return ops.row_statistics(*self.rows)

    def differentiable(self) -> Tensor:
        if self.wants_gradient:
            _check_saved("student_logits", self.rows)
        return ops.TokenTermsFunction.apply(self.rows.student, self.rows)

    def differentiate(self, loss, statistics):
        if ops.is_late(loss, self.rows.student):
            _check_saved("student_logits", self.rows)
        value, statistics = ops.HybridLossFunction.apply(
            self.rows.student, self.rows, loss, statistics, self.inplace
        )
        return value, statistics, None


class LinearCall(Call):
    """A call whose student is given by hidden states `[..., D]` and an output layer."""

    def __init__(
        self,
        student: LinearStudent,
        chunking: Chunking,
        comparison: Comparison,
        context: Context,
    ) -> None:
        hidden = student.hidden
        validate.no_transforms("student_hidden")
        validate.hidden("student_hidden", hidden)
        chunking = Chunking(*validate.linear_options(*chunking))
        shape = checks.CallShape(hidden.shape[:-1], hidden.device)
        valid = context.valid_rows(shape)
        head = Head.of("student_", "", student, valid)
        sharded = context.process_group is not None
        shape = shape._replace(vocabulary=head.weights[0].shape[0], sharded=sharded)
        super().__init__(shape, valid, comparison, context)
        logits = [m for m in self.members if isinstance(m, Tensor)]
        rows_of_logits = iter(_as_rows(logits, ["teacher"] * len(logits)))
        members = [
            _teacher_head(m, shape.vocabulary) if isinstance(m, LinearTeacher) else m
            for m in self.members
        ]
        teachers = [
            m.hiddens[0] if isinstance(m, Head) else next(rows_of_logits)
            for m in members
            if not isinstance(m, TopK)
        ]
        self.rows = self._rows(head.hiddens[0][None], teachers)
        self.linear = LinearRows(self.rows, Heads.of(head, members), chunking)
        self.kept_logits: list[Tensor] = []
        tensors = [t for t in self.linear.differentiable() if t is not None]
        validate.no_tangents("student_hidden or student_weight", *tensors)
        self.wants_gradient = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
        # A gradient of the hidden states alone can wait for the upstream one of each row.
        self.only_hidden = not any(t.requires_grad for t in tensors[len(head.hiddens) :])

    def measure(self, keep: bool = False) -> Tensor:
        if not keep or torch.compiler.is_compiling():
            return linear_ops.linear_statistics(*self.linear.flat())
        statistics, self.kept_logits = linear_ops.keep_logits(self.linear)
        return statistics

    def differentiable(self, statistics: Tensor | None = None) -> Tensor:
        if self.wants_gradient:
            _check_saved("student_hidden", self.rows, self.linear.heads)
        return linear_ops.LinearTermsFunction.apply(
            self.linear, statistics, *self.linear.differentiable()
        )

    def differentiate(self, loss, statistics):
        if not (loss.summed or self.only_hidden):
            # The weight's gradient is a sum over rows, whose upstream gradients are not known yet.
            statistics = self.differentiable(statistics)
            return loss.value(statistics, self.rows.valid), statistics, None
        value, statistics, dropped = linear_ops.LinearLossFunction.apply(
            self.linear, loss, statistics, self.kept_logits, *self.linear.differentiable()
        )
        return value, statistics, dropped if self.linear.chunking.grad_filter else None


_ARGUMENTS = {
    "adapter_hiddens": "student_hidden",
    "weights": "student_weight",
    "bias": "student_bias",
    "token_ids": "token_ids",
    "valid": "mask",
}


def _check_saved(student: str, *bags: NamedTuple) -> None:
    """Checks that autograd can keep all tensors.

    Args:
        student: the argument that holds the student.
        bags: the tensors, by the names of their fields; those not in `_ARGUMENTS` are a teacher's.
    """
    arguments = {"student": student, **_ARGUMENTS}
    for bag in bags:
        for name, value in bag._asdict().items():
            for item in value if isinstance(value, list | tuple) else (value,):
                validate.can_be_saved(arguments.get(name, "teacher"), item)


def _teacher_head(teacher: LinearTeacher, vocabulary: int) -> Head:
    """The tensors of a teacher's output layer, detached."""
    name = "teacher: LinearTeacher."
    with torch.no_grad():
        head = Head.of(name, name, teacher).detached()
    validate.same_vocabulary(head.weights[0], vocabulary)
    if len(head.weights) > 1:
        raise ValueError(
            f"{name}weight: has a LoRA adapter; switch it off (model.disable_adapter()), merge it, "
            "or give the teacher's logits"
        )
    return head


def _teacher_logits(member: Tensor | LinearTeacher, vocabulary: int) -> Tensor:
    """A full teacher's logits. Where the student's exist as a whole, a teacher's may, too."""
    if isinstance(member, Tensor):
        return member
    head, hidden = _teacher_head(member, vocabulary), member.hidden
    with torch.no_grad(), ops.autocast_off(hidden.device):
        shape = (len(head.hiddens[0]), vocabulary)
        logits = torch.empty(shape, dtype=torch.float32, device=hidden.device)
        gemm.write_logits(head, slice(None), logits)
    return logits.view(*hidden.shape[:-1], vocabulary)


def _row_temperature(temperature: Tensor, valid: Tensor | None, shape: checks.CallShape) -> Tensor:
    """`[R]`, each for N/R consecutive rows; NaN where it is not above 0 and finite."""
    values = temperature.reshape(-1).float()
    if checks.is_readable(temperature):
        validate.row_temperatures(per_row(values, shape.leading.numel()), valid)
    return torch.where((values > 0) & (values < torch.inf), values, torch.nan)


def _mean_token_log_prob(
    supports: list[TopK], shares: tuple[float, ...], floor: float | None
) -> Tensor | None:
    """log q(y) as `[N]`: the weighted mean over the members; None where one member has none."""
    total, mean = sum(shares), None
    for share, member in zip(shares, supports, strict=True):
        if member.token_log_prob is None:
            return None
        log_prob = member.token_log_prob.reshape(-1).float()
        log_prob = share / total * (log_prob if floor is None else log_prob.clamp(min=floor))
        mean = log_prob if mean is None else mean + log_prob
    return mean


def _as_rows(logits: list[Tensor], names: list[str]) -> list[Tensor]:
    """`[..., V]` as `[O, I, V]` without a copy: leading dimensions merge where strides allow."""
    splits = [_row_split(name, tensor) for name, tensor in zip(names, logits, strict=True)]
    # Where one tensor needs two row strides and another one does not, the other follows.
    common = next((split for split in splits if split[0] != 1), splits[0] if splits else (1, 1))
    for tensor, split in zip(logits, splits, strict=True):
        if split[0] not in (1, common[0]):
            raise ValueError(
                f"teacher: rows of strides {tuple(tensor.stride()[:-1])} don't group like the "
                f"others', {tuple(logits[0].stride()[:-1])}; use teacher.contiguous(), which copies"
            )
    return [tensor.view(*common, tensor.shape[-1]) for tensor in logits]


def _row_split(name: str, logits: Tensor) -> tuple[int, int]:
    """The sizes (O, I) that leading dimensions merge into; O is 1 where one stride is enough."""
    sizes, strides = logits.shape[:-1], logits.stride()[:-1]
    merged: list[tuple[int, int]] = []
    for size, stride in zip(sizes, strides, strict=True):
        if size == 1:
            continue
        if merged and merged[-1][1] == stride * size:
            merged[-1] = (merged[-1][0] * size, stride)
        else:
            merged.append((size, stride))
    if len(merged) > 2:
        raise ValueError(
            f"{name}: leading dimensions of shape {tuple(sizes)} and strides {tuple(strides)} need "
            "more than two row strides; use .flatten(0, -2), which copies"
        )
    outer, inner = [1] * (2 - len(merged)) + [size for size, _ in merged]
    return outer, inner
