"""What minisora states about its layers, one property a test. Each can fail.

    python -m pytest                                                deterministic, about a minute
    python -m pytest -p test_minisora --hypothesis-profile long     a random search, much longer

The oracle is float64 NumPy written from the equations; nothing of the module is in it. Every tolerance is
k · ε · size (`assert_close`): ε of the dtype, k the number of roundings on the longest path, and size the
same formula with each term replaced by its absolute value, so that a wrong factor has nowhere to hide.
"""
import copy
import inspect
import io
import json
import math
import os
import pathlib
import pickle
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from torch import nn
from torch.nn.utils import prune
from torch.utils.checkpoint import checkpoint

import minisora
import train_tiny
from minisora import (METHODS, DoRALinear, DoRAMatrixLinear, LoRALinear, PreDiagLinear, SORALinear, adapt,
                      adapter_state_dict, load_adapter_state_dict, merge_adapters, rotation_factors,
                      singular_value_entropy, stable_rank)

for profile in ("default", "ci"):
    settings.register_profile(profile, derandomize=True, database=None, deadline=None, max_examples=25)
settings.register_profile("long", derandomize=False, deadline=None, max_examples=1000, print_blob=True)


def pytest_configure(config):
    """With -p test_minisora: the profiles are known now; import the tests again, under the chosen one."""
    del sys.modules[__name__]


pytestmark = pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")

KINDS = {
    "lora": (LoRALinear, {}),
    "dora": (DoRALinear, {}),
    "dora, full": (DoRALinear, {"detach_norm": False}),
    "dora_matrix": (DoRAMatrixLinear, {}),
    "dora_matrix, full": (DoRAMatrixLinear, {"detach_norm": False}),
    "pre_diag": (PreDiagLinear, {}),
    "sora, exp": (SORALinear, {"rotation": "exp"}),
    "sora, cayley": (SORALinear, {"rotation": "cayley"}),
    "sora, first_order": (SORALinear, {"rotation": "first_order"}),
}
DORAS = [kind for kind in KINDS if kind.startswith("dora")]
SORAS = [kind for kind in KINDS if kind.startswith("sora")]
ROTATIONS = ["sora, exp", "sora, cayley"]

every_kind = pytest.mark.parametrize("kind", KINDS)
every_device = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(
    not torch.cuda.is_available(), reason="no CUDA device here"))])
wide_dtypes = st.sampled_from([torch.float32, torch.float64])


# ---------------------------------------------------------------------------------- cases

def make(kind, m=5, n=7, r=3, alpha=5, r_p=2, bias=True, dtype=torch.float64, device="cpu", seed=0,
         trained=True, rows=None, zero_rows=()):
    """A layer with every tensor drawn from seed; rows: a power of two for each row of W0, another for B's."""
    rng = np.random.default_rng(seed)

    def draw(*shape):
        return torch.from_numpy(rng.uniform(-1, 1, shape))

    base = nn.Linear(n, m, bias=bias).to(device, torch.float64)
    with torch.no_grad():
        base.weight.copy_(draw(m, n))
        if bias:
            base.bias.copy_(draw(m))
        if rows is not None:
            base.weight.mul_(2.0 ** torch.tensor(rows[:m], device=device)[:, None])
        base.weight[list(zero_rows)] = 0
    cls, kwargs = KINDS[kind]
    layer = cls(base.to(dtype), r, alpha, **kwargs, **({"r_p": r_p} if cls is SORALinear else {}))
    if trained:
        with torch.no_grad():
            for name, p in layer.named_parameters(recurse=False):
                p.copy_(draw(*p.shape) * (1 if name != "magnitude" else p.cpu() + 0.1))
            if rows is not None:
                layer.B.mul_(2.0 ** torch.tensor(rows[m:], device=device)[:, None])
    return layer


@st.composite
def layers(draw, kind, device="cpu", dtypes=wide_dtypes, trained=True, scaled=True, **fixed):
    """Any small layer: sizes from 1 up, r above min(m, n) too, α ≠ r, rows of any scale and of zeros."""
    m, n = fixed.pop("m", None) or draw(st.integers(1, 7)), draw(st.integers(1, 7))
    r, alpha = draw(st.integers(1, 9)), draw(st.sampled_from([0.5, 3, 10, 16]))
    powers = st.sampled_from([0, 0, -20, -7, 5, 20])
    rows = draw(st.lists(powers, min_size=2 * m, max_size=2 * m)) if scaled else None
    zero_rows = draw(st.sets(st.integers(0, m - 1), max_size=2)) if scaled else ()
    return make(kind, m, n, r, alpha, draw(st.integers(1, 4)), draw(st.booleans()), draw(dtypes), device,
                draw(st.integers(0, 2**31)), trained, rows, zero_rows, **fixed)


def inputs(layer, *shape, seed=1, scale=1.0):
    x = np.random.default_rng(seed).uniform(-scale, scale, (*shape, layer.in_features))
    return torch.from_numpy(x).to(layer.base.weight)


def array(tensor):
    return tensor.detach().double().cpu().numpy()


# ---------------------------------------------------------------------------------- the oracle

def skew(C, D):
    """P = s_P (DCᵀ − CDᵀ) and q ≥ ‖U‖‖V‖, the size of its thin factors [D C] and s_P [C −D]."""
    s_P = min(1.0, 1.0 / (np.sqrt((C * C).sum()) + np.sqrt((D * D).sum()) + 1e-6))
    return s_P * (D @ C.T - C @ D.T), s_P * (np.sqrt((D * D).sum()) + np.sqrt((C * C).sum())) ** 2


def rotation(P, kind):
    """R from the dense P: exp by the eigenvalues of the Hermitian iP, Cayley by a dense solve."""
    I = np.eye(len(P))
    if kind.endswith("exp"):
        angles, Q = np.linalg.eigh(1j * P)
        return ((Q * np.exp(-1j * angles)) @ Q.conj().T).real
    return np.linalg.solve(I - P / 2, I + P / 2) if kind.endswith("cayley") else I + P


def oracle(layer, kind):
    """W' (m, n) and its size, the sum of the absolute values of all terms that were added up for it."""
    p = {name: array(t) for name, t in layer.named_parameters()}
    W0, s = p["base.weight"], layer.lora_alpha / layer.r
    update, size = s * p["B"] @ p["A"], s * np.abs(p["B"]) @ np.abs(p["A"])
    if kind == "lora":
        return W0 + update, np.abs(W0) + size
    if kind in DORAS:
        V, size = W0 + update, np.abs(W0) + size
        norm = np.sqrt((V * V).sum(axis=1, keepdims=True))
        d = np.divide(p["magnitude"][:, None], norm, out=np.zeros_like(norm), where=norm > 0)
        # ‖V‖² comes from terms that are this much larger than their sum; d inherits the relative error.
        loss = np.divide((size * size).sum(axis=1, keepdims=True), norm**2, out=np.zeros_like(norm), where=norm > 0)
        return d * V, np.abs(d) * size * (1 + loss)
    d = p["diag"][:, None]
    M, size = d * W0 + update, np.abs(d * W0) + size
    if kind == "pre_diag":
        return M, size
    P, q = skew(p["C"], p["D"])
    # Both cores are at most 1 + q/2 in norm, since e^{tP} and (I − P/2)⁻¹ are at most 1: so R passes through
    # terms of size 1 + q (1 + q/2) ≤ (1 + q)². A rotation mixes rows, so a column counts by its norm.
    return rotation(P, kind) @ M, (1 + q) ** 2 * np.sqrt((size**2).sum(axis=0)) * np.ones((len(M), 1))


def roundings(layer):
    """More than the longest path through any layer: sums over n, r, m and 2r_p, and some single operations."""
    return layer.in_features + 2 * layer.r + 2 * layer.out_features + 4 * getattr(layer, "r_p", 0) + 16


def assert_close(actual, exact, size, k, eps=None):
    """|actual − exact| ≤ k · ε · size in every entry."""
    eps = eps or torch.finfo(actual.dtype).eps
    actual, exact, size = array(actual), np.asarray(exact), np.asarray(size)
    assert actual.shape == exact.shape, (actual.shape, exact.shape)
    tiny = np.finfo(np.float32).tiny if eps > 1e-10 else np.finfo(np.float64).tiny  # what underflow may lose
    error, bound = np.abs(actual - exact), k * (eps * size + tiny)
    assert (error <= bound).all(), f"off by {np.max(error / bound):.3g} times the bound {bound.max():.3g}"


# ---------------------------------------------------------------------------------- all five layers

@every_kind
@every_device
@given(data=st.data())
def test_the_adapted_weight_is_W0_at_step_0_bit_for_bit(kind, device, data):
    layer = data.draw(layers(kind, device, trained=False))
    assert torch.equal(layer.adapted_weight(), layer.base.weight)


@every_kind
@every_device
@given(data=st.data())
def test_the_adapted_weight_is_the_equation(kind, device, data):
    """W' against the float64 oracle, rows scaled by powers of two from 2⁻²⁰ to 2²⁰."""
    layer = data.draw(layers(kind, device))
    exact, size = oracle(layer, kind)
    assert_close(layer.adapted_weight(), exact, size, roundings(layer))


