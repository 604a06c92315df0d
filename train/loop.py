"""The training loop: prompts, responses to each, rewards, one hybrid gradient, one update.

Written with `accelerate`; one process for now.
"""

import math
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from accelerate.utils import LoggerType, ProjectConfiguration, set_seed
from transformers.utils import logging

from train import checkpoint, report
from train.batch import collect
from train.config import NonFiniteError, TrainConfig, UserError
from train.data import Example, PromptStream, read_examples
from train.evaluate import evaluate
from train.files import atomic_directory, locked
from train.metrics import StepStatistics, check_finite, check_weights
from train.models import check_prompts, load_models, load_tokenizer
from train.objective import ScheduledWeights, gradient_norms, micro_batch_loss
from train.rewards import Scorer, load_function, users_code
from train.rollout import Sampler
from train.schedules import learning_rate_factor
from train.stop import NO_MEMORY, StoppedError, last_words, sigterm


def train(config: TrainConfig) -> dict[str, Any]:
    """Runs what `config` describes and returns the content of `summary.json`.

    In the main thread, SIGTERM ends a run after the current step, with a checkpoint.

    Raises:
        UserError: a wrong option, file or reward.
        NonFiniteError: the loss or the gradient became infinite or NaN.
        StoppedError: a file could not be written, memory was short, or SIGTERM was received.
    """
    logging.disable_progress_bar()  # one bar is enough
    if config.report_to not in (trackers := ["none", *LoggerType.list()]):
        raise UserError(f"report_to: got {config.report_to!r}, expected one of {trackers}")
    installed = [tracker.value for tracker in get_available_trackers()]
    if config.report_to not in ("none", "all", *installed):
        raise UserError(f"report_to: {config.report_to} is not installed; see its documentation")
    project = ProjectConfiguration(config.output_dir, f"{config.output_dir}/tensorboard")
    try:
        accelerator = Accelerator(
            mixed_precision="bf16" if config.bf16 else "no",
            log_with=None if config.report_to == "none" else config.report_to,
            project_config=project,
        )
    except ValueError as error:  # of the device, or of another run in this process
        raise UserError(f"bf16: got {config.bf16}: {error}") from error
    if accelerator.num_processes > 1:
        raise UserError("several processes are not yet supported; start one")
    # These may come at any time, and are said when the files are closed.
    errors = (OSError, KeyboardInterrupt, *NO_MEMORY)
    with last_words(config, *errors), locked(Path(config.output_dir)):
        return _run(config, accelerator)


