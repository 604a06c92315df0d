"""What a layer computes: a product with its weight and, for LoRA adapters, some of their rank.

The linear functions take the weights out of a layer and never call it. So a layer is refused that
may compute anything else: by a forward of its own, by hooks, or by an adapter of another kind.
"""

import functools
from typing import Any, NamedTuple

import torch
from torch import nn

# Classes whose `forward` is known. By name, since PEFT need not be installed.
LINEAR = "torch.nn.modules.linear.Linear"
PLAIN = (LINEAR, "torch.nn.modules.linear.Identity", "torch.nn.modules.dropout.Dropout")
# An adapter of a layer, or of its weight (`target_parameters`).
LORA = ("peft.tuners.lora.layer.Linear", "peft.tuners.lora.layer.ParamWrapper")
SAVED = "peft.utils.other.AuxiliaryTrainingWrapper"

# Where hooks are defined that change no values: those of FSDP2 and DeepSpeed gather and free
# parameters, those of torch's FlopCounterMode note which module is running.
HARMLESS = ("torch.distributed.fsdp._fully_shard.", "deepspeed.", "torch.utils.module_tracker")
HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
MEND = "undo that, or give the logits, or the weight if it changes none and there is no adapter"


class Adapter(NamedTuple):
    """An active LoRA adapter, which adds `scaling up(down(hidden))`."""

    down: Any
    up: Any
    scaling: float


def unwrapped(name: str, layer: nn.Module) -> tuple[Any, list[Adapter]]:
    """The linear layer below PEFT's wrappers, and the LoRA adapters on it.

    Args:
        name: the prefix of the argument's name in messages.
        layer: a linear layer, or one that PEFT has wrapped.

    Raises:
        ValueError: the layer may compute more than these products.
    """
    wrapped: Any = layer
    kind = _kind(name, wrapped)
    if kind == SAVED and hasattr(wrapped, "modules_to_save"):
        active = [] if wrapped.disable_adapters else wrapped.active_adapters
        if not active or active[0] not in wrapped.modules_to_save:
            return unwrapped(name, wrapped.original_module)
        return unwrapped(name, wrapped.modules_to_save[active[0]])
    if kind in LORA:
        return _with_lora(name, wrapped)
    if kind == LINEAR:
        return wrapped, []
    if hasattr(wrapped, "base_layer"):
        raise ValueError(
            f"{name}weight: a layer ({type(layer).__name__}) whose adapter is not plain LoRA on a "
            "linear layer; use model.merge_and_unload(), or give the resulting weight"
        )
    raise ValueError(
        f"{name}weight: a layer ({type(layer).__name__}) whose forward is not known here, as only "
        "that of a linear layer is; give the [V, D] weight that it multiplies by, if it does no "
        "more than that, or the logits"
    )


def _with_lora(name: str, wrapped: Any) -> tuple[Any, list[Adapter]]:
    if wrapped.disable_adapters != wrapped.merged:
        # Merged adapters are part of the weight already; disabled ones, not merged, have no effect.
        return unwrapped(name, wrapped.base_layer)
    if wrapped.merged:
        raise ValueError(
            f"{name}weight: its adapters are merged into the weight and disabled; unmerge them"
        )
    layer, adapters = unwrapped(name, wrapped.base_layer)
    for adapter in wrapped.active_adapters:
        if adapter not in wrapped.lora_A:
            continue
        if adapter in wrapped.lora_variant:
            raise ValueError(
                f"{name}weight: the adapter {adapter!r} is a variant of LoRA (DoRA or another); "
                "merge it, or use plain LoRA"
            )
        down, up = wrapped.lora_A[adapter], wrapped.lora_B[adapter]
        dropout = wrapped.lora_dropout[adapter]
        if any(_kind(name, part) not in PLAIN for part in (down, up, dropout)):
            raise ValueError(
                f"{name}weight: the adapter {adapter!r} has layers of its own "
                f"({type(down).__name__}, {type(up).__name__}, {type(dropout).__name__}); merge it"
            )
        if up.bias is not None or down.bias is not None:
            raise ValueError(
                f"{name}weight: a LoRA adapter with biases (lora_bias=True) is not supported; "
                "merge the adapter"
            )
        if dropout.training and getattr(dropout, "p", 0.0) > 0:
            raise ValueError(
                f"{name}weight: the adapter {adapter!r} has dropout (p={dropout.p}) in training "
                "mode, which is not supported; use lora_dropout=0 for this layer, or "
                "layer.lora_dropout.eval()"
            )
        adapters.append(Adapter(down, up, wrapped.scaling[adapter]))
    return layer, adapters


def _kind(name: str, module: nn.Module) -> str:
    """The class whose `forward` is all that a call of the module runs.

    Raises:
        ValueError: it runs something before, after or instead.
    """
    classes = type(module).__mro__
    kind = next(c for c in classes if "forward" in vars(c) or "__call__" in vars(c))
    forward = vars(kind).get("forward", kind)
    # A function that stands for another one carries the other's name, but says so.
    replaced = forward.__module__ != kind.__module__ or hasattr(forward, "__wrapped__")
    if replaced or _is_replaced(module):
        raise ValueError(
            f"{name}weight: a layer ({type(module).__name__}) whose `forward` has been replaced, "
            f"which may change values; {MEND}"
        )
    for hooks in HOOKS:
        everywhere = getattr(nn.modules.module, f"_global{hooks}")
        for hook in (*everywhere.values(), *getattr(module, hooks).values()):
            if not str(hook.__module__).startswith(HARMLESS):
                raise ValueError(
                    f"{name}weight: a layer ({type(module).__name__}) with a hook "
                    f"({getattr(hook, '__qualname__', type(hook).__name__)} in `{hooks}`), which "
                    f"may change values; {MEND}"
                )
    return f"{kind.__module__}.{kind.__qualname__}"


def _is_replaced(module: nn.Module) -> bool:
    """Whether the module has a `forward` that is not of its class and may compute something else.

    That of accelerate's `dispatch_model` only moves tensors to the layer's device.
    """
    if isinstance(module, torch.jit.ScriptModule):
        return True
    forward = vars(module).get("forward")
    if isinstance(forward, functools.partial) and forward.func.__module__ == "accelerate.hooks":
        hook: Any = module._hf_hook
        hooks = getattr(hook, "hooks", [hook])
        if all(type(h).__name__ == "AlignDevicesHook" and not h.offload for h in hooks):
            forward = module._old_forward
    return forward is not None and forward != type(module).forward.__get__(module)