@every_kind
@every_device
@given(data=st.data())
def test_the_cheap_path_is_the_dense_path_in_value(kind, device, data):
    """layer(x) = x W'ᵀ + b, against the oracle's W'."""
    layer = data.draw(layers(kind, device))
    x = inputs(layer, 3, scale=2.0 ** data.draw(st.sampled_from([-20, 0, 20])))
    W, size = oracle(layer, kind)
    b = array(layer.base.bias) if layer.base.bias is not None else 0.0
    assert_close(layer(x), array(x) @ W.T + b, np.abs(array(x)) @ size.T + np.abs(b), roundings(layer))


def gradients(output, G, layer, x):
    wanted = {"x": x, **{name: p for name, p in layer.named_parameters() if p.requires_grad}}
    return dict(zip(wanted, torch.autograd.grad((output * G).sum(), list(wanted.values()))))


@every_kind
@every_device
@given(data=st.data())
def test_the_cheap_path_is_the_dense_path_in_gradient(kind, device, data):
    """The gradient of every adapter tensor and of x, by the cheap path and through adapted_weight()."""
    layer = data.draw(layers(kind, device, st.just(torch.float64), scaled=False))
    x, G = inputs(layer, 4).requires_grad_(), inputs(layer, 4, seed=2).sum(-1, keepdim=True)
    cheap = gradients(layer(x), G, layer, x)
    dense = gradients(F.linear(x, layer.adapted_weight(), layer.base.bias), G, layer, x)
    # A gradient is x, G and a derivative of W', which is of the size of W' or of its square over the terms.
    size = np.linalg.norm(array(x)) * np.linalg.norm(array(G)) * (1 + np.linalg.norm(oracle(layer, kind)[1])) ** 2
    for name in cheap:
        assert_close(cheap[name], array(dense[name]), size, roundings(layer))


@every_kind
@given(data=st.data())
def test_the_output_at_zero_is_the_bias_exactly(kind, data):
    """All five methods act on the weight alone: f(0) = b bit for bit, however the adapter was trained."""
    layer = data.draw(layers(kind))
    b = layer.base.bias if layer.base.bias is not None else torch.zeros_like(layer.B[:, 0])
    assert torch.equal(layer(torch.zeros_like(inputs(layer, 2))), b.expand(2, -1))


@every_kind
@given(data=st.data())
def test_the_layer_is_affine(kind, data):
    """f(3x − 2z) = 3f(x) − 2f(z): exactly x W'ᵀ + b, in training mode too."""
    layer = data.draw(layers(kind, scaled=False))
    x, z = inputs(layer, 2, seed=1), inputs(layer, 2, seed=2)
    size = 10 * np.abs(oracle(layer, kind)[1]).sum() + 10
    assert_close(layer(3 * x - 2 * z), array(3 * layer(x) - 2 * layer(z)), size, roundings(layer))


@every_kind
@every_device
@given(data=st.data())
def test_merging_gives_a_plain_linear_of_the_same_function(kind, device, data):
    """merge() is W' in W0's dtype and a copy of b; W0, the layer and the random state stay bit for bit."""
    layer = data.draw(layers(kind, device))
    layer.train(data.draw(st.booleans()))
    before, state = copy.deepcopy(layer.state_dict()), torch.get_rng_state()
    merged, again = layer.merge(), layer.merge()
    assert type(merged) is nn.Linear and merged.training == layer.training
    assert torch.equal(merged.weight, layer.adapted_weight()) and torch.equal(merged.weight, again.weight)
    assert not any(p.requires_grad for p in merged.parameters())
    assert (merged.bias is None) == (layer.base.bias is None)
    for p in merged.parameters():  # nothing is shared with the layer
        p.data.fill_(7)
    assert all(torch.equal(before[name], t) for name, t in layer.state_dict().items())
    assert torch.equal(state, torch.get_rng_state())


@every_kind
def test_every_gradient_is_right(kind):
    """gradcheck in float64. (A detached norm is no derivative of the layer: its gradient has a test of its own.)"""
    if kind in ("dora", "dora_matrix"):
        kind += ", full"
    layer = make(kind, m=4, n=3, r=2, r_p=1)
    x = inputs(layer, 2).requires_grad_()
    names, tensors = zip(*((name, p) for name, p in layer.named_parameters() if p.requires_grad))

    def f(x, *tensors):
        return torch.func.functional_call(layer, dict(zip(names, tensors)), (x,))
    assert torch.autograd.gradcheck(f, (x, *tensors))
    assert torch.autograd.gradcheck(lambda *tensors: torch.func.functional_call(
        Dense(layer), {"layer." + name: t for name, t in zip(names, tensors)}, ()), tensors)


class Dense(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self):
        return self.layer.adapted_weight()


@every_kind
def test_the_first_gradient_reaches_all_that_should_train(kind):
    """At step 0 B, magnitude, diag, C and D get a gradient; A gets exactly none, since B = 0."""
    layer = make(kind, trained=False)
    x = inputs(layer, 4)
    layer(x).square().sum().backward()
    for name, p in layer.named_parameters(recurse=False):
        assert p.grad.any() == (name != "A"), name
    assert layer.base.weight.grad is None and layer.base.bias.grad is None


def train(layer, steps=5, lr=0.1):
    x = inputs(layer, 16)
    target = inputs(layer, 16, seed=5).sum(-1, keepdim=True)
    optimizer = torch.optim.SGD([p for p in layer.parameters() if p.requires_grad], lr=lr)
    losses = []
    for _ in range(steps):
        loss = (layer(x) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@every_kind
def test_training_lowers_the_loss_and_changes_the_adapter_alone(kind):
    layer = make(kind, trained=False)
    before = copy.deepcopy(layer.state_dict())
    losses = train(layer)
    assert losses[-1] < losses[0]
    for name, t in layer.state_dict().items():
        assert torch.equal(t, before[name]) == name.startswith("base."), name


@every_kind
def test_state_dict_deepcopy_pickle_and_torch_save_are_bit_for_bit(kind):
    layer = make(kind)
    buffer = io.BytesIO()
    torch.save(layer.state_dict(), buffer)
    buffer.seek(0)
    loaded = make(kind, seed=9)  # W0 differs as well
    loaded.load_state_dict(torch.load(buffer, weights_only=True))
    x = inputs(layer, 3)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), loaded):
        assert torch.equal(twin(x), layer(x)) and torch.equal(twin.adapted_weight(), layer.adapted_weight())


@every_kind
@every_device
def test_x_of_any_shape(kind, device):
    """1, 2, 3 and 4 dimensions, an empty batch, transposed and expanded views: row by row the same function."""
    layer = make(kind, device=device)
    rows = inputs(layer, 6)
    flat = layer(rows)

    def same(y, expected):
        assert_close(y, array(expected), (1 + np.abs(oracle(layer, kind)[1])).sum(), roundings(layer))
    same(layer(rows[0]), flat[0])
    same(layer(rows.view(2, 3, -1)), flat.view(2, 3, -1))
    same(layer(rows.view(1, 2, 3, -1)), flat.view(1, 2, 3, -1))
    same(layer(rows.T.contiguous().T), flat)
    same(layer(rows[0].expand(4, -1)), flat[0].expand(4, -1))
    empty = layer(rows[:0].requires_grad_())
    assert empty.shape == (0, layer.out_features)
    empty.sum().backward()
    assert all(not p.grad.any() for p in layer.parameters() if p.requires_grad and p.grad is not None)


@every_kind
@every_device
@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
@given(data=st.data())
def test_a_half_precision_base(kind, device, half, data):
    """Adapters in float32, y in the base's dtype, right to its precision; W' in float32, cast once to merge."""
    layer = data.draw(layers(kind, device, st.just(half), scaled=False))
    assert all(p.dtype == torch.float32 for p in layer.parameters() if p.requires_grad)
    W, size = oracle(layer, kind)
    assert layer.adapted_weight().dtype == torch.float32
    assert_close(layer.adapted_weight(), W, size, roundings(layer))
    assert torch.equal(layer.merge().weight, layer.adapted_weight().to(half))
    x = inputs(layer, 3)
    b = array(layer.base.bias) if layer.base.bias is not None else 0.0
    y = layer(x)
    assert y.dtype == layer.base(x).dtype == half
    assert_close(y, array(x) @ W.T + b, np.abs(array(x)) @ size.T + np.abs(b), 16)  # sums are kept in float32


