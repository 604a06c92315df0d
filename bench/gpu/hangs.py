"""Checks that programs that wait for each other always get to run, also when the GPU is busy.

Without a GPU, on the device "meta", each check launches its kernels once and returns None.
"""

import torch
from torch import Tensor

from bench.providers import random_options
from hybrid_kernels import hybrid_loss

VOCABULARY = 151_936


def logits(rows: int, device: str, vocabulary: int = VOCABULARY, seed: int = 0):
    """Student and teacher, whose logits differ by half a nat."""
    options = random_options(device, seed)
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
    """Another stream occupies multiprocessors, so that not all programs can start at once."""
    student, teacher = logits(256, device)
    expected = gradient(student, teacher).clone()
    if device == "meta":
        return None
    matrix = torch.randn(4096, 4096, device=device, dtype=torch.bfloat16)
    busy_stream = torch.cuda.Stream()
    right = True
    for _ in range(100):
        with torch.cuda.stream(busy_stream):
            torch.mm(matrix, matrix)
        right &= torch.equal(gradient(student, teacher), expected)
    return right


def two_streams(device: str) -> bool | None:
    """Two cooperative launches must not hold half of the device each and wait for the rest."""
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
    return all(map(torch.equal, got, expected))


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
