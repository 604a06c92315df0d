"""The public functions: they check, flatten to rows, choose the backend and normalise.

Source of the objective and its decomposition: arXiv 2512.23097.
"""

import importlib.util
from collections.abc import Callable

import torch
from torch import Tensor

from hybrid_kernels import ops, validate
from hybrid_kernels.rows import FIELDS
from hybrid_kernels.types import (
    IGNORED_TOKEN,
    Divergence,
    HybridLoss,
    Teacher,
    TokenTerms,
    TopK,
)

HAS_TRITON = importlib.util.find_spec("triton") is not None


def hybrid_loss(
    student_logits: Tensor,
    teacher: Teacher | None,
    token_ids: Tensor | None = None,
    advantages: Tensor | Callable[[TokenTerms], Tensor] | None = None,
    *,
    mask: Tensor | None = None,
    dense_weight: float | Tensor = 1.0,
    entropy_weight: float | Tensor = 0.0,
    divergence: str | Divergence = "reverse_kl",
    temperature: float = 1.0,
    reduction: str = "mean",
    num_tokens: float | Tensor | None = None,
    tail: str = "bucket",
    teacher_floor: float | None = None,
    inplace: bool = False,
    process_group: object | None = None,
    backend: str = "auto",
) -> HybridLoss:
    """Distillation towards a teacher and policy gradient, with one closed-form gradient.

    Per token, with p = softmax(z/T) the student, q = softmax(w/T) the teacher, y the sampled token:

        L = dense_weight * D(p, q) - advantages * log p(y) - entropy_weight * H(p)

    For the reverse KL its gradient is (a = dense_weight, A = advantages, l_v = log p_v - log q_v)

        dL/dz_v = (1/T) * ( p_v * [ a (l_v - KL(p||q)) + A ] - A 1[v = y] )

    which for `advantages` from `sparse_advantages` is the hybrid gradient of arXiv 2512.23097:
    the dense part exact, the sparse part a Monte Carlo estimate.

    Nothing is shifted: row i of the logits is the distribution that `token_ids[i]` was drawn from.

    Args:
        student_logits: `[..., V]`, fp32, bf16 or fp16; differentiable. The last dimension is
            contiguous; rows may have any stride, so that `logits[:, :-1, :V]` needs no copy. (Only
            leading dimensions that need more than two row strides are refused, as a slice of the
            third of four dimensions does.)
        teacher: `[..., V]` logits, of any of these dtypes; a `TopK`; or a `Mixture` of several.
            Never differentiable. None where `dense_weight` is 0 (policy gradient alone).
        token_ids: `[...]` int64 or int32. Rows with the id -100 are masked.
        advantages: `[...]` floating, a constant; or a function of the row statistics
            (`TokenTerms` -> `[...]`), called without gradient between the statistics and the
            gradient: the place for clipping, importance ratios and returns that depend on the
            fresh log-probabilities.
        mask: `[...]` bool or 0/1 integers. A masked row has value and gradient exactly 0, whatever
            it holds. Zero valid rows give a loss of 0.
        dense_weight: number, scalar tensor or `[...]`; a constant.
        entropy_weight: number, scalar tensor or `[...]`; a constant.
        divergence: a name from `available_divergences()`, or a `Divergence`.
        temperature: T > 0, dividing both sides' logits; every result is that of the divided ones.
        reduction: "mean" over the valid tokens (or `num_tokens`), "sum", or "none".
        num_tokens: the divisor of the mean, a number or a device scalar. Give the count of the
            whole optimizer step, so that micro-batches and ranks add up exactly.
        tail: what stands for the vocabulary outside a `TopK` teacher's support S, on which the
            models have the masses P and Q; no effect on a full teacher. "bucket": one more
            category of mass 1-P and 1-Q, whose value is a lower bound of the full one. For the
            reverse KL its gradient is p (l - L) on S and p (rho - L) off it, with
            rho = log((1-P)/(1-Q)); where `token_ids` and the teacher's `token_log_prob` are given,
            a token y sampled outside S also takes `dense_weight (l_y - rho)` off its advantage,
            which makes the expected gradient that of the full KL. (The loss is then that of the
            changed advantage, so log `divergence` rather than `loss`.) "renormalize": both models
            conditioned on S, another objective; 0 for an empty S. "mask": the bucket's value, its
            gradient on S alone.
        teacher_floor: teacher log-probabilities below it are raised to it (the raised entries are
            not renormalised), so that a token the teacher forbids has a large, finite cost.
        inplace: write the gradient over `student_logits`, which then holds no logits any more.
            No effect where no gradient is wanted.
        process_group: ranks that share the vocabulary.
        backend: "auto" (Triton on a GPU, else torch), "triton" or "torch".

    Returns:
        `HybridLoss`: the loss, and detached fp32 `[...]` statistics.

    Raises:
        ValueError: an argument of the wrong kind, shape, dtype, device or range; the message names
            it, says what it got and what to do.

    Notes:
        The gradient is computed in the forward, in the student's dtype: one `[..., V]` buffer, or
        none with `inplace`; backward multiplies it by the upstream gradient, or leaves it alone
        where that is 1. Without a gradient to compute, only the statistics are. Arithmetic is
        fp32. Second derivatives raise. No call synchronises the device with the host.
        In fp16 the normaliser of the mean is in the gradient before a loss scale can reach it, and
        small entries flush to zero: use `reduction="sum"`, or bf16.

        An entry with z = -inf takes no part; w = -inf where p > 0 makes the reverse KL +inf and its
        gradient non-finite (see `teacher_floor`); NaN or +inf makes its own row NaN.
    """
    options = (process_group, tail, teacher_floor)
    rows = _Rows(student_logits, teacher, token_ids, mask, *options)
    config = _config(rows, divergence, temperature, teacher_floor, tail, backend)
    validate.choice("reduction", reduction, validate.REDUCTIONS)
    validate.num_tokens(num_tokens, reduction, student_logits.device)
    validate.row_weight("dense_weight", dense_weight, rows.shape, student_logits.device)
    validate.row_weight("entropy_weight", entropy_weight, rows.shape, student_logits.device)
    if teacher is None and not _is_zero(dense_weight):
        raise ValueError(
            f"teacher: None with dense_weight={dense_weight!r}; give the teacher's logits, or "
            "dense_weight=0 for the policy gradient alone"
        )
    if advantages is not None and token_ids is None:
        raise ValueError("token_ids: None, but advantages need the sampled tokens; give both")
    student, teachers, *others = rows.tensors
    wants_gradient = torch.is_grad_enabled() and student_logits.requires_grad
    if inplace:
        validate.inplace(student_logits)

    statistics = None
    if callable(advantages):
        with torch.no_grad():
            statistics = ops.row_statistics(*rows.tensors, *config)
            advantages = advantages(rows.terms(statistics))
        validate.advantages(advantages, rows.shape, student_logits.device)
    elif advantages is not None:
        validate.advantages(advantages, rows.shape, student_logits.device)
    weights = ops.Weights(
        dense=None if _is_zero(dense_weight) else _flat_weight(dense_weight),
        advantages=None if advantages is None else advantages.reshape(-1).float(),
        entropy=None if _is_zero(entropy_weight) else _flat_weight(entropy_weight),
    )
    scale = _normaliser(reduction, num_tokens, rows)
    if wants_gradient:
        summed = reduction != "none"
        loss, statistics = ops.HybridLossFunction.apply(
            student, *others, *weights, scale, statistics, summed, inplace, config, *teachers
        )
    else:
        if statistics is None:
            statistics = ops.row_statistics(*rows.tensors, *config)
        loss = ops.row_losses(statistics, weights, rows.valid)
        loss = loss if reduction == "none" else (loss * scale).sum()
    terms = rows.terms(statistics)
    return HybridLoss(
        loss=loss.view(rows.shape) if reduction == "none" else loss,
        divergence=terms.divergence,
        log_prob=terms.log_prob,
        teacher_log_prob=terms.teacher_log_prob,
        entropy=terms.entropy,
        student_mass=rows.mass(statistics, FIELDS.student_mass),
        teacher_mass=rows.mass(statistics, FIELDS.teacher_mass),
    )


