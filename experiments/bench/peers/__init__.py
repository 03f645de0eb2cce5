"""Scripts that run in the environments of the peers; our own environment does not import them."""
