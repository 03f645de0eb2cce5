"""Fed-RAC-LoRA: federated fine-tuning by a chain of randomised low-rank links."""

import os

# Nothing leaves the machine unless its user says so. Flower and Ray read these when imported.
for _name in ("FLWR_TELEMETRY_ENABLED", "RAY_USAGE_STATS_ENABLED"):
    os.environ.setdefault(_name, "0")
