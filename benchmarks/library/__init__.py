"""What the benchmark scripts import: networks, data, methods and tables."""
