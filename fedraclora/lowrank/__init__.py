"""Low-rank algebra on matrices, and the one matrix view of every kind of layer."""
