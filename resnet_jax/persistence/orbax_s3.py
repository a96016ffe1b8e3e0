"""Support of `s3://` for Orbax's checkpoints.

Orbax writes the arrays of a checkpoint with TensorStore, which has a driver for S3 as
well as for GCS. But Orbax asks only for the drivers of files and of GCS, and its public
interface has no place for another (github.com/google/orbax/issues/359). Importing this
module replaces the function of Orbax that builds TensorStore's specification, such that
`s3://` is handled like `gs://`.
"""

import functools
import os
from typing import Any

import orbax.checkpoint as ocp
from orbax.checkpoint._src.serialization import tensorstore_utils

# A file marks a checkpoint as complete, as it does by default at gs://. At other places
# Orbax renames directories, which in an object store is a copy that may be cut off.
ATOMICITY = ocp.options.AtomicityOptions(mode=ocp.options.AtomicityMode.COMMIT_FILE)


_build_for_gcs = tensorstore_utils.build_kvstore_tspec


@functools.wraps(_build_for_gcs)
def _build_kvstore_tspec(directory: str, *args, **options) -> dict[str, Any]:
    if not directory.startswith("s3://"):
        return _build_for_gcs(directory, *args, **options)
    place = directory.removeprefix("s3://")
    return _with_s3_driver(_build_for_gcs(f"gs://{place}", *args, **options))


tensorstore_utils.build_kvstore_tspec = _build_kvstore_tspec


def _with_s3_driver(spec: Any) -> Any:
    """Returns a TensorStore specification with the driver of S3 in place of GCS."""
    if not isinstance(spec, dict):
        return spec
    spec = {key: _with_s3_driver(value) for key, value in spec.items()}
    if spec.get("driver") in ("gcs", "gcs_grpc"):
        spec |= {"driver": "s3", **_s3_settings()}
    return spec


def _s3_settings() -> dict[str, Any]:
    """Returns the settings that TensorStore does not read where the AWS tools do."""
    get = os.environ.get
    settings: dict[str, Any] = {}
    # TensorStore asks only AWS itself for the region of a bucket.
    if endpoint := get("AWS_ENDPOINT_URL_S3") or get("AWS_ENDPOINT_URL"):
        region = get("AWS_REGION") or get("AWS_DEFAULT_REGION") or "us-east-1"
        settings = {"endpoint": endpoint, "aws_region": region}
    if get("AWS_ACCESS_KEY_ID"):
        # By default TensorStore logs that each of AWS's files is missing.
        settings["aws_credentials"] = {"type": "environment"}
    return settings
