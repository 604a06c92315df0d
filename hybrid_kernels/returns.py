"""The sparse term on `[B, T]` tensors: discounted returns, baselines, advantages.

Source: arXiv 2512.23097, whose conventions hold here, with this package's own where the paper is
silent: the exponent is `k - t`; the reward is not discounted; the sum runs over `k > t` only,
because the dense term charges the cost at `t` exactly; the return is a constant (no gradient flows
through it).
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from hybrid_kernels import validate
from hybrid_kernels.rows import weighted

BASELINES = ("none", "leave_one_out", "group_mean", "per_token_leave_one_out")


def returns_to_go(costs: Tensor, mask: Tensor, gamma: float = 1.0) -> Tensor:
    """Discounted sum of the strictly future costs.

        G_{t+1} = sum_{k > t} gamma^(k - t) c_k          over valid positions k

    Args:
        costs: `[B, T]` floating, c_k; detached here, arithmetic in fp32. Masked positions never
            affect a result, even if they hold NaN.
        mask: `[B, T]` bool or 0/1 integers, the valid tokens.
        gamma: discount in [0, 1].

    Returns:
        `[B, T]` fp32, 0 on masked positions.

    Raises:
        ValueError: wrong shape, dtype or gamma.

    Notes:
        A doubling scan: log2(T) elementwise steps, with no loop over T and no host
        synchronisation.
    """
    validate.matrix("costs", costs)
    validate.row_mask(mask, validate.CallShape(costs.shape, costs.device))
    validate.number("gamma", gamma, low=0.0, high=1.0)
    keep = mask != 0
    to_go = _inclusive_returns(costs, keep, gamma)
    future = torch.zeros_like(to_go)
    if gamma == 0:
        return future  # 0 times an infinite cost is 0 here, not NaN
    future[:, :-1] = gamma * to_go[:, 1:]
    return torch.where(keep, future, 0.0)


def sparse_advantages(
    log_ratio: Tensor,
    rewards: Tensor | Mapping[str, tuple[Tensor, float]],
    mask: Tensor,
    *,
    reward_weight: float,
    gamma: float = 1.0,
    dense_weight: float = 1.0,
    group_size: int | None = None,
    baseline: str = "leave_one_out",
) -> Tensor:
    """The advantage A_t of the sparse term, ready for `hybrid_loss(advantages=...)`.

        A_t = lambda r - sum_{k > t} gamma^(k-t) c_k - (1 - eta) c_t + b_t

    with lambda = `reward_weight`, eta = `dense_weight` (the part of the KL that the dense term
    charges exactly; the rest is charged on the sample) and c = `log_ratio`. At gamma = 1 the
    resulting gradient is unbiased for every eta, unless the baseline says otherwise.

    With R_i = lambda r_i - sum_k gamma^(k-t0) c_{i,k} (the return of response i from its first
    valid token t0) and K = `group_size`, the baselines are

    - ``none``: b = 0.
    - ``leave_one_out``: minus the mean of R over the *other* responses of the group. Unbiased.
    - ``group_mean``: minus the mean of R over the whole group, response i included. Biased: at
      gamma = 1 it scales the expected gradient, dense term included, by 1 - 1/K.
    - ``per_token_leave_one_out``: at each position, minus the mean over the other responses of
      their own `lambda r - sum_{k>t} ... - (1-eta) c_t` there (a response that has ended counts
      with its reward). Unbiased.

    Args:
        log_ratio: `[B, T]`, c_t = log p(y_t) - log q(y_t); detached here, fp32 arithmetic.
        rewards: `[B]`, or a dict of name -> (`[B]`, weight), which are summed with their weights.
        mask: `[B, T]` bool or 0/1 integers, the valid tokens.
        reward_weight: lambda.
        gamma: discount of the future costs in [0, 1]; below 1 the gradient is biased.
        dense_weight: eta.
        group_size: responses per prompt, consecutive along B. None makes the whole batch one
            group.
        baseline: one of the four above.

    Returns:
        `[B, T]` fp32, 0 on masked positions.

    Raises:
        ValueError: wrong shape, dtype, range, an unknown baseline, B not a multiple of
            `group_size`, or a group of one with a baseline that needs others.
    """
    validate.matrix("log_ratio", log_ratio)
    validate.row_mask(mask, validate.CallShape(log_ratio.shape, log_ratio.device))
    validate.number("gamma", gamma, low=0.0, high=1.0)
    validate.number("reward_weight", reward_weight)
    validate.number("dense_weight", dense_weight)
    validate.choice("baseline", baseline, BASELINES)
    group = validate.group_size(group_size, log_ratio.shape[0], baseline)
    reward = _total_reward(rewards, log_ratio)
    keep = mask != 0
    costs = torch.where(keep, log_ratio.detach().float(), 0.0)
    scaled_reward = weighted(reward_weight, reward)[:, None]
    advantage = scaled_reward - returns_to_go(costs, keep, gamma)
    if dense_weight != 1:
        advantage = advantage - (1.0 - dense_weight) * costs
    if baseline == "none" or not advantage.numel():
        shift = torch.zeros_like(scaled_reward)
    elif baseline == "per_token_leave_one_out":
        shift = -_mean_of_others(advantage, group)
    else:
        # The return from the first valid token, which is not at 0 with left padding. argmax returns
        # the first of equal values; a response without a valid token has no cost.
        first = keep.to(torch.int8).argmax(1, keepdim=True)
        total_cost = _inclusive_returns(costs, keep, gamma).gather(1, first)
        trajectory = scaled_reward - total_cost
        mean = _group_mean if baseline == "group_mean" else _mean_of_others
        shift = -mean(trajectory, group)
    return torch.where(keep, advantage + shift, 0.0)


def _inclusive_returns(costs: Tensor, keep: Tensor, gamma: float) -> Tensor:
    """S_t = sum_{k >= t} gamma^(k-t) c_k by doubling: S covers a window twice as long each step."""
    total = torch.where(keep, costs.detach().float(), 0.0)
    length, step = total.shape[1], 1
    # Stops before the discount underflows to 0, which would turn an infinite cost into NaN.
    while step < length and gamma**step >= torch.finfo(total.dtype).tiny:
        shifted = torch.zeros_like(total)
        shifted[:, :-step] = total[:, step:]
        total = total + gamma**step * shifted
        step *= 2
    return total


def _total_reward(rewards: Tensor | Mapping[str, tuple[Tensor, float]], like: Tensor) -> Tensor:
    batch = like.shape[0]
    if isinstance(rewards, Tensor):
        rewards = {"rewards": (rewards, 1.0)}
    elif not isinstance(rewards, Mapping) or not rewards:
        raise ValueError(
            "rewards: expected a [B] tensor or a non-empty dict of name -> ([B] tensor, weight), "
            f"got {type(rewards).__name__}"
        )
    total = torch.zeros(batch, device=like.device)
    for name, entry in rewards.items():
        if not (isinstance(entry, tuple) and len(entry) == 2):
            raise ValueError(f"rewards[{name!r}]: expected a ([B] tensor, weight) pair")
        value, weight = entry
        validate.per_sequence(f"rewards[{name!r}]", value, batch, like.device)
        validate.number(f"rewards[{name!r}] weight", weight)
        total = total + weighted(weight, value.detach().float())
    return total


def _group_mean(value: Tensor, group: int) -> Tensor:
    grouped = value.unflatten(0, (-1, group))
    return grouped.mean(1, keepdim=True).expand_as(grouped).flatten(0, 1)


def _mean_of_others(value: Tensor, group: int) -> Tensor:
    grouped = value.unflatten(0, (-1, group))
    return ((grouped.sum(1, keepdim=True) - grouped) / (group - 1)).flatten(0, 1)
