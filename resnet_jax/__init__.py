"""Residual networks in JAX: equal to their references, from a laptop to a pod."""

__version__ = "0.1.0"
