"""Everything that outlives a process: workdirs, checkpoints, metrics, caches.

Paths may be on a file system or in an object store (`storage.py`). `checkpoints.py`
saves and restores the state of a run, `workdir.py` keeps a second run away, and
`preemption.py` stops a run on a signal after it has saved.
"""
