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
from hybrid_kernels.types import HybridLoss, OutputLayer, Teacher, TokenTerms


def hybrid_loss(
    student_logits: Tensor,
    teacher: Teacher | None,
    token_ids: Tensor | None = None,
    advantages: float | Tensor | Callable[[TokenTerms], float | Tensor] | None = None,
    *,
    mask: Tensor | None = None,
    dense_weight: float | Tensor = 1.0,
    entropy_weight: float | Tensor = 0.0,
    divergence: str | Divergence = "reverse_kl",
    temperature: float | Tensor = 1.0,
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
            contiguous; rows may have any stride, so that `logits[:, :-1, :V]` needs no copy.
            (Refused are leading dimensions that need more than two row strides, as those of a slice
            of the third of four dimensions do.)
        teacher: `[..., V]` logits, in any of these dtypes; a `TopK`; a `LinearTeacher`, all of
            whose fp32 logits then exist, as the student's do; or a `Mixture` of several teachers.
            Never differentiable. None where `dense_weight` is 0 (policy gradient alone).
        token_ids: `[...]` int64 or int32. Rows with the id -100 are masked.
        advantages: a constant for each token; or a function of the row statistics
            (`TokenTerms` -> advantages), called without gradient between the statistics and the
            gradient: the place for clipping, importance ratios and returns that depend on the
            fresh log-probabilities.

            Like `dense_weight`, `entropy_weight` and `temperature`, advantages are a number (of
            Python or NumPy), a scalar tensor, `[...]`, or `[...]` with its last dimension 1, as
            when a `[B, 1]` tensor holds a value for each sequence of a `[B, T]` batch.
        mask: `[...]` bool, or numbers 0 and 1. A masked row has value and gradient exactly 0,
            whatever it holds. Without any valid row the loss is 0.
        dense_weight: in the forms of `advantages`; a constant.
        entropy_weight: in the forms of `advantages`; a constant.
        divergence: a name from `available_divergences()`, or a `Divergence`.
        temperature: T > 0, by which the logits of both sides are divided, in the forms of
            `advantages`. All results are those of the divided logits.
        reduction: "mean" over the valid tokens (or `num_tokens`), "sum", or "none".
        num_tokens: the divisor of the mean, a number or a device scalar. Give the count of the
            whole optimizer step, so that micro-batches add up exactly. Where the gradients of
            data-parallel ranks are averaged, as DDP and FSDP do, give the count of all ranks
            divided by their number; where they are summed, the count of all ranks. One that is not
            positive and finite is an error where it can be seen without a synchronisation;
            otherwise the loss and its gradient are NaN.
        tail: how the vocabulary outside the support S of a `TopK` teacher is treated, where P and Q
            are the models' masses on S. It has no effect on a full teacher.

            - "bucket": as one more category, of mass 1-P and 1-Q. The value is a lower bound of the
              full one. For the reverse KL the gradient is p (l - L) on S and p (rho - L) off S,
              with rho = log((1-P)/(1-Q)). Where `token_ids` and the teacher's `token_log_prob` are
              given and the token y lies outside S, `dense_weight (l_y - rho)` is also subtracted
              from its advantage, which makes the expected gradient that of the full KL. The loss is
              then the one with the changed advantage, so log `divergence` rather than `loss`.
            - "renormalize": both models are conditioned on S, which is another objective. The
              divergence of an empty S is 0.
            - "mask": the value of "bucket", with its gradient on S only.
        teacher_floor: teacher log-probabilities below it are raised to it, without renormalising,
            so that a token the teacher forbids has a large, finite cost.
        inplace: write the gradient over `student_logits`, which are then lost. It has no effect
            where no gradient is wanted.
        process_group: the ranks that share the vocabulary. Each has a slice `[..., V_rank]` of the
            student's and the teacher's logits, in the order of the ranks and of any size.
            Everything else is the same on all ranks, calls come in the same order, and the ids of
            tokens and of a `TopK` are global. Each rank gets the results of the whole vocabulary,
            the loss included (do not sum it over the ranks), and the gradient of its own logits.
        backend: "auto" (Triton on a GPU, else torch), "triton" or "torch".

    Returns:
        `HybridLoss`: the loss, and detached fp32 `[...]` statistics.

    Raises:
        ValueError: an argument of the wrong kind, shape, dtype, device or range. The message names
            it, what it got and how to fix it.

    Notes:
        The gradient is computed in the forward, in the student's dtype: one `[..., V]` buffer, or
        none with `inplace`. Backward multiplies it by the upstream gradient, or leaves it as it is
        where that is 1. Without a gradient to compute, only the statistics are. Arithmetic is
        fp32. Second derivatives raise (but see below). No call synchronises the device with the
        host.

        fp16 can't hold the gradient of a mean over thousands of tokens without a loss scale, so
        there the gradient of a scalar loss is computed in the backward, with the upstream gradient.

        Logits may forbid tokens by -inf, -1e9 or a dtype's lowest number, on either side or both.
        Values and gradients are those of float64. A token that both sides forbid by -inf adds
        nothing. Where only one side forbids it, every divergence has its limit. The limit is +inf
        where q = 0 < p for the reverse KL, Jeffreys, and alpha and Renyi with alpha >= 1, with a
        non-finite gradient (see `teacher_floor`); and where p = 0 < q for the forward KL and
        Jeffreys, with a finite gradient, and for alpha <= 0. A probability counts as 0 where
        float64 can't represent it. A term whose weight is 0 is ignored. NaN or +inf makes its own
        row NaN.

        torch.compile has no second derivatives. What it has compiled may return 0 for one, where
        a call that is not compiled raises.
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
    temperature: float | Tensor = 1.0,
    tail: str = "bucket",
    teacher_floor: float | None = None,
    process_group: object | None = None,
    backend: str = "auto",
) -> TokenTerms:
    """Per-token divergence, log-probabilities and entropy, differentiable with any upstream.

    For losses that `hybrid_loss` does not have: combine the fields in torch and call backward. With
    g the upstream gradients of the three differentiable fields, one sweep gives the student's
    logits

        dz = g_divergence * dD/dz + g_log_prob * dlog p(y)/dz + g_entropy * dH(p)/dz

    Args:
        student_logits: as in `hybrid_loss`; differentiable.
        teacher: as in `hybrid_loss`, or None.

    All other arguments are those of `hybrid_loss`.

    Returns:
        `TokenTerms`, fp32 `[...]`. `divergence`, `log_prob` and `entropy` are differentiable;
        `teacher_log_prob`, `logsumexp` (of z/T) and the masses on a top-K support are detached.
        A field is None where its input was not given.

    Raises:
        ValueError: as in `hybrid_loss`.

    Notes:
        The logits are kept for the backward sweep, which writes one `[..., V]` gradient in the
        student's dtype. Second derivatives raise. The gradient of a `TopK` teacher's divergence is
        that of its value: here nothing is corrected for tokens sampled outside the support.
    """
    comparison = Comparison(teacher, divergence, temperature, tail, teacher_floor)
    context = Context(token_ids, mask, process_group, backend)
    return LogitCall(student_logits, comparison, context).token_terms()


