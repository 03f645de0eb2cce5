"""The laboratory: a round to read, studies and their results, the benchmark, curves beside bounds.

It lies in a source checkout and in no wheel; nothing that is installed imports it but the rows of
``fedraclora bench`` and ``fedraclora theory``, when they run.
"""
