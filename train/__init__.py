"""A thin on-policy training loop: rollouts of a student, scored by a teacher and by rewards.

`python -m train --config FILE key=value ...` runs it; `train.loop` reads top to bottom.
"""
