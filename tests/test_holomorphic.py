"""The holomorphy check lets through what the complex step differentiates exactly and names what it does not."""

import inspect
import re
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import io_callback

from contrastive_meta._holomorphic import require_holomorphic

X = jnp.array([0.3, 0.5, 0.7, 1.1])
Z = X.astype(complex)
MATRIX = jnp.array([[2.0, 0.3, 0.1, 0.4], [0.2, 3.0, 0.5, 0.1], [0.1, 0.6, 0.2, 2.0], [0.7, 1.5, 4.0, 0.3]])


def check(function, *args):
    require_holomorphic(function, *args, what="inner_loss")


def rejection(function, *args):
    with pytest.raises(TypeError, match="inner_loss must be holomorphic") as caught:
        check(function, *args)
    return str(caught.value)


def mlp(activation):
    def loss(z):
        hidden = activation(MATRIX @ z + 0.1)
        return jnp.mean((activation(MATRIX.T @ hidden) - 0.5) ** 2)

    return loss


def loop(body, steps):
    return lambda x: lax.fori_loop(0, steps, lambda i, carry: body(carry), x)


@jax.custom_jvp
def doubled_sine(x):
    return 2 * jnp.sin(x)


doubled_sine.defjvp(lambda primals, tangents: (doubled_sine(*primals), 2 * jnp.cos(primals[0]) * tangents[0]))


@jax.custom_vjp
def conjugate_on_the_way_back(x):
    return 1 * x


conjugate_on_the_way_back.defvjp(lambda x: (x, None), lambda _, cotangent: (jnp.conj(cotangent),))


ACCEPTED = {
    "arithmetic": lambda x: -x * 3 + 1 / x - x / (1 + x) + 2,
    "exponentials": lambda x: jnp.exp(x) + jnp.expm1(x) + jnp.exp2(x),
    "logarithms": lambda x: jnp.log(x) + jnp.log1p(x),
    "circular": lambda x: jnp.sin(x) + jnp.cos(x) * jnp.tan(x) + jnp.arcsin(x / 2) + jnp.arctan(x),
    "hyperbolic": lambda x: jnp.sinh(x) + jnp.cosh(x) * jnp.tanh(x) + jnp.arcsinh(x) + jnp.arctanh(x / 2),
    "sigmoids": lambda x: jax.nn.sigmoid(x) + jax.nn.silu(x) + jax.nn.gelu(x),
    "powers": lambda x: x**2 + x**-3 + x**0.3 + x**x + 2.0**x + x ** jnp.arange(4) + jnp.square(x),
    "roots": lambda x: jnp.sqrt(x) + lax.rsqrt(x),
    "products": lambda x: jnp.einsum("i,ij,j->", x, MATRIX, x) + jnp.outer(x, x) @ x,
    "reductions": lambda x: jnp.prod(x) + jnp.mean(x) + jnp.cumsum(x) * jnp.cumprod(x),
    "shapes": lambda x: jnp.concatenate([x[::-1], jnp.roll(x, 1)]).reshape(2, 4).T[1:, :1] * jnp.pad(x, 1)[2],
    "splits": lambda x: jnp.split(x, 2)[0] * jnp.tile(x, 2)[3] + jnp.trace(jnp.kron(x, x).reshape(4, 4)),
    "indexing": lambda x: x[jnp.array([2, 0])] * jnp.take(x, 3) + lax.dynamic_slice(x, (1,), (2,)),
    "scatters": lambda x: x.at[0].set(x[1]).at[1].add(x[2] ** 2).at[2].multiply(x[0]).at[3].subtract(x[1] ** 3),
    "dynamic update": lambda x: lax.dynamic_update_slice(x, x[:2] ** 2, (2,)),
    "clean predicate": lambda x: jnp.where(jnp.arange(4) > 1, x**2, jnp.sin(x)),
    "window": lambda x: lax.reduce_window(x, np.zeros((), x.dtype), lax.add, (2,), (1,), "VALID") ** 2,
    "solve": lambda x: jnp.linalg.solve(MATRIX + jnp.outer(x, x), x),
    "solve for the right-hand side": lambda x: jnp.linalg.solve(MATRIX, x) ** 2,
    "inverse": lambda x: jnp.linalg.inv(MATRIX + jnp.diag(x))[0],
    "determinant": lambda x: jnp.linalg.det((MATRIX + jnp.diag(x))[:3, :3]),
    "triangular": lambda x: lax.linalg.triangular_solve(MATRIX + jnp.diag(x), x[None], lower=True),
    "stop_gradient": lambda x: lax.stop_gradient(MATRIX) @ x,
    "mlp": mlp(jnp.tanh),
    "jit": jax.jit(lambda x: jnp.sin(x) * 2),
    "remat": jax.checkpoint(lambda x: jnp.sin(jnp.sin(x))),
    "custom_jvp": doubled_sine,
    "scan": lambda x: lax.scan(lambda carry, row: (jnp.sin(carry) * x, carry @ row), x, MATRIX),
    "fori_loop": loop(lambda x: x + 0.1 * jnp.sin(x), 3),
    "cond": lambda x: lax.cond(MATRIX[0, 0] > 1, jnp.sin, jnp.cos, x),
    "switch": lambda x: lax.switch(jnp.argmax(MATRIX[0]), [jnp.sin, jnp.cos], x),
    "map": lambda x: lax.map(jnp.sin, x),
    "tridiagonal": lambda x: lax.linalg.tridiagonal_solve(x / 9, x + 3, x / 8, x[:, None]),
    "no operations": lambda x: jnp.array(checkpoint_name(jax.device_put(x), "x"), copy=True),
    "sharding": lambda x: lax.with_sharding_constraint(x, jax.sharding.SingleDeviceSharding(jax.devices()[0])),
    "barrier": lambda x: lax.optimization_barrier((x, MATRIX))[0] ** 2,
}


