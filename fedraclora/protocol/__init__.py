"""What a method and its clients tell each other: factors, adapters, links, updates, programs."""
