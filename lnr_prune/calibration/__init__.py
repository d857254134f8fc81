"""Run the model on data, watch its layers, sum second moments.

What comes in: the user's batches, which become calls of the model (``data``, ``calls``). ``watch`` sees every call of a
layer's weight, whoever makes it (``attention`` makes those of nn.MultiheadAttention visible, ``recording`` keeps all
functions of a forward pass); an ``adapter`` turns such a call into rows x and y (``rows``), whose ``moments`` one pass
sums for all layers (``gather``). What goes out: channel groups with the second moments of the layers that read them
(`Reading` in ``reading``), and the model's outputs (``outputs``) with their ``divergence`` from the original's.
"""
