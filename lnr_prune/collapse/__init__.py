"""Take channels out, prove that nothing else has changed, and store the result.

What comes in: which channels of every group are kept, and full-size weights. ``masks`` sets the dropped channels to
zero, ``plan`` says as plain data which indices of which parameters stay, ``attributes`` which ints of the submodules
change with them. What goes out: a smaller module (``collapse``) or a graph (``graph_module``) that equals the masked
model (``verify``), else everything is as before (``remove``); ``trial`` finds out before what a module can lose. A plan
fits models of one architecture (``fingerprint``), to which it can be applied again (``apply``); ``record`` and
``files`` write and read all this without pickle.
"""
