"""Draw figures from ledger rows; the only package that uses matplotlib."""
