"""Output layers: those that PEFT has wrapped, DTensors, mixed precision."""

import functools
from importlib.util import find_spec

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, weight_norm
from torch.nn.utils.prune import l1_unstructured
from torch.utils.flop_counter import FlopCounterMode

from hybrid_kernels import (
    LinearTeacher,
    Mixture,
    OutputLayer,
    hybrid_loss,
    linear_hybrid_loss,
    linear_token_terms,
    output_layer,
    token_terms,
)
from ranks import on_ranks, two_ranks

D, V = 16, 61


def inputs(rows=6):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(2, rows // 2, D, generator=generator)
    teacher = LinearTeacher(hidden.flip(0), torch.randn(V, D, generator=generator))
    ids = torch.randint(0, V, (2, rows // 2), generator=generator)
    advantages = torch.randn(2, rows // 2, generator=generator)
    return hidden, teacher, ids, advantages


def lora_head(bias=False, **options):
    """A model and its output layer, which PEFT has wrapped, with random LoRA factors."""
    peft = pytest.importorskip("peft", reason="needs PEFT")
    torch.manual_seed(1)

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.lm_head = nn.Linear(D, V, bias=bias)
            self.other = nn.Linear(D, D)

        def forward(self, hidden):
            return self.lm_head(hidden)

    saved = options.pop("modules_to_save", None)
    targets = None if saved else ["lm_head"]
    settings = {"r": 4, "lora_alpha": 6, "target_modules": targets, "modules_to_save": saved}
    if saved:
        settings["target_modules"] = ["other"]
    model = peft.get_peft_model(Model(), peft.LoraConfig(**settings | options))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.3)
    return model, model.base_model.model.lm_head


def outcomes(model, head, **options):
    """Losses and gradients of all trainable parameters, first from logits and then fused."""
    hidden, teacher, ids, advantages = inputs()
    results = []
    for fused in (False, True):
        leaf = hidden.clone().requires_grad_()
        model.zero_grad(set_to_none=True)
        if fused:
            loss = linear_hybrid_loss(leaf, head, teacher, ids, advantages, **options).loss
        else:
            loss = hybrid_loss(head(leaf), teacher, ids, advantages).loss
        loss.backward()
        gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        results.append((loss.detach(), {"hidden": leaf.grad, **gradients}))
    return results


def assert_same(results):
    (expected_loss, expected), (loss, gradients) = results
    torch.testing.assert_close(loss, expected_loss, rtol=1e-6, atol=1e-7)
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-5, atol=1e-6, msg=name)
    return gradients


@pytest.mark.parametrize("chunk_rows", [None, 2])
@pytest.mark.parametrize("bias", [False, True])
def test_lora(bias, chunk_rows):
    model, head = lora_head(bias)
    gradients = assert_same(outcomes(model, head, chunk_rows=chunk_rows))
    names = [name for name in gradients if "lora_" in name]
    assert len(names) == 2
    assert not any("base_layer" in name for name in gradients)


@pytest.mark.parametrize("drop_masked", [False, True])
def test_nan_in_masked_rows_does_not_reach_an_adapter(drop_masked):
    model, head = lora_head()
    hidden, teacher, ids, advantages = inputs()
    mask = torch.tensor([[True, False, True], [True, True, False]])
    results = []
    for fill in (0.0, torch.nan):
        leaf = hidden.masked_fill(~mask[..., None], fill).requires_grad_()
        model.zero_grad(set_to_none=True)
        linear_hybrid_loss(
            leaf, head, teacher, ids, advantages, mask=mask, drop_masked=drop_masked
        ).loss.backward()
        gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        results.append({"hidden": leaf.grad, **gradients})
    for name, gradient in results[0].items():
        assert torch.equal(results[1][name], gradient), name


def test_two_adapters_at_once():
    peft = pytest.importorskip("peft", reason="needs PEFT")
    model, head = lora_head()
    model.add_adapter("other", peft.LoraConfig(r=2, lora_alpha=8, target_modules=["lm_head"]))
    model.base_model.set_adapter(["default", "other"])
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.3)
    gradients = assert_same(outcomes(model, head))
    assert len([name for name in gradients if "lora_" in name]) == 4


def test_disabled_and_merged_adapters():
    model, head = lora_head()
    with model.disable_adapter():
        gradients = assert_same(outcomes(model, head))
        assert not any("lora_" in name for name in gradients)
    model.merge_adapter()
    assert_same(outcomes(model, head))
    model.unmerge_adapter()
    assert len(assert_same(outcomes(model, head))) == 3


def test_a_head_to_save():
    model, head = lora_head(modules_to_save=["lm_head"])
    gradients = assert_same(outcomes(model, head))
    assert len(gradients) == 2
    assert any("modules_to_save" in name for name in gradients)


@pytest.mark.parametrize(
    "options", [{"use_rslora": True}, {"rank_pattern": {"lm_head": 2}}], ids=str
)
def test_settings_that_change_an_adapters_scaling(options):
    model, head = lora_head(**options)
    assert_same(outcomes(model, head))


def test_adapters_that_are_refused():
    hidden, teacher, _, _ = inputs()
    for options, message in (
        ({"use_dora": True}, "the adapter 'default' is a variant of LoRA"),
        ({"lora_bias": True, "bias": True}, "a LoRA adapter with biases"),
    ):
        _, head = lora_head(**options)
        with pytest.raises(ValueError, match=f"student_weight: {message}"):
            linear_hybrid_loss(hidden, head, teacher)
    model, head = lora_head()
    with pytest.raises(ValueError, match=r"LinearTeacher.weight: has a LoRA adapter"):
        linear_hybrid_loss(hidden, torch.randn(V, D), LinearTeacher(hidden, head))
    with model.disable_adapter():
        linear_hybrid_loss(hidden, torch.randn(V, D), LinearTeacher(hidden, head))


def test_an_adapter_of_a_weight():
    model, _ = lora_head(target_modules=None, target_parameters=["lm_head.weight"])
    gradients = assert_same(outcomes(model, model.base_model.model.lm_head))
    assert len([name for name in gradients if "lora_" in name]) == 2


@pytest.mark.parametrize(
    ("kind", "options"),
    [("AdaLoraConfig", {"total_step": 9}), ("IA3Config", {"feedforward_modules": []})],
)
def test_adapters_of_other_kinds_are_refused(kind, options):
    peft = pytest.importorskip("peft", reason="needs PEFT")
    config = getattr(peft, kind)(target_modules=["0"], **options)
    model = peft.get_peft_model(nn.Sequential(nn.Linear(D, V)), config)
    hidden, teacher, _, _ = inputs()
    with pytest.raises(ValueError, match=r"student_weight: a .*whose adapter is not plain LoRA"):
        linear_hybrid_loss(hidden, model.base_model.model[0], teacher)


@pytest.mark.parametrize(("p", "training"), [(0.5, True), (0.5, False), (0.0, True)])
def test_dropout_of_an_adapter(p, training):
    model, head = lora_head(lora_dropout=p)
    model.train(training)
    if p and training:
        with pytest.raises(ValueError, match=r"'default' has dropout \(p=0.5\) in training mode"):
            outcomes(model, head)
        head.lora_dropout.eval()
    assert_same(outcomes(model, head))


# -- layers whose call is more than a product ---------------------------------------------------


def patch(layer):
    forward = layer.forward
    layer.forward = lambda hidden: 0.25 * forward(hidden)


def another_layers_forward(layer):
    layer.forward = nn.Linear(layer.in_features, layer.out_features).forward


def offload(layer):
    hooks = pytest.importorskip("accelerate.hooks", reason="needs accelerate")
    hooks.add_hook_to_module(layer, hooks.AlignDevicesHook("cpu", offload=True))


def move_what_is_patched(layer):
    patch(layer)
    move(layer)


def prune(layer):
    l1_unstructured(layer, "weight", amount=0.5)


REPLACED = "whose `forward` has been replaced"
CHANGES = {
    "forward": (patch, REPLACED),
    "moved, after a patch": (move_what_is_patched, REPLACED),
    "hook": (lambda m: m.register_forward_hook(lambda *_: 0.25 * _[2]), "_forward_hooks"),
    "pre-hook": (
        lambda m: m.register_forward_pre_hook(lambda _, args: (0.25 * args[0],)),
        "_forward_pre_hooks",
    ),
    "backward hook": (
        lambda m: m.register_full_backward_hook(lambda _, dh, dz: (0.25 * dh[0],)),
        "_backward_hooks",
    ),
    "backward pre-hook": (
        lambda m: m.register_full_backward_pre_hook(lambda _, dz: (0.25 * dz[0],)),
        "_backward_pre_hooks",
    ),
}
OF_A_LAYER = {
    "another layer's forward": (another_layers_forward, REPLACED),
    "offloaded": (offload, REPLACED),
    # A weight that a pre-hook makes is that of the last forward.
    "weight norm": (weight_norm, "WeightNorm in `_forward_pre_hooks`"),
    "pruned": (prune, "L1Unstructured in `_forward_pre_hooks`"),
}
PLACES = {
    "layer": lambda head: head.base_layer,
    "wrapper": lambda head: head,
    "A": lambda head: head.lora_A["default"],
    "B": lambda head: head.lora_B["default"],
    "dropout": lambda head: head.lora_dropout["default"],
}


def assert_refused_after(change, head, part):
    hidden, teacher, _, _ = inputs()
    linear_hybrid_loss(hidden, head, teacher)
    apply, message = change
    apply(part)
    with pytest.raises(ValueError, match=f"student_weight: .*{message}"):
        linear_hybrid_loss(hidden, head, teacher)


@pytest.mark.parametrize("change", [*CHANGES, *OF_A_LAYER])
@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated")
def test_a_layer_that_changes_values_is_refused(change):
    layer = nn.Linear(D, V)
    assert_refused_after((CHANGES | OF_A_LAYER)[change], layer, layer)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("change", CHANGES)
def test_every_part_of_a_layer_with_an_adapter_is_looked_at(change, place):
    _, head = lora_head()
    assert_refused_after(CHANGES[change], head, PLACES[place](head))


@pytest.mark.parametrize("where", ["terms", "teacher", "mixture", "logits"])
def test_wherever_a_layer_is_taken(where):
    """`logits`: the teacher of a student that is given by logits."""
    hidden, teacher, _, _ = inputs()
    layer, weight = nn.Linear(D, V), torch.randn(V, D)
    patch(layer)
    given = LinearTeacher(hidden, layer)
    calls = {
        "terms": lambda: linear_token_terms(hidden, layer),
        "teacher": lambda: linear_hybrid_loss(hidden, weight, given),
        "mixture": lambda: linear_hybrid_loss(hidden, weight, Mixture([(1, teacher), (2, given)])),
        "logits": lambda: token_terms(hidden @ weight.T, given),
    }
    name = "student_weight" if where == "terms" else "teacher: LinearTeacher.weight"
    with pytest.raises(ValueError, match=rf"^{name}: a layer \(Linear\) {REPLACED}"):
        calls[where]()


@pytest.mark.parametrize("kind", ["forward", "forward_pre", "full_backward", "full_backward_pre"])
def test_a_hook_of_all_modules_is_refused(kind):
    hidden, teacher, _, _ = inputs()
    handle = getattr(nn.modules.module, f"register_module_{kind}_hook")(lambda *_: None)
    try:
        with pytest.raises(ValueError, match=r"student_weight: a layer \(Linear\) with a hook"):
            linear_hybrid_loss(hidden, nn.Linear(D, V), teacher)
    finally:
        handle.remove()


class Cosine(nn.Linear):
    def forward(self, hidden):
        return nn.functional.linear(hidden, nn.functional.normalize(self.weight))


class Called(nn.Linear):
    def __call__(self, hidden):
        return 0.25 * super().__call__(hidden)


@pytest.mark.parametrize("layer", [Cosine(D, V), Called(D, V), nn.Embedding(V, D)], ids=type)
def test_classes_of_layers_that_are_refused(layer):
    hidden, teacher, _, _ = inputs()
    message = rf"student_weight: a layer \({type(layer).__name__}\) whose forward is not known"
    with pytest.raises(ValueError, match=message):
        linear_hybrid_loss(hidden, layer, teacher)


@pytest.mark.parametrize("wraps", [False, True])
def test_a_forward_replaced_in_the_class_is_refused(wraps, monkeypatch):
    hidden, teacher, _, _ = inputs()
    forward = nn.Linear.forward

    def quarter(layer, states):
        return 0.25 * forward(layer, states)

    replacement = functools.wraps(forward)(quarter) if wraps else quarter
    monkeypatch.setattr(nn.Linear, "forward", replacement)
    with pytest.raises(ValueError, match=rf"student_weight: a layer \(Linear\) {REPLACED}"):
        linear_hybrid_loss(hidden, nn.Linear(D, V), teacher)


class Renamed(nn.Linear):
    """Does what a linear layer does."""


def move(layer):
    hooks = pytest.importorskip("accelerate.hooks", reason="needs accelerate")
    hooks.add_hook_to_module(layer, hooks.AlignDevicesHook("cpu"))


def move_twice(layer):
    hooks = pytest.importorskip("accelerate.hooks", reason="needs accelerate")
    move(layer)
    hooks.add_hook_to_module(layer, hooks.AlignDevicesHook("cpu"), append=True)


def move_no_more(layer):
    hooks = pytest.importorskip("accelerate.hooks", reason="needs accelerate")
    move(layer)
    hooks.remove_hook_from_module(layer)


def gather(layer):
    def hook(*_):
        return None

    hook.__module__ = "deepspeed.runtime.zero.parameter_offload"
    layer.register_forward_pre_hook(hook)


SAME = {
    "weight norm": parametrizations.weight_norm,
    "spectral norm": lambda layer: parametrizations.spectral_norm(layer).eval(),
    "accelerate": move,
    "accelerate twice": move_twice,
    "accelerate no more": move_no_more,
    "ZeRO-3": gather,
    "class": lambda layer: setattr(layer, "__class__", Renamed),
}


@pytest.mark.parametrize("change", SAME)
def test_layers_that_compute_a_product_with_their_weight(change):
    layer = nn.Linear(D, V)
    SAME[change](layer)
    assert len(assert_same(outcomes(layer, layer))) == (4 if change == "weight norm" else 3)


def test_flops_are_counted_with_a_layer():
    hidden, teacher, _, _ = inputs()
    layer = nn.Linear(D, V)
    expected = linear_hybrid_loss(hidden, layer, teacher).loss
    with FlopCounterMode(display=False):  # hooks into every module
        assert torch.equal(linear_hybrid_loss(hidden, layer, teacher).loss, expected)


@pytest.mark.native
def test_a_layer_compiles_without_a_break():
    layer, teacher_layer = OutputLayer(lora_head()[1], softcap=3.0), OutputLayer(nn.Linear(D, V))
    hidden, _, ids, advantages = inputs()

    def compute(hidden):
        teacher = LinearTeacher(hidden.flip(0), teacher_layer)
        return linear_hybrid_loss(hidden, layer, teacher, ids, advantages).loss

    torch._dynamo.reset()
    compiled = torch.compile(compute, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(hidden), compute(hidden), rtol=1e-6, atol=1e-7)
    torch._dynamo.reset()


class Quantised(torch.Tensor):
    """8-bit numbers and a scale for each row, which torch is told to treat as one tensor."""

    def __new__(cls, numbers, scales):
        return cls._make_wrapper_subclass(cls, numbers.shape, dtype=scales.dtype)

    def __init__(self, numbers, scales):
        self.numbers, self.scales = numbers, scales

    def __tensor_flatten__(self):
        return ["numbers", "scales"], None

    @classmethod
    def __tensor_unflatten__(cls, inner, *_):
        return cls(**inner)

    @classmethod
    def __torch_dispatch__(cls, func, *_):
        raise NotImplementedError(func)  # it is to be refused before anything is computed with it


@pytest.mark.parametrize("field", ["weight", "bias"])
@pytest.mark.parametrize("kind", ["quantised", "sparse"])
def test_tensors_that_are_not_plain_are_refused(kind, field):
    hidden, teacher, _, _ = inputs()
    layer = {"weight": torch.randn(V, D), "bias": torch.randn(V)}
    if kind == "quantised":
        numbers = layer[field].to(torch.int8)
        layer[field] = Quantised(numbers, torch.ones(V))
    else:
        layer[field] = layer[field].to_sparse()
    with pytest.raises(
        ValueError, match=f"student_{field}: expected .* got a tensor of (class|layout)"
    ):
        linear_hybrid_loss(hidden, layer["weight"], teacher, student_bias=layer["bias"])


@pytest.mark.parametrize("enabled", [False, True])
def test_weights_that_hold_no_numbers_are_refused(enabled):
    """Autocast must not take the integers of a quantised weight for its numbers."""
    hidden, teacher, _, _ = inputs()
    freed = torch.randn(V, D)
    freed.untyped_storage().resize_(0)
    wrong = {"memory is freed": freed, r"got torch\.int8": torch.ones(V, D, dtype=torch.int8)}
    for message, weight in wrong.items():
        with torch.autocast("cpu", enabled=enabled):
            with pytest.raises(ValueError, match=f"student_weight: .*{message}"):
                linear_hybrid_loss(hidden, weight, teacher)
            with pytest.raises(ValueError, match=f"LinearTeacher.weight: .*{message}"):
                linear_hybrid_loss(hidden, torch.ones(V, D), LinearTeacher(hidden.detach(), weight))


def test_autocast_casts_as_a_linear_layer_does():
    """fp32 parameters, 16-bit factors, gradients in the parameters' dtype."""
    hidden, teacher, ids, advantages = inputs()
    weight = nn.Parameter(torch.randn(V, D))
    leaf = hidden.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        got = linear_hybrid_loss(leaf, weight, teacher, ids, advantages)
    got.loss.backward()
    rounded = weight.detach().bfloat16().float()
    teacher_logits = teacher.hidden.bfloat16().float() @ teacher.weight.bfloat16().float().T
    logits = leaf.detach().bfloat16().float() @ rounded.T
    expected = hybrid_loss(logits, teacher_logits, ids, advantages)
    torch.testing.assert_close(got.loss, expected.loss, rtol=1e-5, atol=1e-5)
    assert weight.grad.dtype == leaf.grad.dtype == torch.float32
    plain = rounded.requires_grad_()
    states = leaf.detach().bfloat16().float()
    hybrid_loss(states @ plain.T, teacher_logits, ids, advantages).loss.backward()
    assert (weight.grad - plain.grad).norm() < 5e-3 * plain.grad.norm()


# -- FSDP2 ------------------------------------------------------------------------------------

STEPS = 4


def demo_model(tied):
    """A small model of the architecture that the demo trains."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=V,
        hidden_size=D,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=tied,
    )
    return Qwen2ForCausalLM(config)


def train_steps(model, head, batches):
    """Trains by SGD on `linear_hybrid_loss`; returns losses and the types of the weights."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    losses, kinds, states = [], [], []
    model.model.register_forward_hook(lambda *args: states.append(args[2][0]))
    for ids, hidden, weight, advantages in batches:
        model(input_ids=ids, logits_to_keep=1)
        teacher = LinearTeacher(hidden, weight)
        kinds.append(type(head.weight).__name__)
        # Ranks average their gradients, so each divides by the number of its own tokens.
        loss = linear_hybrid_loss(states.pop(), head, teacher, ids, advantages).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    return torch.stack(losses), kinds


def batches():
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(V, D, generator=generator)
    for _ in range(STEPS):
        ids = torch.randint(0, V, (4, 5), generator=generator)
        hidden = torch.randn(4, 5, D, generator=generator)
        yield ids, hidden, weight, torch.randn(4, 5, generator=generator)


@pytest.mark.parametrize(
    ("tied", "unit", "kind"),
    [
        (False, [], "Parameter"),
        (False, ["lm_head"], "DTensor"),
        (False, ["model.norm", "lm_head"], "Parameter"),
        (True, [], "Parameter"),
    ],
    ids=["root", "head", "norm and head", "tied"],
)
@pytest.mark.parametrize("found", ["before", "after"])
@pytest.mark.native
@pytest.mark.skipif(not find_spec("transformers"), reason="needs transformers")
@two_ranks
@on_ranks
def test_fsdp2_trains_as_one_process_does(ranks, found, tied, unit, kind):
    """Compares two ranks, which have half of each batch and of the weights, with one process. The
    output layer is found before or after the model is sharded."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    alone = demo_model(tied)
    expected_losses, _ = train_steps(alone, OutputLayer(alone.lm_head.weight), batches())
    model = demo_model(tied)
    head = output_layer(model) if found == "before" else None
    mesh = init_device_mesh("cpu", (2,))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    # A layer that is a separate unit is sharded again by the time the loss needs its weight. Others
    # belong to the root, whose parameters stay whole until the backward.
    if unit:
        modules = [model.get_submodule(name) for name in unit]
        fully_shard(modules, mesh=mesh, reshard_after_forward=len(unit) < 2)
    fully_shard(model, mesh=mesh)
    head = head or output_layer(model)
    assert all(type(parameter).__name__ == "DTensor" for parameter in model.parameters())
    half = slice(2 * ranks.rank, 2 * ranks.rank + 2)
    parts = ((ids[half], hidden[half], w, a[half]) for ids, hidden, w, a in batches())
    losses, kinds = train_steps(model, head, parts)
    assert kinds == [kind] * STEPS
    torch.distributed.all_reduce(losses)
    torch.testing.assert_close(losses / 2, expected_losses, rtol=1e-5, atol=1e-6)
    before = demo_model(tied).state_dict()
    for name, parameter in model.named_parameters():
        assert parameter.placements[0].is_shard()
        got, expected = parameter.full_tensor().detach(), alone.get_parameter(name).detach()
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6, msg=name)
        # Biases of keys cancel in attention, so they have no gradient.
        assert not torch.equal(expected, before[name]) or name.endswith("k_proj.bias"), name


@pytest.mark.native
@pytest.mark.skipif(not find_spec("peft"), reason="needs PEFT")
@two_ranks
@on_ranks
def test_lora_on_a_sharded_layer(ranks):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    hidden, teacher, ids, advantages = inputs()
    alone, head = lora_head()
    linear_hybrid_loss(hidden, head, teacher, ids, advantages).loss.backward()
    expected = {n: p.grad for n, p in alone.named_parameters() if p.grad is not None}
    model, head = lora_head()
    fully_shard(head, mesh=init_device_mesh("cpu", (2,)))
    part = LinearTeacher(teacher.hidden[ranks.rank], teacher.weight)
    leaf = hidden[ranks.rank].clone().requires_grad_()
    linear_hybrid_loss(leaf, head, part, ids[ranks.rank], advantages[ranks.rank]).loss.backward()
    got = {n: p.grad.full_tensor() for n, p in model.named_parameters() if p.grad is not None}
    assert len(got) == 2
    assert got.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(got[name], gradient, rtol=1e-5, atol=1e-6, msg=name)
