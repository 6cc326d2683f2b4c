"""Published bilevel problems whose lower level is smooth and free at the published point, for `test_bolib`.

Formulas and points are those of BOLIB (Zhou, Zemkoho & Tin, BOLIB 2019: bilevel optimization library of test problems,
version 2; the pages below are its), and of Sinha, Malo & Deb (2014), Test problem construction for single-objective
bilevel optimization, Evolutionary Computation 22 (3), whose problems SMD1 to SMD3 and SMD7 are taken with one unknown
in each of their four groups. Left out of BOLIB are all problems in which a lower constraint is active at the
published point, with a multiplier or without one, those whose lower level is linear, and those without a point.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

Function = Callable[[Any, Any], Any]


def no_constraints(x: Any, y: Any) -> Any:
    return jnp.zeros(0)


class Published(NamedTuple):
    """A bilevel problem: minimise the upper objective over x, where y minimises the lower one.

    Attributes:
      source: author and year, with the page in BOLIB where it is from there.
      upper: `(x, y) -> scalar`.
      lower: `(x, y) -> scalar`.
      x: the published upper unknowns.
      y: the published lower unknowns.
      constraints: `(x, y) -> array`, the lower constraints, none of which is active: negative where they hold.
      rounding: how far y may be from the lower solution at x, for the digits that were printed.
      values: the published upper and lower objective, where both are.
      slope: of the lower solution in the upper unknown where the lower Hessian is zero at it; NaN where it has none.
    """

    source: str
    upper: Function
    lower: Function
    x: tuple[float, ...]
    y: tuple[float, ...]
    constraints: Function = no_constraints
    rounding: float = 1e-9
    values: tuple[float, float] | None = None
    slope: float | None = None


def between(low: float, high: float) -> Function:
    """Bounds of all lower unknowns."""
    return lambda x, y: jnp.concatenate([low - y, y - high])


def sum_of_squares(x: Any) -> Any:
    return jnp.sum(x**2)


def sixteenth(x: Any, y: Any) -> Any:
    """The lower objective of Examples 3.10 and 3.11 of Mitsos & Barton."""
    return x[0] * (16 * y[0] ** 4 + 2 * y[0] ** 3 - 8 * y[0] ** 2 - 1.5 * y[0] + 0.5)


def quartic_with_drift(x: Any, y: Any) -> Any:
    """The lower objective of Examples 3.21 and 3.22 of Mitsos & Barton."""
    a, b = x[0], y[0]
    linear = 0.004 * a**3 - 0.036 * a**2 + 0.08 * a
    return b**4 + 2 / 15 * (1 - a) * b**3 + (-0.02 * a**2 + 0.16 * a - 0.4) * b**2 + linear * b


def robust(x: Any, y: Any) -> Any:
    """The upper objective of Lu, Deb & Sinha's first and third example."""
    narrow = (0.2 * y[0] - x[0] + 0.6) / 0.055
    return 2 - jnp.exp(-(narrow**0.4)) - 0.8 * jnp.exp(-(((0.15 * y[0] - 0.4 + x[0]) / 0.3) ** 2))


# The square roots of 1 to 10 in Griewank's function.
ROOTS = np.sqrt(np.arange(1, 11))


def griewank(y: Any, curvature: float) -> Any:
    return 1 + curvature * jnp.sum(y**2) - jnp.prod(jnp.cos(y / ROOTS))


def from_ones(x: Any, y: Any) -> Any:
    return sum_of_squares(x - 1) + sum_of_squares(y)


MITSOS_BARTON = "Mitsos & Barton (2006), Example"
SINHA = "Sinha, Malo & Deb (2014)"
UNIT = between(-1.0, 1.0)

