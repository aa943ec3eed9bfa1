"""What minisora states of its layers, one theorem a test, against float64 NumPy.

HYPOTHESIS_PROFILE=long searches at random, 2,000 examples a theorem. A tolerance is
k · ε · size: k roundings on the longest path to an entry, ε of the dtype of the result (or of a
coarser one that is named), and size the sum of the absolute values of all terms of the entry.
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
from unittest.mock import Mock

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
                      adapter_state_dict, adapters, load_adapter_state_dict, merge_adapters,
                      rotation_factors, singular_value_entropy, stable_rank)

for profile, same, count in ("default", True, 60), ("long", False, 2000):
    settings.register_profile(
        profile, derandomize=same, database=None, deadline=None, max_examples=count)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))
few = settings(max_examples=settings().max_examples // 5)
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
every_kind, every_method = each("kind", KINDS), each("method", METHODS)
every_dtype, every_rotation = each("dtype", DTYPES), each("rotation", ROTATIONS)
seeds = st.integers(0, 2**31)


# ---- the equations, in float64 NumPy

def array(value):
    return np.array(value.detach().double().cpu().numpy() if torch.is_tensor(value) else value)


def skew(C, D):
    return min(1, 1 / (norm(C) + norm(D) + 1e-6)) * (D @ C.T - C @ D.T)


def dense_rotation(P, rotation):
    """R of the (m, m) P: exp by the eigenvalues of the Hermitian iP."""
    I = np.eye(len(P))
    if rotation == "exp":
        angles, Q = np.linalg.eigh(1j * P)
        return ((Q * np.exp(-1j * angles)) @ Q.conj().T).real
    return np.linalg.solve(I - P / 2, I + P / 2) if rotation == "cayley" else I + P


def arrays(layer, given_norms=False):
    """What a layer holds, the diagonal before its update and the matrix after it.

    given_norms: with the c of layer.row_norm(), however rounded. q ≥ ‖L‖‖V‖, so R rounds (1 + q)².
    """
    t = {"q": 0, **{name: array(p) for name, p in layer.named_parameters()}}
    m, sB = layer.out_features, layer.lora_alpha / layer.r * t["B"]
    t.update(W0=t["base.weight"], b=t.get("base.bias", np.zeros(m)), sB=sB,
             before=t.get("diag", np.ones(m)), after=np.eye(m))
    t["norms"] = norm(t["W0"] + sB @ t["A"], axis=1)
    if isinstance(layer, DoRALinear):
        norms = array(layer.row_norm()) if given_norms else t["norms"]
        t["after"] = np.diag(t["magnitude"] / np.where(norms == 0, np.inf, norms))
    elif isinstance(layer, SORALinear):
        t["after"] = dense_rotation(skew(t["C"], t["D"]), layer.rotation)
        both = norm(t["C"]) + norm(t["D"])
        t["q"] = min(1, 1 / (both + 1e-6)) * both**2
    return t


def equation(t, W0x, sBAx):
    return (t["before"] * W0x + sBAx) @ t["after"].T


def terms(t, W0x, sBAx):
    """Bounds the sum of the absolute values of all terms of equation(…)."""
    sums = abs(t["before"]) * abs(W0x) + abs(sBAx)
    if t["q"]:
        return norm(sums, axis=-1, keepdims=True) * norm(t["after"], 2) * np.ones_like(sums)
    return sums @ abs(t["after"])


def weight(t):
    """W' and its terms, for DoRA those of ‖W‖² too, from which c has its error."""
    W0, sBA = t["W0"].T, (t["sB"] @ t["A"]).T
    both = abs(W0), (abs(t["sB"]) @ abs(t["A"])).T
    bound = terms(t, *both)
    if "magnitude" in t:
        bound = bound * (1 + (norm(sum(both), axis=0) / np.maximum(t["norms"], 1e-300)) ** 2)
    return equation(t, W0, sBA).T, bound.T


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


def inputs(layer, *shape):
    return draw(1, *shape, layer.in_features).to(layer.base.weight)


