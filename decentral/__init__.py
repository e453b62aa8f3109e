"""Decentralised and local SGD on PyTorch and Ray: launch, simulate, compare."""

__version__ = "0.1.0"
