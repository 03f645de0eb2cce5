"""Training that is somebody else's: what a function of the user's is given, and what it gives."""
