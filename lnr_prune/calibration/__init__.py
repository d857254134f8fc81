"""Run the model on data, watch its layers, sum second moments.

What comes in: the user's batches, which become calls of the model (``data``, ``calls``). ``watch`` sees every call of a
layer's weight, whoever makes it and however it is written (``functions``); ``visible`` makes the calls in attention and
recurrent layers visible. An ``adapter`` turns such a call into rows x and y (``rows``), and one pass sums the
``moments`` of all layers (``gather``). ``places`` says which samples are held out. What goes out: channel groups with
the second moments of the layers that read them (`Reading` in ``reading``), and the model's outputs (``outputs``) with
their ``divergence`` from the original's.
"""
