"""What is put around a method and is a method again.

`allocated` chooses the layers that are adapted, or puts `pruned` around, which cuts components;
`dora` gives adapted rows trained lengths.
"""
