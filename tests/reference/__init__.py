"""The oracle of the tests: one client at a time, written to be read, for tests alone."""
