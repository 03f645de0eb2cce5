"""The Flower app inside Flower's simulation runtime, and a SuperLink that runs it."""
