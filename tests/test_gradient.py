"""Every rule of the derivative table against central differences in float64, and what it takes at corners."""

from __future__ import annotations

import numpy as np
import pytest
import tvm
import tvm_ffi
from tvm import tirx
from tvm.script import tirx as T

from schedules.definition.errors import DefinitionError
from schedules.definition.gradient import FUNCTIONS, NODES, derivative
from tests.oracle import TARGET

N = 64


def f64(value):
    return tirx.const(float(value), "float64")


def let(u):
    y = tirx.Var("y", "float64")
    return tirx.Let(y, u * u, y * u + y)


#: ``rule: expression of x``, each with a factor inside and one outside, so that the chain rule is tested with it.
RULES = {
    tirx.Add: lambda x: x + f64(2) * x,
    tirx.Sub: lambda x: f64(3) - x * x,
    tirx.Mul: lambda x: x * T.exp(x),
    tirx.Div: lambda x: x / (f64(2) + x * x),
    tirx.Max: lambda x: T.max(x * x, f64(2) * x),
    tirx.Min: lambda x: T.min(x * x, f64(2) * x),
    tirx.Select: lambda x: tirx.Select(x > f64(0.7), x * x, f64(3) * x),
    tirx.Cast: lambda x: T.Cast("float64", T.Cast("float32", f64(2)) * T.Cast("float32", x)) * x,
    tirx.Let: let,
    "exp": lambda x: T.exp(f64(2) * x),
    "exp2": lambda x: T.exp2(f64(2) * x),
    "exp10": lambda x: T.exp10(f64(0.5) * x),
    "log": lambda x: f64(3) * T.log(x * x),
    "log2": lambda x: f64(3) * T.log2(x * x),
    "log10": lambda x: f64(3) * T.log10(x * x),
    "log1p": lambda x: f64(3) * T.log1p(x * x),
    "sqrt": lambda x: f64(3) * T.sqrt(x * x + x),
    "rsqrt": lambda x: f64(3) * T.rsqrt(x * x + x),
    "pow": lambda x: T.pow(x, f64(2)) + T.pow(x, f64(3.5)) + T.pow(f64(1.5), x) + T.pow(x, x * x),
    "fabs": lambda x: T.abs(x - f64(1)) * x,
    "tanh": lambda x: f64(3) * T.tanh(f64(2) * x),
    "sigmoid": lambda x: f64(3) * T.sigmoid(f64(2) * x),
    "erf": lambda x: f64(3) * T.erf(f64(0.7) * x),
    "sin": lambda x: f64(3) * T.sin(f64(2) * x),
    "cos": lambda x: f64(3) * T.cos(f64(2) * x),
    "tan": lambda x: T.tan(f64(0.4) * x),
    "sinh": lambda x: T.sinh(f64(2) * x),
    "cosh": lambda x: T.cosh(f64(2) * x),
    "atan": lambda x: f64(3) * T.atan(f64(2) * x),
    "fma": lambda x: T.fma(x, x * x, f64(2) * x),
    "if_then_else": lambda x: T.if_then_else(x > f64(0.7), x * x, f64(3) * x),
    "floor": lambda x: T.floor(f64(3) * x) * x,
    "ceil": lambda x: T.ceil(f64(3) * x) * x,
    "round": lambda x: T.round(f64(3) * x) * x,
    "nearbyint": lambda x: T.nearbyint(f64(3) * x) * x,
    "trunc": lambda x: T.trunc(f64(3) * x) * x,
    "a cast to an integer is constant": lambda x: T.Cast("float64", T.Cast("int32", f64(3) * x)) * x,
}

X = np.linspace(0.05, 1.95, N) + 1e-3 * np.sin(np.arange(N))


def evaluate(expressions, x, values) -> dict[str, np.ndarray]:
    """Expressions of one variable at each of ``values``: all in one function."""
    n = len(values)
    results = tirx.decl_buffer((len(expressions), n), "float64", name="results")
    points = tirx.decl_buffer((n,), "float64", name="points")
    loop = tirx.Var("loop", "int32")

    def at_point(e):
        def replace(node):
            return points[loop] if isinstance(node, tirx.Var) and node.same_as(x) else node

        return tvm_ffi.structural_map(e, replace, order="post")

    stores = [
        tirx.BufferStore(results, at_point(e), [tirx.const(k, "int32"), loop])
        for k, e in enumerate(expressions.values())
    ]
    body = tirx.For(loop, 0, n, tirx.ForKind.SERIAL, tirx.SeqStmt(stores) if len(stores) > 1 else stores[0])
    func = tirx.PrimFunc([points, results], body).with_attr({"global_symbol": "f", "tirx.noalias": True})
    out = tvm.runtime.tensor(np.zeros((len(expressions), n)))
    tvm.compile(func, target=TARGET)["f"](tvm.runtime.tensor(values), out)
    return dict(zip(expressions, out.numpy(), strict=True))


