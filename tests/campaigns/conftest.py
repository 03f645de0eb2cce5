"""The programs of the campaigns are read by their tests, and not for doctests."""

collect_ignore_glob = ["[!t]*.py"]
