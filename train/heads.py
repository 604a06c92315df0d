"""Output layers of `transformers` models, as the linear functions of the package take them."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from train.rollout import captured_hidden


@dataclass(frozen=True)
class OutputLayer:
    """How a model computes logits from its last hidden states.

    Attributes:
        layer: has `weight` `[V, D]`, and maybe `bias` `[V]`.
        softcap: bounds the logits to (-softcap, softcap); None if nothing does.
        logit_scale: factor on the logits, before the softcap.
    """

    layer: nn.Module
    softcap: float | None
    logit_scale: float

    def parameters(
        self, vocab_size: int, factor: float = 1.0
    ) -> tuple[Tensor, Tensor | None, float | None, float]:
        """Weight, bias, softcap and scale of `factor` times the first `vocab_size` logits."""
        weight, bias = self.layer.weight, getattr(self.layer, "bias", None)
        assert isinstance(weight, Tensor)
        if len(weight) > vocab_size:
            weight, bias = weight[:vocab_size], None if bias is None else bias[:vocab_size]
        softcap = None if self.softcap is None else self.softcap * factor
        return weight, bias, softcap, self.logit_scale * factor

    def logits(self, hidden: Tensor) -> Tensor:
        logits = self.logit_scale * self.layer(hidden)
        return logits if self.softcap is None else self.softcap * (logits / self.softcap).tanh()


# The names under which configs of `transformers` have the softcap of the logits.
SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")


@torch.no_grad()
def output_layer(model: PreTrainedModel) -> OutputLayer | None:
    """The model's output layer; None if `OutputLayer.logits` does not give the model's logits.

    Both are compared on a few tokens, first with the model's own hidden states, then with much
    larger ones, which reveal a softcap or a factor under a name that is unknown here.
    """
    layer = model.get_output_embeddings()
    if not isinstance(layer, nn.Linear):
        return None
    config = model.config.get_text_config()
    caps = [getattr(config, name, None) for name in SOFTCAPS]
    softcap = next((cap for cap in caps if cap), None)
    factors = [getattr(config, name, None) for name in ("logit_scale", "logits_scaling")]
    if not all(factor is None or isinstance(factor, int | float) for factor in factors):
        return None
    scale, divisor = (1.0 if factor is None else factor for factor in factors)
    output = OutputLayer(layer, softcap, scale / divisor)
    probe = torch.arange(4, device=model.device)[None] % layer.out_features
    for factor in (1.0, 50.0, 1e3):
        with captured_hidden(model, factor) as states:
            expected = model(input_ids=probe, use_cache=False).logits
        if len(states) != 1:
            return None
        logits, expected = output.logits(states[0]).float(), expected.float()
        largest = expected.abs().max()
        allowed = 1e-4 if layer.weight.dtype == torch.float32 else 0.02
        if not bool((logits - expected).abs().max() <= allowed * largest) or not bool(largest):
            return None
    return output
