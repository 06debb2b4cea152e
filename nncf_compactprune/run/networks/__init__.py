"""Small networks for demonstrations and benchmarks."""
