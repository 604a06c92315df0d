"""The sparse term: discounted returns, baselines, advantages.

Source: arXiv 2512.23097, whose conventions hold here, with this package's own where the paper is
silent: the exponent is `k - t`; the reward is not discounted; the sum runs over `k > t` only,
because the dense term charges the cost at `t` exactly; the return is a constant (no gradient flows
through it).

All sums over tokens of a sequence and over responses of a group are doubling scans: a logarithmic
number of elementwise steps, deterministic, without a host synchronisation.
"""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from hybrid_kernels import checks, validate
from hybrid_kernels.rows import weighted

BASELINES = ("none", "leave_one_out", "group_mean", "per_token_leave_one_out")


def returns_to_go(
    costs: Tensor, mask: Tensor, gamma: float = 1.0, cu_seqlens: Tensor | None = None
) -> Tensor:
    """Discounted sum of the strictly future costs of each sequence.

        G_{t+1} = sum_{k > t} gamma^(k - t) c_k          over valid positions k

    Args:
        costs: floating `[B, T]`, or packed `[N]`, c_k; detached here, arithmetic in fp32. Masked
            positions never affect a result, even if they hold NaN.
        mask: the shape of `costs`, bool or 0/1, the valid tokens.
        gamma: discount in [0, 1].
        cu_seqlens: `[B + 1]` int32 or int64, for packed sequences: sequence i has the tokens
            `cu_seqlens[i]` to `cu_seqlens[i + 1] - 1`. It starts with 0, does not decrease and ends
            with N. A sequence may be empty.

    Returns:
        fp32, the shape of `costs`; 0 on masked positions. A NaN or infinite cost reaches all
        earlier tokens of its sequence (none where gamma is 0).

    Raises:
        ValueError: wrong shape, dtype, device or gamma; on the CPU and in debug mode also wrong
            values of `cu_seqlens`.
    """
    tokens = _Tokens.of("costs", costs, mask, cu_seqlens)
    gamma = checks.number("gamma", gamma, low=0.0, high=1.0)
    return tokens.returns(gamma).reshape(costs.shape)


