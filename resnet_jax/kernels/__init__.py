"""Convolution, batch norm and pooling, as each platform computes them fastest."""