@every_kind
@every_device
@pytest.mark.parametrize("half_x", [False, True])
@given(data=st.data())
def test_autocast(kind, device, half_x, data):
    """Under autocast y has the base's dtype and its precision; weights, norms and rotations stay in float32."""
    layer = data.draw(layers(kind, device, st.just(torch.float32), scaled=False))
    W, size = oracle(layer, kind)
    x = inputs(layer, 3).bfloat16()
    x = x if half_x else x.float()
    thin = getattr(layer, "thin_row_scale", getattr(layer, "up_and_down", layer.adapted_weight))
    plain, merged, factors = layer.adapted_weight(), layer.merge(), thin()
    b = array(layer.base.bias) if layer.base.bias is not None else 0.0
    with torch.autocast(device, dtype=torch.bfloat16):
        y = layer(x)
        assert y.dtype == layer.base(x).dtype == torch.bfloat16
        assert torch.equal(layer.adapted_weight(), plain) and torch.equal(layer.merge().weight, merged.weight)
        assert all(torch.equal(a, b) for a, b in zip(thin(), factors))
    assert_close(y, array(x) @ W.T + b, np.abs(array(x)) @ size.T + np.abs(b), 16)


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_dora_matrix_scale_on_a_half_precision_base_is_1_at_step_0_to_float32_accuracy(half):
    layer = make("dora_matrix", m=9, n=33, dtype=half, trained=False)
    assert_close(layer.thin_row_scale(), np.ones(9), 1, 33)


def test_bfloat16_does_not_round_a_small_diagonal_step_away():
    """d = 1.003 is 1 in bfloat16; the layer keeps d in float32, so that the outputs grow by 0.3 % on average."""
    layer = make("pre_diag", dtype=torch.bfloat16, trained=False, bias=False)
    x = inputs(layer, 512, scale=2.0)
    with torch.no_grad():
        layer.diag.fill_(1.003)
    y, y0 = array(layer(x)), array(layer.base(x))
    assert 1.002 < (y * y0).sum() / (y0 * y0).sum() < 1.004


@every_kind
def test_compile_in_one_graph_and_checkpointing_change_nothing(kind):
    """torch.compile(fullgraph=True) and checkpoint(use_reentrant=False): values and gradients."""
    layer = make(kind)
    x, G = inputs(layer, 4).requires_grad_(), 1.0
    y = layer(x)
    plain = gradients(y, G, layer, x)
    torch.compiler.reset()
    for again in (torch.compile(layer, fullgraph=True, backend="aot_eager")(x),
                  checkpoint(layer, x, use_reentrant=False)):
        size = (1 + np.abs(oracle(layer, kind)[1])).sum() ** 2
        assert_close(again, array(y), size, roundings(layer))
        for name, g in gradients(again, G, layer, x).items():
            assert_close(g, array(plain[name]), size, roundings(layer))


@pytest.mark.parametrize("name", METHODS)
def test_every_class_has_the_interface_of_the_linear_it_stands_for(name):
    """weight and bias read as W' and b, so that code which looks past forward sees the adapted layer."""
    layer = make(next(kind for kind in KINDS if KINDS[kind][0] is METHODS[name]), m=4, n=6, dtype=torch.bfloat16)
    assert (layer.out_features, layer.in_features) == (4, 6)
    assert torch.equal(layer.weight, layer.merge().weight) and layer.bias is layer.base.bias


# ---------------------------------------------------------------------------------- LoRA

@given(layer=layers("lora", dtypes=st.just(torch.float64), scaled=False))
def test_lora_update_has_rank_at_most_r(layer):
    S = np.linalg.svd(array(layer.adapted_weight() - layer.W0), compute_uv=False)
    assert (S[layer.r:] <= roundings(layer) * np.finfo(float).eps * np.abs(oracle(layer, "lora")[1]).sum()).all()


@given(layer=layers("lora"), c=st.integers(2, 5))
def test_lora_scaling_alpha_and_r_together_changes_nothing(layer, c):
    """s = α / r: a layer of rank cr and lora_alpha cα with the same A and B, padded by zeros, has the same W'."""
    wide = LoRALinear(layer.base, c * layer.r, c * layer.lora_alpha)
    with torch.no_grad():
        wide.A.zero_()[:layer.r] = layer.A
        wide.B.zero_()[:, :layer.r] = layer.B
    assert_close(wide.adapted_weight(), *oracle(layer, "lora"), roundings(wide))


@given(layer=layers("lora", dtypes=st.just(torch.float64), scaled=False), seed=st.integers(0, 2**31))
def test_lora_depends_on_the_product_BA_alone(layer, seed):
    """B → BG, A → G⁻¹A for an invertible G."""
    W, size = oracle(layer, "lora")
    Q = np.linalg.qr(np.random.default_rng(seed).standard_normal((layer.r, layer.r)))[0]
    G = torch.from_numpy(Q * np.linspace(1, 2, layer.r))
    with torch.no_grad():
        layer.B.copy_(layer.B @ G)
        layer.A.copy_(torch.linalg.inv(G) @ layer.A)
    assert_close(layer.adapted_weight(), W, size.sum() * 2 * layer.r, roundings(layer))


# ---------------------------------------------------------------------------------- DoRA

@pytest.mark.parametrize("kind", DORAS)
@given(data=st.data())
def test_dora_row_norms_are_the_magnitude(kind, data):
    layer = data.draw(layers(kind))
    norms = np.linalg.norm(array(layer.adapted_weight()), axis=1)
    W, size = oracle(layer, kind)
    alive = np.abs(W).sum(axis=1) > 0
    exact = np.abs(array(layer.magnitude)) * alive
    assert_close(torch.from_numpy(norms), exact, np.linalg.norm(size, axis=1), roundings(layer),
                 torch.finfo(layer.A.dtype).eps)


@pytest.mark.parametrize("kind", DORAS)
@given(data=st.data(), c=st.sampled_from([2.0**-10, 0.5, 2.0, 2.0**10]))
def test_dora_ignores_the_scale_of_the_direction(kind, data, c):
    """(W0, B) → (cW0, cB) changes nothing: exactly, for a power of two."""
    layer = data.draw(layers(kind, scaled=False))
    x = inputs(layer, 3)
    W, y = layer.adapted_weight(), layer(x)
    with torch.no_grad():
        layer.base.weight.mul_(c)
        layer.B.mul_(c)
    assert torch.equal(layer.adapted_weight(), W)
    assert_close(layer(x), array(y), np.abs(array(x)) @ oracle(layer, kind)[1].T + 1, roundings(layer))


@pytest.mark.parametrize("full", ["", ", full"])
@every_device
@given(data=st.data())
def test_dora_original_and_matrix_form_agree_along_a_training_run(full, device, data):
    """The same values after k optimizer steps, detached or not: the two are one method."""
    original = data.draw(layers("dora" + full, device, st.just(torch.float64), trained=False, scaled=False))
    matrix = DoRAMatrixLinear(copy.deepcopy(original.base), original.r, original.lora_alpha, original.detach_norm)
    matrix.load_state_dict(original.state_dict())
    assert np.allclose(train(original, 8, 0.02), train(matrix, 8, 0.02), rtol=1e-11, atol=1e-13)
    for (name, p), q in zip(original.named_parameters(), matrix.parameters()):
        assert torch.allclose(p, q, rtol=1e-9, atol=1e-11), name


@pytest.mark.parametrize("kind", DORAS)
def test_dora_gradient_of_the_direction_is_as_in_the_DoRA_paper(kind):
    """With c = magnitude/‖v‖ and v̂ = v/‖v‖: ∂V = cG detached, c(G − ⟨G, v̂⟩v̂) in full; ∂magnitude = ⟨G, v̂⟩ in both."""
    layer = make(kind)
    x, Y = inputs(layer, 6), inputs(layer, 6, seed=3)[:, :layer.out_features]
    grads = gradients(layer(x.requires_grad_()), Y, layer, x)
    G, A, B, s = array(Y).T @ array(x), array(layer.A), array(layer.B), layer.scaling
    V = array(layer.base.weight) + s * B @ A
    norm = np.linalg.norm(V, axis=1, keepdims=True)
    along, c = (G * V / norm).sum(axis=1, keepdims=True), array(layer.magnitude)[:, None] / norm
    dV = c * (G - along * V / norm if kind.endswith("full") else G)
    size = (np.abs(array(Y)).T @ np.abs(array(x))).sum() * (1 + np.abs(c).max()) * (1 + s) * 10
    assert_close(grads["magnitude"], along[:, 0], size, roundings(layer))
    assert_close(grads["B"], s * dV @ A.T, size, roundings(layer))
    assert_close(grads["A"], s * B.T @ dV, size, roundings(layer))


@pytest.mark.parametrize("kind", DORAS)
@every_device
@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("dead", [[1], [0, 3], range(5)])
def test_dora_rows_of_zeros_stay_finite(kind, device, trained, dead):
    """A pruned row of W0, or an all-zero W0, is 0/0 in the equation: here finite, in value and in gradient."""
    layer = make(kind, device=device, trained=trained, zero_rows=dead)
    x = inputs(layer, 4).requires_grad_()
    with torch.no_grad():
        layer.B[dead[0]] = 0  # V = 0 in this row, whatever its magnitude
    y = layer(x)
    assert y.isfinite().all() and layer.adapted_weight().isfinite().all() and layer.merge().weight.isfinite().all()
    assert torch.equal(y[:, dead[0]], layer.base.bias[dead[0]].expand(4))
    for name, g in gradients(y.square(), 1.0, layer, x).items():
        assert g.isfinite().all(), name
    train(layer, 3)
    assert layer(x).isfinite().all()


