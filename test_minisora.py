"""What minisora states about its layers, one theorem a test.

    python -m pytest                            the same examples
    HYPOTHESIS_PROFILE=long python -m pytest    a random search

The oracle is float64 NumPy. A tolerance is k · ε · size: k roundings on the longest path, ε of the
expected dtype, size the sum of the absolute values of all terms.
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
from unittest.mock import patch

import numpy as np
import pytest
import torch
from hypothesis import assume, example, given, settings, strategies as st
from numpy.linalg import norm
from torch import nn
from torch.nn.utils import prune
from torch.utils._python_dispatch import TorchDispatchMode

import minisora
import train_tiny
from minisora import (METHODS, Adapter, LoRALinear, SORALinear, Weight, adapt, adapter_state_dict,
                      load_adapter_state_dict, matrix, merge_adapters, rotate, rotation_factors,
                      row_norm, scale, singular_value_entropy, stable_rank)

for profile, same, count in ("default", True, 60), ("long", False, 2000):
    settings.register_profile(
        profile, derandomize=same, database=None, deadline=None, max_examples=count)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))
few = settings(max_examples=settings().max_examples // 4)  # of a test with many parameters
torch.set_num_threads(1)

f64, f32, bf16, f16 = DTYPES = torch.float64, torch.float32, torch.bfloat16, torch.float16
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
KINDS = {
    **{name: (cls, {}) for name, cls in METHODS.items() if name != "sora"},
    **{f"{name} full": (METHODS[name], {"detach_norm": False}) for name in ("dora", "dora_matrix")},
    **{f"sora {name}": (SORALinear, {"rotation": name}) for name in minisora.ROTATIONS},
}
DORAS, SORAS = ([kind for kind in KINDS if word in kind] for word in ("dora", "sora"))
each = pytest.mark.parametrize
every_kind, every_dtype = each("kind", KINDS), each("dtype", DTYPES)
every_method = each("method", METHODS)
seeds = st.integers(0, 2**31)

# ---- the table: each equation in float64 NumPy

def lora(t):
    return t["W0"] + t["sB"] @ t["A"]

def pre_diag(t):
    return lora({**t, "W0": t["diag"][:, None] * t["W0"]})

def dora(t, norms=None):
    """norms: those of W0 + sBA, if they are constants, as under detach_norm."""
    norms = norm(lora(t), axis=1) if norms is None else norms
    return (t["magnitude"] / np.where(norms == 0, np.inf, norms))[:, None] * lora(t)

def skew(C, D):
    return min(1, 1 / (norm(C) + norm(D) + 1e-6)) * (D @ C.T - C @ D.T)

def rotation(P, kind):
    """R of the (m, m) P: exp by the eigenvalues of the Hermitian iP."""
    I = np.eye(len(P))
    if "exp" in kind:
        angles, Q = np.linalg.eigh(1j * P)
        return ((Q * np.exp(-1j * angles)) @ Q.conj().T).real
    return np.linalg.solve(I - P / 2, I + P / 2) if "cayley" in kind else I + P

EQUATIONS = {"lora": lora, "pre_diag": pre_diag, **dict.fromkeys(DORAS, dora), **{
    kind: lambda t, kind=kind: rotation(skew(t["C"], t["D"]), kind) @ pre_diag(t)
    for kind in SORAS}}

def size(kind, t):
    """The sum of the absolute values of all terms of each entry of W'."""
    a = {name: abs(value) for name, value in t.items()}
    if "dora" in kind:
        norms = norm(lora(t), axis=1)
        norms[norms == 0] = np.inf  # c is 0 there
        # ‖W‖² is a sum of terms that much larger than itself, and c inherits the relative error.
        return dora(a, norms) * (1 + (norm(lora(a), axis=1) / norms) ** 2)[:, None]
    if "sora" in kind:  # with ‖U‖‖V‖ ≤ q each factor of R is ≤ 1 + q, and R mixes the rows
        both = norm(a["C"]) + norm(a["D"])
        q = min(1, 1 / (both + 1e-6)) * both**2
        return (1 + q) ** 2 * norm(pre_diag(a), axis=0) * np.ones_like(a["W0"])
    return EQUATIONS[kind](a)

# ---- layers and tolerances

def uniform(seed, *shape):
    return np.random.default_rng(seed).uniform(-1, 1, shape)

def draw(seed, *shape):
    return torch.from_numpy(uniform(seed, *shape)).to(DEVICE)

def make(kind, dtype=f64, m=5, n=7, r=3, alpha=5, r_p=2, seed=0, rows=[], bias=True, trained=True):
    """A layer drawn from seed. rows: those of W0 and B that are 0."""
    torch.manual_seed(seed)
    (cls, options), base = KINDS[kind], nn.Linear(n, m, bias, DEVICE, dtype)
    base.weight.data = draw(seed, m, n).to(dtype)
    base.weight.data[rows] = 0
    layer = cls(base, r, alpha, **options, **({"r_p": r_p} if cls is SORALinear else {}))
    for i, (name, p) in enumerate(layer.named_parameters()):
        if trained and name != "base.weight":
            p.data = draw(seed + 1 + i, *p.shape).to(p)
    layer.B.data[rows] = 0
    return layer

