"""Take channels out, prove that nothing else has changed, and store the result.

What comes in: which channels of every group are kept, and full-size weights. ``masks`` sets the dropped channels to
zero. ``plan`` says as plain data which indices of which parameters stay, and ``attributes`` which ints of the
submodules change with them. ``trial`` finds out beforehand what a module can lose. What goes out: a smaller module
(``collapse``) or a graph (``graph_module``). ``verify`` checks that it equals the masked model; if not, ``remove``
puts everything back. A plan fits models of one architecture (``fingerprint``), and can be applied to them again
(``apply``). ``record`` and ``files`` write and read all this without pickle.
"""
