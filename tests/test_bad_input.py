"""Every bad input is a ValueError that names the argument, the bad value, and a fix."""

import re

import numpy as np
import pytest
import torch

from hybrid_kernels import (
    Divergence,
    LinearTeacher,
    Mixture,
    OutputLayer,
    TopK,
    hybrid_loss,
    linear_hybrid_loss,
    linear_token_terms,
    returns_to_go,
    sparse_advantages,
    token_terms,
    validate,
)

V = 7
LOGITS = torch.randn(2, 3, V)
TEACHER = torch.randn(2, 3, V)
IDS = torch.zeros(2, 3, dtype=torch.long)
ROWS = torch.ones(2, 3)
MASK = torch.ones(2, 3, dtype=torch.bool)
META = torch.device("meta")
TOP_K = TopK.from_logits(TEACHER, 3)
HIDDEN, WEIGHT = torch.randn(2, 3, 4), torch.randn(V, 4)

# For hybrid_loss and token_terms: changed arguments, and parts of the message, in order.
SHARED = {
    "student float64": (
        {"student_logits": LOGITS.double()},
        "student_logits: expected float32",
        "got torch.float64",
        "cast it",
    ),
    "student scalar": ({"student_logits": torch.tensor(1.0)}, "student_logits", "got ()"),
    "student without vocabulary": (
        {"student_logits": torch.zeros(2, 3, 0)},
        "student_logits",
        "V >= 1",
        "(2, 3, 0)",
    ),
    "student transposed": (
        {"student_logits": torch.randn(2, V, 3).mT},
        "student_logits",
        "stride 3",
        ".contiguous()",
    ),
    "student of three row strides": (
        {
            "student_logits": torch.randn(4, 4, 4, V)[:2, :2, :2],
            "teacher": torch.randn(2, 2, 2, V),
            "token_ids": None,
        },
        "student_logits: leading dimensions",
        "(2, 2, 2)",
        ".flatten(0, -2)",
    ),
    "teacher float64": ({"teacher": TEACHER.double()}, "teacher: expected", "got torch.float64"),
    "teacher vocabulary": (
        {"teacher": torch.randn(2, 3, V + 2)},
        "teacher: vocabulary of 9",
        "the student has 7",
        "slice both",
    ),
    "teacher rows": ({"teacher": torch.randn(2, 4, V)}, "teacher: leading shape (2, 4)", "(2, 3)"),
    "teacher transposed": (
        {"teacher": torch.randn(2, V, 3).mT},
        "teacher",
        "stride 3",
        ".contiguous()",
    ),
    "teacher device": (
        {"teacher": TEACHER.to(META)},
        "teacher: on meta",
        "expected cpu",
        "teacher.to('cpu')",
    ),
    "teacher with gradient": (
        {"teacher": TEACHER.clone().requires_grad_()},
        "teacher: requires a gradient",
        "run the teacher under torch.no_grad()",
        "teacher.detach()",
    ),
    "teacher linear": (
        {"teacher": LinearTeacher(ROWS, ROWS)},
        "teacher: LinearTeacher.hidden: leading shape (2,)",
        "(2, 3)",
    ),
    "teacher linear vocabulary": (
        {"teacher": LinearTeacher(HIDDEN, WEIGHT[:-1])},
        "teacher: LinearTeacher.weight has a vocabulary of 6",
        "the student 7",
        "weight[:V]",
    ),
    "teacher linear size": (
        {"teacher": LinearTeacher(HIDDEN, WEIGHT[:, :-1])},
        "teacher: LinearTeacher.weight: expected shape [V, 4]",
        "(7, 3)",
    ),
    "teacher linear with a gradient": (
        {"teacher": LinearTeacher(HIDDEN.clone().requires_grad_(), WEIGHT)},
        "teacher: LinearTeacher.hidden: requires a gradient",
        "run the teacher under torch.no_grad()",
        "LinearTeacher.hidden.detach()",
    ),
    "teacher linear softcap": (
        {"teacher": LinearTeacher(HIDDEN, WEIGHT, softcap=0.0)},
        "teacher: LinearTeacher.softcap: 0.0 is not in (0, inf)",
    ),
    "teacher linear twice": (
        {"teacher": LinearTeacher(HIDDEN, OutputLayer(WEIGHT), softcap=2.0)},
        "teacher: LinearTeacher.softcap: given twice",
    ),
    "mixture of nothing": ({"teacher": Mixture([])}, "teacher: a Mixture without members"),
    "mixture of a tensor": (
        {"teacher": Mixture(TEACHER)},
        "teacher: the members of a Mixture are a list of (weight, teacher) pairs",
        "Tensor",
    ),
    "mixture without weights": (
        {"teacher": Mixture([TEACHER, TEACHER])},
        "teacher: the members of a Mixture are a list of (weight, teacher) pairs",
    ),
    "mixture weight": (
        {"teacher": Mixture([(0.0, TEACHER)])},
        "teacher: the weight of a Mixture's member: 0.0",
        "(0, inf)",
    ),
    "mixture in a mixture": (
        {"teacher": Mixture([(1.0, Mixture([(1.0, TEACHER)]))])},
        "teacher: a Mixture inside a Mixture",
        "all members at once",
    ),
    "mixture of both kinds": (
        {"teacher": Mixture([(1.0, TEACHER), (1.0, TOP_K)])},
        "teacher: a Mixture of TopK teachers and of full ones",
        "TopK.from_logits",
    ),
    "mixture of supports": (
        {"teacher": Mixture([(1.0, TOP_K), (1.0, TopK(TOP_K.ids.clone(), TOP_K.log_probs))])},
        "teacher: the TopK members of a Mixture have different supports",
        "same `ids`",
    ),
    "mixture member": (
        {"teacher": Mixture([(1.0, TEACHER[..., :5])])},
        "teacher: vocabulary of 5",
    ),
    "support too large": (
        {"teacher": TopK(torch.zeros(2, 3, 9, dtype=torch.long), torch.zeros(2, 3, 9))},
        "teacher: a TopK support of 9 ids",
        "vocabulary of 7",
        "tokenizer",
    ),
    "support shapes": (
        {"teacher": TopK(TOP_K.ids, TOP_K.log_probs[..., :2])},
        "teacher: TopK.ids has shape (2, 3, 3)",
        "log_probs (2, 3, 2)",
    ),
    "support rows": (
        {"teacher": TopK(TOP_K.ids[:1], TOP_K.log_probs[:1])},
        "teacher: TopK: leading shape (1, 3)",
    ),
    "support dtype": (
        {"teacher": TopK(TOP_K.ids.float(), TOP_K.log_probs)},
        "teacher: TopK.ids: expected int64",
    ),
    "support log_probs dtype": (
        {"teacher": TopK(TOP_K.ids, TOP_K.log_probs.double())},
        "teacher: TopK.log_probs: expected float32",
    ),
    "support with gradient": (
        {"teacher": TopK(TOP_K.ids, TOP_K.log_probs.clone().requires_grad_())},
        "teacher: TopK.log_probs: requires a gradient",
    ),
    "support device": (
        {"teacher": TopK(TOP_K.ids.to(META), TOP_K.log_probs)},
        "teacher: TopK.ids: on meta",
    ),
    "support token_log_prob": (
        {"teacher": TopK(TOP_K.ids, TOP_K.log_probs, torch.zeros(2))},
        "teacher: TopK.token_log_prob: leading shape (2,)",
    ),
    "support id": (
        {"teacher": TopK(TOP_K.ids + 7, TOP_K.log_probs)},
        "teacher: TopK.ids has",
        "[0, 7)",
        "-1 is padding",
    ),
    "support of logits": (
        {"teacher": TopK(TOP_K.ids, TOP_K.log_probs + 5)},
        "teacher: TopK.log_probs has",
        "at most 0",
        "log_softmax",
    ),
    "support token_log_prob of a logit": (
        {"teacher": TopK(TOP_K.ids, TOP_K.log_probs, torch.full((2, 3), 5.0))},
        "teacher: TopK.token_log_prob has 5",
        "at most 0",
    ),
    "support mass": (
        {"teacher": TopK(TOP_K.ids, torch.full((2, 3, 3), -0.5))},
        "teacher: TopK.log_probs sum to a mass of 1.8",
        "more than 1",
    ),
    "process group": (
        {"process_group": object()},
        "process_group: expected a torch.distributed.ProcessGroup",
        "got object",
        "mesh.get_group",
    ),
    "ids float": (
        {"token_ids": IDS.float()},
        "token_ids: expected int64",
        "got torch.float32",
        ".long()",
    ),
    "ids shape": ({"token_ids": IDS[:, :2]}, "token_ids: leading shape (2, 2)", "(2, 3)"),
    "ids device": ({"token_ids": IDS.to(META)}, "token_ids: on meta", "token_ids.to('cpu')"),
    "id too large": (
        {"token_ids": IDS + V},
        "token_ids: 7 is outside the vocabulary [0, 7)",
        "-100",
    ),
    "id negative": ({"token_ids": IDS - 1}, "token_ids: -1 is outside", "-100"),
    "mask of weights": ({"mask": 0.3 * ROWS}, "mask: has 0.3, expected 0 and 1", "other arguments"),
    "mask of counts": ({"mask": 2 * MASK.long()}, "mask: has 2, expected 0 and 1"),
    "mask of NaN": ({"mask": ROWS * torch.nan}, "mask: has nan, expected 0 and 1"),
    "mask complex": ({"mask": ROWS.cfloat()}, "mask: expected bool", "got torch.complex64"),
    "mask shape": ({"mask": MASK[0]}, "mask: shape (3,)", "(2, 3)"),
    "mask device": ({"mask": MASK.to(META)}, "mask: on meta", "mask.to('cpu')"),
    "divergence name": (
        {"divergence": "kl"},
        "divergence: unknown name 'kl'",
        "reverse_kl, forward_kl",
    ),
    "divergence kind": ({"divergence": 3}, "divergence: expected a name", "got int"),
    "temperature zero": ({"temperature": 0.0}, "temperature: 0.0 is not in (0, inf)"),
    "temperature negative": ({"temperature": -1}, "temperature: -1 is not in"),
    "temperature nan": ({"temperature": float("nan")}, "temperature: nan is not in"),
    "temperature infinite": ({"temperature": float("inf")}, "temperature: inf is not in"),
    "temperature of sequences": (
        {"temperature": ROWS[:, 0]},
        "temperature: shape (2,), expected (2, 3)",
        "(2, 1)",
        "temperature[:, None]",
    ),
    "temperature integer": (
        {"temperature": IDS + 1},
        "temperature: expected a floating",
        ".float()",
    ),
    "temperature of a row": (
        {"temperature": ROWS.index_fill(1, torch.tensor(1), -2)},
        "temperature: has -2, expected finite numbers above 0",
    ),
    "temperatures infinite": ({"temperature": ROWS[:, :1] / 0}, "temperature: has inf"),
    "temperature scalar": (
        {"temperature": torch.tensor(0.0)},
        "temperature: 0.0 is not in (0, inf)",
    ),
    "floor positive": ({"teacher_floor": 0.5}, "teacher_floor: 0.5 is not in", "0]"),
    "tail": ({"tail": "cut"}, "tail: unknown value 'cut'", "bucket"),
    "backend name": ({"backend": "cuda"}, "backend: unknown value 'cuda'", "auto, torch, triton"),
}

