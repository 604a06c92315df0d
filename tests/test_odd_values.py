"""No argument of a public function ends in an error of torch or Python, or in a wrong number.

Each value here is given for each argument of its kind. It is a ValueError that begins with the
argument's name, or stands for the same numbers as a plain tensor.
"""

from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.distributed.tensor import DTensor, Shard, init_device_mesh

from hybrid_kernels import (
    Divergence,
    LinearTeacher,
    Mixture,
    OutputLayer,
    TopK,
    hybrid_loss,
    linear_hybrid_loss,
    output_layer,
    returns_to_go,
    sparse_advantages,
)

V = 7
GENERATOR = torch.Generator().manual_seed(0)
LOGITS, TEACHER = torch.randn(2, 2, 3, V, generator=GENERATOR)
HIDDEN = torch.randn(2, 3, 4, generator=GENERATOR)
WEIGHT, BIAS = torch.randn(V, 4, generator=GENERATOR), torch.randn(V, generator=GENERATOR)
ROWS, IDS = 0.5 + torch.rand(2, 3, generator=GENERATOR), torch.arange(6).reshape(2, 3)
REWARDS = torch.randn(2, generator=GENERATOR)
TOP_K = TopK.from_logits(TEACHER, 3, token_ids=IDS)


class Argument(NamedTuple):
    """An argument as messages name it, how to call a function with it, and a good value."""

    name: str
    call: Callable[[Any], Tensor]
    good: Any


def hybrid(**changed):
    tensors = {"student_logits": LOGITS, "teacher": TEACHER, "token_ids": IDS, "advantages": ROWS}
    result = hybrid_loss(**(tensors | changed))
    return torch.cat([result.loss.reshape(1), result.log_prob.flatten()])


def linear(**changed):
    layer = {} if "student_weight" in changed else {"student_bias": BIAS}
    tensors = {"student_hidden": HIDDEN, "student_weight": WEIGHT, **layer}
    return linear_hybrid_loss(**(tensors | {"teacher": TEACHER, "token_ids": IDS} | changed)).loss


def returns(**changed):
    return returns_to_go(**({"costs": ROWS, "mask": ROWS > 0} | changed))


def packed(**changed):
    tensors = {"costs": BIAS, "mask": BIAS == BIAS, "cu_seqlens": torch.tensor([0, 2, V])}
    return returns_to_go(**(tensors | changed))


def advantages(**changed):
    good = {"log_ratio": ROWS, "rewards": REWARDS, "mask": ROWS > 0, "reward_weight": 1.0}
    return sparse_advantages(**(good | changed))


def from_logits(**changed):
    return TopK.from_logits(**({"teacher_logits": TEACHER, "ids": TOP_K.ids} | changed)).log_probs


def teacher(make):
    return lambda value: hybrid(teacher=make(value))


def arguments(function, **good):
    return [Argument(n, lambda v, n=n: function(**{n: v}), value) for n, value in good.items()]


