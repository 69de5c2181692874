"""`python -m scalellm`: the command line, under the interpreter that runs it."""

import sys

from scalellm.cli.main import main

sys.exit(main())
