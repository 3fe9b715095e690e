"""Training of supernet and sampler: curricula, steps, loop, checkpoints.

May import everything below it: `data`, `models`, `sampler`, `spaces`.
"""
