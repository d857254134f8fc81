"""What every long run needs, whatever it computes: processes, work folders, safe files, progress.

What comes in: the user's settings of a run (`Run` in ``run``). What goes out: a `Work` (``work``), which is passed to
every long step. It holds the `Ranks` that prune together (``processes``), the function that is told about progress
(``progress``), and the folder that keeps finished results (``stored``). This folder belongs to a single run
(``identity``, ``digest``). ``disk`` writes files completely or not at all, ``codec`` reads JSON without trusting it,
``checks`` has the checks of user settings, and ``optional`` imports packages that only some features need.
"""
