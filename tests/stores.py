"""Object stores on this machine: moto for s3://, gcp-storage-emulator for gs://.

Each gives the environment with which clients find it; it has one bucket, `bucket`.
"""

import contextlib
import http.server
import json
import socket
import urllib.request
from collections.abc import Callable, Iterator

# No other store than the emulator is asked, whatever the machine is.
NOWHERE = {
    "AWS_CONFIG_FILE": "/nowhere",
    "AWS_SHARED_CREDENTIALS_FILE": "/nowhere",
    "AWS_EC2_METADATA_DISABLED": "true",
    "NO_GCE_CHECK": "true",
    "CLOUDSDK_CONFIG": "/nowhere",
}


def _request(method: str, address: str, content: dict | None = None) -> None:
    body = None if content is None else json.dumps(content).encode()
    headers = {"Content-Type": "application/json"}
    urllib.request.urlopen(
        urllib.request.Request(address, body, headers, method=method)
    )


@contextlib.contextmanager
def s3() -> Iterator[dict[str, str]]:
    """An S3; its address and somebody's keys, which are not looked at."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    try:
        address = "http://{}:{}".format(*server.get_host_and_port())
        _request("PUT", f"{address}/bucket")
        yield {
            **NOWHERE,
            "AWS_ENDPOINT_URL": address,
            "AWS_ACCESS_KEY_ID": "somebody",
            "AWS_SECRET_ACCESS_KEY": "secret",
            "AWS_DEFAULT_REGION": "us-east-1",
        }
    finally:
        server.stop()


@contextlib.contextmanager
def gcs() -> Iterator[dict[str, str]]:
    """A GCS, which asks for no credentials."""
    from gcp_storage_emulator.handlers import objects

    if not hasattr(objects.download, "__wrapped__"):
        objects.download = _telling_generations(objects.download)
    # Imported after, since it makes a table of the handlers.
    from gcp_storage_emulator import server

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # Its server lets five wait; TensorStore comes with more.
    http.server.HTTPServer.request_queue_size = 128
    with server.create_server("127.0.0.1", port, True, default_bucket="bucket"):
        address = f"http://127.0.0.1:{port}"
        yield {
            **NOWHERE,
            "STORAGE_EMULATOR_HOST": address,
            "TENSORSTORE_GCS_HTTP_URL": address,
            # Asks Google, not the emulator, what kind of bucket it is.
            "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
        }


def _telling_generations(download: Callable) -> Callable:
    """Adds what the emulator leaves out: TensorStore reads it to write an object again.

    cloud.google.com/storage/docs/xml-api/reference-headers#xgooggeneration
    """

    def with_generation(request, response, storage, *args, **options):
        download(request, response, storage, *args, **options)
        place = (request.params["bucket_name"], request.params["object_id"])
        if response.status < 300:
            found = storage.get_file_obj(*place)
            response["x-goog-generation"] = found["generation"]

    with_generation.__wrapped__ = download
    return with_generation
