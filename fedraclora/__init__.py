"""Fed-RAC-LoRA: federated fine-tuning by a chain of randomised low-rank links."""