# The same for hybrid_loss only.
LOSS = {
    "no teacher": (
        {"teacher": None},
        "teacher: None with dense_weight=1.0",
        "dense_weight=0",
    ),
    "advantages without ids": ({"token_ids": None}, "token_ids: None", "give both"),
    "advantages shape": (
        {"advantages": ROWS[:, 0]},
        "advantages: shape (2,)",
        "(2, 3)",
        "advantages[:, None]",
    ),
    "advantages integer": (
        {"advantages": ROWS.long()},
        "advantages: expected a floating tensor",
        "torch.int64",
        ".float()",
    ),
    "advantages device": ({"advantages": ROWS.to(META)}, "advantages: on meta", ".to('cpu')"),
    "advantages with gradient": (
        {"advantages": ROWS.clone().requires_grad_()},
        "advantages: requires a gradient",
        "advantages.detach()",
    ),
    "advantages function of a wrong shape": (
        {"advantages": lambda terms: terms.entropy[0]},
        "advantages: shape (3,)",
        "(2, 3)",
    ),
    "advantages function of no tensor": (
        {"advantages": lambda terms: None},
        "advantages: expected a number or a tensor",
        "got NoneType",
    ),
    "dense weight shape": ({"dense_weight": ROWS[0]}, "dense_weight: shape (3,)", "(2, 3)"),
    "dense weight integer": (
        {"dense_weight": IDS},
        "dense_weight: expected a floating",
        ".float()",
    ),
    "dense weight with gradient": (
        {"dense_weight": ROWS.clone().requires_grad_()},
        "dense_weight: requires a gradient",
        "dense_weight.detach()",
    ),
    "entropy weight shape": ({"entropy_weight": ROWS[0]}, "entropy_weight: shape (3,)"),
    "reduction": ({"reduction": "avg"}, "reduction: unknown value 'avg'", "mean, sum, none"),
    "num_tokens of a sum": (
        {"num_tokens": 3, "reduction": "sum"},
        "num_tokens: given with reduction='sum'",
        'reduction="mean"',
    ),
    "num_tokens zero": ({"num_tokens": 0}, "num_tokens: 0 is not in (0, inf)"),
    "num_tokens tensor of zero": (
        {"num_tokens": MASK.sum() * 0},
        "num_tokens: 0 is not in (0, inf)",
    ),
    "num_tokens tensor below": ({"num_tokens": torch.tensor(-1.0)}, "num_tokens: -1.0 is not in"),
    "num_tokens tensor NaN": ({"num_tokens": torch.tensor(torch.nan)}, "num_tokens: nan is not in"),
    "num_tokens tensor infinite": ({"num_tokens": torch.tensor(torch.inf)}, "num_tokens: inf"),
    "num_tokens shape": ({"num_tokens": torch.ones(2)}, "num_tokens: expected a number", "(2,)"),
    "num_tokens with gradient": (
        {"num_tokens": torch.ones((), requires_grad=True)},
        "num_tokens: requires a gradient",
        "num_tokens.detach()",
    ),
    "mask with gradient": (
        {"mask": ROWS.clone().requires_grad_()},
        "mask: requires a gradient",
        "mask.detach()",
    ),
    "num_tokens device": (
        {"num_tokens": torch.tensor(3.0, device=META)},
        "num_tokens: on meta",
        ".to('cpu')",
    ),
    "inplace on a leaf": (
        {"inplace": True, "student_logits": LOGITS.clone().requires_grad_()},
        "inplace: student_logits is a leaf",
        "inplace=False",
    ),
    "inplace on an expanded tensor": (
        {
            "inplace": True,
            "student_logits": torch.randn(1, 1, V, requires_grad=True).exp().expand(2, 3, V),
        },
        "inplace",
        "inplace=False",
    ),
}


