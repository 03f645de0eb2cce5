"""Build checked, frozen settings from a plain nested dict, and a task from these."""
