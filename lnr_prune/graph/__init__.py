"""Model -> channel groups. Knows nothing of solvers or adapters."""
