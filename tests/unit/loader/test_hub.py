"""Hub ids: what is asked for, and the way out of each failure. No test touches the network."""

from types import SimpleNamespace

import huggingface_hub
import pytest
from huggingface_hub.errors import (
    GatedRepoError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from scalellm.errors import ModelNotFoundError
from scalellm.loader.hub import resolve_model


def refused(kind):
    return kind("no", response=SimpleNamespace(status_code=404, headers={}, request=None))


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """Replace the download by a call that is recorded and may fail."""
    calls = []

    def fake(repo, **options):
        calls.append((repo, options))
        if isinstance(fake.answer, Exception):
            raise fake.answer
        return str(fake.answer)

    fake.answer = tmp_path
    fake.calls = calls
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fake)
    return fake


def test_folder_needs_no_hub(tmp_path, hub):
    assert resolve_model(str(tmp_path)) == tmp_path
    assert hub.calls == []


@pytest.mark.parametrize("name", ["./absent", "/absent/model", "a/b/c", "~/absent", "two words"])
def test_paths_are_not_taken_for_hub_ids(hub, name):
    with pytest.raises(ModelNotFoundError, match="does not exist"):
        resolve_model(name)
    assert hub.calls == []


def test_only_needed_files_are_downloaded(hub, tmp_path):
    assert resolve_model("owner/name", "v2", token="secret") == tmp_path
    repo, options = hub.calls[0]
    assert (repo, options["revision"], options["token"]) == ("owner/name", "v2", "secret")
    assert "*.safetensors" in options["allow_patterns"]
    assert not any("bin" in pattern for pattern in options["allow_patterns"])
    assert "consolidated*" in options["ignore_patterns"]


def test_weights_may_be_left_out(hub):
    resolve_model("owner/name", weights=False)
    assert "*.safetensors*" in hub.calls[0][1]["ignore_patterns"]


@pytest.mark.parametrize(
    ("error", "advice"),
    [
        (refused(RepositoryNotFoundError), "no folder 'owner/name' here and no model"),
        (refused(GatedRepoError), "accept its terms at https://huggingface.co/owner/name"),
        (refused(RevisionNotFoundError), "no revision 'v9'"),
        (LocalEntryNotFoundError("no route"), "hf download owner/name"),
        (OSError("disk full"), "disk full"),
    ],
)
def test_failures_say_how_to_proceed(hub, error, advice):
    hub.answer = error
    with pytest.raises(ModelNotFoundError, match=advice):
        resolve_model("owner/name", "v9")


def test_offline_is_named(hub, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    hub.answer = LocalEntryNotFoundError("offline")
    with pytest.raises(ModelNotFoundError, match="HF_HUB_OFFLINE is set"):
        resolve_model("owner/name")
