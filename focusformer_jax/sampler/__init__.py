"""The architecture sampler: policy network, exact budgets, rewards.

May import `spaces` and `config`; knows nothing of models or training.
"""
