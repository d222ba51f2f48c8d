"""``python -m healing_utils ...`` is ``healing ...``."""

import sys

from healing_utils.cli import main

sys.exit(main())
