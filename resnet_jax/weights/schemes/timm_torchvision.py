"""Names and layouts of timm's networks, which torchvision's ResNets share.

`RESNET` is the scheme of timm's resnet.py, sknet.py, resnest.py and res2net.py,
`RESNET_V2` of its resnetv2.py, and `NORM_FREE` of its nfnet.py.
"""

from resnet_jax.models.spec import ResNetSpec
from resnet_jax.weights.naming import Layout, Rules, Scheme

LEAVES = {
    "kernel": "weight",
    "scale": "weight",
    "bias": "bias",
    "mean": "running_mean",
    "var": "running_var",
    "gain": "gain",
    "v": "v",
    "tau": "tau",
    "skip_gain": "skipinit_gain",
}
# The order of axes by rank: kernels HWIO -> OIHW, 1-D kernels KIO -> OIK, the head's
# (in, out) -> (out, in); vectors and scalars are unchanged.
TORCH_AXES = {4: (3, 2, 0, 1), 3: (2, 1, 0), 2: (1, 0), 1: (0,), 0: ()}

BLOCK = r"stage(?P<i>\d+)_block(?P<j>\d+)"


def torch_layout(path: str, rank: int) -> Layout:
    """Returns torch's order of axes for a variable.

    Args:
      path: The native name of the variable.
      rank: The number of its axes.
    """
    # timm keeps a gain with the rank of its kernel.
    return Layout(TORCH_AXES[rank], after=3 if path.endswith("/gain") else 0)


def _conv_head_layout(path: str, rank: int) -> Layout:
    # timm's head is a 1x1 convolution here.
    return Layout(TORCH_AXES[rank], after=2 if path == "head/kernel" else 0)


def _resnet_rules(spec: ResNetSpec) -> Rules:
    block = r"layer{i}.{j_before}"
    pool = int(spec.shortcut_pool)
    rules = [
        (r"stem_conv(?P<k>1)", "conv1" if len(spec.stem) == 1 else "conv1.0"),
        (r"stem_conv2", "conv1.3"),
        (r"stem_conv3", "conv1.6"),
        (rf"stem_norm{len(spec.stem)}", "bn1"),
        (r"stem_norm1", "conv1.1"),
        (r"stem_norm2", "conv1.4"),
        (r"stem_pool_conv", "maxpool.0"),
        (r"stem_pool_norm", "maxpool.1"),
        (r"head", "fc"),
        (f"{BLOCK}/shortcut/conv", f"{block}.downsample.{pool}"),
        (f"{BLOCK}/shortcut/norm", f"{block}.downsample.{pool + 1}"),
        (f"{BLOCK}/attention", f"{block}.se.conv"),
        (f"{BLOCK}/attention/(?P<layer>fc.)", f"{block}.se.{{layer}}"),
        # Res2Net
        (f"{BLOCK}/conv2_(?P<k>.+)", f"{block}.convs.{{k_before}}"),
        (f"{BLOCK}/norm2_(?P<k>.+)", f"{block}.bns.{{k_before}}"),
        # ResNeSt
        (f"{BLOCK}/conv2/norm", f"{block}.conv2.bn0"),
        (f"{BLOCK}/conv2/fc1_norm", f"{block}.conv2.bn1"),
        (f"{BLOCK}/conv2/(?P<layer>conv|fc1|fc2)", f"{block}.conv2.{{layer}}"),
    ]
    if spec.spatial == "selective_kernel":
        at = rf"{BLOCK}/conv(?P<k>\d)"
        path = r"(?P<p>\d)"
        conv = f"{block}.conv{{k}}"
        rules += [
            (f"{at}/path{path}_conv", f"{conv}.paths.{{p_before}}.conv"),
            (f"{at}/path{path}_norm", f"{conv}.paths.{{p_before}}.bn"),
            (f"{at}/(?P<layer>reduce|select)_conv", f"{conv}.attn.fc_{{layer}}"),
            (f"{at}/reduce_norm", f"{conv}.attn.bn"),
            (at, f"{conv}.conv"),
            (rf"{BLOCK}/norm(?P<k>\d)", f"{conv}.bn"),
        ]
    rules += [
        (rf"{BLOCK}/conv(?P<k>\d)", f"{block}.conv{{k}}"),
        (rf"{BLOCK}/norm(?P<k>\d)", f"{block}.bn{{k}}"),
    ]
    return rules


def _resnet_v2_rules(spec: ResNetSpec) -> Rules:
    block = r"stages.{i_before}.blocks.{j_before}"
    number = "" if len(spec.stem) == 1 else "{k}"
    return [
        (r"stem_(?P<layer>conv|norm)(?P<k>\d)", f"stem.{{layer}}{number}"),
        (f"{BLOCK}/shortcut/conv", f"{block}.downsample.conv"),
        (f"{BLOCK}/(?P<layer>.*)", f"{block}.{{layer}}"),
        (r"final_norm", "norm"),
        (r"head", "head.fc"),
    ]


def _norm_free_rules(spec: ResNetSpec) -> Rules:
    block = r"stages.{i_before}.{j_before}"
    number = "" if len(spec.stem) == 1 else "{k}"
    return [
        (r"stem_conv(?P<k>\d)", f"stem.conv{number}"),
        (f"{BLOCK}/shortcut/conv", f"{block}.downsample.conv"),
        (f"{BLOCK}/attention/(?P<layer>.*)", f"{block}.attn_last.{{layer}}"),
        (f"{BLOCK}/(?P<layer>.+)", f"{block}.{{layer}}"),
        (BLOCK, block),
        (r"final_conv", "final_conv"),
        (r"head", "head.fc"),
    ]


def _sequential_rules(spec: ResNetSpec) -> Rules:
    rules = []
    for pattern, template in _resnet_rules(spec):
        for old, new in (("conv1", "0"), ("bn1", "1"), ("maxpool", "3")):
            if pattern.startswith("stem_") and template.startswith(old):
                template = new + template.removeprefix(old)
        for i in range(1, len(spec.stage_sizes) + 1):
            stage = (r"stage(?P<i>\d+)", f"stage{i}"), ("layer{i}", str(i + 3))
            rules.append((pattern.replace(*stage[0]), template.replace(*stage[1])))
    return rules


def _transformers_rules(spec: ResNetSpec) -> Rules:
    block = r"encoder.stages.{i_before}.layers.{j_before}"
    rules = [("head", "classifier.1")]
    for ours, theirs in (("conv", "convolution"), ("norm", "normalization")):
        rules += [
            (f"stem_{ours}1", f"embedder.embedder.{theirs}"),
            (f"{BLOCK}/shortcut/{ours}", f"{block}.shortcut.{theirs}"),
            (rf"{BLOCK}/{ours}(?P<k>\d)", f"{block}.layer.{{k_before}}.{theirs}"),
        ]
    return rules


RESNET = Scheme("timm", _resnet_rules, LEAVES, torch_layout)
RESNET_V2 = Scheme("timm_v2", _resnet_v2_rules, LEAVES, _conv_head_layout)
NORM_FREE = Scheme("timm_nf", _norm_free_rules, LEAVES, torch_layout)
# Names of the same networks that are only read: those of torch's `Sequential` of a
# ResNet's children, which is how many programs cut the head off, and those of the
# transformers library.
SEQUENTIAL = Scheme(
    "torch_sequential", _sequential_rules, LEAVES, torch_layout, read_for="timm"
)
TRANSFORMERS = Scheme(
    "transformers", _transformers_rules, LEAVES, torch_layout, read_for="timm"
)
