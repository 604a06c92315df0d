"""`returns_to_go` and `sparse_advantages` against the formulas, written as loops over tokens."""

import math

import pytest
import torch

from hybrid_kernels import returns_to_go, sparse_advantages

GAMMAS = [0.0, 0.9, 1.0]
BASELINES = ["none", "leave_one_out", "group_mean", "per_token_leave_one_out"]
NAN = math.nan


def looped_returns(costs, mask, gamma):
    """sum_{k > t} gamma^(k-t) c_k over valid k, for valid t."""
    batch, length = costs.shape
    result = torch.zeros(batch, length, dtype=torch.float64)
    for b in range(batch):
        for t in range(length):
            if mask[b, t]:
                later = (k for k in range(t + 1, length) if mask[b, k])
                result[b, t] = sum(gamma ** (k - t) * float(costs[b, k]) for k in later)
    return result


def looped_advantages(costs, rewards, mask, reward_weight, gamma, dense_weight, group, baseline):
    """A_t = lambda r - sum_{k > t} gamma^(k-t) c_k - (1 - eta) c_t + b_t."""
    batch, length = costs.shape
    safe = torch.where(mask, costs, 0.0).double()
    future = looped_returns(costs, mask, gamma)
    single = reward_weight * rewards.double()[:, None] - future - (1 - dense_weight) * safe
    trajectory = []
    for b in range(batch):
        valid = [t for t in range(length) if mask[b, t]]
        discounted = (gamma ** (t - valid[0]) * float(costs[b, t]) for t in valid)
        trajectory.append(reward_weight * float(rewards[b]) - sum(discounted))

    def mean(members, t):
        if baseline == "none":
            return 0.0
        if baseline == "per_token_leave_one_out":
            return float(single[members, t].mean())
        return sum(trajectory[i] for i in members) / len(members)

    result = torch.zeros(batch, length, dtype=torch.float64)
    for b in range(batch):
        members = list(range(b // group * group, b // group * group + group))
        if "leave_one_out" in baseline:
            members.remove(b)
        for t in range(length):
            if mask[b, t]:
                result[b, t] = single[b, t] - mean(members, t)
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
    torch.testing.assert_close(got.double(), looped_returns(costs, mask, gamma))
    assert torch.equal(got, returns_to_go(costs, mask.int(), gamma))


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
    expected = looped_advantages(costs, rewards, mask, 1.7, gamma, dense_weight, 3, baseline)
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


def test_half_precision_costs_are_summed_in_fp32():
    costs = torch.full((1, 3000), 1.0, dtype=torch.bfloat16)
    mask = torch.ones(1, 3000, dtype=torch.bool)
    assert returns_to_go(costs, mask)[0, 0] == 2999


def test_compiles():
    costs, rewards, mask = batch("right")

    def advantages(costs, rewards, mask):
        return sparse_advantages(costs, rewards, mask, reward_weight=1.0, group_size=3, gamma=0.9)

    torch._dynamo.reset()
    compiled = torch.compile(advantages, fullgraph=True, backend="aot_eager")
    got, expected = compiled(costs, rewards, mask), advantages(costs, rewards, mask)
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
