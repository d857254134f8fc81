"""The ``lnr-prune`` command: what is typed becomes calls of the library, and results become text, JSON and files.

``main`` assembles the commands; ``prune`` and ``commands`` are they; ``options`` are what they share, ``models`` and
``data`` read models and calibration data as the command line names them, and ``console`` says results and errors, each
error with an exit code of its own. Nothing here is needed to use the library from Python.
"""
