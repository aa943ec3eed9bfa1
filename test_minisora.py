"""What minisora states of its layers, one theorem a test.

    python -m pytest                            the same examples each time
    HYPOTHESIS_PROFILE=long python -m pytest    a random search

The oracle is float64 NumPy. A tolerance is k · ε · size: k roundings on the longest path to an
entry, ε of the dtype that the result has (or of a coarser one that is named), and size the sum of
the absolute values of all terms of the entry.
"""
import copy
import inspect
import io
import math
import os
import pathlib
import pickle
import re
import weakref

import numpy as np
import pytest
import torch
from hypothesis import assume, example, given, settings, strategies as st
from numpy.linalg import norm
from torch import nn
from torch.nn.utils import prune
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import minisora
from minisora import (METHODS, ROTATIONS, Adapter, DoRALinear, LoRALinear, SORALinear, adapt,
                      adapter_state_dict, load_adapter_state_dict, merge_adapters,
                      rotation_factors, singular_value_entropy, stable_rank)

for profile, same, count in ("default", True, 60), ("long", False, 2000):
    settings.register_profile(
        profile, derandomize=same, database=None, deadline=None, max_examples=count)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))
few = settings(max_examples=settings().max_examples // 5)  # of a test with many parameters
torch.set_num_threads(1)

f64, f32, bf16, f16 = DTYPES = torch.float64, torch.float32, torch.bfloat16, torch.float16
HALF = bf16, f16
WIDE = {f64: f64, f32: f32, bf16: f32, f16: f32}  # the dtype of the adapters on a base of each
K = 128  # no path to an entry has more roundings, at the sizes of cases()
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
KINDS = {
    **{name: (cls, {}) for name, cls in METHODS.items() if name != "sora"},
    **{f"{name} full": (METHODS[name], {"detach_norm": False}) for name in ("dora", "dora_matrix")},
    **{f"sora {name}": (SORALinear, {"rotation": name}) for name in ROTATIONS},
}
each = pytest.mark.parametrize
every_kind, every_dora = each("kind", KINDS), each("kind", [k for k in KINDS if "dora" in k])
every_method, every_dtype = each("method", METHODS), each("dtype", DTYPES)
every_rotation = each("rotation", ROTATIONS)
seeds = st.integers(0, 2**31)


# ---- the table of equations, in float64 NumPy


def skew(C, D):
    return min(1, 1 / (norm(C) + norm(D) + 1e-6)) * (D @ C.T - C @ D.T)


def dense_rotation(P, rotation):
    """R of the (m, m) P: exp by the eigenvalues of the Hermitian iP."""
    I = np.eye(len(P))
    if rotation == "exp":
        angles, Q = np.linalg.eigh(1j * P)
        return ((Q * np.exp(-1j * angles)) @ Q.conj().T).real
    return np.linalg.solve(I - P / 2, I + P / 2) if rotation == "cayley" else I + P


def row_norms(t):
    return norm(t["W0"] + t["sB"] @ t["A"], axis=1)


def conditions(kind, t, norms=None):
    """The diagonal before the update, the matrix after it. norms: DoRA's, if not those of t."""
    ones = np.ones(len(t["W0"]))
    if "sora" in kind:
        return t["diag"], dense_rotation(skew(t["C"], t["D"]), kind.split()[1])
    if "dora" in kind:
        norms = row_norms(t) if norms is None else norms
        return ones, np.diag(t["magnitude"] / np.where(norms == 0, np.inf, norms))
    return t.get("diag", ones), np.diag(ones)


def equation(kind, t, W0x, sBAx, norms=None):
    """W'x, or W'ᵀ of W0ᵀ and (sBA)ᵀ."""
    before, after = conditions(kind, t, norms)
    return (before * W0x + sBAx) @ after.T


def weight(kind, t, norms=None):
    return equation(kind, t, t["W0"].T, (t["sB"] @ t["A"]).T, norms).T


def terms(kind, t, W0x, sBAx, norms=None):
    """The sum of the absolute values of all terms of equation(…) of these absolute values."""
    before, after = map(abs, conditions(kind, t, norms))
    z = before * W0x + sBAx
    if "sora" in kind:  # with ‖U‖‖V‖ ≤ q each factor of R is ≤ 1 + q, and R mixes a row
        both = norm(t["C"]) + norm(t["D"])
        q = min(1, 1 / (both + 1e-6)) * both**2
        return (1 + q) ** 2 * norm(z, axis=-1, keepdims=True) * np.ones_like(z)
    return z @ after


def size(kind, t):
    """The sum of the absolute values of all terms of each entry of W'."""
    sums = abs(t["W0"]), abs(t["sB"]) @ abs(t["A"])
    bound = terms(kind, t, sums[0].T, sums[1].T).T
    if "dora" in kind:  # ‖W‖² has terms that much larger than itself, c its relative error
        ratio = norm(sum(sums), axis=1) / np.maximum(row_norms(t), 1e-300)
        bound = bound * (1 + ratio[:, None] ** 2)
    return bound


# ---- layers and tolerances


def uniform(seed, *shape):
    return np.random.default_rng(seed).uniform(-1, 1, shape)


def draw(seed, *shape):
    return torch.from_numpy(uniform(seed, *shape)).to(DEVICE)


def make(kind, dtype=f64, m=5, n=7, r=3, alpha=5, r_p=2, seed=0, rows=(), bias=True, trained=True):
    """A layer drawn from seed. rows: those of W0 and B that are 0."""
    torch.manual_seed(seed)
    (cls, options), base = KINDS[kind], nn.Linear(n, m, bias, DEVICE, dtype)
    base.weight.data = draw(seed, m, n).to(dtype)
    base.weight.data[list(rows)] = 0
    layer = cls(base, r, alpha, **options, **({"r_p": r_p} if cls is SORALinear else {}))
    for i, (name, p) in enumerate(layer.named_parameters()):
        if trained and name != "base.weight":
            p.data = draw(seed + 1 + i, *p.shape).to(p)
    layer.B.data[list(rows)] = 0
    return layer


def cases(**options):
    """Arguments of make(): sizes from 1 up, r above min(m, n) too, α ≠ r."""
    return st.fixed_dictionaries({
        "m": st.integers(1, 7), "n": st.integers(1, 7), "r": st.integers(1, 9), "seed": seeds,
        "r_p": st.integers(1, 4), "alpha": st.sampled_from([0.5, 3, -10, 16]),
        "rows": st.sampled_from([(), (), (0,)]), "bias": st.booleans(), **options})


def array(value):
    return value.detach().double().cpu().numpy() if torch.is_tensor(value) else np.asarray(value)


def arrays(layer):
    t = {name: array(p) for name, p in layer.named_parameters()}
    return {**t, "W0": t["base.weight"], "b": t.get("base.bias", np.zeros(len(t["B"]))),
            "sB": layer.lora_alpha / layer.r * t["B"]}


def inputs(layer, *shape):
    return draw(1, *shape, layer.in_features).to(layer.base.weight)


def close(actual, exact, size, dtype, k, eps_of=None):
    """actual has this dtype, and |actual − exact| ≤ k · ε · size, with the ε of dtype or eps_of."""
    assert actual.dtype == dtype, actual.dtype
    actual, exact, eps = array(actual), array(exact), torch.finfo(eps_of or dtype).eps
    error, tiny = abs(actual - exact), torch.finfo(WIDE[dtype]).tiny  # what underflow may lose
    bound = k * (eps * array(size) + tiny)
    assert actual.shape == exact.shape and (error <= bound).all(), (error / bound).max()


# ---- all methods


@every_kind
@every_dtype
@few
@given(case=cases(), shape=st.sampled_from([(3,), (), (2, 1)]))
@example(case={"m": 200_000, "n": 1}, shape=(1,))  # √(x²) ≠ x for 25 of 1.5 million float32
@example(case={"m": 64, "n": 4096}, shape=(3,))
def test_at_step_0_the_weight_is_W0_and_the_output_that_of_the_base(kind, dtype, case, shape):
    """Bit for bit, but b, taken off and put back, may cost y an ulp if it is not in half."""
    layer = make(kind, dtype, trained=False, **case)
    x, W0, W = inputs(layer, *shape), layer.base.weight, layer.adapted_weight()
    assert torch.equal(layer.weight, W0) and torch.equal(W, W0) and W.dtype == WIDE[dtype]
    assert all(p.dtype == WIDE[dtype] for p in layer.parameters() if p.requires_grad)
    y0, b = layer.base(x), arrays(layer)["b"]
    exact = layer.bias is None or dtype in HALF
    close(layer(x), y0, abs(array(y0)) + abs(b), dtype, 0 if exact else 1)


@every_kind
@each("made, dtype", [*zip(DTYPES, DTYPES), (f32, bf16), (f32, f16)])
@few
@given(case=cases(), shape=st.sampled_from([(3,), (), (0,), (2, 3), (2, 1, 3)]))
def test_the_layer_is_its_equation_merged_or_not(kind, made, dtype, case, shape):
    """W' and y = W'x + b, also of a model cast to half precision after it was adapted.

    k: in half precision A, Ax, W0x + b, y, and W0Aᵀ in the norm of the matrix form are rounded, by
    ε/2 each. After a cast every step is.
    """
    layer = make(kind, made, **case).to(dtype)
    t, x = arrays(layer), inputs(layer, *shape)
    W, W_size, twice = weight(kind, t), size(kind, t), "dora_matrix" in kind and dtype in HALF
    k = 2 + twice if made is dtype in HALF else K
    close(layer.adapted_weight(), W, W_size, layer.B.dtype, k if twice else K, dtype if twice else None)
    y, bound = array(x) @ W.T + t["b"], abs(array(x)) @ W_size.T + 2 * abs(t["b"])
    close(layer(x), y, bound, dtype, k)
    merged = layer.merge()
    close(merged.weight, W, W_size, dtype, k)
    close(merged(x), y, bound, dtype, k)


@every_kind
@each("dtype, x_dtype, autocast", [(bf16, bf16, 0), (f16, f16, 0), (f32, f32, 1), (f32, bf16, 1)])
@few
@given(case=cases(), cancels=st.sampled_from(["nothing", "sBA", "b"]))
def test_half_precision_rounds_the_base_A_Ax_and_y_and_nothing_else(
        kind, dtype, x_dtype, autocast, case, cancels):
    """What base(x) is, A is cast to the dtype of x, so is Ax, and y to that of base(x).

    So if b or sBA cancels W0, y is exact to its own ε/2, and not to that of W0x.
    """
    layer = make(kind, dtype, **{**case, "r": case["n"]})
    W0, x = layer.base.weight, torch.eye(case["n"], dtype=x_dtype, device=DEVICE)
    if cancels == "sBA":
        layer.A.data = x.to(layer.A)
        layer.B.data = -1.01 * W0.to(layer.B) / layer.scaling
    elif layer.bias is not None and cancels == "b":
        layer.bias.data = -W0[:, 0] * 1.01
    with torch.autocast(DEVICE, dtype=bf16, enabled=bool(autocast)):
        y, y0 = layer(x), layer.base(x)
    t, Ax = arrays(layer), array(nn.functional.linear(x, layer.A.to(x_dtype)))
    norms = array(layer.row_norm()) if "dora" in kind else None
    W0x, sBAx = array(y0) - t["b"], Ax @ t["sB"].T
    exact = equation(kind, t, W0x, sBAx, norms) + t["b"]
    wide = terms(kind, t, abs(W0x) + abs(t["b"]), abs(Ax) @ abs(t["sB"]).T, norms) + abs(t["b"])
    eps = torch.finfo(y0.dtype).eps
    close(y, exact, abs(exact) / 2 + K * 2.0**-23 / eps * wide, y0.dtype, 1)


@every_kind
def test_float16_may_overflow_in_W0x_where_b_brings_it_back(kind):
    layer = make(kind, f16, m=2, n=2, trained=False)
    layer.base.weight.data.fill_(300), layer.bias.data.fill_(-6e4)
    layer = KINDS[kind][0](layer.base, 1)  # its magnitude is that of this base
    x = torch.tensor([[150.0, 150.0]], dtype=f16, device=DEVICE)  # W0x = 90,000
    assert torch.equal(layer(x), layer.base(x)) and (layer(x) == 3e4).all()


@every_kind
def test_autocast_changes_neither_W_nor_the_row_norm_nor_what_is_merged(kind):
    layer = make(kind, f32)

    def state():
        norms = [layer.row_norm()] if "dora" in kind else []
        return [layer.adapted_weight(), layer.weight, layer.merge().weight, *norms]
    before = state()
    with torch.autocast(DEVICE, dtype=bf16):
        assert all(map(torch.equal, before, state()))
        y = layer(inputs(layer, 3))
    y.sum().backward()
    assert all(p.grad.dtype == f32 for p in layer.parameters() if p.requires_grad)


@every_kind
@every_dtype
@few
@given(case=cases(), rows=st.integers(1, 3))
def test_the_equation_is_linear_in_W0x_and_sBAx_together_row_by_row(kind, dtype, case, rows):
    """So what takes W0x and sBAx to W'x takes W0 and sBA to W': forward and merge may share it."""
    layer = make(kind, dtype, **case)
    t, (u, v) = arrays(layer), draw(case["seed"] + 9, 2, rows, case["m"]).to(layer.A)
    norms = array(layer.row_norm()) if "dora" in kind else None
    bound = terms(kind, t, abs(array(u)), abs(array(v)), norms)
    exact = equation(kind, t, array(u), array(v), norms)
    close(layer.equation(u, v), exact, bound, WIDE[dtype], K)


@every_kind
@few
@given(case=cases(trained=st.booleans()), seed=seeds)
def test_the_gradient_is_that_of_the_equation(kind, case, seed):
    """⟨gradient, v⟩ = dL/dv in a direction v of x and all parameters, by five-point differences."""
    layer = make(kind, **case)
    t, x, G = arrays(layer), inputs(layer, 3).requires_grad_(), uniform(seed, 3, case["m"])
    moving = {"x": x, **{name: p for name, p in layer.named_parameters() if p.requires_grad}}
    assert set(moving) == {"x", *t} - {"base.weight", "base.bias", "W0", "b", "sB"}
    v = {name: uniform(seed + i, *p.shape) for i, (name, p) in enumerate(moving.items())}
    norms = row_norms(t)
    held = norms if getattr(layer, "detach_norm", False) else None
    assume("dora" not in kind or (norms > 0.1).all())  # else 1 / norm is too steep

    def loss(h):
        moved = {**t, **{name: array(p) + h * v[name] for name, p in moving.items()}}
        moved["sB"] = case["alpha"] / case["r"] * moved["B"]
        return (G * (moved["x"] @ weight(kind, moved, held).T)).sum()
    h = 2.0**-11
    slope = (8 * (loss(h) - loss(-h)) - (loss(2 * h) - loss(-2 * h))) / (12 * h)
    (layer(x) * torch.from_numpy(G).to(x)).sum().backward()
    actual = sum((v[name] * array(p.grad)).sum() for name, p in moving.items())
    steep = 1 / norms.min() if "dora" in kind else 1
    assert abs(actual - slope) <= 1e-8 * (1 + layer.scaling**2) * (1 + steep) ** 4
    assert layer.weight.requires_grad


@every_kind
@few
@given(case=cases())
def test_a_method_commutes_with_turned_inputs_and_permuted_outputs(kind, case):
    """(W0Q, AQ) gives W'Q. (BQ, QᵀA), (CQ, DQ), and for DoRA (cW0, cB) with c = 2⁻³⁰, give W'."""
    layer, seed = make(kind, **case), case["seed"] + 99
    bound = norm(size(kind, arrays(layer)), axis=1, keepdims=True)
    Q, Qr, Qp = (torch.linalg.qr(draw(seed, case[k], case[k])).Q for k in ("n", "r", "r_p"))
    order = uniform(seed, case["m"]).argsort()
    W = (layer.adapted_weight() @ Q)[order]
    turns = {"base.weight": Q, "B": Qr, "C": Qp, "D": Qp}
    for name, p in layer.named_parameters():
        p.data = Qr.T @ p @ Q if name == "A" else (p @ turns[name] if name in turns else p)[order]
        if "dora" in kind and name in ("base.weight", "B"):
            p.data *= 2**-30
    close(layer.adapted_weight(), W, bound[order], f64, K**2)


@every_rotation
@few
@given(case=cases())
def test_SORA_at_D_equal_C_is_Pre_Diag_and_that_at_d_equal_1_is_LoRA(rotation, case):
    sora, pre_diag = make(f"sora {rotation}", **case), make("pre_diag", **case)
    lora = make("lora", **case)
    sora.D.data = sora.C.data.clone()
    for layer in sora, pre_diag:
        layer.load_state_dict(lora.state_dict(), strict=False)
    sora.diag.data = pre_diag.diag.data
    assert torch.equal(sora.adapted_weight(), pre_diag.adapted_weight())
    pre_diag.diag.data.fill_(1)
    assert torch.equal(pre_diag.adapted_weight(), lora.adapted_weight())


# ---- DoRA


@each("full", ["", " full"])
@few
@given(case=cases(alpha=st.just(2), trained=st.booleans()))
def test_the_two_DoRAs_agree_in_values_gradients_and_training(full, case):
    """10 steps of gradient descent. A step multiplies a difference by 2 at most."""
    one, two = (make(kind + full, **case) for kind in ("dora", "dora_matrix"))
    norms = row_norms(arrays(one))
    assume(((norms > 0.3) | (norms == 0)).all())
    x, target = inputs(one, 4), draw(3, 4, case["m"])
    for step in range(10):
        for layer in one, two:
            layer.zero_grad()
            (layer(x) - target).square().mean().backward()
        for p, q in zip(one.parameters(), two.parameters()):
            close(q, p, 1, f64, 64 * 2.0**step)
            if p.requires_grad:
                close(q.grad, p.grad, 1 + abs(p.grad).max(), f64, 4096 * 2.0**step)
                p.data, q.data = p - 0.01 * p.grad, q - 0.01 * q.grad


@every_dtype
@each("delta", [0.5, 0.2, 0.1])
def test_a_row_shrunk_to_delta_costs_the_matrix_form_eps_over_delta_squared(dtype, delta):
    """W0 + sBA = δ W0 nearly: c errs by ε/δ²/10 in some row, by half (if wide twice) ε/δ² in none.

    DoRA as first written pays ε/δ at most.
    """
    layer = make("dora_matrix", dtype, m=500, n=24, r=1, alpha=1)
    length, row = draw(5, 500, 1).abs() + 0.5, draw(6, 1, 24)
    layer.base.weight.data = (length * row).to(dtype)
    layer.A.data, layer.B.data = row.to(layer.A), ((delta - 1) * length).to(layer.B)
    exact, price = row_norms(arrays(layer)), torch.finfo(dtype).eps / delta**2
    errors = abs(array(layer.row_norm()) ** 2 / exact**2 - 1) / 2  # of c, to first order
    assert 0.1 * price <= errors.max() <= (0.5 if dtype in HALF else 2) * price
    close(DoRALinear.row_norm(layer), exact, exact / delta, WIDE[dtype], K)


@every_dtype
@given(seed=seeds, cut=st.sampled_from([0.1, 1e-2, 1e-4, 1e-7, 0]))
def test_the_norm_of_the_matrix_form_stays_at_its_floor(dtype, seed, cut):
    """‖·‖² is exact to 8 ε (64 ε if wide) of all terms squared, at least ε ‖w‖², and flat there."""
    layer, eps = make("dora_matrix full", dtype, m=4, alpha=3, seed=seed), torch.finfo(dtype).eps
    layer.A.data[0], layer.B.data[:2] = layer.base.weight[0], 0
    layer.B.data[0, 0] = cut - 1  # so that w + u = cut · w in row 0
    t, norm2 = arrays(layer), array(layer.row_norm()) ** 2
    exact, floor = row_norms(t) ** 2, eps * norm(t["W0"], axis=1) ** 2
    bound = (8 if dtype in HALF else 64) * eps * norm(size("lora", t), axis=1) ** 2
    assert layer.row_norm().dtype == WIDE[dtype] and (norm2 >= floor * (1 - 1e-5)).all()
    assert (abs(norm2 - np.maximum(exact, floor)) <= bound).all()
    layer.equation(*torch.ones(2, 4).to(layer.A)).sum().backward()
    assert cut == 0 or layer.B.grad[0].any() == (norm2 > floor * (1 + 1e-5))[0]


@every_dora
@each("dead", [[1], [0, 3], [*range(5)]])
@each("trained, unfrozen", [(False, False), (True, False), (True, True)])
def test_rows_of_zeros_stay_zero_and_every_gradient_is_finite(kind, dead, trained, unfrozen):
    """0/0 in the equation: a pruned row at step 0, and one with a magnitude but no update."""
    layer = make(kind, rows=dead, trained=trained)
    layer.base.requires_grad_(unfrozen)
    for _ in range(3):
        assert not layer.adapted_weight()[dead].any()
        layer(inputs(layer, 9)).square().sum().backward()
        assert all(p.grad.isfinite().all() for p in layer.parameters() if p.requires_grad)
        for p in layer.B, layer.A, layer.magnitude:
            p.data -= 0.01 * p.grad


@every_dora
def test_a_model_cast_to_float16_keeps_rows_whose_squares_overflow_it(kind):
    layer = make(kind, f32, m=4, n=64, r=1, alpha=1, trained=False)
    layer.base.weight.data.fill_(40), layer.A.data.fill_(1), layer.B.data.fill_(40)
    layer.magnitude.data.fill_(640)  # of rows of 64 times 80, twice 320 long
    layer.half()
    close(layer.adapted_weight(), np.full((4, 64), 80.0), 80, f16, 4)


# ---- the rotation


def R_of(C, D, rotation):
    options = {} if rotation == "exp" else {"rotation": rotation}
    L, V = rotation_factors(*(torch.from_numpy(t).to(DEVICE) for t in (C, D)), **options)
    assert L.dtype == V.dtype == f64 and L.shape == V.shape == (len(C), 2 * C.shape[1])
    return np.eye(len(C)) + array(L @ V.T)


@st.composite
def factors(choose):
    """C, D of any sizes, and 64 ε (1 + ‖C‖ + ‖D‖)², where ‖L‖‖V‖ is about that square."""
    seed, m, r_p = choose(seeds), choose(st.integers(1, 12)), choose(st.integers(1, 4))
    C, D = (choose(st.sampled_from([1e-3, 0.1, 1.0, 30.0])) * uniform(seed + i, m, r_p)
            for i in range(2))
    D = choose(st.sampled_from([D, D, D, C + 1e-3 * D, C[:, ::-1].copy(), -C, 0 * D]))
    return C, D, 64 * 2.0**-52 * (1 + norm(C) + norm(D)) ** 2


@every_rotation
@given(factors())
def test_R_is_that_of_the_dense_P(rotation, CDe):
    """e^P, (I + P/2)(I − P/2)⁻¹ or I + P, and as rotation_matrix() in the dtype of C."""
    C, D, eps = CDe
    assert norm(R_of(C, D, rotation) - dense_rotation(skew(C, D), rotation), 2) <= eps
    layer = make(f"sora {rotation}", f32, m=len(C), r_p=C.shape[1])
    layer.C.data, layer.D.data = (torch.from_numpy(t).to(layer.C) for t in (C, D))
    R = dense_rotation(skew(array(layer.C), array(layer.D)), rotation)
    close(layer.rotation_matrix(), R, abs(R) + eps / 2**-23, f32, 1)


@every_rotation
@given(factors())
def test_R_is_orthogonal_with_determinant_1_but_of_first_order_RtR_is_I_plus_PtP(rotation, CDe):
    C, D, eps = CDe
    R, first = R_of(C, D, rotation), rotation == "first_order"
    P = first * skew(C, D)
    assert norm(R.T @ R - np.eye(len(R)) - P.T @ P, 2) <= 2 * eps * (1 + norm(P))
    assert first or abs(np.linalg.det(R) - 1) <= 2 * len(R) * eps


@each("rotation", ["exp", "cayley"])
@given(seeds, st.integers(1, 64), st.integers(1, 8),
       st.sampled_from(["random", "near", "swapped", "short", "parallel", "opposite", "deficient"]))
def test_R_is_orthogonal_to_1e_12_for_entries_up_to_1(rotation, seed, m, r_p, structure):
    C, D = uniform(seed, 2, m, r_p)
    D = {"near": C + 1e-3 * D, "swapped": C[:, ::-1].copy(), "short": 1e-4 * D, "opposite": -C,
         "parallel": C * D[0], "deficient": D[:, :1] * C[:1]}.get(structure, D)
    R = R_of(C, D, rotation)
    assert norm(R.T @ R - np.eye(m), 2) <= 1e-12


@every_rotation
@given(factors())
def test_R_turns_2r_p_dimensions_at_most_commutes_with_P_and_of_D_C_is_transposed(rotation, CDe):
    """It fixes what is orthogonal to the columns of C and D."""
    C, D, eps = CDe
    R, P, both = R_of(C, D, rotation), skew(C, D), np.hstack([C, D])
    fixed = np.linalg.svd(both)[0][:, np.linalg.matrix_rank(both):]
    assert fixed.shape[1] >= len(C) - both.shape[1] and norm(R @ fixed - fixed, 2) <= 2 * eps
    assert norm(R @ P - P @ R, 2) <= 2 * eps * (1 + norm(P, 2))
    assert norm(R_of(D, C, rotation) - R.T, 2) <= 2 * eps


@each("theta", [0.1, 1.0, 3.0, 30.0])
def test_R_turns_a_known_plane_by_a_known_angle(theta):
    """C = a e1, D = a e2 with a² s_P = θ turn e1 to e2 by θ, for Cayley by 2 atan(θ/2)."""
    a = max(theta**0.5, theta + math.sqrt(theta**2 + 1e-6 * theta))
    for rotation, angle in ("exp", theta), ("cayley", 2 * math.atan(theta / 2)):
        exact, (e1, e2), c, s = np.eye(5), np.eye(5)[:2, :, None], math.cos(angle), math.sin(angle)
        exact[:2, :2] = [[c, -s], [s, c]]
        assert norm(R_of(a * e1, a * e2, rotation) - exact) <= 64 * 2.0**-52 * (1 + 2 * a) ** 2


def test_A_and_C_are_drawn_uniformly_B_is_0_and_D_a_copy_of_C():
    layer = SORALinear(nn.Linear(400, 100), r_p=40)
    A, C, D = 20 * layer.A, 10 * layer.C, layer.D
    assert not layer.B.any() and torch.equal(layer.C, D) and layer.C.data_ptr() != D.data_ptr()
    for t in A.flatten(), C.flatten():
        assert (t.sort().values - torch.linspace(-1, 1, len(t))).abs().max() < 0.1


# ---- diagnostics


@each("dtype", [f32, f64])
@given(seeds, st.integers(1, 6), st.integers(1, 6), st.sampled_from([2.0**-100, 1.0, 2.0**124]))
def test_the_diagnostics_are_their_formulas_at_any_scale(dtype, seed, m, n, c):
    """−Σ p log p with p = σ/Σσ, ‖·‖²F/‖·‖₂², and log(stable rank) ≤ entropy ≤ log min(m, n)."""
    delta = uniform(seed, 2, m, n).astype(np.float32).astype(float)
    S = np.linalg.svd(delta, compute_uv=False)
    p, exact = S / S.sum(axis=1, keepdims=True), torch.from_numpy(c * delta).to(DEVICE)
    for d in exact.to(dtype), (torch.linalg.qr(draw(seed, m, m)).Q @ exact).mT.to(dtype):
        entropy, rank = singular_value_entropy(d), stable_rank(d)
        close(minisora.relative_singular_values(d), S / S[:, :1], 1, dtype, 64)
        close(entropy, -(p * np.log(p)).sum(axis=1), 4, dtype, 64)
        close(rank, (delta**2).sum(axis=(1, 2)) / S[:, 0] ** 2, 6, dtype, 64)
        assert (rank.log() - 1e-5 <= entropy).all() and entropy.max() <= math.log(min(m, n)) + 1e-5


@each("sigma", [[0.0, 0.0], [2.0, 2.0, 0.0]])
def test_deficient_updates_have_exact_diagnostics_and_finite_gradients(sigma):
    delta, rank = torch.diag(torch.tensor(sigma)).requires_grad_(), sum(sigma) / 2
    for diagnostic, exact in (singular_value_entropy, math.log(rank or 1)), (stable_rank, rank):
        close(diagnostic(delta.bfloat16()), exact, 1, f32, 4)
        assert torch.autograd.grad(diagnostic(delta), delta)[0].isfinite().all()


@every_dtype
@few
@given(case=cases())
def test_in_double_an_update_of_lora_has_entropy_at_most_log_r_and_stable_rank_r(dtype, case):
    layer = copy.deepcopy(make("lora", dtype, **case)).double()
    delta, rank = layer.adapted_weight() - layer.base.weight, min(case["r"], case["m"], case["n"])
    assert singular_value_entropy(delta) <= math.log(rank) + 1e-9
    assert stable_rank(delta) <= rank + 1e-9


# ---- in torch's world, and at what cost


@every_kind
def test_vmap_compile_pickle_and_checkpoint_give_the_same_output(kind):
    torch._dynamo.reset()
    layer, other = make(kind), make(kind, seed=1)
    x, pairs = inputs(layer, 2, 3), zip(layer.named_parameters(), other.parameters())
    both = {name: torch.stack([p, q]) for (name, p), q in pairs}
    y, z = torch.vmap(lambda p: torch.func.functional_call(layer, p, (x,)))(both)
    assert torch.allclose(z, other(x), rtol=0, atol=1e-13)
    for same in (y, torch.vmap(layer)(x), pickle.loads(pickle.dumps(copy.deepcopy(layer)))(x),
                 torch.compile(layer, fullgraph=True, backend="eager")(x),
                 torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False)):
        assert torch.allclose(same, layer(x), rtol=0, atol=1e-13)


