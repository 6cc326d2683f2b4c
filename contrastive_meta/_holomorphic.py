"""Complex phases need holomorphic functions: prove by tracing that one is, or name the operation that is not."""

import dataclasses
import enum
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.extend import core

from contrastive_meta._pytree import PyTree
from contrastive_meta._tracing import CALLS, CallSite, open_jaxpr, place_of, site_of_call, trace

REMEDY = (
    "Replace it (`jnp.tanh` for relu, `x * x` for `abs(x) ** 2`, `jnp.log(jnp.sum(jnp.exp(x)))` for logsumexp), "
    "or use a real scheme such as `central_difference`."
)

# Complex-differentiable in every complex operand: everywhere, or off poles and branch cuts (`log`, `sqrt`, `pow`, the
# inverse functions), on which a loss that real learning can use does not sit. `lu` is here because solves and
# determinants do not depend on which pivots it takes; the pivots themselves are locally constant.
_ELEMENTWISE = """
    add add_any sub mul neg div exp exp2 expm1 log log1p sin cos tan sinh cosh tanh asin acos atan asinh acosh atanh
    logistic sqrt rsqrt square integer_pow pow
"""
_LINEAR = """
    dot_general conv_general_dilated fft psum reduce_sum cumsum reduce_window_sum broadcast_in_dim reshape transpose
    squeeze slice dynamic_slice dynamic_update_slice gather scatter scatter-add scatter-sub concatenate split pad rev
    tile select_n copy convert_element_type stop_gradient name sharding_constraint pvary pcast
"""
_ALGEBRAIC = "reduce_prod cumprod scatter-mul triangular_solve tridiagonal_solve lu"
_HOLOMORPHIC = frozenset(f"{_ELEMENTWISE} {_LINEAR} {_ALGEBRAIC}".split())

# Computed from sums of real and imaginary parts (convolutions by Gauss's three products): the rounding error of each
# part is relative to the larger one, and an imaginary part of 1e-20 is lost.
_MIXING = frozenset({"conv_general_dilated", "fft"})


class _Level(enum.Enum):
    """How a value depends on the complex inputs, where nothing is wrong with it."""

    CLEAN = 0
    HOLOMORPHIC = 1


@dataclasses.dataclass(frozen=True)
class _Offence:
    """The value depends on the complex inputs through this operation, which is not holomorphic."""

    order: int
    operation: str


_Taint = _Level | _Offence
_Params = dict[str, Any]


def require_holomorphic(
    function: Callable[..., PyTree], *args: PyTree, what: str, remedy: str = REMEDY, complex_step: bool = False
) -> None:
    """Raise unless `function` is holomorphic in the complex leaves of `args`.

    Nothing is computed: the function is traced, and what depends on the complex inputs is followed through every
    operation and all control flow. The proof is one-sided: operations not known to be holomorphic count as not
    holomorphic, and so do compositions of such operations that happen to be. What reaches no output does not count.
    Branch cuts and poles (`log`, `sqrt`, `pow`, division) are allowed, since no tracing can tell where values lie.
    Only the function's own values are classified: where its derivative will be used and may have a rule of its own
    (`jax.custom_vjp`), ask about `jax.grad(function, holomorphic=True)` as well.

    Args:
      function: `(*args) -> pytree of arrays`. It may close over traced values, which are taken as constants.
      *args: pytrees of arrays or `jax.ShapeDtypeStruct`; at least one leaf complex. Real leaves are constants too.
      what: the function's name in messages.
      remedy: what to do instead, the last sentence of the message.
      complex_step: whether imaginary parts will be too small to survive rounding beside the real ones. Convolutions and
        Fourier transforms, which are holomorphic but computed by mixing both parts, are refused then.

    Raises:
      TypeError: an output depends on a complex input through an operation that is not holomorphic, or that JAX does
        not have for complex numbers; the message names it and where it stands in the user's code.
      ValueError: no leaf of `args` is complex.

    Example:
      >>> import jax.numpy as jnp
      >>> z = jnp.ones(3, complex)
      >>> require_holomorphic(lambda z: jnp.sum(jnp.tanh(z) ** 2), z, what="inner_loss")
      >>> require_holomorphic(lambda z: jnp.sum(jnp.abs(z) ** 2), z, what="inner_loss")
      Traceback (most recent call last):
      ...
      TypeError: inner_loss must be holomorphic for complex nudges, but applies `abs` ...
    """
    closed = _trace(function, args, what, remedy)
    inputs = [_Level.HOLOMORPHIC if _is_complex(var) else _Level.CLEAN for var in closed.jaxpr.invars]
    if _Level.HOLOMORPHIC not in inputs:
        raise ValueError(f"{what}: expected complex inputs to follow; got only real ones. Make some leaf complex.")
    walker = _Walker(_HOLOMORPHIC - _MIXING if complex_step else _HOLOMORPHIC)
    outputs = walker.walk(closed.jaxpr, inputs, CallSite())
    worst = _worst([*outputs, *walker.escaped])
    if isinstance(worst, _Offence):
        raise TypeError(
            f"{what} must be holomorphic for complex nudges, but applies {worst.operation} to a value that depends "
            f"on the complex inputs. {remedy}"
        )


