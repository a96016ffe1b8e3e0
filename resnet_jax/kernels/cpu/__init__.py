"""Kernels for CPUs: lowerings of convolutions, batch norm and max pooling."""
