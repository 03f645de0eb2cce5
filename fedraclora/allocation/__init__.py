"""Which layers have which rank."""