@every_device
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("digits", [0, 1, 40, 100, 1000, 1e5])
def test_dora_matrix_norm_where_the_sum_nearly_vanishes(dtype, digits, device):
    """W0 + sBA = δW0 in one row, with δ² = digits · ε: an error of ε/δ² in the norm, at worst a row twice too long.

    Below δ² = ε nothing is known of the norm; holding it there keeps the row as long as its magnitude at most,
    where an unheld norm could be anything, zero or the root of a negative number included.
    """
    if digits * torch.finfo(dtype).eps > 0.5:
        return
    eps = torch.finfo(dtype).eps
    delta = math.sqrt(digits * eps)
    for seed in range(10):
        dense = make("dora", m=3, n=8, r=1, alpha=1, dtype=dtype, device=device, trained=False, bias=False, seed=seed)
        with torch.no_grad():
            dense.A.copy_(dense.base.weight[1:2])
            dense.B[1] = delta - 1
        matrix = DoRAMatrixLinear(dense.base, 1, 1)
        matrix.load_state_dict(dense.state_dict())
        x, magnitude = inputs(dense, 64), array(dense.magnitude)[1]
        length = np.linalg.norm(array(x), axis=1) * magnitude
        if digits > 10:
            error = np.abs(array(matrix(x))[:, 1] - array(dense(x))[:, 1])
            assert (error <= 8 * eps / delta**2 * length + eps * length).all()
        assert (np.abs(array(matrix(x))[:, 1]) <= 2 * length).all()
        longest = magnitude / np.linalg.norm(array(dense.base.weight)[1]) / math.sqrt(eps)
        assert 0 < array(matrix.thin_row_scale())[1] <= 1.001 * longest
        assert_close(matrix(x)[:, [0, 2]], array(dense(x))[:, [0, 2]], length.max() * 4, 32)


@every_device
def test_only_the_original_dora_forms_a_second_weight_matrix(device):
    """No tensor with m·n entries is made in forward or backward; the original form makes several."""
    def largest(kind):
        layer = make(kind, m=48, n=40, dtype=torch.bfloat16, device=device)
        x = inputs(layer, 2).requires_grad_()
        sizes = [0]

        class Watch(torch.utils._python_dispatch.TorchDispatchMode):
            def __torch_dispatch__(self, func, types, args=(), kwargs=None):
                out = func(*args, **(kwargs or {}))
                fresh = torch.is_tensor(out) and out.untyped_storage().data_ptr() != layer.base.weight.data_ptr()
                sizes.append(out.numel() if fresh else 0)
                return out
        with Watch():
            layer(x).sum().backward()
        return max(sizes)
    assert largest("dora") >= 48 * 40
    assert all(largest(kind) < 48 * 40 for kind in KINDS if not kind.startswith("dora,") and kind != "dora")


# ---------------------------------------------------------------------------------- Pre-Diag

@given(layer=layers("pre_diag"))
def test_pre_diag_at_d_1_is_lora(layer):
    lora = LoRALinear(layer.base, layer.r, layer.lora_alpha)
    with torch.no_grad():
        layer.diag.fill_(1)
        lora.A.copy_(layer.A)
        lora.B.copy_(layer.B)
    assert torch.equal(layer.adapted_weight(), lora.adapted_weight())
    assert torch.equal(layer(inputs(layer, 3)), lora(inputs(layer, 3)))


@given(layer=layers("pre_diag", dtypes=st.just(torch.float64), scaled=False))
def test_pre_and_post_diagonal_reach_the_same_weights(layer):
    """diag(d) W0 + sBA = diag(d)(W0 + s(B/d)A), a DoRA of magnitude d‖W0 + s(B/d)A‖: one set, trained differently."""
    with torch.no_grad():
        layer.diag.add_(1.5 * layer.diag.sign())  # away from 0
    dora = DoRALinear(layer.base, layer.r, layer.lora_alpha)
    d = layer.diag[:, None]
    with torch.no_grad():
        dora.A.copy_(layer.A)
        dora.B.copy_(layer.B / d)
        V = layer.W0 + layer.scaling * dora.B @ dora.A
        dora.magnitude.copy_(layer.diag * V.norm(dim=1))
    assert_close(dora.adapted_weight(), *oracle(layer, "pre_diag"), roundings(layer))


# ---------------------------------------------------------------------------------- SORA

def factors_of(m, r_p, scale, seed, near="any"):
    """C and D (m, r_p) of a scale; D drawn freely, close to C, or parallel to it."""
    rng = np.random.default_rng(seed)
    C = rng.uniform(-scale, scale, (m, r_p))
    D = {"any": rng.uniform(-scale, scale, (m, r_p)), "close": C + 1e-3 * rng.uniform(-scale, scale, (m, r_p)),
         "parallel": 1.5 * C}[near]
    return C, D


def sora(C, D, kind, dtype=torch.float64, device="cpu"):
    layer = make(kind, m=len(C), r_p=C.shape[1], dtype=dtype, device=device)
    with torch.no_grad():
        layer.C.copy_(torch.from_numpy(C))
        layer.D.copy_(torch.from_numpy(D))
    return layer


@pytest.mark.parametrize("kind", SORAS)
@given(data=st.data())
def test_sora_at_P_0_is_pre_diag(kind, data):
    """D = C: R = I exactly, the factors as they may be."""
    layer = data.draw(layers(kind))
    pre = PreDiagLinear(layer.base, layer.r, layer.lora_alpha)
    with torch.no_grad():
        layer.D.copy_(layer.C)
        for name, p in pre.named_parameters(recurse=False):
            p.copy_(getattr(layer, name))
    assert torch.equal(layer.rotation_matrix(), torch.eye(layer.out_features, dtype=layer.A.dtype))
    assert torch.equal(layer.adapted_weight(), pre.adapted_weight())


@given(layer=layers("sora, first_order"))
def test_sora_P_is_skew(layer):
    """P + Pᵀ = 0, seen in I + P."""
    R = layer.rotation_matrix()
    q = skew(array(layer.C), array(layer.D))[1]
    assert_close(R + R.T, 2 * np.eye(len(R)), 1 + q, 4)


@pytest.mark.parametrize("kind", SORAS)
@every_device
@given(data=st.data(), seed=st.integers(0, 2**31), scale=st.sampled_from([1e-3, 0.3, 1.0, 30.0]), r_p=st.integers(1, 4))
def test_sora_rotation_is_the_dense_one(kind, device, data, seed, scale, r_p):
    """exp(P), (I − P/2)⁻¹(I + P/2) or I + P of the dense (m, m) P, r_p above m/2 too."""
    C, D = factors_of(data.draw(st.integers(1, 7)), r_p, scale, seed)
    P, q = skew(C, D)
    layer = sora(C, D, kind, data.draw(wide_dtypes), device)
    if layer.A.dtype == torch.float32:
        P, q = skew(array(layer.C), array(layer.D))
    assert_close(layer.rotation_matrix(), rotation(P, kind), (1 + q) ** 2, 16)
    if kind == "sora, exp":
        # Of a batch: alone, torch 2.13 errs by 2e-10 on a P of norm 0.05 (the module's block has norm 1 or more).
        exact = torch.linalg.matrix_exp(torch.from_numpy(np.stack([P, P])))[0]
        assert_close(layer.rotation_matrix(), exact, (1 + q) ** 2, 16)


@pytest.mark.parametrize("kind", ROTATIONS)
@every_device
@pytest.mark.parametrize("near", ["any", "close", "parallel"])
@pytest.mark.parametrize("of_C, of_D", [(1, 1), (1e3, 1e3), (1e5, 1e5), (1e3, 1e-3), (1e-3, 1e3), (10, 0.1), (0, 1)])
def test_sora_rotation_is_orthogonal_to_float32_accuracy(kind, device, near, of_C, of_D):
    """|RᵀR − I| ≤ ε and det R = +1 for float32 factors of any sizes: of R, and of I + LVᵀ as the forward applies it.

    A float32 core loses up to six digits here; E = D − C, without τ, all of them where C is much the larger.
    """
    for seed in range(3):
        C, D = factors_of(64, 4, 1, seed, near)
        layer = sora(of_C * C, of_D * D, kind, torch.float32, device)
        L, V = (array(factor.float()) for factor in rotation_factors(layer.C, layer.D, layer.rotation))
        for R in (array(layer.rotation_matrix()), np.eye(64) + L @ V.T):
            assert_close(torch.from_numpy(R.T @ R), np.eye(64), 1, 1, 2.0**-23)
            assert np.isclose(np.linalg.det(R), 1, atol=1e-5)


