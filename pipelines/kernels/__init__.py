"""What the training graph does to one image, compiled by Numba for a CPU; for a GPU, Triton compiles RandAugment.

Functions that are compiled together are in one file, as Numba's cache on disk checks the age of a function's own file
alone. No floating-point operation may be reordered or fused, so that all processors give the same bytes.
"""
