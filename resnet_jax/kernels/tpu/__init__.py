"""Batch norm for TPUs."""
