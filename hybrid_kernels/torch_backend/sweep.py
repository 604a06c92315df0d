"""A pass of the torch backend over all rows: how they are cut into blocks."""

import functools
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from hybrid_kernels.divergences import FAMILIES
from hybrid_kernels.rows import Coefficients, Rows
from hybrid_kernels.torch_backend.divergences import FORMS
from hybrid_kernels.torch_backend.ordinary import OrdinaryRows
from hybrid_kernels.torch_backend.tokens import Tokens
from hybrid_kernels.torch_backend.topk import Supports

# The part of all L2 caches that one buffer may fill: a block reads and writes about five.
SHARE_OF_CACHE = 0.4

# Rows of at least so many entries are computed one by one, if they are ordinary. Shorter ones are
# not worth a call of each operator.
LONG_ROW = 12 * 1024


@functools.cache
def cache_bytes() -> int:
    """The size of a core's L2 cache; 1 MiB where the system does not say."""
    path = Path("/sys/devices/system/cpu/cpu0/cache/index2/size")
    try:
        return int(path.read_text().strip().removesuffix("K")) << 10
    except (OSError, ValueError):
        return 1 << 20


def block_elements() -> int:
    """Entries of a block, over all its rows."""
    return int(SHARE_OF_CACHE * cache_bytes() * torch.get_num_threads()) // 4


class Sweep:
    """What all blocks of a pass have in common.

    Args:
        rows: the problem.
        statistics: to be filled, or read.
        coefficients: columns `[N, 1]`, where a gradient is to be written.
        gradient: where to write it.
        supports: of top-K teachers.
        known: whether the statistics are known, and not to be written.
        tokens: the sampled ones, for the gradient's terms c_logp 1[v = y].
    """

    def __init__(
        self,
        rows: Rows,
        statistics: Tensor,
        coefficients: Coefficients | None = None,
        gradient: Tensor | None = None,
        supports: Supports | None = None,
        known: bool = False,
        tokens: Tokens | None = None,
    ) -> None:
        self.rows, self.statistics, self.known = rows, statistics, known
        self.coefficients, self.gradient, self.supports = coefficients, gradient, supports
        self.form, self.family = FORMS[rows.divergence], FAMILIES[rows.divergence]
        self.teachers = rows.teachers if rows.support is None else ()
        self.on_cpu = rows.student.device.type == "cpu"
        self.at_one = rows.row_temperature is None and rows.temperature == 1.0
        size = rows.student.shape[-1]
        self.step = max(1, min(block_elements() // size, rows.student.shape[1]))
        several = len(self.teachers) > 1
        # Whether x must outlive the teacher's exponentials, which otherwise take its buffer.
        self.keeps_x = rows.teacher_floor is not None or several or self.family.tilted
        self.keeps_x |= coefficients is not None and coefficients.entropy is not None
        # The sampled tokens' own terms of the gradient.
        self.tokens, self.token_terms = tokens, None
        if tokens is not None and coefficients is not None and coefficients.log_prob is not None:
            self.token_terms = tokens.terms(coefficients.log_prob)
        # Added block by block where the gradient is rounded to 16 bits afterwards, else at the end.
        self.adds_in_blocks = gradient is not None and gradient.dtype != torch.float32
        self.ordinary: OrdinaryRows | None = None
        # Even where the statistics are known, long rows are measured again: that is faster than a
        # gradient by blocks. Only blocks compute the sums of `row_values`.
        for_values = known and gradient is None
        if size >= LONG_ROW and not for_values and OrdinaryRows.can_take(rows):
            terms = self.token_terms if self.adds_in_blocks else None
            self.ordinary = OrdinaryRows(rows, coefficients, gradient, terms)
            self.step = 1
        self.shape = (5 if several else 4, self.step, size)

    @functools.cached_property
    def buffers(self) -> tuple[Tensor, ...]:
        """The buffers of a block, which all blocks share."""
        return torch.empty(
            self.shape, dtype=torch.float32, device=self.rows.student.device
        ).unbind()

    def add_tokens(self) -> None:
        """Adds the sampled tokens' own terms to the gradient, where blocks have not done so."""
        if self.token_terms is not None and not self.adds_in_blocks:
            assert self.tokens is not None
            assert self.gradient is not None
            self.tokens.add_to(self.gradient, self.token_terms)

    def places(self) -> Iterator[tuple[int, int, int]]:
        """The blocks to compute, as (outer, start, stop): rows `[outer, start:stop]`.

        Long ordinary rows are computed here, and masked rows are cleared. On the CPU these are not
        even read; elsewhere the mask stays on the device and is applied to each block after its
        arithmetic.
        """
        rows, statistics, gradient, known = self.rows, self.statistics, self.gradient, self.known
        outer, inner, _ = rows.student.shape
        for o in range(outer):
            runs = [(0, inner)]
            valid = None if rows.valid is None else rows.valid[o * inner : (o + 1) * inner]
            if valid is not None and self.on_cpu:
                runs = _runs(valid)
                if not known:
                    statistics[:, o * inner : (o + 1) * inner][:, ~valid] = 0.0
                if gradient is not None:
                    # Assigning through a boolean mask would also touch the other rows.
                    gradient[o].index_fill_(0, (~valid).nonzero()[:, 0], 0)
            for first, last in runs:
                for start in range(first, last, self.step):
                    if self.ordinary is not None and self.ordinary.compute(o * inner + start):
                        continue
                    stop = min(start + self.step, last)
                    yield o, start, stop
                    if valid is not None and not self.on_cpu:
                        masked = ~valid[start:stop]
                        if not known:
                            span = slice(o * inner + start, o * inner + stop)
                            statistics[:, span].masked_fill_(masked, 0.0)
                        if gradient is not None:
                            gradient[o, start:stop].masked_fill_(masked[:, None], 0.0)
        if self.ordinary is not None and not known:
            self.ordinary.write_statistics(statistics)


def _runs(valid: Tensor) -> list[tuple[int, int]]:
    """The ranges of consecutive true entries."""
    flips = torch.nn.functional.pad(valid.to(torch.int8), (1, 1)).diff().nonzero()[:, 0].tolist()
    return list(zip(flips[::2], flips[1::2], strict=True))