def assert_refuses(parts, function, *arguments, **options):
    """Asserts a ValueError whose message contains the parts, in this order."""
    message = "(?s)" + ".*".join(re.escape(part) for part in parts)
    with pytest.raises(ValueError, match=message):
        function(*arguments, **options)


@pytest.mark.parametrize("function", [hybrid_loss, token_terms], ids=lambda f: f.__name__)
@pytest.mark.parametrize("bad", SHARED)
def test_logits_and_rows(bad, function):
    change, *parts = SHARED[bad]
    good = {"student_logits": LOGITS, "teacher": TEACHER, "token_ids": IDS}
    function(**good)
    assert_refuses(parts, function, **(good | change))


@pytest.mark.parametrize("bad", LOSS)
def test_the_loss(bad):
    change, *parts = LOSS[bad]
    good = {"student_logits": LOGITS, "teacher": TEACHER, "token_ids": IDS, "advantages": ROWS}
    hybrid_loss(**good)
    assert_refuses(parts, hybrid_loss, **(good | change))


# The same for the linear functions.
LINEAR = {
    "hidden float64": (
        {"student_hidden": HIDDEN.double()},
        "student_hidden: expected float32",
        "got torch.float64",
    ),
    "hidden scalar": ({"student_hidden": torch.tensor(1.0)}, "student_hidden", "got ()"),
    "weight none": ({"student_weight": None}, "student_weight: expected a [V, D]", "NoneType"),
    "weight layer without one": (
        {"student_weight": torch.nn.ReLU()},
        "student_weight: a layer (ReLU) whose forward is not known",
        "[V, D] weight",
    ),
    "weight size": (
        {"student_weight": WEIGHT.T},
        "student_weight: expected shape [V, 4]",
        "(4, 7)",
    ),
    "weight dtype": (
        {"student_weight": WEIGHT.bfloat16()},
        "student_weight: torch.bfloat16",
        "hidden states are torch.float32",
        "cast",
    ),
    "weight device": (
        {"student_weight": WEIGHT.to(META)},
        "student_weight: on meta, expected cpu",
    ),
    "bias shape": ({"student_bias": WEIGHT}, "student_bias: expected shape [7]", "(7, 4)"),
    "bias twice": (
        {"student_weight": torch.nn.Linear(4, V), "student_bias": WEIGHT[:, 0]},
        "student_bias: given, but the layer has one",
    ),
    "output layer and bias": (
        {"student_weight": OutputLayer(WEIGHT), "student_bias": WEIGHT[:, 0]},
        "student_bias: given twice, since student_weight is an OutputLayer",
    ),
    "output layer and softcap": (
        {"student_weight": OutputLayer(torch.nn.Linear(4, V)), "softcap": 1.0},
        "softcap: given twice",
    ),
    "output layer and scale": (
        {"student_weight": OutputLayer(WEIGHT, logit_scale=2.0), "logit_scale": 2.0},
        "logit_scale: given twice",
    ),
    "output layer of nothing": (
        {"student_weight": OutputLayer(None)},
        "student_weight: expected a [V, D] tensor",
        "NoneType",
    ),
    "output layer softcap": (
        {"student_weight": OutputLayer(WEIGHT, softcap=0.0)},
        "student_weight: OutputLayer.softcap: 0.0 is not in (0, inf)",
    ),
    "softcap": ({"softcap": -1.0}, "softcap: -1.0 is not in (0, inf)"),
    "chunk rows": ({"chunk_rows": 0}, "chunk_rows: got 0, expected a whole number above 0"),
    "logits dtype": (
        {"logits_dtype": torch.float64},
        "logits_dtype: expected float32",
        "got torch.float64",
    ),
    "filter": ({"grad_filter": -1e-3}, "grad_filter: -0.001 is not in [0, inf)"),
    "teacher vocabulary": (
        {"teacher": TEACHER[..., :-1]},
        "teacher: vocabulary of 6 entries, the student has 7",
    ),
    "teacher rows": ({"teacher": TEACHER[0]}, "teacher: leading shape (3,), expected (2, 3)"),
    "ids range": ({"token_ids": IDS + V}, "token_ids: 7 is outside the vocabulary [0, 7)"),
    "ids shape": ({"token_ids": IDS[0]}, "token_ids: leading shape (3,), expected (2, 3)"),
}


