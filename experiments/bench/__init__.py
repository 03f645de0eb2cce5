"""``fedraclora bench``: whole rounds of every engine, of the physical limit and of the peers.

Nothing is imported here: the peers' own environments read `experiments.bench.usage`, and have no
Flower.
"""
