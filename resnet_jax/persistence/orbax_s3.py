"""Lets Orbax keep checkpoints at `s3://`, of which it writes all but the arrays.

TensorStore, which writes those, has a driver for S3 as it has one for GCS; but Orbax
asks for drivers of files and GCS only, and its public interface has no place for
another (github.com/google/orbax/issues/359). Importing this module makes what Orbax
tells TensorStore for `gs://` serve `s3://` too.
"""

import functools
import os
from typing import Any

import orbax.checkpoint as ocp
from orbax.checkpoint._src.serialization import tensorstore_utils

# A file says that a checkpoint is whole, as Orbax does by itself at gs://; elsewhere it
# renames directories, which in a store is a copy that may be cut off.
ATOMICITY = ocp.options.AtomicityOptions(mode=ocp.options.AtomicityMode.COMMIT_FILE)


_of_gcs = tensorstore_utils.build_kvstore_tspec


@functools.wraps(_of_gcs)
def _build_kvstore_tspec(directory: str, *args, **options) -> dict[str, Any]:
    if not directory.startswith("s3://"):
        return _of_gcs(directory, *args, **options)
    place = directory.removeprefix("s3://")
    return _with_driver(_of_gcs(f"gs://{place}", *args, **options))


tensorstore_utils.build_kvstore_tspec = _build_kvstore_tspec


def _with_driver(spec: Any) -> Any:
    if not isinstance(spec, dict):
        return spec
    spec = {key: _with_driver(value) for key, value in spec.items()}
    if spec.get("driver") in ("gcs", "gcs_grpc"):
        spec |= {"driver": "s3", **_where()}
    return spec


def _where() -> dict[str, Any]:
    """What TensorStore does not look up where the AWS tools do."""
    found = os.environ.get
    where = {}
    # TensorStore asks the bucket of AWS for its region, and no other.
    if endpoint := found("AWS_ENDPOINT_URL_S3") or found("AWS_ENDPOINT_URL"):
        region = found("AWS_REGION") or found("AWS_DEFAULT_REGION") or "us-east-1"
        where = {"endpoint": endpoint, "aws_region": region}
    if found("AWS_ACCESS_KEY_ID"):
        # Else it says of each file of credentials that there is none.
        where["aws_credentials"] = {"type": "environment"}
    return where