@pytest.mark.parametrize("function", [linear_hybrid_loss, linear_token_terms])
@pytest.mark.parametrize("bad", LINEAR)
def test_hidden_states(bad, function):
    change, *parts = LINEAR[bad]
    good = {
        "student_hidden": HIDDEN,
        "student_weight": WEIGHT,
        "teacher": LinearTeacher(HIDDEN, WEIGHT),
        "token_ids": IDS,
    }
    function(**good)
    assert_refuses(parts, function, **(good | change))


def test_a_bias_beside_a_layer_is_refused():
    parts = ("bias: given with a layer, which has its own",)
    assert_refuses(parts, OutputLayer, torch.nn.Linear(4, V), WEIGHT[:, 0])


def test_a_partitioned_weight_is_refused():
    """DeepSpeed ZeRO-3 gathers a weight only inside the modules that use it."""
    weight = torch.nn.Parameter(torch.empty(0))
    weight.ds_id, weight.ds_shape = 1, WEIGHT.shape
    parts = ("student_weight: partitioned by DeepSpeed", "register_external_parameter")
    assert_refuses(parts, linear_hybrid_loss, HIDDEN, weight, TEACHER)


def test_triton_is_refused_on_the_cpu(monkeypatch):
    plan = pytest.importorskip(
        "hybrid_kernels.triton_backend.plan", reason="Triton is not installed"
    )
    monkeypatch.setattr(plan, "INTERPRETED", False)
    parts = ('backend: "triton" can\'t run on cpu', "TRITON_INTERPRET=1", "torch")
    assert_refuses(parts, hybrid_loss, LOGITS, TEACHER, backend="triton")