def close(actual, exact, size, dtype, k, eps_of=None):
    """actual has this dtype, and |actual − exact| ≤ k · ε · size, with the ε of dtype or eps_of."""
    assert actual.dtype == dtype
    actual, exact, eps = array(actual), array(exact), torch.finfo(eps_of or dtype).eps
    error, tiny = abs(actual - exact), torch.finfo(dtype).tiny * torch.finfo(dtype).eps
    bound = k * (eps * array(size) + tiny)
    assert actual.shape == exact.shape and (error <= bound).all(), (error / bound).max()


# ---- all methods

@every_kind
@every_dtype
@few
@given(case=cases(), shape=st.sampled_from([(3,), (), (2, 1)]))
@example(case={"m": 200_000, "n": 1}, shape=(1,))  # √(x²) ≠ x for 25 of 1.5 million float32
def test_at_step_0_the_weight_is_W0_and_the_output_that_of_the_base(kind, dtype, case, shape):
    """Bit for bit, but b, taken off and put back, may cost y an ulp unless in half."""
    layer = make(kind, dtype, trained=False, **case)
    x, W0 = inputs(layer, *shape), layer.base.weight
    close(layer.adapted_weight(), W0, 0, WIDE[dtype], 0)
    close(layer.weight, W0, 0, dtype, 0)
    assert all(p.dtype == WIDE[dtype] for p in layer.parameters() if p.requires_grad)
    y0, b = array(layer.base(x)), 0 if layer.bias is None else abs(array(layer.bias))
    close(layer(x), y0, abs(y0) + b, dtype, layer.bias is not None and dtype not in HALF)


@every_kind
@each("made, dtype", [*zip(DTYPES, DTYPES), (f32, bf16), (f32, f16)])
@few
@given(case=cases(), shape=st.sampled_from([(3,), (), (0,), (2, 3), (2, 1, 3)]))
def test_the_layer_is_its_equation_merged_or_not(kind, made, dtype, case, shape):
    """In half precision to k = 3, since A, Ax, W0x + b, y, and in the matrix form W0Aᵀ, are rounded
    by ε/2 each. A model that was cast after adapt rounds each step.
    """
    cast, half = made is not dtype, dtype in HALF
    layer = make(kind, made, **case).to(dtype if cast else None)
    t, x = arrays(layer), inputs(layer, *shape)
    (W, sizes), wide = weight(t), K * (1 + t["q"]) ** 2
    k = 8 * (1 + t["q"]) if cast else 3 if half else wide
    W_k = (k, dtype) if cast or half and "dora_matrix" in kind else (wide,)
    close(layer.adapted_weight(), W, sizes, dtype if cast else WIDE[dtype], *W_k)
    merged = layer.merge()
    close(merged.weight, W, sizes, dtype, k)
    for same in layer(x), merged(x):
        bound = abs(array(x)) @ sizes.T + 2 * abs(t["b"])
        close(same, array(x) @ W.T + t["b"], bound, dtype, k)


@every_kind
@each("dtype, x_dtype, autocast", [
    (bf16, bf16, False), (f16, f16, False), (f32, f32, True), (f32, bf16, True)])
@few
@given(case=cases(), cancels=st.sampled_from(["nothing", "sBA", "b"]))
def test_half_precision_rounds_the_base_A_Ax_and_y_and_nothing_else(
        kind, dtype, x_dtype, autocast, case, cancels):
    """So if b or sBA cancels W0x, y is exact to ε/2 of itself and of base(x), but not of W0x.

    Autocast changes neither W' nor what is merged nor the row norm.
    """
    layer = make(kind, dtype, **{**case, "r": case["n"]})
    W0, x = layer.base.weight, inputs(layer, 3).to(x_dtype)
    if cancels != "nothing":
        x = torch.eye(case["n"]).to(x)
    if cancels == "sBA":
        layer.A.data = x.to(layer.A)
        layer.B.data = -1.01 * W0.to(layer.B) / layer.scaling
    elif layer.bias is not None and cancels == "b":
        layer.bias.data = -W0[:, 0] * 1.01

    def others():
        return layer.adapted_weight(), layer.merge().weight, "dora" in kind and layer.row_norm()
    with torch.autocast(DEVICE, dtype=bf16, enabled=autocast):
        y, y0, within = layer(x), layer.base(x), others()
    assert all(np.array_equal(array(a), array(b)) for a, b in zip(within, others()))
    t = arrays(layer, given_norms=True)
    W0x, Ax = array(y0) - t["b"], array(nn.functional.linear(x, layer.A.to(x_dtype)))
    exact = equation(t, W0x, Ax @ t["sB"].T) + t["b"]
    wide = terms(t, abs(W0x) + abs(t["b"]), abs(Ax) @ abs(t["sB"]).T) + abs(t["b"])
    eps = 2.0**-23 / torch.finfo(y0.dtype).eps  # of float32, in those of y
    close(y, exact, abs(exact) / 2 + K * (1 + t["q"]) ** 2 * eps * wide, y0.dtype, 1)


