"""Output layers: those that PEFT has wrapped, DTensors, mixed precision."""

from importlib.util import find_spec

import pytest
import torch
from torch import nn

from hybrid_kernels import LinearTeacher, hybrid_loss, linear_hybrid_loss
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
    model = peft.get_peft_model(Model(), peft.LoraConfig(**settings, **options))
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


def test_other_adapters_and_layers_are_refused():
    model, head = lora_head(use_dora=True)
    hidden, teacher, _, _ = inputs()
    with pytest.raises(ValueError, match=r"student_weight: the adapter 'default' is a variant"):
        linear_hybrid_loss(hidden, head, teacher)

    class Cosine(nn.Linear):
        def forward(self, hidden):
            return nn.functional.linear(hidden, nn.functional.normalize(self.weight))

    with pytest.raises(ValueError, match=r"student_weight: a Cosine, of which only"):
        linear_hybrid_loss(hidden, Cosine(D, V), teacher)
    model, head = lora_head()
    with pytest.raises(ValueError, match=r"LinearTeacher.weight: has a LoRA adapter"):
        linear_hybrid_loss(hidden, torch.randn(V, D), LinearTeacher(hidden, head))
    with model.disable_adapter():
        linear_hybrid_loss(hidden, torch.randn(V, D), LinearTeacher(hidden, head))


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


def train_steps(model, batches):
    """Trains by SGD on `linear_hybrid_loss`; returns losses and the types of the weights."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    losses, kinds, states = [], [], []
    model.model.register_forward_hook(lambda *args: states.append(args[2][0]))
    for ids, hidden, weight, advantages in batches:
        model(input_ids=ids, logits_to_keep=1)
        head, teacher = model.lm_head.weight, LinearTeacher(hidden, weight)
        kinds.append(type(head).__name__)
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
    ("tied", "units", "kind"),
    [(False, [], "Parameter"), (False, ["lm_head"], "DTensor"), (True, [], "Parameter")],
    ids=["root", "head", "tied"],
)
@pytest.mark.native
@pytest.mark.skipif(not find_spec("transformers"), reason="needs transformers")
@two_ranks
@on_ranks
def test_fsdp2_trains_as_one_process_does(ranks, tied, units, kind):
    """Compares two ranks, which have half of each batch and of the weights, with one process."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    alone = demo_model(tied)
    expected_losses, _ = train_steps(alone, batches())
    model = demo_model(tied)
    mesh = init_device_mesh("cpu", (2,))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    # A layer that is a separate unit is sharded again by the time the loss needs its weight. Others
    # belong to the root, whose parameters stay whole until the backward.
    for name in units:
        fully_shard(model.get_submodule(name), mesh=mesh)
    fully_shard(model, mesh=mesh)
    half = slice(2 * ranks.rank, 2 * ranks.rank + 2)
    parts = ((ids[half], hidden[half], w, a[half]) for ids, hidden, w, a in batches())
    losses, kinds = train_steps(model, parts)
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
