"""Settings that all tests share."""

from hypothesis import settings

# The same examples in every run, on machines of any speed.
settings.register_profile("lnr-prune", deadline=None, derandomize=True, max_examples=50)
settings.load_profile("lnr-prune")
