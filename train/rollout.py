"""Sampling from the student, and logits or hidden states at the sampled tokens.

The log-probabilities are right only with the rules in this file: padding on the left, position ids,
which EOS ends a response, which tokens are trained, and no sampling settings from the checkpoint.
"""

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from train.config import NonFiniteError, TrainConfig, UserError
from train.data import Example, pad_left


@dataclass(frozen=True)
class Rollout:
    """A batch of prompts with their responses.

    Attributes:
        input_ids: `[B, P + T]`, prompts padded on the left, responses on the right.
        attention_mask: `[B, P + T]`, 0 on both paddings.
        tokens: `[B, T]`, the responses without their prompts.
        mask: `[B, T]` bool, the response's tokens up to and including its first EOS.
        truncated: `[B]` bool, responses that reached the length limit without an EOS.
        sampler_log_prob: `[B, T]` fp32, log p(y) in nats during sampling; None for greedy decoding.
    """

    input_ids: Tensor
    attention_mask: Tensor
    tokens: Tensor
    mask: Tensor
    truncated: Tensor
    sampler_log_prob: Tensor | None


@dataclass(frozen=True)
class Sampler:
    """How responses are drawn. The checkpoint's generation config has no influence beyond its EOS.

    Attributes:
        eos_ids: the tokens that end a response.
        pad_id: the padding token; may be one of `eos_ids`.
        vocab_size: token ids from this one on are never drawn.
        max_completion_length: tokens.
        temperature, top_p, top_k: with 1, 1 and 0, responses are drawn from the model itself.
    """

    eos_ids: tuple[int, ...]
    pad_id: int
    vocab_size: int
    max_completion_length: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0

    @classmethod
    def create(
        cls,
        config: TrainConfig,
        student: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        vocab_size: int,
    ) -> "Sampler":
        all_eos_ids = eos_token_ids(student, tokenizer)
        eos_ids = tuple(index for index in all_eos_ids if index < vocab_size)
        if all_eos_ids and not eos_ids:
            raise UserError(
                f"vocab_size: responses end with one of the ids {all_eos_ids}, but only the first "
                f"{vocab_size} are drawn"
            )
        if config.mask_truncated_completions and not eos_ids:
            raise UserError(
                "mask_truncated_completions: set, but neither the tokenizer nor the model has an "
                "EOS token, so that every response would be left out"
            )
        pad_id = tokenizer.pad_token_id
        # One that was added to the tokenizer alone has no embedding.
        if not isinstance(pad_id, int) or pad_id >= vocab_size:
            pad_id = eos_ids[0] if eos_ids else 0
        return cls(
            eos_ids=eos_ids,
            pad_id=pad_id,
            vocab_size=vocab_size,
            max_completion_length=config.max_completion_length,
            temperature=config.temperature,
            top_p=config.top_p,
            top_k=config.top_k,
        )

    def generation_config(self, model_vocab: int, greedy: bool) -> GenerationConfig:
        sampling = (
            {}
            if greedy
            else {"temperature": self.temperature, "top_p": self.top_p, "top_k": self.top_k}
        )
        return GenerationConfig(
            do_sample=not greedy,
            num_beams=1,
            max_new_tokens=self.max_completion_length,
            eos_token_id=list(self.eos_ids) or None,
            pad_token_id=self.pad_id,
            suppress_tokens=list(range(self.vocab_size, model_vocab)) or None,
            **sampling,
        )


def eos_token_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """The union of the generation config's EOS ids and the tokenizer's, sorted.

    Chat models end a turn with one EOS and a document with another. Both end a response.
    """
    ids: set[int] = set()
    configured: Any = model.generation_config.eos_token_id if model.generation_config else None
    tokenizers: Any = tokenizer.eos_token_id
    for source in (configured, tokenizers):
        if source is not None:
            ids.update([source] if isinstance(source, int) else source)
    return tuple(sorted(ids))


def vocabulary_of(model: PreTrainedModel) -> int:
    """The number of the model's logits, including padding entries."""
    layer = model.get_output_embeddings()
    assert layer is not None
    return layer.weight.shape[0]


