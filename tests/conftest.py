"""What every test runs under: float64, and the same hypothesis examples each time without a deadline."""

import hypothesis
import jax

jax.config.update("jax_enable_x64", True)

# A deadline would measure compilation; a random seed would make a red run hard to repeat.
hypothesis.settings.register_profile("deterministic", deadline=None, derandomize=True, database=None)
hypothesis.settings.load_profile("deterministic")
