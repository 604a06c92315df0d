"""Several reductions at once, and conditions that are the same in all threads.

Each separate reduction would wait for the whole program, and meanwhile keep the inputs of later
ones in registers. The interpreter is slow at custom reductions, so there they do run one by one.
"""

import triton
import triton.language as tl

from hybrid_kernels.triton_backend import plan

INTERPRETED = tl.constexpr(plan.INTERPRETED)


@triton.jit
def _larger_2(a, b, c, d):
    return tl.maximum(a, c), tl.maximum(b, d)


@triton.jit
def max_2(a, b, AXIS: tl.constexpr = 0):
    if INTERPRETED:
        return tl.max(a, AXIS), tl.max(b, AXIS)
    else:
        return tl.reduce((a, b), AXIS, _larger_2)


@triton.jit
def _add_2(a, b, a2, b2):
    return a + a2, b + b2


@triton.jit
def _add_3(a, b, c, a2, b2, c2):
    return a + a2, b + b2, c + c2


@triton.jit
def _add_4(a, b, c, d, a2, b2, c2, d2):
    return a + a2, b + b2, c + c2, d + d2


@triton.jit
def _add_5(a, b, c, d, e, a2, b2, c2, d2, e2):
    return a + a2, b + b2, c + c2, d + d2, e + e2


@triton.jit
def _add_6(a, b, c, d, e, f, a2, b2, c2, d2, e2, f2):
    return a + a2, b + b2, c + c2, d + d2, e + e2, f + f2


@triton.jit
def sum_each(tensors, AXIS: tl.constexpr = 0):
    """The sum of each of two to six tensors."""
    if INTERPRETED:
        sums = ()
        for i in tl.static_range(len(tensors)):
            sums = sums + (tl.sum(tensors[i], AXIS),)
        return sums
    elif len(tensors) == 2:
        return tl.reduce(tensors, AXIS, _add_2)
    elif len(tensors) == 3:
        return tl.reduce(tensors, AXIS, _add_3)
    elif len(tensors) == 4:
        return tl.reduce(tensors, AXIS, _add_4)
    elif len(tensors) == 5:
        return tl.reduce(tensors, AXIS, _add_5)
    else:
        return tl.reduce(tensors, AXIS, _add_6)


@triton.jit
def added(a, b):
    """The sums of two tuples of tensors, element by element."""
    total = ()
    for i in tl.static_range(len(a)):
        total = total + (a[i] + b[i],)
    return total


@triton.jit
def agreed(condition):
    """The condition, the same in all threads, for branches that contain barriers or reductions.

    The compiler may contract a product into the first exchange of a reduction, so that one thread
    rounds a product and its partner does not: "scalars" can differ in their last bit.
    """
    votes = tl.zeros((32,), tl.int32) + condition.to(tl.int32)
    return tl.max(votes, 0) > 0