def cases(**options):
    """Arguments of make(): sizes from 1 up, r above min(m, n) too, α ≠ r."""
    return st.fixed_dictionaries({
        "m": st.integers(1, 7), "n": st.integers(1, 7), "r": st.integers(1, 9), "seed": seeds,
        "r_p": st.integers(1, 4), "alpha": st.sampled_from([0.5, 3, -10, 16]),
        "rows": st.sampled_from([[], [], [0]]), "bias": st.booleans(), **options})

def array(value):
    return value.detach().double().cpu().numpy() if torch.is_tensor(value) else np.asarray(value)

def arrays(layer):
    t = {name: array(p) for name, p in layer.named_parameters()}
    return {**t, "W0": t["base.weight"], "sB": layer.lora_alpha / layer.r * t["B"]}

def inputs(layer, *shape):
    return draw(1, *shape, layer.in_features).to(layer.base.weight)

def wide(dtype):
    return f64 if dtype is f64 else f32

def terms(layer):
    """k: the lengths of all sums on the way to an entry, and some more."""
    return 16 + 4 * (layer.in_features + layer.r + layer.out_features + getattr(layer, "r_p", 0))

def close(actual, exact, size, dtype, k, eps_of=None):
    """actual has this dtype, and |actual − exact| ≤ k · ε · size, with the ε of dtype or eps_of."""
    assert actual.dtype == dtype, actual.dtype
    actual, exact, eps = array(actual), array(exact), torch.finfo(eps_of or dtype).eps
    error, tiny = abs(actual - exact), torch.finfo(wide(dtype)).tiny  # what underflow may lose
    bound = k * (eps * array(size) + tiny)
    assert actual.shape == exact.shape and (error <= bound).all(), (error / bound).max()

# ---- all methods

@every_kind
@every_dtype
@few
@given(case=cases())
@example(case={"m": 200_000, "n": 1})  # √(x²) ≠ x for 25 of 1.5 million float32
@example(case={"m": 64, "n": 4096})
def test_at_step_0_the_layer_is_its_base_bit_for_bit(kind, dtype, case):
    layer = make(kind, dtype, trained=False, **case)
    x = inputs(layer, 3)
    assert torch.equal(layer.weight, layer.base.weight) and torch.equal(layer(x), layer.base(x))

@every_kind
@each("made, dtype", [*zip(DTYPES, DTYPES), (f32, bf16), (f32, f16)])
@few
@given(case=cases(), shape=st.sampled_from([(3,), (), (0,), (2, 3), (2, 1, 3)]))
def test_the_layer_is_its_equation(kind, made, dtype, case, shape):
    """W' and y = x W'ᵀ + b; after a cast, to that precision.

    In half precision y rounds W0's product, down, h, up, the update and the sum, and for SORA
    d ∘ V and VᵀW0, by ε/2 of all terms each.
    """
    layer = make(kind, made, **case).to(dtype if made is not dtype else None)
    t, x, k = arrays(layer), inputs(layer, *shape), terms(layer)
    W, W_size = EQUATIONS[kind](t), size(kind, t)
    close(layer.adapted_weight(), W, W_size, wide(dtype), k, None if made is dtype else dtype)
    close(layer.merge().weight, W, W_size, dtype, k)
    assert repr(layer.merge()) == repr(layer.base)
    if "sora" in kind:
        close(layer.rotation_matrix(), rotation(skew(t["C"], t["D"]), kind), 99, layer.C.dtype, 1)
    b, d = t.get("base.bias", np.zeros(len(W))), layer.equation(layer.base.weight).d
    d = 0 if d is None else abs(array(d))
    bound = abs(array(x)) @ W_size.T + (1 + 2 * d) * abs(b)  # b passes as d b + (1 − d) b
    rounded = {"dora": 2, "sora": 8}.get(kind.split()[0], 6) / 2
    k = rounded if made is dtype in (bf16, f16) else k
    close(layer(x), array(x) @ W.T + b, bound, dtype, k)

@every_kind
@few
@given(case=cases(trained=st.booleans()), seed=seeds)
def test_the_gradient_is_that_of_the_equation(kind, case, seed):
    """⟨gradient, v⟩ = dL/dv in a direction v of x and all parameters, by five-point differences."""
    layer = make(kind, **case)
    t, x, G = arrays(layer), inputs(layer, 3).requires_grad_(), uniform(seed, 3, case["m"])
    moving = {"x": x, **{name: p for name, p in layer.named_parameters() if p.requires_grad}}
    v = {name: uniform(seed + i, *p.shape) for i, (name, p) in enumerate(moving.items())}
    norms = norm(lora(t), axis=1)
    held = {"norms": norms} if getattr(layer, "detach_norm", False) else {}
    assume("dora" not in kind or (norms > 0.1).all())  # else 1 / norm is too steep

    def loss(h):
        moved = {**t, **{name: array(p) + h * v[name] for name, p in moving.items()}}
        moved["sB"] = layer.scaling * moved["B"]
        return (G * (moved["x"] @ EQUATIONS[kind](moved, **held).T)).sum()
    h = 2.0**-11
    slope = (8 * (loss(h) - loss(-h)) - (loss(2 * h) - loss(-2 * h))) / (12 * h)
    (layer(x) * torch.from_numpy(G).to(x)).sum().backward()
    actual = sum((v[name] * array(p.grad)).sum() for name, p in moving.items())
    assert layer.weight.requires_grad
    steep = 1 / norms.min() if "dora" in kind else 1
    assert abs(actual - slope) <= 1e-8 * (1 + layer.scaling**2) * (1 + steep) ** 4

