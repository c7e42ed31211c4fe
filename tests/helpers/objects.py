"""A real S3 server on this machine (moto's), and what tests do to its objects from outside."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

BUCKET = "raylora-tests"
KEY, SECRET = "key-of-the-tests", "secret-of-the-tests"
RECORDS = b'[{"question": "Who?", "answer": "I."}]'
"""A dataset of one record."""


class Objects:
    """The bucket, as another program sees it."""

    def __init__(self, client: Any) -> None:
        self._client = client

    def names(self, prefix: str = "") -> list[str]:
        pages = self._client.get_paginator("list_objects_v2").paginate(Bucket=BUCKET, Prefix=prefix)
        return [entry["Key"] for page in pages for entry in page.get("Contents", [])]

    def put(self, name: str, data: bytes) -> None:
        self._client.put_object(Bucket=BUCKET, Key=name, Body=data)

    def get(self, name: str) -> bytes:
        data: bytes = self._client.get_object(Bucket=BUCKET, Key=name)["Body"].read()
        return data

    def remove(self, prefix: str) -> None:
        for name in self.names(prefix):
            self._client.delete_object(Bucket=BUCKET, Key=name)

    def everything(self) -> dict[str, bytes]:
        return {name: self.get(name) for name in self.names()}


@contextmanager
def s3_server() -> Iterator[tuple[str, Objects]]:
    """Its address, and an empty bucket. The environment tells every process here of it."""
    moto = pytest.importorskip("moto.server", reason="no S3 server: pip install 'moto[s3]' flask flask-cors")
    pytest.importorskip("s3fs", reason="pip install 'raylora[s3]'")
    import logging

    import boto3
    import s3fs

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {
            "AWS_ENDPOINT_URL": f"http://{host}:{port}",
            "AWS_ACCESS_KEY_ID": KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET,
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
        }.items():
            patch.setenv(name, value)
        s3fs.S3FileSystem.clear_instance_cache()  # instances are kept, and with them an earlier server's address
        client = boto3.client("s3")
        client.create_bucket(Bucket=BUCKET)
        yield f"http://{host}:{port}", Objects(client)
    server.stop()
