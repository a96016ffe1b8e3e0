"""Convolution, batch norm and pooling for CPUs."""
