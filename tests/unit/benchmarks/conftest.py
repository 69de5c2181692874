"""benchmarks/ is no package that is installed; its scripts find each other beside themselves."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[3] / "benchmarks"))
