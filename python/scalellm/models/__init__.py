"""One file per architecture family, over layers/."""
