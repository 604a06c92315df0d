"""Entries as the row-resident form keeps them: packed as loaded, two 16-bit entries to a 32-bit
word, and unpacked where they are used.

So a 16-bit slice needs half the registers, and a prefetch is waited for only when its row is used.
Inline assembly does what Triton's compiler would do differently or not at all. The interpreter has
no inline assembly, and runs the same steps in plain Triton.
"""

import triton
import triton.language as tl

from hybrid_kernels.triton_backend.reduce import INTERPRETED


@triton.constexpr_function
def per_word(TYPE):
    """Entries in a word."""
    return 2 if TYPE.primitive_bitwidth == 16 else 1


@triton.constexpr_function
def pad_of(pad, TYPE):
    """`Plan.pad` in a type: -2^90 or, if a side is fp16, the lowest fp16 number (for bf16, the
    next number above it)."""
    return -65280.0 if TYPE.is_bf16() and pad > -1e20 else pad


@triton.constexpr_function
def word_of(pad, TYPE):
    """A word filled with `pad_of`."""
    if TYPE.primitive_bitwidth != 16:
        return pad
    if TYPE.is_fp16():
        return -0x04000401  # 0xFBFFFBFF
    return -0x137F1380 if pad < -1e20 else -0x38803881  # 0xEC80EC80, 0xC77FC77F


@triton.jit
def words_at(ptr):
    """A pointer to entries as a pointer to words."""
    if ptr.dtype.element_ty.primitive_bitwidth == 16:
        return tl.multiple_of(ptr.to(tl.pointer_type(tl.int32)), 16)
    else:
        return tl.multiple_of(ptr, 16)


@triton.jit
def unpacked(word, TYPE: tl.constexpr):
    """The entries of words, in fp32.

    The compiler must not notice a repeated call: it would keep the results, which need twice as
    many registers as the words.
    """
    if TYPE.primitive_bitwidth != 16:
        return (word,)
    elif INTERPRETED and TYPE.is_bf16():
        low = (word << 16).to(tl.float32, bitcast=True)
        return low, (word & -65536).to(tl.float32, bitcast=True)
    elif INTERPRETED:
        low = word.to(tl.int16).to(tl.float16, bitcast=True)
        high = (word >> 16).to(tl.int16).to(tl.float16, bitcast=True)
        return low.to(tl.float32), high.to(tl.float32)
    elif TYPE.is_bf16():
        low = tl.inline_asm_elementwise(
            "shl.b32 $0, $1, 16;", "=f,r", [word], dtype=tl.float32, is_pure=False, pack=1
        )
        high = tl.inline_asm_elementwise(
            "and.b32 $0, $1, 0xffff0000;", "=f,r", [word], dtype=tl.float32, is_pure=False, pack=1
        )
        return low, high
    else:
        return tl.inline_asm_elementwise(
            "{.reg .b16 l, h; mov.b32 {l, h}, $2; cvt.f32.f16 $0, l; cvt.f32.f16 $1, h;}",
            "=f,=f,r",
            [word],
            dtype=(tl.float32, tl.float32),
            is_pure=False,
            pack=1,
        )


@triton.jit
def packed(entries, TYPE: tl.constexpr):
    """Words of entries rounded to their type, two at once: one by one is an eighth as fast."""
    if TYPE.primitive_bitwidth != 16:
        return entries[0]
    elif INTERPRETED:
        low = entries[0].to(TYPE).to(tl.int16, bitcast=True).to(tl.int32) & 65535
        high = entries[1].to(TYPE).to(tl.int16, bitcast=True).to(tl.int32) << 16
        return low | high
    else:
        NAME: tl.constexpr = "cvt.rn.bf16x2.f32" if TYPE.is_bf16() else "cvt.rn.f16x2.f32"
        return tl.inline_asm_elementwise(
            NAME + " $0, $2, $1;",
            "=r,f,f",
            [entries[0], entries[1]],
            dtype=tl.int32,
            is_pure=True,
            pack=1,
        )


@triton.jit
def _farther(a, b, LARGER: tl.constexpr):
    return tl.maximum(a, b) if LARGER else tl.minimum(a, b)


@triton.jit
def _each(a, b, TYPE: tl.constexpr, LARGER: tl.constexpr):
    """The larger or smaller of the entries of two words, place by place."""
    if TYPE.primitive_bitwidth != 16:
        return _farther(a, b, LARGER)
    elif INTERPRETED:
        one = unpacked(a, TYPE)
        other = unpacked(b, TYPE)
        low = _farther(one[0], other[0], LARGER)
        return packed((low, _farther(one[1], other[1], LARGER)), TYPE)
    else:
        NAME: tl.constexpr = ("max" if LARGER else "min") + (
            ".bf16x2" if TYPE.is_bf16() else ".f16x2"
        )
        return tl.inline_asm_elementwise(
            NAME + " $0, $1, $2;", "=r,r,r", [a, b], dtype=tl.int32, is_pure=True, pack=1
        )


@triton.jit
def extreme(words, TYPE: tl.constexpr, LARGER: tl.constexpr):
    """The largest or smallest entry at each place of tiles of words, in fp32, ignoring NaN."""
    found = words[0]
    for i in tl.static_range(1, len(words)):
        found = _each(found, words[i], TYPE, LARGER)
    entries = unpacked(found, TYPE)
    if len(entries) == 2:
        return _farther(entries[0], entries[1], LARGER)
    else:
        return entries[0]
