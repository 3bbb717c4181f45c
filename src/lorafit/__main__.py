"""`python -m lorafit` is `lorafit`."""

import sys

from lorafit.cli.main import main

sys.exit(main())
