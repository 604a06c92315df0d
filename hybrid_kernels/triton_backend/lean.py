"""The arithmetic of the row-resident form, for rows of ordinary numbers.

With s = log2(e)/T, and M and N the rounded maxima of s z and s w,

    y = s z - M,  u = s w - N,  E = sum 2^y,  F = sum 2^u,  r = z - w
    log p = ln2 (y - log2 E),  l = log p - log q = r/T + ln2 (N - M + log2 F - log2 E)

An exponent is one FMA of the logit, the same in sums and gradient. Merging partial sums cancels
the rounding of M and N, up to logits of 1e9. A KL follows from sum 2^y y, sum 2^y u and
sum 2^u (y - u), with gradient 2^y (a + b y + c r) + d 2^u. Other problems (JSD, floors) need both
normalisers first, and keep p and g for a gradient p A + g. P is the `Plan`, D the divergence.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from hybrid_kernels.triton_backend.divergences import LN2, LOG2E, NATS, Entry, fast_log2
from hybrid_kernels.triton_backend.packed import extreme, unpacked
from hybrid_kernels.triton_backend.reduce import INTERPRETED, added, max_2, sum_each
from hybrid_kernels.triton_backend.slices import edges_of

# How far the models' maxima may differ, in powers of 2: beyond this, r loses digits.
FAR = tl.constexpr(64.0)
# E and F of ordinary rows lie between this and its reciprocal.
LEAST_SUM = tl.constexpr(2.0**-60)
# The smallest normal number, which vanishes in a sum with an ordinary one.
SMALLEST = tl.constexpr(2.0**-126)
# 2^x is 0 this far below a row's maximum.
BELOW = tl.constexpr(160.0)


class Sums(NamedTuple):
    """Of a slice or a row: max z, E, sum 2^y y, max w, F, sum 2^y u (under `Plan.exact` sum 2^y d)
    and sum 2^u d, with d of `_difference`; 0 for what the plan does not need."""

    student_max: tl.tensor
    student: tl.tensor
    student_y: tl.tensor
    teacher_max: tl.tensor
    teacher: tl.tensor
    student_d: tl.tensor
    teacher_d: tl.tensor


class Row(NamedTuple):
    """M, N, max z - max w, s, 1/T, and the coefficients of dD/dz, dlog p(y)/dz and dH/dz over T."""

    m: tl.tensor
    n: tl.tensor
    apart: tl.tensor
    scale: tl.tensor
    inv_t: tl.tensor
    c_div: tl.tensor
    c_logp: tl.tensor
    c_ent: tl.tensor


class Logs(NamedTuple):
    """log2 E, log2 F, 1/E and the entropy. Exact logarithms are slow: compute these late."""

    student: tl.tensor
    teacher: tl.tensor
    share: tl.tensor
    entropy: tl.tensor


@triton.jit
def fma(a, b, c):
    """a b + c, rounded once; the interpreter's `tl.fma` rounds twice."""
    if INTERPRETED:
        return (a.to(tl.float64) * b + c).to(tl.float32)
    else:
        return tl.fma(a, b, c)


@triton.jit
def rounded_product(a, b):
    """a b, rounded: the compiler may not contract it into an FMA."""
    if INTERPRETED:
        return a * b
    else:
        return tl.inline_asm_elementwise(
            "mul.rn.f32 $0, $1, $2;", "=f,f,f", [a, b], dtype=tl.float32, is_pure=True, pack=1
        )


@triton.jit
def _difference(z, w, y, u, apart, P: tl.constexpr):
    """(z - max z) - (w - max w): from the logits under `Plan.exact`, otherwise times s."""
    if P.exact:
        return (z - w) - apart
    else:
        return y - u


@triton.jit
def _summands(z, w, scale, student_max, teacher_max, apart, P: tl.constexpr):
    """What an entry adds to each of the sums."""
    y = fma(z, scale, -student_max)
    e = tl.exp2(y)
    terms = (e, e * y)
    if P.full > 0:
        u = fma(w, scale, -teacher_max)
        f = tl.exp2(u)
        terms = terms + (f,)
        d = _difference(z, w, y, u, apart, P)
        if P.one_sweep and P.student_d:
            terms = terms + (e * d if P.exact else e * u,)
        if P.one_sweep and P.teacher_d:
            terms = terms + (f * d,)
    return terms


