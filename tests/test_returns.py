"""`returns_to_go` and `sparse_advantages` against the formulas, written as loops over tokens."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from hybrid_kernels import checks, returns_to_go, sparse_advantages

GAMMAS = [0.0, 0.9, 1.0]
BASELINES = ["none", "leave_one_out", "group_mean", "per_token_leave_one_out"]
NAN = math.nan


def times(weight, value):
    """weight * value, where a weight of 0 gives 0."""
    return weight * float(value) if weight else 0.0


def looped_returns(costs, mask, gamma):
    """sum_{k > t} gamma^(k-t) c_k over valid k, for valid t."""
    batch, length = costs.shape
    result = torch.zeros(batch, length, dtype=torch.float64)
    for b in range(batch):
        for t in range(length):
            if mask[b, t]:
                later = (k for k in range(t + 1, length) if mask[b, k])
                result[b, t] = sum(times(gamma ** (k - t), costs[b, k]) for k in later)
    return result


def looped_advantages(costs, rewards, mask, reward_weight, gamma, dense_weight, groups, baseline):
    """A_t = lambda r - sum_{k > t} gamma^(k-t) c_k - (1 - eta) c_t - b_t.

    `rewards` is a list of (values, weight), and `groups` names the group of each response.
    """
    batch, length = costs.shape
    charge = looped_returns(costs, mask, gamma)
    total = [0.0] * batch
    for b in range(batch):
        valid = [t for t in range(length) if mask[b, t]]
        for t in valid:
            charge[b, t] += times(1 - dense_weight, costs[b, t])
            total[b] += times(gamma ** (t - valid[0]), costs[b, t])

    def mean(values, b):
        """Of what is known in the group of b, without b but for a group mean."""
        known = [i for i in range(batch) if groups[i] == groups[b] and not math.isnan(values[i])]
        others = [i for i in known if i != b]
        if not others or baseline == "none":
            return 0.0
        members = known if baseline == "group_mean" else others
        return sum(float(values[i]) for i in members) / len(members)

    result = torch.zeros(batch, length, dtype=torch.float64)
    for b in range(batch):
        reward = sum(
            times(weight, values[b] - (0.0 if isinstance(baseline, Tensor) else mean(values, b)))
            for values, weight in rewards
            if not math.isnan(values[b])
        )
        for t in range(length):
            if isinstance(baseline, Tensor):
                expected = -float(baseline.expand(batch, length)[b, t])
            else:
                per_token = baseline == "per_token_leave_one_out"
                expected = mean(charge[:, t] if per_token else total, b)
            if mask[b, t]:
                result[b, t] = times(reward_weight, reward) - charge[b, t] + expected
    return result


def batch(padding):
    """Six responses of 1 to 7 tokens, padded to 7 with NaN."""
    generator = torch.Generator().manual_seed(1)
    lengths = torch.tensor([7, 1, 4, 6, 2, 5])
    position = torch.arange(7)
    mask = position < lengths[:, None]
    if padding == "left":
        mask = mask.flip(1)
    elif padding == "holes":
        mask = mask & ((position % 3 != 1) | (lengths[:, None] < 3))
    costs = torch.randn(6, 7, generator=generator).masked_fill(~mask, NAN)
    return costs, torch.randn(6, generator=generator), mask


every_padding = pytest.mark.parametrize("padding", ["right", "left", "holes"])
every_gamma = pytest.mark.parametrize("gamma", GAMMAS)


@every_gamma
@every_padding
def test_returns(padding, gamma):
    costs, _, mask = batch(padding)
    got = returns_to_go(costs, mask, gamma)
    assert got.dtype == torch.float32
    expected = looped_returns(costs, mask, gamma)
    torch.testing.assert_close(got.double(), expected, rtol=1e-6, atol=1e-6)
    for dtype in torch.int32, torch.float32:
        assert torch.equal(got, returns_to_go(costs, mask.to(dtype), gamma))


def test_returns_by_hand():
    costs = torch.tensor([[1.0, 2.0, 4.0, 8.0]])
    mask = torch.ones(1, 4, dtype=torch.bool)
    assert returns_to_go(costs, mask).tolist() == [[14.0, 12.0, 8.0, 0.0]]
    assert returns_to_go(costs, mask, 0.5).tolist() == [[3.0, 4.0, 4.0, 0.0]]
    assert returns_to_go(costs, mask, 0.0).tolist() == [[0.0, 0.0, 0.0, 0.0]]


@pytest.mark.parametrize("length", [0, 1, 2, 3, 64, 100])
def test_returns_of_any_length(length):
    costs = torch.randn(3, length, generator=torch.Generator().manual_seed(0))
    mask = torch.ones(3, length, dtype=torch.bool)
    expected = looped_returns(costs, mask, 0.97)
    got = returns_to_go(costs, mask, 0.97).double()
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("baseline", BASELINES)
@pytest.mark.parametrize("dense_weight", [0.0, 0.5, 1.0])
@every_gamma
@every_padding
def test_advantages(padding, gamma, dense_weight, baseline):
    costs, rewards, mask = batch(padding)
    options = {"reward_weight": 1.7, "gamma": gamma, "dense_weight": dense_weight}
    got = sparse_advantages(costs, rewards, mask, group_size=3, baseline=baseline, **options)
    groups, rewards = [0, 0, 0, 1, 1, 1], [(rewards, 1.0)]
    expected = looped_advantages(costs, rewards, mask, 1.7, gamma, dense_weight, groups, baseline)
    torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-6)
    assert got.dtype == torch.float32
    assert not got[~mask].any()


def test_the_default_group_is_the_batch_and_the_default_baseline_leaves_one_out():
    costs, rewards, mask = batch("right")
    default = sparse_advantages(costs, rewards, mask, reward_weight=1.0)
    explicit = sparse_advantages(
        costs,
        rewards,
        mask,
        reward_weight=1.0,
        gamma=1.0,
        dense_weight=1.0,
        group_size=6,
        baseline="leave_one_out",
    )
    assert torch.equal(default, explicit)


def test_the_reward_is_not_discounted():
    mask = torch.ones(2, 5, dtype=torch.bool)
    rewards = torch.tensor([1.0, 3.0])
    for gamma in GAMMAS:
        got = sparse_advantages(
            torch.zeros(2, 5), rewards, mask, reward_weight=2.0, gamma=gamma, baseline="none"
        )
        assert torch.equal(got, (2 * rewards)[:, None].expand(2, 5))


def test_rewards_add_with_their_weights():
    costs, rewards, mask = batch("right")
    other = rewards.flip(0).double()
    named = {"correct": (rewards, 0.5), "length": (other, -2.0)}
    got = sparse_advantages(costs, named, mask, reward_weight=1.3)
    total = 0.5 * rewards - 2.0 * other.float()
    torch.testing.assert_close(got, sparse_advantages(costs, total, mask, reward_weight=1.3))


def test_integer_and_boolean_rewards():
    costs, _, mask = batch("right")
    correct = torch.tensor([1, 0, 1, 1, 0, 0])
    options = {"reward_weight": 1.3, "group_size": 3}
    expected = sparse_advantages(costs, correct.float(), mask, **options)
    assert torch.equal(sparse_advantages(costs, correct, mask, **options), expected)
    assert torch.equal(sparse_advantages(costs, correct.bool(), mask, **options), expected)


@pytest.mark.parametrize("baseline", BASELINES)
def test_the_results_are_constants(baseline):
    costs, rewards, mask = batch("right")
    costs, rewards = costs.requires_grad_(), rewards.requires_grad_()
    assert not returns_to_go(costs, mask).requires_grad
    got = sparse_advantages(costs, rewards, mask, reward_weight=1.0, baseline=baseline)
    assert not got.requires_grad


@pytest.mark.parametrize("baseline", BASELINES)
def test_a_response_without_a_valid_token(baseline):
    costs, rewards, mask = batch("right")
    mask[1] = False
    got = sparse_advantages(costs, rewards, mask, reward_weight=1.0, baseline=baseline)
    assert got.isfinite().all()
    assert not got[1].any()


def test_empty_batches():
    mask = torch.ones(0, 4, dtype=torch.bool)
    assert returns_to_go(torch.zeros(0, 4), mask).shape == (0, 4)
    for baseline in BASELINES:
        got = sparse_advantages(
            torch.zeros(0, 4), torch.zeros(0), mask, reward_weight=1.0, baseline=baseline
        )
        assert got.shape == (0, 4)
        got = sparse_advantages(
            torch.zeros(2, 0), torch.zeros(2), mask.mT[:2], reward_weight=1.0, baseline=baseline
        )
        assert got.shape == (2, 0)
        bounds = torch.zeros(1, dtype=torch.int32)
        got = sparse_advantages(
            torch.zeros(0),
            torch.zeros(0),
            mask[:, 0],
            reward_weight=1.0,
            baseline=baseline,
            cu_seqlens=bounds,
        )
        assert got.shape == (0,)


def test_half_precision_costs_are_summed_in_fp32():
    costs = torch.full((1, 3000), 1.0, dtype=torch.bfloat16)
    mask = torch.ones(1, 3000, dtype=torch.bool)
    assert returns_to_go(costs, mask)[0, 0] == 2999


@pytest.mark.parametrize("packed", [False, True])
def test_compiles(packed):
    costs, rewards, mask = batch("right")
    options = {
        "reward_weight": torch.tensor(1.3),
        "dense_weight": torch.tensor(0.5),
        "group_ids": torch.tensor([5, -1, 5, 5, -1, 0]),
        "baseline": "per_token_leave_one_out" if packed else "leave_one_out",
    }
    if packed:
        bounds = mask.sum(1).cumsum(0)
        costs, mask = costs[mask], mask[mask]
        options["cu_seqlens"] = torch.nn.functional.pad(bounds, (1, 0))

    def advantages(costs, rewards, mask, options):
        return sparse_advantages(costs, rewards, mask, gamma=0.9, **options)

    torch._dynamo.reset()
    compiled = torch.compile(advantages, fullgraph=True, backend="aot_eager")
    got, expected = (f(costs, rewards, mask, options) for f in (compiled, advantages))
    torch.testing.assert_close(got, expected)


def test_infinite_costs_stay_where_they_belong():
    costs = torch.tensor([[0.0, torch.inf, 1.0]])
    mask = torch.ones(1, 3, dtype=torch.bool)
    options = {"reward_weight": 1.0, "baseline": "none"}
    got = sparse_advantages(costs, torch.ones(1), mask, gamma=0.0, **options)
    assert got.tolist() == [[1.0, 1.0, 1.0]]
    got = sparse_advantages(costs, torch.ones(1), mask, gamma=1.0, **options)
    assert got.tolist() == [[-torch.inf, 0.0, 1.0]]
    assert returns_to_go(torch.zeros(2, 0), torch.zeros(2, 0, dtype=torch.bool)).shape == (2, 0)
    empty = sparse_advantages(torch.zeros(2, 0), torch.ones(2), torch.zeros(2, 0).bool(), **options)
    assert empty.shape == (2, 0)


def random_problem(seed):
    """Up to eight responses with holes, unknown costs and rewards, in groups of any size."""
    generator = torch.Generator().manual_seed(seed)

    def chance(share, *shape):
        return torch.rand(shape, generator=generator) < share

    size, longest = (int(torch.randint(1, 9, (), generator=generator)) for _ in range(2))
    lengths = torch.randint(0, longest + 1, (size,), generator=generator)
    mask = (torch.arange(longest) < lengths[:, None]) & chance(0.8, size, longest)
    costs = torch.randn(size, longest, generator=generator)
    costs = costs.masked_fill(~mask | chance(0.04, size, longest), NAN)
    rewards = torch.randn(2, size, generator=generator).masked_fill(chance(0.3, 2, size), NAN)
    names = torch.tensor([7, -3, 2**40])
    return costs, rewards, mask, lengths, names[torch.randint(0, 3, (size,), generator=generator)]


@pytest.mark.parametrize("gamma", GAMMAS)
@pytest.mark.parametrize("dense_weight", [0.5, 1.0])
@pytest.mark.parametrize("baseline", [*BASELINES, "[B]", "[B, 1]", "[B, T]"])
def test_groups_of_any_size_with_unknown_values_padded_and_packed(baseline, dense_weight, gamma):
    for seed in range(6):
        costs, rewards, mask, lengths, ids = random_problem(seed)
        weights = {"reward_weight": 1.7, "gamma": gamma, "dense_weight": dense_weight}
        options = {**weights, "group_ids": ids, "baseline": baseline}
        named = {"correct": (rewards[0], 0.5), "short": (rewards[1], -2.0)}
        in_use = torch.arange(costs.shape[1]) < lengths[:, None]
        truth = baseline
        if baseline not in BASELINES:
            width = {"[B, T]": costs.shape[1]}.get(baseline, 1)
            truth = options["baseline"] = torch.randn(len(ids), width)
        if baseline == "[B]":
            options["baseline"] = truth[:, 0]
        expected = looped_advantages(
            costs, [*named.values()], mask, *weights.values(), ids.tolist(), truth
        )
        near = {"rtol": 1e-5, "atol": 1e-5, "equal_nan": True}
        got = sparse_advantages(costs, named, mask, **options)
        torch.testing.assert_close(got.double(), expected, **near)

        bounds = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
        bounds = bounds.int() if seed % 2 else bounds
        packed = costs[in_use], mask[in_use]
        to_go = returns_to_go(*packed, gamma, bounds).double()
        torch.testing.assert_close(to_go, looped_returns(costs, mask, gamma)[in_use], **near)
        if baseline == "[B, T]":
            options["baseline"] = truth[in_use]
        elif baseline == "[B, 1]":
            options["baseline"] = truth[:, 0]
        got = sparse_advantages(packed[0], named, packed[1], cu_seqlens=bounds, **options)
        torch.testing.assert_close(got.double(), expected[in_use], **near)


@pytest.mark.parametrize("baseline", BASELINES)
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_groups_in_any_order(dtype, baseline):
    costs, rewards, mask = batch("right")
    options = {"reward_weight": 1.3, "dense_weight": 0.5, "baseline": baseline}
    expected = sparse_advantages(costs, rewards, mask, group_size=2, **options)
    order = torch.tensor([4, 0, 3, 5, 1, 2])
    ids = torch.tensor([9, -5, 0], dtype=dtype)[order // 2]
    got = sparse_advantages(costs[order], rewards[order], mask[order], group_ids=ids, **options)
    torch.testing.assert_close(got, expected[order])


@pytest.mark.parametrize("baseline", BASELINES)
def test_a_group_of_one_has_no_baseline(baseline):
    costs, rewards, mask = batch("right")
    expected = sparse_advantages(costs, rewards, mask, reward_weight=1.3, baseline="none")
    for groups in {"group_size": 1}, {"group_ids": torch.arange(6)}:
        got = sparse_advantages(
            costs, rewards, mask, reward_weight=1.3, baseline=baseline, **groups
        )
        assert torch.equal(got, expected)


@pytest.mark.parametrize(
    ("baseline", "expected"),
    [
        ("none", [1.0, 5.0, 0.0]),
        ("leave_one_out", [-4.0, 4.0, 0.0]),
        ("group_mean", [-2.0, 2.0, 0.0]),
        ("per_token_leave_one_out", [-4.0, 4.0, 0.0]),
        (torch.tensor([0.5, 0.5, 0.5]), [0.5, 4.5, -0.5]),
    ],
)
def test_a_response_that_could_not_be_scored(baseline, expected):
    rewards, mask = torch.tensor([1.0, 5.0, NAN]), torch.ones(3, 1, dtype=torch.bool)
    got = sparse_advantages(0.0 * mask, rewards, mask, reward_weight=1.0, baseline=baseline)
    assert got[:, 0].tolist() == expected


def test_rewards_that_are_known_for_different_responses():
    mask = torch.ones(3, 1, dtype=torch.bool)
    named = {
        "a": (torch.tensor([1.0, 5.0, NAN]), 1.0),
        "b": (torch.tensor([NAN, 2.0, 3.0]), 10.0),
        "c": (torch.tensor([NAN, 7.0, NAN]), 100.0),
        "d": (torch.tensor([NAN, torch.inf, 1.0]), 0.0),
    }
    got = sparse_advantages(0.0 * mask, named, mask, reward_weight=1.0)
    assert got[:, 0].tolist() == [-4.0, 4.0 - 10.0 + 700.0, 10.0]


@pytest.mark.parametrize(
    ("baseline", "expected"),
    [
        # The costs of the others: 3 and 12 in all, for the first response 7.5 on average.
        ("leave_one_out", [[NAN, 7.5 - 5, 7.5], [12.0 - 2, 12 - 1, 12], [3.0 - 8, 3 - 4, 3]]),
        # Future costs: [NaN, 5, 0], [2, 1, 0] and [8, 4, 0].
        (
            "per_token_leave_one_out",
            [[NAN, 2.5 - 5, 0], [8.0 - 2, 4.5 - 1, 0], [2.0 - 8, 3 - 4, 0]],
        ),
    ],
)
def test_an_unknown_cost_stays_in_its_response(baseline, expected):
    costs = torch.tensor([[1.0, NAN, 5.0], [1.0, 1.0, 1.0], [4.0, 4.0, 4.0]])
    mask = torch.ones(3, 3, dtype=torch.bool)
    options = {"reward_weight": 1.0, "baseline": baseline}
    got = sparse_advantages(costs, torch.zeros(3), mask, **options)
    torch.testing.assert_close(got, torch.tensor(expected), equal_nan=True)
    charged = sparse_advantages(costs, torch.zeros(3), mask, dense_weight=0.5, **options)
    assert charged.isnan().tolist() == [[True, True, False], [False] * 3, [False] * 3]


@pytest.mark.parametrize("value", [NAN, torch.inf])
def test_a_discount_that_underflows_hides_no_cost(value):
    costs = torch.zeros(1, 1000)
    costs[0, 900] = value
    got = returns_to_go(costs, torch.ones(1, 1000, dtype=torch.bool), 0.5)
    assert got[0].tolist() == pytest.approx([value] * 900 + [0.0] * 100, nan_ok=True)


@pytest.mark.parametrize("baseline", ["leave_one_out", "per_token_leave_one_out"])
def test_an_infinite_cost_is_no_part_of_its_own_baseline(baseline):
    costs = torch.tensor([[0.0, torch.inf], [1.0, 2.0], [3.0, 4.0]])
    mask = torch.ones(3, 2, dtype=torch.bool)
    got = sparse_advantages(costs, torch.zeros(3), mask, reward_weight=1.0, baseline=baseline)
    assert got[0, 0] == -torch.inf
    assert got[0, 1] == (5.0 if baseline == "leave_one_out" else 0.0)
    assert got[1, 0] == torch.inf


def test_an_infinite_reward_is_known():
    mask = torch.ones(2, 1, dtype=torch.bool)
    got = sparse_advantages(0.0 * mask, torch.tensor([torch.inf, 1.0]), mask, reward_weight=1.0)
    assert got[:, 0].tolist() == [torch.inf, -torch.inf]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("baseline", [*BASELINES, "tensor"])
def test_the_default_dtype_does_not_matter(baseline, dtype):
    costs, rewards, mask = batch("right")
    rewards[1] = NAN
    if baseline == "tensor":
        baseline = rewards.nan_to_num()
    named = {"a": (rewards, 0.7), "b": (rewards.flip(0), torch.tensor(0.1))}

    def results():
        options = {"reward_weight": 1.3, "dense_weight": 0.3, "baseline": baseline}
        advantages = sparse_advantages(costs, named, mask, gamma=0.9, **options)
        return advantages, returns_to_go(costs, mask, 0.9)

    expected = results()
    torch.set_default_dtype(dtype)
    try:
        got = results()
    finally:
        torch.set_default_dtype(torch.float32)
    for a, b in zip(got, expected, strict=True):
        assert a.dtype == torch.float32
        assert torch.equal(a, b)


@pytest.mark.parametrize("number", [np.float32, torch.tensor])
def test_numbers_of_numpy_and_of_torch(number):
    costs, rewards, mask = batch("right")

    def advantages(number, whole):
        return sparse_advantages(
            costs,
            {"a": (rewards, number(0.5))},
            mask,
            reward_weight=whole(2),
            dense_weight=number(0.25),
            gamma=np.float32(0.5),
            group_size=np.int64(3),
        )

    got = advantages(number, torch.tensor if number is torch.tensor else np.int64)
    assert torch.equal(got, advantages(float, int))


def test_a_weight_gets_no_gradient():
    costs, rewards, mask = batch("right")
    weight = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    expected = sparse_advantages(costs, {"a": (rewards, 2.0)}, mask, reward_weight=2.0)
    got = sparse_advantages(costs, {"a": (rewards, weight)}, mask, reward_weight=weight)
    assert torch.equal(got, expected)
    assert not got.requires_grad


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("baseline", [*BASELINES, "tensor"])
def test_no_value_of_a_device_is_read(baseline, packed):
    """Tensors of the meta device have no values."""

    def zeros(*shape, dtype=torch.float32):
        return torch.zeros(shape, dtype=dtype, device="meta")

    costs = zeros(20) if packed else zeros(3, 4)
    result = sparse_advantages(
        costs,
        {"a": (zeros(3), zeros())},
        costs == 0,
        reward_weight=zeros(),
        dense_weight=zeros(),
        group_ids=zeros(3, dtype=torch.int32),
        baseline=zeros(3) if baseline == "tensor" else baseline,
        cu_seqlens=zeros(4, dtype=torch.int32) if packed else None,
    )
    assert result.shape == costs.shape


@pytest.mark.parametrize("baseline", BASELINES)
def test_tokens_beyond_the_last_sequence_count_as_masked_where_nobody_looks(baseline, monkeypatch):
    costs, bounds = torch.arange(6.0), torch.tensor([0, 1, 4])
    options = {"reward_weight": 1.0, "baseline": baseline, "cu_seqlens": bounds}
    valid = torch.ones(6, dtype=torch.bool)
    expected = sparse_advantages(costs[:4], bounds[1:], valid[:4], **options)
    monkeypatch.setattr(checks, "is_readable", lambda tensor: False)
    got = sparse_advantages(costs, bounds[1:], valid, **options)
    assert got.tolist() == [*expected.tolist(), 0.0, 0.0]


def test_a_baseline_of_your_own_gets_no_gradient():
    costs, rewards, mask = batch("right")
    values = torch.randn(6, 7, requires_grad=True)
    got = sparse_advantages(costs, rewards, mask, reward_weight=1.0, baseline=values)
    assert not got.requires_grad
