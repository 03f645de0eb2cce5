"""``fedraclora init``: write a new project, or the example of a tutorial."""
