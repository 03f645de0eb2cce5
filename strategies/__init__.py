"""Run the server side: the methods, and the one round loop (`base`) that runs any of them."""
