"""`python -m bench filter`: what gradient filtering drops and saves, on a model that was trained.

A small language model is trained on the Python standard library, the one corpus that every machine
with this package has. The student is the model at the end, its teacher (a reference, as in RL) the
model half way; rows are held-out tokens, with one sampled from the student for each. About ten
minutes on two cores.
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
from hybrid_kernels import LinearTeacher, linear_hybrid_loss

VOCABULARY, SIZE, LENGTH, BATCH, STEPS = 8192, 256, 128, 8, 800
ROWS = 1024
EPSILONS = (0.0, 1e-6, 1e-5, 1e-4)
ROUNDS = 7


def corpus() -> tuple[Tensor, Tensor]:
    """Token ids of the standard library's sources, to train on and held out; BPE."""
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
    seen = [text for i, text in enumerate(texts) if i % 20]

    def ids(parts: list[str]) -> Tensor:
        return torch.tensor([t for part in parts for t in tokenizer.encode(part).ids])

    return ids(seen), ids(held_out)


def train(tokens: Tensor) -> tuple[Any, Any]:
    """The model half way and at the end, by the cross-entropy of the next token."""
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
    half = None
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
            half = copy.deepcopy(model)
    return half, model


@torch.no_grad()
def problem(student: Any, teacher: Any, tokens: Tensor) -> LinearProblem:
    """Held-out hidden states of both, a token sampled from the student, normal advantages."""
    generator = torch.Generator().manual_seed(1)
    ids = tokens[: ROWS // LENGTH * LENGTH].view(-1, LENGTH)
    hidden, theirs = (m.model(ids).last_hidden_state.flatten(0, 1) for m in (student, teacher))
    weight = student.lm_head.weight.detach().clone()
    sampled = torch.multinomial((hidden @ weight.T).softmax(-1), 1, generator=generator)[:, 0]
    advantages = torch.randn(len(hidden), generator=generator)
    other = LinearTeacher(theirs, teacher.lm_head.weight.detach())
    leaves = (hidden.clone().requires_grad_(), weight.requires_grad_())
    return LinearProblem(*leaves, other, sampled, advantages, "reverse_kl")


def measure(own: LinearProblem, chunk_rows: int) -> list[dict[str, Any]]:
    """Time, columns kept, what was dropped, and the error of both gradients, for each bound."""
    exact: list[Tensor] = []
    times: dict[float, list[float]] = {eps: [] for eps in EPSILONS}
    rows: dict[float, dict[str, Any]] = {}
    for attempt in range(ROUNDS + 1):  # in turns, so that all see the same machine
        for eps in EPSILONS:
            own.hidden.grad = own.weight.grad = None
            start = time.perf_counter()
            result = linear_hybrid_loss(
                *own[:5], grad_filter=eps, chunk_rows=chunk_rows, num_tokens=len(own.hidden)
            )
            result.loss.backward()
            times[eps].append(1e3 * (time.perf_counter() - start))
            gradients = [own.hidden.grad, own.weight.grad]
            if attempt:
                continue
            assert gradients[0] is not None
            assert gradients[1] is not None
            found = [gradient.clone() for gradient in gradients if gradient is not None]
            exact += [] if exact else found
            errors = [float((f - e).norm() / e.norm()) for f, e in zip(found, exact, strict=True)]
            rows[eps] = {
                "eps": eps,
                "chunk_rows": chunk_rows,
                # (Of a single chunk; of several it is those that any of them has kept.)
                "kept": float((found[1] != 0).any(1).float().mean()),
                "dropped_norm": 0.0 if result.dropped_norm is None else float(result.dropped_norm),
                "error_hidden": errors[0],
                "error_weight": errors[1],
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
        plain = next(r for r in rows if r["eps"] == 0 and r["chunk_rows"] == row["chunk_rows"])
        lines.append(
            f"| {row['chunk_rows']} | {row['eps']:g} | {row['kept']:.1%} | {row['median_ms']:.0f} "
            f"| {row['median_ms'] / plain['median_ms']:.2f} | {row['dropped_norm']:.1e} "
            f"| {row['error_hidden']:.1e} | {row['error_weight']:.1e} |"
        )
    return "\n".join(lines) + "\n"


def main(folder: Path) -> None:
    from bench.conftest import _cpu

    folder.mkdir(parents=True, exist_ok=True)
    seen, held_out = corpus()
    print(f"{len(seen):,} tokens to train on", flush=True)
    teacher, student = train(seen)
    own = problem(student.eval(), teacher.eval(), held_out)
    rows = [row for chunk_rows in (ROWS, 128) for row in measure(own, chunk_rows)]
    with torch.no_grad():
        whole = linear_hybrid_loss(own.hidden, own.weight, own.teacher)
        ids = held_out[:ROWS].view(-1, LENGTH)
        perplexity = float(student(input_ids=ids, labels=ids).loss.exp())
    assert whole.divergence is not None
    stamp = {
        "device": _cpu(),
        "torch": torch.__version__,
        "perplexity": perplexity,
        "kl": float(whole.divergence.mean()),
        "entropy": float(whole.entropy.mean()),
    }
    (folder / "filter.json").write_text(json.dumps({**stamp, "rows": rows}, indent=1) + "\n")
    (folder / "filter.md").write_text(table(rows, stamp))
    print(table(rows, stamp))