def completion_mask(tokens: Tensor, eos_ids: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Which sampled tokens belong to the responses, and which responses have no end.

    The first EOS decides, not the padding id, which may be an EOS id.

    Args:
        tokens: `[B, T]`, responses and what the sampler wrote after their EOS.
        eos_ids: the ids that end a response.

    Returns:
        the mask `[B, T]` bool, true up to and including the first EOS; truncated `[B]` bool.
    """
    ends = torch.isin(tokens, torch.tensor(eos_ids, dtype=tokens.dtype, device=tokens.device))
    ended_before = ends.cumsum(1) - ends.long() > 0
    return ~ended_before, ~ends.any(1)


def position_ids(attention_mask: Tensor) -> Tensor:
    """`[B, L]`: positions in each sequence, counted from 0 at its first token after the padding."""
    return (attention_mask.cumsum(1) - 1).clamp(min=0)


def completion_ids(rollout: Rollout) -> list[list[int]]:
    """The responses' tokens, up to and including their first EOS."""
    rows = zip(rollout.tokens.cpu(), rollout.mask.cpu(), strict=True)
    return [tokens[mask].tolist() for tokens, mask in rows]


def decode(tokenizer: PreTrainedTokenizerBase, ids: Sequence[Sequence[int]]) -> list[str]:
    """The responses as texts, without special tokens."""
    return [str(tokenizer.decode(list(row), skip_special_tokens=True)) for row in ids]


@torch.no_grad()
def generate(
    model: PreTrainedModel, examples: Sequence[Example], sampler: Sampler, *, greedy: bool = False
) -> Rollout:
    """One response to each example, sampled or, if `greedy`, by argmax.

    Args:
        model: in eval mode.
        examples: B of them, in which an example may be repeated for several responses.

    Raises:
        NonFiniteError: the model's logits are infinite or NaN.
    """
    prompt_ids, prompt_mask = pad_left([example.token_ids for example in examples], sampler.pad_id)
    prompt_ids, prompt_mask = prompt_ids.to(model.device), prompt_mask.to(model.device)
    settings = sampler.generation_config(vocabulary_of(model), greedy)
    recorder = _SampledLogProbs(sampler.temperature)
    with _generation_config(model, settings):
        sequences = model.generate(  # pyright: ignore[reportCallIssue]
            prompt_ids,
            attention_mask=prompt_mask,
            generation_config=settings,
            logits_processor=LogitsProcessorList([recorder]),
        )
    assert isinstance(sequences, Tensor)
    sampler_log_prob = recorder.finish(sequences)
    tokens = sequences[:, prompt_ids.shape[1] :].contiguous()
    mask, truncated = completion_mask(tokens, sampler.eos_ids)
    return Rollout(
        input_ids=sequences,
        attention_mask=torch.cat([prompt_mask, mask.long()], 1),
        tokens=tokens,
        mask=mask,
        truncated=truncated,
        sampler_log_prob=None if greedy else sampler_log_prob,
    )


@contextmanager
def _generation_config(model: PreTrainedModel, settings: GenerationConfig) -> Iterator[None]:
    """Replaces the model's config, from which `generate` takes what `settings` leaves open."""
    original = model.generation_config
    model.generation_config = settings
    try:
        yield
    finally:
        model.generation_config = original


class _SampledLogProbs(LogitsProcessor):
    """Records log p(y) of each token drawn, with one `[B, V]` buffer at a time.

    Processors run before temperature and truncation, so `scores` are the model's logits. A row
    without a distribution is replaced until `finish` reports it: from NaN, torch.multinomial raises
    an error of its own, after which a GPU can't be used any more.
    """

    def __init__(self, temperature: float) -> None:
        self._temperature = temperature
        self._pending: Tensor | None = None
        self._log_probs: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self._settle(input_ids)
        log_probs = torch.log_softmax(scores.float() / self._temperature, dim=-1)
        undefined = log_probs.isnan().any(-1, keepdim=True)
        self._pending = log_probs.masked_fill(undefined, torch.nan)
        return scores.masked_fill(undefined, 0.0)

    def finish(self, sequences: Tensor) -> Tensor:
        self._settle(sequences)
        log_probs = torch.stack(self._log_probs, 1)
        if bool(log_probs.isnan().any()):
            raise NonFiniteError(
                "the student's logits are infinite or NaN: its weights have diverged, or were "
                "damaged before. Go back to a checkpoint from before that (to resume from it, "
                "first move later ones away), with a lower learning_rate or max_grad_norm"
            )
        return log_probs

    def _settle(self, input_ids: Tensor) -> None:
        """Records the last of `input_ids`, which was drawn from the pending distribution."""
        if self._pending is not None:
            self._log_probs.append(self._pending.gather(1, input_ids[:, -1:]).squeeze(1))


def completion_logits(model: PreTrainedModel, rollout: Rollout, vocab_size: int) -> Tensor:
    """`[B, T, vocab_size]`: row t is the distribution that `rollout.tokens[:, t]` is drawn from.

    A view of the model's logits, not a copy. If the model can return these positions only, the
    output layer is not computed for the prompt.
    """
    positions = _positions(rollout)
    indices = torch.arange(positions.start, positions.stop, device=rollout.input_ids.device)
    logits = _forward(model, rollout, logits_to_keep=indices).logits
    if logits.shape[1] > len(indices):
        logits = logits[:, positions]
    return logits[..., :vocab_size]


def completion_hidden(model: PreTrainedModel, rollout: Rollout) -> Tensor:
    """`[B, T, D]`: the last hidden states, from which the model computes `completion_logits`.

    The whole model is called, because wrappers (mixed precision, sharding) hook into its forward.
    Its output layer is computed at one position only, if the model can do that.
    """
    states: list[Tensor] = []
    handle = model.base_model.register_forward_hook(
        lambda module, inputs, output: states.append(output.last_hidden_state)
    )
    try:
        _forward(model, rollout, logits_to_keep=1)
    finally:
        handle.remove()
    return states[0][:, _positions(rollout)]


def _positions(rollout: Rollout) -> slice:
    # Logits at position i predict token i + 1, so the slice starts at the prompt's last token and
    # ends at the response's last but one.
    length = rollout.tokens.shape[1]
    first = rollout.input_ids.shape[1] - length - 1
    return slice(first, first + length)


def _forward(model: PreTrainedModel, rollout: Rollout, **optional: Any) -> Any:
    """The model's output; arguments that its forward does not have are left out."""
    optional["position_ids"] = position_ids(rollout.attention_mask)
    accepted = inspect.signature(type(model).forward).parameters
    return model(
        input_ids=rollout.input_ids,
        attention_mask=rollout.attention_mask,
        use_cache=False,
        **{name: value for name, value in optional.items() if name in accepted},
    )
