"""A stand-in for a GPU: everything that a launch does on the host, without the launch.

Triton asks its driver what to compile for, and gives it the binary to launch. The driver here
answers for a GPU that is elsewhere and launches nothing. Tensors are on the device "meta": they
have shapes and strides, no memory, and address 0, which is aligned like CUDA's allocations. So the
public functions choose, specialise and compile the same kernels as on that GPU.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple
from unittest import mock

import torch.fx.experimental._config as fx_config
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from hybrid_kernels import backends, ops, timing
from hybrid_kernels.linear import ops as linear_ops
from hybrid_kernels.triton_backend import plan


class GPU(NamedTuple):
    """What Triton compiles for, and what the launchers know about the device."""

    target: GPUTarget
    device: plan.Device


GPUS = {
    "sm_80": GPU(GPUTarget("cuda", 80, 32), plan.Device("A100", 108)),
    "sm_90": GPU(GPUTarget("cuda", 90, 32), plan.Device("H200", 132)),
    "sm_100": GPU(GPUTarget("cuda", 100, 32), plan.Device("B200", 148)),
    "gfx942": GPU(GPUTarget("hip", "gfx942", 64), plan.Device("MI300X", 304)),
}
_OPERATORS: tuple[Any, ...] = (
    ops.row_statistics,
    ops.row_gradient,
    ops.hybrid_rows,
    ops.scale_rows,
    linear_ops.linear_statistics,
    linear_ops.linear_gradient,
)


class Driver:
    """What Triton asks of a driver.

    Attributes:
        utils: itself, since Triton looks there for `get_device_properties` and `load_binary`.
        launches: their number since `driver_for` last made this the active driver.
    """

    def __init__(self, name: str) -> None:
        self.name, self.utils, self.launches = name, self, 0

    def get_current_target(self) -> GPUTarget:
        return GPUS[self.name].target

    def get_current_device(self) -> str:
        return self.name  # Triton's key for the kernels compiled in this process

    def get_current_stream(self, device: str) -> int:
        return 0

    def get_device_properties(self, device: str) -> dict[str, int]:
        return {"max_shared_mem": 228 * 1024}

    def load_binary(self, *binary) -> tuple[int, int, int, int, int]:
        return 1, 1, 0, 0, 1024  # module, function, registers, spills, threads

    def unload_module(self, module: int) -> None:
        pass

    def launcher_cls(self, source, metadata) -> Any:
        def launch(*arguments) -> None:
            self.launches += 1

        return launch


# One for each GPU, because a compiled kernel stays with the driver that first launched it.
_DRIVERS = {name: Driver(name) for name in GPUS}


def _no_times(run: Callable[[], object], *_, **__) -> timing.Times:
    """Replaces `timing.device_times`: runs once, and returns no samples."""
    run()
    return timing.Times([], 0.0)


@contextlib.contextmanager
def driver_for(name: str) -> Iterator[Driver]:
    """Makes Triton compile for a GPU of `GPUS`."""
    active = _DRIVERS[name]
    active.launches = 0
    with mock.patch.object(driver, "_active", active):
        yield active


@contextlib.contextmanager
def gpu(name: str = "sm_90", compiles: bool = True) -> Iterator[Driver]:
    """Makes the package treat meta tensors as on a GPU of `GPUS`; results have no values.

    Args:
        name: the GPU.
        compiles: whether kernels are compiled; otherwise launches are only counted.
    """
    fakes = [operator._abstract_fn for operator in _OPERATORS]
    with contextlib.ExitStack() as stack:
        active = stack.enter_context(driver_for(name))

        def patch(owner: Any, attribute: str, value: Any) -> None:
            stack.enter_context(mock.patch.object(owner, attribute, value))

        patch(plan.Device, "of", lambda tensor: GPUS[name].device)
        patch(backends, "resolve", lambda backend, device: "triton")
        patch(timing, "device_times", _no_times)
        patch(fx_config, "meta_nonzero_assume_all_nonzero", True)  # no row is masked
        if not compiles:
            patch(triton.JITFunction, "run", lambda *_, **__: active.launcher_cls(0, 0)())
        for operator, fake in zip(_OPERATORS, fakes, strict=True):
            operator.register_fake(operator._init_fn)  # which torch calls on meta tensors
            stack.callback(operator.register_fake, fake)
        yield active
