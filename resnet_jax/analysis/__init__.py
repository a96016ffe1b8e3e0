"""Analyses of a network or of runs for research; each module is a command.

python -m resnet_jax.analysis.gradients --config=configs/quickstart.py --save=norms.png
python -m resnet_jax.analysis.degradation --runs=DIR,DIR --save=errors.png
"""
