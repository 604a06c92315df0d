"""Launches beside other work: whether programs that wait for each other always get to run.

On a machine without a GPU ("meta") each check launches its kernels once, which says nothing (None).
"""

import torch
from torch import Tensor

from hybrid_kernels import hybrid_loss

VOCABULARY = 151_936


def logits(rows: int, device: str, vocabulary: int = VOCABULARY, seed: int = 0):
    """Student and teacher, half a nat apart."""
    options: dict = {"device": device}
    if device != "meta":
        options["generator"] = torch.Generator(device).manual_seed(seed)
    student = torch.randn(rows, vocabulary, **options)
    teacher = student + 0.5 * torch.randn(student.shape, **options)
    return student.bfloat16().requires_grad_(), teacher.bfloat16()


def gradient(student: Tensor, teacher: Tensor) -> Tensor:
    student.grad = None
    hybrid_loss(student, teacher).loss.backward()
    assert student.grad is not None
    return student.grad


def a_thousand_launches(device: str) -> bool | None:
    student, teacher = logits(512, device)
    expected = gradient(student, teacher).clone()
    if device == "meta":
        return None
    for _ in range(999):
        gradient(student, teacher)
    return torch.equal(gradient(student, teacher), expected)


def busy_multiprocessors(device: str) -> bool | None:
    """Another stream keeps multiprocessors busy, so that not all programs fit at first."""
    student, teacher = logits(256, device)
    expected = gradient(student, teacher).clone()
    if device == "meta":
        return None
    matrix = torch.randn(4096, 4096, device=device, dtype=torch.bfloat16)
    other = torch.cuda.Stream()
    right = True
    for _ in range(100):
        with torch.cuda.stream(other):
            torch.mm(matrix, matrix)
        right &= torch.equal(gradient(student, teacher), expected)
    return right


def two_streams(device: str) -> bool | None:
    """Cooperative launches of two streams never hold half of the device each."""
    pairs = [logits(256, device, seed=seed) for seed in (1, 2)]
    expected = [gradient(*pair).clone() for pair in pairs]
    if device == "meta":
        return None
    streams = [torch.cuda.Stream() for _ in pairs]
    torch.cuda.synchronize()
    got: list[Tensor] = []
    for _ in range(100):
        got.clear()
        for pair, stream in zip(pairs, streams, strict=True):
            with torch.cuda.stream(stream):
                got.append(gradient(*pair))
    torch.cuda.synchronize()
    return all(torch.equal(one, other) for one, other in zip(got, expected, strict=True))


def cuda_graphs(device: str) -> bool | None:
    student, teacher = logits(304, device)
    expected = gradient(student, teacher).clone()
    if device == "meta":
        return None
    for _ in range(3):
        gradient(student, teacher)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        gradient(student, teacher)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = gradient(student, teacher)
    for _ in range(100):
        got.zero_()
        graph.replay()
    torch.cuda.synchronize()
    return torch.equal(got, expected)


CHECKS = {
    "1,000 launches": a_thousand_launches,
    "busy multiprocessors": busy_multiprocessors,
    "two streams": two_streams,
    "CUDA graphs": cuda_graphs,
}
