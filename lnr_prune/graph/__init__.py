"""Model -> channel groups. Knows nothing about solvers or adapters.

What comes in: a module and one call of it. ``trace`` exports the call to ATen operations. ``owners`` records, for every
element of every activation, which index of which parameter made it; ``rules`` follow this through pointwise
operations, and ``operations`` through all others. ``closure`` finds what can only leave together, and
``sizes`` finds the ints in the forward that count channels. What goes out: a `Graph` of `ChannelGroup` objects
(``groups``), each with its producers and consumers, the reasons why other layers stay whole, and which layer feeds
which (``flow``, drawn by ``drawing``). An operation that is not understood freezes the channels that it touches. All
rooms use ``module`` to look at a module's tensors, and ``modules`` for what is done to it and undone again: one verb
runs at a time, computed weights become plain ones, tensors are replaced.
"""
