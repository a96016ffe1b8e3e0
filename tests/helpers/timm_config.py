"""A `config.json` as timm writes it beside weights."""

CONFIG = {
    "architecture": "resnet50",
    "num_classes": 1000,
    "pretrained_cfg": {
        "tag": "tv_in1k",
        "input_size": [3, 176, 176],
        "interpolation": "bicubic",
        "crop_pct": 0.95,
        "mean": [0.1, 0.2, 0.3],
        "std": [0.4, 0.5, 0.6],
        "license": "apache-2.0",
    },
}
