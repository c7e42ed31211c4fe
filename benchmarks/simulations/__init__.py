"""What ``benchmarks.statistics`` simulates: a module for each section of its table."""
