"""Object stores on this machine: moto for s3://, gcp-storage-emulator for gs://.

Each runs once in a process of tests, and has one bucket, `bucket`; what is given is the
environment with which clients find it.
"""

import contextlib
import functools
import http.server
import json
import secrets
import socket
import threading
import urllib.request
from collections.abc import Callable, Iterator

import pytest

for _name in ("gcsfs", "s3fs", "moto", "gcp_storage_emulator"):
    pytest.importorskip(_name, reason=f"{_name} of the extra `test` is missing")

# No other store than the emulator is asked, whatever the machine is.
NOWHERE = {
    "AWS_CONFIG_FILE": "/nowhere",
    "AWS_SHARED_CREDENTIALS_FILE": "/nowhere",
    "AWS_EC2_METADATA_DISABLED": "true",
    "NO_GCE_CHECK": "true",
    "CLOUDSDK_CONFIG": "/nowhere",
}


def request(method: str, address: str, content: bytes | None = None) -> None:
    """Sends something to an emulator."""
    headers = {"Content-Type": "text/plain"}
    urllib.request.urlopen(
        urllib.request.Request(address, content, headers, method=method)
    )


@functools.cache
def s3() -> dict[str, str]:
    """An S3; its address and somebody's keys, which are not looked at."""
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
    """An S3 that looks at keys, those of a user who is allowed some actions only."""
    import boto3

    environment = s3()
    names = {
        "endpoint_url": "AWS_ENDPOINT_URL",
        "aws_access_key_id": "AWS_ACCESS_KEY_ID",
        "aws_secret_access_key": "AWS_SECRET_ACCESS_KEY",
        "region_name": "AWS_DEFAULT_REGION",
    }
    told = {key: environment[name] for key, name in names.items()}
    iam = boto3.client("iam", **told)
    name = secrets.token_hex(4)
    iam.create_user(UserName=name)
    key = iam.create_access_key(UserName=name)["AccessKey"]
    may = {"Effect": "Allow", "Action": [allowed], "Resource": "*"}
    policy = json.dumps({"Version": "2012-10-17", "Statement": [may]})
    iam.put_user_policy(UserName=name, PolicyName=name, PolicyDocument=policy)
    after = f"{environment['AWS_ENDPOINT_URL']}/moto-api/reset-auth"
    request("POST", after, b"0")
    try:
        yield {
            **environment,
            "AWS_ACCESS_KEY_ID": key["AccessKeyId"],
            "AWS_SECRET_ACCESS_KEY": key["SecretAccessKey"],
        }
    finally:
        request("POST", after, b"inf")


@functools.cache
def gcs() -> dict[str, str]:
    """A GCS, which asks for no credentials."""
    from gcp_storage_emulator.handlers import objects

    objects.download = _telling_generations(objects.download)
    # Imported after, since it makes a table of the handlers.
    from gcp_storage_emulator import server

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # Its server lets five wait; TensorStore comes with more.
    http.server.HTTPServer.request_queue_size = 128
    emulator = server.create_server("127.0.0.1", port, True, default_bucket="bucket")
    emulator._api.daemon = True
    emulator.start()
    return at_gcs(f"http://127.0.0.1:{port}")


def at_gcs(address: str) -> dict[str, str]:
    """The environment of a GCS at an address."""
    return {
        **NOWHERE,
        "STORAGE_EMULATOR_HOST": address,
        "TENSORSTORE_GCS_HTTP_URL": address,
        # Asks Google, not the emulator, what kind of bucket it is.
        "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
    }


@contextlib.contextmanager
def refusing_gcs(status: int, message: str) -> Iterator[dict[str, str]]:
    """What answers each request as GCS does that refuses it."""
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
    """Lets the clients of this process find a store; those before are forgotten."""
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
    """Adds what the emulator leaves out: TensorStore reads it to write an object again.

    cloud.google.com/storage/docs/xml-api/reference-headers#xgooggeneration
    """

    def with_generation(request, response, storage, *args, **options):
        download(request, response, storage, *args, **options)
        place = (request.params["bucket_name"], request.params["object_id"])
        if response.status < 300:
            found = storage.get_file_obj(*place)
            response["x-goog-generation"] = found["generation"]

    return with_generation
