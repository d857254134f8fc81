"""What every long run needs, whatever it computes: processes, work folders, safe files, progress.

What comes in: the user's settings of a run (`Run` in ``run``). What goes out: a `Work` (``work``), which is handed down
to every long step. It holds the `Ranks` that prune together (``processes``), the function that is told of progress
(``progress``), and the folder in which finished results are kept (``stored``), which belongs to one run only
(``identity``, ``digest``). ``disk`` writes files whole or not at all, ``codec`` reads JSON without trust, ``checks``
are those that settings make of themselves, and ``optional`` imports packages that are needed for some things only.
"""
