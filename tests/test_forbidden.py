"""Logits that forbid a token: -inf, or in its place -1e4 to the lowest number of a dtype.

On either side or both and at any temperature, values and gradients equal those of float64.
"""

from itertools import product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import cases
from cases import DTYPES
from hybrid_kernels import Divergence, Mixture, TopK, reference
from hybrid_kernels.divergences import FAMILIES
from tolerance import ROUNDING, SUBNORMAL, written_and_scaled

pytestmark = pytest.mark.usefixtures("small_tiles")

DIVERGENCES = [
    *map(Divergence, FAMILIES),
    Divergence("jsd", beta=0.3),
    Divergence("alpha", alpha=1.7),
    Divergence("alpha", alpha=-0.5),
    Divergence("renyi", alpha=1.7),
]
MASKS = (-torch.inf, cases.LOWEST, -1e9, -1e4)
TEMPERATURES = (0.05, 0.3, 1.0, 1.7)
# Larger values may overflow fp32.
LAST = (1 - 1e-5) * torch.finfo(torch.float32).max


def check(case, backend, method, divergence, temperature, **others):
    """Values and gradients are float64's, as far as fp32 can hold them."""
    options = {"divergence": divergence, "temperature": temperature, **others}
    if method == "hybrid_loss":
        options["reduction"] = "none"
    run = getattr(case, method)
    truth = run(getattr(reference, method), torch.float64, **options)
    got = run(backend=backend, **options)
    # The error of log-probabilities this far apart in fp32.
    rounding = 2e-6 * (1 + 2 * cases.SPREAD / temperature)
    for name in ("divergence", "log_prob", "teacher_log_prob", "entropy"):
        value, expected = getattr(got.result, name), getattr(truth.result, name)
        if expected is not None:
            expected = expected.float()
            # Rounding may carry these beyond the largest number of fp32.
            at_limit = expected.isfinite() & (expected.abs() > LAST)
            torch.testing.assert_close(
                torch.where(at_limit, value.nan_to_num(nan=torch.nan), value).double(),
                expected.double(),
                rtol=1e-5,
                atol=rounding,
                equal_nan=True,
                msg=lambda message, name=name: f"{name}: {message}",
            )
    left_out = ~truth.gradient.isfinite().all(-1)
    assert not got.gradient[left_out].isfinite().all(-1).any(), "gradient is finite, truth is not"
    # Values beyond the range of fp32 need no gradient, nor do sums that contain them.
    values = [truth.result.divergence]
    if divergence == Divergence("jeffreys"):
        sides = case.student.double(), case.any_teacher
        values.append(reference.token_terms(*sides, temperature=temperature, **others).divergence)
    for value in values:
        left_out |= value.isfinite() & (value.abs() > LAST)
    if divergence == Divergence("renyi", alpha=1.7):
        # Next to such a log S, fp32 loses the exponents of its terms.
        left_out |= truth.result.divergence > 1e3
    dtype = got.gradient.dtype
    expected = truth.gradient[~left_out]
    # A gradient is written before the upstream one scales it.
    finite = expected.abs() < torch.finfo(dtype).max / 4
    error = torch.where(finite, got.gradient[~left_out].double() - expected, 0.0).abs()
    roundings = written_and_scaled(backend, got.gradient)
    bound = roundings * (ROUNDING[dtype] * expected.abs() + SUBNORMAL[dtype])
    bound += 1e-5 * expected.abs().amax(-1, keepdim=True) + rounding / temperature
    # The value is subtracted in the gradient. It is kept in fp32 between two launches, and for an
    # alpha above 1 is a sum of exponentials of large numbers.
    relative = 1e-5 if divergence.name == "alpha" else 3e-7
    bound += relative * values[-1][~left_out, None].abs().nan_to_num(posinf=0) / temperature
    error[bound > torch.finfo(dtype).max / 4] = 0
    gradient, off = got.gradient[~left_out], (~(error <= bound)).nonzero().tolist()
    worst = [(i, j, float(gradient[i, j]), float(expected[i, j])) for i, j in off[:4]]
    assert not off, f"gradient: {len(off)} entries are off (row, entry, got, truth): {worst}"


@pytest.mark.parametrize(
    ("method", "dtype"), [*product(["hybrid_loss"], DTYPES), ("token_terms", "fp32")]
)
@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("divergence", DIVERGENCES, ids=cases.divergence_id)
def test_each_mask_on_each_side(divergence, temperature, dtype, method, backend, device):
    masks = [(mask, None) for mask in MASKS] + [(None, mask) for mask in MASKS]
    masks += [(mask, mask) for mask in MASKS]
    check(cases.forbidding(masks, DTYPES[dtype], 90, 0), backend, method, divergence, temperature)


masks = st.sampled_from([None, *MASKS, -1e5, -1e7])


@given(
    masks=st.lists(st.tuples(masks, masks), min_size=1, max_size=4),
    divergence=st.sampled_from(DIVERGENCES),
    temperature=st.one_of(st.sampled_from(TEMPERATURES), st.floats(0.05, 2.0)),
    dtype=st.sampled_from(list(DTYPES.values())),
    vocabulary=st.integers(2, 160),
    share=st.sampled_from([0.05, 0.3, 0.95]),
    members=st.integers(1, 3),
    floor=st.sampled_from([None, None, -30.0, -8.0]),
    method=st.sampled_from(["hybrid_loss", "token_terms"]),
    seed=st.integers(0, 2**32),
)
def test_any_masks(
    backend, masks, divergence, temperature, dtype, vocabulary, share, members, floor, method, seed
):
    case = cases.forbidding(masks, dtype, vocabulary, seed, share)
    if members > 1:
        others = [
            cases.forbidding(masks, dtype, vocabulary, seed + i).teacher for i in range(1, members)
        ]
        weights = [0.8 + 0.5 * i for i in range(members)]
        case.given = Mixture(list(zip(weights, [case.teacher, *others], strict=True)))
    check(case, backend, method, divergence, temperature, teacher_floor=floor)


@given(
    masks=st.lists(st.tuples(masks, masks), min_size=1, max_size=4),
    divergence=st.sampled_from(DIVERGENCES),
    temperature=st.one_of(st.sampled_from(TEMPERATURES[1:]), st.floats(0.3, 2.0)),
    dtype=st.sampled_from(list(DTYPES.values())),
    vocabulary=st.integers(9, 160),
    share=st.sampled_from([0.05, 0.3, 0.95]),
    size=st.integers(1, 8),
    tail=st.sampled_from(["bucket", "renormalize", "mask"]),
    method=st.sampled_from(["hybrid_loss", "token_terms"]),
    seed=st.integers(0, 2**32),
)
def test_any_masks_under_a_support(
    backend, masks, divergence, temperature, dtype, vocabulary, share, size, tail, method, seed
):
    """The support has an allowed token, and the first, also allowed, is outside of it: fp32 can't
    hold the logarithm of a mass whose tokens are all as good as forbidden."""
    case = cases.forbidding(masks, dtype, vocabulary, seed, share)
    case.student[:, 1] = case.teacher[:, 1] = 0.0
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand((len(masks), vocabulary - 1), generator=generator)
    scores[:, 0] = 1.0
    case.given = TopK.from_logits(
        case.teacher,
        ids=scores.topk(size).indices + 1,
        token_ids=case.token_ids,
        temperature=temperature,
    )
    check(case, backend, method, divergence, temperature, tail=tail)
