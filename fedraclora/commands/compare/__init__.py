"""``fedraclora compare``: compare methods, runs or the rows of a study."""
