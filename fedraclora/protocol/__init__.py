"""Messages between a method and its clients: factors, adapters, merges, updates, programs."""
