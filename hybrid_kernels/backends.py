"""Which backend computes rows of logits: the only place where that is decided.

A backend is a module with five functions, `row_statistics`, `row_gradient`, `hybrid_rows`,
`row_values` and `scale_rows`: `torch_backend/launch.py` or `triton_backend/launch.py`.
"""

import importlib
import importlib.util
from types import ModuleType

import torch

from hybrid_kernels import checks, validate
from hybrid_kernels.rows import Rows
from hybrid_kernels.sharded import Sharded

HAS_TRITON = importlib.util.find_spec("triton") is not None


def resolve(backend: str, device: torch.device) -> str:
    """The backend that a call's tensors are computed by, "triton" or "torch".

    Raises:
        ValueError: an unknown name, or "triton" where it can't run on the device.
    """
    checks.choice("backend", backend, validate.BACKENDS)
    if backend == "auto":
        return "triton" if device.type == "cuda" and HAS_TRITON else "torch"
    if backend == "triton":
        if not HAS_TRITON:
            raise ValueError('backend: "triton" is not installed here; use backend="torch"')
        from hybrid_kernels.triton_backend import plan

        if not (device.type == "cuda" or plan.INTERPRETED):
            raise ValueError(
                f'backend: "triton" can\'t run on {device}; move the tensors to a GPU, set '
                "TRITON_INTERPRET=1 before the first import to run the kernels on the CPU, or use "
                'backend="torch"'
            )
    return backend


def module(backend: str) -> ModuleType:
    """The launchers of a backend. Triton is imported only where it is used."""
    return importlib.import_module(f"hybrid_kernels.{backend}_backend.launch")


def launchers(rows: Rows) -> ModuleType | Sharded:
    """The launchers for a problem, on every rank of the group where ranks share the vocabulary."""
    launch = module(rows.backend)
    return Sharded(launch, rows.group, rows.student) if rows.group else launch
