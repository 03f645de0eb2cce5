"""Figures, made from ledger rows; the only package that knows matplotlib."""
