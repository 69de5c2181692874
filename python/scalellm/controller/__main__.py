"""`python -m scalellm.controller --fd N`: the controller's process; `serve` starts it."""

import sys

from scalellm.controller.process import main

sys.exit(main())
