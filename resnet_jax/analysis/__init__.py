"""What researchers look at in a network or a run; one command a module.

python -m resnet_jax.analysis.gradients --config=configs/quickstart.py --save=norms.png
python -m resnet_jax.analysis.degradation --runs=DIR,DIR --save=errors.png
"""