@pytest.mark.parametrize("kind", SORAS)
def test_sora_with_dead_factors_is_pre_diag_and_finite(kind):
    """C = D = 0, or a column of zeros in C alone: no division by its length."""
    layer = sora(np.zeros((5, 2)), np.zeros((5, 2)), kind)
    assert torch.equal(layer.rotation_matrix(), torch.eye(5).double())
    layer(inputs(layer, 3)).square().sum().backward()
    assert not layer.C.grad.any() and not layer.D.grad.any()
    C, D = factors_of(5, 2, 1.0, 0)
    C[:, 0] = 0
    layer = sora(C, D, kind)
    assert_close(layer.rotation_matrix(), rotation(skew(C, D)[0], kind), 10, 16)
    layer(inputs(layer, 3)).square().sum().backward()
    assert layer.C.grad.isfinite().all() and layer.D.grad.isfinite().all() and layer.C.grad[:, 0].any()


@pytest.mark.parametrize("kind", ROTATIONS)
@given(seed=st.integers(0, 2**31), scale=st.sampled_from([0.1, 1.0, 30.0]), near=st.sampled_from(["any", "close"]))
def test_sora_exchanging_C_and_D_inverts_the_rotation(kind, seed, scale, near):
    """R(−P) = R(P)ᵀ = R(P)⁻¹."""
    C, D = factors_of(6, 2, scale, seed, near)
    q = max(skew(C, D)[1], skew(D, C)[1])
    R, back = sora(C, D, kind).rotation_matrix(), sora(D, C, kind).rotation_matrix()
    assert_close(back, array(R.T), (1 + q) ** 2, 16)
    assert_close(R @ back, np.eye(6), (1 + q) ** 2, 16)


