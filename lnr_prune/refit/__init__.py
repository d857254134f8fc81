"""Least squares through both networks: the pruned one's inputs, the original one's outputs.

What comes in: the original model, the channels that are kept, and calibration data. ``network`` says which layers are
refitted and which of their columns stay. ``refit`` walks through both networks from layer to layer (``side_by_side``).
``follow`` records a forward pass (``recording``) and finds out what becomes of a layer's output
``downstream``. ``target`` is what the output should be. ``fit`` and ``regression`` compute the matrix for it, with a
ridge chosen on held-out samples. ``joint`` refits two layers at once, in the coordinates of ``whitening``. What goes
out: full-size weights of every layer that changed, and how well each fits (`Refitted`).
"""
