"""Emulates object stores on this machine: moto for s3://, gcp-storage-emulator for gs://.

Each emulator starts at most once in a process of tests, and has one bucket, named
`bucket`. The functions return the environment variables with which clients find it.
"""

import contextlib
import functools
import http.server
import importlib.util
import json
import secrets
import socket
import threading
import urllib.request
from collections.abc import Callable, Iterator

import pytest

# The packages are only looked up here, since importing them takes a second.
for _name in ("gcsfs", "s3fs", "moto", "gcp_storage_emulator"):
    if not importlib.util.find_spec(_name):
        pytest.skip(f"{_name} of the extra `test` is missing", allow_module_level=True)

# Clients must reach nothing but the emulator, even on a machine of a cloud.
NOWHERE = {
    "AWS_CONFIG_FILE": "/nowhere",
    "AWS_SHARED_CREDENTIALS_FILE": "/nowhere",
    "AWS_EC2_METADATA_DISABLED": "true",
    "NO_GCE_CHECK": "true",
    "CLOUDSDK_CONFIG": "/nowhere",
}


def request(method: str, address: str, content: bytes | None = None) -> None:
    """Sends a request to an emulator."""
    headers = {"Content-Type": "text/plain"}
    urllib.request.urlopen(
        urllib.request.Request(address, content, headers, method=method)
    )


@functools.cache
def s3() -> dict[str, str]:
    """Starts an S3 emulator that accepts any keys."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    address = "http://{}:{}".format(*server.get_host_and_port())
    request("PUT", f"{address}/bucket")
    return {
        **NOWHERE,
        "AWS_ENDPOINT_URL": address,
        "AWS_ACCESS_KEY_ID": "somebody",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
    }


@contextlib.contextmanager
def s3_that_asks(allowed: str) -> Iterator[dict[str, str]]:
    """Lets the S3 emulator check keys.

    Args:
      allowed: The actions that are allowed, such as `s3:List*`.

    Yields:
      The environment variables with the keys of a user who may do only that.
    """
    import boto3

    environment = s3()
    names = {
        "endpoint_url": "AWS_ENDPOINT_URL",
        "aws_access_key_id": "AWS_ACCESS_KEY_ID",
        "aws_secret_access_key": "AWS_SECRET_ACCESS_KEY",
        "region_name": "AWS_DEFAULT_REGION",
    }
    options = {key: environment[name] for key, name in names.items()}
    iam = boto3.client("iam", **options)
    name = secrets.token_hex(4)
    iam.create_user(UserName=name)
    key = iam.create_access_key(UserName=name)["AccessKey"]
    statement = {"Effect": "Allow", "Action": [allowed], "Resource": "*"}
    policy = json.dumps({"Version": "2012-10-17", "Statement": [statement]})
    iam.put_user_policy(UserName=name, PolicyName=name, PolicyDocument=policy)
    # moto checks keys after this number of requests.
    address = f"{environment['AWS_ENDPOINT_URL']}/moto-api/reset-auth"
    request("POST", address, b"0")
    try:
        yield {
            **environment,
            "AWS_ACCESS_KEY_ID": key["AccessKeyId"],
            "AWS_SECRET_ACCESS_KEY": key["SecretAccessKey"],
        }
    finally:
        request("POST", address, b"inf")


@functools.cache
def gcs() -> dict[str, str]:
    """Starts a GCS emulator, which needs no credentials."""
    from gcp_storage_emulator.handlers import objects

    objects.download = _telling_generations(objects.download)
    # This import copies the handlers into a table, so it follows the change of one.
    from gcp_storage_emulator import server

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # By default the server queues five connections, but TensorStore opens more.
    http.server.HTTPServer.request_queue_size = 128
    emulator = server.create_server("127.0.0.1", port, True, default_bucket="bucket")
    emulator._api.daemon = True
    emulator.start()
    return at_gcs(f"http://127.0.0.1:{port}")


def at_gcs(address: str) -> dict[str, str]:
    """Returns the environment variables with which clients find a GCS at an address."""
    return {
        **NOWHERE,
        "STORAGE_EMULATOR_HOST": address,
        "TENSORSTORE_GCS_HTTP_URL": address,
        # This feature asks Google, not the emulator, for the kind of the bucket.
        "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
    }


@contextlib.contextmanager
def refusing_gcs(status: int, message: str) -> Iterator[dict[str, str]]:
    """Starts a server that refuses every request with an error of GCS."""
    body = json.dumps({"error": {"code": status, "message": message}}).encode()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        do_POST = do_PUT = do_DELETE = do_GET

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield at_gcs(f"http://127.0.0.1:{server.server_address[1]}")
        server.shutdown()


@contextlib.contextmanager
def known(environment: dict[str, str]) -> Iterator[None]:
    """Lets the clients of this process find a store, and discards cached clients."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
            patch.delenv(name, raising=False)
        for name, value in environment.items():
            patch.setenv(name, value)
        _forget_clients()
        yield
        _forget_clients()


def _forget_clients() -> None:
    import gcsfs
    import s3fs
    from etils.epath import backend

    backend.fsspec_backend._get_filesystem.cache_clear()
    gcsfs.GCSFileSystem.clear_instance_cache()
    s3fs.S3FileSystem.clear_instance_cache()


def _telling_generations(download: Callable) -> Callable:
    """Adds the header with an object's generation, which the emulator lacks.

    TensorStore reads it to overwrite an object; see
    cloud.google.com/storage/docs/xml-api/reference-headers#xgooggeneration
    """

    def with_generation(request, response, storage, *args, **options):
        download(request, response, storage, *args, **options)
        place = (request.params["bucket_name"], request.params["object_id"])
        if response.status < 300:
            stored = storage.get_file_obj(*place)
            response["x-goog-generation"] = stored["generation"]

    return with_generation
