"""Output layers of models, and that losses from hidden states equal losses from the logits."""

from dataclasses import replace

import peft
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
    T5Config,
    T5ForConditionalGeneration,
)

from hybrid_kernels import LinearTeacher, linear_token_terms, output_layer, token_terms
from train.models import load_models, load_tokenizer
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


def forbid_one(logits):
    return logits.index_fill(-1, torch.tensor(3), -torch.inf)


def assert_gives_the_logits_of(model, head, as_teacher=True):
    """Asserts that log-probabilities are the model's, from the layer of a student and a teacher."""
    ids = torch.randint(3, len(WORDS), (2, 6))
    hidden, logits = model.base_model(ids).last_hidden_state.detach(), model(ids).logits.detach()
    expected = logits.double().log_softmax(-1).gather(-1, ids[..., None])[..., 0]
    results = [linear_token_terms(hidden, head, token_ids=ids).log_prob]
    if as_teacher:
        results.append(token_terms(logits, LinearTeacher(hidden, head), ids).teacher_log_prob)
    for got in results:
        torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-5)


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
    assert_gives_the_logits_of(model, head)
    # A model that does something else to its logits is recognised.
    forward = type(model).forward

    def changed(change):
        def call(self, *args, **options):
            output = forward(self, *args, **options)
            output.logits = change(output.logits)
            return output

        return call

    changes = [lambda z: 1.01 * z, torch.zeros_like, forbid_one]
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


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_output_layer_of_a_16_bit_model(dtype):
    """Its hidden states reach 200, so that fp16 can't hold a thousand times as much."""
    model = make_model("llama", 0)
    torch.nn.init.constant_(model.model.norm.weight, 100)
    model = model.to(dtype)
    assert output_layer(model) is not None
    model.config.logit_scale = 1.1  # which the model does not have
    assert output_layer(model) is None


@pytest.mark.parametrize("change", [lambda z: z + 0.02, forbid_one], ids=["bias", "mask"])
def test_what_is_added_to_the_logits_of_a_16_bit_model_is_seen(change, monkeypatch):
    model = make_model("llama", 0).bfloat16()
    forward = type(model).forward

    def changed(self, *arguments, **options):
        output = forward(self, *arguments, **options)
        output.logits = change(output.logits)
        return output

    monkeypatch.setattr(type(model), "forward", changed)
    assert output_layer(model) is None


ADAPTERS = {
    "elsewhere": {"target_modules": ["q_proj"]},
    "lora": {"target_modules": ["q_proj", "lm_head"]},
    "saved": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.filterwarnings("ignore:.*tie_word_embeddings")
def test_the_output_layer_of_a_model_with_adapters(adapter, tied):
    model = make_model("llama", 0)
    if tied:
        model.config.tie_word_embeddings = True
        model.lm_head.weight = model.model.embed_tokens.weight
    options = {"r": 2, "init_lora_weights": False, "lora_dropout": 0.5}
    model = peft.get_peft_model(model, peft.LoraConfig(**options, **ADAPTERS[adapter]))
    head = output_layer(model.train())
    ids, plain = torch.tensor([[3, 4, 5]]), model.get_base_model()
    if adapter == "lora":
        assert head.weight is plain.lm_head
        hidden = model.get_base_model().model(ids).last_hidden_state
        with pytest.raises(ValueError, match=r"student_weight: the adapter .* training mode"):
            linear_token_terms(hidden, head, token_ids=ids)
    model.eval()
    assert_gives_the_logits_of(plain, head, as_teacher=adapter != "lora")
    with model.disable_adapter():
        assert_gives_the_logits_of(plain, head)
    model.merge_adapter()
    assert_gives_the_logits_of(plain, head)


@pytest.mark.parametrize("fails", [False, True])
def test_a_model_is_left_as_it_was(fails, monkeypatch):
    model = make_model("gpt2", 0, dropout=0.5).train()
    model.transformer.h[0].eval()
    modes = [module.training for module in model.modules()]
    random = torch.get_rng_state()
    if fails:
        monkeypatch.setattr(type(model.transformer.ln_f), "forward", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            output_layer(model)
    else:
        assert output_layer(model) is not None
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), random)
    assert not any(module._forward_hooks for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_compiled_model_is_not_compiled_for_this():
    def backend(*_):
        raise AssertionError("compiled")

    model = make_model("llama", 0)
    assert output_layer(torch.compile(model, backend=backend)).layer is model.lm_head


def test_models_whose_logits_are_made_in_another_way():
    model = make_model("llama", 0)
    forward = model.lm_head.forward
    model.lm_head.forward = lambda hidden: 0.25 * forward(hidden)
    assert output_layer(model) is None
    assert output_layer(model.model) is None
    dora = peft.LoraConfig(target_modules=["lm_head"], use_dora=True)
    assert output_layer(peft.get_peft_model(make_model("llama", 0), dora)) is None
    sizes = {"d_model": 8, "d_kv": 4, "d_ff": 8, "num_layers": 1, "num_heads": 2}
    assert output_layer(T5ForConditionalGeneration(T5Config(vocab_size=20, **sizes))) is None


def test_what_is_not_a_model_is_refused():
    for wrong in (None, torch.nn.Linear(2, 3), torch.nn.DataParallel(make_model("llama", 0))):
        kind = type(wrong).__name__
        with pytest.raises(ValueError, match=f"model: expected a causal .*, got {kind}; take it"):
            output_layer(wrong)
    with pytest.raises(ValueError, match="model: on the meta device"):
        output_layer(make_model("llama", 0).to("meta"))


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
    assert load_models(run, run.student, load_tokenizer(run, run.student)).heads == ()
    monkeypatch.setattr("train.models.output_layer", lambda model: None)
    run = config(tmp_path)
    with pytest.warns(UserWarning, match="fused_linear: a model's output layer"):
        assert load_models(run, run.student, load_tokenizer(run, run.student)).heads == ()
