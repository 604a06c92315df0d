"""Random calls of the losses and terms, of which plain numbers say how their tensors are made."""

import copy
import itertools
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

import hybrid_kernels
from cases import DTYPES, LOWEST, Head
from hybrid_kernels import Divergence, LinearTeacher, Mixture, TopK, reference
from hybrid_kernels.divergences import FAMILIES

NAN, INF = torch.nan, torch.inf
# The spread of the student's logits in a row, and of what the teachers' differ by.
STYLES = {
    "typical": (3.0, 1.0),
    "close": (3.0, 1e-3),
    "equal": (3.0, 0.0),
    "apart": (3.0, 10.0),
    "wide": (30.0, 10.0),
    "flat": (0.0, 0.0),
    "flat student": (0.0, 2.0),
    "ties": (2.0, 2.0),
    "one-hot": (1.0, 1.0),
    "offset": (3.0, 1.0),
}
NUDGE = 2.0**-20  # 16 roundings to fp32


def one_of(*options: Any) -> Any:
    """A field of a recipe, the first of whose options is the simplest."""
    return field(default=options[0], metadata={"options": options})


def rarely(default: Any, *others: Any, share: int = 3) -> Any:
    """The default, but in one of `share` cases one of the others."""
    return one_of(*[default] * ((share - 1) * len(others)), *others)


def both(single: Any) -> Any:
    """A pair, for the student and the teachers."""
    return one_of(*itertools.product(single.metadata["options"], repeat=2))


def some(*names: str) -> Any:
    sizes = range(len(names) + 1)
    return one_of(*(chosen for size in sizes for chosen in itertools.combinations(names, size)))


def recipes(kind: type) -> st.SearchStrategy:
    """Instances of a dataclass, from two bytes for each field, where 0 stands for the default.

    Fields that were drawn one by one would not be independent: five of six examples of hypothesis
    are earlier ones in which one part is replaced by another.
    """
    every = fields(kind)

    def choose(drawn: bytes) -> Any:
        values = {}
        for i, f in enumerate(every):
            number, options = drawn[2 * i : 2 * i + 2], f.metadata["options"]
            chosen = zlib.crc32(f.name.encode() + number) if any(number) else 0
            values[f.name] = options[chosen % len(options)]
        return kind(**values)

    return st.binary(min_size=2 * len(every), max_size=2 * len(every)).map(choose)


class Recipe:
    """A dataclass that prints what differs from the simplest."""

    def __repr__(self) -> str:
        given = ((f.name, getattr(self, f.name), f.default) for f in fields(self))
        values = ", ".join(f"{name}={value!r}" for name, value, simple in given if value != simple)
        return f"{type(self).__name__}({values})"