def test_ids_of_masked_rows_may_be_anything():
    mask = MASK.clone()
    mask[0, 1] = False
    ids = IDS.clone()
    ids[0, 1], ids[1, 1] = 10**9, -100
    assert hybrid_loss(LOGITS, TEACHER, ids, ROWS, mask=mask).loss.isfinite()


@pytest.mark.parametrize(
    ("name", "parameters", "parts"),
    [
        ("kl", {}, ("divergence: unknown name 'kl'", "reverse_kl")),
        ("jsd", {"alpha": 0.5}, ("'jsd' got 'alpha'", "only 'beta'")),
        ("reverse_kl", {"beta": 0.5}, ("'reverse_kl' got 'beta'", "no parameter")),
        ("jsd", {"beta": 1.5}, ("'jsd' got beta=1.5", "[0, 1]")),
        ("jsd", {"beta": float("nan")}, ("'jsd' got beta=nan", "[0, 1]")),
        ("jsd", {"beta": "half"}, ("'jsd' got beta='half'", "number")),
        ("skew_reverse_kl", {"alpha": 1.0}, ("'skew_reverse_kl' got alpha=1.0", "[0, 1)")),
        ("skew_forward_kl", {"alpha": -0.1}, ("'skew_forward_kl' got alpha=-0.1", "[0, 1)")),
        ("renyi", {"alpha": 0.0}, ("'renyi' got alpha=0.0", "(0, inf)")),
        ("alpha", {"alpha": float("inf")}, ("'alpha' got alpha=inf", "(-inf, inf)")),
        ("tv", {"alpha": 0.5}, ("'tv' got 'alpha'", "no parameter")),
    ],
)
def test_divergences(name, parameters, parts):
    assert_refuses(parts, Divergence, name, **parameters)


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        ({}, ("k: neither k nor ids",)),
        ({"k": 0}, ("k: got 0, expected a whole number in [1, 7]",)),
        ({"k": 8}, ("k: got 8, expected a whole number in [1, 7]",)),
        ({"k": 2, "temperature": 0.0}, ("temperature: 0.0 is not in (0, inf)",)),
        ({"k": 2, "temperature": IDS + 1}, ("temperature: expected a floating", ".float()")),
        ({"ids": IDS[:1]}, ("ids: shape (1, 3)", "[..., K]", "(2, 3)")),
        ({"ids": IDS[0, 0]}, ("ids: shape ()", "[..., K]", "(2, 3)")),
        ({"ids": TOP_K.ids.float()}, ("ids: expected int64", ".long()")),
        ({"ids": TOP_K.ids + V}, ("ids: ", "outside the vocabulary [0, 7)")),
        ({"ids": TOP_K.ids.to(META)}, ("ids: on meta", ".to('cpu')")),
        ({"k": 2, "token_ids": IDS[:1]}, ("token_ids: leading shape (1, 3)", "(2, 3)")),
        ({"k": 2, "token_ids": IDS + V}, ("token_ids: 7 is outside the vocabulary [0, 7)",)),
    ],
)
def test_supports(arguments, parts):
    assert_refuses(parts, TopK.from_logits, TEACHER, **arguments)


