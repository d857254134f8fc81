"""Least squares through both networks: the pruned one's inputs, the original one's outputs.

What comes in: the original model, the channels that are kept, and calibration data. ``network`` says which layers are
reached and which of their columns stay; ``refit`` walks both networks from layer to layer (``side_by_side``, on
coroutines); ``follow`` finds out what becomes of a layer's output ``downstream``, ``target`` what it should be, ``fit``
and ``regression`` the matrix that brings it there, with a ridge chosen on ``held_out`` samples; ``joint`` refits two
layers at once, in the coordinates of ``whitening``. What goes out: full-size weights of every layer that changed, and
how well each fits (`Refitted`).
"""
