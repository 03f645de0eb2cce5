"""``fedraclora bench``: whole rounds of every engine, of central training and of the peers.

Nothing is imported here: the peers' own environments read `experiments.bench.usage`, and have no
Flower.
"""
