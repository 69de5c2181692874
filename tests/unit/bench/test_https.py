"""An https target whose certificate no public authority signed."""

from pathlib import Path

import pytest

from scalellm.bench.target import Trust
from scalellm.cli.main import main
from scalellm.errors import ConfigError

CERTIFICATE = Path(__file__).with_name("localhost.pem")
LOAD = ["--concurrency", "2", "--requests", "4", "--input-tokens", "16", "--output-tokens", "4"]


def bench(url: str, *flags: str) -> int:
    return main(["bench", "serve", "--url", url, *LOAD, *flags])


@pytest.mark.parametrize("flags", [["--ca-cert", str(CERTIFICATE)], ["--insecure"]])
def test_it_is_measured_where_one_says_whom_to_believe(secure_endpoint, flags: list[str]) -> None:
    assert bench(secure_endpoint.url, *flags) == 0
    assert secure_endpoint.behaviour.bodies


def test_it_is_refused_otherwise(secure_endpoint, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench(secure_endpoint.url) == 1
    assert not secure_endpoint.behaviour.bodies
    said = capsys.readouterr()
    assert "certificate" in said.out + said.err


def test_a_file_without_certificates_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "empty.pem").write_text("nothing")
    for path in ("empty.pem", "absent.pem"):
        with pytest.raises(ConfigError, match=f"--ca-cert: .*{path}"):
            Trust.read(tmp_path / path, insecure=False)