@each("kind", ["lora", "pre_diag", "dora_matrix", *SORAS])
@few
@given(case=cases())
def test_half_precision_rounds_only_what_meets_W0(kind, case):
    """d, up and down are those of a wide W0, but for VᵀW0 in down, and W0Aᵀ in c."""
    layer = make(kind, bf16, **case)
    W0 = layer.base.weight
    W, exact = layer.equation(W0), layer.equation(W0.float())
    if kind == "dora_matrix":  # up is c ∘ sB with the c that d is
        exact = exact._replace(d=W.d, up=W.d[:, None] * (layer.scaling * layer.B))
    assert W.M is W0 and torch.equal(W.down[:layer.r], layer.A) and torch.equal(W.up, exact.up)
    assert W.up.dtype == f32 and (W.d is exact.d or torch.equal(W.d, exact.d))
    close(W.down, exact.down, abs(array(exact.down)).max() + 9, f32, 4, bf16)

def test_a_diagonal_step_and_the_bias_are_not_rounded_away():
    """Where the update or b cancels x W0ᵀ, for a d that rounds to 1."""
    layer = make("pre_diag", bf16, n=5, r=5)
    W0, b, x = layer.base.weight.float(), layer.bias, torch.eye(5).to(layer.bias)
    layer.A.data, layer.B.data, layer.base.bias = torch.eye(5).to(W0), -W0, None
    layer.diag.data.fill_(1.003)
    close(layer(x), 0.003 * W0.T, W0.abs().T * 0.003, bf16, 1)
    layer.B.data, layer.base.weight.data, layer.base.bias = 0 * W0, -b.diag(), b
    close(layer(x).diag(), -0.003 * b.float(), 0.003 * abs(b), bf16, 1)

@every_kind
@each("x_dtype", [f32, bf16])
def test_autocast_rounds_x_and_what_meets_x_and_nothing_else(kind, x_dtype):
    """y has the dtype of base(x); W' is bit for bit the same."""
    layer = make(kind, f32)
    x, W, parts, found = inputs(layer, 3).to(x_dtype), layer.adapted_weight(), [], layer.equation
    layer.equation = lambda W0: parts.append(found(W0)) or parts[-1]
    with torch.autocast(DEVICE, dtype=bf16):
        y = layer(x)
        assert y.dtype == layer.base(x).dtype and torch.equal(layer.adapted_weight(), W)
        assert torch.equal(matrix(parts[0]), W)
    t, x = arrays(layer), array(x)
    close(y, x @ EQUATIONS[kind](t).T + t["base.bias"], abs(x) @ size(kind, t).T + 9, bf16, 2)

# ---- the algebra of a Weight, and symmetries

PARTS = st.tuples(st.booleans(), st.booleans())  # with a diagonal, with an update

def weight(dtype, seed, parts):
    M, *rest = draw(seed, 4, 6), draw(seed + 1, 4), draw(seed + 2, 4, 2), draw(seed + 3, 2, 6)
    rest = [p.to(wide(dtype)) if kept else None for p, kept in zip(rest, [*parts, parts[1]])]
    return Weight(M.to(dtype), *rest)

def dense(W, form=np.asarray):
    """W in float64 NumPy; with form=abs the sum of the absolute values of all terms."""
    M, d, up, down = (part if part is None else form(array(part)) for part in W)
    M = M if d is None else d[:, None] * M
    return M if up is None else M + up @ down

@every_dtype
@given(seed=seeds, parts=PARTS, names=st.lists(st.sampled_from(["scale", "rotate"]), max_size=3))
def test_operations_on_a_weight_are_those_on_its_matrix(dtype, seed, parts, names):
    """matrix(f(g(W))) = f g matrix(W), in float32 or wider, and never M itself."""
    W = weight(dtype, seed, parts)
    exact, bound = dense(W), abs(array(W.M)) + 2
    for i, name in enumerate(names):
        c, (L, V) = draw(seed, 4), draw(seed + i, 2, 4, 3)
        left = np.diag(array(c)) if name == "scale" else np.eye(4) + array(L @ V.T)
        W = scale(c.to(wide(dtype)), W) if name == "scale" else rotate(L, V, W)
        exact, bound = left @ exact, 2 * (abs(left) + 1) @ bound
    close(matrix(W), exact, bound, wide(dtype), 16, dtype if "rotate" in names else None)
    assert matrix(W).data_ptr() != W.M.data_ptr()

