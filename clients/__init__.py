"""Run the client side: one Flower ClientApp that serves every method."""