def _run(config: TrainConfig, accelerator: Accelerator) -> dict[str, Any]:
    """`train`, with the folder to itself."""
    output = Path(config.output_dir)
    resumed = checkpoint.find_checkpoint(config)
    done = resumed.step if resumed else 0
    if resumed is not None and "student" in resumed.changed:
        # The new one has no effect, and the records still say where the weights come from.
        config = replace(config, student=resumed.student)
    if config.setup is not None:
        _fill_assets(config.setup, output / "assets")

    # Whatever can be wrong is looked at before weights are loaded, which may take minutes.
    student_path = resumed.folder / "model" if resumed else config.student
    rewards = Scorer("rewards", config.rewards)
    metrics = Scorer("eval_metrics", config.eval_metrics)
    tokenizer = load_tokenizer(config, student_path)
    examples = read_examples("train_file", config.train_file, tokenizer)
    held_out: list[Example] = []
    if config.eval_file is not None:
        held_out = read_examples("eval_file", config.eval_file, tokenizer)
        for scorer in (rewards, metrics):
            scorer.check("eval_file", held_out)
    rewards.check("train_file", examples)
    check_prompts(config, student_path, examples + held_out)

    set_seed(config.seed)
    models = load_models(config, student_path, tokenizer)
    prompts = PromptStream(examples, config.seed)
    sampler = Sampler.create(config, models.student, models.tokenizer, models.vocab_size)

    optimizer = torch.optim.AdamW(
        models.student.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay
    )
    for teacher in models.teachers:
        torch.nn.Module.to(teacher, accelerator.device)
    models.student, optimizer = accelerator.prepare(models.student, optimizer)

    if resumed is not None:
        # Moments and counters alone; everything else is as the config has it now.
        settings = optimizer.state_dict()["param_groups"]
        moments = resumed.state["optimizer"]
        optimizer.load_state_dict({"state": moments, "param_groups": settings})
        prompts.position = resumed.state["position"]
        if "seed" not in resumed.changed:
            checkpoint.restore_random_state(resumed.state["random"])
    run_id = checkpoint.run_id(output, resumed)
    log = report.RunLog(config, accelerator, resumed)

    def evaluates(step: int) -> bool:
        return step == config.max_steps or bool(config.eval_steps and step % config.eval_steps == 0)

    def save(step: int) -> None:
        log.sync()
        moments = optimizer.state_dict()["state"]
        state = {"run_id": run_id, "optimizer": moments, "position": prompts.position}
        student = accelerator.unwrap_model(models.student)
        check_weights(step, student)
        checkpoint.save_checkpoint(config, step, student, models.tokenizer, state)

    def run_evaluation(step: int) -> None:
        if held_out:
            batch_size = config.per_device_eval_batch_size
            random_state = checkpoint.random_state()  # rewards and metrics may draw numbers
            with accelerator.autocast():
                result, rows = evaluate(models, held_out, sampler, rewards, metrics, batch_size)
            checkpoint.restore_random_state(random_state)
            log.evaluation(step, result, rows)

    errors = (UserError, NonFiniteError, StoppedError)
    with log, last_words(config, *errors), sigterm() as received:
        for text in resumed.set_damaged_aside() if resumed is not None else ():
            log.warn(text)
        if resumed is not None and not resumed.own:
            # Without it, a run killed before its first checkpoint would start over from `student`.
            save(done)
        first = log.evaluated is None and done < config.max_steps
        # A step is saved before its evaluation, during which the run may have been stopped.
        missed = log.evaluated is not None and log.evaluated < done and evaluates(done)
        if first or missed:
            run_evaluation(done)
        for step in range(done + 1, config.max_steps + 1):
            started = time.perf_counter()
            weights = ScheduledWeights.at(config, step - 1)

            # All micro-batches are sampled before any is trained on: the loss is normalised by the
            # token count of the whole step.
            batches = [
                collect(config, models, sampler, rewards, prompts)
                for _ in range(config.gradient_accumulation_steps)
            ]
            num_tokens = max(1, sum(int(batch.mask.sum()) for batch in batches))

            with accelerator.autocast():
                norms = (
                    gradient_norms(config, models, batches[0], weights) if evaluates(step) else {}
                )
            statistics = StepStatistics(config, models.total_weight)
            for batch in batches:
                with accelerator.autocast():
                    result = micro_batch_loss(config, models, batch, weights, num_tokens)
                accelerator.backward(result.loss)
                statistics.add(batch, result)
            max_norm = config.max_grad_norm or math.inf
            norm = accelerator.clip_grad_norm_(models.student.parameters(), max_norm)
            assert norm is not None
            row = {"step": step, **statistics.means(), "grad_norm": float(norm)}
            check_finite(row)

            learning_rate = config.learning_rate * learning_rate_factor(
                config.lr_scheduler_type, step - 1, config.warmup_steps, config.max_steps
            )
            for group in optimizer.param_groups:
                group["lr"] = learning_rate
            optimizer.step()
            optimizer.zero_grad()

            row |= {"lr": learning_rate, **vars(weights), **norms}
            seconds = time.perf_counter() - started
            row |= {"seconds": seconds, "tokens_per_second": row["tokens"] / seconds}
            log.step(row, batches[0])

            stops = bool(received)
            is_last = step == config.max_steps
            if stops or is_last or (config.save_steps and step % config.save_steps == 0):
                save(step)
            if stops:
                raise StoppedError(f"stopped by SIGTERM after step {step}", status=143)
            if evaluates(step):
                run_evaluation(step)

        with atomic_directory(output / "final") as folder:
            checkpoint.save_model(
                folder, accelerator.unwrap_model(models.student), models.tokenizer
            )
            (folder / checkpoint.FINAL_STEPS).write_text(str(config.max_steps))
        summary = log.finish()
        accelerator.end_training()
    return summary


def _fill_assets(setup: str, assets: Path) -> None:
    """Calls the function of the option `setup`, unless it has filled the folder already."""
    record = assets / ".setup"
    if not assets.exists():
        function = load_function("setup", setup)
        with atomic_directory(assets) as folder:
            with users_code(f"setup: {setup!r}"):
                function(folder)
            (folder / record.name).write_text(setup, encoding="utf-8")
    filled_by = record.read_text(encoding="utf-8", errors="replace") if record.exists() else None
    if filled_by != setup:
        raise UserError(
            f"setup: got {setup!r}, but {str(assets)!r} was filled by {filled_by or 'hand'}; move "
            "that folder away, or choose another output_dir"
        )
