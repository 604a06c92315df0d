"""The output layer of a `transformers` model: found by its config, and tried out."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from hybrid_kernels.linear import gemm
from hybrid_kernels.linear.heads import Head, LinearStudent
from hybrid_kernels.types import OutputLayer

# The names under which configs have the softcap of the logits.
SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
# Hidden states are multiplied by these: large ones reveal a softcap or scale under another name, 0
# what is added to the logits elsewhere.
FACTORS = (1.0, 50.0, 1e3, 0.0)


@torch.no_grad()
def output_layer(model: Any) -> OutputLayer | None:
    """The output layer of a model, as the linear functions take it.

    The softcap and scale of its logits are read from its config. Then it is run on four tokens, in
    eval mode and without a gradient: with its own hidden states and with much larger ones, its
    logits have to be

        softcap tanh(logit_scale (hidden weight^T + bias) / softcap)

    of `model.base_model(...).last_hidden_state`.

    Args:
        model: a causal language model of `transformers`, PEFT-wrapped, compiled or sharded by FSDP2
            (every rank calls this) or not.

    Returns:
        The layer, which follows later changes of the model: adapters that are merged or switched
        off, parameters that are sharded. None where the model makes its logits in another way, from
        which the linear functions could not compute them: use `hybrid_loss` then.

    Raises:
        ValueError: `model` is not such a model, or has no values yet.
    """
    try:
        inner = model.get_base_model() if hasattr(model, "get_base_model") else model
        layer, body, config = inner.get_output_embeddings(), inner.base_model, inner.config
        options = config.get_text_config()
    except AttributeError as error:
        raise ValueError(
            f"model: expected a causal language model of transformers, got {type(model).__name__}; "
            "take it out of wrappers other than PEFT's (DDP's model.module)"
        ) from error
    caps = [getattr(options, name, None) for name in SOFTCAPS]
    factors = [getattr(options, name, None) for name in ("logit_scale", "logits_scaling")]
    scale, divisor = (1.0 if factor is None else factor for factor in factors)
    known = all(isinstance(factor, int | float) for factor in (scale, divisor))
    if not isinstance(layer, nn.Module) or config.is_encoder_decoder or not known:
        return None
    output = OutputLayer(
        layer, softcap=next((cap for cap in caps if cap), None), logit_scale=scale / divisor
    )
    tokens = torch.arange(4) % options.vocab_size
    with _undisturbed(model):
        return output if _is_right(output, model, body, tokens[None]) else None


def _is_right(output: OutputLayer, model: Any, body: nn.Module, tokens: Tensor) -> bool:
    """Whether the linear functions compute the model's logits with this layer."""
    device = next((p.device for p in model.parameters() if not p.is_meta), None)
    if device is None:
        raise ValueError("model: on the meta device, where it can't be run; load its weights first")
    tokens, largest = tokens.to(device), torch.inf
    for factor in FACTORS:
        factor = min(factor, largest)
        states, expected = _run(model, body, tokens, factor)
        if len(states) != 1:
            return False
        try:
            head = Head.of("", "", LinearStudent(states[0], output, None, None, 1.0))
        except ValueError:
            return False
        logits = head.hiddens[0].new_empty((4, len(head.weights[0])), dtype=torch.float32)
        if states[0].shape[:2] != (1, 4) or expected.shape != (1, *logits.shape):
            return False
        gemm.write_logits(head, slice(None), logits)
        precision = torch.finfo(head.weights[0].dtype)
        allowed = 1e-4 if precision.bits >= 32 else 0.02
        error = (logits - expected[0].to(logits)).abs().max()
        size = expected.abs().max().to(logits)
        # Logits of 0 would hide a scale, and infinite ones everything.
        if not (error <= allowed * size < torch.inf) or (factor and not size):
            return False
        # What fp16 can hold of either.
        largest = factor * precision.max / (4 * max(float(size), float(states[0].abs().max()), 1.0))
    return True


def _run(model: Any, body: nn.Module, tokens: Tensor, factor: float) -> tuple[list[Tensor], Tensor]:
    """The last hidden states, multiplied by a factor, and the logits that the model makes of them.
    The list has one element in models that make them once."""
    states: list[Tensor] = []

    def multiply(module: nn.Module, inputs: Any, output: Any) -> None:
        if hasattr(output, "last_hidden_state"):
            output.last_hidden_state = output.last_hidden_state * factor
            states.append(output.last_hidden_state)

    handle = body.register_forward_hook(multiply)
    try:
        return states, model(input_ids=tokens, use_cache=False, return_dict=True).logits
    finally:
        handle.remove()


@contextmanager
def _undisturbed(model: Any) -> Iterator[None]:
    """Runs a model in eval mode and not compiled, and leaves it as it was."""
    modes = {module: module.training for module in model.modules()}
    try:
        for module in modes:
            module.training = False
        with torch.compiler.set_stance("force_eager"):
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode
            if hasattr(module, "reshard"):
                module.reshard()  # parameters that FSDP2 leaves whole after a forward
