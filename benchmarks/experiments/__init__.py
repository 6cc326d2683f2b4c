"""The experiments of the papers behind this package, on real data: one file for each, and what they share."""
