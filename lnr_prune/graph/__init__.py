"""Model -> channel groups. Knows nothing of solvers or adapters.

What comes in: a module and one call of it. ``trace`` exports the call to ATen operations; ``owners`` follows, for every
element of every activation, which index of which parameter made it, through data movement (``moves``), products
(``contractions``) and the other operations (``rules``); ``closure`` finds what can only leave together, ``sizes`` the
ints in the forward that count channels. What goes out: a `Graph` of `ChannelGroup` objects (``groups``), each with its
producers and consumers, the reasons why other layers stay whole, and who feeds whom (``flow``, drawn by ``drawing``).
What is not understood freezes the channels that it touches. ``module`` is how all rooms look at a module's tensors.
"""
