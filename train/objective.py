"""The objective, E[KL(student || teacher) - reward_weight * reward] (arXiv 2512.23097).

The KL at each visited token is exact. What a token does to later tokens and to the reward is
estimated from the sample, as a policy gradient with the advantages below.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from hybrid_kernels import HybridLoss, TokenTerms, sparse_advantages
from train.batch import MicroBatch
from train.config import TrainConfig, parse_divergence
from train.models import LossInputs, Models


@dataclass(frozen=True)
class ScheduledWeights:
    """The weights of one step, whose options are schedules."""

    reward_weight: float
    gamma: float
    dense_weight: float

    @classmethod
    def at(cls, config: TrainConfig, step: int) -> "ScheduledWeights":
        """The weights of update number `step`, counted from 0."""
        return cls(
            reward_weight=config.reward_weight.at(step, config.max_steps),
            gamma=config.gamma.at(step, config.max_steps),
            dense_weight=config.dense_weight.at(step, config.max_steps),
        )


def micro_batch_loss(
    config: TrainConfig,
    models: Models,
    batch: MicroBatch,
    weights: ScheduledWeights,
    num_tokens: int,
) -> HybridLoss:
    """One micro-batch's share of the step's loss, differentiable.

    Args:
        num_tokens: trained tokens of the whole optimizer step.
    """
    return _hybrid_loss(
        config,
        models.loss_inputs(batch.rollout),
        batch,
        # Called between the two sweeps of the loss, with the log-probabilities that the advantages
        # are made of: the student runs forward once.
        partial(advantages, config, batch, weights, models.total_weight),
        dense_weight=weights.dense_weight,
        entropy_weight=config.entropy_weight,
        num_tokens=num_tokens,
    )


def _hybrid_loss(
    config: TrainConfig,
    inputs: LossInputs,
    batch: MicroBatch,
    advantage_function: Callable[[TokenTerms], Tensor] | None,
    **options: Any,
) -> HybridLoss:
    return inputs.hybrid_loss(
        batch.rollout.tokens,
        advantage_function,
        mask=batch.mask,
        divergence=parse_divergence(config.divergence),
        tail=config.tail,
        teacher_floor=config.teacher_floor,
        **options,
    )


def advantages(
    config: TrainConfig,
    batch: MicroBatch,
    weights: ScheduledWeights,
    total_weight: float,
    terms: TokenTerms,
) -> Tensor:
    """The sparse term's advantages, `[B, T]`.

    Args:
        total_weight: the sum of all teachers' weights.
        terms: of the current student, `[B, T]`.
    """
    costs = sampled_costs(terms, total_weight)
    if config.cost_clip is not None:
        costs = costs.clamp(-config.cost_clip, config.cost_clip)
    # One by one, because a response that one of them could not score may still have the others.
    scores = {spec.name: (batch.scores[spec.name], spec.weight) for spec in config.rewards}
    return sparse_advantages(
        costs,
        scores or batch.reward,
        batch.mask,
        reward_weight=weights.reward_weight,
        gamma=weights.gamma,
        # Unbiased if the sample pays for the share that the dense term does not charge; with 1,
        # the sample pays nothing.
        dense_weight=weights.dense_weight if config.sampled_kl else 1.0,
        group_size=config.num_generations,
        baseline=config.baseline,
    )


def sampled_costs(terms: TokenTerms | HybridLoss, total_weight: float) -> Tensor:
    """c_t = sum_i w_i (log p(y_t) - log q_i(y_t)), `[B, T]` in nats, 0 at masked tokens."""
    assert terms.log_prob is not None
    assert terms.teacher_log_prob is not None
    costs = terms.log_prob - terms.teacher_log_prob
    return costs if total_weight == 1.0 else total_weight * costs


def gradient_norms(
    config: TrainConfig, models: Models, batch: MicroBatch, weights: ScheduledWeights
) -> dict[str, float]:
    """L2 norms, over all parameters, of the two parts of one micro-batch's gradient.

    `grad_norm_dense` is the norm for the weighted divergence (with the correction from sampled
    tokens, for top-K teachers), `grad_norm_sparse` the norm for the policy gradient. Each loss is
    a mean over the micro-batch's own tokens. Costs one forward and two backward passes, and leaves
    `.grad` alone.
    """
    inputs = models.loss_inputs(batch.rollout)
    parameters = [weight for weight in models.student.parameters() if weight.requires_grad]
    sparse = partial(advantages, config, batch, weights, models.total_weight)
    parts = (("grad_norm_dense", None, weights.dense_weight), ("grad_norm_sparse", sparse, 0.0))
    norms = {}
    for name, advantage_function, dense_weight in parts:
        part = _hybrid_loss(config, inputs, batch, advantage_function, dense_weight=dense_weight)
        gradients = torch.autograd.grad(part.loss, parameters, retain_graph=True, allow_unused=True)
        squares = [grad.float().square().sum() for grad in gradients if grad is not None]
        norms[name] = math.sqrt(float(torch.stack(squares).sum()))
    return norms
