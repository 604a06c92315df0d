"""The training loop: prompts, a group of responses each, rewards, one hybrid gradient, a step.

Minimises E[KL(student || teacher) - reward_weight * reward] (arXiv 2512.23097): the KL at each
visited token exactly, what a token does to later tokens and to the reward by Monte Carlo, with
`linear_hybrid_loss` on the models' last hidden states. Written through `accelerate`; one process
for now.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import LoggerType, ProjectConfiguration, set_seed
from torch import Tensor
from transformers import get_scheduler
from transformers.utils import logging

from hybrid_kernels import HybridLoss, TokenTerms, sparse_advantages
from train import checkpoint, report
from train.config import TrainConfig, UserError, parse_divergence
from train.data import Example, PromptStream, read_examples
from train.evaluate import decode, evaluate
from train.models import Models, check_lengths, load_models
from train.rewards import Scorer, load_function
from train.rollout import Rollout, Sampler, generate

# A teacher log-probability (nats) at or below it counts as "the teacher forbids this token".
FORBIDDEN = -20.0


class NonFiniteError(FloatingPointError):
    """The loss or its gradient is no longer a number; nothing was updated with it."""


@dataclass(frozen=True)
class Weights:
    """The scheduled weights at one step."""

    reward_weight: float
    gamma: float
    dense_weight: float

    @classmethod
    def at(cls, config: TrainConfig, step: int) -> "Weights":
        """Those of the update number `step`, counted from 0."""
        last = config.max_steps
        return cls(
            config.reward_weight.at(step, last),
            config.gamma.at(step, last),
            config.dense_weight.at(step, last),
        )


@dataclass(frozen=True)
class MicroBatch:
    """Rollouts with their scores.

    Attributes:
        examples: B of them, the responses to one prompt next to each other.
        mask: `[B, T]` bool, the tokens that are trained: the rollout's, less truncated responses
            where the config says so.
        scores: name -> `[B]` fp32, not weighted.
        reward: `[B]` fp32, their weighted sum.
    """

    examples: list[Example]
    completions: list[str]
    rollout: Rollout
    mask: Tensor
    scores: dict[str, Tensor]
    reward: Tensor


def train(config: TrainConfig) -> dict[str, Any]:
    """Runs what `config` describes and returns the content of `summary.json`.

    Raises:
        UserError: a wrong option, file or reward.
        NonFiniteError: the loss or the gradient became infinite or NaN.
    """
    logging.disable_progress_bar()  # one bar is enough
    if config.report_to not in (trackers := ["none", *LoggerType.list()]):
        raise UserError(f"report_to: got {config.report_to!r}, expected one of {trackers}")
    accelerator = Accelerator(
        mixed_precision="bf16" if config.bf16 else "no",
        log_with=None if config.report_to == "none" else config.report_to,
        project_config=ProjectConfiguration(config.output_dir, f"{config.output_dir}/tensorboard"),
    )
    if accelerator.num_processes > 1:
        raise UserError("several processes are not yet supported; start one")
    output = Path(config.output_dir)
    resumed_from = checkpoint.find_checkpoint(config)
    report.check_output_folder(config, resumed_from)
    if config.setup is not None and not (output / "assets").exists():
        with checkpoint.atomic_directory(output / "assets") as folder:
            load_function("setup", config.setup)(folder)

    set_seed(config.seed)
    models = load_models(config, resumed_from / "model" if resumed_from else config.student)
    rewards = Scorer("rewards", config.rewards)
    metrics = Scorer("eval_metrics", config.eval_metrics)
    examples = read_examples("train_file", config.train_file, models.tokenizer)
    held_out: list[Example] = []
    if config.eval_file is not None:
        held_out = read_examples("eval_file", config.eval_file, models.tokenizer)
    check_lengths(config, examples + held_out, models.student, *models.teachers)
    prompts = PromptStream(examples, config.seed)
    sampler = Sampler.create(config, models.student, models.tokenizer, models.vocab_size)

    optimizer = torch.optim.AdamW(
        models.student.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay
    )
    scheduler = get_scheduler(
        config.lr_scheduler_type, optimizer, config.warmup_steps, config.max_steps
    )
    for teacher in models.teachers:
        torch.nn.Module.to(teacher, accelerator.device)
    models.student, optimizer, scheduler = accelerator.prepare(models.student, optimizer, scheduler)

    done = 0
    if resumed_from is not None:
        state = checkpoint.load_state(resumed_from)
        done = state["step"]
        if done >= config.max_steps and not (output / "metrics.jsonl").exists():
            raise UserError(
                f"max_steps: got {config.max_steps}, but the checkpoint has {done} steps behind "
                "it already; ask for more"
            )
        optimizer.load_state_dict(state["optimizer"])
        scheduler.load_state_dict(state["scheduler"])
        prompts.position = state["position"]
        checkpoint.restore_random_state(state["random"])
    changed = checkpoint.changed_options(resumed_from, config) if resumed_from else []
    log = report.RunLog(config, accelerator, done, resumed_from, changed)

    def run_evaluation(step: int) -> None:
        if held_out:
            batch_size = config.per_device_eval_batch_size
            with accelerator.autocast():
                result, rows = evaluate(models, held_out, sampler, rewards, metrics, batch_size)
            log.evaluation(step, result, rows)

    with log:
        if done == 0:
            run_evaluation(0)
        for step in range(done + 1, config.max_steps + 1):
            started = time.perf_counter()
            weights = Weights.at(config, step - 1)

            # Everything is sampled before anything is trained: the normaliser is the token count of
            # the whole step, and the student that samples is the one that learns.
            batches = [
                collect(config, models, sampler, rewards, prompts)
                for _ in range(config.gradient_accumulation_steps)
            ]
            num_tokens = max(1, sum(int(batch.mask.sum()) for batch in batches))

            evaluates = step == config.max_steps or (
                config.eval_steps and step % config.eval_steps == 0
            )
            with accelerator.autocast():
                norms = gradient_norms(config, models, batches[0], weights) if evaluates else {}
            statistics = StepStatistics(config, models.total_weight)
            for batch in batches:
                with accelerator.autocast():
                    result = micro_batch_loss(config, models, batch, weights, num_tokens)
                accelerator.backward(result.loss)
                statistics.add(batch, result)
            row = {"step": step, **statistics.means()}
            max_norm = config.max_grad_norm or math.inf
            norm = accelerator.clip_grad_norm_(models.student.parameters(), max_norm)
            assert norm is not None
            row["grad_norm"] = float(norm)
            if not (math.isfinite(row["loss"]) and math.isfinite(row["grad_norm"])):
                raise NonFiniteError(explain_non_finite(row))

            learning_rate = scheduler.get_last_lr()[0]
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()

            row |= {"lr": learning_rate, **vars(weights), **norms}
            seconds = time.perf_counter() - started
            row |= {"seconds": seconds, "tokens_per_second": row["tokens"] / seconds}
            log.step(row, batches[0])

            if evaluates:
                run_evaluation(step)
            if (config.save_steps and step % config.save_steps == 0) or step == config.max_steps:
                state = {
                    "optimizer": optimizer.state_dict(),
                    "scheduler": scheduler.state_dict(),
                    "position": prompts.position,
                }
                student = accelerator.unwrap_model(models.student)
                checkpoint.save_checkpoint(config, step, student, models.tokenizer, state)

    with checkpoint.atomic_directory(output / "final") as folder:
        accelerator.unwrap_model(models.student).save_pretrained(folder)
        models.tokenizer.save_pretrained(folder)
    summary = log.finish()
    accelerator.end_training()
    return summary


def collect(
    config: TrainConfig, models: Models, sampler: Sampler, rewards: Scorer, prompts: PromptStream
) -> MicroBatch:
    """Draws prompts, `num_generations` responses to each, and their rewards."""
    group = config.num_generations
    drawn = prompts.take(config.per_device_train_batch_size // group)
    examples = [example for example in drawn for _ in range(group)]
    rollout = generate(models.student, examples, sampler)
    completions = decode(models, rollout)
    mask = rollout.mask
    if config.mask_truncated_completions:
        mask = mask & ~rollout.truncated[:, None]
    values = rewards.score(examples, completions)
    device = mask.device
    return MicroBatch(
        examples=examples,
        completions=completions,
        rollout=rollout,
        mask=mask,
        scores={name: torch.tensor(column, device=device) for name, column in values.items()},
        reward=torch.tensor(rewards.total(values, len(examples)), device=device),
    )


def micro_batch_loss(
    config: TrainConfig, models: Models, batch: MicroBatch, weights: Weights, num_tokens: int
) -> HybridLoss:
    """The share of one micro-batch in the step's loss, both terms, differentiable.

    The advantages need the fresh log-probabilities; the loss hands them to a function between its
    two sweeps, so one forward of the student is enough.

    Args:
        num_tokens: trained tokens of the whole optimizer step.
    """
    return models.loss_inputs(batch.rollout).hybrid_loss(
        batch.rollout.tokens,
        advantage_function(config, batch, weights, models.total_weight),
        mask=batch.mask,
        dense_weight=weights.dense_weight,
        entropy_weight=config.entropy_weight,
        divergence=parse_divergence(config.divergence),
        num_tokens=num_tokens,
        tail=config.tail,
        teacher_floor=config.teacher_floor,
    )


def advantage_function(
    config: TrainConfig, batch: MicroBatch, weights: Weights, total_weight: float
) -> Callable[[TokenTerms], Tensor]:
    """The sparse term's advantages `[B, T]` as a function of the fresh statistics.

    `total_weight` is that of all teachers.
    """

    def advantages(terms: TokenTerms) -> Tensor:
        costs = sampled_costs(terms, total_weight)
        if config.cost_clip is not None:
            costs = costs.clamp(-config.cost_clip, config.cost_clip)
        return sparse_advantages(
            costs,
            batch.reward,
            batch.mask,
            reward_weight=weights.reward_weight,
            gamma=weights.gamma,
            # Unbiased if the sample pays what the dense term leaves; else that part is not charged.
            dense_weight=weights.dense_weight if config.sampled_kl else 1.0,
            group_size=config.num_generations,
            baseline=config.baseline,
        )

    return advantages


def sampled_costs(terms: TokenTerms | HybridLoss, total_weight: float) -> Tensor:
    """c_t = sum_i w_i (log p(y_t) - log q_i(y_t)), `[B, T]` nats, 0 on masked tokens."""
    assert terms.log_prob is not None
    assert terms.teacher_log_prob is not None
    costs = terms.log_prob - terms.teacher_log_prob
    return costs if total_weight == 1.0 else total_weight * costs


def gradient_norms(
    config: TrainConfig, models: Models, batch: MicroBatch, weights: Weights
) -> dict[str, float]:
    """L2 norms over all parameters of the two parts of one micro-batch's gradient, apart.

    `grad_norm_dense` is that of the weighted divergence (of top-K teachers with what sampled tokens
    correct), `grad_norm_sparse` that of the policy gradient; each a mean over the micro-batch's own
    tokens. Costs one forward and two backwards,
    and leaves `.grad` alone.
    """
    compared = models.loss_inputs(batch.rollout)
    parameters = [weight for weight in models.student.parameters() if weight.requires_grad]
    parts = {
        "grad_norm_dense": (None, weights.dense_weight),
        "grad_norm_sparse": (
            advantage_function(config, batch, weights, models.total_weight),
            0.0,
        ),
    }
    norms = {}
    for name, (advantages, dense_weight) in parts.items():
        part = compared.hybrid_loss(
            batch.rollout.tokens,
            advantages,
            mask=batch.mask,
            dense_weight=dense_weight,
            divergence=parse_divergence(config.divergence),
            tail=config.tail,
            teacher_floor=config.teacher_floor,
        )
        gradients = torch.autograd.grad(part.loss, parameters, retain_graph=True, allow_unused=True)
        squares = [
            gradient.float().square().sum() for gradient in gradients if gradient is not None
        ]
        norms[name] = math.sqrt(float(torch.stack(squares).sum()))
    return norms


class StepStatistics:
    """Sums over the micro-batches of a step, kept on the device until `means` reads them once."""

    def __init__(self, config: TrainConfig, total_weight: float) -> None:
        self._config = config
        self._total_weight = total_weight
        self._sums: dict[str, Tensor] = {}
        self._largest_mismatch: list[Tensor] = []

    def add(self, batch: MicroBatch, result: HybridLoss) -> None:
        """Takes in one micro-batch; `result` is what `micro_batch_loss` returned for it."""
        assert result.teacher_log_prob is not None
        assert result.divergence is not None
        assert result.log_prob is not None
        assert batch.rollout.sampler_log_prob is not None
        mask, config = batch.mask, self._config
        costs = sampled_costs(result, self._total_weight)
        # The exact KL where the op computes it, else its estimate at the sampled token. (On a
        # support the op knows a lower bound.)
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
            "reward": batch.reward.sum(),
        }
        if result.student_mass is not None and result.teacher_mass is not None:
            sums["student_mass"] = result.student_mass.sum()
            sums["teacher_mass"] = result.teacher_mass.sum()
        sums |= {f"reward/{name}": values.sum() for name, values in batch.scores.items()}
        for name, value in sums.items():
            self._sums[name] = self._sums.get(name, 0.0) + value.double()
        self._largest_mismatch.append(mismatch.max())

    def means(self) -> dict[str, Any]:
        """The step's metrics.

        Per trained token (nats): kl, divergence, entropy, sampler_mismatch (of |sampler's -
        trainer's log-probability|), costs_clipped (share), and student_mass and teacher_mass on the
        support of top-K teachers. Per response: reward, reward/<name>,
        completion_length (tokens), truncated (share), objective (J = KL - lambda * reward, at the
        *final* lambda, so that steps of a schedule compare). Counts: tokens, teacher_forbidden.
        """
        names = list(self._sums)
        sums = dict(zip(names, torch.stack(list(self._sums.values())).tolist(), strict=True))
        tokens, sequences = max(1.0, sums["tokens"]), sums.pop("sequences")
        final = Weights.at(self._config, self._config.max_steps - 1).reward_weight
        objective = (sums["kl"] - final * sums["reward"]) / sequences
        per_token = ("kl", "divergence", "entropy", "sampler_mismatch", "costs_clipped")
        per_token += ("student_mass", "teacher_mass")
        for name in sums:
            if name in per_token:
                sums[name] /= tokens
            elif name not in ("loss", "tokens", "teacher_forbidden"):
                sums[name] /= sequences
        counts = {name: int(sums[name]) for name in ("tokens", "teacher_forbidden")}
        largest = float(torch.stack(self._largest_mismatch).max())
        return sums | counts | {"sampler_mismatch_max": largest, "objective": objective}


def explain_non_finite(row: dict[str, Any]) -> str:
    """What happened, what is still there, and what helps."""
    text = (
        f"step {row['step']}: the loss is {row['loss']} and its gradient norm {row['grad_norm']}; "
        "the weights were not updated, and the last checkpoint is untouched."
    )
    if row["teacher_forbidden"]:
        text += (
            f" The teacher gives {row['teacher_forbidden']} sampled tokens a probability of "
            "(nearly) zero: set teacher_floor (such as -30) and cost_clip (such as 10)."
        )
    else:
        text += " Try a lower learning_rate, or a smaller max_grad_norm."
    return text