@pytest.mark.parametrize("shape", [(), (2, 0)])
def test_supports_of_no_vocabulary(shape):
    parts = ("teacher_logits: expected shape [..., V], V >= 1", str(shape))
    assert_refuses(parts, TopK.from_logits, torch.zeros(shape), 1)


def test_a_support_that_the_kernels_cannot_hold():
    logits = torch.randn(1, 1100)
    teacher = TopK.from_logits(logits, 1025)
    assert hybrid_loss(logits, teacher, backend="torch").loss.isfinite()
    validate.support_size(1024)
    with pytest.raises(ValueError, match="support of 1025 ids, more than the 1024"):
        validate.support_size(1025)


COSTS, REWARDS = torch.zeros(4, 5), torch.zeros(4)
RETURNS = {
    "costs vector": (
        {"costs": REWARDS},
        "costs: expected a floating [B, T]",
        "(4,)",
        "[N], with cu_seqlens",
    ),
    "costs integer": ({"costs": COSTS.long()}, "costs: expected a floating", "torch.int64"),
    "mask shape": ({"mask": COSTS[0].bool()}, "mask: shape (5,)", "(4, 5)"),
    "mask of weights": ({"mask": COSTS + 0.5}, "mask: has 0.5, expected 0 and 1"),
    "gamma": ({"gamma": 1.1}, "gamma: 1.1 is not in [0, 1]"),
}


