"""`python -m experiments filter`: what gradient filtering drops and saves, on a trained model.

A small language model is trained on the sources of the Python standard library, a corpus that every
machine with this package has. The student is the trained model, its teacher the same model half way
through the training, as a reference model in RL would be. Rows are positions of held-out text, each
with a token sampled from the student. It takes about ten minutes on two cores.
"""

import json
import sysconfig
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from bench.linear import LinearProblem
from bench.measure import relative_error
from bench.summary import cpu_name
from hybrid_kernels import LinearTeacher, linear_hybrid_loss

VOCABULARY, SIZE, LENGTH, BATCH, STEPS = 8192, 256, 128, 8, 800
ROWS = 1024
EPSILONS = (0.0, 1e-6, 1e-5, 1e-4)
ROUNDS = 7


def corpus() -> tuple[Tensor, Tensor]:
    """BPE token ids of the standard library's sources: those to train on, those held out."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    files = sorted(Path(sysconfig.get_path("stdlib")).glob("**/*.py"))
    files = [path for path in files if not {"site-packages", "test", "tests"} & {*path.parts}]
    texts = [path.read_text(errors="ignore") for path in files]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    held_out = texts[::20]
    training = [text for i, text in enumerate(texts) if i % 20]

    def ids(parts: list[str]) -> Tensor:
        return torch.tensor([t for part in parts for t in tokenizer.encode(part).ids])

    return ids(training), ids(held_out)


def train(tokens: Tensor) -> tuple[Any, Any]:
    """Trains on the next token; returns the model half way through and at the end."""
    import copy

    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    model = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=VOCABULARY,
            hidden_size=SIZE,
            intermediate_size=3 * SIZE,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            tie_word_embeddings=True,
        )
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.05)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, STEPS, pct_start=0.1)
    half_way = None
    for step in range(STEPS):
        starts = torch.randint(0, len(tokens) - LENGTH - 1, (BATCH,))
        ids = torch.stack([tokens[s : s + LENGTH] for s in starts])
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        if step % 100 == 0:
            print(f"step {step:4}: {loss.detach():.3f} nats a token", flush=True)
        if step == STEPS // 2:
            half_way = copy.deepcopy(model)
    return half_way, model


@torch.no_grad()
def problem(student: Any, teacher: Any, tokens: Tensor) -> LinearProblem:
    """Both models on held-out text, with tokens sampled from the student, normal advantages."""
    generator = torch.Generator().manual_seed(1)
    ids = tokens[: ROWS // LENGTH * LENGTH].view(-1, LENGTH)
    hidden, teacher_hidden = (
        model.model(ids).last_hidden_state.flatten(0, 1) for model in (student, teacher)
    )
    weight = student.lm_head.weight.detach().clone()
    sampled = torch.multinomial((hidden @ weight.T).softmax(-1), 1, generator=generator)[:, 0]
    advantages = torch.randn(len(hidden), generator=generator)
    linear_teacher = LinearTeacher(teacher_hidden, teacher.lm_head.weight.detach())
    leaves = (hidden.clone().requires_grad_(), weight.requires_grad_())
    return LinearProblem(*leaves, linear_teacher, sampled, advantages, "reverse_kl")


def measure(given: LinearProblem, chunk_rows: int) -> list[dict[str, Any]]:
    """For each bound eps: time, columns kept, norm dropped, and the errors of both gradients."""
    leaves, exact = (given.hidden, given.weight), list[Tensor]()
    times: dict[float, list[float]] = {eps: [] for eps in EPSILONS}
    rows: dict[float, dict[str, Any]] = {}
    # The bounds take turns, so that a busy machine slows all of them alike.
    for attempt in range(ROUNDS + 1):
        for eps in EPSILONS:
            for leaf in leaves:
                leaf.grad = None
            start = time.perf_counter()
            result = linear_hybrid_loss(
                *given[:5], grad_filter=eps, chunk_rows=chunk_rows, num_tokens=len(given.hidden)
            )
            result.loss.backward()
            times[eps].append(1e3 * (time.perf_counter() - start))
            if attempt:
                continue
            gradients = [leaf.grad for leaf in leaves if leaf.grad is not None]
            if eps == 0:
                exact = gradients
            rows[eps] = {
                "eps": eps,
                "chunk_rows": chunk_rows,
                # With several chunks this counts the columns that any of them keeps.
                "kept": float((gradients[1] != 0).any(1).float().mean()),
                "dropped_norm": 0.0 if result.dropped_norm is None else float(result.dropped_norm),
                "error_hidden": relative_error(gradients[0], exact[0]),
                "error_weight": relative_error(gradients[1], exact[1]),
            }
    for eps, row in rows.items():
        row["median_ms"] = round(median(times[eps][1:]), 2)
    return list(rows.values())


def table(rows: list[dict[str, Any]], stamp: dict[str, Any]) -> str:
    lines = [
        f"N={ROWS:,}, V={VOCABULARY:,}, D={SIZE}, dense + sparse, fp32, {stamp['device']}, torch "
        f"{stamp['torch']}. Perplexity of the student {stamp['perplexity']:.1f}, KL(student || "
        f"teacher) {stamp['kl']:.3f} nats, entropy {stamp['entropy']:.2f} nats.",
        "",
        "| chunk rows | eps | columns kept | ms | of exact | dropped norm | error of dh | of dW |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        exact = next(r for r in rows if r["eps"] == 0 and r["chunk_rows"] == row["chunk_rows"])
        lines.append(
            f"| {row['chunk_rows']} | {row['eps']:g} | {row['kept']:.1%} | {row['median_ms']:.0f} "
            f"| {row['median_ms'] / exact['median_ms']:.2f} | {row['dropped_norm']:.1e} "
            f"| {row['error_hidden']:.1e} | {row['error_weight']:.1e} |"
        )
    return "\n".join(lines) + "\n"


def main(folder: Path) -> None:
    training, held_out = corpus()
    print(f"{len(training):,} tokens to train on", flush=True)
    teacher, student = train(training)
    given = problem(student.eval(), teacher.eval(), held_out)
    rows = [row for chunk_rows in (ROWS, 128) for row in measure(given, chunk_rows)]
    with torch.no_grad():
        result = linear_hybrid_loss(given.hidden, given.weight, given.teacher)
        ids = held_out[:ROWS].view(-1, LENGTH)
        perplexity = float(student(input_ids=ids, labels=ids).loss.exp())
    assert result.divergence is not None
    stamp = {
        "device": cpu_name(),
        "torch": torch.__version__,
        "perplexity": perplexity,
        "kl": float(result.divergence.mean()),
        "entropy": float(result.entropy.mean()),
    }
    (folder / "filter.json").write_text(json.dumps({**stamp, "rows": rows}, indent=1) + "\n")
    (folder / "filter.md").write_text(table(rows, stamp))
    print(table(rows, stamp))