@every_dtype
@given(seed=seeds, parts=PARTS, cut=st.sampled_from([None, 0.5, 0.1, 1e-2, 1e-4, 1e-7]))
def test_row_norm_is_that_of_the_matrix_to_what_cancels(dtype, seed, parts, cut):
    """‖·‖² to 8 ε of all terms squared, ε of M's dtype (64 ε if wide), and held at ε ‖w‖².

    Row 0 is about cut times as long as that of diag(d) M.
    """
    W, eps = weight(dtype, seed, parts), torch.finfo(dtype).eps
    if cut and parts[1]:
        W.down[0], W.up[0] = W.M[0], 0
        W.up[0, 0] = (cut - 1) * (W.d[0] if parts[0] else 1)
    w2, exact, size = ((part**2).sum(axis=1) for part in (
        dense(Weight(W.M, W.d)), dense(W), dense(W, abs)))
    norms, floor = row_norm(W), eps * w2 * parts[1]
    assert norms.dtype == wide(dtype) and (array(norms) >= (floor * (1 - 1e-6)) ** 0.5).all()
    error = abs(array(norms) ** 2 - np.maximum(exact, floor))
    assert (error <= (64 if dtype is wide(dtype) else 8) * eps * size).all()

def orthogonal(seed, size):
    return torch.linalg.qr(draw(seed, size, size))[0]

@every_kind
@few
@given(case=cases())
def test_a_method_commutes_with_turned_inputs_and_permuted_outputs(kind, case):
    """(W0Q, AQ) gives W'Q. (BQ, QᵀA), (CQ, DQ), and for DoRA (cW0, cB) with c = 2⁻³⁰, W'."""
    layer, seed = make(kind, **case), case["seed"] + 99
    bound = norm(size(kind, arrays(layer)), axis=1, keepdims=True)
    Q, Qr, Qp = (orthogonal(seed, k) for k in (layer.in_features, layer.r, case["r_p"]))
    order = uniform(seed, layer.out_features).argsort()
    W = (layer.adapted_weight() @ Q)[order]
    turns = {"base.weight": Q, "B": Qr, "C": Qp, "D": Qp}
    for name, p in layer.named_parameters():
        p.data = Qr.T @ p @ Q if name == "A" else (p @ turns[name] if name in turns else p)[order]
        if "dora" in kind and name in ("base.weight", "B"):
            p.data *= 2**-30
    close(layer.adapted_weight(), W, bound[order], f64, terms(layer) ** 2)

# ---- the rotation, and diagnostics

def R_of(C, D, kind):
    C, D = (torch.from_numpy(t).to(DEVICE) for t in (C, D))
    L, V = rotation_factors(C, D, kind.split()[-1])
    return np.eye(len(C)) + array(L @ V.T)

@each("kind", SORAS)
@given(seed=seeds, m=st.integers(1, 12), r_p=st.integers(1, 4),
       sizes=st.tuples(*2 * [st.sampled_from([1e-3, 0.1, 1.0, 30.0])]))
@example(seed=0, m=12, r_p=4, sizes=(99.0, 99.0))
def test_R_is_that_of_the_dense_P_to_theta_to_the_5_over_720_times_2_to_the_48(
        kind, seed, m, r_p, sizes):
    """e^P errs by that, no more and no less, but for rounding; θ = ‖P‖₂. The others do not.

    R(D, C) = Rᵀ, R commutes with P, for e^P R² is that of 2P, and a rotation has ‖R − I‖ ≤ ‖D − C‖.
    """
    C, D = np.array(sizes)[:, None, None] * uniform(seed, 2, m, r_p)
    R, P, both = R_of(C, D, kind), skew(C, D), 1 + norm(C) + norm(D)
    error, rounding = norm(P, 2) ** 5 / 720 / 2**48 * ("exp" in kind), 64 * 2.0**-52 * both**2
    assert abs(norm(R - rotation(P, kind), 2) - error) <= 0.02 * error + rounding
    eps = 2 * error + rounding
    assert norm(R_of(D, C, kind) - R.T, 2) <= eps and norm(R @ P - P @ R, 2) <= eps * both
    assert "first" in kind or norm(R - np.eye(m), 2) <= norm(D - C, 2) + eps
    assert "exp" not in kind or norm(R @ R - rotation(2 * P, kind), 2) <= 4 * eps

@each("kind", SORAS[:2])
@given(seed=seeds, m=st.integers(1, 16), r_p=st.integers(1, 4), a=st.sampled_from([1.0, 100.0]),
       structure=st.sampled_from(["any", "swapped", "close", "opposite", "short"]))
def test_R_is_orthogonal_to_1e_12_for_entries_up_to_1_and_1e_7_up_to_100(
        kind, seed, m, r_p, a, structure):
    """Of these structures, and random ones to 2e-14 and 5e-10."""
    C, D = a * uniform(seed, 2, m, r_p)
    D = {"swapped": C[:, ::-1].copy(), "close": C + 1e-3 * D, "opposite": -C,
         "short": 1e-4 * D}.get(structure, D)
    R, bounds = R_of(C, D, kind), (2e-14, 5e-10) if structure == "any" else (1e-12, 1e-7)
    assert abs(R.T @ R - np.eye(m)).max() <= bounds[a > 1] and np.linalg.det(R) > 0.9