def token_terms(
    student_logits: Tensor,
    teacher: Teacher | None = None,
    token_ids: Tensor | None = None,
    *,
    mask: Tensor | None = None,
    divergence: str | Divergence = "reverse_kl",
    temperature: float = 1.0,
    tail: str = "bucket",
    teacher_floor: float | None = None,
    process_group: object | None = None,
    backend: str = "auto",
) -> TokenTerms:
    """Per-token divergence, log-probabilities and entropy, differentiable with any upstream.

    For losses that `hybrid_loss` does not have: combine the fields in torch and call backward. With
    g the upstream gradients of the three differentiable fields, the student's logits get, in one
    sweep,

        dz = g_divergence * dD/dz + g_log_prob * dlog p(y)/dz + g_entropy * dH(p)/dz

    Args:
        student_logits: as in `hybrid_loss`; differentiable.
        teacher: as in `hybrid_loss`, or None.
        token_ids: as in `hybrid_loss`, or None.
        mask: as in `hybrid_loss`; masked rows are 0 and get gradient 0.
        divergence: as in `hybrid_loss`.
        temperature: as in `hybrid_loss`.
        tail: as in `hybrid_loss`.
        teacher_floor: as in `hybrid_loss`.
        process_group: as in `hybrid_loss`.
        backend: as in `hybrid_loss`.

    Returns:
        `TokenTerms`, fp32 `[...]`. `divergence`, `log_prob` and `entropy` are differentiable;
        `teacher_log_prob` and `logsumexp` (of z/T) are detached. What was not asked for is None.

    Raises:
        ValueError: as in `hybrid_loss`.

    Notes:
        The logits are kept for the backward sweep, which writes one `[..., V]` gradient in the
        student's dtype. Second derivatives raise. The gradient of a `TopK` teacher's divergence is
        that of its value: tokens sampled outside the support correct nothing here.
    """
    options = (process_group, tail, teacher_floor)
    rows = _Rows(student_logits, teacher, token_ids, mask, *options)
    config = _config(rows, divergence, temperature, teacher_floor, tail, backend)
    if torch.is_grad_enabled() and student_logits.requires_grad:
        for tensor in (*rows.tensors[1], rows.tensors[2]):
            validate.can_be_saved("teacher", tensor)
        validate.can_be_saved("token_ids", token_ids)
    student, teachers, *others = rows.tensors
    statistics = ops.TokenTermsFunction.apply(student, *others, config, *teachers)
    return rows.terms(statistics, differentiable=True)


