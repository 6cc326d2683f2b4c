"""Benchmarks on real data: what each estimator of `contrastive_meta` costs and how far it is from the exact answer."""
