"""The documented `num_tokens` under DDP and FSDP2 gives the gradient of one process."""

import itertools

import pytest
import torch
import torch.distributed
from torch import nn

from hybrid_kernels import hybrid_loss, linear_hybrid_loss
from ranks import on_ranks, two_ranks
from tolerance import relative_error

D, V, MICRO_BATCHES = 8, 31, 2


class Student(nn.Module):
    """Logits, or the hidden states from which `lm_head` makes them."""

    def __init__(self, hidden_only: bool):
        super().__init__()
        torch.manual_seed(0)
        self.hidden_only = hidden_only
        self.body = nn.Sequential(nn.Linear(D, D), nn.Tanh())
        self.lm_head = nn.Linear(D, V, bias=False)

    def forward(self, x):
        hidden = self.body(x)
        return hidden if self.hidden_only else self.lm_head(hidden)


def data(rank):
    """Micro-batches of a rank: inputs, teacher, tokens, advantages and masks of unequal sizes."""
    generator = torch.Generator().manual_seed(rank)
    for step in range(MICRO_BATCHES):
        x, advantages = (torch.randn(2, 5, n, generator=generator) for n in (D, 1))
        ids = torch.randint(0, V, (2, 5), generator=generator)
        mask = torch.arange(10).view(2, 5) < 1 + 4 * step + 3 * rank
        yield x, 3 * torch.randn(2, 5, V, generator=generator), ids, advantages[..., 0], mask


def backward(model, head, batches, num_tokens):
    for x, teacher, ids, advantages, mask in batches:
        output = model(x)
        options = {"mask": mask, "num_tokens": num_tokens}
        if output.shape[-1] == D:
            result = linear_hybrid_loss(output, head.weight, teacher, ids, advantages, **options)
        else:
            result = hybrid_loss(output, teacher, ids, advantages, **options)
        result.loss.backward()


def wrapped(model, wrapper):
    if wrapper == "ddp":
        return nn.parallel.DistributedDataParallel(model)
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    return fully_shard(model, mesh=init_device_mesh("cpu", (2,)))


FORMS = list(itertools.product(["ddp", "fsdp2"], [False, True]))


@pytest.mark.parametrize(("wrapper", "hidden_only"), FORMS)
@pytest.mark.native
@two_ranks
@on_ranks
def test_ranks_that_average_their_gradients(ranks, wrapper, hidden_only):
    own, everything = list(data(ranks.rank)), [*data(0), *data(1)]
    alone = Student(hidden_only)
    count = sum(batch[-1].sum() for batch in everything)
    backward(alone, alone.lm_head, everything, num_tokens=count)

    student = Student(hidden_only)
    model = wrapped(student, wrapper)
    count = sum(batch[-1].sum() for batch in own)
    torch.distributed.all_reduce(count, group=ranks.group)
    backward(model, student.lm_head, own, num_tokens=count / ranks.group.size())
    for name, expected in alone.named_parameters():
        got = student.get_parameter(name).grad
        got = got.full_tensor() if wrapper == "fsdp2" else got
        assert relative_error(got, expected.grad) < 1e-6, name
