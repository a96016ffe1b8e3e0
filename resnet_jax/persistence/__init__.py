"""Workdirs, checkpoints, object stores, logs and caches: what outlives a process."""
