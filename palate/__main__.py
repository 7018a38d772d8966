"""``python -m palate``, and what ``accelerate launch -m palate`` starts."""

import sys

from palate.cli import main

sys.exit(main())