@each("theta", [0.1, 1.0, 3.0, 30.0])
def test_R_turns_a_known_plane_by_a_known_angle(theta):
    """C = a e1, D = a e2 with a² s_P = θ turn e1 to e2 by θ, for Cayley by 2 atan(θ/2)."""
    a = max(theta**0.5, theta + math.sqrt(theta**2 + 1e-6 * theta))
    for kind, angle in ("exp", theta), ("cayley", 2 * math.atan(theta / 2)):
        exact, (e1, e2), c, s = np.eye(5), np.eye(5)[:2, :, None], math.cos(angle), math.sin(angle)
        exact[:2, :2] = [[c, -s], [s, c]]
        error = norm(R_of(a * e1, a * e2, kind) - exact)
        assert error <= theta**5 / 2**57 + 1e-14 * (1 + theta) ** 2

def test_A_and_C_are_drawn_uniformly_B_is_0_and_D_a_copy_of_C():
    layer = SORALinear(nn.Linear(400, 100), r_p=40)
    A, C, D = 20 * layer.A, 10 * layer.C, layer.D
    assert not layer.B.any() and torch.equal(layer.C, D) and layer.C.data_ptr() != D.data_ptr()
    for t in A.flatten(), C.flatten():
        assert (t.sort().values - torch.linspace(-1, 1, len(t))).abs().max() < 0.1

@each("kind", DORAS)
@each("dead", [[1], [0, 3], [*range(5)]])
@each("trained", [False, True])
def test_rows_of_zeros_stay_zero_and_every_gradient_is_finite(kind, dead, trained):
    """0/0 in the equation: a pruned row at step 0, and one with a magnitude but no update."""
    layer = make(kind, rows=dead, trained=trained)
    for _ in range(3):
        assert not layer.adapted_weight()[dead].any()
        layer(inputs(layer, 9)).square().sum().backward()
        for p in [p for p in layer.parameters() if p.requires_grad]:
            assert p.grad.isfinite().all()
            p.data -= 0.01 * p.grad

@each("dtype", [f32, f64])
@given(seeds, st.integers(1, 6), st.integers(1, 6), st.sampled_from([2.0**-100, 1.0, 2.0**124]))
def test_the_diagnostics_are_their_formulas_at_any_scale(dtype, seed, m, n, c):
    """−Σ p log p with p = σ/Σσ, ‖·‖²F/‖·‖₂², and log(stable rank) ≤ entropy ≤ log min(m, n)."""
    delta = uniform(seed, 2, m, n).astype(np.float32).astype(float)
    S = np.linalg.svd(delta, compute_uv=False)
    p, exact = S / S.sum(axis=1, keepdims=True), torch.from_numpy(c * delta)
    for d in exact, (orthogonal(seed, m) @ exact).mT:
        entropy, rank = singular_value_entropy(d.to(dtype)), stable_rank(d.to(dtype))
        close(entropy, -(p * np.log(p)).sum(axis=1), 4, dtype, 64)
        close(rank, (delta**2).sum(axis=(1, 2)) / S[:, 0] ** 2, 6, dtype, 64)
        assert (rank.log() - 1e-5 <= entropy).all() and entropy.max() <= math.log(min(m, n)) + 1e-5

@each("sigma", [[0.0, 0.0], [2.0, 2.0, 0.0]])
def test_deficient_updates_have_exact_diagnostics_and_finite_gradients(sigma):
    delta, rank = torch.diag(torch.tensor(sigma)).requires_grad_(), sum(sigma) / 2
    for diagnostic, exact in (singular_value_entropy, math.log(rank or 1)), (stable_rank, rank):
        close(diagnostic(delta.bfloat16()), exact, 1, f32, 4)
        assert torch.autograd.grad(diagnostic(delta), delta)[0].isfinite().all()

# ---- in torch's world

@every_kind
def test_vmap_compile_pickle_and_checkpoint_give_the_same_output(kind):
    torch._dynamo.reset()
    layer = make(kind)
    x, B = inputs(layer, 2, 3), torch.stack([layer.B, layer.B])
    for same in (torch.vmap(layer)(x), torch.compile(layer, fullgraph=True, backend="eager")(x),
                 pickle.loads(pickle.dumps(copy.deepcopy(layer)))(x),
                 torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False),
                 *torch.vmap(lambda B: torch.func.functional_call(layer, {"B": B}, (x,)))(B)):
        assert torch.allclose(same, layer(x), rtol=0, atol=1e-13)

@every_method
def test_a_transformer_encoder_in_eval_mode_runs_the_adapted_weight(method):
    block = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0, device=DEVICE)
    net, x = disturb(adapt(block, method, ["linear1", "linear2"])).eval(), rand(2, 3, 8)
    with torch.no_grad(), patch.object(Adapter, "forward", None):
        fast = net(x)
    assert torch.allclose(fast, merge_adapters(net).train()(x), atol=1e-5)

