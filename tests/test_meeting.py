"""The kernel that measures the meeting (`bench/gpu/meeting.py`), its programs side by side."""

import pytest

pytest.importorskip("triton", reason="needs Triton's interpreter")

from bench.gpu import meeting


@pytest.mark.parametrize("seed", range(3))
def test_all_meet(seed, interleaved):
    with interleaved(seed):
        wrong = meeting.meet(splits=3, groups=2, rounds=6, device="cpu")
    assert wrong.tolist() == [0] * 6


def test_a_program_that_does_not_come_is_no_hang(interleaved, monkeypatch):
    """One in three stays away; the others wait for a while, once."""
    monkeypatch.setattr(meeting, "BOUND", 20)
    arrive = meeting.meeting_kernel
    monkeypatch.setattr(meeting, "meeting_kernel", {(3,): lambda *a, **o: arrive[(2,)](*a, **o)})
    with interleaved(0):
        wrong = meeting.meet(splits=3, groups=1, rounds=6, device="cpu")
    assert (wrong[:2] > 0).all()


def test_a_slot_used_too_early_is_seen(interleaved, monkeypatch):
    """With one slot in place of two, a fast program overwrites what a slow one has yet to read."""
    monkeypatch.setattr(meeting, "SLOTS", 1)
    found = 0
    for seed in range(8):
        with interleaved(seed):
            found += int(meeting.meet(splits=3, groups=1, rounds=6, device="cpu").sum())
    assert found
