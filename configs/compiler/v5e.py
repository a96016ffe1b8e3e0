r"""Options of XLA's compiler for TPU v5e, as this command found them:

python -m resnet_jax.plan --sweep --config=configs/r50.py --topology=v5e:2x4 \
    --per_chip=128

README.md says what was tried.
"""

OPTIONS = {
    "xla_tpu_scoped_vmem_limit_kib": 49152,
    "xla_tpu_async_copy_bandwidth_scaling_factor": 0.18,
}
