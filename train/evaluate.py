"""Evaluation on the held-out prompts: rewards and metrics of greedy responses, and the KL."""

import math
from collections.abc import Sequence
from typing import Any

import torch

from train.data import Example
from train.models import Models
from train.rewards import Scorer, mean_total
from train.rollout import Sampler, completion_ids, decode, generate


@torch.no_grad()
def evaluate(
    models: Models,
    examples: Sequence[Example],
    sampler: Sampler,
    rewards: Scorer,
    metrics: Scorer,
    batch_size: int,
) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """Evaluates greedy responses to all examples. Draws no random numbers.

    Returns:
        the figures, and one row `{prompt, completion, reward, <name>...}` for each response, NaN
        where it could not be scored. The figures are means over the examples that could be scored:
        `eval_<name>` for each reward and metric (NaN if there is none), and `eval_reward`, the
        weighted sum of those of the rewards; means over all examples: `eval_truncated` (share),
        `eval_completion_length` (tokens), `eval_unscored` (the share of rewards and metrics that
        could not be scored); and means over the tokens of the responses: `eval_kl` =
        KL(student || teacher) and `eval_entropy`, in nats.
    """
    per_example: list[dict[str, Any]] = []
    tokens, kl, entropy, truncated = 0, 0.0, 0.0, 0
    for start in range(0, len(examples), batch_size):
        batch = examples[start : start + batch_size]
        rollout = generate(models.student, batch, sampler, greedy=True)
        terms = models.loss_inputs(rollout, full=True).token_terms(mask=rollout.mask)
        assert terms.divergence is not None
        tokens += int(rollout.mask.sum())
        kl += float(terms.divergence.sum())
        entropy += float(terms.entropy.sum())
        truncated += int(rollout.truncated.sum())
        ids = completion_ids(rollout)
        completions = decode(models.tokenizer, ids)
        scores = rewards.score(batch, completions, ids)
        columns = {
            **scores,
            **metrics.score(batch, completions, ids, known=scores),
            "reward": rewards.total(scores, len(batch)),
        }
        for row, (example, completion) in enumerate(zip(batch, completions, strict=True)):
            values = {name: column[row] for name, column in columns.items()}
            per_example.append({"prompt": example.prompt, "completion": completion, **values})
    names = [name for name in per_example[0] if name not in ("prompt", "completion", "reward")]
    count = len(per_example)
    means = {}
    for name in names:
        scored = [row[name] for row in per_example if not math.isnan(row[name])]
        means[name] = sum(scored) / len(scored) if scored else math.nan
    result = {f"eval_{name}": mean for name, mean in means.items()}
    result["eval_reward"] = mean_total(rewards.weights, means)
    cells = [row[name] for row in per_example for name in names]
    result["eval_unscored"] = sum(map(math.isnan, cells)) / max(1, len(cells))
    result["eval_kl"] = kl / tokens
    result["eval_entropy"] = entropy / tokens
    result["eval_completion_length"] = tokens / count
    result["eval_truncated"] = truncated / count
    return result, per_example
