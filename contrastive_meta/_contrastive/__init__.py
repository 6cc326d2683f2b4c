"""The contrastive estimator: nudged phases, and the contrast of what they measure."""
