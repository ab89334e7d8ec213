"""How good a reconstruction is: tensors in, numbers out.

Frames are floats (N, 3, H, W) in [0, 1] unless a function says otherwise.
"""