@every_method
def test_a_transformer_encoder_in_eval_mode_runs_the_adapted_weight(method, monkeypatch):
    block = nn.TransformerEncoderLayer(6, 2, 16, batch_first=True, dropout=0, device=DEVICE)
    net = disturb(adapt(block, method, ["linear1", "linear2"])).eval()
    monkeypatch.setattr(METHODS[method], "forward", None)
    with torch.no_grad():
        fast = net(X[None])
    assert torch.allclose(fast, merge_adapters(net).train()(X[None]), atol=1e-5)


class Seen(TorchDispatchMode):
    """Records the name and the size of each operation's result, 0 for a view."""

    def __init__(self):
        super().__init__()
        self.names, self.sizes = set(), set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.names.add(func.overloadpacket.__name__)
        self.sizes.add(out.numel() if torch.is_tensor(out) and not func.is_view else 0)
        return out


@every_method
@each("dtype", [f32, bf16])
def test_a_step_costs_the_operations_and_bytes_of_the_thin_form(method, dtype):
    """kept: the bytes that autograd keeps for the backward, besides x and parameters."""
    T, m, n, r, q, found = 512, 96, 128, 16, 8, weakref.WeakSet()  # q = 2 r_p
    layer = METHODS[method](nn.Linear(n, m, device=DEVICE, dtype=dtype), r)
    x, seen = inputs(layer, T).requires_grad_(), Seen()

    def pack(tensor):
        found.add(alias := tensor.detach())  # tensor itself could make a cycle
        return alias
    with seen, FlopCounterMode(display=False) as flops:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda alias: alias):
            y = layer(x).sum()  # holds the graph; what the forward freed is no longer in found
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in found}
        y.backward()
    own = {t.data_ptr() for t in (x, *layer.parameters())}
    kept = sum(storages[at] for at in storages.keys() - own)
    lora = 4 * T * m * n + 6 * T * r * (m + n)  # W0x and back to x; A and B, thrice
    thin = 4 * (T * r + m * r) + 2 * r * n * (dtype is bf16)  # Ax, sB, and A in bfloat16
    exact = {
        "lora": (lora, thin), "pre_diag": (lora, thin + 4 * T * m),
        "dora": (lora + 2 * m * n * r, thin + 4 * (T * m + 2 * m)),
        "dora_matrix": (lora + 2 * (m * n + r * n + m * r) * r, thin + 4 * (T * m + 2 * m)),
        "sora": (lora + 12 * T * m * q + 12 * m * q * q, thin + 4 * T * (2 * m + q)),
    }[method]
    more = kept - exact[1]
    assert flops.get_total_flops() == exact[0]
    assert 0 < more < 64 * m * q if method == "sora" else more == 0  # L, V, … have no T
    assert (m * n in seen.sizes) == (method == "dora") and m * m not in seen.sizes


