"""A micro-batch: responses of the student to prompts, with their rewards."""

from dataclasses import dataclass

import torch
from torch import Tensor

from train.config import TrainConfig
from train.data import Example, PromptStream
from train.models import Models
from train.rewards import Scorer
from train.rollout import Rollout, Sampler, completion_ids, decode, generate


@dataclass(frozen=True)
class MicroBatch:
    """B responses with their scores.

    Attributes:
        examples: B of them, one for each response; responses to one prompt are adjacent.
        completions: the responses as texts.
        rollout: the responses as tokens.
        mask: `[B, T]` bool, the tokens that are trained: those of the rollout, without truncated
            responses if `mask_truncated_completions` is set.
        scores: name -> `[B]` fp32, not weighted; NaN where a response could not be scored.
        reward: `[B]` fp32, the weighted sum of the scores that are there; NaN if none is.
    """

    examples: list[Example]
    completions: list[str]
    rollout: Rollout
    mask: Tensor
    scores: dict[str, Tensor]
    reward: Tensor


def collect(
    config: TrainConfig, models: Models, sampler: Sampler, rewards: Scorer, prompts: PromptStream
) -> MicroBatch:
    """Draws prompts, samples `num_generations` responses to each, and scores them."""
    group_size = config.num_generations
    drawn = prompts.take(config.per_device_train_batch_size // group_size)
    examples = [example for example in drawn for _ in range(group_size)]
    rollout = generate(models.student, examples, sampler)
    ids = completion_ids(rollout)
    completions = decode(models.tokenizer, ids)
    mask = rollout.mask
    if config.mask_truncated_completions:
        mask = mask & ~rollout.truncated[:, None]
    scores = rewards.score(examples, completions, ids)

    def column(values: list[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float32, device=mask.device)

    return MicroBatch(
        examples=examples,
        completions=completions,
        rollout=rollout,
        mask=mask,
        scores={name: column(values) for name, values in scores.items()},
        reward=column(rewards.total(scores, len(examples))),
    )
