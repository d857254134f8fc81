"""Recipes: whole sessions on real data, run by the ``lnr-prune`` command. They need the ``recipes`` extra."""
