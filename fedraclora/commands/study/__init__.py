"""``fedraclora study``: tune the rows of a table equally, run them over seeds, and rank them."""
