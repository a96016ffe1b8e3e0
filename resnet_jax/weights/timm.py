"""Names and layouts of timm's networks, of which torchvision's ResNets are a part.

`RESNET` is that of resnet.py, sknet.py, resnest.py and res2net.py; `RESNET_V2` of
resnetv2.py, and `NORM_FREE` of nfnet.py.
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
# By rank: kernels HWIO -> OIHW, of one dimension KIO -> OIK, the head's
# (in, out) -> (out, in), vectors and numbers unchanged.
TORCH_AXES = {4: (3, 2, 0, 1), 3: (2, 1, 0), 2: (1, 0), 1: (0,), 0: ()}

BLOCK = r"stage(?P<i>\d+)_block(?P<j>\d+)"


def torch_layout(path: str, rank: int) -> Layout:
    """torch's order of axes."""
    # A gain is kept with the rank of its kernel.
    return Layout(TORCH_AXES[rank], after=3 if path.endswith("/gain") else 0)


def _conv_head_layout(path: str, rank: int) -> Layout:
    # The head is a 1x1 convolution.
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
        theirs = f"{block}.conv{{k}}"
        rules += [
            (f"{at}/path{path}_conv", f"{theirs}.paths.{{p_before}}.conv"),
            (f"{at}/path{path}_norm", f"{theirs}.paths.{{p_before}}.bn"),
            (f"{at}/(?P<layer>reduce|select)_conv", f"{theirs}.attn.fc_{{layer}}"),
            (f"{at}/reduce_norm", f"{theirs}.attn.bn"),
            (at, f"{theirs}.conv"),
            (rf"{BLOCK}/norm(?P<k>\d)", f"{theirs}.bn"),
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


RESNET = Scheme("timm", _resnet_rules, LEAVES, torch_layout)
RESNET_V2 = Scheme("timm_v2", _resnet_v2_rules, LEAVES, _conv_head_layout)
NORM_FREE = Scheme("timm_nf", _norm_free_rules, LEAVES, torch_layout)