@dataclass(frozen=True, repr=False)
class Case(Recipe):
    """A call. What its function does not take is ignored.

    A weight is a number, or the shape of a tensor. `parameter` is that of the divergence: a place
    in its range, or its lowest or highest limit. `invalid` is a side and a value for the first
    entry of its first row (for all of that if -inf). `cut` is how the torch backend takes rows.
    """

    function: str = one_of("hybrid_loss", "token_terms", "linear_hybrid_loss", "linear_token_terms")
    rows: tuple[int, ...] = one_of(
        *[(1,), (3,), (2, 3), (4, 1), (1, 5), (2, 2, 3), (17,)] * 3, (), (1, 1, 1), (0,), (2, 0)
    )
    vocabulary: int = one_of(*range(2, 71), 1, 72, 73, 128, 145, 300)
    seed: int = one_of(*range(2**12))
    dtypes: tuple[str, str] = both(one_of(*DTYPES))
    layouts: tuple[str, str] = both(
        rarely(
            *("contiguous", "rows", "vocabulary", "transposed", "steps"),
            *("expanded batch", "expanded time"),
            share=2,
        )
    )
    style: str = one_of(*STYLES)
    forbidden: tuple[Any, Any] = both(rarely(None, -INF, LOWEST, -1e9, -1e4, share=4))
    invalid: tuple[int, float] | None = rarely(
        None, *((s, v) for s in (0, 1) for v in (NAN, INF, -INF)), share=8
    )
    mask: str | None = one_of(*[None, "bool", "int64", "float32"] * 3, "nothing")
    ignored: bool = rarely(False, True)
    ids: str | None = rarely("int64", "int32", None)
    teacher: tuple[str, ...] = one_of(
        *((kind,) * n for n in (1, 2, 3) for kind in ("logits", "top-k", "linear", "top-k")),
        *(("linear", "logits"), ("logits", "linear", "logits"), ()),
    )
    mixture: bool = one_of(False, True)  # of a single teacher, too
    k: int = one_of(*range(1, 13))
    support: str = one_of("teacher", "student", "union")
    holes: tuple[str, ...] = some("padding", "repeated", "impossible")
    token_log_prob: str | None = one_of("known", "of some", None)
    log_probs: str = rarely(*DTYPES)
    tail: str = rarely("bucket", "renormalize", "mask", share=4)
    divergence: str = one_of("reverse_kl", "reverse_kl", *FAMILIES)
    parameter: float | str = one_of(0.3, *(i / 100 for i in range(101)), *["low", "high"] * 20)
    temperature: float | str = rarely(1.0, 0.7, 2.0, 0.1, "[]", "[B, 1]", "[...]", share=2)
    floor: float | None = rarely(None, -30.0, -8.0, -0.5, share=4)
    dense: float | str = one_of(1.0, 0.0, -0.7, 30.0, "[]", "[B, 1]", "[...]", "[...] or 0")
    entropy: float | str = rarely(0.0, 0.3, -1.0, "[]", "[B, 1]", "[...] or 0", share=2)
    advantages: float | str | None = one_of(
        None, 1.0, "[]", "[B, 1]", "[...]", "[...] or 0", "function"
    )
    reduction: str = one_of("mean", "sum", "none")
    num_tokens: float | str | None = rarely(None, 7, 2.5, "[]")
    upstream: float | None = one_of(None, -1.7, 1e-3)
    terms: tuple[str, ...] = some("divergence", "log_prob", "entropy")
    inplace: bool = one_of(False, True)
    leaves: tuple[str, ...] = rarely(
        ("hidden", "weight", "bias"), ("hidden",), ("weight",), ("bias",), (), share=2
    )
    bias: str | None = rarely(None, *DTYPES, share=2)
    softcap: float | None = rarely(None, 1.0, 30.0)
    logit_scale: float = one_of(1.0, 0.3, -2.0)
    chunk_rows: int | None = one_of(None, 1, 2, 5)
    drop_masked: bool = one_of(True, False)
    cut: str = one_of("whole", "blocks", "long rows")

    @property
    def linear(self) -> bool:
        return self.function.startswith("linear")

    @property
    def expanded(self) -> list[bool]:
        """Which sides have rows that share memory."""
        return [layout.startswith("expanded") for layout in self.layouts]

    @property
    def is_loss(self) -> bool:
        return self.function.endswith("loss")


@dataclass
class Side:
    """The student or a full teacher: logits or, with a head, hidden states, in a tensor of which
    they are a view."""

    stored: Tensor
    view: Callable[[Tensor], Tensor]
    head: Head | None

    @property
    def values(self) -> Tensor:
        return self.view(self.stored)


def store(values: Tensor, layout: str) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """A tensor with NaN between the values, and the view of it that they are."""
    dimensions, shape = values.ndim - 1, values.shape
    pad = torch.nn.functional.pad
    if layout == "vocabulary":
        return pad(values, (0, 3), value=NAN), lambda stored: stored[..., : shape[-1]]
    if layout == "transposed" and dimensions == 2:
        return values.transpose(0, 1).contiguous(), lambda stored: stored.transpose(0, 1)
    if layout == "expanded time" and dimensions:
        return values[..., :1, :].clone(), lambda stored: stored.expand(shape)
    if layout == "expanded batch" and dimensions == 2:
        return values[:1].clone(), lambda stored: stored.expand(shape)
    if layout == "rows" and dimensions:
        return pad(values, (0, 0, 1, 1), value=NAN), lambda stored: stored[..., 1:-1, :]
    if layout == "steps" and dimensions:
        between = torch.full_like(values, NAN)
        stored = torch.stack([values, between], -2).flatten(-3, -2)
        return stored, lambda stored: stored[..., ::2, :]
    return values, lambda stored: stored