TENSORS = [
    *arguments(hybrid, student_logits=LOGITS, teacher=TEACHER, token_ids=IDS, mask=ROWS > 0),
    *arguments(hybrid, advantages=ROWS, dense_weight=ROWS, entropy_weight=ROWS, temperature=ROWS),
    Argument("advantages", lambda v: hybrid(advantages=lambda terms: v), ROWS),
    Argument("teacher", teacher(lambda v: Mixture([(1.0, v), (2.0, TEACHER)])), LOGITS),
    Argument("teacher: TopK.ids", teacher(lambda v: TopK(v, TOP_K.log_probs)), TOP_K.ids),
    Argument("teacher: TopK.log_probs", teacher(lambda v: TopK(TOP_K.ids, v)), TOP_K.log_probs),
    Argument(
        "teacher: TopK.token_log_prob",
        teacher(lambda v: TopK(TOP_K.ids, TOP_K.log_probs, v)),
        TOP_K.token_log_prob,
    ),
    Argument("teacher: LinearTeacher.hidden", teacher(lambda v: LinearTeacher(v, WEIGHT)), HIDDEN),
    *arguments(linear, student_hidden=HIDDEN, teacher=TEACHER, token_ids=IDS, mask=ROWS > 0),
    *arguments(returns, costs=ROWS, mask=ROWS > 0),
    *arguments(packed, costs=BIAS, mask=BIAS == BIAS, cu_seqlens=torch.tensor([0, 2, V])),
    *arguments(advantages, log_ratio=ROWS, rewards=REWARDS, mask=ROWS > 0, baseline=REWARDS),
    *arguments(advantages, group_ids=torch.tensor([0, 0])),
    Argument("rewards['r']", lambda v: advantages(rewards={"r": (v, 1.0)}), REWARDS),
    *arguments(from_logits, teacher_logits=TEACHER, ids=TOP_K.ids, token_ids=IDS, temperature=ROWS),
]
LAYERS = [
    *arguments(linear, student_weight=WEIGHT, student_bias=BIAS),
    Argument("student_weight", lambda v: linear(student_weight=OutputLayer(v)), WEIGHT),
    Argument("student_bias", lambda v: linear(student_weight=OutputLayer(WEIGHT, v)), BIAS),
    Argument("teacher: LinearTeacher.weight", teacher(lambda v: LinearTeacher(HIDDEN, v)), WEIGHT),
    Argument(
        "teacher: LinearTeacher.bias", teacher(lambda v: LinearTeacher(HIDDEN, WEIGHT, v)), BIAS
    ),
]
NUMBERS = [
    *arguments(hybrid, temperature=0.5, dense_weight=0.5, entropy_weight=0.5, advantages=0.5),
    Argument("advantages", lambda v: hybrid(advantages=lambda terms: v), 0.5),
    *arguments(hybrid, num_tokens=0.5, teacher_floor=-0.5),
    Argument("teacher: ", teacher(lambda v: Mixture([(v, TEACHER)])), 0.5),
    *arguments(linear, softcap=0.5, logit_scale=0.5, grad_filter=0.5),
    Argument("softcap", lambda v: linear(student_weight=OutputLayer(WEIGHT), softcap=v), None),
    Argument("logit_scale", lambda v: linear(student_weight=OutputLayer(WEIGHT), logit_scale=v), 1),
    Argument(
        "student_weight: OutputLayer.softcap",
        lambda v: linear(student_weight=OutputLayer(WEIGHT, softcap=v)),
        0.5,
    ),
    *arguments(returns, gamma=0.5),
    *arguments(advantages, gamma=0.5, reward_weight=0.5, dense_weight=0.5),
    Argument("rewards['r'] weight", lambda v: advantages(rewards={"r": (REWARDS, v)}), 0.5),
    *arguments(from_logits, temperature=0.5),
    Argument("divergence: ", lambda v: hybrid(divergence=Divergence("jsd", beta=v)), 0.5),
]
WHOLE_NUMBERS = [
    *arguments(linear, chunk_rows=2),
    *arguments(advantages, group_size=2),
    *arguments(from_logits, k=2),
]
FLAGS = [*arguments(hybrid, inplace=False), *arguments(linear, drop_masked=True)]
CHOICES = [
    *arguments(hybrid, reduction="sum", tail="mask", backend="torch", divergence="tv"),
    *arguments(advantages, baseline="none"),
    *arguments(linear, logits_dtype=torch.bfloat16),
    Argument("divergence", lambda v: hybrid(divergence=Divergence(v)), "tv"),
    Argument("process_group", lambda v: hybrid(process_group=v), None),
    Argument("teacher", lambda v: hybrid(teacher=v), TOP_K),
    Argument("teacher: ", teacher(Mixture), [(1.0, TEACHER)]),
    Argument("rewards", lambda v: advantages(rewards=v), {"r": (REWARDS, 1.0)}),
]


class Plain(Tensor):
    """A subclass that changes nothing."""


def nested(tensor, layout):
    return torch.nested.nested_tensor([tensor.flatten(), tensor.flatten()[1:]], layout=layout)


def dtensor(tensor):
    return DTensor.from_local(tensor, init_device_mesh("cpu", (1,)), [Shard(0)])


def inferred(tensor):
    with torch.inference_mode():
        return tensor.clone()


def quantized(tensor):
    return torch.quantize_per_tensor(tensor.float(), 0.1, 0, torch.qint8)


