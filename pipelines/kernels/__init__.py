"""What the training graph does for one image: compiled by Numba for a CPU, and RandAugment by Triton for a GPU.

A file holds all that is compiled together, as Numba's cache on disk looks at the age of a function's own file alone. No
floating-point operation may be reordered or fused, so that all processors give the same bytes.
"""
