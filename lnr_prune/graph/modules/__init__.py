"""What is done to the user's module, and undone again.

``guard`` lets one verb run at a time, and puts everything back after an error. ``folding`` finds weights that are
computed in every forward pass, and puts plain ones in their place. ``twins`` are tensors that take the place of others.
``constants`` are numbers that a forward reads from its buffers while it is traced.
"""
