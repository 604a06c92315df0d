"""Processes that form a group: real collectives (gloo) on one machine."""

import datetime
import os

import torch
import torch.distributed

SECONDS = 60  # that a collective waits for a rank that failed


def join(rank: int, size: int, folder: object, seconds: int = SECONDS):
    """Joins the group of a folder, in a process that was started for it."""
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.distributed.init_process_group(
        "gloo",
        init_method=f"file://{folder}/meeting",
        rank=rank,
        world_size=size,
        timeout=datetime.timedelta(seconds=seconds),
    )
    group = torch.distributed.group.WORLD
    assert group is not None
    return group