def total(function):
    return lambda x: sum(jnp.sum(leaf * (1 + k)) for k, leaf in enumerate(jax.tree.leaves(function(x))))


@pytest.mark.parametrize("name", ACCEPTED)
def test_complex_step_through_accepted_functions_is_the_gradient(name):
    function = ACCEPTED[name]
    require_holomorphic(function, Z, what="inner_loss", complex_step=True)
    # No subtraction and h^2 = 1e-40: the complex step is exact up to the rounding of the function itself.
    step = 1e-20
    got = jax.jit(jax.vmap(lambda unit: jnp.imag(total(function)(Z + step * 1j * unit)) / step))(jnp.eye(4))
    np.testing.assert_allclose(got, jax.jit(jax.grad(total(function)))(X), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("name", ACCEPTED)
def test_no_accepted_operation_loses_the_taint(name):
    function = ACCEPTED[name]
    assert "`abs`" in rejection(lambda z: jax.tree.map(jnp.abs, function(z)), Z)
    assert "`conj`" in rejection(lambda z: function(jnp.conj(z)), Z)


REJECTED = {
    "abs": (jnp.abs, "abs"),
    "real": (jnp.real, "real"),
    "imag": (jnp.imag, "imag"),
    "conj": (jnp.conj, "conj"),
    "angle": (jnp.angle, "imag|real"),
    "sign": (jnp.sign, "sign"),
    "max": (jnp.max, "reduce_max"),
    "maximum": (lambda z: jnp.maximum(z, 0), "max"),
    "minimum": (lambda z: jnp.minimum(z, 0), "min"),
    "sort": (jnp.sort, "sort"),
    "argmax": (jnp.argmax, "argmax"),
    "comparison": (lambda z: z == 1.0, "eq"),
    "predicate": (lambda z: jnp.where(z.real > 0, z, 2 * z), "real"),
    "equality as predicate": (lambda z: jnp.where(z == 0, 1.0, z), "eq"),
    "index": (lambda z: jnp.arange(4.0)[z.real.astype(int)], "real"),
    "slice start": (lambda z: lax.dynamic_slice(z, (jnp.argmin(z),), (2,)), "argmin"),
    "vdot": (lambda z: jnp.vdot(z, z), "conj"),
    "norm": (jnp.linalg.norm, "conj|abs|real"),
    "var": (jnp.var, "conj|abs|real"),
    "relu": (jax.nn.relu, "max"),
    "softplus": (jax.nn.softplus, "max"),
    "logsumexp": (jax.nn.logsumexp, "real"),
    "softmax": (jax.nn.softmax, "reduce_max|real"),
    "round": (jnp.round, "real|imag"),
    "cholesky": (lambda z: jnp.linalg.cholesky(MATRIX @ MATRIX.T + jnp.diag(z)), "cholesky|conj"),
    "positive definite solve": (
        lambda z: jax.scipy.linalg.solve(MATRIX @ MATRIX.T + jnp.diag(z), z, assume_a="pos"),
        "cholesky|conj",
    ),
    "conjugated triangle": (
        lambda z: lax.linalg.triangular_solve(MATRIX + jnp.diag(z), z[None], conjugate_a=True),
        "triangular_solve",
    ),
    "eigenvalues": (lambda z: jnp.linalg.eigvalsh(MATRIX + jnp.diag(z)), "eigh|conj"),
    "real transform": (jnp.fft.irfft, "fft"),
    "scatter apply": (lambda z: z.at[1].apply(jnp.conj), "conj"),
    "scatter max": (lambda z: z.at[1].max(0.0), "scatter-max|scatter_max"),
    "parts put together": (lambda z: lax.complex(z.real, z.imag), "real"),
    "callback": (lambda z: jax.pure_callback(lambda v: v, jax.ShapeDtypeStruct(z.shape, z.dtype), z), "pure_callback"),
    "effect": (lambda z: (io_callback(lambda v: None, None, z, ordered=True), z)[1], "io_callback"),
    "mlp": (mlp(jax.nn.relu), "max"),
    "jit": (jax.jit(lambda z: jnp.sin(jnp.abs(z))), "abs"),
    "remat": (jax.checkpoint(lambda z: jnp.sin(jnp.abs(z))), "abs"),
    "map": (lambda z: lax.map(jnp.abs, z), "abs"),
    "cond branch": (lambda z: lax.cond(MATRIX[0, 0] > 1, jnp.sin, jnp.conj, z), "conj"),
    "cond predicate": (lambda z: lax.cond(jnp.imag(z[0]) > 1, jnp.sin, jnp.cos, z), "imag"),
    "cond of constants": (lambda z: lax.cond(jnp.imag(z[0]) > 1, lambda: 1.0, lambda: 0.0), "imag"),
    "nested": (jax.jit(lambda z: lax.map(lambda x: lax.cond(True, jax.checkpoint(jnp.conj), jnp.sin, x), z)), "conj"),
}


@pytest.mark.parametrize("name", REJECTED)
def test_rejected_functions_are_named_with_operation_and_place(name):
    function, operation = REJECTED[name]
    assert re.search(rf"applies `({operation})`", rejection(function, Z))


def test_rejection_says_what_where_and_what_to_do():
    def loss(z):
        y = jnp.tanh(z)
        return jnp.sum(jnp.abs(y) ** 2)

    line = inspect.getsourcelines(loss)[1] + 2
    with pytest.raises(TypeError) as caught:
        require_holomorphic(loss, Z, what="the optimiser's update", remedy="Do this.")
    place = rf"\S*test_holomorphic\.py:{line}\S* \(\S*loss\)"
    assert re.fullmatch(rf"the optimiser's update must .* applies `abs` at {place} to .* Do this\.", str(caught.value))


def test_functions_of_jax_are_placed_where_they_are_called_not_where_they_were_first_traced():
    def first(z):
        return jax.nn.relu(z)

    def second(z):
        return 1 + jax.nn.relu(z)

    for loss in (first, second):
        line = inspect.getsourcelines(loss)[1] + 1
        assert re.search(rf"`max` \(inside `relu`\) at \S*:{line}\S* \(\S*{loss.__name__}\)", rejection(loss, Z))


def test_functions_of_the_users_are_placed_inside_even_when_jitted_or_looped():
    @jax.jit
    def inner(z):
        return jnp.abs(z)

    line = inspect.getsourcelines(inner)[1] + 2
    assert re.search(rf"`abs` at \S*:{line}\S* \(\S*inner\)", rejection(lambda z: inner(2 * z), Z))
    assert re.search(rf"`abs` at \S*:{line}\S* \(\S*inner\)", rejection(lambda z: lax.map(inner, z), Z))


def test_place_is_left_out_where_the_whole_function_is_jax_own():
    assert re.search(r"applies `conj` to a value", rejection(jnp.conj, Z))


def test_first_offence_is_the_one_named():
    assert "`imag`" in rejection(lambda z: (jnp.tanh(z), jnp.abs(jnp.imag(z)), jnp.real(z)), Z)


def test_taint_that_reaches_a_scan_carry_late_is_found():
    def body(carry, x):
        a, b, c, _ = carry
        return (a, a * 2, b * 2, jnp.abs(c).astype(complex)), None

    def loss(z, output):
        constants = 3 * (jnp.ones(4, complex),)
        return lax.scan(body, (z, *constants), None, length=5)[0][output]

    # |c| sees the input from the third step on.
    assert "`abs`" in rejection(lambda z: loss(z, 3), Z)
    for output in range(3):
        check(lambda z, output=output: loss(z, output), Z)


def test_taint_of_scanned_inputs_and_outputs_is_followed():
    def loss(z, use):
        carry, (clean, tainted) = lax.scan(lambda c, x: (c + 1, (jnp.abs(c), jnp.abs(x))), 0.0, z)
        return z + {"carry": carry, "clean": clean, "tainted": tainted}[use]

    check(lambda z: loss(z, "carry"), Z)
    check(lambda z: loss(z, "clean"), Z)
    assert "`abs`" in rejection(lambda z: loss(z, "tainted"), Z)


def test_while_loops_may_count_but_not_watch_complex_values():
    def loss(z, go_on):
        return lax.while_loop(go_on, lambda c: (c[0] + 1, jnp.sin(c[1])), (0, z))[1]

    check(lambda z: loss(z, lambda c: c[0] < 3), Z)
    message = rejection(lambda z: loss(z, lambda c: (c[0] < 3) & (jnp.abs(c[1][0]) > 0.1)), Z)
    assert "`abs`" in message


def test_taint_that_reaches_a_while_carry_late_is_found():
    def loss(z, steps, output):
        constants = 3 * (jnp.ones(4, complex),)
        late = lambda _, c: (c[0], c[0] * 2, c[1] * 2, jnp.abs(c[2]).astype(complex))  # noqa: E731
        return lax.fori_loop(0, steps, late, (z, *constants))[output]

    # A traced number of steps makes it a while loop; |c| sees the input from the third step on.
    assert "`abs`" in rejection(lambda z, steps: loss(z, steps, 3), Z, 5)
    for output in range(3):
        check(lambda z, steps, output=output: loss(z, steps, output), Z, 5)


def test_a_loop_that_ends_by_a_complex_value_taints_the_count_of_its_steps():
    def steps(z):
        return lax.while_loop(lambda c: jnp.real(c[1]) < 9, lambda c: (c[0] + 1, 2 * c[1]), (0, z[0]))[0]

    assert "`real`" in rejection(steps, Z)


def test_dead_code_does_not_count():
    @jax.jit
    def value_and_norm(z):
        return jnp.sum(jnp.sin(z)), jnp.linalg.norm(z)

    check(lambda z: value_and_norm(z)[0], Z)
    check(lambda z: (jnp.real(z), z**2)[1], Z)
    check(lambda z: lax.optimization_barrier((z, jnp.real(z)))[0], Z)
    check(lambda z: lax.scan(lambda c, x: (c * x, jnp.abs(x)), 1j, z)[0], Z)
    check(lambda z: jnp.zeros_like(jnp.abs(z)) + jnp.abs(z).size, Z)
    assert re.search("`(conj|real|abs)`", rejection(lambda z: value_and_norm(z)[1], Z))


def test_printing_is_no_offence():
    def loss(z):
        jax.debug.print("{}", jnp.abs(z))
        jax.debug.callback(lambda v: None, jnp.abs(z))
        return z**2

    check(loss, Z)


@pytest.mark.skipif(not hasattr(jax, "new_ref"), reason="this JAX has no mutable references")
def test_values_do_not_escape_through_references():
    def loss(z):
        ref = jax.new_ref(jnp.zeros(4))
        ref[...] = jnp.abs(z)
        return ref[...] * 1j

    def holomorphic_but_not_followed(z):
        ref = jax.new_ref(jnp.zeros(4, complex))
        ref[...] = z
        return jnp.abs(ref[...])

    assert "`abs`" in rejection(loss, Z)
    assert "`swap`" in rejection(holomorphic_but_not_followed, Z)


def test_real_inputs_and_integers_are_constants():
    loss = lambda z, scale, key: jnp.sum(z) * jnp.abs(scale) * jnp.max(jax.random.normal(key, (3,)))  # noqa: E731
    check(loss, Z, jnp.float32(2.0), jax.random.key(0))
    check(loss, Z, -2.0, jax.random.PRNGKey(0))
    assert "`abs`" in rejection(loss, Z, 2.0 + 0j, jax.random.key(0))


@pytest.mark.parametrize("dtype", [jnp.complex64, jnp.complex128])
def test_shapes_are_enough(dtype):
    shapes = {"weights": jax.ShapeDtypeStruct((4,), dtype), "scale": jax.ShapeDtypeStruct((), jnp.float32)}
    check(lambda p: jnp.sum(jnp.tanh(p["weights"]) * jnp.abs(p["scale"])), shapes)
    assert "`max`" in rejection(lambda p: jnp.sum(jax.nn.relu(p["weights"])), shapes)


def test_inside_jit_vmap_and_grad_with_closures_over_tracers():
    def function(y):
        check(lambda z: jnp.sum(z * jnp.abs(y)) + jnp.max(y), Z)
        check(lambda z: jnp.sum(jnp.sin(z)), y * Z)
        assert "`abs`" in rejection(lambda z: jnp.abs(z * y), Z)
        assert "`conj`" in rejection(lambda z: jnp.conj(z) * y, y * Z)
        return y**2

    assert jax.jit(function)(3.0) == 9.0
    np.testing.assert_array_equal(jax.vmap(function)(jnp.arange(3.0)), [0.0, 1.0, 4.0])
    np.testing.assert_array_equal(jax.jit(jax.vmap(jax.grad(function)))(jnp.arange(3.0)), [0.0, 2.0, 4.0])
    assert lax.scan(lambda c, x: (function(c), None), 2.0, jnp.arange(2))[0] == 16.0


def test_functions_mapped_over_a_named_axis():
    def function(y):
        check(lambda z: lax.psum(z * y, "tasks"), Z)
        assert "`abs`" in rejection(lambda z: jnp.abs(lax.psum(z * y, "tasks")), Z)
        return y

    jax.vmap(function, axis_name="tasks")(jnp.arange(3.0))


def test_closures_that_changed_are_traced_again():
    settings = {"activation": jnp.tanh}

    def loss(z):
        return settings["activation"](z)

    check(loss, Z)
    settings["activation"] = jnp.abs
    assert "`abs`" in rejection(loss, Z)


def test_scatters_are_judged_by_the_function_they_apply():
    check(lambda z: z.at[1].apply(jnp.sin), Z)
    assert "`conj`" in rejection(lambda z: z.at[1].apply(lambda v: jnp.sin(jnp.conj(v))), Z)
    assert "`abs`" in rejection(lambda z: jnp.abs(z.at[1].apply(jnp.ones_like)), Z)


@pytest.mark.parametrize(
    ("function", "name"),
    [
        (lambda x: jnp.sum(jnp.convolve(x, x[:3]) ** 3), "conv_general_dilated"),
        (lambda x: jnp.sum(jnp.fft.fft(x) * jnp.fft.ifft(x) ** 2), "fft"),
    ],
)
def test_operations_that_mix_both_parts_serve_circles_but_not_complex_steps(function, name):
    check(function, Z)
    # Sixteen points are exact for these polynomials of degree 3 and 6, up to rounding over the radius 0.1.
    circle = 0.1 * jnp.exp(2j * jnp.pi * jnp.arange(16) / 16)
    values = jax.jit(jax.vmap(lambda unit: jax.vmap(lambda point: function(Z + point * unit))(circle)))(jnp.eye(4))
    expected = jax.grad(lambda x: jnp.real(function(x)))(X)
    np.testing.assert_allclose(jnp.mean(values / circle, axis=1).real, expected, rtol=1e-12)
    # The complex step does lose the answer, which is why it is refused.
    step = 1e-20
    lost = jax.vmap(lambda unit: jnp.imag(function(Z + step * 1j * unit)) / step)(jnp.eye(4))
    assert jnp.max(jnp.abs(lost / expected - 1)) > 0.1
    with pytest.raises(TypeError, match=rf"applies `{name}` .*rounds tiny imaginary parts away"):
        require_holomorphic(function, Z, what="inner_loss", complex_step=True)


def test_operations_without_complex_rule_are_reported_in_the_same_words():
    for function, name in [
        (jnp.floor, "floor"),
        (jax.scipy.special.erf, "erf"),
        (lambda z: jnp.clip(z, 0), "[Cc]lip"),
    ]:
        with pytest.raises(
            TypeError, match=rf"inner_loss must be holomorphic .*({name}).*central_difference"
        ) as caught:
            check(function, Z)
        assert caught.value.__cause__ is not None


def test_a_cast_to_real_numbers_is_an_error_and_not_a_warning():
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        assert re.search("`(convert_element_type|real)`", rejection(lambda z: z.astype(float), Z))
    assert not seen


def test_errors_of_the_users_own_are_left_alone():
    with pytest.raises(TypeError) as shapes:
        check(lambda z: z @ jnp.ones(3), Z)
    with pytest.raises(jax.errors.TracerBoolConversionError):
        check(lambda z: z if jnp.all(jnp.ones(4) * z == 1) else 2 * z, Z)
    assert "holomorphic" not in str(shapes.value)


def test_real_arguments_alone_are_a_mistake():
    with pytest.raises(ValueError, match="inner_loss: expected complex inputs"):
        check(jnp.abs, X)


def test_rules_of_derivatives_show_in_the_gradient():
    loss = lambda z: jnp.sum(conjugate_on_the_way_back(z * 2) ** 2)  # noqa: E731
    check(loss, Z)
    assert "`conj`" in rejection(jax.grad(loss, holomorphic=True), Z)


@pytest.mark.parametrize(
    "name", ["circular", "powers of real exponents", "mlp", "solve", "scan", "remat", "custom_jvp"]
)
def test_gradients_of_accepted_functions_are_accepted(name):
    function = ACCEPTED.get(name, lambda z: z**0.3 + z**-3 + 2.0**z)
    check(jax.grad(total(function), holomorphic=True), Z)


SCHEDULE = optax.cosine_decay_schedule(0.1, 10)
PARAMS = {"w": Z, "b": jnp.ones((2, 2), complex)}


@pytest.mark.parametrize(
    "optimiser",
    [
        optax.sgd(0.1),
        optax.sgd(0.1, momentum=0.9),
        optax.sgd(SCHEDULE, momentum=0.9, nesterov=True),
        optax.chain(optax.add_decayed_weights(1e-3), optax.trace(0.9), optax.scale_by_schedule(SCHEDULE)),
        optax.inject_hyperparams(optax.sgd)(SCHEDULE),
    ],
)
def test_optimisers_with_fixed_coefficients_are_holomorphic(optimiser):
    def step(grads, state, params):
        updates, state = optimiser.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    require_holomorphic(step, PARAMS, optimiser.init(PARAMS), PARAMS, what="the optimiser's update")


@pytest.mark.parametrize(
    ("optimiser", "operation"),
    [
        (optax.adam(0.1), "real|abs|conj"),
        (optax.rmsprop(0.1), "real|abs|conj"),
        (optax.adabelief(0.1), "real|abs|conj"),
        (optax.lion(0.1), "sign"),
        (optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(0.1)), "real|abs|conj"),
    ],
)
def test_optimisers_that_look_at_magnitudes_are_named(optimiser, operation):
    with pytest.raises(TypeError, match=rf"the optimiser's update must .* applies `({operation})`.* at .*optax"):
        require_holomorphic(optimiser.update, PARAMS, optimiser.init(PARAMS), PARAMS, what="the optimiser's update")


def test_optimisers_that_cannot_be_traced_on_complex_numbers_are_named():
    optimiser = optax.chain(optax.clip(1.0), optax.sgd(0.1))
    with pytest.raises(TypeError, match=r"the optimiser's update must .* cannot be traced .*([Cc]lip|max|min)"):
        require_holomorphic(optimiser.update, PARAMS, optimiser.init(PARAMS), PARAMS, what="the optimiser's update")