class _Rows:
    """The checked inputs, flattened to rows, and the way back to the caller's shape."""

    def __init__(
        self, student_logits, teacher, token_ids, mask, process_group, tail, teacher_floor
    ) -> None:
        validate.student(student_logits)
        validate.no_process_group(process_group)
        validate.choice("tail", tail, validate.TAILS)
        validate.teacher_floor(teacher_floor)
        self.shape = student_logits.shape[:-1]
        device = student_logits.device
        members = [] if teacher is None else validate.teacher(teacher, student_logits)
        if token_ids is not None:
            validate.token_ids(token_ids, self.shape, device)
        if mask is not None:
            validate.row_mask(mask, self.shape, device)
        self.valid = _valid_rows(mask, token_ids)
        self.has_teacher, self.has_tokens = teacher is not None, token_ids is not None
        self.shares = [weight for weight, _ in members]
        self.resolution, support, token_log_prob = 0.0, None, None
        supports = [member for _, member in members if isinstance(member, TopK)]
        logits = [student_logits, *(m for _, m in members if isinstance(m, Tensor))]
        student, *teachers = _as_rows(logits)
        if supports:
            self.resolution = max(member.resolution for member in supports)
            size = supports[0].ids.shape[-1]
            support = supports[0].ids.reshape(-1, size).contiguous()
            teachers = [m.log_probs.reshape(-1, size).float().contiguous() for m in supports]
            token_log_prob = _mean_token_log_prob(supports, self.shares, teacher_floor)
        self.has_support = support is not None
        self.tensors = (
            student,
            teachers,
            support,
            token_log_prob,
            None if token_ids is None else token_ids.reshape(-1).contiguous(),
            self.valid,
        )
        self.count = self.shape.numel()

    def mass(self, statistics: Tensor, index: int) -> Tensor | None:
        """A mass on a top-K support, in the caller's shape."""
        return statistics[index].view(self.shape).detach() if self.has_support else None

    def terms(self, statistics: Tensor, differentiable: bool = False) -> TokenTerms:
        """The fields for the user, in the caller's shape."""

        def field(index: int, keeps_graph: bool) -> Tensor:
            value = statistics[index].view(self.shape)
            return value if keeps_graph else value.detach()

        teacher, tokens = self.has_teacher, self.has_tokens
        return TokenTerms(
            divergence=field(FIELDS.divergence, differentiable) if teacher else None,
            log_prob=field(FIELDS.log_prob, differentiable) if tokens else None,
            teacher_log_prob=field(FIELDS.teacher_log_prob, False) if teacher and tokens else None,
            entropy=field(FIELDS.entropy, differentiable),
            logsumexp=field(FIELDS.logsumexp, False),
        )


