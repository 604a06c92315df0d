"""Compiles row kernels for GPUs that are not here, launched as the public functions would."""

from typing import Any, NamedTuple
from unittest import mock

import torch
from triton.compiler import CompiledKernel

from bench import standin
from hybrid_kernels import Divergence
from hybrid_kernels.rows import Coefficients, Rows
from hybrid_kernels.triton_backend import launch, plan
from hybrid_kernels.triton_backend.launch import Launch

MAIN_VOCABULARY = 151936
# For each mode of the sweeping form: whether it measures statistics and writes a gradient.
SWEEPS = {"sweeping": (True, True), "statistics": (True, False), "gradient": (False, True)}
MODES = ("resident", *SWEEPS)
# How many an entry needs: one in each side's sum, and one more wherever it is computed again.
EXPONENTIALS = {"reverse_kl": 3, "forward_kl": 4, "jeffreys": 4, "jsd": 4}


class Configuration(NamedTuple):
    """A GPU, and the call whose kernel is compiled for it.

    Attributes:
        vocabulary: V; rows are contiguous.
        dtype: of both models' logits.
        divergence: a name from `available_divergences()`.
        mode: one of `MODES`.
        target: a key of `standin.GPUS`.
        gradient_dtype: None for that of the logits. With 16-bit weights the linear op asks for a
            gradient in fewer bits than its logits.
        num_rows: N; Triton makes a constant of a single row.
        teachers: their number.
        support: K of top-K teachers; 0 for full ones.
        tail: as in `hybrid_loss`.
        teacher_floor: as in `hybrid_loss`.
        policy_gradient: whether there are token ids, advantages and an entropy bonus.
        mask: whether some rows are masked.
        small: whether the branch for rows of a small divergence is compiled, too.
        tuning: of the row-resident form; None for the default.
    """

    vocabulary: int = MAIN_VOCABULARY
    dtype: torch.dtype = torch.bfloat16
    divergence: str = "reverse_kl"
    mode: str = "resident"
    target: str = "sm_90"
    gradient_dtype: torch.dtype | None = None
    num_rows: int = 8192
    teachers: int = 1
    support: int = 0
    tail: str = "bucket"
    teacher_floor: float | None = None
    policy_gradient: bool = True
    mask: bool = True
    small: bool = True
    tuning: plan.Tuning | None = None

    @property
    def exponentials(self) -> int:
        """How many an entry of the vocabulary needs in the row-resident form."""
        return EXPONENTIALS[self.divergence] if self.teachers else 2

    def rows(self) -> Rows:
        logits, (name, parameter) = self.logits(), Divergence(self.divergence).canonical()
        ids = meta(self.num_rows, dtype=torch.int64) if self.policy_gradient else None
        return Rows(
            logits,
            (meta(self.num_rows, self.support) if self.support else logits,) * self.teachers,
            (1.0,) * self.teachers,
            meta(self.num_rows, self.support, dtype=torch.int64) if self.support else None,
            meta(self.num_rows) if self.support and self.policy_gradient else None,
            ids,
            meta(self.num_rows, dtype=torch.bool) if self.mask else None,
            divergence=name,
            parameter=parameter,
            teacher_floor=self.teacher_floor,
            tail=self.tail,
            resolution=2.0**-24,
        )

    def logits(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        return meta(1, self.num_rows, self.vocabulary, dtype=dtype or self.dtype)


class Compiled(NamedTuple):
    """A kernel, the form of its launch and what it was compiled for."""

    kernel: CompiledKernel
    form: plan.Sweep | plan.Resident
    configuration: Configuration

    @property
    def entries(self) -> float:
        """How many entries of the vocabulary a thread holds."""
        form = self.form
        block = form.block_v if isinstance(form, plan.Sweep) else form.slice_v
        return max(1.0, block / (form.num_warps * plan.WARP))

    @property
    def itemsize(self) -> int:
        """Bytes of an entry of the gradient."""
        return (self.configuration.gradient_dtype or self.configuration.dtype).itemsize


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def compile_rows(configuration: Configuration) -> Compiled:
    """The kernel that makes statistics and gradients of whole rows."""
    rows, gradient = configuration.rows(), configuration.logits(configuration.gradient_dtype)
    per_row = meta(configuration.num_rows) if configuration.policy_gradient else None
    coefficients = Coefficients(meta(1) if configuration.teachers else None, per_row, per_row)
    if configuration.mode == "resident":
        device = standin.GPUS[configuration.target].device
        with (
            mock.patch.object(plan.Device, "of", return_value=device),
            mock.patch.object(plan, "tuned", return_value=configuration.tuning),
        ):
            form = launch.form(rows, gradient, hip=False)
        assert isinstance(form, plan.Resident), f"{configuration.divergence}: swept"
        chosen = launch.resident_launch(rows, rows.statistics(), coefficients, gradient, form)
    else:
        measure, write = SWEEPS[configuration.mode]
        support = launch.empty_support(rows) if configuration.support else None
        outputs = (coefficients, gradient) if write else (None, None)
        chosen = launch.sweep_launch(rows, support, rows.statistics(), *outputs, measure=measure)
    static = chosen.plan._replace(small=chosen.plan.small and configuration.small)
    return _compile(chosen._replace(plan=static), configuration)


def compile_marks(configuration: Configuration) -> Compiled:
    """The kernel that looks at top-K supports before the rows are read."""
    rows = configuration.rows()
    chosen = launch.mark_launch(rows, launch.empty_support(rows), rows.student)
    return _compile(chosen, configuration)


def compile_values(configuration: Configuration) -> Compiled:
    """The kernel for one rank's part of the vocabulary, once all ranks know the normalisers."""
    rows = configuration.rows()
    values = meta(1 + 2 * configuration.teachers, configuration.num_rows)
    return _compile(launch.values_launch(rows, rows.statistics(), values), configuration)


def compile_scale(configuration: Configuration) -> Compiled:
    """The kernel that multiplies a finished gradient by the upstream one."""
    return _compile(launch.scale_launch(configuration.logits(), meta(1)), configuration)


def _compile(chosen: Launch, configuration: Configuration) -> Compiled:
    target = standin.GPUS[configuration.target].target
    kernel: Any = chosen.kernel  # a method, to type checkers: JITFunction is a descriptor
    with standin.driver_for(configuration.target):
        compiled = kernel.warmup(
            *chosen.given, grid=(1,), **chosen.form.options(hip=target.backend == "hip")
        )
    return Compiled(compiled, chosen.form, configuration)