class Seen(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.ran.append((str(func), torch.is_tensor(out) and not func.is_view and out.numel()))
        return out

@every_kind
def test_a_step_makes_no_second_weight_and_asks_the_host_for_no_value(kind):
    """But DoRA as first written makes one."""
    layer, Seen.ran = make(kind, bf16, m=48, n=40), []
    with Seen():
        layer(inputs(layer, 2).requires_grad_()).sum().backward()
    names, sizes = zip(*Seen.ran)
    assert (max(sizes) >= 48 * 40) == (type(layer) is METHODS["dora"])
    assert not re.search("local_scalar|item|nonzero|equal|_exp|eig|svd|check|unique", str(names))

# ---- models

class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.q_proj, self.v_proj, self.xq_proj = (nn.Linear(6, 6) for _ in range(3))
        self.out = self.again = nn.Linear(6, 6, bias=False)

    def forward(self, x):
        return self.again(self.out(self.q_proj(x) * self.v_proj(x) + self.xq_proj(x)))

def model(method=None, targets=("q_proj", "v_proj")):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 6), Attention(), nn.LayerNorm(6)).to(DEVICE)
    return adapt(net, method, targets) if method else net

def rand(*shape):
    return torch.randn(*shape, device=DEVICE)

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
    wrapped = {name for name, m in net.named_modules() if type(m) is METHODS[method]}
    assert wrapped == {"0", "1.q_proj", "1.v_proj"}
    more = {"p": ["diag"], "d": ["magnitude"], "s": ["diag", "C", "D"]}.get(method[0], [])
    own = {f"{name}.{p}" for name in wrapped for p in ["A", "B", *more]}
    assert own == trained(net) == set(adapter_state_dict(net)) and not net[0].training
    options = {"d": ", detach_norm=True", "s": ", r_p=4, rotation=exp"}.get(method[0], "")
    layer = METHODS[method](nn.Linear(2, 2))
    layer.old_forward = layer.forward  # by tools
    assert f"(\n  r=8, lora_alpha=16{options}\n" in repr(layer)

@each("targets", ["out", "again", ["out", "again"]])
def test_a_linear_used_at_two_places_is_wrapped_once_and_stays_shared(targets):
    net, x = disturb(model("sora", targets)), rand(3, 6)
    assert net[1].out is net[1].again and len(adapter_state_dict(net)) == 5
    y = net(x)
    merge_adapters(net)
    assert net[1].out is net[1].again
    assert torch.allclose(net(x), y, atol=1e-5)

def test_a_second_adapt_freezes_what_it_wraps_and_nothing_else():
    net = model("lora", "q_proj")
    net[1].q_proj.A.requires_grad_(False)
    net[2].requires_grad_()
    net[1].v_proj.requires_grad_()
    adapt(net, "lora", "v_proj")
    own = {"1.q_proj.B", "1.v_proj.A", "1.v_proj.B", "2.weight", "2.bias"}
    assert trained(net) == own and set(adapter_state_dict(net)) == own | {"1.q_proj.A"}

@every_method
def test_merging_leaves_plain_frozen_linears_of_the_same_function_and_hooks(method):
    """No tensor and no table of hooks is shared with the base."""
    class Counts(list):
        def hook(self, *args):
            self.append(1)

    net, x, counts = model(), rand(5, 6), Counts()
    net[0].weight.data = net[0].weight.data.T.contiguous().T
    net[0].register_forward_hook(counts.hook)
    net[0].graph = net[0].weight.sum()  # a deepcopy would raise
    layer, y = disturb(adapt(net, method, ["0", "q_proj", "out"]))[0].eval(), net(x)
    calls = int(method != "dora")  # dora does not call its base
    assert all(p.is_contiguous() and p.dtype == f32 for p in adapter_state_dict(net).values())
    assert merge_adapters(net) is net and net.state_dict().keys() == model().state_dict().keys()
    assert len(counts) == calls and torch.allclose(net(x), y, atol=1e-5)
    assert len(counts) == 1 + calls and type(net[0]) is nn.Linear and not trained(net)
    assert net[0].weight.is_contiguous() and not net[0].training and net[1].q_proj.training
    net[0].register_forward_hook(print)
    assert len(layer.base._forward_hooks) == 1
    for name, p in net[0].named_parameters():
        p.data.fill_(7)
        assert not (getattr(layer.base, name) == 7).any()

def test_merging_walks_the_model_twice_and_frees_each_base_before_the_next():
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
    assert alive == [*range(200, 0, -1)] and len(walks) == 2

@every_method
def test_adapter_state_goes_through_a_file_bit_for_bit(method):
    net, twin, file, x = model(method), model(method), io.BytesIO(), rand(4, 6)
    net[2].requires_grad_(), twin[2].requires_grad_()
    state = adapter_state_dict(disturb(net))
    torch.save(state, file)
    file.seek(0)
    assert load_adapter_state_dict(twin, torch.load(file, weights_only=True)) is twin
    assert torch.equal(twin(x), net(x))
    load_adapter_state_dict(disturb(net), state)  # back to the snapshot
    assert torch.equal(twin(x), net(x)) and not any(t.requires_grad for t in state.values())

class Own(Adapter):
    def __init__(self, base, **kwargs):
        super().__init__(base)
        self.C = nn.Parameter(self.B.new_ones(len(self.B), 1))

