"""Plain Vision Transformers on ImageNet-1k from raw JPEGs, at the speed of the GPUs."""