def sparse_advantages(
    log_ratio: Tensor,
    rewards: Tensor | Mapping[str, tuple[Tensor, float | Tensor]],
    mask: Tensor,
    *,
    reward_weight: float | Tensor,
    gamma: float = 1.0,
    dense_weight: float | Tensor = 1.0,
    group_size: int | None = None,
    group_ids: Tensor | None = None,
    baseline: str | Tensor = "leave_one_out",
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """The advantage A_t of the sparse term, ready for `hybrid_loss(advantages=...)`.

        A_t = lambda r - F_t - b_t,      F_t = sum_{k > t} gamma^(k-t) c_k + (1 - eta) c_t

    with lambda = `reward_weight`, eta = `dense_weight` (the part of the KL that the dense term
    charges exactly; the rest is charged on the sample), c = `log_ratio` and r = sum_j w_j r_j. At
    gamma = 1 the resulting gradient is unbiased for every eta, unless the baseline says otherwise.

    With C = sum_k gamma^(k-t0) c_k, all costs of a response from its first valid token t0 on, the
    baselines are

    - ``none``: b = 0.
    - ``leave_one_out``: the mean of lambda r - C over the *other* responses of the group.
      Unbiased.
    - ``group_mean``: the mean of lambda r - C over the whole group, the response itself included.
      Biased: at gamma = 1 it scales the expected gradient, dense term included, by 1 - 1/K in
      groups of K.
    - ``per_token_leave_one_out``: at each position of the sequence, the mean over the other
      responses of their own lambda r - F there (F = 0 where a response is masked or has ended).
      Unbiased.
    - a tensor: b itself, the expected lambda r - F_t. Unbiased where it does not depend on the
      response from token t on.

    A group of one response has b = 0.

    What is NaN is unknown, and stays out of the baselines of others: each reward and the costs have
    a mean of their own, over the responses for which they are known (at that position, where it is
    per token), 0 where there is none.

    - A NaN reward means "could not be scored", and adds 0. With baselines of the group, reward j
      adds lambda w_j s_ij (r_ij - m_ij) to the advantages of response i, with m its mean and s = 1
      where it is known, else 0. That is neutral, and where scoring does not depend on the response,
      the gradient of the reward stays that of the responses that are scored. With ``none`` and with
      a tensor, which still is subtracted, it amounts to a reward of 0, and that may be a good or a
      bad one: give an expected reward instead, or mask the response.
    - A NaN cost makes those advantages of its response NaN whose F it is part of: the earlier ones.

    Args:
        log_ratio: floating `[B, T]`, or packed `[N]`, c_t = log p(y_t) - log q(y_t); detached here,
            fp32 arithmetic.
        rewards: `[B]`, or a dict of name -> (`[B]`, weight w_j); detached here.
        mask: the shape of `log_ratio`, bool or 0/1, the valid tokens.
        reward_weight: lambda. This and the other weights are finite numbers or scalar tensors.
        gamma: discount of the future costs in [0, 1]; below 1 the gradient is biased.
        dense_weight: eta.
        group_size: responses per prompt, consecutive along B. The whole batch is one group where
            neither this nor `group_ids` is given.
        group_ids: `[B]` integers; responses with equal ones are a group, wherever they are.
        baseline: one of the four names above, or a floating tensor, detached here: `[B]`, or one
            value per token, the shape of `log_ratio` (or `[B, 1]`). For packed sequences `[B]` or
            `[N]`; the first where B = N.
        cu_seqlens: `[B + 1]` for packed sequences, as in `returns_to_go`.

    Returns:
        fp32, the shape of `log_ratio`; 0 on masked positions.

    Raises:
        ValueError: wrong shape, dtype, device or range, an unknown baseline, B not a multiple of
            `group_size`, or both kinds of groups; on the CPU and in debug mode also wrong values of
            `cu_seqlens`.
    """
    tokens = _Tokens.of("log_ratio", log_ratio, mask, cu_seqlens)
    batch, device = tokens.batch, log_ratio.device
    gamma = checks.number("gamma", gamma, low=0.0, high=1.0)
    reward_weight = checks.scalar("reward_weight", reward_weight, device)
    dense_weight = checks.scalar("dense_weight", dense_weight, device)
    group_size = validate.groups(group_size, group_ids, batch, device)
    validate.baseline(baseline, BASELINES, log_ratio, batch)
    values, weights = _named_rewards(rewards, batch, device)

    future = tokens.returns(gamma)
    charge = future + weighted(1.0 - dense_weight, tokens.costs)
    scored = ~values.isnan()
    if isinstance(baseline, Tensor):
        charge = charge + tokens.spread(baseline.detach().float().reshape(-1))
    elif baseline != "none":
        group = _group_keys(group_size, group_ids, batch, device)
        others = _sum_of_others(torch.ones_like(values[0]), group, batch)
        own = baseline == "group_mean"
        values = values - _mean_of_known(values, group, batch, others, own)
        if baseline == "per_token_leave_one_out" and cu_seqlens is None:
            # Equal positions are aligned already, so that only sequences have to be sorted.
            mean = _mean_of_known(charge.view(log_ratio.shape).T, group, batch, others)
            mean = mean.T.reshape(-1)
        elif baseline == "per_token_leave_one_out":
            place = tokens.spread(group) * tokens.length + tokens.position
            mean = _mean_of_known(charge, place, batch, tokens.spread(others))
        else:
            total = tokens.first_of_each(tokens.costs + future)
            mean = tokens.spread(_mean_of_known(total, group, batch, others, own))
        charge = charge - mean
    reward = torch.zeros_like(values[0])
    for value, weight in zip(torch.where(scored, values, 0.0), weights, strict=True):
        reward = reward + weighted(weight, value)
    advantages = tokens.spread(weighted(reward_weight, reward)) - charge
    return torch.where(tokens.keep, advantages, 0.0).reshape(log_ratio.shape)


class _Tokens(NamedTuple):
    """The tokens of all sequences, one sequence after another; tensors are `[N]`.

    Attributes:
        costs: fp32, 0 where masked.
        keep: bool, the valid tokens.
        sequence: the sequence that each token belongs to, ascending.
        position: its place there.
        length: no sequence has more tokens.
        batch: B, the number of sequences.
    """

    costs: Tensor
    keep: Tensor
    sequence: Tensor
    position: Tensor
    length: int
    batch: int

    @classmethod
    def of(cls, name: str, costs: Tensor, mask: Tensor, cu_seqlens: Tensor | None) -> "_Tokens":
        """Padded `[B, T]` costs, or packed ones with `cu_seqlens`, checked."""
        validate.sequences(name, costs, cu_seqlens)
        checks.row_mask(mask, checks.CallShape(costs.shape, costs.device))
        length = costs.shape[-1]
        if cu_seqlens is None:
            bounds = length * torch.arange(costs.shape[0] + 1, device=costs.device)
        else:
            bounds = cu_seqlens.long()
        batch = bounds.shape[0] - 1
        index = torch.arange(costs.numel(), device=costs.device)
        sequence = torch.searchsorted(bounds[1:], index, right=True).clamp(max=batch - 1)
        # Tokens beyond the last bound, which can't be refused without reading it, count as masked.
        keep = (mask != 0).reshape(-1) & (index < bounds[-1])
        return cls(
            costs=torch.where(keep, costs.detach().reshape(-1).float(), 0.0),
            keep=keep,
            sequence=sequence,
            position=index - bounds[sequence],
            length=length,
            batch=batch,
        )

    def returns(self, gamma: float) -> Tensor:
        """The discounted future costs, 0 where masked."""
        future = _sum_of_later(self.costs, self.sequence, self.length, gamma)
        return torch.where(self.keep, future, 0.0)

    def spread(self, values: Tensor) -> Tensor:
        """One value for each token, from `[B]` values or from as many."""
        return values[self.sequence] if values.numel() == self.batch else values

    def first_of_each(self, values: Tensor) -> Tensor:
        """`[B]`, the value of the first valid token of each sequence, 0 where there is none."""
        count = values.numel()
        places = torch.arange(count, device=values.device)
        first = places.new_full((self.batch,), count).scatter_reduce(
            0, self.sequence, torch.where(self.keep, places, count), "amin"
        )
        return torch.cat([values, values.new_zeros(1)])[first]


def _sum_of_later(values: Tensor, runs: Tensor, length: int, gamma: float = 1.0) -> Tensor:
    """sum_{k > t} gamma^(k-t) values_k over the rest of the run of equal `runs` that t is in.

    Doubles the window in each step. Both tensors are `[..., L]` and `[L]`; no run is longer than
    `length`.
    """
    if gamma == 0:
        return torch.zeros_like(values)  # 0 times an infinite cost is 0 here, not NaN

    def later(sums: Tensor, step: int) -> Tensor:
        # A discount that underflows to 0 would turn infinity into NaN.
        discount = max(gamma**step, torch.finfo(sums.dtype).tiny)
        return torch.where(runs[:-step] == runs[step:], discount * sums[..., step:], 0.0)

    sums, step = torch.zeros_like(values), 1
    sums[..., :-1] = later(values, 1)
    while step < length - 1:
        sums[..., :-step] += later(sums, step)
        step *= 2
    return sums


def _group_keys(
    group_size: int | None, group_ids: Tensor | None, batch: int, device: torch.device
) -> Tensor:
    """`[B]` integers in [0, B), the same for the responses of one group."""
    if group_ids is None:
        return torch.arange(batch, device=device) // (group_size or max(batch, 1))
    group_ids = group_ids.long()
    return torch.searchsorted(group_ids.sort().values, group_ids)


def _sum_of_others(values: Tensor, keys: Tensor, most: int) -> Tensor:
    """The sum over the other entries with the same key, for `[..., L]` values and `[L]` keys.

    At most `most` entries have the same key. Nothing is subtracted from a total, so an infinite
    value leaves its own sum finite.
    """
    order = keys.argsort(stable=True)
    keys, values = keys[order], values[..., order]
    before = _sum_of_later(values.flip(-1), keys.flip(-1), most).flip(-1)
    return (before + _sum_of_later(values, keys, most))[..., order.argsort()]


def _mean_of_known(
    values: Tensor, keys: Tensor, most: int, others: Tensor, own: bool = False
) -> Tensor:
    """Mean of what is not NaN: of the other entries with the same key, 0 where there is none.

    Args:
        values: `[..., L]`.
        keys: `[L]`.
        most: at most so many entries have the same key.
        others: `[L]`, the number of others; those that are not among `values` are 0.
        own: whether an entry that has others counts in its own mean.
    """
    unknown = values.isnan()
    values = torch.where(unknown, 0.0, values)
    total, missing = _sum_of_others(torch.stack([values, unknown.float()]), keys, most)
    count = others - missing
    if own:
        counts = (count > 0) & ~unknown
        total = total + torch.where(counts, values, 0.0)
        count = count + counts
    return total / count.clamp(min=1)


def _named_rewards(
    rewards: Tensor | Mapping[str, tuple[Tensor, float | Tensor]], batch: int, device: torch.device
) -> tuple[Tensor, list[float | Tensor]]:
    """All rewards, fp32 `[J, B]`, and their weights."""
    if isinstance(rewards, Tensor):
        named = {"rewards": (rewards, 1.0)}
    elif isinstance(rewards, Mapping) and rewards:
        named = {f"rewards[{name!r}]": entry for name, entry in rewards.items()}
    else:
        raise ValueError(
            "rewards: expected a [B] tensor or a non-empty dict of name -> ([B] tensor, weight), "
            f"got {type(rewards).__name__}; use torch.tensor(...) on a list or an array"
        )
    values, weights = [], []
    for name, entry in named.items():
        if not (isinstance(entry, tuple) and len(entry) == 2):
            raise ValueError(
                f"{name}: expected a ([B] tensor, weight) pair, got {type(entry).__name__}"
            )
        value, weight = entry
        values.append(validate.per_sequence(name, value, batch, device).detach().float())
        weights.append(checks.scalar(f"{name} weight", weight, device))
    return torch.stack(values), weights
