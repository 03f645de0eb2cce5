"""Campaigns: very many inputs that nobody should send, and what must hold all the same."""
