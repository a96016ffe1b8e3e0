"""Reading and writing other frameworks' weights: one naming scheme a file.

`SCHEMES` has them by name; `naming.py` says what a scheme is.
"""

from resnet_jax.weights import akamaster, bit, highway, keras, timm, vgg

SCHEMES = {
    scheme.name: scheme
    for scheme in (
        *(timm.RESNET, timm.RESNET_V2, timm.NORM_FREE),
        *(vgg.VGG, akamaster.AKAMASTER, bit.BIT, highway.HIGHWAY),
        *(keras.APPLICATIONS, keras.TUTORIAL),
    )
}
