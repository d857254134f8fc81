"""``python -m lnr_prune``: the ``lnr-prune`` command, as torchrun starts it."""

from lnr_prune.cli.main import main

if __name__ == "__main__":
    main()
