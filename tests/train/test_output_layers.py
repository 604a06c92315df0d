"""Losses from hidden states equal losses from the models' logits."""

from dataclasses import replace

import pytest
import torch
from helpers import END, WORDS, config, gradient, make_model, prepared
from transformers import (
    Cohere2Config,
    Cohere2ForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    RecurrentGemmaConfig,
    RecurrentGemmaForCausalLM,
)

from train.heads import output_layer
from train.models import load_models
from train.objective import ScheduledWeights, gradient_norms, micro_batch_loss

SIZES = {
    "vocab_size": len(WORDS),
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": END,
    "pad_token_id": 0,
}
FAMILIES = {
    "gemma2": lambda: Gemma2ForCausalLM(
        Gemma2Config(**SIZES, head_dim=8, final_logit_softcapping=2.0)
    ),
    "cohere2": lambda: Cohere2ForCausalLM(Cohere2Config(**SIZES, logit_scale=0.3)),
    "granite": lambda: GraniteForCausalLM(GraniteConfig(**SIZES, logits_scaling=4.0)),
    "recurrent_gemma": lambda: RecurrentGemmaForCausalLM(
        RecurrentGemmaConfig(**{**SIZES, "num_hidden_layers": 3}, lru_width=16)
    ),
    "llama": lambda: make_model("llama", 0),
    "gpt2": lambda: make_model("gpt2", 0),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_output_layer_of_a_family(family, monkeypatch):
    torch.manual_seed(0)
    model = FAMILIES[family]().eval()
    for parameter in model.parameters():
        if parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=0.3)
    head = output_layer(model)
    assert head is not None
    expected = {"gemma2": (2.0, 1.0), "cohere2": (None, 0.3), "granite": (None, 0.25)}
    expected["recurrent_gemma"] = (30.0, 1.0)
    assert (head.softcap, head.logit_scale) == expected.get(family, (None, 1.0))
    ids = torch.randint(3, len(WORDS), (2, 6))
    hidden = model.base_model(ids).last_hidden_state
    torch.testing.assert_close(head.logits(hidden), model(ids).logits, rtol=1e-5, atol=1e-5)
    # A model that does something else to its logits is recognised.
    forward = type(model).forward

    def changed(change):
        def call(self, *args, **options):
            output = forward(self, *args, **options)
            output.logits = change(output.logits)
            return output

        return call

    changes = [lambda z: 1.01 * z, torch.zeros_like]
    if head.softcap is None:  # next to a small softcap, a wide one changes almost nothing
        changes.append(lambda z: 500 * (z / 500).tanh())
    for change in changes:
        monkeypatch.setattr(type(model), "forward", changed(change))
        assert output_layer(model) is None
    monkeypatch.setattr(type(model), "forward", forward)
    if family == "llama":
        model.config.logit_scale = "inv_sqrt_d_model"  # a value in MPT configs
        assert output_layer(model) is None
        model.config.logit_scale = None
        assert output_layer(model) is not None


@pytest.mark.parametrize("vocab_size", [None, 17])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_fused_losses_equal_those_from_logits(tmp_path, family, vocab_size):
    changes = {"temperature": 0.7, "teacher_temperature": 2.0, "vocab_size": vocab_size}
    run, models, batch = prepared(tmp_path, family=family, **changes)
    assert len(models.heads) == 2
    weights, count = ScheduledWeights(2.0, 0.9, 0.7), int(batch.mask.sum())
    results, gradients, norms = [], [], []
    for heads in (models.heads, ()):
        variant = replace(models, heads=heads)
        assert variant.loss_inputs(batch.rollout).linear == bool(heads)
        result = micro_batch_loss(run, variant, batch, weights, count)
        result.loss.backward()
        results.append(result)
        gradients.append(gradient(variant))
        norms.append(gradient_norms(run, variant, batch, weights))
    for fused, plain in zip(results[0], results[1], strict=True):
        assert (fused is None) == (plain is None)
        if plain is not None:
            torch.testing.assert_close(fused, plain, rtol=1e-5, atol=2e-6)
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=2e-6)
    assert norms[0] == pytest.approx(norms[1], rel=1e-4)


def test_fused_losses_can_be_switched_off_and_warn_where_they_are_impossible(tmp_path, monkeypatch):
    run = config(tmp_path, fused_linear=False)
    assert load_models(run, run.student).heads == ()
    monkeypatch.setattr("train.models.output_layer", lambda model: None)
    run = config(tmp_path)
    with pytest.warns(UserWarning, match="fused_linear: a model's output layer"):
        assert load_models(run, run.student).heads == ()
