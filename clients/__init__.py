"""Client side: one Flower ClientApp that serves every method."""