def packed(*bounds, dtype=torch.int64, device="cpu"):
    """Four tokens, and their sequences' bounds."""
    bounds = torch.tensor(bounds, dtype=dtype, device=device)
    return {"costs": REWARDS, "mask": REWARDS == 0, "cu_seqlens": bounds}


RETURNS |= {
    "cu_seqlens matrix": (packed([0, 4]), "cu_seqlens: expected int32", "(1, 2)"),
    "cu_seqlens empty": (packed(), "cu_seqlens: expected int32", "(0,)"),
    "cu_seqlens floating": (
        packed(0, 4, dtype=torch.float32),
        "cu_seqlens: expected int32",
        "float32",
    ),
    "cu_seqlens device": (packed(0, 4, device=META), "cu_seqlens: on meta", ".to('cpu')"),
    "cu_seqlens short": (packed(0, 2), "cu_seqlens: from 0 to 2", "number of tokens, 4"),
    "cu_seqlens long": (packed(0, 2, 5), "cu_seqlens: from 0 to 5", "number of tokens, 4"),
    "cu_seqlens without 0": (packed(1, 4), "cu_seqlens: from 1 to 4", "start with 0", ".cumsum(0)"),
    "cu_seqlens decreasing": (packed(0, 3, 2, 4), "cu_seqlens: from 0 to 4", "not decrease"),
    "padded with cu_seqlens": (
        {"cu_seqlens": torch.tensor([0, 4])},
        "costs: expected a floating [N]",
        "(4, 5)",
    ),
}
ADVANTAGES = {
    "log_ratio vector": ({"log_ratio": REWARDS}, "log_ratio: expected a floating [B, T]", "(4,)"),
    "rewards shape": ({"rewards": COSTS}, "rewards: shape (4, 5)", "(4,)"),
    "rewards list": (
        {"rewards": [1.0]},
        "rewards: expected a [B] tensor",
        "got list; use torch.tensor",
    ),
    "rewards array": (
        {"rewards": REWARDS.numpy()},
        "rewards: expected a [B] tensor",
        "ndarray; use torch.tensor",
    ),
    "rewards complex": (
        {"rewards": REWARDS * 1j},
        "rewards: expected",
        "real numbers",
        "complex64",
        ".real",
    ),
    "rewards empty": ({"rewards": {}}, "rewards", "non-empty"),
    "rewards without weight": ({"rewards": {"a": REWARDS}}, "rewards['a']", "weight"),
    "rewards weight": ({"rewards": {"a": (REWARDS, "1")}}, "rewards['a'] weight", "got str"),
    "rewards device": ({"rewards": REWARDS.to(META)}, "rewards", "on meta", ".to('cpu')"),
    "mask": ({"mask": COSTS - 1}, "mask: has -1, expected 0 and 1"),
    "gamma": ({"gamma": -0.1}, "gamma: -0.1 is not in [0, 1]"),
    "dense weight": ({"dense_weight": COSTS}, "dense_weight: expected a number", "(4, 5)"),
    "reward weight boolean": (
        {"reward_weight": torch.tensor(True)},
        "reward_weight: expected a number",
        "torch.bool",
    ),
    "reward weight device": (
        {"reward_weight": torch.ones((), device=META)},
        "reward_weight: on meta",
        ".to('cpu')",
    ),
    "reward weight infinite": (
        {"reward_weight": torch.tensor(torch.inf)},
        "reward_weight: inf is not in",
    ),
    "baseline": ({"baseline": "critic"}, "baseline: unknown value 'critic'", "leave_one_out"),
    "baseline shape": (
        {"baseline": COSTS[0]},
        "baseline: expected one of none",
        "shape (4,) or (4, 5) or (4, 1)",
        "(5,)",
    ),
    "baseline integer": ({"baseline": REWARDS.long()}, "baseline: expected", "torch.int64"),
    "baseline device": ({"baseline": REWARDS.to(META)}, "baseline: on meta", ".to('cpu')"),
    "group ids shape": ({"group_ids": COSTS[0].long()}, "group_ids: shape (5,)", "(4,)"),
    "group ids floating": ({"group_ids": REWARDS}, "group_ids: expected integers", ".long()"),
    "group ids device": ({"group_ids": REWARDS.long().to(META)}, "group_ids: on meta"),
    "both groups": (
        {"group_ids": REWARDS.long(), "group_size": 2},
        "group_size: given together with group_ids",
    ),
    "group size": ({"group_size": 3}, "group_size: 3 does not divide", "4 sequences", "whole"),
    "group size zero": ({"group_size": 0}, "group_size: got 0, expected a whole number above 0"),
}


