"""Process groups by name, as operators take them, and collectives over their ranks."""

import torch
import torch.distributed
from torch import Tensor


def resolve_group(name: str) -> torch.distributed.ProcessGroup:
    """The process group of a name, as torch's own collectives find it in compiled code."""
    # Not every build of torch has this module.
    from torch.distributed import distributed_c10d

    return distributed_c10d._resolve_process_group(name)  # pyright: ignore


def all_reduce(tensor: Tensor, group: str, kind: str = "SUM") -> None:
    """Reduces a tensor over the ranks of a group, in place."""
    operation = getattr(torch.distributed.ReduceOp, kind)
    torch.distributed.all_reduce(tensor, operation, group=resolve_group(group))


def gather(values: Tensor, group: torch.distributed.ProcessGroup) -> Tensor:
    """The `values` of all ranks, `[S, ...]`."""
    gathered = values.new_empty(group.size() * values.numel())
    # The second is the name of the first before torch 2.13.
    names = ("all_gather_single", "all_gather_into_tensor")
    collective = next(getattr(torch.distributed, n) for n in names if hasattr(torch.distributed, n))
    collective(gathered, values.reshape(-1), group=group)
    return gathered.view(group.size(), *values.shape)
