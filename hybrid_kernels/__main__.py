"""The doctor: `python -m hybrid_kernels` says what this machine will use and checks every op.

`python -m hybrid_kernels tune` measures the kernels' launch configurations on this GPU (`tune.py`).
Exit status: 0 if every check passed, 1 otherwise.
"""

import importlib.metadata
import importlib.util
import platform
import sys
from collections.abc import Callable

import torch
from torch import Tensor

import hybrid_kernels
from hybrid_kernels import (
    Divergence,
    LinearTeacher,
    Mixture,
    TopK,
    available_divergences,
    backends,
    hybrid_loss,
    reference,
    timing,
)
from hybrid_kernels.types import Teacher

# Largest relative L2 error of a gradient in fp32 arithmetic; a good one is a few 1e-7.
TOLERANCE = 1e-5
# Rows long enough to be shared by several programs on a GPU.
ROWS, VOCABULARY, WIDTH = 5, 20_003, 16
# The vocabularies of Llama 2, GPT-2, Llama 3, Qwen 2.5 and Gemma.
VOCABULARIES = (32000, 50257, 128256, 151936, 262144)


def main() -> int:
    if sys.argv[1:2] == ["tune"]:
        from hybrid_kernels import tune

        return tune.main(sys.argv[2:])
    if sys.argv[1:]:
        print(f"usage: python -m hybrid_kernels [tune]; got {' '.join(sys.argv[1:])!r}")
        return 2
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    usable = _describe(device)
    healthy = True
    for backend in usable:
        print(f"\nAgainst float64, backend {backend}, relative gradient error:")
        for name, error in _checks(device, backend):
            passed = error <= TOLERANCE
            healthy &= passed
            print(f"  {name:34} {error:8.1e}  {'ok' if passed else 'WRONG'}")
    if device.type == "cuda":
        _print_bandwidth(device)
    print("\nAll checks passed." if healthy else "\nSome checks FAILED.")
    return 0 if healthy else 1


def _describe(device: torch.device) -> list[str]:
    """Prints the versions and the device; returns the backends that can run."""
    triton = "not installed"
    if importlib.util.find_spec("triton") is not None:
        triton = importlib.metadata.version("triton")
    name = torch.cuda.get_device_name() if device.type == "cuda" else platform.processor() or "CPU"
    print(f"hybrid_kernels  {hybrid_kernels.__version__}")
    print(f"python          {platform.python_version()} on {platform.system()}")
    print(f"torch           {torch.__version__}")
    print(f"triton          {triton}")
    print(f"device          {device.type}: {name}")
    if device.type == "cpu":
        print(f"threads         {torch.get_num_threads()}")
    print(f"backend         {backends.resolve('auto', device)} (what backend='auto' uses here)")
    usable = ["torch"]
    try:
        backends.resolve("triton", device)
        usable.append("triton")
        _describe_forms(device)
    except ValueError as error:
        print("form            blocks of rows, in torch")
        print(f"triton kernels  not run here: {error}")
    return usable


def _describe_forms(device: torch.device) -> None:
    """Prints how `hybrid_loss` would launch on bf16 logits of common vocabularies."""
    from hybrid_kernels.rows import Rows
    from hybrid_kernels.triton_backend import launch as launchers
    from hybrid_kernels.triton_backend import plan

    if plan.INTERPRETED:
        print("triton kernels  interpreted on the CPU, for tests")
    source = plan.tuning_file() if plan.tuning_file().is_file() else "the package's defaults"
    print(f"tuning          {source}")
    print("form            hybrid_loss, bf16, N=8192 (callable advantages, token_terms: sweeping)")
    for vocabulary in VOCABULARIES:
        # A single entry, expanded: nothing large is allocated.
        logits = torch.empty(1, dtype=torch.bfloat16, device=device).expand(1, 8192, vocabulary)
        rows = Rows(logits, (logits,), (1.0,))
        print(f"  V={vocabulary:<12,} {launchers.form(rows, logits).describe()}")


