#!/usr/bin/env bash
# Builds the package, installs it into an empty environment, and uses it in an empty
# directory, as somebody does who has no checkout:
#
#   tests/wheel.sh PYTHON [CONSTRAINTS]
set -euo pipefail
python=$1 constraints=${2:-}
[[ -z $constraints ]] || constraints=$(realpath "$constraints")
cd "$(dirname "$0")/.."

place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
mkdir "$place/source" "$place/empty"
# A copy, as a build leaves files behind that a later one would take for new ones.
cp -r pyproject.toml requirements.txt README.md LICENSE configs resnet_jax "$place/source"
unset PYTHONPATH JAX_NUM_CPU_DEVICES
export JAX_PLATFORMS=cpu PIP_DISABLE_PIP_VERSION_CHECK=1

"$python" -m venv "$place/environment"
pip=$place/environment/bin/pip
"$pip" wheel -q --no-deps --wheel-dir="$place" "$place/source"
rm -r "$place/source"
"$pip" install -q ${constraints:+-c "$constraints"} "$place"/resnet_jax-*.whl

cd "$place/empty"
export PATH=$place/environment/bin:$PATH

# Prints a command, runs it, and fails if its output lacks a pattern.
expect() {
    local pattern=$1 said
    shift
    echo "+ $*"
    said=$("$@" 2>&1) || {
        echo "$said"
        echo "error: the command above failed." >&2
        exit 1
    }
    grep -Eq -- "$pattern" <<< "$said" || {
        echo "$said"
        echo "error: the output above has no line like '$pattern'." >&2
        exit 1
    }
}

network="--config.model.overrides={'stage_sizes': (1, 1, 1)}"
small=(--config=configs/quickstart.py --workdir=run "$network")
small+=(--config.optim.warmup.steps=5 --config.optim.schedule=constant)

expect "^$place/environment/" python -c 'import resnet_jax; print(resnet_jax.__file__)'
expect 'No module' python -c $'try: import configs\nexcept ImportError as e: print(e)'
expect '^  train ' resnet-jax --help
expect '^resnet_jax [0-9]' resnet-jax --version
expect 'r50.py' resnet-jax recipes
expect '^optim.momentum=0.9 ' resnet-jax keys 'optim.*'
expect 'resnet50 ' python -m resnet_jax.zoo 'resnet50*'
expect 'all is well' resnet-jax train --config=configs/r50.py --mode=dry_run
expect 'at step 20' resnet-jax train "${small[@]}" --config.total.steps=20
expect 'from the checkpoint of step 20' python -m resnet_jax.main "${small[@]}" --config.total.steps=40
expect 'at step 40' resnet-jax eval --workdir=run --checkpoint=last
expect 'report.png' resnet-jax report run
expect 'local' resnet-jax plan "${small[@]:0:1}" "$network" --topology=local

cat > mine.py <<'END'
from resnet_jax.config import RECIPES, load

def get_config():
    config = load(RECIPES / "quickstart.py")
    config.batch_size = 64
    return config
END
expect 'all is well' resnet-jax train --config=mine.py --mode=dry_run

python - <<'END'
import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

pixels = load_digits().images[3] * 255 / 16
Image.fromarray(pixels.astype(np.uint8)).save("three.png")
END
expect 'three.png' resnet-jax predict run three.png
expect 'mine.safetensors' resnet-jax convert run mine.safetensors
expect 'three.png' resnet-jax predict mine.safetensors three.png
echo "The package works outside of a checkout."