@triton.jit
def sums_of_slice(
    held, scale, is_lead, STUDENT: tl.constexpr, TEACHER: tl.constexpr, P: tl.constexpr
):
    """The sums of a slice, as scalars, in the order of `_numbers`."""
    zs = held.zs
    ws = held.ws
    if P.one_sweep and P.student_d and STUDENT == TEACHER:
        lowest = extreme(zs + ws, STUDENT, False)
    elif P.one_sweep and P.student_d:
        lowest = tl.minimum(extreme(zs, STUDENT, False), extreme(ws, TEACHER, False))
    else:
        lowest = extreme(zs, STUDENT, False)
    if P.full > 0:
        z_max, w_max = max_2(extreme(zs, STUDENT, True), extreme(ws, TEACHER, True), 1)
    else:
        z_max = tl.max(extreme(zs, STUDENT, True), 1)
        w_max = z_max
    M = rounded_product(z_max, scale)[:, None]
    N = rounded_product(w_max, scale)[:, None]
    apart = (z_max - w_max)[:, None]
    terms = ()
    for i in tl.static_range(len(zs)):
        z = unpacked(zs[i], STUDENT)
        w = unpacked(ws[i], TEACHER)
        for k in tl.static_range(len(z)):
            own = _summands(z[k], w[k], scale, M, N, apart, P)
            terms = own if len(terms) == 0 else added(terms, own)
    terms = sum_each(_marked(terms, lowest, P), 1)
    numbers = together(_numbers(z_max, w_max, terms, P), 2**30, scale, P)
    if P.edges:
        if is_lead:
            numbers = _with_edges(numbers, held, scale, P)
    return numbers


@triton.jit
def _marked(terms, lowest, P: tl.constexpr):
    """The terms, with a NaN where a logit is so low that 0 times it may not be 0."""
    return (terms[0], tl.where(lowest < P.pad, float("nan"), terms[1])) + terms[2:]


@triton.jit
def _with_edges(numbers, held, scale, P: tl.constexpr):
    """The numbers of a slice and the edges together."""
    z, w = edges_of(held)
    if P.full > 0:
        z_max, w_max = max_2(z, w, 0)
    else:
        z_max = tl.max(z, 0)
        w_max = z_max
    M = rounded_product(z_max, scale)
    N = rounded_product(w_max, scale)
    terms = _summands(z, w, scale, M, N, z_max - w_max, P)
    terms = sum_each(_marked(terms, tl.minimum(z, w), P), 0)
    edges = _numbers(z_max, w_max, terms, P)
    top = tl.maximum(numbers[0], z_max)
    teacher_top = top
    if P.full > 0:
        teacher_top = tl.maximum(numbers[3], w_max)
    terms = added(
        _about(numbers, top, teacher_top, scale, P), _about(edges, top, teacher_top, scale, P)
    )
    return _numbers(top, teacher_top, terms, P)


@triton.jit
def _about(numbers, top, teacher_top, scale, P: tl.constexpr):
    """The sums of a part, moved to other maxima."""
    step = rounded_product(numbers[0], scale) - rounded_product(top, scale)
    share = tl.exp2(step)
    terms = (share * numbers[1], share * (numbers[2] + numbers[1] * step))
    if P.full > 0:
        teacher_step = rounded_product(numbers[3], scale) - rounded_product(teacher_top, scale)
        teacher_share = tl.exp2(teacher_step)
        terms = terms + (teacher_share * numbers[4],)
        difference = step - teacher_step
        if P.exact:
            difference = (numbers[0] - top) - (numbers[3] - teacher_top)
        if P.one_sweep and P.student_d:
            moved = difference if P.exact else teacher_step
            terms = terms + (share * (numbers[5] + numbers[1] * moved),)
        if P.one_sweep and P.teacher_d:
            LAST: tl.constexpr = 6 if P.student_d else 5
            terms = terms + (teacher_share * (numbers[LAST] + numbers[4] * difference),)
    return terms


@triton.jit
def _numbers(z_max, w_max, terms, P: tl.constexpr):
    """The maxima and sums in the order in which they are published."""
    numbers = (z_max, terms[0], terms[1])
    if P.full > 0:
        numbers = numbers + (w_max,) + terms[2:]
    return numbers


@triton.jit
def together(numbers, count, scale, P: tl.constexpr):
    """The numbers of the first `count` parts, merged."""
    there = tl.arange(0, numbers[0].shape[0]) < count
    if P.full > 0:
        top, teacher_top = max_2(numbers[0], numbers[3], 0)
    else:
        top = tl.max(numbers[0], 0)
        teacher_top = top
    moved = _about(numbers, top, teacher_top, scale, P)
    terms = ()
    for i in tl.static_range(len(moved)):
        terms = terms + (tl.where(there, moved[i], 0.0),)
    return _numbers(top, teacher_top, sum_each(terms, 0), P)


