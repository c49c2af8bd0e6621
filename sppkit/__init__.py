"""sppkit: Structured Probabilistic Pruning and Channel Pruning in PyTorch, to be learned from."""

__version__ = "0.1.0"
