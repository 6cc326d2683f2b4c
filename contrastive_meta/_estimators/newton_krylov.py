"""The fast nudged learner: Newton's step for all phases at once, by conjugate gradients on gradient differences."""

import jax

from contrastive_meta._estimators._free_point import FreePoint
from contrastive_meta._estimators._phases import Goal, Nudging
from contrastive_meta._estimators._search import Outcome, Search
from contrastive_meta._pytree import static, strategy


@strategy
class NewtonKrylov:
    """A nudged learner that takes the inner loss to be nearly quadratic, and checks that it is.

    What a nudge of strength beta does to the minimum is, for small beta, a straight line: phase k ends at
    base - beta_k u, where H u = v. Both are found from gradients of the inner loss alone. A pass solves two linear
    systems at once, by conjugate gradients in which a Hessian-vector product is the difference of two gradients: one
    for the step that the free phase had left to take and one for u. Where that takes more than 32 steps the nudge waits
    until the base point has learned. Then the phases are evaluated where they should have ended. The contrast of their
    gradients is what is left of the nudge, v - H u, to the order of the scheme and free of the products' error; the
    gradient at the base point is what is left of learning. Both are the right-hand sides of the next pass. Usually one
    or two passes do. Where a pass at rest leaves more than such products are accurate to, the third derivative bends
    them: from then on they are differences of gradients on both sides of the base point, two for a product.

    From far off a minimum the step is kept within a radius, which grows and shrinks with how well the fall of the loss
    was foretold (by the trapezoidal rule, from gradients alone), and the nudge is not answered before the base point
    has arrived.

    It ends when the remainder of the nudge is below `tol`, or a pass no longer helps, or the budget is spent. Where
    the loss curves downwards, or no pass helped, or the base point did not arrive or went astray, the user's own
    learner goes on learning, without a nudge and with its budget of steps, and passes begin anew where that leads:
    three tries in all, while its gradient falls. If they fail there too, or had nothing left to learn, it runs the
    phases instead, as published; of two answers that are not accurate enough the one that leaves less of the nudge is
    kept. Either way the status is `FELL_BACK`, or says what is still wrong.

    Args:
      tol: norm of v - H u relative to that of v, dimensionless; by default as small as the rounding noise of the
        contrast lets it be, about 1e-10 in float64 and 1e-4 in float32 for `relative(central_difference)`.
      max_steps: budget of conjugate-gradient iterations of each system, all passes together; an iteration is one
        gradient, or two where products are taken on both sides, for each system that still needs it.
      max_passes: most passes.
      fall_back: let the estimator's own learner go on, or run the phases, where this one fails, or where a way to a
        minimum that is longer than a tenth of `params` leads through a valley or past a saddle, on which gradients
        grow while the loss falls: the learner may take another. False goes on by itself, says `FREE_NOT_CONVERGED`,
        and saves the learner's compilation.

    Reference:
      Knoll & Keyes (2004), Jacobian-free Newton-Krylov methods; O'Leary (1980) for two systems at once; Dembo,
      Eisenstat & Steihaug (1982) for the accuracy asked of a pass; Steihaug (1983), and Conn, Gould & Toint (2000),
      Trust-Region Methods, for the radius.

    Example:
      >>> import contrastive_meta as cm
      >>> estimator = cm.Contrastive(cm.LBFGS(), nudged_solver=cm.NewtonKrylov(tol=1e-3))
    """

    tol: float | jax.Array | None = None
    max_steps: int | jax.Array = 2000
    max_passes: int | jax.Array = 40
    fall_back: bool = static(default=True)

    def run(self, nudging: Nudging, point: FreePoint, goal: Goal | None = None) -> Outcome:
        """Find the response to the nudge and the base point, and measure the phases on the line through them.

        Returns:
          The phases, and whether another learner should run them instead.
        """
        max_steps = self.max_steps if goal is None or goal.max_steps is None else goal.max_steps
        search = Search(nudging, point, self.tol, max_steps, self.max_passes, go_astray=not self.fall_back)
        start = search.start()
        return search.measure(search.run(start)) if goal is None else search.run_until(goal, start)
