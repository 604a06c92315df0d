"""Tiny checkpoints of two families, a word tokenizer, prompts, one micro-batch, and a small run."""

import json
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from train.batch import collect
from train.config import TrainConfig, make_config
from train.data import PromptStream, read_examples
from train.models import load_models, load_tokenizer
from train.rewards import Scorer
from train.rollout import Sampler

WORDS = ["<pad>", "<s>", "</s>", "<unk>", *"abcdefghijklmnop"]
END = WORDS.index("</s>")


def make_tokenizer(pad: str = "<pad>") -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, "<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token=pad,
    )


def make_model(family: str, seed: int, vocab: int = len(WORDS), dropout: float = 0.0):
    torch.manual_seed(seed)
    ids = {"bos_token_id": 1, "eos_token_id": END, "pad_token_id": 0}
    if family == "gpt2":
        config = GPT2Config(
            vocab_size=vocab,
            n_positions=64,
            n_embd=16,
            n_layer=2,
            n_head=2,
            attn_pdrop=dropout,
            resid_pdrop=dropout,
            embd_pdrop=dropout,
            **ids,
        )
        model: PreTrainedModel = GPT2LMHeadModel(config)
    else:
        config = LlamaConfig(
            vocab_size=vocab,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
            max_position_embeddings=64,
            **ids,
        )
        model = LlamaForCausalLM(config)
    # With the usual initialisation, predictions are nearly uniform over the vocabulary.
    for parameter in model.parameters():
        if parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


def save(folder: Path, family: str, seed: int, **options) -> Path:
    make_model(family, seed, **options).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


PROMPTS = ["a b c", "d", "e f g h i j", "k l", "m n o p a b c d", "b b", "c a b", "p"]


def write_prompts(path: Path, rows: list[dict] | None = None) -> Path:
    if rows is None:
        rows = [{"prompt": text, "answer": text.split()[0]} for text in PROMPTS]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def options(folder: Path, family: str = "gpt2", **changes) -> dict:
    """The options of a small run in `folder`, whose checkpoints and prompts are written there."""
    for seed, name in enumerate(("student", "teacher")):
        if not (folder / name).exists():
            save(folder / name, family, seed)
    data = write_prompts(folder / "data.jsonl")
    values = {
        "output_dir": str(folder / "run"),
        "student": str(folder / "student"),
        "teacher": str(folder / "teacher"),
        "train_file": str(data),
        "rewards": ["train.rewards:exact_match"],
        "num_generations": 4,
        "max_completion_length": 5,
        "max_steps": 2,
        "per_device_train_batch_size": 8,
        "learning_rate": 1e-2,
        "report_to": "none",
    }
    return {**values, **changes}


def config(folder: Path, family: str = "gpt2", **changes) -> TrainConfig:
    return make_config(options(folder, family, **changes))


def read_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


REWARD = """
def length(prompts, completions):
    return [len(text.split()) / 5 for text in completions]
"""


def prepared(tmp_path, **changes):
    """A config, its models and one micro-batch."""
    (tmp_path / "reward.py").write_text(REWARD)
    changes = {"rewards": [f"{tmp_path}/reward.py:length"], "reward_weight": 2.0, **changes}
    run = config(tmp_path, **changes)
    models = load_models(run, run.student, load_tokenizer(run, run.student))
    sampler = Sampler.create(run, models.student, models.tokenizer, models.vocab_size)
    prompts = PromptStream(read_examples("train_file", run.train_file, models.tokenizer), seed=0)
    torch.manual_seed(0)
    batch = collect(run, models, sampler, Scorer("rewards", run.rewards), prompts)
    return run, models, batch


def gradient(models):
    flat = torch.cat([weight.grad.flatten() for weight in models.student.parameters()])
    models.student.zero_grad()
    return flat


TIMINGS = ("seconds", "tokens_per_second")
RUN = {
    "max_steps": 6,
    "eval_steps": 5,
    "save_steps": 2,
    "gradient_accumulation_steps": 2,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 2,
    "reward_weight": {"kind": "cosine", "start": 0, "end": 4},
}
# Uses every global generator, so that a resume fails the tests if it forgets one. Kills its process
# at the call number in KILL_AT_CALL, or at the use of a file number KILL_AT_FILE.
NOISY_REWARD = """
import os
import random
import signal
import sys
import numpy
import torch

calls = 0
files = 0

def count(event, arguments):
    global files
    if event in ("open", "os.rename", "os.mkdir", "os.rmdir", "os.remove"):
        files += 1
        if os.environ.get("KILL_AT_FILE") == str(files):
            os.kill(os.getpid(), signal.SIGKILL)

if "KILL_AT_FILE" in os.environ:
    sys.addaudithook(count)

def noisy(prompts, completions):
    global calls
    calls += 1
    if os.environ.get("KILL_AT_CALL") == str(calls):
        os.kill(os.getpid(), signal.SIGKILL)
    noise = random.random() + float(numpy.random.rand()) + float(torch.rand(()))
    return [noise * (i % 3) + len(text) for i, text in enumerate(completions)]
"""


def run_options(folder: Path, **changes) -> dict:
    (folder / "reward.py").write_text(NOISY_REWARD)
    held_out = str(write_prompts(folder / "eval.jsonl"))
    rewards = [f"{folder}/reward.py:noisy"]
    return options(folder, **{**RUN, "eval_file": held_out, "rewards": rewards, **changes})


def rows(output: Path, name: str = "metrics") -> list[dict]:
    lines = read_lines(output / f"{name}.jsonl")
    return [{key: value for key, value in row.items() if key not in TIMINGS} for row in lines]
