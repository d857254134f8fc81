"""Results as people look at them: text, HTML and figures.

What comes in: what was done to every group and layer (`GroupReport`, `LayerReport` in ``rows``), the points of a sweep,
the history of a solver. What goes out: a `Report` (``report``) or a `Sweep` (``frontier``) that prints as a table,
shows itself in notebooks, is written as one HTML page without scripts (``html`` has its parts, ``chart`` its drawings),
and is drawn with matplotlib (``plots``), which is imported only when a figure is asked for.
"""
