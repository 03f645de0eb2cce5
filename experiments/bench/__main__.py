"""``python -m fedraclora.experiments.bench``."""

import sys

from fedraclora.experiments.bench.command import main

sys.exit(main())
