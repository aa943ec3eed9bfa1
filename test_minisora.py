"""What minisora states about its layers, one theorem a test. Each can fail.

    python -m pytest                                      the same examples each time
    HYPOTHESIS_PROFILE=long python -m pytest              a random search, much longer

The oracle is float64 NumPy, written from the equations. A tolerance is k · ε · size, where k counts
the roundings on the longest path, and size is the formula with absolute values for its terms.
"""
import copy
import inspect
import io
import math
import os
import pathlib
import random
import re
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, note, settings, strategies as st
from numpy.linalg import norm
from torch import nn
from torch.nn.utils import prune
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import minisora
import train_tiny
from minisora import (METHODS, Adapter, DoRALinear, DoRAMatrixLinear, LoRALinear, PreDiagLinear,
                      SORALinear, adapt, adapter_state_dict, load_adapter_state_dict,
                      merge_adapters, rotation_factors, singular_value_entropy, stable_rank)

settings.register_profile(
    "default", derandomize=True, database=None, deadline=None, max_examples=100)
settings.register_profile("long", deadline=None, max_examples=3000)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))
few = settings(max_examples=settings().max_examples // 5)
torch.set_num_threads(1)  # tensors are small

KINDS = {
    "lora": (LoRALinear, {}),
    "pre_diag": (PreDiagLinear, {}),
    "dora": (DoRALinear, {}),
    "dora, full": (DoRALinear, {"detach_norm": False}),
    "dora_matrix": (DoRAMatrixLinear, {}),
    "dora_matrix, full": (DoRAMatrixLinear, {"detach_norm": False}),
    "sora, exp": (SORALinear, {"rotation": "exp"}),
    "sora, cayley": (SORALinear, {"rotation": "cayley"}),
    "sora, first_order": (SORALinear, {"rotation": "first_order"}),
}
DORAS = [kind for kind in KINDS if kind.startswith("dora")]
SORAS = [kind for kind in KINDS if kind.startswith("sora")]
ROTATIONS = SORAS[:2]
f32, f64, bf16, f16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
every_kind = pytest.mark.parametrize("kind", KINDS)
every_method = pytest.mark.parametrize("method", METHODS)
seeds = st.integers(0, 2**31)
PLAIN = {"dtypes": (f64,), "scaled": False}


# ---- layers, the oracle, a tolerance

def make(kind, m=5, n=7, r=3, alpha=5, r_p=2, dtype=f64, seed=0, trained=True, rows=1.0):
    """A layer with every tensor drawn from seed; rows (m, 2): factors of W0's and B's rows."""
    torch.manual_seed(seed)
    rng, (cls, options) = np.random.default_rng(seed), KINDS[kind]
    rows = torch.as_tensor(rows, dtype=f64) * torch.ones(m, 2)

    def draw(*shape):
        return torch.from_numpy(rng.uniform(-1, 1, shape))
    base = nn.Linear(n, m).to(dtype)
    base.weight.data = (draw(m, n) * rows[:, :1]).to(dtype)
    base.bias.data = draw(m).to(dtype)
    layer = cls(base, r, alpha, **options, **({"r_p": r_p} if cls is SORALinear else {}))
    for name, p in layer.named_parameters(recurse=False):
        if trained:
            p.data = (draw(*p.shape) * (p + 0.1 if name == "magnitude" else 1)).to(p.dtype)
    layer.B.data *= rows[:, 1:]
    return layer.to(DEVICE)


@st.composite
def layers(draw, kinds=tuple(KINDS), dtypes=(f32, f64), scaled=True, **options):
    """Any small layer: sizes from 1 up, r above min(m, n) too, α ≠ r, rows of any scale or zero."""
    powers = st.sampled_from([1.0, 1.0, 2.0**-20, 2.0**-7, 2.0**5, 2.0**12])
    m = draw(st.integers(1, 7))
    rows = torch.tensor([[draw(powers), draw(powers)] for _ in range(m)]) if scaled else 1.0
    if scaled and draw(st.booleans()):
        rows[draw(st.integers(0, m - 1)), 0] = 0
    case = dict(m=m, n=draw(st.integers(1, 7)), r=draw(st.integers(1, 9)), rows=rows,
                alpha=draw(st.sampled_from([0.5, 3, 10, 16])), r_p=draw(st.integers(1, 4)),
                seed=draw(seeds), **options)
    choice = random.Random(repr(case)).choice  # evenly, as sampled_from does not
    kind, case["dtype"] = choice(kinds), choice(dtypes)
    note(f"make({kind!r}, **{case})")
    layer = make(kind, **case)
    if draw(st.booleans()):
        layer.base.bias = None
    return layer


def inputs(layer, *shape, seed=1):
    x = np.random.default_rng(seed).uniform(-1, 1, (*shape, layer.in_features))
    return torch.from_numpy(x).to(layer.base.weight)


def array(value):
    return value.detach().double().cpu().numpy() if torch.is_tensor(value) else np.asarray(value)


def close(layer, actual, exact, size=1.0, k=None, eps=None):
    """|actual − exact| ≤ k · ε · size; k: sums over n, r, m, 2 r_p and some more."""
    if k is None:
        m, n, r_p = layer.out_features, layer.in_features, getattr(layer, "r_p", 0)
        k = n + 2 * layer.r + 2 * m + 4 * r_p + 16
    eps = eps or torch.finfo(actual.dtype).eps
    tiny = np.finfo(np.float32 if eps > 1e-10 else np.float64).tiny  # what underflow may lose
    actual, exact = array(actual), array(exact)
    error, bound = abs(actual - exact), k * (eps * array(size) + tiny)
    assert actual.shape == exact.shape and (error <= bound).all(), np.max(error / bound)


def skew(C, D):
    """P = s_P (DCᵀ − CDᵀ), and q ≥ ‖U‖‖V‖, the size of its thin factors."""
    both = norm(C) + norm(D)
    s_P = min(1.0, 1.0 / (both + 1e-6))
    return s_P * (D @ C.T - C @ D.T), s_P * both**2


def rotation(P, kind):
    """R from the dense P: exp by the eigenvalues of the Hermitian iP, Cayley by a dense solve."""
    I = np.eye(len(P))
    if kind == "exp":
        angles, Q = np.linalg.eigh(1j * P)
        return ((Q * np.exp(-1j * angles)) @ Q.conj().T).real
    return np.linalg.solve(I - P / 2, I + P / 2) if kind == "cayley" else I + P


def before_rotation(layer):
    """M = diag(d) W0 + sBA, and its size."""
    p = {name: array(t) for name, t in layer.named_parameters()}
    d, s = p["diag"][:, None] if "diag" in p else 1.0, layer.lora_alpha / layer.r
    update, size = s * p["B"] @ p["A"], s * abs(p["B"]) @ abs(p["A"])
    return d * p["base.weight"] + update, abs(d * p["base.weight"]) + size


def oracle(layer):
    """W' (m, n) and its size, the sum of the absolute values of all terms that were added up."""
    M, size = before_rotation(layer)
    if hasattr(layer, "magnitude"):
        safe = norm(M, axis=1, keepdims=True)
        safe[safe == 0] = np.inf
        c = array(layer.magnitude)[:, None] / safe
        # ‖W‖² is a sum of terms that much larger than itself; c inherits the relative error.
        loss = (size * size).sum(axis=1, keepdims=True) / safe**2
        return c * M, abs(c) * size * (1 + loss)
    if not hasattr(layer, "rotation"):
        return M, size
    P, q = skew(array(layer.C), array(layer.D))
    # K is at most 1 + q/2 in norm, so R's terms are up to 1 + q (1 + q/2) ≤ (1 + q)², and R mixes
    # the rows, so that a column counts by its norm.
    size = np.sqrt((size**2).sum(axis=0)) * np.ones((len(M), 1))
    return rotation(P, layer.rotation) @ M, (1 + q) ** 2 * size


def output(layer, x):
    """x W'ᵀ + b by the oracle, and its size: b passes by as d b + (1 − d) b."""
    (W, size), thin = oracle(layer), layer.thin(layer.base.weight)
    b = array(layer.bias) if layer.bias is not None else np.zeros(len(W))
    d = array(thin[0]) if thin and thin[0] is not None else 0
    return array(x) @ W.T + b, abs(array(x)) @ size.T + (1 + 2 * abs(d)) * abs(b)


# ---- all five layers

@given(layers(dtypes=(f32, f64, bf16, f16), trained=False))
def test_at_step_0_the_layer_is_its_base_bit_for_bit(layer):
    """W' = W0 and y = base(x), in every dtype, with rows of zeros too."""
    x = inputs(layer, 3)
    assert torch.equal(layer.weight, layer.base.weight) and torch.equal(layer(x), layer.base(x))


@given(layers())
def test_the_dense_and_the_thin_form_are_the_equation(layer):
    """dense(W0) = W' = diag(d) W0 + up down, where up down has rank r, and r + 2 r_p for SORA."""
    close(layer, layer.dense(layer.base.weight), *oracle(layer))
    close(layer, layer.adapted_weight(), *oracle(layer))
    thin = layer.thin(layer.base.weight)
    assert (thin is None) == (type(layer) is DoRALinear)
    assert not thin or thin[1].shape[1] == len(thin[2]) == layer.r + 2 * getattr(layer, "r_p", 0)


@given(layers(), st.sampled_from([2.0**-20, 1.0, 2.0**20]),
       st.sampled_from([(), (3,), (0,), (2, 3), (2, 1, 3)]))
def test_the_output_is_the_equation(layer, scale, shape):
    """y = x W'ᵀ + b for x (…, n) of any scale."""
    x = scale * inputs(layer, *shape)
    close(layer, layer(x), *output(layer, x))


@given(layers(trained=False))
def test_the_number_of_trained_parameters(layer):
    """r (m + n), and m for a diagonal or a magnitude, and 2 m r_p for a rotation."""
    m, n, r, r_p = layer.out_features, layer.in_features, layer.r, getattr(layer, "r_p", 0)
    diagonal = 0 if type(layer) is LoRALinear else m
    trained = sum(p.numel() for p in layer.parameters() if p.requires_grad)
    assert trained == r * (m + n) + diagonal + 2 * m * r_p


def gradient_size(layer, x, G):
    """x, G and a derivative of W', which is of the size of W' or its square over all terms."""
    size = 1 + norm(oracle(layer)[1])
    return (1 + norm(array(x))) * (1 + norm(array(G))) * size**2


@given(layers(**PLAIN))
def test_the_thin_form_has_the_gradients_of_the_dense_form(layer):
    x, W = inputs(layer, 4).requires_grad_(), layer.dense(layer.base.weight)
    G = inputs(layer, 4, seed=2).sum(-1, keepdim=True)
    trained = [x, *(p for p in layer.parameters() if p.requires_grad)]
    ys = layer(x), F.linear(x, W, layer.bias)
    for thin, dense in zip(*(torch.autograd.grad((y * G).sum(), trained) for y in ys)):
        close(layer, thin, dense, gradient_size(layer, x, G))


@pytest.mark.parametrize("kind", sorted({*KINDS} - {"dora", "dora_matrix"}))
def test_first_and_second_derivatives_are_right(kind):
    """Backward, forward mode, double backward. A detached norm has none."""
    layer = make(kind, m=3, n=3, r=2, r_p=1)
    names, tensors = zip(*[(k, p) for k, p in layer.named_parameters() if p.requires_grad])

    def f(x, *tensors):
        return torch.func.functional_call(layer, dict(zip(names, tensors)), (x,))
    every = (inputs(layer, 2).requires_grad_(), *tensors)
    assert torch.autograd.gradcheck(f, every, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(f, every)


@given(layers(dtypes=(f32, f64, bf16)))
def test_merging_gives_a_plain_linear_with_the_adapted_weight(layer):
    """Frozen, and sharing nothing with the layer, which stays as it is."""
    layer.base.requires_grad_(True)
    before, merged = copy.deepcopy(layer.state_dict()), layer.merge()
    assert type(merged) is nn.Linear and merged.weight.dtype == layer.base.weight.dtype
    assert torch.equal(merged.weight, layer.weight) and layer.bias is layer.base.bias
    assert (merged.bias is None) == (layer.bias is None)
    for p in merged.parameters():
        assert type(p) is nn.Parameter and not p.requires_grad
        p.data.fill_(7)
    assert all(torch.equal(before[name], t) for name, t in layer.state_dict().items())


class Watch(TorchDispatchMode):
    """What ran, and the sizes of what it made."""

    def __init__(self, W0):
        super().__init__()
        self.names, self.sizes, self.W0 = set(), [0], W0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.names.add(func.overloadpacket.__name__)
        if torch.is_tensor(out) and out.untyped_storage().data_ptr() != self.W0.data_ptr():
            self.sizes.append(out.numel())
        return out


@every_kind
def test_a_step_forms_no_second_weight_and_asks_the_host_for_no_value(kind):
    """But DoRA as first written. A GPU never waits, and the step can be captured in a graph."""
    layer = make(kind, m=48, n=40, dtype=bf16)
    x = inputs(layer, 2).requires_grad_()
    with Watch(layer.base.weight) as seen:
        layer(x).sum().backward()
    assert (max(seen.sizes) >= 48 * 40) == (type(layer) is DoRALinear)
    asking = ("local_scalar", "item", "nonzero", "equal", "matrix_exp", "eig", "svd",
              "check_errors", "unique")
    assert {"mm", "mul"} <= seen.names
    assert not [name for name in seen.names for word in asking if word in name]


@pytest.mark.parametrize("kind", SORAS)
def test_reading_and_merging_a_tall_layer_form_no_m_by_m_matrix(kind):
    layer = make(kind, m=96, n=4, r_p=4)
    with Watch(layer.base.weight) as seen:
        layer.adapted_weight(), layer.weight, layer.merge(), merge_adapters(nn.Sequential(layer))
    assert max(seen.sizes) <= 96 * (layer.r + 2 * layer.r_p)


def test_a_hook_on_the_base_goes_on_and_is_kept_by_the_merge():
    layer = make("lora")
    x = inputs(layer, 2)
    y, merged = layer(x), layer.merge()(x)
    layer.base.register_forward_hook(lambda module, args, y: 2 * y)
    close(layer, layer(x), y + layer.base(x) / 2, 9 + output(layer, x)[1])
    assert torch.equal(layer.merge()(x), 2 * merged)


class Scaled(Adapter):
    def __init__(self, base, r=8, lora_alpha=16):
        super().__init__(base, r, lora_alpha)
        self.inner = nn.Sequential(nn.Linear(1, 1), nn.Dropout()).to(base.weight.device)

    def dense(self, W0):
        return self.inner[0].weight * W0 + self.sB @ self.A


def test_a_new_method_is_its_equation_alone(monkeypatch):
    monkeypatch.setitem(METHODS, "scaled", Scaled)
    net, x = disturb(adapt(model().eval(), "scaled", "q_proj")), rand(3, 6)
    layer, y = net[1].q_proj, net(x)
    W = layer.dense(layer.base.weight)
    assert torch.allclose(layer(x), F.linear(x, W, layer.bias), atol=1e-6)
    assert not layer.inner[1].training and "1.q_proj.inner.0.weight" in adapter_state_dict(net)
    assert torch.allclose(merge_adapters(net)(x), y, atol=1e-5)


@pytest.mark.parametrize("parent", [LoRALinear, PreDiagLinear, DoRAMatrixLinear, SORALinear])
def test_a_child_with_its_own_dense_does_not_run_its_parents_thin(parent):
    class Doubled(parent):
        def dense(self, W0):
            return 2 * super().dense(W0)

    layer, x = Doubled(nn.Linear(3, 2, bias=False)), torch.rand(4, 3)
    assert torch.allclose(layer(x), 2 * layer.base(x), atol=1e-6)
    assert type("Renamed", (parent,), {}).thin is parent.thin


# ---- half precision

@given(layers(dtypes=(bf16, f16), scaled=False))
def test_a_half_precision_layer_rounds_seven_times(layer):
    """d ∘ V, VᵀM, down, h, up, the update and y: 7 ε/2 of the size. W' is float32."""
    x = inputs(layer, 3)
    assert layer(x).dtype == x.dtype and layer.adapted_weight().dtype == layer.A.dtype == f32
    close(layer, layer.adapted_weight(), *oracle(layer))
    close(layer, layer(x), *output(layer, x), k=3.5)


@given(layers(["lora", "pre_diag", "dora_matrix", *SORAS], dtypes=(bf16,)))
def test_half_precision_rounds_only_what_meets_W0_or_x(layer):
    """d, up and down are float32's, but for the (d ∘ V)ᵀW0 in VᵀM (and for W0Aᵀ in c, see DoRA)."""
    W0, half = array(layer.base.weight), torch.finfo(layer.base.weight.dtype).eps
    d, up, down = layer.thin(layer.base.weight)
    sB, A, r = layer.scaling * array(layer.B), array(layer.A), layer.r
    c = array(d)[:, None] if hasattr(layer, "magnitude") else 1
    close(layer, up[:, :r], c * sB, abs(c * sB), k=2)
    assert torch.equal(down[:r], layer.A) and d is getattr(layer, "diag", d)
    if hasattr(layer, "rotation"):
        L, V = (array(t) for t in rotation_factors(layer.C, layer.D, layer.rotation))
        dV = (array(layer.diag)[:, None] * V).T
        close(layer, up[:, r:], L, abs(L), k=2)
        # d ∘ V and the product are rounded, and the rest is float32's ε
        size = 1.5 * half / 2**-23 * abs(dV) @ abs(W0) + abs(V).T @ abs(sB) @ abs(A)
        close(layer, down[r:], dV @ W0 + V.T @ sB @ A, size)


def test_a_diagonal_step_is_not_rounded_away():
    """Where the update cancels base(x), (d − 1) base(x) is left, of a d that is 1 in bfloat16."""
    layer = make("pre_diag", n=5, r=5, alpha=5, dtype=bf16)
    layer.base.bias = None
    W0 = layer.base.weight.float()
    layer.A.data, layer.B.data = torch.eye(5).to(W0), -W0
    layer.diag.data.fill_(1.003)
    close(layer, layer(torch.eye(5).to(layer.base.weight)), 0.003 * W0.T, W0.abs().T * 0.003, k=1)


@given(layers(dtypes=(f32,), scaled=False), st.sampled_from([bf16, f16]))
def test_a_layer_that_is_cast_after_adapting_is_right_to_that_precision(layer, dtype):
    layer.to(dtype)
    x, (W, size) = inputs(layer, 3), oracle(layer)
    close(layer, layer(x), *output(layer, x), eps=torch.finfo(dtype).eps)
    close(layer, layer.merge().weight, W, size)


@few
@given(layers(dtypes=(f32,), scaled=False))
def test_autocast_touches_the_products_with_x_alone(layer):
    """y has the base's dtype and precision; W' and the factors are bit for bit those without."""
    W, x, thin, seen = layer.adapted_weight(), inputs(layer, 3).bfloat16(), layer.thin, []
    layer.thin = lambda W0: seen.append(thin(W0)) or seen[-1]
    for x in x, x.float():
        with torch.autocast(x.device.type, dtype=bf16):
            y = layer(x)
            assert y.dtype == layer.base(x).dtype and torch.equal(layer.adapted_weight(), W)
        close(layer, y, *output(layer, x), k=3)  # W0 is rounded as well
    for factors in seen if thin(W) else ():
        assert all(a is b or torch.equal(a, b) for a, b in zip(factors, thin(layer.base.weight)))


# ---- LoRA and Pre-Diag

@given(layers(["lora"], **PLAIN))
def test_a_lora_update_has_rank_entropy_and_stable_rank_of_at_most_r(layer):
    """log r for the entropy, to which a stray σ of 1e-14 adds about 32 times that."""
    delta = layer.adapted_weight() - layer.base.weight
    r, S, size = min(layer.r, *delta.shape), torch.linalg.svdvals(delta), oracle(layer)[1].sum()
    more = (singular_value_entropy(delta) - math.log(r)).clamp(min=0)
    close(layer, S[r:], np.zeros(len(S) - r), size)
    close(layer, more, 0, 32 * size / S[0])
    assert stable_rank(delta) <= r + 1e-12


@few
@given(seeds)
def test_a_conditioned_update_has_more_entropy_than_its_rank_allows(seed):
    """The paper's first finding: a diagonal or a rotation lifts W' − W0 out of rank r."""
    for kind in KINDS:
        layer = make(kind, m=24, n=24, r=2, seed=seed)
        entropy = singular_value_entropy(layer.adapted_weight() - layer.base.weight)
        assert (entropy > math.log(4)) == (kind != "lora"), kind


@given(seed=seeds, r=st.integers(1, 5))
def test_a_lora_is_never_closer_to_a_target_than_eckart_and_young_allow(seed, r):
    """‖W' − W*‖F ≥ (Σ_{i>r} σ_i²)^½ of W* − W0, and the truncated SVD in A and B attains it."""
    layer = make("lora", m=6, n=5, r=r, seed=seed)
    W0, target = layer.base.weight, inputs(layer, 6, seed=seed + 1)
    U, S, Vt = torch.linalg.svd(target - W0, full_matrices=False)
    assert (layer.adapted_weight() - target).norm() >= S[r:].norm() - 1e-12
    layer.B.data, layer.A.data = U[:, :r] * S[:r] / layer.scaling, Vt[:r]
    close(layer, (layer.adapted_weight() - target).norm(), S[r:].norm(), 10.0)


@given(layers(["pre_diag"], **PLAIN))
def test_pre_and_post_diagonal_reach_the_same_weights_and_train_differently(layer):
    """diag(d)W0 + sBA is a DoRA with B/d and the magnitude d‖W0 + s(B/d)A‖.

    From the gradient G of W', d gets ⟨G, w0⟩, and the magnitude ⟨G, w⟩/‖w‖ of w = w0 + s(b/d)A.
    """
    layer.diag.data.add_(1.5 * layer.diag.data.sign())  # away from 0
    dora = DoRALinear(layer.base, layer.r, layer.lora_alpha)
    W0, d = layer.base.weight, layer.diag.data
    dora.A.data, dora.B.data = layer.A.data, layer.B.data / d[:, None]
    W, G = W0 + dora.sB @ dora.A, inputs(layer, layer.out_features)
    dora.magnitude.data = d * W.data.norm(dim=1)
    close(layer, dora.adapted_weight(), *oracle(layer))
    for one in (layer, dora):
        (one.adapted_weight() * G).sum().backward()
    size = 9 * (1 + abs(array(W)).sum()) * (1 + layer.scaling)
    close(layer, layer.diag.grad, (G * W0).sum(dim=1), size)
    close(layer, dora.magnitude.grad, (G * W).sum(dim=1) / W.norm(dim=1), size)


# ---- DoRA

@given(layers(DORAS))
def test_dora_row_norms_are_the_magnitude(layer):
    W, size = oracle(layer)
    exact = abs(array(layer.magnitude)) * abs(W).any(axis=1)
    norms = norm(array(layer.adapted_weight()), axis=1)
    close(layer, norms, exact, norm(size, axis=1), eps=torch.finfo(layer.A.dtype).eps)


@given(layers(DORAS, scaled=False), st.sampled_from([2.0**-10, 2.0**11]))
def test_dora_ignores_the_scale_of_the_direction(layer, c):
    """(W0, B) → (cW0, cB) changes nothing: exactly, for a power of two."""
    W = layer.adapted_weight()
    layer.base.weight.data *= c
    layer.B.data *= c
    assert torch.equal(layer.adapted_weight(), W)


def train(layer, steps=5, lr=0.1, optimizer=torch.optim.SGD):
    x, target = inputs(layer, 16), inputs(layer, 16, seed=5).sum(-1, keepdim=True)
    optimizer = optimizer([p for p in layer.parameters() if p.requires_grad], lr=lr)
    for _ in range(steps):
        optimizer.zero_grad()
        (layer(x) - target).square().mean().backward()
        optimizer.step()
    return layer.adapted_weight().detach()


@few
@given(seed=seeds, full=st.booleans(), adam=st.booleans())
def test_the_two_forms_of_dora_are_one_method_in_training(seed, full, adam):
    """From a trained state, in eight steps that move W' by tens of percent."""
    one = make("dora, full" if full else "dora", m=4, n=12, r=2, alpha=2, seed=seed)
    two = DoRAMatrixLinear(copy.deepcopy(one.base), one.r, one.lora_alpha, one.detach_norm)
    two.load_state_dict(one.state_dict())
    before = one.adapted_weight()
    optimizer, lr = (torch.optim.AdamW, 0.05) if adam else (torch.optim.SGD, 0.1)
    a, b = (train(layer, 8, lr, optimizer) for layer in (one, two))
    assume((a - before).norm() > 0.1 * before.norm())
    close(None, a, b, k=1, eps=1e-8)  # AdamW divides a gradient's rounding by 1e-8


@given(layers(DORAS, **PLAIN))
def test_dora_gradients_are_as_in_the_DoRA_paper(layer):
    """∂W = cG detached, c(G − ⟨G, ŵ⟩ŵ) in full; ∂magnitude = ⟨G, ŵ⟩ in both."""
    G, A, sB = inputs(layer, layer.out_features), array(layer.A), array(layer.sB)
    (layer.adapted_weight() * G).sum().backward()
    W, size, G = array(layer.base.weight) + sB @ A, gradient_size(layer, 1, G), array(G)
    length = norm(W, axis=1, keepdims=True)
    assume(length.min() > 0.1)
    w = W / length
    along, c = (G * w).sum(axis=1, keepdims=True), array(layer.magnitude)[:, None] / length
    dW = c * (G if layer.detach_norm else G - along * w)
    close(layer, layer.magnitude.grad, along[:, 0], size)
    close(layer, layer.B.grad, layer.scaling * dW @ A.T, size)
    close(layer, layer.A.grad, sB.T @ dW, size)


@pytest.mark.parametrize("kind", DORAS)
@pytest.mark.parametrize("dead", [[1], [0, 3], range(5)])
def test_dora_rows_of_zeros_stay_finite(kind, dead):
    """A pruned row of W0, or an all-zero W0, is 0/0 in the equation: here finite, with gradient."""
    rows = torch.ones(5, 2)
    rows[list(dead), 0] = rows[dead[0], 1] = 0  # W = 0 in the first of them
    layer = make(kind, rows=rows)
    assert not layer.adapted_weight()[dead[0]].any() and layer(inputs(layer, 4)).isfinite().all()
    assert train(layer, 3).isfinite().all() and layer(inputs(layer, 4)).isfinite().all()


@given(layers(["dora_matrix"], dtypes=(f32, f64, bf16))
       | layers(["dora_matrix"], dtypes=(f16,), scaled=False),  # float16's range is small
       st.sampled_from([None, 0.5, 1e-1, 1e-2, 1e-4, 1e-7]))
def test_the_matrix_norm_errs_by_what_its_terms_cancel(layer, delta):
    """c to (4ε |sB||W0Aᵀ| + 64ε' size²) / ‖W‖², ε of W0's dtype and ε' of the factors'.

    Row 0 of W0 + sBA is about delta times as long as that of W0.
    """
    if delta:
        layer.A.data[0], layer.B.data[0] = layer.base.weight[0], 0
        layer.B.data[0, 0] = (delta - 1) / layer.scaling
    W0, A, sB = array(layer.base.weight), array(layer.A), layer.scaling * array(layer.B)
    eps, own = (torch.finfo(t.dtype).eps for t in (layer.base.weight, layer.A))
    norm2 = ((W0 + sB @ A) ** 2).sum(axis=1)
    cross = (abs(sB) * (abs(W0) @ abs(A).T)).sum(axis=1)
    size2 = ((abs(W0) + abs(sB) @ abs(A)) ** 2).sum(axis=1)
    kept = norm2 > 2 * eps * (W0**2).sum(axis=1)  # else it is held
    error = (4 * eps * cross + 64 * own * size2)[kept] / norm2[kept]
    c, exact = array(layer.thin(layer.base.weight)[0]), array(layer.magnitude)[kept]
    assert ((error > 0.5) | (abs(c[kept] * norm2[kept] ** 0.5 / exact - 1) <= error)).all()


@pytest.mark.parametrize("dtype", [f32, f64, bf16])
def test_the_matrix_norm_has_its_floor_at_epsilon_times_the_square_of_W0(dtype):
    """Where W0Aᵀ is exact: float32's ε for a sB that a half would round, and for a sum of 0."""
    layer, eps = make("dora_matrix", m=3, n=8, r=1, alpha=1, dtype=dtype), torch.finfo(dtype).eps
    layer.A.data[:] = layer.base.weight.data[:2] = 1.0
    layer.B.data[:2, 0], layer.magnitude.data[:] = torch.tensor([1 + 2**-10, -1.0]), 3.0
    exact = 3.0 / np.sqrt([8 * (2 + 2**-10) ** 2, 8 * eps])
    close(layer, layer.thin(layer.base.weight)[0][:2], exact, exact, k=4)


# ---- SORA

def sora(C, D, kind, dtype=f64):
    layer = make(kind, m=len(C), r_p=C.shape[1], dtype=dtype)
    layer.C.data, layer.D.data = (torch.from_numpy(t).to(layer.C) for t in (C, D))
    return layer


@st.composite
def factors(draw, m=st.integers(1, 16), sizes=(1e-3, 0.1, 1.0, 30.0, 100.0)):
    """C and D (m, r_p): of any two sizes, near each other, parallel, or with a dead column."""
    m, r_p, rng = draw(m), draw(st.integers(1, 4)), np.random.default_rng(draw(seeds))
    C, D = (draw(st.sampled_from(sizes)) * rng.uniform(-1, 1, (m, r_p)) for _ in range(2))
    near = draw(st.sampled_from(["any", "any", "close", "parallel", "dead"]))
    C[:, 0] *= near != "dead"
    return C, {"close": C + 1e-3 * abs(C).max() * D / abs(D).max(),
               "parallel": 1.5 * C}.get(near, D)


@given(factors(sizes=(1e-3, 0.1, 1.0, 10.0)), st.sampled_from(SORAS))
def test_sora_rotation_is_the_dense_one(both, kind):
    """exp(P), (I − P/2)⁻¹(I + P/2) or I + P of the dense (m, m) P; r_p above m/2 too."""
    layer, (P, q) = sora(*both, kind), skew(*both)
    theta = norm(P, 2)
    eps = 16 * 2.0**-52 * (1 + q) ** 2 + (theta**5 / 2**57 if kind == "sora, exp" else 0)
    close(layer, layer.rotation_matrix(), rotation(P, layer.rotation), k=1, eps=eps)


def turned(C, D, theta):
    """C and D, scaled so that ‖P‖₂ = theta."""
    both, unit = norm(C) + norm(D), norm(D @ C.T - C @ D.T, 2)
    a = math.sqrt(theta / unit)  # if s_P = 1; else a² unit = theta (a both + 1e-6)
    if a * both + 1e-6 > 1:
        a = (theta * both + math.sqrt((theta * both) ** 2 + 4e-6 * theta * unit)) / (2 * unit)
    return a * C, a * D


@given(seeds, st.integers(1, 4), st.floats(0.1, 100))
def test_the_exponential_errs_by_theta_to_the_5_over_720_times_2_to_the_48(seed, r_p, theta):
    """The [2/2] Padé at P/2¹², squared twelve times: 1e-12 at θ = 10, float32's ε at 100."""
    C, D = turned(*np.random.default_rng(seed).uniform(-1, 1, (2, 12, r_p)), theta)
    (P, q), error = skew(C, D), theta**5 / 720 / 2**48
    R = array(sora(C, D, "sora, exp").rotation_matrix())
    assert norm(R - rotation(P, "exp"), 2) <= 1.5 * error + 1e-14 * (1 + q)


@given(factors(), st.sampled_from(ROTATIONS))
def test_sora_rotation_is_orthogonal_for_factors_of_sizes_up_to_100(both, kind):
    """|RᵀR − I| ≤ 5e-13 in float64, and 32 ε of float32 for a float32 layer's L and V."""
    layer, single = sora(*both, kind), sora(*both, kind, f32)
    R = layer.rotation_matrix()
    close(layer, R.T @ R, np.eye(len(R)), k=1, eps=5e-13)
    assert abs(np.linalg.det(array(R)) - 1) < 1e-11
    assert all(g.isfinite().all() for g in torch.autograd.grad(R.sum(), [layer.C, layer.D]))
    L, V = (array(t.float()) for t in rotation_factors(single.C, single.D, single.rotation))
    for R in (array(single.rotation_matrix()), np.eye(len(R)) + L @ V.T):
        close(layer, R.T @ R, np.eye(len(R)), k=32, eps=2.0**-23)


@given(st.integers(1, 4), st.integers(0, 5), seeds, st.sampled_from(ROTATIONS))
def test_sora_reaches_every_rotation_of_r_p_planes(r_p, more, seed, kind):
    """Angles in planes (q, q') of any orthonormal Q: C = √|θ| q and D = ±√|θ| q', over s_P."""
    rng = np.random.default_rng(seed)
    Q, _ = np.linalg.qr(rng.standard_normal((2 * r_p + more, 2 * r_p)))
    q1, q2, angle = Q[:, ::2], Q[:, 1::2], rng.uniform(-3, 3, r_p)
    theta = 2 * np.tan(angle / 2) if kind == "sora, cayley" else angle
    C, D = np.sqrt(abs(theta)) * q1, np.sign(theta) * np.sqrt(abs(theta)) * q2
    exact = np.eye(len(Q)) + q1 * (np.cos(angle) - 1) @ q1.T + q2 * (np.cos(angle) - 1) @ q2.T
    exact += q2 * np.sin(angle) @ q1.T - q1 * np.sin(angle) @ q2.T
    layer = sora(*turned(C, D, abs(theta).max()), kind)
    close(None, layer.rotation_matrix(), exact, (1 + abs(theta).sum()) ** 2, k=64)


@pytest.mark.parametrize("c, s_P", [(1.0, 1 / 2.000001), (0.25, 1.0), (8.0, 1 / 16.000001)])
def test_sora_turns_a_known_plane_by_a_known_angle(c, s_P):
    """C = c·e1, D = c·e2: R multiplies x1 + i x2 by e^(iθ), or as the others say, θ = s_P c²."""
    e1, e2, theta = np.eye(5)[:, :1], np.eye(5)[:, 1:2], s_P * c**2
    z = np.exp(1j * theta), (1 + 0.5j * theta) / (1 - 0.5j * theta), 1 + 1j * theta
    for kind, z in zip(SORAS, z):
        exact = np.eye(5)
        exact[:2, :2] = [[z.real, -z.imag], [z.imag, z.real]]
        R = sora(c * e1, c * e2, kind).rotation_matrix()
        close(None, R, exact, (1 + theta) ** 2, k=16)


@given(layers(ROTATIONS, **PLAIN))
def test_sora_keeps_every_inner_product_of_M(layer):
    """W'ᵀW' = MᵀM with M = diag(d) W0 + sBA, so its singular values and norms too."""
    W, (M, _) = array(layer.adapted_weight()), before_rotation(layer)
    close(layer, W.T @ W, M.T @ M, oracle(layer)[1].sum() ** 2, eps=2.0**-52)


@given(layers(SORAS, **PLAIN))
def test_soras_first_gradient_is_the_same_for_all_rotations(layer):
    """At D = C: ∂D = s_P (S − Sᵀ) C = −∂C with S = G Mᵀ for the gradient G of W'."""
    layer.D.data = layer.C.data.clone()
    (M, size), G = before_rotation(layer), inputs(layer, layer.out_features)
    (layer.adapted_weight() * G).sum().backward()
    C, S = array(layer.C), array(G) @ M.T
    exact = min(1, 1 / (2 * norm(C) + 1e-6)) * (S - S.T) @ C
    size = 2 * size.sum() * (1 + abs(C).sum()) ** 2
    close(layer, layer.D.grad, exact, size)
    close(layer, layer.C.grad, -exact, size)


class SkipsInit(TorchFunctionMode):
    """As Lightning and transformers load models: torch.nn.init does nothing."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if getattr(func, "__module__", None) == "torch.nn.init":
            return (*args, *kwargs.values())[0]
        return func(*args, **(kwargs or {}))


def test_A_and_C_are_drawn_uniformly_and_B_is_zero():
    """A on ±1/√n, C on ±1/√m and D = C a tensor of its own, whoever switches nn.init off."""
    base = nn.Linear(400, 100)
    with SkipsInit():
        layer = SORALinear(base, r_p=40)
    assert not layer.B.any() and (layer.diag == 1).all() and torch.equal(layer.C, layer.D)
    assert layer.C.data_ptr() != layer.D.data_ptr()
    for t, bound in (layer.A, 1 / 20), (layer.C, 1 / 10):
        assert 0.99 * bound < t.max() <= bound and -bound <= t.min() < -0.99 * bound
        assert abs(t.mean()) < 0.1 * bound


# ---- diagnostics

@given(seeds, st.integers(1, 6), st.integers(1, 6), st.sampled_from([2.0**-100, 2.0**124]),
       st.sampled_from([f32, f64]))
def test_the_diagnostics_are_their_formulas(seed, m, n, scale, dtype):
    """−Σ p log p with p = σ/Σσ, and ‖·‖²F/‖·‖²₂; at any scale, over leading dimensions too."""
    delta = np.random.default_rng(seed).standard_normal((2, m, n)).astype(np.float32).astype(float)
    S = np.linalg.svd(delta, compute_uv=False)
    p, actual = S / S.sum(axis=1, keepdims=True), torch.from_numpy(scale * delta).to(DEVICE, dtype)
    close(None, singular_value_entropy(actual), -(p * np.log(p)).sum(axis=1), 4, k=64)
    close(None, stable_rank(actual), (delta**2).sum(axis=(1, 2)) / S[:, 0] ** 2, 6, k=64)


@pytest.mark.parametrize("sigma", [[0.0, 0.0], [2.0, 2.0, 0.0]])
def test_a_deficient_update_has_exact_diagnostics_and_finite_gradients(sigma):
    delta, rank = torch.diag(torch.tensor(sigma)).requires_grad_(), sum(sigma) / 2
    for diagnostic, exact in (singular_value_entropy, math.log(rank or 1)), (stable_rank, rank):
        close(None, diagnostic(delta), exact, k=4)
        assert torch.autograd.grad(diagnostic(delta), delta)[0].isfinite().all()
        assert diagnostic(delta.bfloat16()).dtype == f32


# ---- models

class Attention(nn.Module):
    """With a name that only ends alike, and an output at two places."""

    def __init__(self):
        super().__init__()
        self.q_proj, self.v_proj, self.xq_proj = (nn.Linear(6, 6) for _ in range(3))
        self.out = self.again = nn.Linear(6, 6, bias=False)

    def forward(self, x):
        return self.again(self.out(self.q_proj(x) * self.v_proj(x).tanh() + self.xq_proj(x)))


def model(method=None, targets=("q_proj", "v_proj"), **kwargs):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 6), Attention(), nn.LayerNorm(6)).to(DEVICE)
    return adapt(net, method, targets, **kwargs) if method else net


def rand(*shape):
    return torch.randn(*shape, device=DEVICE)


@torch.no_grad()
def disturb(net):
    """Any values in all that is trained."""
    for p in net.parameters():
        if p.requires_grad:
            p.add_(0.3 * torch.randn_like(p))
    return net


@every_method
def test_adapt_freezes_the_model_and_wraps_what_the_names_match(method):
    net = model()
    assert adapt(net, method, ["q_proj", "1.v_proj", "0"], r=3, lora_alpha=6) is net
    wrapped = {name for name, m in net.named_modules() if type(m) is METHODS[method]}
    assert wrapped == {"0", "1.q_proj", "1.v_proj"}
    assert (net[0].r, net[0].lora_alpha, net[0].scaling) == (3, 6, 2.0)
    letters = {"lora": "A B", "dora": "A B magnitude", "dora_matrix": "A B magnitude",
               "pre_diag": "A B diag", "sora": "A B diag C D"}[method].split()
    own = {f"{name}.{letter}" for name in wrapped for letter in letters}
    assert own == {name for name, p in net.named_parameters() if p.requires_grad}
    assert own == set(adapter_state_dict(net))


def test_the_defaults_are_those_of_the_interface():
    for cls in METHODS.values():
        values = [p.default for p in inspect.signature(cls).parameters.values()][1:]
        assert values[:2] == [8, 16] and values[2:] in ([], [True], [4, "exp"])
    shown = "out_features=2, in_features=3, r=8, lora_alpha=16, scaling=2.0"
    assert LoRALinear(nn.Linear(3, 2)).extra_repr() == shown


@pytest.mark.parametrize("targets", ["out", "again", ["out", "again"]])
def test_a_linear_used_at_two_places_is_wrapped_once_and_stays_shared(targets):
    net, x = disturb(model("sora", targets)), rand(3, 6)
    assert net[1].out is net[1].again and type(net[1].out) is SORALinear
    assert type(net[1].out.base) is nn.Linear and len(adapter_state_dict(net)) == 5
    y = net(x)
    merge_adapters(net)
    assert net[1].out is net[1].again and type(net[1].out) is nn.Linear
    assert torch.allclose(net(x), y, atol=1e-5)


def test_a_second_adapt_freezes_what_it_wraps_and_nothing_else():
    """What trains keeps training, what was frozen stays so; an adapter's is in the state."""
    net = model("lora", "q_proj")
    net[1].q_proj.A.requires_grad_(False)
    net[2].requires_grad_(True)
    net[1].v_proj.requires_grad_(True)
    adapt(net, "sora", "v_proj")
    trained = {name for name, p in net.named_parameters() if p.requires_grad}
    sora = {f"1.v_proj.{letter}" for letter in ("A", "B", "diag", "C", "D")}
    assert trained == sora | {"1.q_proj.B", "2.weight", "2.bias"}
    assert set(adapter_state_dict(net)) == trained | {"1.q_proj.A"}


@every_method
def test_merge_adapters_leaves_plain_linears_of_the_same_function(method):
    net, x = disturb(model(method, ["0", "q_proj", "out"])), rand(5, 6)
    y = net(x)
    assert merge_adapters(net) is net and set(net.state_dict()) == set(model().state_dict())
    assert torch.allclose(net(x), y, atol=1e-5)


def test_a_layer_that_is_the_whole_model_is_adapted_and_merged():
    base = nn.Linear(3, 2).eval()
    layer = adapt(base, "lora", [""])
    assert layer.base is base and not layer.training and type(merge_adapters(layer)) is nn.Linear


@every_method
def test_adapter_state_goes_through_a_file_bit_for_bit(method):
    """With a trained head, into a model adapted alike. The state is a copy."""
    (net, twin), file, x = (model(method), model(method)), io.BytesIO(), rand(4, 6)
    for head in (net[2], twin[2]):
        head.requires_grad_(True)
    state = adapter_state_dict(disturb(net))
    torch.save(state, file)
    file.seek(0)
    assert load_adapter_state_dict(twin, torch.load(file, weights_only=True)) is twin
    assert torch.equal(twin(x), net(x))
    load_adapter_state_dict(disturb(net), state)  # back to the snapshot
    assert torch.equal(twin(x), net(x)) and not any(t.requires_grad for t in state.values())


# ---- what is refused

class Subclassed(nn.Linear):
    pass


class Piece(torch.Tensor):
    """Any tensor class: quantised, sharded."""


def weighing(weight):
    base = nn.Linear(3, 2)
    base._parameters["weight"] = nn.Parameter(weight, False)
    return base


ODD = {
    "conv": nn.Conv1d(3, 2, 1),
    "subclassed": Subclassed(3, 2),
    "parametrized": nn.utils.parametrizations.weight_norm(nn.Linear(3, 2)),
    "pruned": prune.l1_unstructured(nn.Linear(3, 2), "weight", 0.5),
    "quantised": weighing(torch.rand(2, 3).as_subclass(Piece)),
    "int8": weighing(torch.ones(2, 3, dtype=torch.int8)),
    "float8": weighing(torch.ones(2, 3).to(torch.float8_e4m3fn)),
    "complex": weighing(torch.ones(2, 3) * 1j),
    "meta": nn.Linear(3, 2, device="meta"),
}


def load(net, **changes):
    """A state that would fit, but for the changes to 1.q_proj's (None: left out)."""
    state = {name: p + 1 for name, p in adapter_state_dict(net).items()}
    state.update({f"1.q_proj.{name}": p for name, p in changes.items()})
    load_adapter_state_dict(net, {name: p for name, p in state.items() if p is not None})


SECOND = {"__name__": "second"}
exec(inspect.getsource(minisora), SECOND)  # a second copy knows no adapter of the first
REFUSED = {  # the words in the message: the call (and a parameter that is changed before)
    "method 'vera' is not in ['lora'": lambda net: adapt(net, "vera", "v_proj"),
    "no module for ['proj']": lambda net: adapt(net, "lora", ["v_proj", "proj"]),
    "no module for []": lambda net: adapt(net, "lora", []),
    "1.q_proj is adapted: merge, or": lambda net: adapt(net, "lora", ["v_proj", "q_proj"]),
    "1.q_proj.base is adapted": lambda net: adapt(net, "lora", "base"),
    "r must be at least 1, got 0": lambda net: adapt(net, "lora", "v_proj", r=0),
    "r_p must be at least 1, got 0": lambda net: adapt(net, "sora", "v_proj", r_p=0),
    "is 0 or not finite: 0": lambda net: PreDiagLinear(net[1].v_proj, lora_alpha=0),
    "not finite: -inf": lambda net: adapt(net, "dora", "v_proj", lora_alpha=-math.inf),
    "rotation 'Exp' is not in ('exp'": lambda net: adapt(net, "sora", "v_proj", rotation="Exp"),
    "rotation 'Cayley'": lambda net: rotation_factors(net[0].weight, net[0].weight, "Cayley"),
    "base must be an nn.Linear": lambda net: LoRALinear(None),
    "no adapters of this copy": lambda net: merge_adapters(net[2]),
    "of minisora: adapt it first": lambda net: adapter_state_dict(net[2]),
    "the model has no adapters": lambda net: SECOND["merge_adapters"](net),
    "1 missing names ['1.q_proj.A'] and 0": lambda net: load(net, A=None),
    "0 missing names [] and 2 unexpected ['1.q_proj.e', '1.q_proj.f']": (
        lambda net: load(net, f=rand(1), e=rand(1))),
    "A must be torch.Size([8, 6]), got torch.Size([6])": lambda net: load(net, A=rand(6)),
    "1.q_proj.A is not finite": lambda net: load(net, A=rand(8, 6) * math.nan),
    "A is not finite": lambda net: load(net, A=rand(8, 6).double() * 1e300),
    "base on meta": (lambda net: net[1].q_proj(rand(2, 6)), "base.weight", lambda p: p.to("meta")),
    "B is a sharded Piece: gather": (adapter_state_dict, "B", lambda p: p.as_subclass(Piece)),
    "A is a sharded Piece": (load, "A", lambda p: p.as_subclass(Piece)),
    "not meta: it is Linear": (merge_adapters, "base.weight", lambda p: p.to("meta")),
    "1.q_proj: W' is not finite": (merge_adapters, "B", lambda p: p * math.inf),
    "base: W' is": (lambda net: net[1].q_proj.merge(), "base.weight", lambda p: p.half() * 1e6),
    **{f"odd.{name} must be": lambda net, name=name: adapt(net, "sora", ["v_proj", name])
       for name in ODD},
}


def picture(net):
    """All that an operation which fails must leave as it was."""
    modules = [(name, id(m)) for name, m in net.named_modules(remove_duplicate=False)]
    values = [(name, id(p), p.requires_grad, p.is_meta or p.detach().cpu().contiguous().view(
        torch.uint8).numpy().tobytes()) for name, p in net.named_parameters()]
    return modules, values


@pytest.mark.parametrize("words", REFUSED)
def test_what_is_refused_is_named_and_changes_nothing(words):
    call, *change = REFUSED[words] if isinstance(REFUSED[words], tuple) else [REFUSED[words]]
    net = disturb(model("lora", "q_proj"))
    net[1].v_proj.requires_grad_(True)
    net.odd = nn.ModuleDict(ODD).requires_grad_(False)
    if change:
        owner, _, name = f"1.q_proj.{change[0]}".rpartition(".")
        parameters = net.get_submodule(owner)._parameters
        parameters[name] = nn.Parameter(change[1](parameters[name].detach()), False)
    before = picture(net)
    with pytest.raises((ValueError, TypeError), match=re.escape(words)) as info:
        call(net)
    assert picture(net) == before and len(str(info.value)) < 500
    assert ("must be an nn.Linear" in str(info.value)) == (info.type is TypeError)


# ---- the price, in counts

def test_a_layer_costs_the_operations_and_bytes_of_its_thin_form():
    """At 2048 tokens, 1024 → 1024, r = 16, r_p = 4: figures that depend on no machine."""
    T, d, r, q = 2048, 1024, 16, 8  # q = 2 r_p
    bench = train_tiny.bench_layers(d, torch.device("cpu"), f32)
    x = torch.randn(T, d, requires_grad=True)
    count = {name: train_tiny.flops(layer, x) for name, layer in bench.items()}
    kept = {name: train_tiny.saved_bytes(layer, x) / (T * d * 4) for name, layer in bench.items()}
    assert count["linear"] == 2 * (2 * T * d * d)  # forward, and backward to x
    assert count["lora"] == count["pre_diag"] == count["linear"] + 3 * 2 * T * r * (d + d)
    assert count["dora_matrix"] == count["lora"] + 2 * (d * d * r + 2 * d * r * r)  # and the norm
    assert count["dora"] == 1.5 * count["linear"] + 3 * 2 * d * d * r  # W' and its (m, n) gradient
    # Rank r + q, and (d ∘ V)ᵀW0 with its gradient; the rest has no T and only one d in it.
    sora = count["linear"] + 3 * 2 * T * (r + q) * (d + d) + 2 * 2 * d * d * q
    soras = [name for name in bench if name.startswith("sora")]
    assert len(soras) == 2 and all(sora < count[name] < 1.001 * sora for name in soras)
    assert kept["linear"] == 0 and kept["lora"] <= 0.05
    assert kept["pre_diag"] <= 1.03 and kept["dora_matrix"] <= 1.033  # no graph of a norm
    assert all(1 <= kept[name] <= 1.15 for name in soras)
    assert kept["dora"] > 2 * d / T  # W0 + sBA and W', each (m, n)


# ---- train_tiny.py

@pytest.fixture
def script(monkeypatch):
    """Run the script at a small size."""
    small = {"DIM": 32, "LAYERS": 1, "CONTEXT": 16, "BATCH": 4, "BASE_STEPS": 4, "STEPS": 4,
             "REACH_STEPS": 60, "BENCH_SIZES": [(32, 16)], "BENCH_ROUNDS": 2}
    for name, value in small.items():
        monkeypatch.setattr(train_tiny, name, value)
    return lambda line: train_tiny.main(line.split())


def test_the_script_has_a_row_for_each_method_and_seed(script, monkeypatch, capsys):
    """One that diverges is a row too."""
    monkeypatch.setitem(train_tiny.METHODS, "pre_diag", ("pre_diag", {}, 1e30))
    results = script("--seeds 2 --methods " + " ".join(train_tiny.METHODS))
    tables = capsys.readouterr().out.split("After")[1:]
    assert len(tables) == 2 and "diverged" in tables[1].split("\npre_diag")[1].splitlines()[0]
    for first, second in (results[name] for name in results if name != "pre_diag"):
        assert first["bpb"] != second["bpb"] and max(first["gap"], second["gap"]) < 1e-5
    row = {name: rows[0] for name, rows in results.items()}
    assert row["sora"]["defect"] < 1e-6 < row["sora_first_order"]["defect"]


@pytest.mark.parametrize("line", ["--reach --quick", "--bench --seeds 2", "--device none"])
def test_a_flag_that_a_mode_does_not_read_is_refused(line, script):
    with pytest.raises(SystemExit, match="2"):
        script(line)


def test_reach_and_bench_print_their_rows_on_any_console(script, monkeypatch):
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding="cp1252"))
    script("--reach"), script("--bench")
    lines = sys.stdout.buffer.getvalue().decode("cp1252").splitlines()
    for line in lines[2:6]:
        lora, *_, sora, bound = map(float, line.split()[-6:])
        assert abs(lora - bound) < 0.03 and sora < 0.1
    names = ["linear", *METHODS, "sora first_order"]
    assert [line[:16].strip() for line in lines[9:]] == names