@every_kind
def test_float16_need_not_hold_W0x_without_b_nor_the_squares_of_a_row(kind):
    base = nn.Linear(64, 4, device=DEVICE, dtype=f16)
    base.weight.data.fill_(40), base.bias.data.fill_(-6e4)
    layer, x = KINDS[kind][0](base, 1, 1), torch.full((1, 64), 40.0).to(base.bias)
    assert torch.equal(layer(x), base(x)) and (layer(x) == 42400).all()
    layer.A.data.fill_(1), layer.B.data.fill_(40)
    W = np.full((4, 64), 40 if "dora" in kind else 80)
    close(layer.half().adapted_weight(), W, W, f16, 4)


@every_kind
@every_dtype
@few
@given(case=cases(), rows=st.integers(1, 3))
def test_the_equation_is_linear_in_W0x_and_sBAx_together_row_by_row(kind, dtype, case, rows):
    """So what takes W0x and sBAx to W'x takes W0 and sBA to W': forward and merge may share it."""
    layer = make(kind, dtype, **case)
    u, v = draw(case["seed"] + 9, 2, rows, case["m"]).to(layer.A)
    known = arrays(layer, given_norms=True), array(u), array(v)
    k = K * (1 + known[0]["q"]) ** 2
    close(layer.equation(u, v), equation(*known), terms(*known), WIDE[dtype], k)
    if "sora" in kind:
        close(layer.rotation_matrix(), known[0]["after"], 1, WIDE[dtype], k)


@every_kind
@few
@given(case=cases(trained=st.booleans()))
def test_the_gradient_is_that_of_the_equation(kind, case):
    """Of y and W', the second one too. Under detach_norm the row norm is a constant."""
    layer = make(kind, **case)
    x, norms = inputs(layer, 3).requires_grad_(), arrays(layer)["norms"]
    assume("dora" not in kind or (norms > 0.1).all())  # else 1 / norm is too steep
    layer.base.requires_grad_()
    named, forward = dict(layer.named_parameters()), layer.forward
    layer.forward, point = lambda x: (forward(x), layer.weight), (x, *named.values())

    def y(x, *values):
        return torch.func.functional_call(layer, dict(zip(named, values)), (x,))
    if getattr(layer, "detach_norm", False):
        z = layer.equation(*torch.ones(2, case["m"]).to(x))
        assert torch.autograd.grad(z.sum(), layer.B, allow_unused=True)[0] is None
        layer.row_norm = lambda: torch.from_numpy(norms).to(x)
    assert torch.autograd.gradcheck(y, point, fast_mode=True)
    assert torch.autograd.gradgradcheck(y, point, fast_mode=True) and layer.weight.requires_grad


@every_kind
@few
@given(case=cases())
def test_a_method_commutes_with_turned_inputs_and_permuted_outputs(kind, case):
    """(W0Q, AQ) gives W'Q. (BQ, QᵀA), (CQ, DQ), and for DoRA (cW0, cB) with c = 2⁻³⁰, give W'."""
    layer, seed = make(kind, **case), case["seed"] + 99
    bound = norm(weight(arrays(layer))[1], axis=1, keepdims=True)
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
def test_SORA_at_D_equal_C_is_Pre_Diag_which_at_d_equal_1_is_LoRA_of_rank_r(rotation, case):
    sora, pre_diag, lora = (make(kind, **case) for kind in (f"sora {rotation}", "pre_diag", "lora"))
    sora.D.data = sora.C.data.clone()
    for layer in pre_diag, lora:
        layer.load_state_dict(sora.state_dict(), strict=False)
    assert torch.equal(sora.adapted_weight(), pre_diag.adapted_weight())
    pre_diag.diag.data.fill_(1)
    assert torch.equal(pre_diag.adapted_weight(), lora.adapted_weight())
    delta, rank = lora.adapted_weight() - lora.base.weight, min(case["r"], case["m"], case["n"])
    assert stable_rank(delta) <= rank + 1e-9
    assert singular_value_entropy(delta) <= math.log(rank) + 1e-9