@each("rotation", ["cayley", "first_order"])
def test_cayley_and_first_order_ask_the_host_for_no_value(rotation):
    layer, seen = make(f"sora {rotation}", f32), Seen()
    with seen:
        layer(inputs(layer, 3)).sum().backward()
    waits = {"_local_scalar_dense", "nonzero", "equal", "linalg_inv", "_linalg_check_errors",
             "linalg_matrix_exp", "_to_cpu"}
    assert not seen.names & waits


# ---- models

X = draw(0, 5, 6).float()


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.q_proj, self.v_proj, self.xq_proj = (nn.Linear(6, 6) for _ in range(3))
        self.out = self.again = nn.Linear(6, 6, bias=False)

    def forward(self, x):
        return self.again(self.out(self.q_proj(x) * self.v_proj(x) + self.xq_proj(x)))


def model(method=None, targets=("q_proj", "v_proj")):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 6), Block(), nn.LayerNorm(6)).to(DEVICE)
    return adapt(net, method, targets) if method else net


@torch.no_grad()
def disturb(net):
    for p in net.parameters():
        if p.requires_grad:
            p.add_(0.3 * torch.randn_like(p))
    return net


def trained(net):
    return {name for name, p in net.named_parameters() if p.requires_grad}


@every_method
def test_adapt_freezes_the_model_and_wraps_what_the_names_match(method):
    net = model()
    net[0].eval()
    assert adapt(net, method, iter(["q_proj", "1.v_proj", "0"]), r=3, lora_alpha=6) is net
    wrapped = [name for name, m in net.named_modules() if type(m) is METHODS[method]]
    assert wrapped == ["0", "1.q_proj", "1.v_proj"] == [name for name, _ in minisora.adapters(net)]
    more = {"p": ["diag"], "d": ["magnitude"], "s": ["diag", "C", "D"]}.get(method[0], [])
    own = {f"{name}.{p}" for name in wrapped for p in ["A", "B", *more]}
    assert own == trained(net) == set(adapter_state_dict(net)) and len(net[0].A) == 3
    assert not net[0].training and not net[0].base.training and net[1].q_proj.base.training
    options = {"d": ", detach_norm=True", "s": ", r_p=4, rotation=exp"}.get(method[0], "")
    assert f"(\n  r=8, lora_alpha=16{options}\n" in repr(METHODS[method](nn.Linear(2, 2)))


