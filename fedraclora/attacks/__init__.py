"""What clients that want to do harm send in a simulation."""