# ---- DoRA

@each("full", ["", " full"])
def test_the_two_DoRAs_agree_in_values_gradients_and_training(full):
    one, two = (make(f"{kind}{full}", m=8, rows=[3]) for kind in ("dora", "dora_matrix"))
    for layer in one, two:
        optimizer = torch.optim.SGD(layer.parameters(), 0.05)
        for _ in range(20):
            optimizer.zero_grad()
            (layer(inputs(layer, 4)) - 1).square().mean().backward()
            optimizer.step()
    for p, q in zip(one.parameters(), two.parameters()):
        close(q, p, 1, f64, 2.0**16)
        assert p.grad is None or torch.allclose(q.grad, p.grad, atol=1e-9)


@every_dtype
@each("delta", [0.5, 0.2, 0.1, 1e-2, 1e-4, 0])
def test_where_a_row_shrinks_the_matrix_form_errs_by_eps_over_delta_squared(dtype, delta):
    """‖w + u‖² by up to ε ‖w‖², 6 ε ‖w‖² if wide; it is ε ‖w‖² at least, and flat there.

    So c is off by up to ε/2δ² or 3ε/δ², and by ε/10δ² in some row.
    """
    layer, eps = make("dora_matrix full", dtype, m=500, n=24, r=1, alpha=1), torch.finfo(dtype).eps
    length, row = draw(5, 500, 1).abs() + 0.5, draw(6, 1, 24)
    layer.base.weight.data = (length * row).to(dtype)
    layer.A.data, layer.B.data = row.to(layer.A), ((delta - 1) * length).to(layer.B)
    t, norm2 = arrays(layer), array(layer.row_norm()) ** 2
    floor = eps * (t["W0"] ** 2).sum(axis=1)
    off = abs(norm2 - np.maximum(t["norms"] ** 2, floor)) / floor
    assert off.max() <= (1 if dtype in HALF else 6) and (delta < 0.1 or off.max() >= 0.2)
    assert layer.row_norm().dtype == WIDE[dtype] and (norm2 >= floor * (1 - 1e-6)).all()
    layer.equation(*torch.ones(2, 500).to(layer.A)).sum().backward()
    slope, flat = array(layer.B.grad), norm2 <= floor * (1 + 1e-6)
    assert not slope[flat].any() and (delta < 0.1 or slope[~flat].all())


@each("kind", [kind for kind in KINDS if "dora" in kind])
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
    near, swapped, parallel = C + 1e-3 * D, C[:, ::-1].copy(), C * uniform(seed + 2, r_p)
    D = choose(st.sampled_from([D, D, D, near, swapped, parallel, -C, 0 * D]))
    return C, D, 64 * 2.0**-52 * (1 + norm(C) + norm(D)) ** 2


@every_rotation
@given(factors())
def test_R_is_that_of_the_dense_P(rotation, CDe):
    """e^P, (I + P/2)(I − P/2)⁻¹ or I + P."""
    C, D, eps = CDe
    assert norm(R_of(C, D, rotation) - dense_rotation(skew(C, D), rotation), 2) <= eps


@every_rotation
@given(factors())
def test_R_is_orthogonal_of_determinant_1_but_for_first_order_RtR_is_I_plus_PtP(rotation, CDe):
    """To 1e-12 for entries of C and D up to 1."""
    C, D, eps = CDe
    R, first = R_of(C, D, rotation), rotation == "first_order"
    P, small = first * skew(C, D), max(abs(C).max(), abs(D).max()) <= 1
    bound = 1e-12 if small else 2 * eps * (1 + norm(P))
    assert norm(R.T @ R - np.eye(len(R)) - P.T @ P, 2) <= bound
    assert first or abs(np.linalg.det(R) - 1) <= len(R) * bound


