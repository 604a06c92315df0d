"""Output layers of `transformers` models, as the linear ops of the package take them."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from train.rollout import captured_hidden


@dataclass(frozen=True)
class OutputLayer:
    """How a model makes logits of its last hidden states.

    Attributes:
        layer: has `weight` `[V, D]`, and maybe `bias` `[V]`.
        softcap: of the logits, or None.
        logit_scale: factor on the logits, before the softcap.
    """

    layer: nn.Module
    softcap: float | None
    logit_scale: float

    def tensors(self, vocab_size: int) -> tuple[Tensor, Tensor | None]:
        """Weight and bias of the first `vocab_size` tokens."""
        weight, bias = self.layer.weight, getattr(self.layer, "bias", None)
        assert isinstance(weight, Tensor)
        if len(weight) > vocab_size:
            weight, bias = weight[:vocab_size], None if bias is None else bias[:vocab_size]
        return weight, bias

    def logits(self, hidden: Tensor) -> Tensor:
        logits = self.logit_scale * self.layer(hidden)
        return logits if self.softcap is None else self.softcap * (logits / self.softcap).tanh()


@torch.no_grad()
def output_layer(model: PreTrainedModel) -> OutputLayer | None:
    """The model's output layer; None where its logits are not made as an `OutputLayer` makes them,
    which is tried out on a few tokens."""
    layer = model.get_output_embeddings()
    if not isinstance(layer, nn.Linear):
        return None
    config = model.config
    scale = getattr(config, "logit_scale", 1.0) / getattr(config, "logits_scaling", 1.0)
    softcap = getattr(config, "final_logit_softcapping", None)
    found = OutputLayer(layer, softcap, scale)
    probe = torch.arange(4, device=model.device)[None] % layer.out_features
    with captured_hidden(model) as states:
        expected = model(input_ids=probe, use_cache=False).logits.float()
    if len(states) != 1:
        return None
    error = (found.logits(states[0]).float() - expected).abs().max()
    return found if bool(error <= 0.02 * expected.abs().max()) else None