def _config(rows, divergence, temperature, teacher_floor, tail, backend) -> tuple:
    """The constants of a call, in the order in which every operator takes them."""
    validate.temperature(temperature)
    name, parameter = validate.divergence(divergence).canonical()
    floor = None if teacher_floor is None else float(teacher_floor)
    student, _, support, *_ = rows.tensors
    backend = resolve_backend(backend, student)
    if support is not None and backend == "triton":
        validate.support_size(support.shape[-1])
    constants = (name, parameter, float(temperature), floor, tail, rows.resolution, backend)
    return (rows.shares, *constants)


def resolve_backend(backend: str, tensor: Tensor) -> str:
    """ "triton" or "torch": the only place where a backend is chosen.

    Raises:
        ValueError: an unknown name, or "triton" where it can't run on the tensor's device.
    """
    validate.choice("backend", backend, validate.BACKENDS)
    if backend == "auto":
        return "triton" if tensor.is_cuda and HAS_TRITON else "torch"
    if backend == "triton":
        if not HAS_TRITON:
            raise ValueError('backend: "triton" is not installed here; use backend="torch"')
        from hybrid_kernels.kernels import config

        if not (tensor.is_cuda or config.INTERPRETED):
            raise ValueError(
                f'backend: "triton" can\'t run on {tensor.device}; move the tensors to a GPU, set '
                "TRITON_INTERPRET=1 before the first import to run the kernels on the CPU, or use "
                'backend="torch"'
            )
    return backend


def _valid_rows(mask: Tensor | None, token_ids: Tensor | None) -> Tensor | None:
    """Bool `[N]`, the rows that count; None where all do by construction."""
    valid = None if mask is None else mask.reshape(-1) != 0
    if token_ids is not None:
        named = token_ids.reshape(-1) != IGNORED_TOKEN
        valid = named if valid is None else valid & named
    return valid


def _normaliser(reduction: str, num_tokens: float | Tensor | None, rows: _Rows) -> Tensor:
    """The factor of every row as a scalar fp32 tensor on the device."""
    device = rows.tensors[0].device
    if reduction != "mean":
        return torch.ones((), device=device)
    if isinstance(num_tokens, Tensor):
        count = num_tokens.detach().float().reshape(())
        return torch.where(count > 0, count.reciprocal(), 0.0)
    if num_tokens is not None:
        return torch.full((), 1.0 / num_tokens, device=device)
    if rows.valid is None:
        return torch.full((), 1.0 / max(rows.count, 1), device=device)
    return rows.valid.sum().clamp(min=1).float().reciprocal()


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


def _as_rows(logits: list[Tensor]) -> list[Tensor]:
    """`[..., V]` as `[O, I, V]` without a copy: leading dimensions merge where strides allow.

    The first is the student's, the others are teachers'.
    """
    names = ["student_logits"] + ["teacher"] * (len(logits) - 1)
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


def _flat_weight(weight: float | Tensor) -> float | Tensor:
    if not isinstance(weight, Tensor):
        return float(weight)
    return weight.float() if weight.ndim == 0 else weight.reshape(-1).float()


def _is_zero(weight: float | Tensor) -> bool:
    return not isinstance(weight, Tensor) and weight == 0
