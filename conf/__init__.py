"""Configuration files, one folder per group; packaged, so that the console script finds them."""
