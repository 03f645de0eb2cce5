"""Show progress and tables on a terminal."""
