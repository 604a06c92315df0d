"""Log-probabilities with padding, several EOS tokens, and sampling settings in the checkpoint."""

import pytest
import torch
from helpers import END, PROMPTS, config, make_model, make_tokenizer, save
from transformers import AutoModelForCausalLM, GenerationConfig

from train.data import Example, pad_left
from train.loop import train
from train.models import load_models, load_tokenizer
from train.rollout import (
    Rollout,
    Sampler,
    completion_logits,
    completion_mask,
    eos_token_ids,
    generate,
    position_ids,
)


def examples(texts=PROMPTS) -> list[Example]:
    tokenizer = make_tokenizer()
    return [Example(text, tokenizer(text)["input_ids"], {}) for text in texts]


def sampler(**changes) -> Sampler:
    values = {"eos_ids": (END,), "pad_id": 0, "vocab_size": 20, "max_completion_length": 6}
    return Sampler(**{**values, **changes})


def test_completion_mask_keeps_the_first_eos_and_goes_by_position():
    tokens = torch.tensor([[5, 2, 2, 2], [2, 5, 5, 5], [5, 6, 7, 8], [5, 6, 7, 9], [5, 0, 0, 2]])
    mask, truncated = completion_mask(tokens, eos_ids=[2, 9])
    expected = [[1, 1, 0, 0], [1, 0, 0, 0], [1, 1, 1, 1], [1, 1, 1, 1], [1, 1, 1, 1]]
    assert mask.int().tolist() == expected
    assert truncated.tolist() == [False, False, True, False, False]


def test_positions_start_at_the_first_real_token():
    ids, mask = pad_left([[7, 8, 9], [5]], pad_id=0)
    assert ids.tolist() == [[7, 8, 9], [0, 0, 5]]
    assert position_ids(mask).tolist() == [[0, 1, 2], [0, 0, 0]]


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_left_padding_does_not_change_log_probs(family):
    model = make_model(family, 0)
    torch.manual_seed(1)
    rollout = generate(model, examples(), sampler())
    together = completion_logits(model, rollout, 20).log_softmax(-1)
    assert rollout.mask.sum() > 20
    for row, example in enumerate(examples()):
        tokens = rollout.tokens[row]
        alone = torch.tensor([example.token_ids + tokens.tolist()])
        logits = model(alone).logits[0, len(example.token_ids) - 1 : -1].log_softmax(-1)
        mask = rollout.mask[row]
        torch.testing.assert_close(together[row][mask], logits[mask], atol=2e-6, rtol=0)
        sampled = logits.gather(1, tokens[:, None]).squeeze(1)
        assert rollout.sampler_log_prob is not None
        torch.testing.assert_close(
            rollout.sampler_log_prob[row][mask], sampled[mask], atol=2e-6, rtol=0
        )


def test_models_without_logits_to_keep_give_the_same_logits():
    class Plain(torch.nn.Module):
        """A causal model whose forward has only the necessary parameters."""

        def __init__(self):
            super().__init__()
            self.inner = make_model("llama", 0)

        def forward(self, input_ids, attention_mask, use_cache):
            return self.inner(
                input_ids=input_ids, attention_mask=attention_mask, use_cache=use_cache
            )

    plain = Plain()
    rollout = generate(plain.inner, examples(["a b c", "d e f"]), sampler())
    expected = completion_logits(plain.inner, rollout, 20)
    got = completion_logits(plain, rollout, 20)
    torch.testing.assert_close(got, expected, atol=1e-6, rtol=0)


def test_rollout_ignores_the_checkpoint_generation_config():
    plain, configured = make_model("gpt2", 0), make_model("gpt2", 0)
    configured.generation_config = GenerationConfig(
        do_sample=True,
        top_k=2,
        top_p=0.3,
        temperature=0.1,
        repetition_penalty=5.0,
        no_repeat_ngram_size=1,
        min_new_tokens=6,
        bad_words_ids=[[4], [5]],
        eos_token_id=[END, 7],
    )
    original = configured.generation_config.to_dict()
    drawn = []
    for model in (plain, configured):
        torch.manual_seed(3)
        drawn.append(generate(model, examples(PROMPTS * 4), sampler()))
    assert torch.equal(drawn[0].input_ids, drawn[1].input_ids)
    assert torch.equal(drawn[0].mask, drawn[1].mask)
    # With the checkpoint's top_k=2, there would be fewer distinct first tokens.
    assert drawn[1].tokens[:, 0].unique().numel() > 8
    assert configured.generation_config.to_dict() == original
    assert eos_token_ids(configured, make_tokenizer()) == (END, 7)


def test_checkpoints_keep_their_generation_config(tmp_path):
    options = {"repetition_penalty": 1.3, "top_k": 50, "do_sample": True, "eos_token_id": [END, 7]}
    save(tmp_path / "student", "gpt2", 0)
    GenerationConfig(**options).save_pretrained(tmp_path / "student")
    train(config(tmp_path, max_steps=1, save_steps=1))
    for folder in ("run/final", "run/checkpoints/step-000001/model"):
        saved = AutoModelForCausalLM.from_pretrained(tmp_path / folder).generation_config.to_dict()
        assert {name: saved[name] for name in options} == options


def test_pad_equal_to_eos():
    torch.manual_seed(0)
    model = make_model("gpt2", 0)
    rollout = generate(model, examples(PROMPTS * 4), sampler(pad_id=END))
    ended = ~rollout.truncated
    assert ended.any()
    assert rollout.truncated.any()
    for tokens, mask in zip(rollout.tokens[ended], rollout.mask[ended], strict=True):
        assert tokens[mask][-1] == END
        assert (tokens[mask][:-1] != END).all()
    assert rollout.mask[rollout.truncated].all()
    # EOS ids that pad a prompt don't end its response.
    assert rollout.mask[:, 0].all()


def test_vocabulary_beyond_the_shared_prefix_is_never_drawn():
    model = make_model("gpt2", 0)
    torch.manual_seed(0)
    rollout = generate(model, examples(PROMPTS * 4), sampler(vocab_size=9))
    assert int(rollout.tokens.max()) < 9
    log_probs = completion_logits(model, rollout, 9).log_softmax(-1)
    trained = log_probs.gather(2, rollout.tokens[..., None]).squeeze(2)
    assert rollout.sampler_log_prob is not None
    mask = rollout.mask
    torch.testing.assert_close(trained[mask], rollout.sampler_log_prob[mask], atol=2e-6, rtol=0)


def test_dropout_is_off_and_gradients_flow(tmp_path):
    save(tmp_path / "student", "gpt2", 0, dropout=0.5)
    run = config(tmp_path)
    models = load_models(run, run.student, load_tokenizer(run, run.student))
    rollout = generate(models.student, examples(), sampler())
    models.heads = ()
    first, second = models.loss_inputs(rollout), models.loss_inputs(rollout)
    assert torch.equal(first.student[0], second.student[0])
    assert first.student[0].requires_grad
    assert not first.teacher.requires_grad


def test_rollout_fields_line_up():
    rollout = generate(make_model("llama", 0), examples(), sampler())
    assert isinstance(rollout, Rollout)
    width = rollout.tokens.shape[1]
    assert torch.equal(rollout.input_ids[:, -width:], rollout.tokens)
    assert torch.equal(rollout.attention_mask[:, -width:].bool(), rollout.mask)
