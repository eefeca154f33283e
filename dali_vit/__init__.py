"""Plain Vision Transformers on ImageNet-1k from raw JPEGs, by the recipe of big_vision."""