@every_rotation
@given(factors())
def test_R_turns_only_the_span_of_C_and_D_commutes_with_P_and_of_D_C_is_transposed(rotation, CDe):
    C, D, eps = CDe
    R, P, both = R_of(C, D, rotation), skew(C, D), np.hstack([C, D])
    fixed = np.linalg.svd(both)[0][:, np.linalg.matrix_rank(both):]
    assert norm(R @ fixed - fixed) <= 2 * eps
    assert norm(R @ P - P @ R, 2) <= 2 * eps * (1 + norm(P, 2))
    assert norm(R_of(D, C, rotation) - R.T, 2) <= 2 * eps


@each("theta", [0.1, 1.0, 3.0, 30.0])
def test_R_turns_a_known_plane_by_a_known_angle(theta):
    """C = a e1, D = a e2 with a² s_P = θ turn e1 to e2 by θ, for Cayley by 2 atan(θ/2)."""
    a = max(theta**0.5, theta + math.sqrt(theta**2 + 1e-6 * theta))
    C, D = a * np.eye(5)[:, :1], a * np.eye(5)[:, 1:2]
    for rotation, angle in ("exp", theta), ("cayley", 2 * math.atan(theta / 2)):
        R = R_of(C, D, rotation)
        error = R[0, 0] + 1j * R[1, 0] - np.exp(1j * angle)
        assert abs(error) <= 64 * 2.0**-52 * (1 + 2 * a) ** 2


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
    """−Σ p log p with p = σ/Σσ, and ‖·‖²F/‖·‖₂²."""
    delta = uniform(seed, 2, m, n).astype(np.float32).astype(float)
    S, d = np.linalg.svd(delta, compute_uv=False), torch.from_numpy(c * delta).to(DEVICE, dtype)
    p, entropy, rank = S / S.sum(axis=1, keepdims=True), singular_value_entropy(d), stable_rank(d)
    close(minisora.relative_singular_values(d), S / S[:, :1], 1, dtype, 64)
    close(entropy, -(p * np.log(p)).sum(axis=1), 4, dtype, 64)
    close(rank, (delta**2).sum(axis=(1, 2)) / S[:, 0] ** 2, 6, dtype, 64)


@each("sigma", [[0.0, 0.0], [2.0, 2.0, 0.0]])
def test_deficient_updates_have_exact_diagnostics_and_finite_gradients(sigma):
    delta, rank = torch.diag(torch.tensor(sigma)).requires_grad_(), sum(sigma) / 2
    for diagnostic, exact in (singular_value_entropy, math.log(rank or 1)), (stable_rank, rank):
        close(diagnostic(delta.bfloat16()), exact, 1, f32, 4)
        assert torch.autograd.grad(diagnostic(delta), delta)[0].isfinite().all()


# ---- in torch's world, and at what cost

@every_kind
def test_vmap_compile_pickle_and_checkpoint_give_the_same_output(kind):
    torch._dynamo.reset()
    layer = make(kind)
    x, both = inputs(layer, 2, 3), {n: torch.stack([p, -p]) for n, p in layer.named_parameters()}
    y, _ = torch.vmap(lambda p: torch.func.functional_call(layer, p, (x,)))(both)
    for same in (y, torch.vmap(layer)(x), pickle.loads(pickle.dumps(copy.deepcopy(layer)))(x),
                 torch.compile(layer, fullgraph=True, backend="eager")(x),
                 torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False)):
        assert torch.allclose(same, layer(x), rtol=0, atol=1e-13)
    if "sora" in kind:
        assert copy.deepcopy(layer).to("meta").rotation_matrix().is_meta


@every_method
def test_a_transformer_encoder_in_eval_mode_runs_the_adapted_weight(method, monkeypatch):
    block = nn.TransformerEncoderLayer(6, 2, 16, batch_first=True, dropout=0, device=DEVICE)
    net = disturb(adapt(block, method, ["linear1", "linear2"])).eval()
    monkeypatch.setattr(METHODS[method], "forward", None)
    with torch.no_grad():
        fast = net(X[None])
    assert torch.allclose(fast, merge_adapters(net).train()(X[None]), atol=1e-5)