def _checks(device: torch.device, backend: str) -> list[tuple[str, float]]:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device)

    student = 3 * normal(ROWS, VOCABULARY)
    teacher = student + normal(ROWS, VOCABULARY)
    ids = torch.randint(VOCABULARY, (ROWS,), generator=generator).to(device)
    advantages, upstream = normal(ROWS), normal(ROWS)

    def hybrid(divergence: str = "reverse_kl", against: Teacher = teacher) -> float:
        def run(module, logits: Tensor, **options) -> Tensor:
            result = module.hybrid_loss(
                logits,
                against,
                ids,
                advantages.to(logits.dtype),
                entropy_weight=0.1,
                divergence=Divergence(divergence),
                **options,
            )
            return result.loss

        return _gradient_error(run, student, backend)

    def terms(module, logits: Tensor, **options) -> Tensor:
        result = module.token_terms(logits, teacher, ids, **options)
        weights = upstream.to(logits.dtype)
        return (weights * (result.divergence + result.log_prob - result.entropy)).sum()

    errors = [(f"hybrid_loss {name}", hybrid(name)) for name in available_divergences()]
    top_k = TopK.from_logits(teacher, 32, token_ids=ids)
    errors.append(("hybrid_loss reverse_kl, top-32", hybrid(against=top_k)))
    mixture = Mixture([(1.0, teacher), (0.5, teacher.flip(0))])
    errors.append(("hybrid_loss reverse_kl, 2 teachers", hybrid(against=mixture)))
    errors.append(("token_terms reverse_kl", _gradient_error(terms, student, backend)))

    # From hidden states; the reference computes its logits from them in float64.
    hidden, weight = normal(ROWS, WIDTH), normal(VOCABULARY, WIDTH)
    teacher_weight = normal(VOCABULARY, WIDTH)

    def linear(name: str) -> Callable[..., Tensor]:
        def run(module, states: Tensor, **options) -> Tensor:
            if module is hybrid_kernels:
                function = getattr(module, f"linear_{name}")
                linear_teacher = LinearTeacher(hidden, teacher_weight)
                result = function(
                    states, weight, linear_teacher, ids, chunk_rows=ROWS // 2 + 1, **options
                )
            else:
                function = getattr(module, name)
                logits, other = (states @ w.T.to(states) for w in (weight, teacher_weight))
                result = function(logits, other.detach(), ids)
            return result.loss if name == "hybrid_loss" else (result.divergence * upstream).sum()

        return run

    for name in ("hybrid_loss", "token_terms"):
        errors.append((f"linear_{name} reverse_kl", _gradient_error(linear(name), hidden, backend)))
    return errors


def _gradient_error(run: Callable[..., Tensor], student: Tensor, backend: str) -> float:
    """||gradient - oracle|| / ||oracle||, the oracle being float64 autograd of the reference."""
    ours = student.clone().requires_grad_()
    run(hybrid_kernels, ours, backend=backend).backward()
    oracle = student.double().requires_grad_()
    run(reference, oracle).backward()
    assert ours.grad is not None
    assert oracle.grad is not None
    return float((ours.grad.double() - oracle.grad).norm() / oracle.grad.norm())


def _print_bandwidth(device: torch.device) -> None:
    """Prints the bandwidth over the bytes that must move, 3 N V entries: both logits are read, the
    gradient is written. An addition moves as many."""
    rows, vocabulary = 4096, 128256
    print(f"\nBandwidth, {rows} x {vocabulary} bf16:")
    student = torch.randn(rows, vocabulary, device=device, dtype=torch.bfloat16)
    teacher = torch.randn_like(student)
    student.requires_grad_()
    gradient = torch.empty_like(teacher)
    moved = 3 * student.numel() * student.element_size()
    for name, run in (
        ("add", lambda: torch.add(student.detach(), teacher, out=gradient)),
        ("hybrid_loss", lambda: hybrid_loss(student, teacher).loss),
    ):
        ms = timing.device_times(run).median
        print(f"  {name:12} {moved / ms / 1e9:6.2f} TB/s, {ms:.2f} ms")


if __name__ == "__main__":
    sys.exit(main())