@each("targets", ["out", "again", ["out", "again"]])
def test_a_linear_used_at_two_places_is_wrapped_once_and_stays_shared(targets):
    net = disturb(model("sora", targets))
    assert net[1].out is net[1].again and len(adapter_state_dict(net)) == 5
    y = net(X)
    merge_adapters(net)
    assert net[1].out is net[1].again and type(net[1].out) is nn.Linear
    assert torch.allclose(net(X), y, atol=1e-5)


def test_a_second_adapt_freezes_what_it_wraps_and_nothing_else():
    net = model("pre_diag", "q_proj")
    net[1].q_proj.A.requires_grad_(False)
    net[2].requires_grad_()
    net[1].v_proj.requires_grad_()
    adapt(net, "lora", "v_proj")
    own = {"1.q_proj.B", "1.q_proj.diag", "1.v_proj.A", "1.v_proj.B", "2.weight", "2.bias"}
    assert trained(net) == own and set(adapter_state_dict(net)) == own | {"1.q_proj.A"}


@every_method
def test_a_merged_linear_has_W_and_all_else_of_the_base_which_keeps_W0(method):
    """Its bias, hooks, their handles, mode and shape, but no forward that a tool put on base."""
    base, calls = nn.Linear(6, 4), []
    base.weight.data = base.weight.data.T.contiguous().T
    handle = base.register_forward_hook(lambda *args: calls.append("before"))
    base.forward = lambda x: nn.functional.linear(x, base.weight, base.bias)
    tied, W0 = base.weight, base.weight.detach().clone()
    layer = disturb(METHODS[method](base)).eval()
    base.register_forward_pre_hook(lambda *args: calls.append("while"))
    y = layer(X)
    assert calls == ["while", "before"]
    merged = layer.merge()
    merged.register_forward_hook(lambda *args: calls.append("after"))
    assert torch.allclose(merged(X), y, atol=1e-5) and calls[2:] == ["while", "before", "after"]
    assert type(merged) is nn.Linear and repr(merged) == repr(base) and not merged.training
    assert merged.weight.is_contiguous() and merged.weight.is_leaf
    assert merged.bias is base.bias and not trained(merged)
    handle.remove()
    merged(X)
    assert calls[5:] == ["while", "after"]
    assert base.weight is tied and torch.equal(tied, W0) and not torch.equal(merged.weight, W0)
    assert torch.equal(layer(X), y)


