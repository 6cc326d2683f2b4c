"""Benchmarks of learners that discover the modules that tasks are made of, and recombine them."""