def _trace(function: Callable[..., PyTree], args: tuple[PyTree, ...], what: str, remedy: str) -> core.ClosedJaxpr:
    """The function's jaxpr; a TypeError in our words where only complex inputs keep JAX from tracing it."""
    try:
        with warnings.catch_warnings():
            # Casts that drop imaginary parts are reported later with their place, which these warnings lack.
            warnings.filterwarnings("ignore", message="Casting (from )?complex")
            return trace(function, *args)
    except (TypeError, ValueError, NotImplementedError) as error:
        if "complex" not in str(error):
            raise  # a mistake of another kind
        raise TypeError(
            f"{what} must be holomorphic for complex nudges, but cannot be traced on complex inputs: {error} {remedy}"
        ) from error


class _Walker:
    """Follows taint through jaxprs, forwards: what is dead reaches no output and so needs no special care."""

    def __init__(self, allowed: frozenset[str]) -> None:
        self.allowed = allowed
        self.escaped: list[_Offence] = []
        self._offences: dict[tuple[int, str], _Offence] = {}

    def walk(self, traced: core.Jaxpr | core.ClosedJaxpr, inputs: Iterable[_Taint], site: CallSite) -> list[_Taint]:
        """Taints of the outputs, given those of the inputs."""
        jaxpr = open_jaxpr(traced)
        known: dict[core.Var, _Taint] = dict(zip(jaxpr.invars, inputs, strict=True))

        def read(atom: core.Var | core.Literal) -> _Taint:
            return _Level.CLEAN if isinstance(atom, core.Literal) else known.get(atom, _Level.CLEAN)

        for eqn in jaxpr.eqns:
            taints = [read(atom) for atom in eqn.invars]
            if any(taint is not _Level.CLEAN for taint in taints):
                known.update(zip(eqn.outvars, self._equation(eqn, taints, site), strict=True))
        return [read(atom) for atom in jaxpr.outvars]

    def _equation(self, eqn: core.JaxprEqn, taints: list[_Taint], site: CallSite) -> list[_Taint]:
        name, params = eqn.primitive.name, eqn.params
        if name in CALLS:
            return self.walk(params[CALLS[name]], taints, site_of_call(eqn, params[CALLS[name]], site))
        control = {
            "scan": self._scan,
            "while": self._while,
            "cond": self._cond,
            "custom_linear_solve": self._linear_solve,
        }
        if name in control:
            return control[name](params, taints, CallSite(place_of(eqn, site), site.final))
        if name in ("optimization_barrier", "device_put"):
            return taints  # each operand is handed on
        return self._operation(eqn, taints, site)

    def _operation(self, eqn: core.JaxprEqn, taints: list[_Taint], site: CallSite) -> list[_Taint]:
        worst = _worst(taints)
        if worst is _Level.HOLOMORPHIC:
            worst = self._classify(eqn, site)
        # A tainted value written to a reference or sent to the host comes back by ways not followed here.
        if eqn.effects and eqn.primitive.name not in _HOLOMORPHIC and not eqn.primitive.name.startswith("debug"):
            self.escaped.append(worst if isinstance(worst, _Offence) else self._offence(eqn, site))
        if eqn.primitive.name == "lu" and worst is _Level.HOLOMORPHIC:
            return [worst if _is_complex(var) else _Level.CLEAN for var in eqn.outvars]
        return [worst] * len(eqn.outvars)

    def _classify(self, eqn: core.JaxprEqn, site: CallSite) -> _Taint:
        """One operation on holomorphic operands; its indices and predicates are never complex and so clean."""
        name, params = eqn.primitive.name, eqn.params
        conjugates = name == "triangular_solve" and params["conjugate_a"]
        # Only `lu` may return integers (pivots) from tainted operands; real numbers mean a cast or a real transform.
        becomes_real = name != "lu" and not all(_is_complex(var) for var in eqn.outvars)
        if name not in self.allowed or conjugates or becomes_real:
            return self._offence(eqn, site)
        combine = params.get("update_jaxpr")  # how scatters combine old and new: the user's own in `.at[].apply`
        if combine is None:
            return _Level.HOLOMORPHIC
        return _worst([_Level.HOLOMORPHIC, *self.walk(combine, [_Level.HOLOMORPHIC] * 2, site)])

    def _scan(self, params: _Params, taints: list[_Taint], site: CallSite) -> list[_Taint]:
        num_consts, num_carry = _scan_counts(params)
        consts, carry, xs = _split(taints, num_consts, num_carry)
        while True:
            outputs = self.walk(params["jaxpr"], [*consts, *carry, *xs], site)
            joined = _join(carry, outputs[:num_carry])
            if joined == carry:
                return [*carry, *outputs[num_carry:]]
            carry = joined

    def _while(self, params: _Params, taints: list[_Taint], site: CallSite) -> list[_Taint]:
        cond_consts, body_consts, carry = _split(taints, params["cond_nconsts"], params["body_nconsts"])
        while True:
            stop = self.walk(params["cond_jaxpr"], [*cond_consts, *carry], site)
            outputs = self.walk(params["body_jaxpr"], [*body_consts, *carry], site)
            joined = [_worst([taint, *stop]) for taint in _join(carry, outputs)]
            if joined == carry:
                return carry
            carry = joined

    def _cond(self, params: _Params, taints: list[_Taint], site: CallSite) -> list[_Taint]:
        index, *operands = taints
        branches = [self.walk(branch, operands, site) for branch in params["branches"]]
        return [_worst([index, *outputs]) for outputs in zip(*branches, strict=True)]

    def _linear_solve(self, params: _Params, taints: list[_Taint], site: CallSite) -> list[_Taint]:
        """Its value is what its solver computes; the other functions serve derivatives."""
        lengths = params["const_lengths"]
        _, solve_consts, rest = _split(taints, lengths.matvec + lengths.vecmat, lengths.solve)
        return self.walk(params["jaxprs"].solve, [*solve_consts, *rest[lengths.transpose_solve :]], site)

    def _offence(self, eqn: core.JaxprEqn, site: CallSite) -> _Offence:
        """One per operation and place, so that loops come to a fixpoint; numbered in the order met."""
        place, name = place_of(eqn, site), eqn.primitive.name
        why = " (which rounds tiny imaginary parts away)" if name in _MIXING - self.allowed else ""
        return self._offences.setdefault((id(eqn), place), _Offence(len(self._offences), f"`{name}`{place}{why}"))