@every_method
def test_merging_a_model_leaves_plain_frozen_linears_of_the_same_function(method):
    net = disturb(model(method, ["0", "q_proj", "out"]))
    y = net(X)
    assert all(p.is_contiguous() for p in adapter_state_dict(net).values())
    assert merge_adapters(net) is net and torch.allclose(net(X), y, atol=1e-5)
    assert net.state_dict().keys() == model().state_dict().keys() and not trained(net)
    assert all(type(m) is nn.Linear for m in (net[0], net[1].q_proj, net[1].out))
    twice = disturb(adapt(disturb(model(method, "q_proj")), method, "base"))  # one inside the other
    y = twice(X)
    assert torch.allclose(merge_adapters(twice)(X), y, atol=1e-5)


def test_merging_walks_a_model_once_and_frees_each_base_before_the_next():
    class Model(nn.ModuleList):
        def named_modules(self, *args, **kwargs):
            walks.append(self)
            return super().named_modules(*args, **kwargs)

    class Method(LoRALinear):
        def merge(self, name):
            alive.append(sum(base() is not None for base in bases))
            return super().merge(name)
    walks, alive, net = [], [], Model(nn.Linear(2, 2) for _ in range(200))
    adapt(net, Method, map(str, range(200)))
    bases = [weakref.ref(layer.base) for layer in net]
    walks.clear()
    merge_adapters(net)
    assert alive == [*range(200, 0, -1)] and len(walks) == 1