def test_every_rule_has_its_test():
    assert set(NODES) | set(FUNCTIONS) == {rule for rule in RULES if not (isinstance(rule, str) and " " in rule)}


def test_rules_against_central_differences():
    x = tirx.Var("x", "float64")
    step = 2.0**-18
    functions = {rule: make(x) for rule, make in RULES.items()}
    ahead, behind = (evaluate(functions, x, X + d) for d in (step, -step))
    found = evaluate({rule: derivative(e, x) for rule, e in functions.items()}, x, X)
    assert evaluate(functions, x, X)[tirx.Mul] == pytest.approx(X * np.exp(X), rel=1e-13)
    for rule in RULES:
        want = (ahead[rule] - behind[rule]) / (2 * step)
        # What is rounded to float32 on the way has a difference that is good to 6e-8 / step.
        allowed = 3e-2 if rule is tirx.Cast else 2e-8
        np.testing.assert_allclose(found[rule], want, rtol=allowed, atol=allowed, err_msg=str(rule))


def values_at(make, points):
    x = tirx.Var("x", "float64")
    return evaluate({"d": derivative(make(x), x)}, x, np.float64(points))["d"]


@pytest.mark.parametrize(
    ("make", "points", "want"),
    [
        (T.abs, [-1, 0, 1], [-1, 0, 1]),
        (lambda x: T.max(x, f64(0)), [-1, 0, 1], [0, 0.5, 1]),
        (lambda x: T.min(x, f64(0)), [-1, 0, 1], [1, 0.5, 0]),
        (lambda x: T.max(f64(2) * x, x), [-1, 0, 1], [1, 1.5, 2]),
        (lambda x: T.max(x, x), [0], [1]),
        (T.sqrt, [0, 1], [np.inf, 0.5]),
        (lambda x: T.pow(x, f64(2)), [-3, 0], [-6, 0]),
        (lambda x: T.pow(x, f64(0)), [0, 2], [0, 0]),
        (lambda x: T.pow(f64(0), x), [0, 2], [0, 0]),
        (lambda x: T.if_then_else(x > f64(0), T.log(x), f64(0)), [-1, 2], [0, 0.5]),
    ],
)
def test_corners_as_torch_has_them(make, points, want):
    np.testing.assert_array_equal(values_at(make, points), want)


def test_corners_are_those_of_torch():
    torch = pytest.importorskip("torch")
    two = torch.tensor([-1.0, 0.0, 1.0], dtype=torch.float64, requires_grad=True)
    for make, theirs in (
        (T.abs, torch.abs),
        (lambda x: T.max(x, f64(0)), lambda t: torch.maximum(t, torch.zeros_like(t))),
        (lambda x: T.min(x, f64(0)), lambda t: torch.minimum(t, torch.zeros_like(t))),
        (lambda x: T.pow(x, f64(2)), lambda t: torch.pow(t, 2)),
        (lambda x: T.pow(f64(0), x), lambda t: torch.pow(torch.zeros_like(t), t)),
    ):
        two.grad = None
        theirs(two).sum().backward()
        kept = two.grad.isfinite()
        np.testing.assert_array_equal(values_at(make, [-1, 0, 1])[kept], two.grad.numpy()[kept])


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda s, c: s, "T.float32(1.0)"),
        (lambda s, c: s - c * T.float32(3), "T.float32(1.0)"),
        (lambda s, c: s * c, "c"),
        (lambda s, c: c * T.tanh(s / c), "T.float32(1.0) - T.tanh(s / c) * T.tanh(s / c)"),
        (lambda s, c: s / (T.float32(1) + c), "T.float32(1.0) / (T.float32(1.0) + c)"),
        (lambda s, c: T.max(s, s), "T.float32(1.0)"),
        (lambda s, c: T.exp(c) * T.copysign(c, c), "T.float32(0.0)"),
    ],
)
def test_derivatives_are_small(make, text):
    s, c = (tirx.Var(n, "float32") for n in ("s", "c"))
    assert str(derivative(make(s, c), s)) == text


def test_what_has_no_rule_is_refused_with_the_expression():
    s, c = (tirx.Var(n, "float32") for n in ("s", "c"))
    with pytest.raises(
        DefinitionError, match=r"with respect to s is known of T.fmod\(s, c\), a part of T.fmod\(s, c\) \* c"
    ):
        derivative(T.fmod(s, c) * c, s)
