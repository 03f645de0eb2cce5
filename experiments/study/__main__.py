"""``python -m fedraclora.experiments.study``."""

import sys

from fedraclora.experiments.study.command import main

sys.exit(main())
