"""The bundled demo model: a Qwen3 shape of 2.7 M parameters, and the scripts that made it.

``python -m scalellm.demo.train --out DIR`` trains it, ``python -m scalellm.demo.evaluate DIR``
measures it and writes its card.
"""

from pathlib import Path


def model_folder() -> Path:
    """The folder with the demo model, in Hugging Face's layout."""
    return Path(__file__).parent / "model"