class Seen(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.names.add(func.overloadpacket.__name__)
        self.sizes.add(torch.is_tensor(out) and not func.is_view and out.numel())
        return out


@each("kind", [kind for kind in KINDS if "full" not in kind])
@each("dtype", [f32, bf16])
def test_a_step_costs_the_operations_and_bytes_of_the_thin_form(kind, dtype):
    """kept: the bytes that autograd keeps for the backward, besides x and parameters.

    Only DoRA as first written forms an (m, n), none an (m, m), and only e^P makes a GPU wait.
    """
    T, m, n, r, q, found = 512, 96, 128, 16, 8, weakref.WeakSet()  # q = 2 r_p
    layer = KINDS[kind][0](nn.Linear(n, m, device=DEVICE, dtype=dtype), r, **KINDS[kind][1])
    x, seen = inputs(layer, T).requires_grad_(), Seen()
    seen.names, seen.sizes = set(), set()

    def pack(tensor):
        found.add(alias := tensor.detach())
        return alias
    with seen, FlopCounterMode(display=False) as flops:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda alias: alias):
            y = layer(x).sum()  # holds the graph; what the forward freed is gone
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in found}
        y.backward()
    own = {t.data_ptr() for t in (x, *layer.parameters())}
    kept = sum(storages[at] for at in storages.keys() - own)
    lora = 4 * T * m * n + 6 * T * r * (m + n)
    thin = 4 * (T * r + m * r) + 2 * r * n * (dtype is bf16)  # Ax, sB, and A in bfloat16
    exact = {
        "lora": (lora, thin), "pre_diag": (lora, thin + 4 * T * m),
        "dora": (lora + 2 * m * n * r, thin + 4 * (T * m + 2 * m)),
        "dora_matrix": (lora + 2 * (m * n + r * n + m * r) * r, thin + 4 * (T * m + 2 * m)),
        "sora": (lora + 12 * T * m * q, thin + 4 * T * (2 * m + q)),
    }[kind.split()[0]]
    more_flops, more_bytes = flops.get_total_flops() - exact[0], kept - exact[1]
    assert 0 <= more_flops <= 13 * m * q * q * ("sora" in kind)
    assert 0 <= more_bytes <= 46 * m * q * ("sora" in kind)
    assert (m * n in seen.sizes) == (kind == "dora") and m * m not in seen.sizes
    waits = {"_local_scalar_dense", "nonzero", "equal", "_linalg_check_errors",
             "linalg_matrix_exp"}
    assert bool(seen.names & waits) == ("exp" in kind)


# ---- models

X = draw(0, 5, 6).float()


def model(method=None, targets=("q_proj", "v_proj")):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 6), nn.Sequential(), nn.LayerNorm(6))
    for name in "q_proj", "v_proj", "xq_proj", "out":
        net[1].add_module(name, nn.Linear(6, 6, bias=name != "out"))
    net[1].add_module("again", net[1].out)
    return adapt(net.to(DEVICE), method, targets) if method else net.to(DEVICE)


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
    assert wrapped == ["0", "1.q_proj", "1.v_proj"] == [name for name, _ in adapters(net)]
    more = {"p": ["diag"], "d": ["magnitude"], "s": ["diag", "C", "D"]}.get(method[0], [])
    own = {f"{name}.{p}" for name in wrapped for p in ["A", "B", *more]}
    assert own == trained(net) == set(adapter_state_dict(net)) and len(net[0].A) == 3
    assert not net[0].training and not net[0].base.training and net[1].q_proj.training
    options = {"d": ", detach_norm=True", "s": ", r_p=4, rotation=exp"}.get(method[0], "")
    assert f"(\n  r=8, lora_alpha=16{options}\n" in repr(METHODS[method](nn.Linear(2, 2)))


