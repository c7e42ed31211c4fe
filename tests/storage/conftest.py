"""An object store on a real S3 server."""

from __future__ import annotations

import pytest

from raylora.storage.objects import Remote
from tests.helpers.objects import BUCKET, Objects


@pytest.fixture
def remote(objects: Objects) -> Remote:
    return Remote(f"s3://{BUCKET}/out")
