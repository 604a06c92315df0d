"""Compiles the shipped kernels for GPUs that are not here and reads the machine code.

`python -m bench.ahead_of_time` prints, for each shipped configuration on sm_90, registers, spilled
bytes, shared memory, the widths of loads and stores and the exponentials per element.
"""

import itertools
import re
import subprocess
import tempfile
from typing import NamedTuple

import torch
import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel

from hybrid_kernels.kernels import config
from hybrid_kernels.kernels import rows as kernels
from hybrid_kernels.rows import STATISTICS, Coefficients, Rows
from hybrid_kernels.types import Divergence, available_divergences

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
MODES = {"hybrid": (True, True), "statistics": (True, False), "gradient": (False, True)}
_TYPES = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int64: "*i64",
    torch.bool: "*i1",
}


class Resources(NamedTuple):
    """What `cuobjdump` says of a kernel: registers a thread, bytes of stack, local and shared."""

    registers: int
    stack: int
    local: int
    shared: int


def compile_rows(
    target: str,
    vocabulary: int,
    dtype: torch.dtype,
    divergence: str,
    mode: str,
    *,
    teacher_floor: float | None = None,
    policy_gradient: bool = True,
    distil: bool = True,
    count: int = 8192,
) -> CompiledKernel:
    """The row kernel as a call with these inputs would launch it.

    Args:
        target: a key of `TARGETS`.
        vocabulary: V; the rows are contiguous.
        dtype: of both logits and of the gradient.
        divergence: a name from `available_divergences()`.
        mode: a key of `MODES`.
        teacher_floor: as in `hybrid_loss`.
        policy_gradient: with token ids, advantages, an entropy bonus and a mask.
        distil: with a teacher.
        count: rows; Triton makes a constant of a single one.
    """

    def meta(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    count = 8192
    measure, write = MODES[mode]
    logits = meta(1, count, vocabulary, dtype=dtype)
    name, parameter = Divergence(divergence).canonical()
    rows = Rows(
        logits,
        logits if distil else None,
        meta(count, dtype=torch.int64) if policy_gradient else None,
        meta(count, dtype=torch.bool) if policy_gradient else None,
        name,
        parameter,
        1.0,
        teacher_floor,
    )
    own = meta(count) if policy_gradient else None
    coefficients = Coefficients(meta(1) if distil else None, own, own)
    launch = config.rows(vocabulary, rows.one_sweep)
    arguments = kernels.kernel_arguments(
        rows,
        meta(STATISTICS, count),
        coefficients if write else None,
        logits if write else None,
    )
    constants = kernels.kernel_constants(rows, launch, measure=measure, write=write)
    source = _source(kernels.rows_kernel, arguments, constants)
    return _compile(source, target, launch)


def compile_scale(target: str, vocabulary: int, dtype: torch.dtype) -> CompiledKernel:
    """The kernel that multiplies a finished gradient by the upstream one."""
    launch = config.rows(vocabulary)
    gradient = torch.empty((1, 8192, vocabulary), dtype=dtype, device="meta")
    factor = torch.empty(1, device="meta")
    arguments = (gradient, factor, 8192, gradient.stride(0), gradient.stride(1), 0)
    constants = {"V": vocabulary, "BLOCK_V": launch.block_v}
    source = _source(kernels.scale_kernel, arguments, constants)
    return _compile(source, target, launch)


def _compile(source: ASTSource, target: str, launch: config.Launch) -> CompiledKernel:
    gpu = TARGETS[target]
    return triton.compile(source, target=gpu, options=launch.options(hip=gpu.backend == "hip"))


def _source(kernel, arguments: tuple, constants: dict) -> ASTSource:
    """What a launch with these arguments would specialise: None, 1 and multiples of 16."""
    signature: dict[str, str] = {}
    values: dict[tuple[int, ...], object] = {}
    hints: dict[tuple[int, ...], list] = {}
    named = dict(zip(kernel.arg_names, arguments, strict=False)) | constants
    for index, (name, value) in enumerate(named.items()):
        if name in constants or value is None or (isinstance(value, int) and value == 1):
            signature[name], values[(index,)] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[name], hints[(index,)] = _TYPES[value.dtype], [["tt.divisibility", 16]]
        elif isinstance(value, int):
            signature[name] = "i32" if value < 2**31 else "i64"
            if value % 16 == 0:
                hints[(index,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = "fp32"
    return ASTSource(kernel, signature, values, hints)


def resources(kernel: CompiledKernel) -> Resources:
    """Registers and memory of a kernel that was compiled for an NVIDIA GPU."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        tool = knobs.nvidia.cuobjdump.path
        command = [tool, "-res-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL|SHARED):(\d+)", text)}
    return Resources(found["REG"], found["STACK"], found["LOCAL"], found["SHARED"])


def access_widths(kernel: CompiledKernel, kind: str) -> dict[int, int]:
    """How many tile accesses of each width in bits the PTX has; `kind` is "ld" or "st".

    A row's scalars are left out: they are the accesses of one lane, not vectorised by nature.
    """
    widths: dict[int, int] = {}
    for vector, bits in re.findall(rf"{kind}\.global\S*?(\.v\d)?\.b(\d+)", kernel.asm["ptx"]):
        width = int(vector[2:] or 1) * int(bits) if vector else int(bits)
        widths[width] = widths.get(width, 0) + 1
    return widths


def main() -> None:
    """Prints one line for each shipped configuration on sm_90."""
    print(
        "sm_90          V dtype    divergence  mode       regs spill  shared  ld.128  st.128  ex2"
    )
    vocabularies = (32000, 50257, 128256, 151936, 262144)
    dtypes = (torch.bfloat16, torch.float32)
    for case in itertools.product(vocabularies, dtypes, available_divergences(), MODES):
        vocabulary, dtype, divergence, mode = case
        kernel = compile_rows("sm_90", *case)
        used = resources(kernel)
        loads = access_widths(kernel, "ld").get(128, 0)
        stores = access_widths(kernel, "st").get(128, 0)
        exponentials = kernel.asm["ptx"].count("ex2.approx")
        print(
            f"{vocabulary:16} {str(dtype)[6:]:8} {divergence:11} {mode:10} {used.registers:4} "
            f"{used.stack + used.local:5} {used.shared:7} {loads:7} {stores:7} {exponentials:4}",
            flush=True,
        )


if __name__ == "__main__":
    main()
