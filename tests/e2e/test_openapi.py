"""The server against its own document, by schemathesis: what /openapi.json permits and forbids.

SCALELLM_SCHEMA_CASES is how many requests of each operation are drawn (10), besides those at every
field's limits.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ..integration.gateways import Gateways, new_key
from ..integration.served import own_environment
from .wire import call

LIMIT_S = 600
CASES = os.environ.get("SCALELLM_SCHEMA_CASES", "10")
# A document of types does not say how fields depend on each other: some of what it permits is
# refused.
LEFT_OUT = "positive_data_acceptance"


@pytest.fixture
def server(tmp_path: Path) -> Iterator[tuple[str, str]]:
    """URL of a gateway before a fake engine, and a key."""
    url = f"sqlite:{tmp_path / 'accounts.db'}"
    gateways = Gateways(tmp_path, url, 1)
    try:
        yield gateways.urls[0], new_key(url)[1]
    finally:
        gateways.close()


def name_the_model(part: Any) -> None:
    """Hardly any text that is drawn would be a model's name."""
    if isinstance(part, dict):
        properties = part.get("properties", {})
        if "model" in properties and {"stream", "prompt", "tokens"} & set(properties):
            properties["model"] = {"enum": ["demo", None]}
        part = list(part.values())
    if isinstance(part, list):
        for item in part:
            name_the_model(item)


@pytest.mark.needs("schemathesis")
@pytest.mark.timeout(LIMIT_S + 60)
def test_no_request_is_answered_otherwise_than_the_document_says(
    server: tuple[str, str], tmp_path: Path
) -> None:
    url, secret = server
    document = call(url, "/openapi.json").json()
    name_the_model(document)
    file = tmp_path / "openapi.json"
    file.write_text(json.dumps(document))
    command = [sys.executable, "-m", "schemathesis.cli", "run", str(file), "--url", url]
    command += ["--header", f"Authorization: Bearer {secret}"]
    command += ["--phases", "coverage,fuzzing", "--max-examples", CASES, "--seed", "1"]
    command += ["--exclude-checks", LEFT_OUT, "--request-timeout", "60", "--continue-on-failure"]
    with (tmp_path / "said").open("w+") as said:
        done = subprocess.run(
            command,
            cwd=tmp_path,
            env=own_environment(),
            stdout=said,
            stderr=subprocess.STDOUT,
            timeout=LIMIT_S,
            check=False,
        )
        said.seek(0)
        assert done.returncode == 0, said.read()
