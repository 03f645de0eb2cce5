"""Requests and replies as dataclasses, their checks, and the count of their bytes."""
