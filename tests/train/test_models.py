"""Folders of student and teachers that can't be used, and what is looked at before any weights."""

import json
import os
import re

import pytest
import torch
from helpers import config, make_tokenizer, save, write_prompts
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from train.config import NonFiniteError, UserError
from train.loop import train
from train.models import load_models, load_tokenizer

WEIGHTS = "model.safetensors"


def edit(folder, file, **changes):
    path = folder / file
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def change_weights(folder, change):
    weights = change(load_file(folder / WEIGHTS))
    save_file(weights, folder / WEIGHTS, {"format": "pt"})


def cut(folder, size):
    os.truncate(folder / WEIGHTS, (folder / WEIGHTS).stat().st_size + size if size < 0 else size)


def remove_tokenizer(folder):
    for path in folder.glob("tokenizer*"):
        path.unlink()


FAULTS = {
    "no folder": (lambda folder: folder.rename(f"{folder}-moved"), "there is no folder"),
    "no config": (lambda folder: (folder / "config.json").unlink(), "can't load"),
    "config": (lambda folder: (folder / "config.json").write_text("{"), "can't load"),
    "a list": (lambda folder: (folder / "config.json").write_text("[]"), "can't load"),
    "unknown": (lambda folder: edit(folder, "config.json", model_type="x"), "can't load .*`x`"),
    "encoder": (lambda folder: edit(folder, "config.json", model_type="t5"), "can't load .*T5"),
    "type": (lambda folder: edit(folder, "config.json", n_head="x"), "can't load .*'n_head'"),
    "value": (lambda folder: edit(folder, "config.json", n_head=3), "can't load .*divisible"),
    "layers": (lambda folder: edit(folder, "config.json", n_layer=3), "lacks 12 weights .*h.2.att"),
    "shapes": (lambda folder: edit(folder, "config.json", n_inner=7), r"lacks 6 .*\(64,\)"),
    "no weights": (lambda folder: (folder / WEIGHTS).unlink(), "can't load .*no file named"),
    "empty": (lambda folder: cut(folder, 0), "can't load .*header too small"),
    "truncated": (lambda folder: cut(folder, -100), "can't load .*not fully covered"),
    "a weight": (
        lambda folder: change_weights(
            folder, lambda weights: {k: w for k, w in weights.items() if "ln_f.bias" not in k}
        ),
        "lacks 1 weights .*random numbers: transformer.ln_f.bias.",
    ),
}
# A teacher may have no tokenizer, and generates nothing.
STUDENTS_FAULTS = {
    "no tokenizer": (remove_tokenizer, "has no tokenizer"),
    "tokenizer": (lambda folder: (folder / "tokenizer.json").write_text("{"), "can't load .*JSON"),
    "generation": (
        lambda folder: (folder / "generation_config.json").write_text("{"),
        "can't load .*valid JSON",
    ),
    "eos": (
        lambda folder: edit(folder, "generation_config.json", eos_token_id="x"),
        "generation_config.json of .*: eos_token_id is 'x', expected a token id",
    ),
    "adapter": (
        lambda folder: (folder / "adapter_config.json").write_text("{}"),
        "holds a PEFT adapter, not a whole model; merge it",
    ),
}


@pytest.mark.parametrize(
    ("option", "fault"),
    [(option, fault) for option in ("student", "teacher") for fault in FAULTS]
    + [("student", fault) for fault in STUDENTS_FAULTS],
)
def test_folders_that_can_not_be_used_are_named(tmp_path, option, fault):
    run = config(tmp_path)
    damage, message = {**FAULTS, **STUDENTS_FAULTS}[fault]
    damage(tmp_path / option)
    with pytest.raises(UserError) as error:
        train(run)
    assert re.match(rf"{option}: .*'{tmp_path / option}'", str(error.value))
    assert re.search(message, str(error.value))


@pytest.mark.parametrize(
    "changes",
    [
        {"rewards": "train.rewards:missing"},
        {"eval_metrics": "missing:f"},
        {"train_file": "missing"},
        {"eval_file": "missing"},
        {"teacher": "./missing"},
        {"max_completion_length": 60},
        {"report_to": "paper"},
        {"setup": "missing:f"},
        {"resume_from_checkpoint": "missing"},
    ],
)
def test_what_is_wrong_is_told_before_weights_are_loaded(tmp_path, changes, monkeypatch):
    run = config(tmp_path, **changes)
    monkeypatch.setattr("train.models.AutoModelForCausalLM", None)
    with pytest.raises(UserError, match=f"^{next(iter(changes))}: "):
        train(run)


