"""What a call is about, checked and flattened to rows, whether from logits or from hidden states.

Both kinds measure statistics, differentiate a loss and give differentiable statistics; what
`api.py` makes of these is the same for both.
"""

import importlib.util
from abc import ABC, abstractmethod
from typing import NamedTuple

import torch
from torch import Tensor

from hybrid_kernels import linear_ops, ops, validate
from hybrid_kernels.divergences import Divergence
from hybrid_kernels.heads import Head
from hybrid_kernels.linear import Hidden, write_logits
from hybrid_kernels.rows import FIELDS, Rows
from hybrid_kernels.types import (
    IGNORED_TOKEN,
    LinearTeacher,
    Teacher,
    TokenTerms,
    TopK,
)

HAS_TRITON = importlib.util.find_spec("triton") is not None


class Context(NamedTuple):
    """The arguments that mean the same in every function."""

    teacher: Teacher | None
    token_ids: Tensor | None
    mask: Tensor | None
    divergence: str | Divergence
    temperature: float
    tail: str
    teacher_floor: float | None
    process_group: object | None
    backend: str


class Problem(ABC):
    """The part of a call that does not depend on how the student is given.

    Attributes:
        shape: the caller's leading dimensions.
        count: N, the rows.
        device: of all tensors.
        rows: all that the operators need; a subclass fills in the teachers.
        members: the teachers with their weights.
        wants_gradient: whether there is one to compute.
    """

    wants_gradient: bool

    def __init__(self, student: Tensor, place: validate.Place, context: Context) -> None:
        self.shape, self.device, self.count = place.rows, place.device, place.rows.numel()
        validate.choice("tail", context.tail, validate.TAILS)
        validate.teacher_floor(context.teacher_floor)
        validate.temperature(context.temperature)
        teacher, token_ids, floor = context.teacher, context.token_ids, context.teacher_floor
        members = [] if teacher is None else validate.teacher(teacher, place)
        valid = valid_rows(context, place.rows, place.device)
        self.has_teacher, self.has_tokens = teacher is not None, token_ids is not None
        self.members = [member for _, member in members]
        shares = [weight for weight, _ in members]
        supports = [member for member in self.members if isinstance(member, TopK)]
        support = None
        if supports:
            support = supports[0].ids.reshape(-1, supports[0].ids.shape[-1]).contiguous()
        name, parameter = validate.divergence(context.divergence).canonical()
        backend = resolve_backend(context.backend, self.device)
        if support is not None and backend == "triton":
            validate.support_size(support.shape[-1])
        self.rows = Rows(
            student,
            shares=tuple(shares),
            support=support,
            token_log_prob=_mean_token_log_prob(supports, shares, floor) if supports else None,
            token_ids=None if token_ids is None else token_ids.reshape(-1).contiguous(),
            valid=valid,
            divergence=name,
            parameter=parameter,
            temperature=float(context.temperature),
            teacher_floor=None if floor is None else float(floor),
            tail=context.tail,
            resolution=max([0.0, *(member.resolution for member in supports)]),
            group=validate.process_group(context.process_group),
            backend=backend,
        )

    def log_probs(self) -> list[Tensor]:
        """Those of top-K members, `[N, K]` fp32."""
        found = [m.log_probs for m in self.members if isinstance(m, TopK)]
        return [one.reshape(-1, one.shape[-1]).float().contiguous() for one in found]

    @abstractmethod
    def measure(self, keep: bool = False) -> Tensor:
        """The statistics of all rows, without a gradient; `keep` what else a summed loss needs."""

    @abstractmethod
    def differentiable(self) -> Tensor:
        """Statistics, of which divergence, log p(y) and entropy are differentiable."""

    @abstractmethod
    def differentiate(
        self, weights: ops.Weights, scale: Tensor, statistics: Tensor | None, summed: bool
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """The differentiable loss, the statistics, and the norm of what was dropped.

        Args:
            weights: per row.
            scale: the normaliser, a scalar.
            statistics: where they are known already.
            summed: whether the loss is the sum over all rows, or one for each.
        """

    def terms(
        self, statistics: Tensor, differentiable: bool = False, own: bool = False
    ) -> TokenTerms:
        """The fields for the user, in the caller's shape; `own` to do with as they please."""

        def field(index: int, keeps_graph: bool) -> Tensor:
            value = statistics[index].view(self.shape)
            value = value if keeps_graph else value.detach()
            return value.clone() if own else value

        teacher, tokens = self.has_teacher, self.has_tokens
        on_support = self.rows.support is not None
        return TokenTerms(
            divergence=field(FIELDS.divergence, differentiable) if teacher else None,
            log_prob=field(FIELDS.log_prob, differentiable) if tokens else None,
            teacher_log_prob=field(FIELDS.teacher_log_prob, False) if teacher and tokens else None,
            entropy=field(FIELDS.entropy, differentiable),
            logsumexp=field(FIELDS.logsumexp, False),
            student_mass=field(FIELDS.student_mass, False) if on_support else None,
            teacher_mass=field(FIELDS.teacher_mass, False) if on_support else None,
        )


class LogitProblem(Problem):
    """A student given by logits `[..., V]`."""

    def __init__(self, student_logits: Tensor, context: Context, inplace: bool = False) -> None:
        validate.student(student_logits)
        sharded = context.process_group is not None
        rows, size = student_logits.shape[:-1], student_logits.shape[-1]
        place = validate.Place(rows, size, student_logits.device, sharded)
        super().__init__(student_logits, place, context)
        self.wants_gradient = torch.is_grad_enabled() and student_logits.requires_grad
        self.inplace = inplace
        logits = [_teacher_logits(m, size) for m in self.members if not isinstance(m, TopK)]
        names = ["student_logits"] + ["teacher"] * len(logits)
        student, *teachers = _as_rows([student_logits, *logits], names)
        teachers = teachers or self.log_probs()
        self.rows = self.rows._replace(student=student, teachers=tuple(teachers))

    def measure(self, keep: bool = False) -> Tensor:
        return ops.row_statistics(*self.rows)

    def differentiable(self) -> Tensor:
        if self.wants_gradient:
            _can_be_saved(self.rows)
        return ops.TokenTermsFunction.apply(self.rows.student, self.rows)

    def differentiate(self, weights, scale, statistics, summed):
        loss, statistics = ops.HybridLossFunction.apply(
            self.rows.student, self.rows, weights, scale, statistics, summed, self.inplace
        )
        return loss, statistics, None


class LinearProblem(Problem):
    """A student given by hidden states `[..., D]` and an output layer."""

    def __init__(
        self, student_hidden: Tensor, hidden: Hidden, context: Context, eps: float
    ) -> None:
        rows, sharded = student_hidden.shape[:-1], context.process_group is not None
        vocabulary = hidden.weights[0].shape[0]
        place = validate.Place(rows, vocabulary, student_hidden.device, sharded)
        super().__init__(hidden.hiddens[0][None], place, context)
        self.eps = eps
        self.kept: list[Tensor] = []
        wanted = [t for t in hidden.differentiable() if t is not None]
        self.wants_gradient = torch.is_grad_enabled() and any(t.requires_grad for t in wanted)
        # With a gradient of the hidden states alone, an upstream one for each row can wait.
        self.only_hidden = not any(t.requires_grad for t in wanted[len(hidden.hiddens) :])
        logits = [m for m in self.members if isinstance(m, Tensor)]
        others = iter(_as_rows(logits, ["teacher"] * len(logits)) if logits else self.log_probs())
        heads = [
            _teacher_head(m, vocabulary) if isinstance(m, LinearTeacher) else None
            for m in self.members
        ]
        self.rows = self.rows._replace(
            teachers=tuple(next(others) if h is None else h.hiddens[0] for h in heads)
        )
        self.hidden = hidden._replace(
            teacher_weights=[None if h is None else h.weights[0] for h in heads],
            teacher_biases=[None if h is None else h.bias for h in heads],
            logit_scales=[
                *hidden.logit_scales,
                *(1.0 if h is None else h.logit_scale for h in heads),
            ],
            softcaps=[*hidden.softcaps, *(0.0 if h is None else h.softcap for h in heads)],
        )

    def measure(self, keep: bool = False) -> Tensor:
        if not keep or torch.compiler.is_compiling():
            return linear_ops.linear_statistics(*self.hidden, *self.rows[1:])
        statistics, self.kept = linear_ops.keep_logits(self.hidden, self.rows)
        return statistics

    def differentiable(self, known: Tensor | None = None) -> Tensor:
        if self.wants_gradient:
            _can_be_saved(self.hidden, self.rows)
        bound = torch.full((), self.eps, device=self.device) if self.eps else None
        return linear_ops.LinearTermsFunction.apply(
            self.hidden, self.rows, bound, known, *self.hidden.differentiable()
        )

    def differentiate(self, weights, scale, statistics, summed):
        if not (summed or self.only_hidden):
            # The weight's gradient is a sum over rows, whose upstream gradients are not known yet.
            statistics = self.differentiable(statistics)
            return ops.row_losses(statistics, weights, self.rows.valid), statistics, None
        bound = scale * self.eps if self.eps else None
        loss, statistics, dropped = linear_ops.LinearLossFunction.apply(
            self.hidden,
            self.rows,
            weights,
            scale,
            bound,
            statistics,
            self.kept,
            summed,
            *self.hidden.differentiable(),
        )
        return loss, statistics, dropped if self.eps else None


_ARGUMENTS = {
    "student": "student_logits",
    "hiddens": "student_hidden",
    "weights": "student_weight",
    "bias": "student_bias",
    "token_ids": "token_ids",
    "valid": "mask",
}


def _can_be_saved(*bags: NamedTuple) -> None:
    """Checks that autograd can keep all tensors; those without an entry are the teacher's."""
    for bag in bags:
        for name, value in bag._asdict().items():
            for one in value if isinstance(value, list | tuple) else (value,):
                validate.can_be_saved(_ARGUMENTS.get(name, "teacher"), one)


def _teacher_head(teacher: LinearTeacher, vocabulary: int) -> Head:
    """The tensors of a teacher's output layer."""
    name = "teacher: LinearTeacher."
    weight = teacher.weight
    for own, tensor in (("weight", weight), ("bias", teacher.bias)):
        if isinstance(tensor, Tensor):
            validate.no_grad_wanted(name + own, tensor)
    with torch.no_grad():
        head = Head.of(
            name, teacher.hidden, weight, teacher.bias, teacher.softcap, teacher.logit_scale
        )
    validate.same_vocabulary(head.weights[0], vocabulary)
    if len(head.weights) > 1:
        raise ValueError(
            f"{name}weight: has a LoRA adapter; switch it off (model.disable_adapter()), merge it, "
            "or give the teacher's logits"
        )
    return head


def _teacher_logits(member: Tensor | LinearTeacher, vocabulary: int) -> Tensor:
    """A full teacher's logits; beside a student's whole logits its own may exist too."""
    if isinstance(member, Tensor):
        return member
    head = _teacher_head(member, vocabulary)
    with torch.no_grad(), ops.autocast_off(member.hidden.device):
        out = torch.empty(
            (len(head.hiddens[0]), vocabulary), dtype=torch.float32, device=member.hidden.device
        )
        write_logits(head, slice(None), out)
    return out.view(*member.hidden.shape[:-1], vocabulary)


def resolve_backend(backend: str, device: torch.device) -> str:
    """ "triton" or "torch": the only place where a backend is chosen.

    Raises:
        ValueError: an unknown name, or "triton" where it can't run on the device.
    """
    validate.choice("backend", backend, validate.BACKENDS)
    if backend == "auto":
        return "triton" if device.type == "cuda" and HAS_TRITON else "torch"
    if backend == "triton":
        if not HAS_TRITON:
            raise ValueError('backend: "triton" is not installed here; use backend="torch"')
        from hybrid_kernels.triton_backend import plan

        if not (device.type == "cuda" or plan.INTERPRETED):
            raise ValueError(
                f'backend: "triton" can\'t run on {device}; move the tensors to a GPU, set '
                "TRITON_INTERPRET=1 before the first import to run the kernels on the CPU, or use "
                'backend="torch"'
            )
    return backend


def valid_rows(context: Context, rows: torch.Size, device: torch.device) -> Tensor | None:
    """Bool `[N]`, the rows that count; None where all do by construction. Checks both arguments."""
    mask, token_ids, valid = context.mask, context.token_ids, None
    if token_ids is not None:
        validate.token_ids(token_ids, rows, device)
        valid = token_ids.reshape(-1) != IGNORED_TOKEN
    if mask is not None:
        validate.row_mask(mask, rows, device)
        kept = mask.reshape(-1) != 0
        valid = kept if valid is None else kept & valid
    return valid


def _mean_token_log_prob(
    supports: list[TopK], shares: list[float], floor: float | None
) -> Tensor | None:
    """log q(y) as `[N]`: the weighted mean over the members; None where one doesn't tell."""
    total, mean = sum(shares), None
    for share, member in zip(shares, supports, strict=True):
        if member.token_log_prob is None:
            return None
        own = member.token_log_prob.reshape(-1).float()
        own = share / total * (own if floor is None else own.clamp(min=floor))
        mean = own if mean is None else mean + own
    return mean


def _as_rows(logits: list[Tensor], names: list[str]) -> list[Tensor]:
    """`[..., V]` as `[O, I, V]` without a copy: leading dimensions merge where strides allow."""
    splits = [_row_split(name, t) for name, t in zip(names, logits, strict=True)]
    # Where one side needs two row strides and another does not, the other follows.
    split = next((own for own in splits if own[0] != 1), splits[0])
    for tensor, own in zip(logits, splits, strict=True):
        if own[0] not in (1, split[0]):
            raise ValueError(
                f"teacher: rows of strides {tuple(tensor.stride()[:-1])} don't group like the "
                f"others', {tuple(logits[0].stride()[:-1])}; use teacher.contiguous(), which copies"
            )
    return [tensor.view(*split, tensor.shape[-1]) for tensor in logits]


def _row_split(name: str, logits: Tensor) -> tuple[int, int]:
    """The two sizes, O and I, into which the leading dimensions merge; O is 1 where I is enough."""
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
