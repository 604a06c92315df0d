"""Products of hidden states, weights and gradients, with sums in fp32 on every device."""

import torch
from torch import Tensor

from hybrid_kernels.linear.heads import Head

# Rows of a weight that are multiplied at once on the CPU. The GEMM's own copy of them then stays in
# cache, and 16-bit weights become fp32 piece by piece.
BLOCK_V = 2048


def _fused(out: Tensor, a: Tensor, b: Tensor) -> bool:
    """Whether the device multiplies 16-bit numbers into an fp32 sum that is not rounded."""
    if a.dtype == b.dtype == out.dtype:
        return a.dtype == torch.float32 or a.device.type != "cpu"
    fp32 = a.dtype == b.dtype and out.dtype == torch.float32
    return fp32 and a.is_cuda and torch.version.hip is None


def multiply(out: Tensor, a: Tensor, b: Tensor, scale: float, accumulate: bool) -> None:
    """out = scale a b, added to what `out` holds if it is to accumulate."""
    options = {"beta": int(accumulate), "alpha": scale}
    if not _fused(out, a, b):
        if out.dtype == torch.float32:
            torch.addmm(out, a.float(), b.float(), **options, out=out)
        else:
            start = out.float() if accumulate else out.new_zeros(out.shape, dtype=torch.float32)
            out.copy_(start.addmm_(a.float(), b.float(), alpha=scale))
    elif a.dtype == out.dtype:
        torch.addmm(out, a, b, **options, out=out)
    else:
        torch.addmm(out, a, b, out_dtype=out.dtype, **options, out=out)


def blocks(weight: Tensor, always: bool = False) -> list[slice]:
    """Parts of the vocabulary, one GEMM each.

    Args:
        weight: `[V, D]`.
        always: cut fp32 weights on the CPU, too.
    """
    size = weight.shape[0]
    whole = weight.device.type != "cpu" or (weight.dtype == torch.float32 and not always)
    step = max(size, 1) if whole else BLOCK_V
    return [slice(start, min(start + step, size)) for start in range(0, size, step)]


def write_logits(head: Head, selection: slice | Tensor, logits: Tensor) -> None:
    """Writes the logits of some rows into `logits`, `[C, V]`."""
    scale = head.logit_scale / head.softcap if head.softcap else head.logit_scale
    for i, (hidden, weight) in enumerate(zip(head.hiddens, head.weights, strict=True)):
        states = hidden[selection]
        for part in blocks(weight, always=True):
            multiply(logits[:, part], states, weight[part].t(), scale, accumulate=i > 0)
    if head.bias is not None:
        logits.add_(head.bias, alpha=scale)
    if head.softcap:
        logits.tanh_().mul_(head.softcap)


def through_softcap(head: Head, logits: Tensor, gradient: Tensor) -> None:
    """Multiplies dz by 1 - (z / softcap)^2. The logits are lost."""
    if head.softcap:
        gradient.mul_(logits.div_(head.softcap).square_().neg_().add_(1))