def _worst(taints: Iterable[_Taint]) -> _Taint:
    """The first offence met, else holomorphic, else clean."""
    taints = list(taints)
    offences = [taint for taint in taints if isinstance(taint, _Offence)]
    if offences:
        return min(offences, key=lambda offence: offence.order)
    return _Level.HOLOMORPHIC if _Level.HOLOMORPHIC in taints else _Level.CLEAN


def _join(a: Sequence[_Taint], b: Sequence[_Taint]) -> list[_Taint]:
    return [_worst(pair) for pair in zip(a, b, strict=True)]


def _scan_counts(params: _Params) -> tuple[int, int]:
    """How many operands of a scan are constants, and how many are carried."""
    if "ft_in" in params:  # since jax 0.11: the operands' grouping (constants, carry, inputs)
        consts, carry, _ = params["ft_in"].unpack()
        return len(consts), len(carry)
    return params["num_consts"], params["num_carry"]


def _split(taints: list[_Taint], first: int, second: int) -> tuple[list[_Taint], list[_Taint], list[_Taint]]:
    return taints[:first], taints[first : first + second], taints[first + second :]


def _is_complex(var: Any) -> bool:
    return jnp.issubdtype(getattr(var.aval, "dtype", np.dtype(bool)), jnp.complexfloating)
