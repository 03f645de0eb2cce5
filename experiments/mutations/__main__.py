"""``python -m experiments.mutations``: plants defects of public code, and has the tests find them.

Each defect is a change of one line or two in a copy of the tree. The contract suite
(for the methods that are concerned, or the test of the law; in a process of its own) must fail on
the copy, in an assertion, and pass without the change. Keys:

  only=   names of defects, with commas
  out=    a file to write the record to, in Markdown

The defects are those that were found in public implementations of federated low-rank methods, and
the ways to get their algebra wrong that lie beside them, and the like for server optimisers,
control variates and buffers. Methods are tested under alpha != rank, m != n and unequal weights,
or most of these would pass.
"""

from __future__ import annotations

import sys

from experiments.mutations import main

if __name__ == "__main__":
    sys.exit(main())