@pytest.mark.parametrize("kind", SORAS)
@pytest.mark.parametrize("length, s_P", [(1.0, 1 / (2 + 1e-6)), (0.25, 1.0), (40.0, 1 / (80 + 1e-6))])
def test_sora_turns_a_known_plane_by_a_known_angle(kind, length, s_P):
    """C = c·e1, D = c·e2: e1 turns towards e2 by θ = s_P c² (exp), 2 atan(θ/2) (Cayley). A transpose would turn back."""
    C, D = length * np.eye(5)[:, :1], length * np.eye(5)[:, 1:2]
    theta = s_P * length**2
    exact = np.eye(5)
    angle = {"sora, exp": theta, "sora, cayley": 2 * math.atan(theta / 2)}.get(kind)
    exact[:2, :2] = ([[1, -theta], [theta, 1]] if angle is None else
                     [[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    assert_close(sora(C, D, kind).rotation_matrix(), exact, (1 + theta) ** 2, 16)


@pytest.mark.parametrize("kind", ROTATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sora_stays_orthogonal_through_training(kind, dtype):
    """RᵀR = I and det R = +1 after optimizer steps that turned R well away from I."""
    layer = make(kind, m=12, n=12, r_p=3, dtype=dtype, trained=False)
    optimizer = torch.optim.Adam([p for p in layer.parameters() if p.requires_grad], lr=0.05)
    x, y = inputs(layer, 32), inputs(layer, 32, seed=4)
    for _ in range(30):
        loss = (layer(x).float() - y.float()).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    R = array(layer.rotation_matrix())
    assert np.linalg.norm(R - np.eye(12), 2) > 0.3
    assert_close(torch.from_numpy(R.T @ R), np.eye(12), 2, 1, 2.0**-23)
    assert np.isclose(np.linalg.det(R), 1, atol=1e-5)


@pytest.mark.parametrize("kind", ROTATIONS)
@given(data=st.data())
def test_sora_keeps_singular_values_and_norms(kind, data):
    """The singular values of R (diag(d) W0 + sBA), and so all norms, are those of diag(d) W0 + sBA."""
    layer = data.draw(layers(kind, dtypes=st.just(torch.float64), scaled=False))
    M = array(layer.diag)[:, None] * array(layer.base.weight) + layer.scaling * array(layer.B) @ array(layer.A)
    S = torch.linalg.svdvals(layer.adapted_weight())
    assert_close(S, np.linalg.svd(M, compute_uv=False), oracle(layer, kind)[1].sum(), roundings(layer))


@given(seed=st.integers(0, 2**31), scale=st.sampled_from([0.1, 1.0, 30.0]))
def test_first_order_stretches_by_exactly_PtP(seed, scale):
    """(I + P)ᵀ(I + P) = I + PᵀP: with θ = ‖P‖₂ the defect is θ², the distance to the orthogonal matrices √(1+θ²) − 1."""
    C, D = factors_of(6, 2, scale, seed)
    P, q = skew(C, D)
    R = array(sora(C, D, "sora, first_order").rotation_matrix())
    theta, k = np.linalg.norm(P, 2), 32 * np.finfo(float).eps * (1 + q) ** 2
    assert abs(np.linalg.norm(R.T @ R - np.eye(6), 2) - theta**2) <= k
    Q, _, T = np.linalg.svd(R)  # QT is the nearest orthogonal matrix
    assert abs(np.linalg.norm(R - Q @ T, 2) - (math.sqrt(1 + theta**2) - 1)) <= k
    assert (np.linalg.svd(R, compute_uv=False) >= 1 - k).all()  # never shrinks a norm


@given(seed=st.integers(0, 2**31))
def test_exp_and_cayley_differ_by_a_twelfth_of_theta_cubed(seed):
    """‖exp(P) − Cayley(P)‖ = θ³/12 + O(θ⁵)."""
    C, D = factors_of(6, 2, 0.15, seed)
    theta = np.linalg.norm(skew(C, D)[0], 2)
    gap = sora(C, D, "sora, exp").rotation_matrix() - sora(C, D, "sora, cayley").rotation_matrix()
    assert abs(np.linalg.norm(array(gap), 2) - theta**3 / 12) <= theta**5 / 60 + 1e-14


@given(seed=st.integers(0, 2**31), scale=st.sampled_from([2.0, 64.0, 1024.0]))
def test_s_P_makes_the_angle_grow_linearly_but_does_not_bound_it(seed, scale):
    """Factors c times larger turn by an angle c times larger, once s_P < 1; without s_P it would be c²."""
    C, D = factors_of(6, 2, 8.0, seed)
    small, large = (sora(c * C, c * D, "sora, first_order").rotation_matrix() for c in (1.0, scale))
    ratio = np.linalg.norm(array(large) - np.eye(6)) / np.linalg.norm(array(small) - np.eye(6))
    assert abs(ratio / scale - 1) < 1e-6


def test_sora_starts_as_the_release_does():
    """C uniform on ±1/√m, D = C a tensor of its own, diag = 1."""
    torch.manual_seed(0)
    layer = make("sora, exp", m=400, r_p=8, trained=False)
    assert torch.equal(layer.C, layer.D) and layer.C.data_ptr() != layer.D.data_ptr() and (layer.diag == 1).all()
    assert 0.99 / 20 < layer.C.max() <= 1 / 20 and -1 / 20 <= layer.C.min() < -0.99 / 20
    assert abs(layer.C.mean()) < 0.1 / 20


def test_A_starts_kaiming_uniform_and_B_at_zero():
    """A uniform on ±1/√n (Kaiming with a = √5), as nn.Linear and loralib have it."""
    torch.manual_seed(0)
    layer = make("lora", n=400, r=8, trained=False)
    assert not layer.B.any() and layer.A.shape == (8, 400) and layer.B.shape == (5, 8)
    assert 0.99 / 20 < layer.A.max() <= 1 / 20 and -1 / 20 <= layer.A.min() < -0.99 / 20


# ---------------------------------------------------------------------------------- diagnostics

@given(k=st.integers(1, 5), scale=st.sampled_from([2.0**-126, 0.3, 2.0**126]), seed=st.integers(0, 2**31),
       dtype=wide_dtypes)
def test_diagnostics_of_k_equal_singular_values(k, scale, seed, dtype):
    """Entropy log k and stable rank k, whatever the scale and the rotations on both sides."""
    rng = np.random.default_rng(seed)
    Q, T = (np.linalg.qr(rng.standard_normal((size, size)))[0] for size in (7, 5))
    delta = torch.from_numpy(scale * Q[:, :k] @ T[:k]).to(dtype)
    assert_close(singular_value_entropy(delta), math.log(k), 64, 16)  # 5 stray values of ε log(1/ε) each
    assert_close(stable_rank(delta), k, k, 64)


@given(seed=st.integers(0, 2**31), m=st.integers(1, 6), n=st.integers(1, 6))
def test_diagnostics_are_their_formulas(seed, m, n):
    """−Σ p log p with p = σ/Σσ, ‖·‖²F/‖·‖²₂; both over leading dimensions too."""
    delta = np.random.default_rng(seed).standard_normal((2, m, n))
    S = np.linalg.svd(delta, compute_uv=False)
    p = S / S.sum(axis=1, keepdims=True)
    logs = np.log(p, out=np.zeros_like(p), where=p > 0)
    assert_close(singular_value_entropy(torch.from_numpy(delta)), -(p * logs).sum(axis=1), 4, 32)
    assert_close(stable_rank(torch.from_numpy(delta)), (delta**2).sum(axis=(1, 2)) / S[:, 0] ** 2, 6, 32)


def test_diagnostics_of_nothing_and_of_half_precision():
    assert singular_value_entropy(torch.zeros(3, 4)) == 0 and stable_rank(torch.zeros(3, 4)) == 0
    assert singular_value_entropy(torch.eye(3).bfloat16()).dtype == torch.float32
    assert stable_rank(torch.eye(3).half()) == 3


def test_a_lora_update_stays_below_log_r_and_a_conditioned_one_does_not():
    """The paper's first finding, as far as algebra goes: a diagonal lifts W' − W0 out of rank r."""
    entropy = {kind: singular_value_entropy(layer.adapted_weight() - layer.W0).item()
               for kind in KINDS for layer in [make(kind, m=24, n=24, r=2)]}
    assert entropy.pop("lora") <= math.log(2) + 1e-12
    assert min(entropy.values()) > 2 * math.log(2)


# ---------------------------------------------------------------------------------- models

class Attention(nn.Module):
    """q_proj and v_proj, a name that only ends alike, and an output that is used at two places."""

    def __init__(self):
        super().__init__()
        self.q_proj, self.v_proj, self.xq_proj = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)
        self.out = self.again = nn.Linear(6, 6, bias=False)

    def forward(self, x):
        return self.again(self.out(self.q_proj(x) * self.v_proj(x).tanh() + self.xq_proj(x)))


def model(method=None, targets=("q_proj", "v_proj"), seed=0, **kwargs):
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(6, 6), nn.ModuleDict({"attn": Attention()})["attn"], nn.LayerNorm(6))
    return adapt(net, method, targets, **kwargs) if method else net


def disturb(net, seed=3):
    """Any values in every adapter tensor."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for p in minisora.adapter_parameters(net).values():
            p.add_(0.3 * torch.randn_like(p))
    return net


def picture(net):
    """All that an operation which fails must leave as it was."""
    return ([(name, type(m), id(m)) for name, m in net.named_modules(remove_duplicate=False)],
            [(name, id(p), p.requires_grad, p.detach().clone().numpy().tobytes()) for name, p in net.named_parameters()])


@pytest.mark.parametrize("method", METHODS)
def test_adapt_freezes_the_model_and_wraps_what_the_names_match(method):
    """A name matches where it is the whole dotted name or its end after a dot, as in PEFT; kwargs reach the layer."""
    net = model()
    assert adapt(net, method, ["q_proj", "1.v_proj", "0"], r=3, lora_alpha=6) is net
    wrapped = {name for name, m in net.named_modules() if type(m) is METHODS[method]}
    assert wrapped == {"0", "1.q_proj", "1.v_proj"}
    assert net[0].r == 3 and net[0].scaling == 2.0 and net[0].A.shape == (3, 6)
    own = set(adapter_state_dict(net))
    assert own == {name for name, p in net.named_parameters() if p.requires_grad}
    letters = {"lora": "A B", "dora": "A B magnitude", "dora_matrix": "A B magnitude", "pre_diag": "A B diag",
               "sora": "A B diag C D"}[method].split()
    assert own == {f"{name}.{letter}" for name in wrapped for letter in letters}


def test_adapt_takes_one_name_as_it_takes_a_list():
    assert set(adapter_state_dict(model("lora", "q_proj"))) == {"1.q_proj.A", "1.q_proj.B"}


def test_the_order_of_the_names_changes_nothing():
    """A is drawn in the order of the model, so that a set of names, too, gives the same adapters each time."""
    states = [adapter_state_dict(model("sora", names)) for names in (["q_proj", "0"], ["0", "q_proj"], {"0", "q_proj"})]
    assert all(torch.equal(state[name], states[0][name]) for state in states for name in states[0])


def test_an_adapter_takes_over_whether_its_base_trains_or_evaluates():
    assert not adapt(model().eval(), "dora", ["q_proj"])[1].q_proj.training and model("dora")[1].q_proj.training


def test_a_state_made_of_the_models_own_tensors_is_copied_first():
    net = disturb(model("lora"))
    own = minisora.adapter_parameters(net)
    q, v = own["1.q_proj.A"], own["1.v_proj.A"]
    before = adapter_state_dict(net)
    load_adapter_state_dict(net, {**own, "1.q_proj.A": v, "1.v_proj.A": q})
    assert torch.equal(q, before["1.v_proj.A"]) and torch.equal(v, before["1.q_proj.A"])


def test_adapting_and_merging_use_the_defaults_of_the_design():
    assert METHODS == {"lora": LoRALinear, "dora": DoRALinear, "dora_matrix": DoRAMatrixLinear,
                       "pre_diag": PreDiagLinear, "sora": SORALinear}
    for method in METHODS:
        layer = model(method)[1].q_proj
        assert (layer.r, layer.lora_alpha, layer.scaling) == (8, 16, 2.0)
        assert getattr(layer, "detach_norm", True) is True
        assert (getattr(layer, "r_p", 4), getattr(layer, "rotation", "exp")) == (4, "exp")


@pytest.mark.parametrize("targets", ["out", "again", ["out", "again"]])
def test_a_linear_used_at_two_places_is_wrapped_once_and_stays_shared(targets):
    net = disturb(model("sora", targets))
    attn = net[1]
    assert attn.out is attn.again and type(attn.out) is SORALinear and type(attn.out.base) is nn.Linear
    assert len(adapter_state_dict(net)) == 5
    assert torch.equal(attn.out.C, disturb(model("sora", "out"))[1].out.C)  # drawn once, whatever the names
    x = torch.randn(3, 6)
    y = net(x)
    merge_adapters(net)
    assert attn.out is attn.again and type(attn.out) is nn.Linear
    assert torch.allclose(net(x), y, atol=1e-5)


def test_a_head_tied_to_the_embedding_leaves_the_embedding_alone():
    net = nn.ModuleDict({"embedding": nn.Embedding(9, 6), "head": nn.Linear(6, 9, bias=False)})
    net["head"].weight = net["embedding"].weight
    before = net["embedding"].weight.detach().clone()
    disturb(adapt(net, "dora_matrix", ["head"]))
    assert net["head"].base.weight is net["embedding"].weight
    merge_adapters(net)
    assert torch.equal(net["embedding"].weight, before) and not torch.equal(net["head"].weight, before)


def test_a_second_method_leaves_the_first_to_train_on():
    net = model("lora", "q_proj")
    net[1].q_proj.A.requires_grad_(False)  # and what was frozen in it stays so
    adapt(net, "sora", "v_proj")
    trained = {name for name, p in net.named_parameters() if p.requires_grad}
    assert trained == set(adapter_state_dict(net)) - {"1.q_proj.A"} >= {"1.q_proj.B", "1.v_proj.C"}


@pytest.mark.parametrize("method", METHODS)
def test_merge_adapters_leaves_plain_linears_of_the_same_function(method):
    net = disturb(model(method, ["0", "q_proj", "out"]))
    x = torch.randn(5, 6)
    y = net(x)
    assert merge_adapters(net) is net
    assert not any(isinstance(m, minisora.Adapter) for m in net.modules())
    assert set(net.state_dict()) == set(model().state_dict())
    assert torch.allclose(net(x), y, atol=1e-5)
    assert picture(merge_adapters(net)) == picture(net)  # nothing left to do
    layer = disturb(LoRALinear(nn.Linear(3, 2)))
    assert type(merge_adapters(layer)) is nn.Linear  # a layer that is the whole model


@pytest.mark.parametrize("method", METHODS)
def test_adapter_state_goes_through_a_file_bit_for_bit(method):
    """Saved, loaded with weights_only=True into a model adapted alike: the same outputs. It is a copy, and small."""
    net, twin = disturb(model(method)), model(method, seed=0)
    state = adapter_state_dict(net)
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    load_adapter_state_dict(twin, torch.load(buffer, weights_only=True))
    x = torch.randn(4, 6)
    assert torch.equal(twin(x), net(x))
    before = {name: t.clone() for name, t in state.items()}
    disturb(net)
    assert all(torch.equal(state[name], before[name]) and not state[name].requires_grad for name in state)
    load_adapter_state_dict(net, state)  # back to the snapshot
    assert torch.equal(twin(x), net(x))


# ---------------------------------------------------------------------------------- bad input

class Subclassed(nn.Linear):
    pass


BAD_LAYERS = {
    "r = 0": (lambda: LoRALinear(nn.Linear(3, 2), r=0), ValueError, "r must be an int ≥ 1, got 0"),
    "r = -2": (lambda: SORALinear(nn.Linear(3, 2), r=-2), ValueError, "r must be an int ≥ 1, got -2"),
    "r = 2.0": (lambda: DoRALinear(nn.Linear(3, 2), r=2.0), ValueError, "r must be an int ≥ 1, got 2.0"),
    "r = True": (lambda: PreDiagLinear(nn.Linear(3, 2), r=True), ValueError, "r must be an int ≥ 1, got True"),
    "r_p = 0": (lambda: SORALinear(nn.Linear(3, 2), r_p=0), ValueError, "r_p must be an int ≥ 1, got 0"),
    "r_p = '4'": (lambda: SORALinear(nn.Linear(3, 2), r_p="4"), ValueError, "r_p must be an int ≥ 1, got '4'"),
    "rotation": (lambda: SORALinear(nn.Linear(3, 2), rotation="householder"), ValueError,
                 "'exp', 'cayley' or 'first_order', got 'householder'"),
    "Conv1d": (lambda: LoRALinear(nn.Conv1d(3, 2, 1)), TypeError, "base must be a plain nn.Linear, got Conv1d"),
    "subclass": (lambda: LoRALinear(Subclassed(3, 2)), TypeError, "got Subclassed"),
    "adapted": (lambda: LoRALinear(DoRALinear(nn.Linear(3, 2))), TypeError, "got DoRALinear"),
    "weight": (lambda: LoRALinear(nn.Linear(3, 2).weight), TypeError, "got Parameter"),
    "pruned": (lambda: LoRALinear(prune.random_unstructured(nn.Linear(3, 2), "weight", 0.5)), TypeError,
               "base must be a plain nn.Linear, its weight is computed"),
    "lora_alpha = '16'": (lambda: LoRALinear(nn.Linear(3, 2), lora_alpha="16"), ValueError, "lora_alpha must be a finite number, got '16'"),
    "lora_alpha = nan": (lambda: LoRALinear(nn.Linear(3, 2), lora_alpha=math.nan), ValueError, "finite number, got nan"),
}


@pytest.mark.parametrize("case", BAD_LAYERS)
def test_a_layer_refuses_what_it_cannot_be(case):
    call, error, message = BAD_LAYERS[case]
    with pytest.raises(error) as info:
        call()
    assert message in str(info.value)


def test_a_refused_layer_leaves_its_base_trainable():
    base = nn.Linear(3, 2)
    for wrong in ({"r": 0}, {"r_p": 0}, {"rotation": "none"}, {"lora_alpha": None}, {"r": 2**62}):
        with pytest.raises((ValueError, RuntimeError)):
            SORALinear(base, **wrong)
    assert all(p.requires_grad for p in base.parameters())


@every_kind
def test_x_of_the_wrong_width_is_refused_with_both_widths(kind):
    layer = make(kind)
    for x in (torch.zeros(4, 6).double(), torch.tensor(1.0).double(), torch.zeros(7, 8).double()):
        with pytest.raises(ValueError, match=f"7 features in its last dimension, got {tuple(x.shape)}".replace(
                "(", r"\(").replace(")", r"\)")):
            layer(x)


BAD_CALLS = {
    "unknown method": (lambda net: adapt(net, "vera", ["0"]), ValueError, "lora, dora, dora_matrix, pre_diag, sora, got 'vera'"),
    "no match": (lambda net: adapt(net, "lora", ["k_proj"]), ValueError, "['k_proj'] match no module"),
    "what there is": (lambda net: adapt(net, "lora", ["k_proj"]), ValueError, "['0', 'again', 'out', 'v_proj', 'xq_proj']"),
    "one without a match": (lambda net: adapt(net, "lora", ["0", "proj"]), ValueError, "['proj'] match no module"),
    "no names": (lambda net: adapt(net, "lora", []), ValueError, "match no module"),
    "no Linear": (lambda net: adapt(net, "lora", ["0", "2"]), TypeError, "2 must be a plain nn.Linear, got LayerNorm"),
    "already adapted": (lambda net: adapt(net, "dora", ["0", "q_proj"]), ValueError, "1.q_proj is already adapted"),
    "inside an adapter": (lambda net: adapt(net, "dora", ["base"]), ValueError, "['base'] match no module"),
    "r = 0": (lambda net: adapt(net, "dora", ["0"], r=0), ValueError, "r must be"),
    "r_p of lora": (lambda net: adapt(net, "lora", ["0"], r_p=4), TypeError, "r_p"),
    "missing": (lambda net: load(net, drop="1.q_proj.B"), ValueError, "missing 1.q_proj.B"),
    "unexpected": (lambda net: load(net, extra=torch.zeros(1)), ValueError, "unexpected extra"),
    "misshapen": (lambda net: load(net, **{"1.q_proj.A": torch.zeros(2, 6)}), ValueError,
                  "1.q_proj.A must be a floating-point tensor of shape (8, 6), got (2, 6), torch.float32"),
    "too long": (lambda net: load(net, **{"1.q_proj.A": torch.zeros(9, 6)}), ValueError, "of shape (8, 6), got (9, 6)"),
    "complex": (lambda net: load(net, **{"1.q_proj.A": torch.zeros(8, 6, dtype=torch.complex64)}), ValueError,
                "1.q_proj.A must be a floating-point tensor of shape (8, 6), got (8, 6), torch.complex64"),
    "too large for float32": (lambda net: load(net, **{"1.q_proj.A": torch.full((8, 6), 1e300, dtype=torch.float64)}),
                              ValueError, "non-finite 1.q_proj.A"),
    "no tensor": (lambda net: load(net, **{"1.q_proj.A": [1.0]}), ValueError, "1.q_proj.A must be a floating-point tensor of shape (8, 6), got list"),
    "nan": (lambda net: load(net, **{"1.q_proj.A": torch.full((8, 6), math.nan)}), ValueError, "non-finite 1.q_proj.A"),
    "inf": (lambda net: load(net, **{"1.q_proj.B": torch.full((6, 8), math.inf)}), ValueError, "non-finite 1.q_proj.B"),
    "all at once": (lambda net: load(net, drop="1.q_proj.A", extra=torch.zeros(1)), ValueError,
                    "adapter state does not fit: missing 1.q_proj.A; unexpected extra"),
}


def load(net, drop=None, **changes):
    state = {name: t + 1 for name, t in adapter_state_dict(net).items() if name != drop}
    load_adapter_state_dict(net, {**state, **changes})


@pytest.mark.parametrize("case", BAD_CALLS)
def test_a_refused_call_names_the_offender_and_changes_nothing(case):
    call, error, message = BAD_CALLS[case]
    net = disturb(model("lora", "q_proj"))
    for p in net[2].parameters():
        p.requires_grad_(True)
    before = picture(net)
    with pytest.raises(error) as info:
        call(net)
    assert message in str(info.value)
    assert picture(net) == before


@every_kind
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_weights_that_are_not_finite_are_not_merged(kind, bad):
    """Neither by the layer nor in a model, where nothing is then replaced; an overflow on the cast counts too."""
    net = nn.Sequential(make("lora", m=7), make(kind))
    with torch.no_grad():
        net[1].A[0, 0] = bad
    before = picture(net)
    for merge, name in ((net[1].merge, ""), (lambda: merge_adapters(net), "1: ")):
        with pytest.raises(ValueError, match=f"^{name}{type(net[1]).__name__}.merge: the adapted weight has non-finite"):
            merge()
    assert picture(net) == before
    half = LoRALinear(nn.Linear(3, 2).half(), r=1)
    with torch.no_grad():
        half.B.fill_(1e6)
    with pytest.raises(ValueError, match="non-finite"):
        half.merge()


# ---------------------------------------------------------------------------------- in other code

@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("masked", [False, True])
def test_transformer_encoder_is_right_in_train_mode_and_on_its_fast_path(method, masked):
    """In eval mode nn.TransformerEncoder reads linear1.weight past the module: it finds W', also for padded batches."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    net = disturb(adapt(nn.TransformerEncoder(layer, 2), method, ["linear1", "linear2"], r=2))
    x = torch.randn(3, 5, 8)
    padding = torch.arange(5) >= torch.tensor([[5], [3], [4]]) if masked else None
    slow, plain = net(x, src_key_padding_mask=padding), merge_adapters(copy.deepcopy(net))
    assert slow.requires_grad
    keep = ~padding if masked else torch.ones(3, 5, dtype=torch.bool)
    with torch.no_grad():
        fast = net.eval()(x, src_key_padding_mask=padding)
        assert torch.allclose(fast[keep], slow[keep], atol=1e-4)
        assert torch.allclose(fast[keep], plain.eval()(x, src_key_padding_mask=padding)[keep], atol=1e-5)


def test_a_nested_tensor_is_refused():
    """An encoder whose first layer has nothing to train hands the second one a nested tensor, in eval with a mask."""
    net = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2)
    adapt(net, "lora", ["layers.1.linear1"]).eval()
    with pytest.raises(TypeError, match="enable_nested_tensor=False"):
        net(torch.randn(2, 3, 8), src_key_padding_mask=torch.tensor([[False] * 3, [False, True, True]]))


def test_the_output_projection_of_multihead_attention_is_refused():
    """nn.MultiheadAttention never calls out_proj; its class says so, and adapt refuses it by name."""
    net = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 1, enable_nested_tensor=False)
    with pytest.raises(TypeError, match=r"layers.0.self_attn.out_proj must be a plain nn.Linear, got NonDynamically"):
        adapt(net, "lora", ["out_proj"])