@triton.jit
def named(numbers, P: tl.constexpr):
    zero = tl.full((), 0.0, tl.float32)
    teacher_max = zero
    teacher = zero
    student_d = zero
    teacher_d = zero
    if P.full > 0:
        teacher_max = numbers[3]
        teacher = numbers[4]
        if P.one_sweep and P.student_d:
            student_d = numbers[5]
        if P.one_sweep and P.teacher_d:
            LAST: tl.constexpr = 6 if P.student_d else 5
            teacher_d = numbers[LAST]
    return Sums(numbers[0], numbers[1], numbers[2], teacher_max, teacher, student_d, teacher_d)


@triton.jit
def is_ordinary(sums, scale, P: tl.constexpr):
    """Whether the sums needed no guards and padding added nothing to them."""
    probe = sums.student + sums.student_y + sums.teacher + sums.student_d + sums.teacher_d
    lowest = sums.student_max
    apart = 0.0
    if P.full > 0:
        lowest = tl.minimum(lowest, sums.teacher_max)
        apart = tl.abs(sums.student_max - sums.teacher_max)
    above = (lowest - P.pad) * scale > BELOW
    ordinary = (probe - probe == 0.0) & above & (apart * scale < FAR)
    # With logits beyond 1e9, M is rounded so coarsely that the sums have no digits left.
    ordinary = ordinary & (sums.student > LEAST_SUM) & (sums.student < 1.0 / LEAST_SUM)
    if P.full > 0:
        ordinary = ordinary & (sums.teacher > LEAST_SUM) & (sums.teacher < 1.0 / LEAST_SUM)
    return ordinary


# -- from sums to a gradient -----------------------------------------------------------------------


@triton.jit
def logs_of(sums, P: tl.constexpr):
    student = tl.log2(sums.student)
    teacher = student
    if P.full > 0:
        teacher = tl.log2(sums.teacher)
    share = 1.0 / sums.student
    return Logs(student, teacher, share, (student - sums.student_y * share) * LN2)


@triton.jit
def _means(sums, scale, P: tl.constexpr):
    """The mean of s d under the student and under the teacher."""
    unit = 1.0
    if P.exact:
        unit = scale
    student = tl.full((), 0.0, tl.float32)
    teacher = student
    if P.student_d:
        total = sums.student_d if P.exact else sums.student_y - sums.student_d
        student = total / sums.student * unit
    if P.teacher_d:
        teacher = sums.teacher_d / sums.teacher * unit
    return student, teacher


@triton.jit
def swept_divergence(sums, log_ratio, scale, P: tl.constexpr):
    """A KL and its sum of slopes; `log_ratio` is log2 F/E."""
    student, teacher = _means(sums, scale, P)
    value = tl.full((), 0.0, tl.float32)
    slopes = value
    if P.student_d:
        value += (student + log_ratio) * LN2
        slopes += value
    if P.teacher_d:
        value -= (teacher + log_ratio) * LN2
        slopes -= 1.0
    return value, slopes


@triton.jit
def swept_factors(sums, row, P: tl.constexpr):
    """a to d of a KL's gradient 2^y (a + b y + c r) + d 2^u, in which log E and log F cancel. r is
    z - w under `Plan.fine`, less `Row.apart` under `Plan.exact`; otherwise it is u."""
    share = 1.0 / sums.student
    a = -row.c_logp
    b = 0.0
    c = 0.0
    d = 0.0
    if P.entropy:
        a += row.c_ent * LN2 * sums.student_y * share
        b = -row.c_ent * LN2 * share
    if P.pulls > 0 and P.student_d:
        mean, _ = _means(sums, row.scale, P)
        if P.fine:
            if not P.exact:
                mean += row.apart * row.scale
            c = row.c_div * row.inv_t * share
        else:
            c = -row.c_div * LN2 * share
            b -= c
        a -= row.c_div * LN2 * mean
    if P.pulls > 0 and P.teacher_d:
        a += row.c_div
        d = -row.c_div / sums.teacher
    return a * share, b, c, d


@triton.jit
def swept_gradient(z, w, row, factors, P: tl.constexpr):
    """p (c_div (l - sum of slopes) - c_logp - c_ent (log p + H)) - c_div q."""
    y = fma(z, row.scale, -row.m)
    u = y
    if P.pulls > 0 and P.teacher_d:
        u = fma(w, row.scale, -row.n)
    inner = factors[0]
    if P.entropy or (P.pulls > 0 and P.student_d and not P.fine):
        inner = tl.fma(y, factors[1], inner)
    if P.pulls > 0 and P.student_d:
        d = u
        if P.fine:
            d = z - w
        if P.exact:
            d -= row.apart
        inner = tl.fma(d, factors[2], inner)
    gradient = tl.exp2(y) * inner
    if P.pulls > 0 and P.teacher_d:
        gradient = tl.fma(tl.exp2(u), factors[3], gradient)
    return gradient


