"""Kernels for TPUs: 1x1 convolutions that are fused with their batch norm."""