# How a tensor becomes what no argument takes, and a part of the message.
ODD_TENSORS = {
    "jagged": (lambda t: nested(t, torch.jagged), "give its .values()"),
    "nested": (lambda t: nested(t, torch.strided), "give torch.cat(x.unbind())"),
    "COO": (lambda t: t.to_sparse(), "use .to_dense()"),
    "CSR": (lambda t: t.reshape(1, -1).to_sparse_csr(), "use .to_dense()"),
    "MKL-DNN": (lambda t: t.float().to_mkldnn(), "use .to_dense()"),
    "quantized": (quantized, "use .dequantize()"),
    "masked": (lambda t: torch.masked.masked_tensor(t, t == t), "MaskedTensor; give the Tensor"),
    "fake": (lambda t: FakeTensorMode().from_tensor(t), "under its mode"),
    "uninitialized": (lambda _: nn.UninitializedParameter(), "lazy module"),
    "complex": (lambda t: t.cfloat(), ""),
    "array": (lambda t: t.numpy(), "ndarray"),
    "list": (lambda t: t.tolist(), "list"),
    "string": (lambda _: "abc", ""),
    "object": (lambda _: object(), "object"),
}
EQUAL_TENSORS = {
    "parameter": lambda t: nn.Parameter(t, requires_grad=False),
    "buffer": nn.Buffer,
    "subclass": lambda t: t.as_subclass(Plain),
    "of inference": inferred,
    "of a collective": AsyncCollectiveTensor,
    "negated": lambda t: torch._neg_view(-t) if t.is_floating_point() else t,
}
ODD_NUMBERS = {
    "string": "1",
    "bytes": b"1",
    "truth value": True,
    "truth value of NumPy": np.bool_(True),
    "complex": 1j,
    "complex of NumPy": np.complex64(1),
    "Decimal": Decimal(1),
    "span of time": np.timedelta64(1, "s"),
    "array": np.array(1.0),
    "arrays": np.ones(2),
    "list": [1.0],
    "dict": {},
    "range": slice(None),
    "NaN": float("nan"),
    "infinite": float("inf"),
    "too large for a float": 10**400,
    "too large for fp32": 1e300,
    "quantized": quantized(torch.ones(())),
    "without a value": torch.ones((), device="meta"),
    "nested": torch.nested.nested_tensor([torch.ones(1)]),
    "truth value of torch": torch.tensor(True),
    "uninitialized": nn.UninitializedParameter(),
}
EQUAL_NUMBERS = {"Fraction": Fraction, "fp16": np.float16, "fp64": np.float64}
ODD_WHOLE_NUMBERS = ODD_NUMBERS | {"float": 2.0, "float of NumPy": np.float64(2), "negative": -1}
ODD_FLAGS = {
    "string": "yes",
    "integer": 1,
    "None": None,
    "of NumPy": np.bool_(True),
    "tensor": torch.tensor(True),
    "tensors": torch.ones(2),
    "arrays": np.ones(2),
}
ODD_CHOICES = {
    "another": "another",
    "integer": 1,
    "bytes": b"mean",
    "list": [],
    "arrays": np.array(["mean", "sum"]),
    "record": np.void(b"mean"),
    "tensors": torch.ones(3),
    "uninitialized": nn.UninitializedParameter(),
}


@pytest.fixture(scope="module")
def alone():
    """A process group of this process, which DTensors need."""
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def assert_refuses(argument, values):
    """Asserts a ValueError that begins with the argument for all of {name: (value, part)}."""
    argument.call(argument.good)
    others = {}
    for name, (value, part) in values.items():
        try:
            others[name] = argument.call(value)
        except ValueError as error:
            if not (str(error).startswith(argument.name) and part in str(error)):
                others[name] = error
        except Exception as error:
            others[name] = error
    assert not others


def each(table):
    return pytest.mark.parametrize("argument", table, ids=lambda argument: argument.name)


@each([*TENSORS, *LAYERS])
@pytest.mark.filterwarnings("ignore::UserWarning")  # of prototypes
def test_tensors(argument, alone):
    odd = dict(ODD_TENSORS)
    if argument in LAYERS:  # sharded by FSDP2
        assert torch.equal(argument.call(dtensor(argument.good)), argument.call(argument.good))
    else:
        odd["DTensor"] = (dtensor, "give its .to_local(), with process_group=mesh.get_group()")
    assert_refuses(argument, {k: (make(argument.good), part) for k, (make, part) in odd.items()})


@each([*TENSORS, *LAYERS])
def test_tensors_that_stand_for_the_same_numbers(argument):
    expected = argument.call(argument.good)
    for kind, make in EQUAL_TENSORS.items():
        assert torch.equal(argument.call(make(argument.good)), expected), kind


@each(NUMBERS)
def test_numbers(argument):
    assert_refuses(argument, {name: (value, "") for name, value in ODD_NUMBERS.items()})
    if argument.good is not None:
        expected = argument.call(argument.good)
        for kind, make in EQUAL_NUMBERS.items():
            assert torch.equal(argument.call(make(argument.good)), expected), kind