@triton.jit
def ordinary_entry(z, w, row, logs, constants, P: tl.constexpr):
    """What a divergence needs of an entry, once both normalisers are known."""
    y = fma(z, row.scale, -row.m) - logs.student
    u = fma(w, row.scale, -row.n) - logs.teacher
    d = tl.fma((z - w) - row.apart, row.scale, logs.teacher - logs.student)
    raw_q = tl.exp2(u)
    q = raw_q
    if P.floor:
        least = constants.floor * LOG2E
        d = tl.minimum(d, y - least)
        u = tl.maximum(u, least)
        q = tl.exp2(u)
    ratio = d * LN2
    return Entry(tl.exp2(y), q, raw_q, y * LN2, u * LN2, ratio, ratio * (1.0 / NATS))


@triton.jit
def second_summands(z, w, row, logs, constants, P: tl.constexpr, D: tl.constexpr):
    """An entry's terms in the two sums of `second_divergence`, each as two factors, and p and g of
    its gradient p A + g. For JSD all probabilities are times E, which saves an operation."""
    if P.kl_family or P.exact:
        entry = ordinary_entry(z, w, row, logs, constants, P)
        t, u, v = D(entry, constants.parameter, 0.0, True)
        slope = entry.p * u + v
        g = row.c_div * slope
        if P.entropy:
            g -= row.c_ent * (entry.p * entry.log_p)
        return (1.0, t), (1.0, slope), entry.p, g
    else:
        y = fma(z, row.scale, -row.m)
        u = fma(w, row.scale, -row.n) + (logs.student - logs.teacher)
        d = y - u
        if P.floor:
            least = constants.floor * LOG2E + logs.student
            d = tl.minimum(d, y - least)
            u = tl.maximum(u, least)
        p = tl.exp2(y)
        q = tl.exp2(u)
        mixture_over_p, mixture_over_q = _mixture_log_ratios(p, q, y, u, d, constants.parameter)
        pull = row.c_div * logs.share * (constants.parameter - 1.0) * LN2 * mixture_over_p
        if P.entropy:
            pull -= row.c_ent * logs.share * LN2 * y
        return (q, mixture_over_q), (p, mixture_over_p), p, p * pull


@triton.jit
def _mixture_log_ratios(p, q, y, u, d, beta):
    """log2 m/p and log2 m/q for m = beta q + (1-beta) p, from y = log2 p, u = log2 q, d = y - u;
    near d = 0 by the cumulant series of a Bernoulli variable."""
    # If both p and q underflow, any finite number will do.
    log_m = fast_log2(tl.fma(beta, q, tl.fma(1.0 - beta, p, SMALLEST)))
    v = beta * (1.0 - beta)
    skew = 1.0 - 2.0 * beta
    series = d * (v * (1.0 - 6.0 * v) / 24.0 * (LN2 * LN2 * LN2)) - v * skew / 6.0 * (LN2 * LN2)
    series = d * series + v * 0.5 * LN2
    series = d * (d * series - beta)
    near = tl.abs(d) < 0.25
    return tl.where(near, series, log_m - y), tl.where(near, series + d, log_m - u)


@triton.jit
def second_divergence(sums, logs, parameter, P: tl.constexpr):
    """The divergence and its sum of slopes; JSD from sum q log2 m/q and sum p log2 m/p."""
    if P.kl_family or P.exact:
        return sums[0], sums[1]
    else:
        slopes = (parameter - 1.0) * (sums[1] * logs.share * LN2)
        return slopes - parameter * (sums[0] * logs.share * LN2), slopes


@triton.jit
def second_factor(slopes, c_logp, row, logs, P: tl.constexpr):
    """A of a gradient p A + g."""
    factor = -(row.c_div * slopes + c_logp + row.c_ent * logs.entropy)
    if P.kl_family or P.exact:
        return factor
    else:
        # g holds the entropy's part for log2(p E).
        return (factor + row.c_ent * LN2 * logs.student) * logs.share


@triton.jit
def gradient_of(z, w, row, factors, sums, constants, P: tl.constexpr, D: tl.constexpr):
    """The gradient of single entries."""
    if P.one_sweep:
        return swept_gradient(z, w, row, factors, P)
    else:
        _, _, p, g = second_summands(z, w, row, logs_of(sums, P), constants, P, D)
        return tl.fma(p, factors[0], g)
