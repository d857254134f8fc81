"""Results in the form that people read: text, HTML and figures.

What comes in: what was done to every group and layer (`GroupReport`, `LayerReport` in ``rows``), the points of a sweep,
the history of a solver. What goes out: a `Report` (``report``) or a `Sweep` (``frontier``). Both print as tables, which
``names`` keeps short, show themselves in notebooks, can be written as one HTML page, and can be drawn with matplotlib
(``plots``), which is imported only when a figure is wanted. Pages are made by ``html`` from the files in ``templates``;
``stages``, ``rails`` and ``chart`` say what is drawn there, and where.
"""