@every_method
def test_adapter_state_goes_through_a_file_bit_for_bit(method):
    net, twin, file = model(method), model(method), io.BytesIO()
    net[2].requires_grad_(), twin[2].requires_grad_()
    state = adapter_state_dict(disturb(net))
    torch.save(state, file)
    file.seek(0)
    assert load_adapter_state_dict(twin, torch.load(file, weights_only=True)) is twin
    assert torch.equal(twin(X), net(X))
    for _ in range(2):  # back to the snapshot, which stays one
        load_adapter_state_dict(disturb(net), state)
        assert torch.equal(twin(X), net(X)) and not any(t.requires_grad for t in state.values())


class Flips:
    def equation(self, W0x, sBAx):
        return W0x.flip(-1) + self.base_gain * sBAx


class Flipped(Flips, Adapter):
    def __init__(self, base, **options):
        super().__init__(base, **options)
        self.base_gain = nn.Parameter(self.B.new_ones(self.out_features))


@every_dtype
def test_a_method_of_ones_own_is_its_equation_alone(dtype):
    """From a mixin: W' = JW0 + diag(gain) sBA, where J reverses the rows. Without one it raises."""
    net = disturb(adapt(model().to(dtype), Flipped, "q_proj", r=2))
    layer, t = net[1].q_proj, arrays(net[1].q_proj)
    W = t["W0"][::-1] + t["base_gain"][:, None] * (t["sB"] @ t["A"])
    close(layer(X.to(dtype)), array(X.to(dtype)) @ W.T + t["b"], 9, dtype, 4)
    assert "1.q_proj.base_gain" in adapter_state_dict(net.requires_grad_(False))
    close(layer.merge().weight, W, 9, dtype, 4)
    with pytest.raises(NotImplementedError, match="Adapter has no equation"):
        Adapter(layer.base)(X.to(dtype))


