"""Options of XLA's compiler for TPU v5e; README.md here has what was tried."""

OPTIONS = {
    # What one operation may keep in the chip's own memory: four times the default.
    "xla_tpu_scoped_vmem_limit_kib": 65536,
}