@pytest.mark.parametrize("bad", RETURNS)
def test_returns(bad):
    change, *parts = RETURNS[bad]
    good = {"costs": COSTS, "mask": COSTS == 0}
    returns_to_go(**good)
    assert_refuses(parts, returns_to_go, **(good | change))


@pytest.mark.parametrize("bad", ADVANTAGES)
def test_advantages(bad):
    change, *parts = ADVANTAGES[bad]
    good = {"log_ratio": COSTS, "rewards": REWARDS, "mask": COSTS == 0, "reward_weight": 1.0}
    sparse_advantages(**good)
    assert_refuses(parts, sparse_advantages, **(good | change))


def test_good_inputs_are_accepted():
    """Bounds are inclusive, integers are numbers, and `inplace` allows frozen leaves."""
    logits = LOGITS.clone()
    hybrid_loss(logits, TEACHER, teacher_floor=0, temperature=2, num_tokens=1, inplace=True)
    assert torch.equal(logits, LOGITS)
    sparse_advantages(COSTS, REWARDS, COSTS == 0, reward_weight=0, gamma=1, group_size=2)
    hybrid_loss(LOGITS, None, IDS, ROWS, dense_weight=0)


NUMBERS = {
    "temperature": (hybrid_loss, 0.5),
    "num_tokens": (hybrid_loss, 7),
    "teacher_floor": (hybrid_loss, -3.5),
    "softcap": (linear_hybrid_loss, 1.5),
    "logit_scale": (linear_hybrid_loss, 0.5),
    "chunk_rows": (linear_hybrid_loss, 2),
    "grad_filter": (linear_hybrid_loss, 0.25),
}


@pytest.mark.parametrize("name", NUMBERS)
def test_numbers_of_numpy(name):
    function, number = NUMBERS[name]
    student = (LOGITS,) if function is hybrid_loss else (HIDDEN.clone().requires_grad_(), WEIGHT)
    kinds = (np.int32, np.int64) if isinstance(number, int) else (np.float16, np.float64)
    expected = function(*student, TEACHER, IDS, ROWS, **{name: number}).loss
    for kind in kinds:
        assert torch.equal(
            function(*student, TEACHER, IDS, ROWS, **{name: kind(number)}).loss, expected
        )


def test_numbers_of_numpy_inside_of_arguments():
    divergences = Divergence("jsd", beta=np.float32(0.25)), Divergence("jsd", beta=0.25)
    assert divergences[0] == divergences[1]
    assert torch.equal(TopK.from_logits(TEACHER, np.int64(3)).ids, TOP_K.ids)
    mixture = Mixture([(np.float32(0.5), TEACHER)])
    half = hybrid_loss(LOGITS, mixture, divergence=divergences[0]).divergence
    assert torch.equal(
        half, 0.5 * hybrid_loss(LOGITS, TEACHER, divergence=divergences[1]).divergence
    )
