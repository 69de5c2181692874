"""One server for every test that leaves it as it was; each checks that it did."""

from collections.abc import Iterator

import openai
import pytest

from ..integration.served import Serve
from ..integration.supervised import until
from .wire import is_at_rest


@pytest.fixture(scope="session")
def shared_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serve]:
    made = Serve(tmp_path_factory.mktemp("serve"), "--kv-cache-memory", "256MiB")
    yield made
    made.close()


@pytest.fixture
def server(shared_server: Serve) -> Iterator[Serve]:
    """The shared server. Afterwards it has to be at rest, with the engine it had before."""
    engine = shared_server.engine_pid()
    yield shared_server
    until(lambda: is_at_rest(shared_server.url))
    assert shared_server.engine_pid() == engine


@pytest.fixture
def client(server: Serve) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=server.url + "/v1", api_key="any", max_retries=0) as made:
        yield made