class Call:
    """The tensors of a case.

    Attributes:
        valid: bool `[...]`, the rows that count.
        sides: the student and the full teachers; `supports` are the top-K ones.
        from_logits: logits of teachers, and what `TopK.from_logits` made of them.
        weights: of the teachers.
        options: the arguments of both functions, but for the sides.
        upstreams: upstream gradients: of the loss, or of the terms by their names.
        wrong: arguments to replace.
    """

    def __init__(self, case: Case) -> None:
        self.case, self.generator = case, torch.Generator().manual_seed(case.seed)
        self.sides: list[Side] = []
        self.supports: list[TopK] = []
        self.from_logits: list[tuple[Tensor, TopK]] = []
        self.wrong: dict[str, Any] = {}
        self.valid, mask, ids = torch.ones(case.rows, dtype=torch.bool), None, None
        if case.mask is not None:
            self.valid &= self.uniform(*case.rows) < (0.0 if case.mask == "nothing" else 0.7)
            mask = self.valid.to(getattr(torch, case.mask, torch.bool))
        if case.ids is not None:
            ids = torch.randint(0, case.vocabulary, case.rows, generator=self.generator)
            ids[~self.valid] = 10**9
            ignored = self.uniform(*case.rows) < 0.3 * case.ignored
            ids[ignored], self.valid[ignored] = -100, False
            ids = ids.to(getattr(torch, case.ids))
        self.options = {
            "token_ids": ids,
            "mask": mask,
            "divergence": self._divergence(),
            "temperature": self._weight(case.temperature, 0.5, 2.0),
            "tail": case.tail,
            "teacher_floor": case.floor,
        }
        self._make_teachers(self._make_student())
        self.weights = [0.8 + 0.5 * i for i in range(len(case.teacher))]
        if len(case.teacher) == 1 and not case.mixture:
            self.weights = [1.0]
        if case.is_loss:
            mean = case.reduction == "mean"
            self.options |= {
                "advantages": None if ids is None else self._advantages(),
                "dense_weight": self._weight(case.dense if case.teacher else 0.0, -1.0, 2.0),
                "entropy_weight": self._weight(case.entropy, -1.0, 1.0),
                "reduction": case.reduction,
                "num_tokens": self._weight(case.num_tokens, 1.0, 9.0) if mean else None,
            }
        self.upstreams = self._make_upstreams()

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator)

    def uniform(self, *shape: int) -> Tensor:
        return torch.rand(shape, generator=self.generator)

    def _divergence(self) -> Divergence:
        case, parameter = self.case, FAMILIES[self.case.divergence].parameter
        if parameter is None:
            return Divergence(case.divergence)
        low = max(parameter.low + 0.01 * parameter.open_low, -2.0)
        high = min(parameter.high - 0.01 * parameter.open_high, 3.0)
        limits = sorted(parameter.limits)
        if isinstance(case.parameter, str):
            value = limits[0 if case.parameter == "low" else -1]
        else:
            value = low + case.parameter * (high - low)
            # Next to a limit precision is lost.
            value = next((limit for limit in limits if abs(value - limit) < 0.01), value)
        return Divergence(case.divergence, **{parameter.name: value})

    def _weight(self, form: Any, low: float, high: float) -> Any:
        """A number as it is, or a tensor of a shape; NaN on masked rows."""
        if not isinstance(form, str):
            return form
        rows = self.case.rows
        shapes = {"[]": (), "[B, 1]": (*rows[:-1], 1)} if rows else {}
        shape = shapes.get(form, rows)
        values = low + (high - low) * self.uniform(*shape)
        if form.endswith("0"):
            values[self.uniform(*shape) < 0.4] = 0.0
        return values.masked_fill(~self.valid, NAN) if rows and shape == rows else values

    def _advantages(self) -> Any:
        if self.case.advantages != "function":
            return self._weight(self.case.advantages, -2.0, 2.0)
        factor = self.normal(*self.case.rows)

        def function(terms):
            return factor.to(terms.entropy) * (3 + (terms.log_prob + terms.entropy).clamp(-2, 2))

        return function

    def _make_upstreams(self) -> Any:
        case = self.case

        def of_rows() -> Tensor:
            values = self.normal(*case.rows)
            values[self.uniform(*case.rows) < 0.2] = 0.0
            return values.masked_fill(~self.valid, NAN)

        if not case.is_loss:
            return {name: of_rows() for name in case.terms}
        if case.reduction == "none":
            return of_rows()
        return None if case.upstream is None else torch.tensor(case.upstream)

    def _forbid(self, values: Tensor, value: Any, dtype: torch.dtype) -> Tensor:
        """Values in a dtype, of which some, never the first, are replaced by one that forbids."""
        values, lowest = values.to(dtype), torch.finfo(dtype).min
        if value is None:
            return values
        number = value if value == -INF else max(lowest, lowest if value == LOWEST else value)
        hidden = self.uniform(*values.shape) < 0.3
        hidden[..., 0] = False
        return values.masked_fill(hidden, number)

    def _add(self, values: Tensor, side: int, head: Head | None = None) -> Tensor:
        """Adds logits or hidden states in the layout of a side. Returns their logits in fp32."""
        case, layout = self.case, self.case.layouts[side]
        stored, view = store(values, layout)
        if case.expanded[side]:
            values = view(stored).contiguous()  # what all of its rows are
        elif head is None and case.invalid is not None and case.invalid[0] == side:
            first = values.reshape(-1, values.shape[-1])[:1]
            first[:, slice(None) if case.invalid[1] == -INF else slice(1)] = case.invalid[1]
        logits = values.float() if head is None else head.logits(values, torch.float32)
        if not case.expanded[side]:
            values = values.masked_fill(~self.valid[..., None], (NAN, INF)[side])
        self.sides.append(Side(*store(values, layout), head))
        return logits

    def _head(self, size: int, spread: float, side: int, weight: Tensor | None = None) -> Head:
        """A random output layer, or one that differs by `spread` from a weight."""
        case, dtype, bias = self.case, DTYPES[self.case.dtypes[side]], None
        noise = spread / size**0.5 * self.normal(case.vocabulary, size)
        if case.bias is not None:
            value = case.forbidden[side] if case.logit_scale > 0 else None
            bias = self._forbid(self.normal(case.vocabulary), value, DTYPES[case.bias])
        weight = noise if weight is None else weight.float() + noise
        return Head(weight.to(dtype), bias, case.softcap, case.logit_scale)

    def _make_student(self) -> Tensor:
        """Adds the student. Returns its logits in fp32."""
        case, spread = self.case, STYLES[self.case.style][0]
        dtype = DTYPES[case.dtypes[0]]
        if case.linear:
            size = 1 + case.seed % 9
            head = self._head(size, spread, 0)
            return self._add(self.normal(*case.rows, size).to(dtype), 0, head)
        logits = spread * self.normal(*case.rows, case.vocabulary)
        if case.style == "ties":
            logits = logits.round()
        logits[..., case.vocabulary // 2] += 12.0 * (case.style == "one-hot")
        logits += 1e4 * (case.style == "offset")
        return self._add(self._forbid(logits, case.forbidden[0], dtype), 0)

    def _make_teachers(self, student: Tensor) -> None:
        case, gap, first = self.case, STYLES[self.case.style][1], self.sides[0]
        base = student.nan_to_num(0.0, 1.0, -20.0).clamp(min=-60.0 if gap < 5 else -200.0)
        ids, dtype = None, DTYPES[case.dtypes[1]]
        for kind in case.teacher:
            if kind == "linear":
                size = 1 + case.seed % 9
                hidden, weight = self.normal(*case.rows, size), None
                if first.head is not None:  # one that resembles the student
                    hidden = first.values.float().nan_to_num() + 0.1 * gap * hidden
                    weight = first.head.weight
                head = self._head(size, 3.0 if weight is None else gap, 1, weight)
                self._add(hidden.to(dtype), 1, head)
                continue
            logits = base + gap * self.normal(*base.shape) - 2e4 * (case.style == "offset")
            logits = logits.round() if case.style == "ties" else logits
            logits = self._add(self._forbid(logits, case.forbidden[1], dtype), 1)
            if kind == "top-k":
                self.sides.pop()
                ids = self._support(student, logits) if ids is None else ids
                self.supports.append(self._top_k(logits, ids))

    def _support(self, student: Tensor, teacher: Tensor) -> Tensor:
        case, best = self.case, min(self.case.k, self.case.vocabulary)
        sides = {"student": [student], "teacher": [teacher], "union": [student, teacher]}
        ids = torch.cat([side.topk(best).indices for side in sides[case.support]], -1)
        ids = ids[..., : case.vocabulary].clone()
        if "repeated" in case.holes:
            ids[..., ids.shape[-1] // 2] = ids[..., 0]
        if "padding" in case.holes:
            ids[..., -1] = -1
        return torch.where(self.valid[..., None], ids, 10**9)

    def _top_k(self, logits: Tensor, ids: Tensor) -> TopK:
        """A teacher of `TopK.from_logits`, with what it does not make."""
        case, token_ids = self.case, self.options["token_ids"]
        kept = torch.where(self.valid[..., None], ids, -1)
        tokens = None if token_ids is None else torch.where(self.valid, token_ids.long(), -100)
        made = TopK.from_logits(
            logits, ids=kept, token_ids=tokens, temperature=self.options["temperature"]
        )
        self.from_logits.append((logits, made))
        log_probs = made.log_probs.to(DTYPES[case.log_probs], copy=True)
        if "impossible" in case.holes:
            log_probs[..., 0] = -INF
        log_probs = log_probs.masked_fill(~self.valid[..., None], NAN)
        if case.token_log_prob is None or made.token_log_prob is None:
            return TopK(ids, log_probs)
        unknown = ~self.valid | (self.uniform(*case.rows) < 0.5 * (case.token_log_prob != "known"))
        return TopK(ids, log_probs, made.token_log_prob.masked_fill(unknown, NAN))

    # -- our function -----------------------------------------------------------------------------

    def ours(self, backend: str) -> tuple[dict[str, Any], list[Tensor]]:
        """The fields of the result, and the student's tensors after the backward."""
        case, student = self.case, self.sides[0]
        head, options = student.head, {**self.options, "backend": backend}
        tensors = [student.stored, *([] if head is None else head.tensors)]
        wanted = [name in case.leaves for name in ("hidden", "weight", "bias")]
        wanted[0] |= not case.linear and bool(case.leaves)
        leaves = [t.clone().requires_grad_(w) for t, w in zip(tensors, wanted, strict=False)]
        if head is None:
            inplace = case.is_loss and case.inplace and not case.expanded[0]
            options["student_logits"] = student.view(leaves[0].clone() if inplace else leaves[0])
            options |= {"inplace": inplace} if case.is_loss else {}
        else:
            options |= {
                "student_hidden": student.view(leaves[0]),
                "student_weight": leaves[1],
                "student_bias": leaves[2] if len(leaves) > 2 else None,
                "softcap": head.softcap,
                "logit_scale": head.logit_scale,
                "chunk_rows": case.chunk_rows,
                "drop_masked": case.drop_masked,
                "grad_filter": 0.0,
                "logits_dtype": torch.float32,
            }
        full = [
            side.values
            if side.head is None
            else LinearTeacher(side.values, *vars(side.head).values())
            for side in self.sides[1:]
        ]
        options |= {"teacher": self._teacher(full), **self.wrong}
        result = getattr(hybrid_kernels, case.function)(**options)
        self._backward(result)
        return result._asdict(), leaves

    def _teacher(self, full: list[Any]) -> Any:
        members = [*full, *self.supports]
        if len(members) == 1 and not self.case.mixture:
            return members[0]
        return Mixture(list(zip(self.weights, members, strict=True))) if members else None

    def _backward(self, result: Any) -> None:
        pairs = {"loss": self.upstreams} if self.case.is_loss else self.upstreams
        pairs = {getattr(result, name): upstream for name, upstream in pairs.items()}
        pairs = {t: u for t, u in pairs.items() if t is not None and t.requires_grad}
        if pairs:
            upstreams = [None if u is None else u.to(t) for t, u in pairs.items()]
            torch.autograd.backward(list(pairs), upstreams)

    # -- the same in float64 ----------------------------------------------------------------------

    def exact(self) -> tuple[list[Tensor], list[Tensor]]:
        """The logits of all sides, and the size of the numbers whose rounding changes them."""
        logits, sizes = [], []
        for side in self.sides:
            values, head = side.values.double(), side.head
            if head is None:
                logits.append(values)
                size = values.amax(-1, keepdim=True) - values if values.numel() else values
            else:
                values = torch.where(self.valid[..., None], values, 0.0)
                logits.append(head.logits(values, torch.float64))
                bias = None if head.bias is None else head.bias.abs()
                magnitudes = Head(head.weight.abs(), bias, None, abs(head.logit_scale))
                size = magnitudes.logits(values.abs(), torch.float64)
                if head.softcap is not None:
                    size = size * slope(head, logits[-1]) + head.softcap
            sizes.append(torch.where(size.isfinite(), size, 0.0))
        return logits, sizes

    def reference(self, logits: list[Tensor]) -> tuple[dict[str, Any], Tensor]:
        """The fields of the result, and the gradient of the student's logits."""
        student = logits[0].clone().requires_grad_()
        function = getattr(reference, self.case.function.removeprefix("linear_"))
        result = function(student, self._teacher(logits[1:]), **self.options)
        self._backward(result)
        gradient = torch.zeros_like(student) if student.grad is None else student.grad
        values = {n: None if t is None else t.detach() for n, t in result._asdict().items()}
        return values, torch.where(self.valid[..., None], gradient, 0.0)

    def nudged(self, logits: list[Tensor], sizes: list[Tensor]) -> list[Any]:
        """As `reference`, from logits that are changed as much as rounding may change them, and the
        probabilities made of them: all up, and at random, the student's against the teachers'."""
        up = torch.ones(*self.case.rows, self.case.vocabulary, dtype=torch.float64)
        at_random = self.normal(*up.shape).sign().double()
        directions = (up, up), (at_random, -at_random), (-at_random, at_random)
        return [self._nudged(logits, sizes, *pair) for pair in directions]

    def _nudged(self, logits: list[Tensor], sizes: list[Tensor], student: Tensor, teacher: Tensor):
        call, directions = copy.copy(self), [student] + [teacher] * (len(logits) - 1)
        call.supports = []
        for top in self.supports:
            ids = top.ids.clamp(0, self.case.vocabulary - 1)
            size = torch.where(top.log_probs.isfinite(), top.log_probs.double().abs(), 0.0)
            changed = top.log_probs + NUDGE * (1 + size) * teacher.gather(-1, ids)
            changed = changed.clamp(max=0.0).to(top.log_probs.dtype)
            call.supports.append(TopK(top.ids, changed, top.token_log_prob))
        triples = zip(logits, sizes, directions, strict=True)
        return call.reference([z + NUDGE * (1 + s) * direction for z, s, direction in triples])


def slope(head: Head, logits: Tensor) -> Tensor:
    """The derivative of capped logits."""
    cap = torch.inf if head.softcap is None else head.softcap
    return torch.where(logits.isfinite(), 1 - (logits / cap).square(), 1.0)


def by_row(value: Any) -> Any:
    """A number, or a tensor `[...]` as a column."""
    return value.double()[..., None] if isinstance(value, Tensor) and value.ndim else value
