"""The metrics of a step, and the error for a loss that is no longer finite."""

import math
from typing import Any

import torch
from torch import Tensor

from hybrid_kernels import HybridLoss
from train.batch import MicroBatch
from train.config import NonFiniteError, TrainConfig, parse_divergence
from train.objective import sampled_costs
from train.rewards import mean_total

# A token is counted as forbidden by the teacher if its log-probability (nats) is at most this.
FORBIDDEN = -20.0
_COUNTS = ("tokens", "teacher_forbidden")
_PER_TOKEN = ("kl", "divergence", "entropy", "sampler_mismatch", "costs_clipped")
_PER_TOKEN_OF_TOP_K = ("student_mass", "teacher_mass")


class StepStatistics:
    """Sums over the micro-batches of a step, kept on the device until `means` reads them once."""

    def __init__(self, config: TrainConfig, total_weight: float) -> None:
        self._config = config
        self._total_weight = total_weight
        self._sums: dict[str, Tensor] = {}
        self._largest_mismatches: list[Tensor] = []

    def add(self, batch: MicroBatch, result: HybridLoss) -> None:
        """Adds one micro-batch; `result` is what `micro_batch_loss` returned for it."""
        assert result.teacher_log_prob is not None
        assert result.divergence is not None
        assert result.log_prob is not None
        assert batch.rollout.sampler_log_prob is not None
        mask, config = batch.mask, self._config
        costs = sampled_costs(result, self._total_weight)
        # The exact KL if the loss computes it, else its estimate from the sampled token. On a top-K
        # support, the divergence is only a lower bound of the KL.
        exact = parse_divergence(config.divergence).canonical()[0] == "reverse_kl"
        exact = exact and result.student_mass is None
        kl = result.divergence if exact else costs
        mismatch = torch.where(mask, batch.rollout.sampler_log_prob - result.log_prob, 0.0).abs()
        forbidden = max(FORBIDDEN, config.teacher_floor or -math.inf)
        sums = {
            "loss": result.loss.detach(),
            "tokens": mask.sum(),
            "kl": kl.sum(),
            "divergence": result.divergence.sum(),
            "entropy": result.entropy.sum(),
            "sampler_mismatch": mismatch.sum(),
            "teacher_forbidden": (mask & (result.teacher_log_prob <= forbidden)).sum(),
            "costs_clipped": (mask & (costs.abs() > (config.cost_clip or math.inf))).sum(),
            "sequences": torch.tensor(len(batch.examples), device=mask.device),
            "completion_length": batch.rollout.mask.sum(),
            "truncated": batch.rollout.truncated.sum(),
        }
        if result.student_mass is not None and result.teacher_mass is not None:
            sums["student_mass"] = result.student_mass.sum()
            sums["teacher_mass"] = result.teacher_mass.sum()
        for name, values in batch.scores.items():
            sums[f"reward/{name}"] = values.nansum()
            sums[f"scored reward/{name}"] = (~values.isnan()).sum()
        for name, value in sums.items():
            self._sums[name] = self._sums.get(name, 0.0) + value.double()
        self._largest_mismatches.append(mismatch.max())

    def means(self) -> dict[str, Any]:
        """The step's metrics.

        - Per trained token: kl, divergence and entropy (nats), sampler_mismatch (nats, the absolute
          difference between the sampler's and the trainer's log-probability), costs_clipped
          (share), and, for top-K teachers, student_mass and teacher_mass on the support.
        - Per response: completion_length (tokens), truncated (share), and objective (nats):
          J = KL - lambda * reward at the final lambda of the schedule, so that all steps are
          comparable; the KL alone if that lambda is 0.
        - Per response that could be scored: reward/<name>, NaN if there is none; and reward, the
          weighted sum of these means.
        - Per response and reward: unscored, the share of those that could not be scored.
        - For the step: loss, sampler_mismatch_max (nats), and the counts tokens and
          teacher_forbidden.
        """
        config = self._config
        sums = dict(zip(self._sums, torch.stack(list(self._sums.values())).tolist(), strict=True))
        tokens, sequences = max(1.0, sums["tokens"]), sums.pop("sequences")
        rewards = [name for name in sums if f"scored {name}" in sums]
        scored = {name: sums.pop(f"scored {name}") for name in rewards}
        kl = sums["kl"] / sequences
        for name in sums:
            if name in _PER_TOKEN + _PER_TOKEN_OF_TOP_K:
                sums[name] /= tokens
            elif name in scored:
                sums[name] = sums[name] / scored[name] if scored[name] else math.nan
            elif name != "loss" and name not in _COUNTS:
                sums[name] /= sequences
        counts = {name: int(sums[name]) for name in _COUNTS}
        weights = {f"reward/{spec.name}": spec.weight for spec in config.rewards}
        reward = mean_total(weights, sums)
        final_weight = config.reward_weight.at(config.max_steps - 1, config.max_steps)
        objective = kl - final_weight * reward if final_weight else kl
        unscored = 1.0 - sum(scored.values()) / (len(scored) * sequences) if scored else 0.0
        largest = float(torch.stack(self._largest_mismatches).max())
        others = {"sampler_mismatch_max": largest, "objective": objective, "unscored": unscored}
        return sums | counts | {"reward": reward} | others


def check_finite(row: dict[str, Any]) -> None:
    """Checks the metrics of a step before its update.

    Raises:
        NonFiniteError: the loss or its gradient is infinite or NaN.
    """
    if math.isfinite(row["loss"]) and math.isfinite(row["grad_norm"]):
        return
    text = (
        f"step {row['step']}: the loss is {row['loss']} and its gradient norm {row['grad_norm']}; "
        "the weights were not updated."
    )
    if row["teacher_forbidden"]:
        text += (
            f" The teacher gives {row['teacher_forbidden']} sampled tokens a probability of "
            "(nearly) zero: set teacher_floor (such as -30) and cost_clip (such as 10)."
        )
    elif math.isfinite(row["entropy"]) and not math.isfinite(row["kl"]):
        text += " The teacher's logits are infinite or NaN: its checkpoint may be damaged."
    elif math.isfinite(row["kl"]) and not math.isfinite(row["loss"]):
        text += (
            " The KL is finite: lower reward_weight, the rewards' own weights, dense_weight or "
            "entropy_weight."
        )
    else:
        text += " Try a lower learning_rate, or a smaller max_grad_norm."
    raise NonFiniteError(text)


def check_weights(step: int, model: torch.nn.Module) -> None:
    """Checks the weights before they are saved.

    Raises:
        NonFiniteError: a weight is infinite or NaN.
    """
    if not all(bool(weight.isfinite().all()) for weight in model.parameters()):
        raise NonFiniteError(
            f"step {step}: its update made weights infinite or NaN, so they are not saved. Try a "
            "lower learning_rate or weight_decay, or a smaller max_grad_norm."
        )
