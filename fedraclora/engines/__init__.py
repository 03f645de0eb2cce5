"""Run the clients of a round. Each engine has a `Grid` that takes requests and returns replies."""