# fmt: off
PROBLEMS = {
    "FalkLiu1995": Published(
        "Falk & Liu (1995); p. 22", lambda x, y: jnp.sum(x**2 - 3 * x) + sum_of_squares(y),
        lambda x, y: sum_of_squares(y - x), (3**0.5 / 2,) * 2, (3**0.5 / 2,) * 2, between(0.5, 1.5),
        values=(-2.1962, 0.0),
    ),
    "GumusFloudas2001Ex4": Published(
        "Gumus & Floudas (2001), Example 4; p. 24", lambda x, y: (x[0] - 3) ** 2 + (y[0] - 2) ** 2,
        lambda x, y: (y[0] - 5) ** 2, (3.0,), (5.0,), between(0.0, 10.0), values=(9.0, 0.0),
    ),
    "HendersonQuandt1958": Published(
        "Henderson & Quandt (1958); p. 24", lambda x, y: 0.5 * x[0] ** 2 + 0.5 * x[0] * y[0] - 95 * x[0],
        lambda x, y: y[0] ** 2 + (0.5 * x[0] - 100) * y[0], (93.33333,), (26.667,), between(0.0, np.inf),
        rounding=5e-4, values=(-3266.7, -711.11),
    ),
    "HenrionSurowiec2011": Published(
        "Henrion & Surowiec (2011), with c = 1; p. 24", lambda x, y: x[0] ** 2 + y[0],
        lambda x, y: 0.5 * y[0] ** 2 - x[0] * y[0], (-0.5,), (-0.5,), values=(-0.25, -0.125),
    ),
    "LamparielloSagratella2017Ex32": Published(
        "Lampariello & Sagratella (2017), Example 3.2; p. 26", lambda x, y: x[0] ** 2 + y[0] ** 2,
        lambda x, y: (x[0] + y[0] - 1) ** 2, (0.5,), (0.5,), values=(0.5, 0.0),
    ),
    "LuDebSinha2016c": Published(
        "Lu, Deb & Sinha (2016); p. 28", robust, lambda x, y: (x[0] - 0.5) ** 2 + (y[0] - 1) ** 2, (0.26,), (1.0,),
        values=(1.12, 0.06),
    ),
    "MacalHurter1997": Published(
        "Macal & Hurter (1997); p. 29, where x = 25051 / 2501 is 10.0163",
        lambda x, y: (x[0] - 1) ** 2 + (y[0] - 1) ** 2, lambda x, y: 0.5 * y[0] ** 2 + 500 * y[0] - 50 * x[0] * y[0],
        (25051 / 2501,), (0.8197,), rounding=5e-5, values=(81.33, -0.33),
    ),
    "Mirrlees1999": Published(
        "Mirrlees (1999), in the bounds of Ye & Zhu (2010); p. 29", lambda x, y: (x[0] - 2) ** 2 + (y[0] - 1) ** 2,
        lambda x, y: -x[0] * jnp.exp(-((y[0] + 1) ** 2)) - jnp.exp(-((y[0] - 1) ** 2)), (1.0,), (0.95753,),
        between(-2.0, 2.0), rounding=5e-5,
    ),
    "MitsosBarton2006Ex310": Published(
        f"{MITSOS_BARTON} 3.10, where x may be any of [0.1, 1]; p. 30", lambda x, y: y[0], sixteenth, (0.1,), (0.5,),
        UNIT, values=(0.5, -0.1),
    ),
    "MitsosBarton2006Ex314": Published(
        f"{MITSOS_BARTON} 3.14; p. 31", lambda x, y: (x[0] - 0.25) ** 2 + y[0] ** 2,
        lambda x, y: y[0] ** 3 / 3 - x[0] * y[0], (0.25,), (0.5,), UNIT, values=(0.25, -0.08),
    ),
    "MitsosBarton2006Ex316": Published(
        f"{MITSOS_BARTON} 3.16, the first of its two solutions; p. 32", lambda x, y: 2 * x[0] + y[0],
        lambda x, y: -0.5 * x[0] * y[0] ** 2 - 0.25 * y[0] ** 4, (-1.0,), (0.0,), UNIT, values=(-2.0, 0.0),
    ),
    "MitsosBarton2006Ex317": Published(
        f"{MITSOS_BARTON} 3.17; p. 32", lambda x, y: (x[0] + 0.5) ** 2 + 0.5 * y[0] ** 2,
        lambda x, y: 0.5 * x[0] * y[0] ** 2 + 0.25 * y[0] ** 4, (-0.25,), (0.5,), UNIT, values=(0.19, -0.02),
    ),
    "MitsosBarton2006Ex318": Published(
        f"{MITSOS_BARTON} 3.18; p. 32", lambda x, y: -(x[0] ** 2) + y[0] ** 2,
        lambda x, y: x[0] * y[0] ** 2 - 0.5 * y[0] ** 4, (0.5,), (0.0,), UNIT, values=(-0.25, 0.0),
    ),
    "MitsosBarton2006Ex319": Published(
        f"{MITSOS_BARTON} 3.19; p. 33", lambda x, y: x[0] * y[0] - y[0] + 0.5 * y[0] ** 2,
        lambda x, y: -x[0] * y[0] ** 2 + 0.5 * y[0] ** 4, (0.189,), (0.4343,), UNIT, rounding=5e-4,
        values=(-0.26, -0.02),
    ),
    "MitsosBarton2006Ex320": Published(
        f"{MITSOS_BARTON} 3.20; p. 33", lambda x, y: (x[0] - 0.25) ** 2 + y[0] ** 2,
        lambda x, y: y[0] ** 3 / 3 - x[0] ** 2 * y[0], (0.5,), (0.5,), UNIT, values=(0.31, -0.08),
    ),
    "MitsosBarton2006Ex321": Published(
        f"{MITSOS_BARTON} 3.21; p. 33", lambda x, y: (x[0] + 0.6) ** 2 + y[0] ** 2, quartic_with_drift, (-0.5545,),
        (0.4554,), UNIT, rounding=5e-4, values=(0.21, -0.07),
    ),
    "MitsosBarton2006Ex322": Published(
        f"{MITSOS_BARTON} 3.22, Example 3.21 with one more constraint, which is not active either; p. 33",
        lambda x, y: (x[0] + 0.6) ** 2 + y[0] ** 2, quartic_with_drift, (-0.5545,), (0.4554,),
        lambda x, y: jnp.concatenate([UNIT(x, y), 0.01 * (1 + x**2) - y**2]), rounding=5e-4, values=(0.21, -0.07),
    ),
    "MitsosBarton2006Ex324": Published(
        f"{MITSOS_BARTON} 3.24; p. 34", lambda x, y: x[0] ** 2 - y[0],
        lambda x, y: ((y[0] - 1 - 0.1 * x[0]) ** 2 - 0.5 - 0.5 * x[0]) ** 2, (0.2106,), (1.799,), between(0.0, 3.0),
        rounding=5e-4, values=(-1.75, 0.0),
    ),
    "PaulaviciusAdjiman2017a": Published(
        "Paulavicius, Kleniati & Adjiman (2017); p. 41", lambda x, y: x[0] ** 2 + y[0] ** 2,
        lambda x, y: x[0] * y[0] ** 2 - 0.5 * y[0] ** 4, (0.5,), (0.0,), UNIT, values=(0.25, 0.0),
    ),
    "SinhaMaloDeb2014TP9": Published(
        f"{SINHA}, TP9, with the 4000 of BOLIB's code; p. 44", from_ones,
        lambda x, y: jnp.exp(griewank(y, 1 / 4000) * sum_of_squares(x)), (1.0,) * 10, (0.0,) * 10,
        between(-np.pi, np.pi), values=(0.0, 1.0),
    ),
    "SinhaMaloDeb2014TP10": Published(
        f"{SINHA}, TP10; p. 45, where 1 + sum - product is in the exponent, so that its least value is 1", from_ones,
        lambda x, y: jnp.exp(griewank(x * y, 1 / 4000)), (1.0,) * 10, (0.0,) * 10, between(-np.pi, np.pi),
        values=(0.0, 1.0),
    ),
    "YeZhu2010Ex43": Published(
        "Ye & Zhu (2010), Example 4.3, with the upper objective and the constraint of BOLIB's code; p. 46",
        lambda x, y: (x[0] - 0.5) ** 2 + (y[0] - 2) ** 2, lambda x, y: y[0] ** 3 - 3 * y[0], (1.0,), (1.0,),
        lambda x, y: x - y - 3, values=(1.25, -2.0),
    ),
    "Yezza1996Ex41": Published(
        "Yezza (1996), Example 4.1; p. 46", lambda x, y: 0.5 * (y[0] - 2) ** 2 + 0.5 * (x[0] - y[0] - 2) ** 2,
        lambda x, y: 0.5 * y[0] ** 2 + x[0] - y[0], (3.0,), (1.0,), lambda x, y: jnp.concatenate([-y, y - x]),
        values=(0.5, 2.5),
    ),
    "Colson2002BIPA4": Published(
        "Colson (2002), BIPA4; p. 19, whose y, 0.6039, is not a solution, and whose values are those of 1 / sqrt(3)",
        lambda x, y: x[0] ** 2 + (y[0] - 10) ** 2,
        lambda x, y: x[0] ** 3 + 2 * y[0] ** 3 + x[0] - 2 * y[0] - x[0] ** 2, (0.0,), (3**-0.5,),
        lambda x, y: jnp.concatenate([-x + 2 * y - 3, -y]), values=(88.79, -0.77),
    ),
    "MitsosBarton2006Ex317, second": Published(
        f"{MITSOS_BARTON} 3.17, the second of its two solutions; p. 32",
        lambda x, y: (x[0] + 0.5) ** 2 + 0.5 * y[0] ** 2, lambda x, y: 0.5 * x[0] * y[0] ** 2 + 0.25 * y[0] ** 4,
        (-0.25,), (-0.5,), UNIT, values=(0.19, -0.02),
    ),
    "SMD1": Published(
        f"{SINHA}, SMD1", lambda x, y: sum_of_squares(x) + y[0] ** 2 + (x[1] - jnp.tan(y[1])) ** 2,
        lambda x, y: x[0] ** 2 + y[0] ** 2 + (x[1] - jnp.tan(y[1])) ** 2, (0.0, 0.0), (0.0, 0.0), values=(0.0, 0.0),
    ),
    "SMD2": Published(
        f"{SINHA}, SMD2", lambda x, y: sum_of_squares(x) - y[0] ** 2 - (x[1] - jnp.log(y[1])) ** 2,
        lambda x, y: x[0] ** 2 + y[0] ** 2 + (x[1] - jnp.log(y[1])) ** 2, (0.0, 0.0), (0.0, 1.0), values=(0.0, 0.0),
    ),
    "SMD3": Published(
        f"{SINHA}, SMD3", lambda x, y: sum_of_squares(x) + y[0] ** 2 + (x[1] ** 2 - jnp.tan(y[1])) ** 2,
        lambda x, y: x[0] ** 2 + 1 + y[0] ** 2 - jnp.cos(2 * jnp.pi * y[0]) + (x[1] ** 2 - jnp.tan(y[1])) ** 2,
        (0.0, 0.0), (0.0, 0.0), values=(0.0, 0.0),
    ),
    "SMD7": Published(
        f"{SINHA}, SMD7",
        lambda x, y: 1 + x[0] ** 2 / 400 - jnp.cos(x[0]) - y[0] ** 2 + x[1] ** 2 - (x[1] - jnp.log(y[1])) ** 2,
        lambda x, y: x[0] ** 3 + y[0] ** 2 + (x[1] - jnp.log(y[1])) ** 2, (0.0, 0.0), (0.0, 1.0), values=(0.0, 0.0),
    ),
    "Colson2002BIPA1": Published(
        "Colson (2002), BIPA1; p. 18", lambda x, y: (10 - x[0]) ** 3 + (10 - y[0]) ** 3,
        lambda x, y: (x[0] + 2 * y[0] - 15) ** 4, (5.0,), (5.0,),
        lambda x, y: jnp.concatenate([x + y - 20, y - 20, -y]), values=(250.0, 0.0), slope=-0.5,
    ),
    "ShimizuEtal1997b": Published(
        "Shimizu, Ishizuka & Bard (1997), the local solution; p. 43", lambda x, y: 16 * x[0] ** 2 + 9 * y[0] ** 2,
        lambda x, y: (x[0] + y[0] - 20) ** 4, (7.2,), (12.8,), lambda x, y: jnp.concatenate([-y, 4 * x + y - 50]),
        slope=-1.0,
    ),
    "MitsosBarton2006Ex312": Published(
        f"{MITSOS_BARTON} 3.12, where the solutions are 0 and, for positive x, plus and minus its root; p. 31",
        lambda x, y: -x[0] + x[0] * y[0] + 10 * y[0] ** 2, lambda x, y: -x[0] * y[0] ** 2 + 0.5 * y[0] ** 4, (0.0,),
        (0.0,), UNIT, values=(0.0, 0.0), slope=float("nan"),
    ),
}
# fmt: on
