"""Hold methods to their authors' public code, which runs unchanged beside ours on a toy problem.

    python -m fedraclora.experiments.authors FOLDER [CHECK ...]

FOLDER holds a clone of each repository under the name ``OWNER+NAME``; without a CHECK all run whose
clone is there. No code of the authors is part of this project: a check loads the files that it
needs from the commit that it names, with empty modules in place of imports that the toy problem
does not use. Both get the same start, draws, replies and batches. Each check appends what it finds
to ``results/authors/authors.jsonl``, and is not run again for the same commit; ``--again`` does.

One module each: what is compared, what departs and why.
"""