# ---- what is refused


def weighing(weight):
    base = nn.Linear(3, 2)
    base._parameters["weight"] = nn.Parameter(weight, False)
    return base


ODD = {  # what the message says it is: the module
    "ReLU": nn.ReLU(),
    "test_minisora.Linear": type("Linear", (nn.Linear,), {})(3, 2),
    "<class 'torch.Tensor'>": prune.l1_unstructured(nn.Linear(3, 2), "weight", 0.5),
    "Piece": weighing(torch.rand(2, 3).as_subclass(type("Piece", (torch.Tensor,), {}))),
    "float8": weighing(torch.ones(2, 3).to(torch.float8_e4m3fn)),
    "complex": weighing(torch.ones(2, 3) * 1j),
    "on meta": nn.Linear(3, 2, device="meta"),
}


def adapting(method, names=("v_proj", "out"), **options):
    return lambda net: adapt(net, method, names, **options)


def loading(**changes):  # into a state that fits
    more = {f"1.q_proj.{name}": p for name, p in changes.items()}
    return lambda net: load_adapter_state_dict(
        net, {**{name: p + 1 for name, p in adapter_state_dict(net).items()}, **more})


REFUSED = {  # the words in the message: the call
    "method 'vera' is not in ['lora'": adapting("vera"),
    "nor a child of Adapter": adapting(nn.Linear),
    "no module is called ['proj']. There are ['0', '1', ": adapting("lora", ["v_proj", "proj"]),
    "no module is called []": adapting("lora", []),
    "there is no Module in this LayerNorm": lambda net: adapt(net[2], "lora", ""),
    "r must be at least 1, got 0": adapting("lora", r=0),
    "r_p must be at least 1, got 0": adapting("sora", r_p=0),
    "not 0, got 0": adapting("pre_diag", lora_alpha=0),
    "not 0, got nan": adapting("dora", lora_alpha=math.nan),
    "not 0, got -inf": adapting("dora_matrix", lora_alpha=-math.inf),
    "rotation 'Exp' is not in": adapting("sora", rotation="Exp"),
    "unexpected keyword argument 'r_p'": adapting("lora", r_p=2),
    "there is no Adapter in this LayerNorm": lambda net: merge_adapters(net[2]),
    "there is no Adapter in this Sequential": adapter_state_dict,
    "base must be a plain nn.Linear": lambda net: LoRALinear(net[1].odd[0]),
    **{words: adapting("sora", ["v_proj", f"odd.{i}"]) for i, words in enumerate(ODD)},
}
ADAPTED = {  # of a model whose q_proj is adapted
    "1.q_proj must be a plain nn.Linear, but is <class 'minisora.LoRALinear'>":
        adapting("lora", ["v_proj", "q_proj"]),
    "lacks ['1.q_proj.A', '1.q_proj.B', '1.v_proj.bias'] and has [] more":
        lambda net: load_adapter_state_dict(net, {}),
    "lacks [] and has ['1.q_proj.e', '1.q_proj.f'] more": loading(f=0, e=0),
    "B is torch.Size([8, 6]) in the state": loading(B=torch.ones(8, 6)),
    "1.q_proj.B is not finite": loading(B=torch.full((6, 8), math.nan)),
    "1.q_proj.A is not finite": loading(A=torch.full((8, 6), 1e300, dtype=f64)),  # in float32
    "1.q_proj: W' is not finite in torch.float16": merge_adapters,  # but in float32
}


