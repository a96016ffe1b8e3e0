"""Everything that outlives a process: workdirs, checkpoints, metrics, caches.

Paths may be on a file system or in an object store (`storage.py`).
"""
