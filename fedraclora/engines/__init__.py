"""Engines run the clients of a round. Each has a `Grid`, which takes requests, returns answers."""