@each(WHOLE_NUMBERS)
def test_whole_numbers(argument):
    odd = {name: (value, "") for name, value in ODD_WHOLE_NUMBERS.items()}
    if argument.name == "chunk_rows":
        large, _ = odd.pop("too large for a float")
        assert torch.equal(argument.call(large), argument.call(6))  # all rows
    assert_refuses(argument, odd)


@each(FLAGS)
def test_flags(argument):
    assert_refuses(argument, {name: (value, "") for name, value in ODD_FLAGS.items()})


@each(CHOICES)
def test_choices(argument):
    assert_refuses(argument, {name: (value, "") for name, value in ODD_CHOICES.items()})


@pytest.mark.parametrize("model", [*ODD_CHOICES.values(), nn.Linear, nn.Linear(2, 3)])
def test_models(model):
    with pytest.raises(ValueError, match=r"^model: expected a causal language model"):
        output_layer(model)


TRANSFORMS = {
    "vmap": lambda: torch.vmap(lambda t: hybrid(student_logits=t))(LOGITS[None]),
    "vmap of numbers": lambda: torch.vmap(lambda t: hybrid(num_tokens=t))(ROWS[0]),
    "vmap of a weight": lambda: torch.vmap(lambda t: linear(student_weight=t))(WEIGHT[None]),
    "grad": lambda: torch.func.grad(lambda t: hybrid(student_logits=t)[0])(LOGITS),
    "functionalize": lambda: torch.func.functionalize(hybrid)(),
    "jit.trace": lambda: torch.jit.trace(lambda t: hybrid(student_logits=t), LOGITS),
}


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch.jit
def test_transforms(transform):
    with pytest.raises(ValueError, match=r"^student_(logits|hidden): inside of .*; (give|use)"):
        TRANSFORMS[transform]()


def test_transforms_of_the_sparse_term():
    mask = torch.tensor([[1, 1, 0], [1, 0, 1]])
    expected = returns_to_go(ROWS, mask)
    assert torch.equal(torch.vmap(returns_to_go)(ROWS[None], mask[None])[0], expected)
    weight = torch.tensor([2.0, 3.0])
    for got, number in zip(
        torch.vmap(lambda w: advantages(reward_weight=w))(weight), weight, strict=True
    ):
        assert torch.equal(got, advantages(reward_weight=number))


def test_tensors_without_values():
    """Compilers call with them."""
    with FakeTensorMode() as mode:
        given = {"student_logits": LOGITS, "teacher": TEACHER, "token_ids": IDS, "mask": ROWS}
        result = hybrid_loss(**{name: mode.from_tensor(value) for name, value in given.items()})
    assert result.entropy.shape == (2, 3)


def test_compiled():
    compiled = torch.compile(lambda t: hybrid(student_logits=t), fullgraph=True, backend="eager")
    assert torch.equal(compiled(LOGITS.as_subclass(Plain)), hybrid())
    with pytest.raises(torch._dynamo.exc.Unsupported, match=r"student_logits: .* its \.values\(\)"):
        compiled(nested(LOGITS, torch.jagged))


def test_scripted_layers_are_refused():
    layer = torch.jit.script(nn.Linear(4, V))
    with pytest.raises(ValueError, match=r"^student_weight: a layer \(.*ScriptModule\) whose"):
        linear(student_weight=layer)


def test_a_layer_without_its_weight():
    layer = nn.Linear(4, V)
    del layer.weight, layer.bias
    for given in (layer, OutputLayer(layer)):
        with pytest.raises(ValueError, match=r"^student_weight: expected .*, got NoneType"):
            linear(student_weight=given)


def test_a_negated_view_is_not_overwritten():
    logits = torch.complex(LOGITS, LOGITS).conj().imag
    with pytest.raises(ValueError, match=r"^student_logits"):
        hybrid(student_logits=logits)
    with pytest.raises(ValueError, match=r"^inplace: student_logits is a negated view"):
        hybrid(student_logits=torch._neg_view(LOGITS), inplace=True)


def test_inference_tensors_that_a_backward_needs():
    """In fp16 the gradient is computed in the backward."""
    logits = LOGITS.half().requires_grad_()
    for name, value in {"teacher": TEACHER.half(), "token_ids": IDS}.items():
        with pytest.raises(ValueError, match=f"^{name}: made under torch.inference_mode"):
            hybrid(student_logits=logits, **{name: inferred(value)})
