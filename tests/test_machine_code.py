"""What `bench/aot/machine_code.py` reads from short listings, written by hand."""

import re

import pytest

pytest.importorskip("triton", reason="machine code comes from Triton's compiler")

from bench.aot import machine_code

# A row of the row-resident kernel: sums, a later row's load, the meeting, the gradient. One thread
# publishes, and every thread polls.
ROW = """
row:
    LDG.E R9, desc[UR4][R8.64]
    MUFU.EX2 R10, R20
    @!P2 STG.E.64 desc[UR4][R6.64], R10
    @!P0 LDG.E.128 R24, desc[UR4][R2.64]
    IADD3 R2, R2, R3, RZ
look:
    LDG.E.128.STRONG.GPU R14, desc[UR4][R12.64]
    ISETP.NE.AND P1, PT, R15, R30, PT
    @P1 BRA look
    FFMA R16, R14, R9, R10
    STG.E.128 desc[UR4][R4.64], R16
    MOV R20, R24
    @P3 EXIT
    BRA row
"""


def loop(text):
    """The loop over rows of a listing without addresses, whose branches go to labels."""
    lines, labels = [], {}
    for line in text.strip().splitlines():
        if line.endswith(":"):
            labels[line[:-1]] = f"0x{16 * len(lines):x}"
        else:
            lines.append(line.strip())
    listing = "\n".join(f"/*{16 * n:04x}*/  {line} ;  /* 0x */" for n, line in enumerate(lines))
    listing = re.sub(r"(BRA\S*.* )([a-z]+) ;", lambda m: f"{m[1]}{labels[m[2]]} ;", listing)
    return machine_code.row_loop(machine_code.parse(listing))


def order(text):
    return machine_code.order_of(loop(text), exponentials=1)


def after(start, added, text=ROW):
    """The text with a line added after the one that begins with `start`."""
    changed = re.sub(rf"( *{re.escape(start)}.*\n)", rf"\g<1>    {added}\n", text, count=1)
    assert changed != text
    return changed


def without(start, text=ROW):
    changed = re.sub(rf" *{re.escape(start)}.*\n", "", text, count=1)
    assert changed != text
    return changed


def test_a_row_with_a_prefetch():
    assert order(ROW) == machine_code.Order(ahead=1, early=0, late=0)


@pytest.mark.parametrize(
    "touch",
    [
        "PRMT R30, R27, 0x7632, R30",
        "FMUL R30, -R25.reuse, R9",
        "FADD R30, |R24|, R9",
        "HADD2.F32 R30, -RZ, R26.H0_H0",
        "IADD3 R24, R30, R9, RZ",
        "LDG.E R30, desc[UR4][R26.64]",
        "LDG.E.64 R26, desc[UR4][R8.64]",
        "STS.128 [R9+UR4], R24",
        "STS.64 [R9+UR4], R23",  # and R24
        "IMAD.WIDE R30, R8, 0x4, R26",
        "IMAD.WIDE.U32 R26, R8, R9, R30",
        "@P4 MOV R30, R27",
    ],
)
def test_a_touched_prefetch(touch):
    assert order(after("@!P0 LDG.E.128", touch)).early == 1
    assert order(after("look:", touch)).early == 1  # it waits for the load, then
    assert order(after("@P1 BRA look", touch)).early == 0


@pytest.mark.parametrize(
    "other",
    [
        "MOV R30, UR24",
        "MOV R30, R28",
        "LDS.64 R22, [R30]",
        "IMAD.WIDE R30, R23, R9, R32",  # its factors are single registers, not pairs
        "MOV R30, 0x24",
        "@P4 EXIT",
    ],
)
def test_an_untouched_prefetch(other):
    assert order(after("@!P0 LDG.E.128", other)).early == 0


def test_no_prefetch():
    """Loads after the gradient are none, and neither are those of this row's sums."""
    behind = after("STG.E.128", "LDG.E.128 R24, desc[UR4][R2.64]", without("@!P0 LDG.E.128"))
    assert order(behind)[:2] == (0, None)
    first = after("row:", "LDG.E.128 R20, desc[UR4][R2.64]", without("@!P0 LDG.E.128"))
    assert order(first)[:2] == (0, None)
    # A load at the beginning of the loop is one if no published number depends on it.
    both = after("row:", "LDG.E.128 R24, desc[UR4][R2.64]", without("@!P0 LDG.E.128"))
    assert order(both)[:2] == (1, 0)


def test_a_late_load():
    late = "LDG.E R9, desc[UR4][R8.64]"
    assert order(after("@P1 BRA look", late)).late == 1
    assert order(after("STG.E.128", late)).late == 0
    assert order(after("@!P0 LDG.E.128", late)).late == 0


def test_a_bounded_wait_and_a_second_meeting():
    bounded = after("ISETP", "@P5 BRA lost") + "lost:\n    BPT.TRAP 0x1\n"
    assert order(bounded) == order(ROW)
    published = ROW[ROW.index("    @!P2 STG.E") : ROW.index("    FFMA")]
    again = without("@!P0 LDG.E.128", published.replace("look", "again"))
    twice = ROW.replace("    FFMA", again + "    FFMA")
    assert order(twice) == order(ROW)
    # A load between the meetings is ahead of the second.
    between = after("@P1 BRA look", "LDG.E.128 R24, desc[UR4][R2.64]", twice)
    assert order(without("@!P0 LDG.E.128", between))[:2] == (1, 0)


def test_a_wait_that_is_not_one():
    """A poll that sees one multiprocessor alone waits for no sibling."""
    narrow = ROW.replace("LDG.E.128.STRONG.GPU R14", "LDG.E.STRONG.SM R14")
    assert order(narrow)[:2] == (0, None)


def test_diverged_warps_are_no_loop():
    """Their code lies behind the loop over rows, and branches back into it."""
    detour = after("row:", "BRA.DIV UR4, detour\n    NOP\njoin:")
    detour += "detour:\n    WARPSYNC.ALL\n    WARPSYNC.ALL\n    BRA join\n"
    assert [i.name for i in loop(detour)][:2] == ["BRA.DIV", "NOP"]
    assert len(loop(detour)) == len(loop(ROW)) + 2