@every_method
def test_shared_and_nested_adapters_merge_to_linears_of_the_same_function(method):
    net = disturb(adapt(disturb(model(method, ["0", "again", "q_proj"])), method, "0.base"))
    assert ("1.out", net[1].again) in adapters(net) and type(net[0].base) is METHODS[method]
    y = net(X)
    assert merge_adapters(net) is net and torch.allclose(net(X), y, atol=1e-5)
    assert net[1].out is net[1].again and type(net[0]) is type(net[1].out) is nn.Linear
    assert net.state_dict().keys() == model().state_dict().keys()
    assert not trained(net) and net[0].training


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
    """Its bias, hooks, handles, mode and shape, but no forward that a tool put on base."""
    base, calls = nn.Linear(6, 4, device=DEVICE), []
    base.weight.data = base.weight.data.T.contiguous().T
    base.forward = lambda x: nn.functional.linear(x, base.weight, base.bias)
    before = base.register_forward_hook(lambda *args: calls.append("before"))
    tied, W0 = base.weight, base.weight.detach().clone()
    layer = disturb(METHODS[method](base)).eval()
    base.register_forward_pre_hook(lambda *args: calls.append("while"))
    y, merged = layer(X), layer.merge()
    merged.register_forward_hook(lambda *args: calls.append("after"))
    assert torch.allclose(merged(X), y, atol=1e-5) and type(merged) is nn.Linear
    assert calls == 2 * ["while", "before"] + ["after"]
    before.remove()
    assert before.id not in merged._forward_hooks
    assert repr(merged) == repr(base) and not merged.training and not trained(merged)
    assert merged.weight.is_contiguous() and merged.bias is base.bias
    assert base.weight is tied and torch.equal(tied, W0) and not torch.equal(merged.weight, W0)


def test_merging_walks_once_frees_each_base_and_keeps_the_function_if_a_layer_raises():
    class Method(LoRALinear):
        def merge(self, name):
            alive.append(sum(base() is not None for base in bases))
            return super().merge(name)
    alive, net = [], nn.ModuleList(nn.Linear(6, 6, device=DEVICE, dtype=f16) for _ in range(100))
    disturb(adapt(net, Method, map(str, range(100))))
    net[20].B.data[0] = 1e6
    bases, y = [weakref.ref(layer.base) for layer in net], net[21](X.half())
    net.named_modules = Mock(wraps=net.named_modules)
    with pytest.raises(ValueError, match="20: W' is not finite in torch.float16"):
        merge_adapters(net)
    assert alive == [*range(100, 20, -1)] and net.named_modules.call_count == 1
    assert {type(layer) for layer in net[:21]} == {Method} and type(net[21]) is nn.Linear
    assert torch.allclose(net[21](X.half()), y, atol=0.02)


@every_method
def test_adapter_state_goes_through_a_file_bit_for_bit(method):
    net, twin, file = model(method), model(method), io.BytesIO()
    net[2].requires_grad_(), twin[2].requires_grad_()
    state = adapter_state_dict(disturb(net))
    torch.save(state, file)
    file.seek(0)
    assert load_adapter_state_dict(twin, torch.load(file, weights_only=True)) is twin
    assert torch.equal(twin(X), net(X))
    for _ in range(2):
        load_adapter_state_dict(disturb(net), state)
        assert torch.equal(twin(X), net(X)) and not any(t.requires_grad for t in state.values())


class Negates:
    def equation(self, W0x, sBAx):
        return W0x.neg_() + self.base_gain * sBAx


class Negated(Negates, Adapter):
    def __init__(self, base, **options):
        super().__init__(base, **options)
        self.base_gain = nn.Parameter(self.B.new_ones(self.out_features))


@every_dtype
def test_a_method_of_ones_own_is_its_equation_alone(dtype):
    """From a mixin, even if it writes into W0x: W' = diag(gain) sBA − W0. Without one it raises."""
    net = disturb(adapt(model().to(dtype), Negated, "q_proj", r=2))
    layer, t = net[1].q_proj, arrays(net[1].q_proj)
    W = t["base_gain"][:, None] * (t["sB"] @ t["A"]) - t["W0"]
    close(layer(X.to(dtype)), array(X.to(dtype)) @ W.T + t["b"], 9, dtype, 4)
    assert "1.q_proj.base_gain" in adapter_state_dict(net.requires_grad_(False))
    close(layer.merge().weight, W, 9, dtype, 4)
    close(layer.base.weight, t["W0"], 0, dtype, 0)
    with pytest.raises(NotImplementedError, match="Adapter has no equation"):
        Adapter(layer.base)(X.to(dtype))


# ---- what is refused

