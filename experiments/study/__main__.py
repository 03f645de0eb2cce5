"""``python -m experiments.study``."""

import sys

from experiments.study.command import main

sys.exit(main())