# ---------------------------------------------------------------------------------- the price, in counts

def test_the_price_in_floating_point_operations_and_in_bytes_kept():
    """At 2048 tokens, 1024 → 1024, r = 16, r_p = 4: figures that depend on no machine."""
    T, d, r, q = 2048, 1024, 16, 8  # q = 2 r_p
    layers = train_tiny.bench_layers(d, torch.device("cpu"), torch.float32)
    x = torch.randn(T, d, requires_grad=True)
    count = {name: train_tiny.flops(layer, x) for name, layer in layers.items()}
    kept = {name: train_tiny.saved_bytes(layer, x) / (T * d * 4) for name, layer in layers.items()}
    assert count["linear"] == 2 * (2 * T * d * d)  # forward, and backward to x
    assert count["lora"] == count["pre_diag"] == count["linear"] + 3 * 2 * T * r * (d + d)
    assert count["dora_matrix"] == count["lora"] + 2 * (d * d * r + d * r * r + d * r * r)  # and the norm, W0Aᵀ first
    assert count["dora"] == 1.5 * count["linear"] + 3 * 2 * d * d * r  # W' formed, and its (m, n) gradient
    # Of rank r + q, and (d ∘ V)ᵀW0 with its gradient; the rest has no dimension of T and only one of d.
    sora = count["linear"] + 3 * 2 * T * (r + q) * (d + d) + 2 * 2 * d * d * q
    assert all(sora < count[f"sora {kind}"] < 1.001 * sora for kind in ("exp", "cayley", "first_order"))
    assert kept["linear"] == 0 and kept["lora"] <= 0.05
    assert kept["pre_diag"] <= 1.03 and kept["dora_matrix"] <= 1.035  # a detached norm keeps nothing
    assert all(1 <= kept[f"sora {kind}"] <= 1.15 for kind in ("exp", "cayley", "first_order"))
    assert kept["dora"] > 2 * d / T  # W0 + sBA and W', each (m, n)
    with torch.no_grad():
        assert all(train_tiny.saved_bytes(layer, x) == 0 for layer in layers.values())
    merged = layers["sora exp"].merge()
    assert train_tiny.flops(merged, x) == count["linear"] and train_tiny.saved_bytes(merged, x) == 0


