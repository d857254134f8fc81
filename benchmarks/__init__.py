"""Scripts that measure, and in `benchmarks.library` what they import; see README.md."""
