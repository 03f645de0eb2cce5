"""``fedraclora init``: folders to begin with, a project or the example of a tutorial."""