def linear_hybrid_loss(
    student_hidden: Tensor,
    student_weight: Tensor | torch.nn.Module | OutputLayer,
    teacher: Teacher | None,
    token_ids: Tensor | None = None,
    advantages: float | Tensor | Callable[[TokenTerms], float | Tensor] | None = None,
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
    temperature: float | Tensor = 1.0,
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
        student_weight: `[V, D]` of the same dtype; differentiable. One of

            - a parameter, tied to the embedding or not; for a shorter vocabulary slice it,
              `weight[:V]`;
            - a DTensor, which is taken to be FSDP2's: gathered once, its gradients averaged over
              its mesh;
            - the output layer itself: a linear layer, or one that PEFT has wrapped, whose LoRA
              adapters then cost two GEMMs of their rank. It is not called, so one that may compute
              anything else is refused: with a forward of its own, hooks (but for those of FSDP2,
              ZeRO-3 and FlopCounterMode), adapters of other kinds, or dropout in an adapter in
              training mode;
            - an `OutputLayer`, which brings bias, softcap and scale (see `output_layer`).
        teacher: `LinearTeacher`, logits `[..., V]`, `TopK`, `Mixture` of these, or None.
        advantages: as in `hybrid_loss`. A function is called once, with the statistics of all rows;
            the logits are then computed twice (six GEMMs), unless one chunk holds them all.
        student_bias: `[V]` or None; differentiable.
        softcap: above 0, or None (`final_logit_softcapping` of Gemma).
        logit_scale: the factor of the logits (of Cohere; 1 / `logits_scaling` of Granite).
        chunk_rows: rows of a chunk. By default as many as fit into a budget of

                max(64 MiB on a CPU, 2 GiB on a GPU; (8 N V bytes) / 16)

            A row takes V times the bytes of a logit for each side that is given by hidden states,
            and of dz where that has another dtype (16-bit weights on a GPU) or the logits have a
            softcap. All rows form one chunk where they fit into the memory of the weight's
            gradient.
        logits_dtype: of the chunks' logits. fp32 costs memory traffic; 16 bits cost most digits of
            the gradient where the models are close.
        grad_filter: leaves out of the backward GEMMs those columns of a chunk's dz (entries of the
            vocabulary) whose mean |dz| over the chunk's rows, in units of the loss of one token, is
            at most this. `dropped_norm` is the share that was left out (None where the backward
            computes the gradient). 0 is exact. Synchronises the device with the host once a chunk.
        drop_masked: leave masked rows out before the GEMMs, which synchronises the device with the
            host once for each time that logits are computed. With False masked rows are computed
            and cleared.
        reduction: as in `hybrid_loss`. "none" computes the logits twice where the weight or bias
            has a gradient: six GEMMs.
        process_group: the ranks that share the vocabulary, as in `hybrid_loss`. Each has a slice
            `[V_rank, D]` of the weight, the bias and the teacher's weight (or logits), and the same
            hidden states, whose gradient is summed over the ranks here. Unless `chunk_rows` is
            given, the ranks agree on it, which synchronises the device with the host once.

    All other arguments are those of `hybrid_loss`.

    Returns:
        `HybridLoss`, as in `hybrid_loss`.

    Raises:
        ValueError: as in `hybrid_loss`.

    Notes:
        The gradients are computed in the forward. Backward multiplies them by the upstream gradient
        and, where any of them is fp16, by the normaliser, so that a loss scale saves what fp16
        can't hold. Further memory: the chunks' buffers, and an fp32 sum of dW where a 16-bit weight
        has several chunks. The buffers of a single chunk lie inside dW until it is written, if they
        fit, which leaves a copy of N / D of dz to allocate. 16-bit hidden states are multiplied
        with fp32 sums; dz is rounded to the weight's dtype for its GEMMs (not on a CPU). Under
        `torch.autocast` all factors are cast as a linear layer casts them. Second derivatives
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
    student_weight: Tensor | torch.nn.Module | OutputLayer,
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
    temperature: float | Tensor = 1.0,
    tail: str = "bucket",
    teacher_floor: float | None = None,
    process_group: object | None = None,
    backend: str = "auto",
) -> TokenTerms:
    """`token_terms` from hidden states and the output layer, differentiable with any upstream.

    Args:
        grad_filter: as in `linear_hybrid_loss`, applied to the gradient in the backward.

    All other arguments are those of `linear_hybrid_loss` and `token_terms`.

    Returns:
        `TokenTerms`, as in `token_terms`.

    Raises:
        ValueError: as in `hybrid_loss`.

    Notes:
        Two GEMMs, after which nothing is kept under `torch.no_grad()`: scoring is that cheap. The
        backward computes the logits again, which makes four more.
    """
    student = LinearStudent(student_hidden, student_weight, student_bias, softcap, logit_scale)
    chunking = Chunking(chunk_rows, logits_dtype, grad_filter, drop_masked)
    comparison = Comparison(teacher, divergence, temperature, tail, teacher_floor)
    context = Context(token_ids, mask, process_group, backend)
    return LinearCall(student, chunking, comparison, context).token_terms()