class Equation:
    def equation(self, W0):
        return Weight(matrix(scale(self.C[:, 0], Weight(W0))), None, self.scaling * self.B, self.A)

@every_dtype
@each("cast", [False, True])
def test_a_method_of_ones_own_is_its_equation_alone(dtype, cast):
    """From a mixin, formed, without a cast in it. Without an equation it raises."""
    net = adapt(model().to(dtype), type("Whole", (Own, Equation), {}), "q_proj", extra=1)
    layer = disturb(net).to(bf16 if cast else dtype)[1].q_proj
    x, t = inputs(layer, 3), arrays(layer)
    W = lora({**t, "W0": t["C"] * t["W0"]})
    for actual, exact in (layer(x), array(x) @ W.T + t["base.bias"]), (layer.merge().weight, W):
        close(actual, exact, abs(W).max() + 1, x.dtype, 64)
    assert "1.q_proj.C" in adapter_state_dict(net.requires_grad_(False))
    with pytest.raises(AttributeError, match="'Own' .* 'equation'"):
        Own(layer.base)(x)

# ---- what is refused

class Piece(torch.Tensor):
    pass

class OnlyOnce(LoRALinear):
    def __init__(self, base):
        super().__init__(base)
        assert base.bias is not None, "second layer fails"

def weighing(weight):
    base = nn.Linear(3, 2)
    base._parameters["weight"] = nn.Parameter(weight, False)
    return base

ODD = {  # what the message says it is: the module
    "Conv1d": nn.Conv1d(3, 2, 1),
    "test_minisora.Linear": type("Linear", (nn.Linear,), {})(3, 2),
    "torch.Tensor": prune.l1_unstructured(nn.Linear(3, 2), "weight", 0.5),
    "Piece": weighing(torch.rand(2, 3).as_subclass(Piece)),
    "float8": weighing(torch.ones(2, 3).to(torch.float8_e4m3fn)),
    "complex": weighing(torch.ones(2, 3) * 1j),
    "meta": nn.Linear(3, 2, device="meta"),
    "0]": weighing(torch.ones(2, 0)),
}

def load(net, **changes):  # into a state that fits
    state = {name: p + 1 for name, p in adapter_state_dict(net).items()}
    changes = {f"1.q_proj.{name}": p for name, p in changes.items()}
    load_adapter_state_dict(net, {**state, **changes})

def adapting(method, names=("v_proj", "out"), **options):
    return lambda net: adapt(net, method, names, **options)

REFUSED = {  # the words in the message: the call (and what is done to 1.q_proj before)
    "method 'vera' is not in ['lora'": adapting("vera"),
    "no module for ['proj']: there are ['0'": adapting("lora", ["v_proj", "proj"]),
    "no module for []": adapting("lora", []),
    "r must be at least 1, got 0": adapting("lora", r=0),
    "r_p must be at least 1, got 0": adapting("sora", r_p=0),
    "not 0, got 0": adapting("pre_diag", lora_alpha=0),
    "not 0, got nan": adapting("dora", lora_alpha=math.nan),
    "rotation 'Exp' is not in": adapting("sora", rotation="Exp"),
    "rotation 'Cayley'": lambda net: rotation_factors(rand(2, 1), rand(2, 1), "Cayley"),
    "second layer fails": adapting(OnlyOnce),
    "no adapters of this minisora": lambda net: merge_adapters(net[2]),
    **{words: adapting("sora", ["v_proj", f"odd.{i}"]) for i, words in enumerate(ODD)},
}
ADAPTED = {
    "must be an nn.Linear: it is <class 'minisora.LoRA": adapting("lora", ["v_proj", "q_proj"]),
    "lacks ['1.q_proj.A', '1.q_proj.B', '1.v_proj.bias'] and has [] more":
        lambda net: load_adapter_state_dict(net, {}),
    "lacks [] and has ['1.q_proj.e', '1.q_proj.f'] more": lambda net: load(net, f=0, e=0),
    "B must be torch.Size([6, 8]), got": lambda net: load(net, B=rand(6)),
    "1.q_proj.B is not finite": lambda net: load(net, B=rand(6, 8) * math.nan),
    "A is not finite": lambda net: load(net, A=rand(8, 6).double() * 1e300),
    "base on meta": (lambda net: net[1].q_proj(rand(2, 6)), lambda q: q.base.to("meta")),
    "1.q_proj is not 16 to 64": (merge_adapters, lambda q: q.base.to("meta")),
    "B is a sharded Piece": (
        adapter_state_dict, lambda q: q.register_parameter("B", ODD["Piece"].weight)),
    "1.q_proj: W' is not finite in torch.float16": (  # but in float32
        merge_adapters, lambda q: q.base.half() and q.B.data.fill_(1e6)),
}

def picture(net):  # all that a failure must leave
    modules = [(name, id(m)) for name, m in net.named_modules(remove_duplicate=False)]
    values = [(name, id(p), p.requires_grad, p._version) for name, p in net.named_parameters()]
    return modules, values

