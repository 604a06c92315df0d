"""The public functions.

Source of the objective and its decomposition: arXiv 2512.23097.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from hybrid_kernels.call import Comparison, Context, LinearCall, LogitCall
from hybrid_kernels.divergences import Divergence
from hybrid_kernels.linear.heads import LinearStudent
from hybrid_kernels.linear.rows import Chunking
from hybrid_kernels.objective import Objective
from hybrid_kernels.types import HybridLoss, Teacher, TokenTerms


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
        teacher: `[..., V]` logits, of any of these dtypes; a `TopK`; a `LinearTeacher` (whose fp32
            logits then exist as a whole, as the student's do); or a `Mixture` of several.
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
        process_group: ranks that share the vocabulary: each has a slice `[..., V_rank]` of the
            student's and teacher's logits, in the order of the ranks and of any sizes; everything
            else is the same on all ranks, whose calls come in the same order, and ids of tokens and
            of a `TopK` are global. Each rank gets the results of the whole, the loss too (which is
            not to be summed over the ranks), and the gradient of its own logits.
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
        In fp16, which can't hold the gradient of a mean over thousands of tokens without a loss
        scale, that of a scalar loss is computed in the backward, upstream gradient included.

        Logits may forbid tokens, by -inf, -1e9 or a dtype's lowest number, on either side or both:
        values and gradients are those of float64. What both sides forbid by -inf takes no part;
        where only one does, every divergence is its limit. The limit is +inf where q = 0 < p for
        the reverse KL, Jeffreys, and alpha and Renyi with alpha >= 1, with a non-finite gradient
        (see `teacher_floor`); and where p = 0 < q for the forward KL and Jeffreys, with a finite
        gradient, and for alpha <= 0. A probability counts as 0 where float64 has no number for it.
        A term whose weight is 0 is ignored. NaN or +inf makes its own row NaN.
    """
    comparison = Comparison(teacher, divergence, temperature, tail, teacher_floor)
    context = Context(token_ids, mask, process_group, backend)
    call = LogitCall(student_logits, comparison, context, inplace)
    objective = Objective(advantages, dense_weight, entropy_weight, reduction, num_tokens)
    return call.hybrid_loss(objective)


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
        `teacher_log_prob`, `logsumexp` (of z/T) and the masses on a top-K support are detached.
        What was not asked for is None.

    Raises:
        ValueError: as in `hybrid_loss`.

    Notes:
        The logits are kept for the backward sweep, which writes one `[..., V]` gradient in the
        student's dtype. Second derivatives raise. The gradient of a `TopK` teacher's divergence is
        that of its value: tokens sampled outside the support correct nothing here.
    """
    comparison = Comparison(teacher, divergence, temperature, tail, teacher_floor)
    context = Context(token_ids, mask, process_group, backend)
    return LogitCall(student_logits, comparison, context).token_terms()


def linear_hybrid_loss(
    student_hidden: Tensor,
    student_weight: Tensor | torch.nn.Module,
    teacher: Teacher | None,
    token_ids: Tensor | None = None,
    advantages: Tensor | Callable[[TokenTerms], Tensor] | None = None,
    *,
    student_bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    chunk_rows: int | None = None,
    logits_dtype: torch.dtype = torch.float32,
    grad_filter: float = 0.0,
    drop_masked: bool = True,
    mask: Tensor | None = None,
    dense_weight: float | Tensor = 1.0,
    entropy_weight: float | Tensor = 0.0,
    divergence: str | Divergence = "reverse_kl",
    temperature: float = 1.0,
    reduction: str = "mean",
    num_tokens: float | Tensor | None = None,
    tail: str = "bucket",
    teacher_floor: float | None = None,
    process_group: object | None = None,
    backend: str = "auto",
) -> HybridLoss:
    """`hybrid_loss` from hidden states and the output layer: no `[N, V]` tensor ever exists.

    With x = student_hidden student_weight^T + student_bias the logits are

        z = softcap tanh(logit_scale x / softcap),   or logit_scale x without a softcap

    and everything else is as in `hybrid_loss`. Rows are taken in chunks: the logits of a chunk come
    out of a GEMM, their gradient dz replaces them, and dh = dz W and dW += dz^T h are two more:
    four GEMMs with a `LinearTeacher`, three with a frozen weight.

    Args:
        student_hidden: `[..., D]`, fp32, bf16 or fp16, as it enters the output layer (after the
            last norm); differentiable.
        student_weight: `[V, D]` of the same dtype; differentiable. A parameter (tied to the
            embedding or not; slice it, `weight[:V]`, for a shorter vocabulary), a DTensor, which is
            taken to be one of FSDP2 (gathered once; gradients averaged over its mesh), or the
            output layer itself: a linear layer or one that PEFT has wrapped, whose LoRA adapters
            then cost two GEMMs of their rank.
        teacher: `LinearTeacher`, logits `[..., V]`, `TopK`, `Mixture` of these, or None.
        token_ids: as in `hybrid_loss`.
        advantages: as in `hybrid_loss`. A function is called once, on the statistics of all rows;
            the logits are then computed twice (six GEMMs), unless one chunk holds them all.
        student_bias: `[V]` or None; differentiable.
        softcap: above 0, or None (`final_logit_softcapping` of Gemma).
        logit_scale: factor on the logits (of Cohere; 1 / `logits_scaling` of Granite).
        chunk_rows: rows of a chunk. By default what fits into a budget of

                max(64 MiB on a CPU, 2 GiB on a GPU; (8 N V bytes) / 16)

            of which a row takes V times the bytes of a logit for each side that is given by hidden
            states, and of dz where it differs in dtype (16-bit weights on a GPU) or the logits have
            a softcap; and all rows at once where they fit into the memory of the weight's gradient.
        logits_dtype: of the chunks' logits. fp32 costs memory traffic; 16 bits cost most digits of
            the gradient where the models are close.
        grad_filter: columns of a chunk's dz (entries of the vocabulary) whose mean |dz| over the
            chunk's rows, in units of the loss of one token, is at most this enter no backward GEMM;
            `dropped_norm` tells how much that was (None where the backward computes the gradient).
            0 is exact. Synchronises the device with the host once a chunk.
        drop_masked: leave masked rows out before the GEMMs, which synchronises the device with the
            host once for each time that logits are computed. With False masked rows are computed
            and cleared.
        mask: as in `hybrid_loss`.
        dense_weight: as in `hybrid_loss`.
        entropy_weight: as in `hybrid_loss`.
        divergence: as in `hybrid_loss`.
        temperature: as in `hybrid_loss`.
        reduction: as in `hybrid_loss`. "none" computes the logits twice where the weight or bias
            has a gradient: six GEMMs.
        num_tokens: as in `hybrid_loss`.
        tail: as in `hybrid_loss`.
        teacher_floor: as in `hybrid_loss`.
        process_group: ranks that share the vocabulary, as in `hybrid_loss`: each has a slice
            `[V_rank, D]` of the weight, bias and teacher's weight (or logits), and the same hidden
            states, whose gradient is summed over the ranks here. Unless `chunk_rows` is given, they
            agree on it, which synchronises the device with the host once.
        backend: as in `hybrid_loss`.

    Returns:
        `HybridLoss`, as in `hybrid_loss`.

    Raises:
        ValueError: as in `hybrid_loss`.

    Notes:
        The gradients are computed in the forward; backward multiplies them by the upstream one and,
        where any is fp16, by the normaliser, so that a loss scale saves what fp16 can't hold.
        Memory beside them: the chunks' buffers, and an fp32 sum of dW where a 16-bit weight meets
        several chunks. Of a single chunk the buffers lie inside dW until it is written, if they
        fit; what is left beside it is a copy of the part N / D of dz. 16-bit hidden states are
        multiplied with fp32 sums; dz is rounded to the weight's dtype for its GEMMs (not on a CPU).
        Under `torch.autocast` all factors are cast as a linear layer casts them. Second derivatives
        raise.
    """
    student = LinearStudent(student_hidden, student_weight, student_bias, softcap, logit_scale)
    chunking = Chunking(chunk_rows, logits_dtype, grad_filter, drop_masked)
    comparison = Comparison(teacher, divergence, temperature, tail, teacher_floor)
    context = Context(token_ids, mask, process_group, backend)
    call = LinearCall(student, chunking, comparison, context)
    objective = Objective(advantages, dense_weight, entropy_weight, reduction, num_tokens)
    return call.hybrid_loss(objective)


def linear_token_terms(
    student_hidden: Tensor,
    student_weight: Tensor | torch.nn.Module,
    teacher: Teacher | None = None,
    token_ids: Tensor | None = None,
    *,
    student_bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    chunk_rows: int | None = None,
    logits_dtype: torch.dtype = torch.float32,
    grad_filter: float = 0.0,
    drop_masked: bool = True,
    mask: Tensor | None = None,
    divergence: str | Divergence = "reverse_kl",
    temperature: float = 1.0,
    tail: str = "bucket",
    teacher_floor: float | None = None,
    process_group: object | None = None,
    backend: str = "auto",
) -> TokenTerms:
    """`token_terms` from hidden states and the output layer, differentiable with any upstream.

    Args:
        student_hidden: as in `linear_hybrid_loss`; differentiable.
        student_weight: as in `linear_hybrid_loss`; differentiable.
        teacher: as in `linear_hybrid_loss`, or None.
        token_ids: as in `hybrid_loss`, or None.
        student_bias: as in `linear_hybrid_loss`; differentiable.
        softcap: as in `linear_hybrid_loss`.
        logit_scale: as in `linear_hybrid_loss`.
        chunk_rows: as in `linear_hybrid_loss`.
        logits_dtype: as in `linear_hybrid_loss`.
        grad_filter: as in `linear_hybrid_loss`, of the gradient in the backward.
        drop_masked: as in `linear_hybrid_loss`.
        mask: as in `token_terms`.
        divergence: as in `hybrid_loss`.
        temperature: as in `hybrid_loss`.
        tail: as in `hybrid_loss`.
        teacher_floor: as in `hybrid_loss`.
        process_group: as in `linear_hybrid_loss`.
        backend: as in `hybrid_loss`.

    Returns:
        `TokenTerms`, as in `token_terms`.

    Raises:
        ValueError: as in `hybrid_loss`.

    Notes:
        Two GEMMs (scoring, under `torch.no_grad()`, is that cheap and keeps nothing); the backward
        computes the logits anew, four more.
    """
    student = LinearStudent(student_hidden, student_weight, student_bias, softcap, logit_scale)
    chunking = Chunking(chunk_rows, logits_dtype, grad_filter, drop_masked)
    comparison = Comparison(teacher, divergence, temperature, tail, teacher_floor)
    context = Context(token_ids, mask, process_group, backend)
    return LinearCall(student, chunking, comparison, context).token_terms()