ODD = {  # what the message says it is: the module
    "ReLU": nn.ReLU(),
    "test_minisora.Linear": type("Linear", (nn.Linear,), {})(3, 2),
    "<class 'torch.Tensor'>": prune.l1_unstructured(nn.Linear(3, 2), "weight", 0.5),
    "float8": nn.Linear(3, 2).to(torch.float8_e4m3fn),
    "complex": nn.Linear(3, 2, dtype=torch.complex64),
    "on meta": nn.Linear(3, 2, device="meta"),
}


def adapting(method, names=("v_proj", "out"), **options):
    return lambda net: adapt(net, method, names, **options)


def loading(**changes):
    more = {f"1.q_proj.{name}": p for name, p in changes.items()}
    return lambda net: load_adapter_state_dict(
        net, {**{name: p + 1 for name, p in adapter_state_dict(net).items()}, **more})


REFUSED = {  # words of the message: call
    "method 'vera' is not in ['lora'": adapting("vera"),
    "nor a child of Adapter": adapting(nn.Linear),
    "called ['proj']. There are ['0', '1', '2', '3', '4', '5', 'out', 'q_proj']":
        adapting("lora", ["v_proj", "proj"]),
    "no module is called []": adapting("lora", []),
    "there is no Module in this LayerNorm": lambda net: adapt(net[2], "lora", ""),
    "r must be at least 1, got 0": adapting("lora", r=0),
    "r_p must be at least 1, got 0": adapting("sora", r_p=0),
    "not 0, got 0": adapting("pre_diag", lora_alpha=0),
    "not 0, got nan": adapting("dora", lora_alpha=math.nan),
    "not 0, got inf": adapting("dora", lora_alpha=math.inf),
    "rotation 'Exp' is not in": adapting("sora", rotation="Exp"),
    "there is no Adapter in this LayerNorm": lambda net: merge_adapters(net[2]),
    "base must be a plain": lambda net: LoRALinear(net[1].odd[0]),
    **{words: adapting("sora", ["v_proj", f"odd.{i}"]) for i, words in enumerate(ODD)},
}
ADAPTED = {
    "1.q_proj must be a plain nn.Linear": adapting("lora", ["v_proj", "q_proj"]),
    "lacks ['1.q_proj.A', '1.q_proj.B', '1.v_proj.bias'] and has [] more":
        lambda net: load_adapter_state_dict(net, {}),
    "lacks [] and has ['1.q_proj.e', '1.q_proj.f'] more": loading(f=0, e=0),
    "B is torch.Size([8, 6]) in the state": loading(B=torch.ones(8, 6)),
    "1.q_proj.A is not finite": loading(A=torch.full((8, 6), 1e300, dtype=f64)),
}


def picture(net):
    return [(name, id(m)) for name, m in net.named_modules(remove_duplicate=False)] + [
        (name, id(p), str(p)) for name, p in net.named_parameters()]


@each("words", [*REFUSED, *ADAPTED])
def test_what_is_refused_is_named_and_changes_nothing(words):
    net = model()
    if words in ADAPTED:
        disturb(adapt(net, "lora", "q_proj"))
    net[1].odd = nn.ModuleList(ODD.values()).requires_grad_(False)
    net[1].v_proj.requires_grad_()
    before = picture(net)
    with pytest.raises((ValueError, TypeError), match=re.escape(words)) as info:
        {**REFUSED, **ADAPTED}[words](net)
    assert picture(net) == before and (info.type is TypeError or words not in ODD)


# ---- the README

SOURCE = inspect.getsource(minisora)
README = pathlib.Path(__file__).with_name("README.md").read_text(encoding="utf-8")


def test_the_readme_names_tests_and_lines_that_exist():
    for name in re.findall(r"`(test_\w+)`", README):
        assert callable(globals()[name]), name
    for name, line in re.findall(r"\[`([\w.]+)`\]\(minisora\.py#L(\d+)\)", README):
        assert inspect.getsourcelines(getattr(minisora, name))[1] == int(line), name


def test_the_readmes_blocks_run_and_leave_no_file_behind(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert len(blocks := re.findall(r"```python\n(.*?)```", README, re.S)) > 1
    for block in blocks:
        exec(compile(block, "README.md", "exec", optimize=0), {})  # asserts under -O too
        assert not list(tmp_path.iterdir()), block


def copied(names, layer):
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
