"""NVIDIA DALI graphs that turn image files into batches of training and evaluation images."""
