"""The digests by which a gateway knows whether one engine continues what another has begun."""

from pathlib import Path

import torch
from safetensors.torch import save_file

from scalellm.loader.digest import weights_digest


def folder_with(folder: Path, weights: torch.Tensor) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    save_file({"weight": weights}, folder / "model.safetensors")
    return folder


def test_the_digest_names_the_weights_and_not_the_folder(tmp_path: Path) -> None:
    weights = torch.randn(512, 512)
    first = weights_digest(folder_with(tmp_path / "a", weights), "auto", 0)
    assert weights_digest(folder_with(tmp_path / "b", weights), "auto", 1) == first


def test_weights_of_one_shape_that_were_trained_on_have_another_digest(tmp_path: Path) -> None:
    weights = torch.randn(512, 512)
    first = weights_digest(folder_with(tmp_path / "a", weights), "auto", 0)
    trained = weights_digest(folder_with(tmp_path / "b", weights * 1.001), "auto", 0)
    assert trained != first


def test_dummy_weights_are_named_by_their_seed(tmp_path: Path) -> None:
    folder = folder_with(tmp_path / "a", torch.zeros(1))
    digests = {
        weights_digest(folder, load_format, seed)
        for load_format, seed in (("auto", 0), ("dummy", 0), ("dummy", 1))
    }
    assert len(digests) == 3
