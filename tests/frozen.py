"""Imported last by the server of `processes`: takes what it has imported out of Python's searches for cycles.

Else each fork that searches would visit all of it, and thereby copy its memory: 0.45 s of each.
"""

import gc

gc.freeze()
