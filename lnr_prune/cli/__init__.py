"""The ``lnr-prune`` command: it turns what is typed into library calls, and results into text, JSON and files.

``main`` assembles the commands, which are in ``prune`` and ``commands``. ``options`` has the options that they share.
``models`` and ``data`` read models and calibration data by their command-line names; ``recipe`` reads and writes all
options of a run, and ``export`` writes the pruned model as a program. ``console`` prints results and
errors; each kind of error has its own exit code. Nothing here is needed to use the library from Python.
"""