def picture(net):
    """All that a refusal must leave: the modules, and the parameters with their values."""
    return [(name, id(m)) for name, m in net.named_modules(remove_duplicate=False)] + [
        (name, id(p), p.requires_grad, p._version) for name, p in net.named_parameters()]


def refusal(words):
    net = model()
    if words in ADAPTED:
        disturb(adapt(net, "lora", "q_proj"))
    if "float16" in words:
        net[1].q_proj.base.half()
        net[1].q_proj.B.data[0] = 1e6
    net[1].odd = nn.ModuleList(ODD.values()).requires_grad_(False)
    net[1].v_proj.requires_grad_()
    before = picture(net)
    with pytest.raises((ValueError, TypeError), match=re.escape(words)) as info:
        {**REFUSED, **ADAPTED}[words](net)
    assert picture(net) == before and len(str(info.value)) < 300
    return info


@each("words", [*REFUSED, *ADAPTED])
def test_what_is_refused_is_named_and_changes_nothing(words):
    assert refusal(words).type is TypeError or words not in ODD


def test_each_raise_of_the_module_is_among_them():
    source = enumerate(inspect.getsource(minisora).splitlines())
    raised = {refusal(words).traceback[-1].lineno for words in [*REFUSED, *ADAPTED]}
    lines = {number for number, line in source if line.lstrip().startswith("raise ")}
    assert len(lines - raised) == 1  # that of a missing equation


# ---- the README

SOURCE = inspect.getsource(minisora)
README = pathlib.Path(__file__).with_name("README.md").read_text(encoding="utf-8")


def test_the_readme_names_tests_and_lines_that_exist():
    for name in re.findall(r"`(test_\w+)`", README):
        assert callable(globals()[name]), name
    links = re.findall(r"\[`([\w.]+)`\]\(minisora\.py#L(\d+)\)", README)
    assert {cls.__name__ for cls in METHODS.values()} <= {name for name, _ in links}
    for name, line in links:
        assert inspect.getsourcelines(getattr(minisora, name))[1] == int(line), name


def test_the_readmes_blocks_run_and_leave_no_file_behind(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for block in re.findall(r"```python\n(.*?)```", README, re.S):
        exec(compile(block, "README.md", "exec", optimize=0), {})  # its asserts hold under -O too
        assert not list(tmp_path.iterdir()), block


def copied(names, layer):
    """What a twin gives whose class stands beside no more of the module than names."""
    space = dict(math=math, nn=nn, torch=torch, F=nn.functional)
    for name in names:
        found = rf"^((?:class|def) {name}\b.*?|{name} = .*?)(?=\n\n\n)"
        exec(re.search(found, SOURCE, re.M | re.S)[1], space)
    twin = space[type(layer).__name__](copy.deepcopy(layer.base))
    twin.load_state_dict(layer.state_dict())
    return twin(torch.eye(7)), twin.merge().weight


@every_method
def test_a_class_copies_out_with_the_names_in_the_readme_and_no_fewer(method):
    layer = disturb(METHODS[method](nn.Linear(7, 5)))
    row = re.search(rf"^\| `{type(layer).__name__}` \| (.*) \|$", README, re.M)[1]
    names = re.findall(r"`(\w+)`", row)
    assert all(map(torch.equal, copied(names, layer), (layer(torch.eye(7)), layer.weight)))
    for spare in names:
        with pytest.raises((NameError, KeyError)):
            copied([name for name in names if name != spare], layer)
