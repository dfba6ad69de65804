"""Whole networks on the stock layers of Flax, timed with and without `accelerate()`, and the same in PyTorch.

| file | what is in it |
|---|---|
| `layers.py` | the layers that a network is made of, whoever computes them |
| `flax_layers.py` | these on Flax Linen |
| `torch_layers.py` | these on PyTorch, with the parameters of the Flax network |
| `classifiers.py`, `images.py`, `sequences.py` | the networks, one function each |
| `catalogue.py` | the names, and the sizes that are timed |
| `family.py` | inference and training steps as cases of the benchmark |
"""