@pytest.mark.parametrize("option", ["student", "teacher"])
def test_a_prompt_with_a_token_that_a_model_lacks(tmp_path, option):
    run = config(tmp_path, train_file=str(tmp_path / "x.jsonl"))
    write_prompts(tmp_path / "x.jsonl", [{"prompt": "a extra b", "answer": "a"}])
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["extra"])
    for name in ("student", "teacher"):
        tokenizer.save_pretrained(tmp_path / name)
    vocab = len(tokenizer)
    other = "teacher" if option == "student" else "student"
    save(tmp_path / other, "gpt2", 0, vocab=vocab)
    tokenizer.save_pretrained(tmp_path / other)
    with pytest.raises(UserError, match=rf"^{option}: .* the id 20 in a prompt.* has 20 entries"):
        train(run)


def test_a_padding_token_without_an_embedding(tmp_path):
    run = config(tmp_path)
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    for name in ("student", "teacher"):
        tokenizer.save_pretrained(tmp_path / name)
    assert train(run)["steps"] == 2


def test_responses_that_could_not_end(tmp_path):
    with pytest.raises(UserError, match=r"vocab_size: responses end with one of the ids \(2,\)"):
        train(config(tmp_path, vocab_size=2))


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        *((name, 0.5) for name in ("min_p", "typical_p", "epsilon_cutoff", "temperature")),
        ("length_penalty", 0.8),
        ("early_stopping", True),
        ("output_scores", True),
        ("pad_token_id", -1),
    ],
)
def test_generation_settings_of_a_checkpoint_are_kept(tmp_path, setting, value):
    run = config(tmp_path)
    edit(tmp_path / "student", "generation_config.json", **{setting: value})
    train(run)
    saved = json.loads((tmp_path / "run/final/generation_config.json").read_text())
    assert saved[setting] == value


def test_without_an_end_no_response_is_kept(tmp_path):
    run = config(tmp_path, mask_truncated_completions=True)
    for file in ("config.json", "generation_config.json"):
        edit(tmp_path / "student", file, eos_token_id=None)
    edit(tmp_path / "student", "tokenizer_config.json", eos_token=None)
    with pytest.raises(UserError, match="mask_truncated_completions: set, but neither"):
        train(run)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"base_model_name_or_path": null}', "\xff"])
def test_an_adapter_without_a_model(tmp_path, text):
    run = config(tmp_path)
    (tmp_path / "teacher/adapter_config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError, match=r"^teacher: .*(names no model|can't load 'None')"):
        train(run)


def test_a_teacher_with_an_adapter(tmp_path):
    from peft import LoraConfig, get_peft_model

    run = config(tmp_path, teacher=str(tmp_path / "adapter"))
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "teacher")
    model = get_peft_model(base, LoraConfig(target_modules=["c_attn"], init_lora_weights=False))
    model.save_pretrained(tmp_path / "adapter")
    make_tokenizer().save_pretrained(tmp_path / "adapter")
    tokenizer = load_tokenizer(run, run.student)
    models = load_models(run, run.student, tokenizer)
    ids = torch.arange(4)[None]
    torch.testing.assert_close(models.teachers[0](ids).logits, model(ids).logits)
    assert train(run)["steps"] == 2


@pytest.mark.parametrize("tokenizer", ["none", "damaged"])
def test_a_teacher_without_a_tokenizer_is_taken_with_a_warning(tmp_path, tokenizer):
    run = config(tmp_path)
    if tokenizer == "none":
        remove_tokenizer(tmp_path / "teacher")
    else:
        (tmp_path / "teacher" / "tokenizer.json").write_text("{")
    reason = "has no tokenizer" if tokenizer == "none" else "can't load"
    with pytest.warns(UserWarning, match=f"assumed to be those of the student, because .*{reason}"):
        load_tokenizer(run, run.student)
    assert len(AutoTokenizer.from_pretrained(run.student)) == 20


@pytest.mark.parametrize("evaluates", [False, True])
@pytest.mark.parametrize("factor", [1e30, torch.nan])
@pytest.mark.parametrize("option", ["student", "teacher"])
def test_logits_that_are_not_finite_are_told(tmp_path, option, factor, evaluates):
    held_out = str(write_prompts(tmp_path / "eval.jsonl")) if evaluates else None
    run = config(tmp_path, eval_file=held_out)
    change_weights(tmp_path / option, lambda weights: {k: w * factor for k, w in weights.items()})
    with pytest.raises(NonFiniteError, match=f"{option}'s logits are infinite or NaN"):
        train(run)
