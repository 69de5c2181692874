"""Models of other sizes with the demo's tokenizer, for tests whose outcome depends on the size."""

import json
from pathlib import Path

from scalellm.demo import model_folder

# In int8 about 80 MB: large enough that two ranks are quicker than one, and for the packed cache.
LARGER = {"hidden_size": 1024, "num_hidden_layers": 6, "intermediate_size": 3072, "head_dim": 128}


def made_model(folder: Path, **changes: int) -> Path:
    """`folder` with the demo's config but for `changes`, and without weights."""
    folder.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((model_folder() / name).read_bytes())
    config = json.loads((model_folder() / "config.json").read_text())
    for key in ("layer_types", "max_window_layers"):
        config.pop(key, None)
    (folder / "config.json").write_text(json.dumps(config | changes))
    return folder