# ---------------------------------------------------------------------------------- train_tiny.py

TINY = "--device cpu --dim 32 --layers 1 --context 16 --batch 4 --base-steps 4 --steps 4".split()


def test_training_script_from_start_to_file_and_back(tmp_path, capsys):
    """Every method, two seeds, two rates; the record; and --load scores what --save wrote to the same digit."""
    record, file = tmp_path / "record.json", tmp_path / "adapters.pt"
    train_tiny.main([*TINY, "--seeds", "2", "--lr", "1e-3", "1e-2", "--match-params", "--json", str(record), "--save", str(file),
                     "--methods", *train_tiny.METHODS])
    text, data = capsys.readouterr().out, json.loads(record.read_text())
    assert {"device", "torch", "python", "config", "base", "results"} <= data.keys()
    assert {"base_bpb", "target_bpb"} == data["base"].keys() and len(data["results"]) == 2 * len(train_tiny.METHODS)
    for r in data["results"]:
        assert {"method", "seed", "trainable", "bpb", "merged_bpb", "ms_per_step", "entropy", "stable_rank", "orthogonality"} <= r.keys()
        assert r["bpb"] == pytest.approx(r["merged_bpb"], abs=1e-5)
        assert (r["orthogonality"] is not None) == r["method"].startswith("sora")
    by = {(r["method"], r["seed"]): r for r in data["results"]}
    for seed in (0, 1):
        assert by["dora", seed]["bpb"] == pytest.approx(by["dora_matrix", seed]["bpb"], abs=1e-5)
        assert by["sora", seed]["orthogonality"] < 1e-6
        assert abs(by["sora", seed]["trainable"] / by["lora", seed]["trainable"] - 1) < 0.2
    for claim in ("1. entropy of W' − W0, attention", "2. DoRA in matrix form", "3. Pre-Diag − DoRA", "4. SORA − lora", "4. SORA turned"):
        assert claim in text
    train_tiny.main(["--load", str(file), "--device", "cpu", "--json", str(record)])
    for r in json.loads(record.read_text())["results"]:
        assert r["bpb"] == by[r["method"], 0]["bpb"] and r["merged_bpb"] == by[r["method"], 0]["merged_bpb"]


def test_benchmark_script(tmp_path, capsys):
    train_tiny.main(["--bench", "--device", "cpu", "--sizes", "32x16", "--rounds", "2", "--json", str(tmp_path / "b.json")])
    results = json.loads((tmp_path / "b.json").read_text())["results"]
    assert [r["layer"] for r in results] == ["linear", "lora", "dora", "dora_matrix", "pre_diag",
                                             "sora exp", "sora cayley", "sora first_order"]
    assert all(r["ms"] > 0 for r in results) and results[1]["over_lora"] == 1 and "sora first_order" in capsys.readouterr().out


@pytest.mark.parametrize("command, message", [
    ("--methods vera", "invalid choice: 'vera'"), ("--device tpu", "invalid choice: 'tpu'"), ("--steps 0", "--steps"),
    ("--seeds 0", "--seeds"), ("--lr -1", "--lr"), ("--lr nan", "--lr"), ("--steps many", "--steps"), ("--sizes 4", "--sizes"),
    ("--dim 40", "--dim 40"), ("--base-text nowhere.txt", "nowhere.txt: No such file"), ("--target-text .", "Is a directory"),
    ("--target-text requirements.txt", "bytes are too few"), ("--json no/where.json", "no/where.json"),
    ("--load README.md", "--load README.md"), ("--frobnicate", "--frobnicate"),
    *([] if torch.cuda.is_available() else [("--device cuda", "--device cuda: this machine has none")])])
def test_training_script_refuses_in_one_line_with_status_2(command, message, capsys):
    with pytest.raises(SystemExit) as info:
        train_tiny.main(command.split())
    error = capsys.readouterr().err
    assert info.value.code == 2 and message in error and error.count("\n") == 1


# ---------------------------------------------------------------------------------- the README

README = (pathlib.Path(__file__).parent / "README.md").read_text()


def table(heading):
    """The rows, as lists of cells, of the first table under a heading of the README."""
    lines = README.split(f"\n## {heading}\n", 1)[1].splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("|"))
    rows = [line.strip("|").split(" | ") for line in lines[start:lines.index("", start)]]
    return rows[2:]


def test_readme_table_of_proofs_is_not_stale():
    """Every test it names exists, and every class and function stands at the line it says."""
    rows = table("Equation, code, proof")
    assert len(rows) >= 5
    for row in rows:
        assert re.findall(r"`(test_\w+)`", row[2]), row
    for name in re.findall(r"`(test_\w+)`", README):
        assert callable(globals()[name]), name
    links = re.findall(r"\[`([\w.]+)`\]\(minisora\.py#L(\d+)\)", README)
    assert {cls.__name__ for cls in METHODS.values()} <= {name for name, _ in links}
    for name, line in links:
        assert inspect.getsourcelines(getattr(minisora, name))[1] == int(line), name


@pytest.mark.parametrize("name", [cls.__name__ for cls in METHODS.values()])
def test_a_class_copies_out_with_the_names_the_readme_says(name):
    """Exactly those, in a namespace that holds torch and math alone: it trains, merges, and says the same."""
    rows = {row[0].strip("` "): re.findall(r"`(\w+)`", row[1]) for row in table("Copy one layer out")}
    assert len(rows[name]) <= 4
    namespace = {"torch": torch, "math": math}
    for taken in rows[name]:
        exec(inspect.getsource(getattr(minisora, taken)), namespace)
    kind = next(kind for kind in KINDS if KINDS[kind][0].__name__ == name)
    layer = make(kind)
    copied = namespace[name](copy.deepcopy(layer.base), 3, 5, **KINDS[kind][1], **({"r_p": 2} if "sora" in kind else {}))
    copied.load_state_dict(layer.state_dict())
    x = inputs(layer, 3)
    assert torch.equal(copied(x), layer(x)) and torch.equal(copied.merge().weight, layer.merge().weight)
    assert train(copied) == train(layer)
    for spare in rows[name]:  # and not one name too many
        rest = {"torch": torch, "math": math}
        with pytest.raises((NameError, KeyError)):
            for taken in rows[name]:
                if taken != spare:
                    exec(inspect.getsource(getattr(minisora, taken)), rest)
            layer = rest[name](nn.Linear(3, 2))
            layer.merge(), layer(torch.zeros(1, 3))


BLOCKS = re.findall(r"```python\n(.*?)```", README, re.S)


@pytest.mark.parametrize("i", range(len(BLOCKS)))
def test_readme_python_blocks_run(i, tmp_path):
    """Each as a script of its own; their asserts are the recipes' promises (DistributedDataParallel's among them)."""
    script = tmp_path / "recipe.py"
    script.write_text(BLOCKS[i])
    done = subprocess.run([sys.executable, str(script)], cwd=tmp_path, capture_output=True, text=True,
                          env={**os.environ, "PYTHONPATH": str(pathlib.Path(__file__).parent), "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