@each("adapted", [False, True])
@each("words", [*REFUSED, *ADAPTED])
def test_what_is_refused_is_named_and_changes_nothing(words, adapted):
    call, net = {**REFUSED, **ADAPTED}[words], model()
    if adapted or words in ADAPTED:
        disturb(adapt(net, "lora", "q_proj"))
    net[1].odd = nn.ModuleList(ODD.values()).requires_grad_(False)
    net[1].v_proj.requires_grad_()
    if isinstance(call, tuple):
        call, change = call
        change(net[1].q_proj)
    before = picture(net)
    with pytest.raises((ValueError, TypeError, AssertionError), match=re.escape(words)) as info:
        call(net)
    assert picture(net) == before and len(str(info.value)) < 300
    assert words not in ODD or info.type is TypeError

def test_a_layer_costs_the_operations_and_bytes_of_its_thin_form():
    T, d, r, q = 2048, 1024, 16, 8  # q = 2 r_p
    bench = train_tiny.bench_layers(d, torch.device("cpu"), f32)
    x, linear = torch.randn(T, d, requires_grad=True), 2 * (2 * T * d * d)  # forward, back to x
    lora = linear + 3 * 2 * T * r * (d + d)
    # SORA: rank r + q, and (d ∘ V)ᵀW0 with its gradient; the rest has no T and one d in it.
    exact = {"linear": (linear, 0), "lora": (lora, 0.02), "pre_diag": (lora, 1.02),
             "dora": (1.5 * linear + 3 * 2 * d * d * r, 1.01),  # W' and its (m, n) gradient
             "dora_matrix": (lora + 2 * (d * d * r + 2 * d * r * r), 1.03),
             "sora": (linear + 3 * 2 * T * (r + q) * (d + d) + 2 * 2 * d * d * q, 1.09)}
    for name, (flops, kept) in exact.items():  # kept after the forward, over x
        more = train_tiny.flops(bench[name], x) / flops
        assert 1 < more < 1.001 if name == "sora" else more == 1, name
        assert round(train_tiny.saved_bytes(bench[name], x) / (T * d * 4), 2) == kept, name

@patch.multiple(train_tiny, DIM=32, LAYERS=1, CONTEXT=16, BATCH=4, BASE_STEPS=4, STEPS=4,
                REACH_STEPS=60, BENCH_SIZES=[(32, 16)])
@patch.dict(train_tiny.ROWS, pre_diag=("pre_diag", {}, 1e30))
def test_every_mode_of_the_script_prints_its_rows_on_any_console():
    """Also for one that diverges. Wrong arguments are refused."""
    def script(line):
        with patch("sys.stdout", io.TextIOWrapper(io.BytesIO(), encoding="cp1252")) as out:
            train_tiny.main(line.split())
        out.seek(0)
        return {line.split()[0]: line for line in out if line.strip()}
    rows = script("--seeds 2 --methods " + " ".join(train_tiny.ROWS))
    assert train_tiny.ROWS.keys() <= rows.keys() and "diverged" in rows["pre_diag"]
    for line in "--seeds 0", "--device none", "--methods vera":
        with pytest.raises(SystemExit, match="2"):
            script(line)
    assert float(script("--reach")["rotation"].split()[-2]) < 0.1
    assert METHODS.keys() <= script("--bench --quick").keys()

README = pathlib.Path(__file__).with_name("README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.S)

def test_the_readme_names_tests_and_lines_that_exist():
    for name in re.findall(r"`(test_\w+)`", README):
        assert callable(globals()[name]), name
    links = re.findall(r"\[`([\w.]+)`\]\(minisora\.py#L(\d+)\)", README)
    assert {cls.__name__ for cls in METHODS.values()} <= {name for name, _ in links}
    for name, line in links:
        assert inspect.getsourcelines(getattr(minisora, name))[1] == int(line), name

@each("block", BLOCKS, ids=range(len(BLOCKS)))
def test_the_readmes_blocks_run_and_leave_no_file_behind(block, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(compile(block, "README.md", "exec", optimize=0), {})  # its asserts hold under -O too
    assert not list(tmp_path.iterdir())

@every_method
def test_a_class_copies_out_with_the_names_in_the_readme_and_no_fewer(method):
    layer = disturb(METHODS[method](nn.Linear(7, 5)))
    always = re.search(r"\*\*Whole.\*\* Copy (.*) and beside", README, re.S)[1]
    row = re.search(rf"\| `{type(layer).__name__}` \| (.*) \|\n", README)[1]

    def copied(names):
        space = dict(copy=copy, math=math, nn=nn, torch=torch, NamedTuple=minisora.NamedTuple)
        for name in names:
            value = getattr(minisora, name)
            exec(inspect.getsource(value) if callable(value) else f"{name} = {value}", space)
        twin = space[type(layer).__name__](copy.deepcopy(layer.base))
        twin.load_state_dict(layer.state_dict())
        return twin(torch.eye(7)), twin.merge().weight
    names = re.findall(r"`(\w+)`", always + row)
    assert all(map(torch.equal, copied(names), (layer(torch.eye(7)), layer.weight)))
    for spare in names:
        with pytest.raises((NameError, KeyError)):
            copied([name for name in names if name != spare])