# ---- the README

HERE = pathlib.Path(__file__).parent
README = (HERE / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.S)


def table(heading):
    """The cells of the first table under a heading, row by row."""
    lines = README.split(f"\n## {heading}\n", 1)[1].splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("|"))
    return [line.strip("|").split(" | ") for line in lines[start + 2:lines.index("", start)]]


def test_the_readme_names_tests_that_exist_and_lines_that_are_right():
    for row in table("Equation, code, proof"):
        assert re.search(r"`test_\w+`", row[2]), row
    for name in re.findall(r"`(test_\w+)`", README):
        assert callable(globals()[name]), name
    links = re.findall(r"\[`([\w.]+)`\]\(minisora\.py#L(\d+)\)", README)
    assert {cls.__name__ for cls in METHODS.values()} <= {name for name, _ in links}
    for name, line in links:
        assert inspect.getsourcelines(getattr(minisora, name))[1] == int(line), name


@pytest.mark.parametrize("block", BLOCKS, ids=range(len(BLOCKS)))
def test_the_readmes_python_blocks_run_and_leave_no_file_behind(block, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(minisora, "METHODS", dict(METHODS))
    exec(block, {})
    assert not list(tmp_path.iterdir())


@every_method
def test_a_class_copies_out_with_the_names_the_readme_says_and_no_fewer(method):
    """It trains to the same weight; without one of the names it fails."""
    layer = disturb(METHODS[method](nn.Linear(7, 5)))
    rows = table("Copy one layer out")
    names = {row[0].strip("` "): re.findall(r"`(\w+)`", row[1]) for row in rows}

    def copied(names):
        namespace = {"copy": copy, "nn": nn, "torch": torch}
        for name in names:
            value = getattr(minisora, name)
            exec(inspect.getsource(value) if callable(value) else f"{name} = {value}", namespace)
        twin = namespace[type(layer).__name__](copy.deepcopy(layer.base))
        twin.load_state_dict(layer.state_dict())
        return train(twin), twin.merge().weight
    names = names[type(layer).__name__]
    assert all(map(torch.equal, copied(names), (train(layer), layer.weight)))
    for spare in names:
        with pytest.raises((NameError, KeyError)):
            copied([name for name in names if name != spare])
