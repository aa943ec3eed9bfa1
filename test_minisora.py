"""What minisora states about its layers, one theorem a test. Each can fail.

    python -m pytest                                      the same examples each time
    HYPOTHESIS_PROFILE=long python -m pytest              a random search, much longer

The oracle is float64 NumPy, written from the equations; nothing of the module is in it. A tolerance
is k · ε · size: ε of the dtype, k the number of roundings on the longest path (`close`), and size
the same formula with each term replaced by its absolute value.
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
import weakref

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, note, settings, strategies as st
from torch import nn
from torch.nn.utils import prune
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import minisora
import train_tiny
from minisora import (METHODS, Adapter, DoRALinear, DoRAMatrixLinear, LoRALinear, PreDiagLinear,
                      SORALinear, adapt, adapter_state_dict, load_adapter_state_dict,
                      merge_adapters, rotation_factors, singular_value_entropy, stable_rank)

settings.register_profile(
    "default", derandomize=True, database=None, deadline=None, max_examples=25)
settings.register_profile("long", deadline=None, max_examples=1000, print_blob=True)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))

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
THIN = [kind for kind in KINDS if kind not in ("dora", "dora, full")]
f32, f64, bf16, f16 = torch.float32, torch.float64, torch.bfloat16, torch.float16

every_kind = pytest.mark.parametrize("kind", KINDS)
no_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
every_device = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=no_cuda)])
seeds = st.integers(0, 2**31)


# ------------------------------------------------------------------ cases, the oracle, a tolerance

def make(kind, m=5, n=7, r=3, alpha=5, r_p=2, dtype=f64, seed=0, trained=True, rows=1.0):
    """A layer with every tensor drawn from seed; rows (m, 2): factors of W0's and B's rows."""
    rng, cls, options = np.random.default_rng(seed), *KINDS[kind]
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
    return layer


@st.composite
def layers(draw, kind, device="cpu", dtypes=(f32, f64), scaled=True, **options):
    """Any small layer: sizes from 1 up, r above min(m, n) too, α ≠ r, rows of any scale or zero."""
    powers = st.sampled_from([1.0, 1.0, 2.0**-20, 2.0**-7, 2.0**5, 2.0**20])
    m = draw(st.integers(1, 7))
    rows = torch.tensor([[draw(powers), draw(powers)] for _ in range(m)]) if scaled else 1.0
    if scaled and draw(st.booleans()):
        rows[draw(st.integers(0, m - 1)), 0] = 0
    case = dict(m=m, n=draw(st.integers(1, 7)), r=draw(st.integers(1, 9)), rows=rows,
                alpha=draw(st.sampled_from([0.5, 3, 10, 16])), r_p=draw(st.integers(1, 4)),
                dtype=draw(st.sampled_from(dtypes)), seed=draw(seeds), **options)
    note(f"make({kind!r}, **{case})")
    layer = make(kind, **case)
    if draw(st.booleans()):
        layer.base.bias = None
    return layer.to(device)


def for_all_layers(kinds=KINDS, **options):
    """Run a theorem about `layer` for every kind and device, over layers(…, **options)."""
    def decorate(theorem):
        def test(kind, device, data):
            theorem(data.draw(layers(kind, device, **options)))
        test.__name__, test.__doc__ = theorem.__name__, theorem.__doc__
        test.__qualname__, test.__module__ = theorem.__qualname__, theorem.__module__
        return every_device(pytest.mark.parametrize("kind", kinds)(given(data=st.data())(test)))
    return decorate


def inputs(layer, *shape, seed=1, scale=1.0):
    x = np.random.default_rng(seed).uniform(-scale, scale, (*shape, layer.in_features))
    return torch.from_numpy(x).to(layer.base.weight)


def array(value):
    return value.detach().double().cpu().numpy() if torch.is_tensor(value) else np.asarray(value)


def close(layer, actual, exact, size=1.0, k=None, eps=None):
    """|actual − exact| ≤ k · ε · size; k: sums over n, r, m, 2 r_p and some more."""
    if k is None:
        sums = layer.in_features + 2 * layer.r + 2 * layer.out_features
        k = sums + 4 * getattr(layer, "r_p", 0) + 16
    eps = eps or torch.finfo(actual.dtype).eps
    tiny = np.finfo(np.float32 if eps > 1e-10 else np.float64).tiny  # what underflow may lose
    actual, exact = array(actual), array(exact)
    assert actual.shape == exact.shape, (actual.shape, exact.shape)
    error, bound = np.abs(actual - exact), k * (eps * array(size) + tiny)
    assert (error <= bound).all(), f"off by {np.max(error / bound):.3g} times {bound.max():.3g}"


def skew(C, D):
    """P = s_P (DCᵀ − CDᵀ), and q ≥ ‖U‖‖V‖, the size of its thin factors."""
    both = np.linalg.norm(C) + np.linalg.norm(D)
    s_P = min(1.0, 1.0 / (both + 1e-6))
    return s_P * (D @ C.T - C @ D.T), s_P * both**2


def rotation(P, kind):
    """R from the dense P: exp by the eigenvalues of the Hermitian iP, Cayley by a dense solve."""
    I = np.eye(len(P))
    if kind == "exp":
        angles, Q = np.linalg.eigh(1j * P)
        return ((Q * np.exp(-1j * angles)) @ Q.conj().T).real
    return np.linalg.solve(I - P / 2, I + P / 2) if kind == "cayley" else I + P


def oracle(layer):
    """W' (m, n) and its size, the sum of the absolute values of all terms that were added up."""
    p = {name: array(t) for name, t in layer.named_parameters()}
    W0, s = p["base.weight"], layer.lora_alpha / layer.r
    d = p["diag"][:, None] if "diag" in p else 1.0
    M = d * W0 + s * p["B"] @ p["A"]
    size = np.abs(d * W0) + s * np.abs(p["B"]) @ np.abs(p["A"])
    if "magnitude" in p:
        norm = np.linalg.norm(M, axis=1, keepdims=True)
        safe = np.where(norm > 0, norm, np.inf)
        c = p["magnitude"][:, None] / safe
        # ‖W‖² is a sum of terms that much larger than itself; c inherits the relative error.
        loss = (size * size).sum(axis=1, keepdims=True) / safe**2
        return c * M, np.abs(c) * size * (1 + loss)
    if "C" not in p:
        return M, size
    P, q = skew(p["C"], p["D"])
    # Cores are at most 1 + q/2 in norm, so R's terms are up to 1 + q (1 + q/2) ≤ (1 + q)².
    # A rotation mixes rows, so a column counts by its norm.
    size = np.sqrt((size**2).sum(axis=0)) * np.ones((len(M), 1))
    return rotation(P, layer.rotation) @ M, (1 + q) ** 2 * size


def output(layer, x):
    """x W'ᵀ + b by the oracle, and its size."""
    W, size = oracle(layer)
    b = array(layer.bias) if layer.bias is not None else np.zeros(len(W))
    return array(x) @ W.T + b, np.abs(array(x)) @ size.T + np.abs(b)


# ------------------------------------------------------------------ all five layers

@for_all_layers(trained=False)
def test_at_step_0_the_weight_is_W0_bit_for_bit_and_the_layer_is_its_base(layer):
    assert torch.equal(layer.weight, layer.base.weight)
    x = inputs(layer, 3)
    close(layer, layer(x), layer.base(x), output(layer, x)[1])


@for_all_layers()
def test_the_dense_form_is_the_equation(layer):
    close(layer, layer.dense(), *oracle(layer))


@for_all_layers(THIN)
def test_the_thin_form_is_the_dense_form(layer):
    """diag(d) W0 + up down = W', with thin up and down."""
    d, up, down = layer.thin()
    scaled = layer.W0 if d is None else d[:, None] * layer.W0
    close(layer, scaled + up @ down, *oracle(layer))
    assert up.shape[1] == down.shape[0] == layer.r + 2 * getattr(layer, "r_p", 0)


@for_all_layers()
def test_the_output_is_the_equation(layer):
    """layer(x) = x W'ᵀ + b for x of any scale."""
    for scale in (2.0**-20, 1.0, 2.0**20):
        x = inputs(layer, 3, scale=scale)
        close(layer, layer(x), *output(layer, x))


def gradients(y, G, layer, x):
    wanted = {"x": x, **{name: p for name, p in layer.named_parameters() if p.requires_grad}}
    return dict(zip(wanted, torch.autograd.grad((y * G).sum(), list(wanted.values()))))


def gradient_size(layer, x, G):
    """x, G and a derivative of W', which is of the size of W' or its square over all terms.

    Generous for a small gradient among large ones: gradcheck and the DoRA formulas are sharper.
    """
    size = 1 + np.linalg.norm(oracle(layer)[1])
    return (1 + np.linalg.norm(array(x))) * (1 + np.linalg.norm(array(G))) * size**2


@for_all_layers(dtypes=(f64,), scaled=False)
def test_the_cheap_path_has_the_gradients_of_the_dense_path(layer):
    x, G = inputs(layer, 4).requires_grad_(), inputs(layer, 4, seed=2).sum(-1, keepdim=True)
    cheap = gradients(layer(x), G, layer, x)
    dense = gradients(F.linear(x, layer.adapted_weight(), layer.bias), G, layer, x)
    for name in cheap:
        close(layer, cheap[name], dense[name], gradient_size(layer, x, G))


@for_all_layers()
def test_the_output_at_zero_is_the_bias_exactly(layer):
    """The methods act on the weight alone, however the adapter was trained."""
    b = torch.zeros_like(layer.B[:, 0]) if layer.bias is None else layer.bias
    assert torch.equal(layer(torch.zeros_like(inputs(layer, 2))), b.expand(2, -1))


@for_all_layers(scaled=False)
def test_the_layer_is_affine(layer):
    """f(3x − 2z) = 3f(x) − 2f(z), in training mode too."""
    x, z = inputs(layer, 2), inputs(layer, 2, seed=2)
    size = 10 + 10 * oracle(layer)[1].sum()
    close(layer, layer(3 * x - 2 * z), 3 * layer(x) - 2 * layer(z), size)


@for_all_layers(dtypes=(f32, f64, bf16))
def test_merging_gives_a_plain_linear_with_the_adapted_weight(layer):
    """Nothing is shared with the layer, which stays bit for bit."""
    before = copy.deepcopy(layer.state_dict())
    merged, again = layer.eval().merge(), layer.train().merge()
    assert type(merged) is nn.Linear and not merged.training and again.training
    assert torch.equal(merged.weight, layer.weight) and torch.equal(merged.weight, again.weight)
    assert (merged.bias is None) == (layer.bias is None)
    for p in merged.parameters():
        assert type(p) is nn.Parameter and not p.requires_grad
        p.data.fill_(7)
    assert all(torch.equal(before[name], t) for name, t in layer.state_dict().items())


@every_kind
def test_every_gradient_is_right(kind):
    """gradcheck in float64. A detached norm has none: see DoRA."""
    kind = kind + ", full" if kind in ("dora", "dora_matrix") else kind
    layer = make(kind, m=4, n=3, r=2, r_p=1)
    names, tensors = zip(*[(k, p) for k, p in layer.named_parameters() if p.requires_grad])

    def f(x, *tensors):
        return torch.func.functional_call(layer, dict(zip(names, tensors)), (x,))
    assert torch.autograd.gradcheck(f, (inputs(layer, 2).requires_grad_(), *tensors))


@every_kind
@pytest.mark.parametrize("dtype", [f32, f64, bf16, f16])
def test_the_first_gradient_reaches_all_that_should_train(kind, dtype):
    """At step 0 B, magnitude, diag, C and D get a gradient; A gets exactly none, since B = 0."""
    layer = make(kind, trained=False, dtype=dtype)
    layer(inputs(layer, 4)).square().sum().backward()
    for name, p in layer.named_parameters(recurse=False):
        assert p.grad.any() == (name != "A"), name
    assert layer.base.weight.grad is None and layer.bias.grad is None


def train(layer, steps=5, lr=0.1):
    x, target = inputs(layer, 16), inputs(layer, 16, seed=5).sum(-1, keepdim=True)
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
def test_state_dict_deepcopy_and_pickle_are_bit_for_bit(kind):
    layer, loaded = make(kind), make(kind, seed=9)  # W0 differs as well
    loaded.load_state_dict(layer.state_dict())
    x = inputs(layer, 3)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), loaded):
        assert torch.equal(twin(x), layer(x)) and torch.equal(twin.dense(), layer.dense())


@every_kind
@every_device
def test_x_of_any_shape_gives_row_by_row_the_same(kind, device):
    """1 to 4 dimensions, transposed, expanded and empty."""
    layer = make(kind).to(device)
    rows = inputs(layer, 6)
    flat, size = layer(rows), (1 + oracle(layer)[1]).sum()
    for view in (lambda t: t[0], lambda t: t.view(2, 3, -1), lambda t: t.view(1, 2, 3, -1),
                 lambda t: t.T.contiguous().T, lambda t: t[0].expand(4, -1)):
        close(layer, layer(view(rows)), view(flat), size)
    empty = layer(rows[:0].requires_grad_())
    empty.sum().backward()
    assert empty.shape == (0, 5) and not layer.B.grad.any()


@for_all_layers(dtypes=(bf16, f16), scaled=False)
def test_a_half_precision_base_has_float32_adapters_and_half_outputs(layer):
    """16 ε of the absolute sum: right to 6 % of it in bfloat16. The sharp one is the float32 W'."""
    half, x = layer.base.weight.dtype, inputs(layer, 3)
    assert all(p.dtype == f32 for p in layer.parameters() if p.requires_grad)
    close(layer, layer.adapted_weight(), *oracle(layer))
    assert torch.equal(layer.merge().weight, layer.adapted_weight().to(half))
    assert layer(x).dtype == half
    close(layer, layer(x), *output(layer, x), k=16)


@for_all_layers(dtypes=(f32,), scaled=False)
def test_autocast_touches_the_products_with_x_alone(layer):
    """y has the base's dtype and precision; W' and the factors are bit for bit those without."""
    seen, thin, W, merged = [], layer.thin, layer.adapted_weight(), layer.merge().weight
    layer.thin = lambda: seen.append(thin()) or seen[-1]
    for x in (inputs(layer, 3).bfloat16(), inputs(layer, 3).bfloat16().float()):
        with torch.autocast(x.device.type, dtype=bf16):
            y = layer(x)
            assert y.dtype == layer.base(x).dtype == bf16
            assert torch.equal(layer.adapted_weight(), W)
            assert torch.equal(layer.merge().weight, merged)
        close(layer, y, *output(layer, x), k=16)
    for factors in seen if thin() else ():
        assert all(a is b or torch.equal(a, b) for a, b in zip(factors, thin()))


def test_bfloat16_does_not_round_a_small_diagonal_step_away():
    """d = 1.003 is 1 in bfloat16; kept in float32 it makes the outputs 0.3 % longer on average."""
    layer = make("pre_diag", dtype=bf16, trained=False)
    layer.base.bias = None
    x = inputs(layer, 512, scale=2.0)
    layer.diag.data.fill_(1.003)
    y, y0 = array(layer(x)), array(layer.base(x))
    assert 1.002 < (y * y0).sum() / (y0 * y0).sum() < 1.004


@every_kind
def test_compile_and_checkpointing_change_nothing(kind):
    """torch.compile(fullgraph=True) and checkpoint(use_reentrant=False): values and gradients."""
    layer = make(kind)
    x = inputs(layer, 4).requires_grad_()
    y, size = layer(x), gradient_size(layer, x, x)
    plain = gradients(y, 1.0, layer, x)
    torch.compiler.reset()
    for again in (torch.compile(layer, fullgraph=True, backend="aot_eager")(x),
                  checkpoint(layer, x, use_reentrant=False)):
        close(layer, again, y, size)
        for name, g in gradients(again, 1.0, layer, x).items():
            close(layer, g, plain[name], size)


@every_kind
def test_vmap_over_a_stack_of_adapters_is_a_loop(kind):
    """On one base, which is not stacked: a sum in place would fail."""
    one, two = make(kind), make(kind, seed=5)
    two.base = one.base
    x, stack = inputs(one, 4), {}
    for name, p in one.named_parameters():
        if p.requires_grad:
            stack[name] = torch.stack([p, two.get_parameter(name)])
    both = torch.func.vmap(lambda state: torch.func.functional_call(one, state, (x,)))(stack)
    size = (1 + oracle(one)[1]).sum() + oracle(two)[1].sum()
    close(one, both, torch.stack([one(x), two(x)]), size)


class Watch(TorchDispatchMode):
    """The names of the operations that ran, and the sizes of what they made (views of W0 aside)."""

    def __init__(self, W0):
        super().__init__()
        self.names, self.sizes, self.W0 = set(), [0], W0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.names.add(func.overloadpacket.__name__)
        if torch.is_tensor(out) and out.untyped_storage().data_ptr() != self.W0.data_ptr():
            self.sizes.append(out.numel())
        return out


def watch(kind, device):
    layer = make(kind, m=48, n=40, dtype=bf16).to(device)
    x = inputs(layer, 2).requires_grad_()
    with Watch(layer.base.weight) as seen:
        layer(x).sum().backward()
    return seen


@every_kind
@every_device
def test_no_operation_asks_the_host_for_a_value(kind, device):
    """Forward and backward run on without waiting for a GPU, and can be captured in a graph."""
    names = watch(kind, device).names
    assert {"mm", "mul"} <= names
    asking = ("local_scalar", "item", "nonzero", "equal", "matrix_exp", "eig", "svd",
              "check_errors", "unique")
    assert not [name for name in names for word in asking if word in name]


@every_kind
@every_device
def test_only_the_original_dora_forms_a_second_weight_matrix(kind, device):
    """No tensor with m·n entries is made in forward or backward."""
    assert (max(watch(kind, device).sizes) >= 48 * 40) == (kind in ("dora", "dora, full"))


@pytest.mark.parametrize("name", METHODS)
def test_every_class_has_the_interface_of_the_linear_it_stands_for(name):
    """weight and bias read as W' and b, so that code which looks past forward sees the adapter."""
    kind = next(kind for kind in KINDS if KINDS[kind][0] is METHODS[name])
    layer = make(kind, m=4, n=6, dtype=bf16)
    assert (layer.out_features, layer.in_features) == (4, 6)
    assert torch.equal(layer.weight, layer.merge().weight) and layer.bias is layer.base.bias


def test_the_repr_shows_what_was_chosen():
    shown = "r=3, lora_alpha=6, scaling=2.0, in_features=7, out_features=5"
    assert make("dora, full", alpha=6).extra_repr() == shown + ", detach_norm=False"
    assert make("sora, cayley", alpha=6).extra_repr() == shown + ", r_p=2, rotation=cayley"


@every_kind
def test_a_cast_to_half_after_adapting_leaves_a_layer_that_is_right_to_half_precision(kind):
    """Rows of norm 400: their squares are beyond float16."""
    layer = make(kind, n=40, rows=100.0, dtype=f32, trained=False).half()
    x = inputs(layer, 3)
    close(layer, layer(x), layer.base(x), np.abs(array(x)) @ np.abs(array(layer.W0)).T + 1)
    assert layer.merge().weight.dtype == f16


class Scaled(Adapter):
    """A method with a parameter in a submodule, and a dropout."""

    def __init__(self, base, r=8, lora_alpha=16):
        super().__init__(base, r, lora_alpha)
        self.inner = nn.Sequential(nn.Linear(1, 1), nn.Dropout())

    def dense(self):
        return self.inner[0].weight * self.W0 + self.scaling * self.B @ self.A


def test_a_new_method_is_its_equation_alone(monkeypatch):
    """Its forward, state, merge and modes are then right."""
    monkeypatch.setitem(METHODS, "scaled", Scaled)
    net, x = disturb(adapt(model().eval(), "scaled", "q_proj")), torch.randn(3, 6)
    layer, y = net[1].q_proj, net(x)
    assert torch.allclose(layer(x), F.linear(x, layer.dense(), layer.bias), atol=1e-6)
    assert not layer.inner[1].training and "1.q_proj.inner.0.weight" in adapter_state_dict(net)
    assert torch.allclose(merge_adapters(net)(x), y, atol=1e-5)


def test_a_mistake_in_dense_is_reported_as_what_it_is():
    class Typo(Adapter):
        def dense(self):
            return self.W0 + self.BB @ self.A
    layer = Typo(nn.Linear(3, 2))
    for use in (lambda: layer(torch.zeros(1, 3)), layer.merge):
        with pytest.raises(AttributeError, match="'BB'"):
            use()


@pytest.mark.parametrize("parent", [LoRALinear, DoRAMatrixLinear, PreDiagLinear, SORALinear])
def test_a_child_that_has_its_own_dense_does_not_inherit_the_thin_form_of_another(parent):
    class Doubled(parent):
        def dense(self):
            return 2 * super().dense()

    class Renamed(parent):
        pass

    layer, x = Doubled(nn.Linear(3, 2, bias=False)), torch.rand(4, 3)
    assert torch.allclose(layer(x), 2 * layer.base(x), atol=1e-6) and layer.thin() is None
    assert Renamed(nn.Linear(3, 2)).thin() is not None


def test_a_train_method_that_returns_nothing_loses_no_layer(monkeypatch):
    class Quiet(LoRALinear):
        def train(self, mode=True):
            super().train(mode)

    monkeypatch.setitem(METHODS, "quiet", Quiet)
    assert type(adapt(nn.Linear(3, 2), "quiet", "")) is Quiet


# ------------------------------------------------------------------ LoRA

@for_all_layers(["lora"], dtypes=(f64,), scaled=False)
def test_lora_update_has_rank_at_most_r(layer):
    S = torch.linalg.svdvals(layer.dense() - layer.W0)[layer.r:]
    close(layer, S, np.zeros(len(S)), oracle(layer)[1].sum())


@for_all_layers(["lora"])
def test_lora_scaling_alpha_and_r_together_changes_nothing(layer):
    """s = α / r: rank 3r and lora_alpha 3α with the same A and B, padded by zeros."""
    wide = LoRALinear(layer.base, 3 * layer.r, 3 * layer.lora_alpha)
    wide.A.data.zero_()[:layer.r] = layer.A.data
    wide.B.data.zero_()[:, :layer.r] = layer.B.data
    close(wide, wide.dense(), *oracle(layer))


@for_all_layers(["lora"], dtypes=(f64,), scaled=False)
def test_lora_depends_on_the_product_BA_alone(layer):
    """B → BG, A → G⁻¹A for an invertible G."""
    (W, size), r = oracle(layer), layer.r
    Q = np.linalg.qr(np.random.default_rng(r).standard_normal((r, r)))[0]
    G = torch.from_numpy(Q * np.linspace(1, 2, r)).to(layer.A)
    layer.B.data, layer.A.data = layer.B.data @ G, torch.linalg.inv(G) @ layer.A.data
    close(layer, layer.dense(), W, size.sum() * 2 * r)


# ------------------------------------------------------------------ DoRA

@for_all_layers(DORAS)
def test_dora_row_norms_are_the_magnitude(layer):
    W, size = oracle(layer)
    exact = np.abs(array(layer.magnitude)) * np.abs(W).any(axis=1)
    norms = np.linalg.norm(array(layer.dense()), axis=1)
    close(layer, norms, exact, np.linalg.norm(size, axis=1), eps=torch.finfo(layer.A.dtype).eps)


@for_all_layers(DORAS, scaled=False)
def test_dora_ignores_the_scale_of_the_direction(layer):
    """(W0, B) → (cW0, cB) changes nothing: exactly, for a power of two."""
    x = inputs(layer, 3)
    W, y = layer.dense(), layer(x)
    for c in (2.0**-10, 2.0**11):
        layer.base.weight.data *= c
        layer.B.data *= c
        assert torch.equal(layer.dense(), W)
        close(layer, layer(x), y, 1 + output(layer, x)[1])


@pytest.mark.parametrize("full", ["", ", full"])
@given(data=st.data())
def test_dora_original_and_matrix_form_agree_along_a_training_run(full, data):
    """The same values after k optimizer steps, detached or not: the two are one method."""
    options = {"dtypes": (f64,), "scaled": False, "trained": False}
    one = data.draw(layers("dora" + full, **options))
    assume((one.W0.norm(dim=1) > 0.1).all())
    rate = 0.005 / max(1, one.scaling) ** 2  # so small that no row of W comes near zero
    two = DoRAMatrixLinear(copy.deepcopy(one.base), one.r, one.lora_alpha, one.detach_norm)
    two.load_state_dict(one.state_dict())
    assert np.allclose(train(one, 8, rate), train(two, 8, rate), rtol=1e-13, atol=1e-15)
    for p, q in zip(one.parameters(), two.parameters()):
        assert torch.allclose(p, q, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("kind", DORAS)
def test_dora_gradient_of_the_direction_is_as_in_the_DoRA_paper(kind):
    """∂W = cG detached, c(G − ⟨G, ŵ⟩ŵ) in full; ∂magnitude = ⟨G, ŵ⟩ in both."""
    layer = make(kind)
    x, Y = inputs(layer, 6).requires_grad_(), inputs(layer, 6, seed=3)[:, :layer.out_features]
    grads = gradients(layer(x), Y, layer, x)
    G, A, B, s = array(Y).T @ array(x), array(layer.A), array(layer.B), layer.scaling
    W = array(layer.base.weight) + s * B @ A
    norm = np.linalg.norm(W, axis=1, keepdims=True)
    along, c = (G * W / norm).sum(axis=1, keepdims=True), array(layer.magnitude)[:, None] / norm
    dW = c * (G - along * W / norm if kind.endswith("full") else G)
    size = 10 * (np.abs(array(Y)).T @ np.abs(array(x))).sum() * (1 + np.abs(c).max()) * (1 + s)
    close(layer, grads["magnitude"], along[:, 0], size)
    close(layer, grads["B"], s * dW @ A.T, size)
    close(layer, grads["A"], s * B.T @ dW, size)


@pytest.mark.parametrize("kind", DORAS)
@every_device
@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("dead", [[1], [0, 3], range(5)])
def test_dora_rows_of_zeros_stay_finite(kind, device, trained, dead):
    """A pruned row of W0, or an all-zero W0, is 0/0 in the equation: here finite, with gradient."""
    rows = torch.ones(5, 2)
    rows[list(dead), 0] = rows[dead[0], 1] = 0  # W = 0 in the first of them, whatever its magnitude
    layer = make(kind, trained=trained, rows=rows).to(device)
    x = inputs(layer, 4).requires_grad_()
    y = layer(x)
    assert y.isfinite().all() and layer.merge().weight.isfinite().all()
    assert torch.equal(y[:, dead[0]], layer.bias[dead[0]].expand(4))
    assert all(g.isfinite().all() for g in gradients(y.square(), 1.0, layer, x).values())
    train(layer, 3)
    assert layer(x).isfinite().all()


def nearly_opposite(dtype, digits, seed):
    """A DoRA in matrix form whose row 1 of W0 + sBA is δ times that of W0, with δ² = digits · ε."""
    layer = make("dora_matrix", m=3, n=8, r=1, alpha=1, dtype=dtype, trained=False, seed=seed)
    layer.base.bias = None
    layer.A.data.copy_(layer.base.weight[1:2])
    layer.B.data[1] = math.sqrt(digits * torch.finfo(dtype).eps) - 1
    return layer, torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype, digits", 
                         [(f32, 40), (f32, 1e5), (f64, 40), (f64, 1e8), (bf16, 40)])
@pytest.mark.parametrize("seed", range(10))
def test_dora_matrix_norm_errs_by_epsilon_over_delta_squared(dtype, digits, seed):
    layer, eps = nearly_opposite(dtype, digits, seed)
    W = array(layer.base.weight)[1] + array(layer.B)[1] * array(layer.A)[0]
    exact = array(layer.magnitude)[1] / np.linalg.norm(W)
    assert abs(array(layer.thin()[0])[1] / exact - 1) <= 8 * eps / (digits * eps) + eps


@pytest.mark.parametrize("dtype", [f32, f64, bf16])
@pytest.mark.parametrize("seed", range(10))
def test_dora_matrix_norm_has_its_floor_at_epsilon_times_the_square_of_W0(dtype, seed):
    """A sum of exactly zero has c = magnitude / √(ε‖w‖²), no other multiple of it."""
    layer, eps = nearly_opposite(dtype, 0.0, seed)
    layer.A.data.copy_(torch.tensor([1.0] * 8))
    layer.base.weight.data[1] = 1.0  # powers of two: the squared norm cancels without rounding
    layer.magnitude.data[1] = 3.0
    c, up, down = layer.thin()
    close(layer, c[1], 3.0 / math.sqrt(8 * eps), 3.0 / math.sqrt(8 * eps), k=4)
    assert layer(inputs(layer, 64)).isfinite().all()


# ------------------------------------------------------------------ Pre-Diag

@for_all_layers(["pre_diag"])
def test_pre_diag_at_d_1_is_lora(layer):
    lora = LoRALinear(layer.base, layer.r, layer.lora_alpha)
    layer.diag.data.fill_(1)
    lora.load_state_dict({k: t for k, t in layer.state_dict().items() if k != "diag"})
    assert torch.equal(layer.dense(), lora.dense())
    assert torch.equal(layer(inputs(layer, 3)), lora(inputs(layer, 3)))


@for_all_layers(["pre_diag"], dtypes=(f64,), scaled=False)
def test_pre_and_post_diagonal_reach_the_same_weights(layer):
    """diag(d)W0 + sBA is a DoRA with B/d and the magnitude d‖W0 + s(B/d)A‖."""
    layer.diag.data.add_(1.5 * layer.diag.data.sign())  # away from 0
    dora, d = DoRALinear(layer.base, layer.r, layer.lora_alpha), layer.diag.data[:, None]
    dora.A.data, dora.B.data = layer.A.data, layer.B.data / d
    W = layer.W0 + layer.scaling * dora.B.data @ dora.A.data
    dora.magnitude.data = layer.diag.data * W.norm(dim=1)
    close(layer, dora.dense(), *oracle(layer))


# ------------------------------------------------------------------ SORA

def factors(m, r_p, of_C, of_D, seed, near="any"):
    """C and D (m, r_p) of these sizes; D drawn freely, close to C, or parallel to it."""
    rng = np.random.default_rng(seed)
    C, D = rng.uniform(-1, 1, (m, r_p)), rng.uniform(-1, 1, (m, r_p))
    D = {"any": D, "close": C + 1e-3 * D, "parallel": 1.5 * C}[near]
    return of_C * C, of_D * D


def sora(C, D, kind, dtype=f64):
    layer = make(kind, m=len(C), r_p=C.shape[1], dtype=dtype)
    layer.C.data, layer.D.data = torch.from_numpy(C).to(dtype), torch.from_numpy(D).to(dtype)
    return layer


@for_all_layers(SORAS)
def test_sora_at_P_0_is_pre_diag(layer):
    """D = C: R = I exactly, whatever the factors are."""
    pre = PreDiagLinear(layer.base, layer.r, layer.lora_alpha)
    layer.D.data = layer.C.data.clone()
    state = layer.state_dict()
    pre.load_state_dict({name: state[name] for name in pre.state_dict()})
    assert torch.equal(layer.rotation_matrix(), torch.eye(layer.out_features).to(layer.C))
    assert torch.equal(layer.dense(), pre.dense())


@for_all_layers(SORAS)
def test_sora_is_a_pre_diag_of_rank_r_plus_2_r_p(layer):
    """Its thin form, put into a PreDiagLinear with s = 1, is the same function."""
    d, up, down = layer.thin()
    pre = PreDiagLinear(layer.base, up.shape[1], up.shape[1])
    pre.diag.data, pre.A.data, pre.B.data = d.detach(), down.detach(), up.detach()
    assert pre.r == layer.r + 2 * layer.r_p
    close(layer, pre.dense(), *oracle(layer))


@for_all_layers(["sora, first_order"])
def test_sora_P_is_skew(layer):
    """P + Pᵀ = 0, seen in I + P."""
    R = layer.rotation_matrix()
    close(layer, R + R.T, 2 * np.eye(len(R)), 1 + skew(array(layer.C), array(layer.D))[1], k=4)


@for_all_layers(SORAS, scaled=False)
def test_sora_rotation_is_the_dense_one(layer):
    """exp(P), (I − P/2)⁻¹(I + P/2) or I + P of the dense (m, m) P; r_p above m/2 too."""
    for scale in (1e-3, 1.0, 30.0):
        layer.C.data *= scale
        P, q = skew(array(layer.C), array(layer.D))
        close(layer, layer.rotation_matrix(), rotation(P, layer.rotation), (1 + q) ** 2, k=16)


@pytest.mark.parametrize("theta", [0.1, 1, 10, 50])
@given(seed=seeds, r_p=st.integers(1, 4))
def test_the_exponential_is_e_to_the_P_up_to_angle_50(theta, seed, r_p):
    """Within 1e-12 of the dense exponential, in value and in gradient (relative to its size)."""
    C, D = factors(20, r_p, 1, 1, seed)
    scale = theta / np.linalg.norm(skew(C, D)[0], 2)  # s_P < 1 here: linear in the factors
    layer = sora(scale * C, scale * D, "sora, exp")
    G = torch.from_numpy(factors(20, 20, 1, 1, seed + 1)[0])
    R = layer.rotation_matrix()
    close(layer, R, rotation(skew(scale * C, scale * D)[0], "exp"), k=1, eps=1e-12)
    norms = torch.linalg.norm(layer.C) + torch.linalg.norm(layer.D)
    P = (layer.D @ layer.C.T - layer.C @ layer.D.T) / (norms + 1e-6).clamp(min=1)
    dense = torch.linalg.matrix_exp(torch.stack([P, P]))[0]  # torch 2.13 errs by 2e-10 on one alone
    found = [torch.autograd.grad((X * G).sum(), [layer.C, layer.D], retain_graph=True)
             for X in (R, dense)]
    for mine, exact in zip(*found):
        close(layer, mine, exact, array(exact.norm()), k=1, eps=1e-11)


@pytest.mark.parametrize("near", ["any", "close", "parallel"])
@pytest.mark.parametrize("of_C, of_D", [(1, 1), (1e3, 1e3), (1e5, 1e5), (1e7, 1e7), (1e3, 1e-3),
                                        (1e-3, 1e5), (10, 0.1), (0, 1)])
@pytest.mark.parametrize("kind", ROTATIONS)
def test_sora_rotation_is_orthogonal_for_factors_of_any_sizes(kind, near, of_C, of_D):
    """|RᵀR − I| ≤ 5e-13 in float64, with finite gradients; Cayley 5e-11 at angles of 10⁵.

    To float32's ε for the L and V that a float32 layer applies: a core in float32 loses six digits.
    """
    for seed in range(3):
        C, D = factors(64, 4, of_C, of_D, seed, near)
        layer, single = sora(C, D, kind), sora(C, D, kind, f32)
        R = layer.rotation_matrix()
        close(layer, R.T @ R, np.eye(64), k=1, eps=5e-13 if kind == "sora, exp" else 5e-11)
        assert np.isclose(np.linalg.det(array(R)), 1, atol=1e-9)
        grads = torch.autograd.grad(R[0].sum(), [layer.C, layer.D])
        assert all(g.isfinite().all() for g in grads)
        L, V = (array(t.float()) for t in rotation_factors(single.C, single.D, single.rotation))
        for R in (array(single.rotation_matrix()), np.eye(64) + L @ V.T):
            close(layer, R.T @ R, np.eye(64), k=1, eps=2.0**-23)


@pytest.mark.parametrize("kind", SORAS)
def test_sora_with_dead_factors_is_finite(kind):
    """C = D = 0, or a column of zeros in C alone: no division by its length."""
    layer = sora(np.zeros((5, 2)), np.zeros((5, 2)), kind)
    assert torch.equal(layer.rotation_matrix(), torch.eye(5).double())
    layer(inputs(layer, 3)).square().sum().backward()
    assert not layer.C.grad.any() and not layer.D.grad.any()
    C, D = factors(5, 2, 1, 1, 0)
    C[:, 0] = 0
    layer = sora(C, D, kind)
    close(layer, layer.rotation_matrix(), rotation(skew(C, D)[0], layer.rotation), 10, k=16)
    layer(inputs(layer, 3)).square().sum().backward()
    assert layer.C.grad.isfinite().all() and layer.D.grad.isfinite().all()
    assert layer.C.grad[:, 0].any()


@pytest.mark.parametrize("kind", ROTATIONS)
@given(seed=seeds, scale=st.sampled_from([0.1, 1.0, 30.0]), near=st.sampled_from(["any", "close"]))
def test_sora_exchanging_C_and_D_inverts_the_rotation(kind, seed, scale, near):
    """R(−P) = R(P)ᵀ = R(P)⁻¹."""
    C, D = factors(6, 2, scale, scale, seed, near)
    size = (1 + skew(C, D)[1]) ** 2
    R, back = sora(C, D, kind).rotation_matrix(), sora(D, C, kind).rotation_matrix()
    close(None, back, R.T, size, k=16)
    close(None, R @ back, np.eye(6), size, k=16)


@pytest.mark.parametrize("kind", SORAS)
@given(seed=seeds, scale=st.sampled_from([0.1, 1.0, 30.0]))
def test_sora_leaves_all_that_is_orthogonal_to_C_and_D_alone(kind, seed, scale):
    """R h = h for every h orthogonal to their columns."""
    C, D = factors(9, 2, scale, scale, seed)
    h = np.linalg.svd(np.hstack([C, D]))[0][:, 4:]
    R = sora(C, D, kind).rotation_matrix()
    close(None, array(R) @ h, h, (1 + skew(C, D)[1]) ** 2, k=32, eps=2.0**-52)


@pytest.mark.parametrize("kind", SORAS)
@pytest.mark.parametrize("length, s_P", [(1.0, 1 / 2.000001), (0.25, 1.0), (40.0, 1 / 80.000001)])
def test_sora_turns_a_known_plane_by_a_known_angle(kind, length, s_P):
    """C = c·e1, D = c·e2: R multiplies x1 + i x2 by e^(iθ), or as the others say, θ = s_P c²."""
    C, D, theta = length * np.eye(5)[:, :1], length * np.eye(5)[:, 1:2], s_P * length**2
    z = {"sora, exp": np.exp(1j * theta), "sora, first_order": 1 + 1j * theta,
         "sora, cayley": (1 + 0.5j * theta) / (1 - 0.5j * theta)}[kind]
    exact = np.eye(5)
    exact[:2, :2] = [[z.real, -z.imag], [z.imag, z.real]]
    close(None, sora(C, D, kind).rotation_matrix(), exact, (1 + theta) ** 2, k=16)


@pytest.mark.parametrize("kind", ROTATIONS)
@pytest.mark.parametrize("dtype", [f32, bf16])
def test_sora_stays_orthogonal_through_training(kind, dtype):
    """RᵀR = I and det R = +1 after steps that turned R well away from I."""
    layer = make(kind, m=12, n=12, r_p=3, dtype=dtype, trained=False)
    optimizer = torch.optim.Adam([p for p in layer.parameters() if p.requires_grad], lr=0.05)
    x, y = inputs(layer, 32), inputs(layer, 32, seed=4)
    for _ in range(30):
        optimizer.zero_grad()
        (layer(x).float() - y.float()).square().mean().backward()
        optimizer.step()
    R = array(layer.rotation_matrix())
    assert np.linalg.norm(R - np.eye(12), 2) > 0.3 and np.isclose(np.linalg.det(R), 1, atol=1e-5)
    close(layer, R.T @ R, np.eye(12), 2, k=1, eps=2.0**-23)


@for_all_layers(ROTATIONS, dtypes=(f64,), scaled=False)
def test_sora_keeps_singular_values_and_norms(layer):
    """Those of R (diag(d) W0 + sBA) are those of diag(d) W0 + sBA."""
    M = layer.diag[:, None] * layer.W0 + layer.scaling * layer.B @ layer.A
    S, exact = torch.linalg.svdvals(layer.dense()), torch.linalg.svdvals(M)
    close(layer, S, exact, oracle(layer)[1].sum())


@given(seed=seeds, scale=st.sampled_from([0.1, 1.0, 30.0]))
def test_first_order_stretches_by_exactly_PtP(seed, scale):
    """With θ = ‖P‖₂: ‖RᵀR − I‖₂ = θ², and the next orthogonal matrix is √(1+θ²) − 1 away."""
    C, D = factors(6, 2, scale, scale, seed)
    P, q = skew(C, D)
    R = array(sora(C, D, "sora, first_order").rotation_matrix())
    theta, bound = np.linalg.norm(P, 2), 32 * np.finfo(float).eps * (1 + q) ** 2
    assert abs(np.linalg.norm(R.T @ R - np.eye(6), 2) - theta**2) <= bound
    Q, S, T = np.linalg.svd(R)
    assert abs(np.linalg.norm(R - Q @ T, 2) - (math.sqrt(1 + theta**2) - 1)) <= bound
    assert (S >= 1 - bound).all()  # it never shrinks a norm


@given(seed=seeds)
def test_exp_and_cayley_differ_by_a_twelfth_of_theta_cubed(seed):
    """‖exp(P) − Cayley(P)‖ = θ³/12 + O(θ⁵)."""
    C, D = factors(6, 2, 0.15, 0.15, seed)
    theta = np.linalg.norm(skew(C, D)[0], 2)
    gap = sora(C, D, "sora, exp").rotation_matrix() - sora(C, D, "sora, cayley").rotation_matrix()
    assert abs(np.linalg.norm(array(gap), 2) - theta**3 / 12) <= theta**5 / 60 + 1e-14


@given(seed=seeds, scale=st.sampled_from([2.0, 64.0, 1024.0]))
def test_s_P_makes_the_angle_grow_linearly_but_does_not_bound_it(seed, scale):
    """Factors c times larger turn by an angle c times larger, once s_P < 1; else it would be c²."""
    C, D = factors(6, 2, 8.0, 8.0, seed)
    small, large = (sora(c * C, c * D, "sora, first_order").rotation_matrix() for c in (1.0, scale))
    ratio = np.linalg.norm(array(large) - np.eye(6)) / np.linalg.norm(array(small) - np.eye(6))
    assert abs(ratio / scale - 1) < 1e-6


def test_sora_starts_as_the_release_does():
    """C uniform on ±1/√m, D = C a tensor of its own, diag = 1."""
    torch.manual_seed(0)
    layer = make("sora, exp", m=400, r_p=8, trained=False)
    assert torch.equal(layer.C, layer.D) and layer.C.data_ptr() != layer.D.data_ptr()
    assert (layer.diag == 1).all() and abs(layer.C.mean()) < 0.1 / 20
    assert 0.99 / 20 < layer.C.max() <= 1 / 20 and -1 / 20 <= layer.C.min() < -0.99 / 20


def test_A_starts_kaiming_uniform_and_B_at_zero():
    """A uniform on ±1/√n (Kaiming with a = √5), as nn.Linear and loralib have it."""
    torch.manual_seed(0)
    layer = make("lora", n=400, r=8, trained=False)
    assert not layer.B.any() and layer.A.shape == (8, 400) and layer.B.shape == (5, 8)
    assert 0.99 / 20 < layer.A.max() <= 1 / 20 and -1 / 20 <= layer.A.min() < -0.99 / 20


# ------------------------------------------------------------------ what each can reach

def test_a_lora_update_has_entropy_at_most_log_r_and_a_conditioned_one_has_more():
    """The paper's first finding: a diagonal or a rotation lifts W' − W0 out of rank r."""
    entropy = {}
    for kind in KINDS:
        layer = make(kind, m=24, n=24, r=2)
        entropy[kind] = singular_value_entropy(layer.dense() - layer.W0).item()
    assert entropy.pop("lora") <= math.log(2) + 1e-12
    assert min(entropy.values()) > 2 * math.log(2)


@given(seed=seeds, r=st.integers(1, 5))
def test_a_lora_is_never_closer_to_a_target_than_eckart_and_young_allow(seed, r):
    """‖W' − W*‖F ≥ (Σ_{i>r} σ_i²)^½ of W* − W0, and the truncated SVD in A and B attains it."""
    layer = make("lora", m=6, n=5, r=r, seed=seed)
    target = torch.from_numpy(np.random.default_rng(seed + 1).standard_normal((6, 5)))
    U, S, Vt = torch.linalg.svd(target - layer.W0, full_matrices=False)
    bound = S[r:].norm()
    assert (layer.dense() - target).norm() >= bound - 1e-12
    k = min(r, 5)
    layer.B.data[:, :k], layer.A.data[:k] = U[:, :k] * S[:k] / layer.scaling, Vt[:k]
    layer.B.data[:, k:] = 0
    close(layer, (layer.dense() - target).norm(), bound, 10.0)


@for_all_layers(["pre_diag"] + ROTATIONS, dtypes=(f64,), scaled=False)
def test_a_diagonal_or_rotated_target_is_reached_by_the_parameters_that_name_it(layer):
    """B = 0: W' is diag(d) W0, or R of it; and a DoRA reaches diag(d) W0 too."""
    layer.B.data.zero_()
    W0, d = array(layer.base.weight), array(layer.diag)[:, None]
    target = d * W0
    if isinstance(layer, SORALinear):
        target = rotation(skew(array(layer.C), array(layer.D))[0], layer.rotation) @ target
    close(layer, layer.dense(), target, oracle(layer)[1])
    dora = DoRALinear(layer.base, 1)
    dora.magnitude.data *= layer.diag.data
    close(layer, dora.dense(), d * W0, 4 * np.abs(d * W0))


# ------------------------------------------------------------------ diagnostics

@given(k=st.integers(1, 5), scale=st.sampled_from([2.0**-126, 0.3, 2.0**126]), seed=seeds,
       dtype=st.sampled_from([f32, f64]))
def test_k_equal_singular_values_have_entropy_log_k_and_stable_rank_k(k, scale, seed, dtype):
    """Entropy log k and stable rank k, whatever the scale and the rotations on both sides."""
    rng = np.random.default_rng(seed)
    Q, T = (np.linalg.qr(rng.standard_normal((size, size)))[0] for size in (7, 5))
    delta = torch.from_numpy(scale * Q[:, :k] @ T[:k]).to(dtype)
    close(None, singular_value_entropy(delta), math.log(k), 64, k=16)  # 5 strays of ε log(1/ε) each
    close(None, stable_rank(delta), k, k, k=64)


@given(seed=seeds, m=st.integers(1, 6), n=st.integers(1, 6))
def test_diagnostics_are_their_formulas(seed, m, n):
    """−Σ p log p with p = σ/Σσ, and ‖·‖²F/‖·‖²₂; over leading dimensions too."""
    delta = np.random.default_rng(seed).standard_normal((2, m, n))
    S = np.linalg.svd(delta, compute_uv=False)
    p = S / S.sum(axis=1, keepdims=True)
    entropy = -(p * np.log(np.where(p > 0, p, 1))).sum(axis=1)
    close(None, singular_value_entropy(torch.from_numpy(delta)), entropy, 4, k=32)
    exact = (delta**2).sum(axis=(1, 2)) / S[:, 0] ** 2
    close(None, stable_rank(torch.from_numpy(delta)), exact, 6, k=32)


def test_no_update_has_entropy_and_stable_rank_0_and_half_precision_is_widened():
    assert singular_value_entropy(torch.zeros(3, 4)) == 0 and stable_rank(torch.zeros(3, 4)) == 0
    assert singular_value_entropy(torch.eye(3).bfloat16()).dtype == torch.float32
    assert stable_rank(torch.eye(3).half()) == 3


# ------------------------------------------------------------------ models

class Attention(nn.Module):
    """q_proj and v_proj, a name that only ends alike, and an output that is used at two places."""

    def __init__(self):
        super().__init__()
        self.q_proj, self.v_proj, self.xq_proj = (nn.Linear(6, 6) for _ in range(3))
        self.out = self.again = nn.Linear(6, 6, bias=False)

    def forward(self, x):
        return self.again(self.out(self.q_proj(x) * self.v_proj(x).tanh() + self.xq_proj(x)))


def model(method=None, targets=("q_proj", "v_proj"), seed=0, **kwargs):
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(6, 6), Attention(), nn.LayerNorm(6))
    return adapt(net, method, targets, **kwargs) if method else net


@torch.no_grad()
def disturb(net, seed=3):
    """Any values in all that is trained."""
    torch.manual_seed(seed)
    for p in net.parameters():
        if p.requires_grad:
            p.add_(0.3 * torch.randn_like(p))
    return net


def picture(net):
    """All that an operation which fails must leave as it was."""
    modules = [(name, id(m)) for name, m in net.named_modules(remove_duplicate=False)]
    values = [(name, id(p), p.requires_grad, p.detach().float().numpy().tobytes())
              for name, p in net.named_parameters()]
    return modules, values


@pytest.mark.parametrize("method", METHODS)
def test_adapt_freezes_the_model_and_wraps_what_the_names_match(method):
    """A name matches where it is the whole dotted name or its end after a dot; kwargs arrive."""
    net = model()
    assert adapt(net, method, ["q_proj", "1.v_proj", "0"], r=3, lora_alpha=6) is net
    wrapped = {name for name, m in net.named_modules() if type(m) is METHODS[method]}
    assert wrapped == {"0", "1.q_proj", "1.v_proj"}
    assert net[0].r == 3 and net[0].scaling == 2.0 and net[0].A.shape == (3, 6)
    letters = {"lora": "A B", "dora": "A B magnitude", "dora_matrix": "A B magnitude",
               "pre_diag": "A B diag", "sora": "A B diag C D"}[method].split()
    own = {f"{name}.{letter}" for name in wrapped for letter in letters}
    assert own == {name for name, p in net.named_parameters() if p.requires_grad}
    assert own == set(adapter_state_dict(net))


@pytest.mark.parametrize("method", METHODS)
def test_adapting_changes_no_output(method):
    """adapt(model)(x) = model(x) at step 0."""
    x = torch.randn(4, 6)
    assert torch.allclose(model(method)(x), model()(x), atol=1e-6)


def test_one_name_is_as_a_list_of_one_and_their_order_changes_nothing():
    """A is drawn in the order of the model, so that a set of names gives the same adapters too."""
    assert set(adapter_state_dict(model("lora", "q_proj"))) == {"1.q_proj.A", "1.q_proj.B"}
    states = [adapter_state_dict(model("sora", names))
              for names in (["q_proj", "0"], ["0", "q_proj"], {"0", "q_proj"})]
    assert all(torch.equal(state[name], states[0][name]) for state in states for name in states[0])


def test_adapting_uses_the_defaults_of_the_interface():
    for method in METHODS:
        layer = model(method)[1].q_proj
        assert (layer.r, layer.lora_alpha, layer.scaling) == (8, 16, 2.0)
        assert getattr(layer, "detach_norm", True) is True
        assert (getattr(layer, "r_p", 4), getattr(layer, "rotation", "exp")) == (4, "exp")


@pytest.mark.parametrize("targets", ["out", "again", ["out", "again"]])
def test_a_linear_used_at_two_places_is_wrapped_once_and_stays_shared(targets):
    net = disturb(model("sora", targets))
    attn, x = net[1], torch.randn(3, 6)
    assert attn.out is attn.again and type(attn.out) is SORALinear
    assert type(attn.out.base) is nn.Linear and len(adapter_state_dict(net)) == 5
    assert torch.equal(attn.out.C, disturb(model("sora", "out"))[1].out.C)  # drawn once
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
    assert torch.equal(net["embedding"].weight, before)
    assert not torch.equal(net["head"].weight, before)


def test_a_second_adapt_freezes_what_it_wraps_and_nothing_else():
    """Adapters and a head that train keep training; what was frozen stays so."""
    net = model("lora", "q_proj")
    net[1].q_proj.A.requires_grad_(False)
    net[2].requires_grad_(True)
    net[1].v_proj.requires_grad_(True)
    adapt(net, "sora", "v_proj")
    trained = {name for name, p in net.named_parameters() if p.requires_grad}
    sora = {f"1.v_proj.{letter}" for letter in ("A", "B", "diag", "C", "D")}
    assert trained == sora | {"1.q_proj.B", "2.weight", "2.bias"}
    assert set(adapter_state_dict(net)) == trained | {"1.q_proj.A"}


def test_a_head_trained_beside_the_adapters_is_in_the_state():
    net, twin = model("sora"), model("sora")
    net[2].requires_grad_(True)
    state = adapter_state_dict(disturb(net))
    with pytest.raises(ValueError, match=r"2 unexpected \(2.bias, 2.weight\)"):
        load_adapter_state_dict(twin, state)  # the twin's is frozen
    twin[2].requires_grad_(True)
    load_adapter_state_dict(twin, state)
    x = torch.randn(4, 6)
    assert torch.equal(twin(x), net(x))


@pytest.mark.parametrize("method", METHODS)
def test_merge_adapters_leaves_plain_linears_of_the_same_function(method):
    net, x = disturb(model(method, ["0", "q_proj", "out"])), torch.randn(5, 6)
    y = net(x)
    assert merge_adapters(net) is net and not minisora.adapters(net)
    assert set(net.state_dict()) == set(model().state_dict())
    assert torch.allclose(net(x), y, atol=1e-5)
    assert picture(merge_adapters(net)) == picture(net)  # nothing left to do


def test_merging_a_model_lets_each_base_go_before_the_next_is_merged(monkeypatch):
    """On trial all three are there; then one less each time."""
    net, merge, counts = model("lora", ["0", "q_proj", "out"]), LoRALinear.merge, []
    alive = [weakref.ref(layer) for _, layer in minisora.adapters(net)]

    def counting(layer):
        counts.append(sum(layer() is not None for layer in alive))
        return merge(layer)
    monkeypatch.setattr(LoRALinear, "merge", counting)
    merge_adapters(net)
    assert counts == [3, 3, 3, 3, 2, 1]


def test_a_layer_that_is_the_whole_model_is_adapted_and_merged():
    base = nn.Linear(3, 2)
    layer = adapt(base, "lora", [""])
    assert layer.base is base and type(merge_adapters(layer)) is nn.Linear


@pytest.mark.parametrize("method", METHODS)
def test_adapter_state_goes_through_a_file_bit_for_bit(method):
    """Loaded with weights_only=True into a model adapted alike. The state is a copy."""
    net, twin, buffer, x = disturb(model(method)), model(method), io.BytesIO(), torch.randn(4, 6)
    state = adapter_state_dict(net)
    torch.save(state, buffer)
    buffer.seek(0)
    load_adapter_state_dict(twin, torch.load(buffer, weights_only=True))
    assert torch.equal(twin(x), net(x))
    disturb(net)
    load_adapter_state_dict(net, state)  # back to the snapshot
    assert torch.equal(twin(x), net(x)) and not any(t.requires_grad for t in state.values())


def test_a_model_without_adapters_has_no_adapter_state():
    """After a merge it is too late, and an empty state would say so to nobody."""
    state, net = adapter_state_dict(model("lora")), merge_adapters(model("lora"))
    for call in (adapter_state_dict, lambda net: load_adapter_state_dict(net, state)):
        with pytest.raises(ValueError, match="has no adapters"):
            call(net)


def test_a_state_made_of_the_models_own_tensors_is_copied_first():
    net = disturb(model("lora"))
    own, before = dict(net.named_parameters()), adapter_state_dict(net)
    q, v = own["1.q_proj.A"], own["1.v_proj.A"]
    load_adapter_state_dict(net, {**before, "1.q_proj.A": v, "1.v_proj.A": q})
    assert torch.equal(q, before["1.v_proj.A"]) and torch.equal(v, before["1.q_proj.A"])


# ------------------------------------------------------------------ bad input

class Subclassed(nn.Linear):
    pass


class Piece(torch.Tensor):
    """Stands for any weight of a class of its own: quantised, sharded."""


def linear(dtype=f32, weight=None, **attributes):
    base = nn.Linear(3, 2, dtype=dtype)
    for name, value in attributes.items():
        setattr(base, name, value)
    if weight is not None:
        base._parameters["weight"] = weight
    return base


def hooked():
    base = nn.Linear(3, 2)
    base.register_forward_pre_hook(lambda *args: None)
    return base


BAD_BASES = {
    "NoneType": lambda: None,
    "Conv1d": lambda: nn.Conv1d(3, 2, 1),
    "Subclassed": lambda: Subclassed(3, 2),
    "LazyLinear": lambda: nn.LazyLinear(2),
    "DoRALinear": lambda: DoRALinear(nn.Linear(3, 2)),
    "Parameter": lambda: nn.Linear(3, 2).weight,
    "ParametrizedLinear": lambda: nn.utils.parametrizations.weight_norm(nn.Linear(3, 2)),
    "weight Tensor": lambda: prune.l1_unstructured(nn.Linear(3, 2), "weight", 0.5),
    "weight Piece": lambda: linear(weight=nn.Parameter(torch.rand(2, 3).as_subclass(Piece))),
    "int8": lambda: linear(weight=nn.Parameter(torch.ones(2, 3, dtype=torch.int8), False)),
    "float8_e4m3fn": lambda: linear(weight=nn.Parameter(torch.ones(2, 3).to(torch.float8_e4m3fn))),
    "complex64": lambda: linear(torch.complex64),
    "meta": lambda: nn.Linear(3, 2, device="meta"),
    "Size([0, 3])": lambda: nn.Linear(3, 0),
    "a forward of its own": lambda: linear(forward=lambda x: x),
    "_forward_pre_hooks": hooked,
    "Size([1, 3])": lambda: linear(weight=nn.Parameter(torch.ones(1, 3))),
}


@pytest.mark.filterwarnings("ignore:Initializing zero-element")
@pytest.mark.parametrize("got", BAD_BASES)
def test_a_base_that_is_no_plain_linear_is_refused_by_what_it_is(got):
    """By the layer and by adapt, with the name in the model; nothing is frozen."""
    base = BAD_BASES[got]()
    with pytest.raises(TypeError, match="base must be exactly an nn.Linear") as info:
        LoRALinear(base)
    assert got in str(info.value)
    if isinstance(base, nn.Module) and not isinstance(base, Adapter):
        net = nn.ModuleDict({"ok": nn.Linear(2, 2), "odd": base})
        with pytest.raises(TypeError, match="odd must be exactly an nn.Linear"):
            adapt(net, "sora", ["ok", "odd"])
        assert net["ok"].weight.requires_grad and type(net["ok"]) is nn.Linear


def test_a_model_built_on_meta_is_refused_before_it_is_filled():
    """Adapted first and filled by to_empty later, its adapters would hold garbage."""
    with torch.device("meta"):
        net = nn.Sequential(nn.Linear(3, 2))
    with pytest.raises(TypeError, match="0 must be .* or meta"):
        adapt(net, "lora", ["0"])


BAD_ARGUMENTS = [({"r": 0}, "r must be a whole number ≥ 1, got 0"), ({"r": -2}, "r .* got -2"),
                 ({"r": 2.5}, "r must be .* got 2.5"), ({"r": True}, "r must be .* got True"),
                 ({"r": "8"}, "r must be .* got '8'"), ({"r": np.float64(8)}, "r must be .* got"),
                 ({"lora_alpha": 1e-46}, "lora_alpha .* got 1e-46"),
                 ({"lora_alpha": 1e300}, "lora_alpha .* got 1e"),
                 ({"r_p": 0}, "r_p must be .* ≥ 1, got 0"),
                 ({"r_p": None}, "r_p must be .* got None"),
                 ({"lora_alpha": 0}, "lora_alpha / r must be finite and not 0, got 0"),
                 ({"lora_alpha": math.nan}, "lora_alpha .* got nan"),
                 ({"lora_alpha": -math.inf}, "lora_alpha .* got -inf"),
                 ({"rotation": "householder"}, "exp, cayley or first_order, got 'householder'")]


@pytest.mark.parametrize("wrong, message", BAD_ARGUMENTS)
def test_a_wrong_argument_is_refused_by_name_and_leaves_the_base_trainable(wrong, message):
    base = nn.Linear(3, 2)
    with pytest.raises(ValueError, match=message):
        SORALinear(base, **wrong)
    assert all(p.requires_grad for p in base.parameters())


def test_an_unknown_rotation_has_no_factors():
    with pytest.raises(ValueError, match="unknown rotation 'householder'"):
        rotation_factors(torch.ones(2, 1), torch.ones(2, 1), "householder")


def test_what_is_no_number_is_no_lora_alpha_and_no_fraction_is_a_rank():
    for wrong in ({"lora_alpha": "16"}, {"lora_alpha": None}, {"r": torch.tensor(8.5)}):
        with pytest.raises(TypeError):
            LoRALinear(nn.Linear(3, 2), **wrong)


def test_whole_and_finite_numbers_of_any_kind_do():
    layer = SORALinear(nn.Linear(3, 2), np.int64(4), np.float32(-8), r_p=torch.tensor(2))
    assert layer.A.shape == (4, 3) and layer.scaling == -2.0 and layer.C.shape == (2, 2)


@every_kind
def test_x_that_the_weight_cannot_meet_is_refused(kind):
    layer = make(kind)
    for shape in ((4, 6), (), (7, 8)):
        message = f"x must be (…, 7) and W0 (5, 7) whole, all on one device; got x {shape}"
        with pytest.raises(ValueError, match=re.escape(message)):
            layer(torch.zeros(shape).double())


@every_kind
def test_a_weight_that_moved_to_meta_is_refused_before_it_is_read(kind):
    """torch on the CPU would multiply by it and return what memory holds."""
    for name in ("base.weight", "A", "B"):
        layer = make(kind)
        p = layer.get_parameter(name)
        owner = layer.base if name == "base.weight" else layer
        moved = nn.Parameter(p.detach().to("meta"), p.requires_grad)
        owner._parameters[name.rpartition(".")[2]] = moved
        for use in (lambda: layer(inputs(make(kind), 2)), layer.merge):
            with pytest.raises(ValueError, match="one device"):
                use()


class SecondFails(LoRALinear):
    def __init__(self, base, **kwargs):
        super().__init__(base, **kwargs)
        if base.bias is None:
            raise KeyboardInterrupt


def test_a_method_that_fails_at_its_second_layer_leaves_the_model_trainable(monkeypatch):
    monkeypatch.setitem(METHODS, "fails", SecondFails)
    net = model()
    before = picture(net)
    with pytest.raises(KeyboardInterrupt):
        adapt(net, "fails", ["0", "q_proj", "out"])
    assert picture(net) == before


def test_a_lazy_layer_beside_the_adapted_ones_is_frozen_too():
    net = adapt(nn.Sequential(nn.Linear(3, 2), nn.LazyLinear(4)), "lora", "0")
    net(torch.rand(1, 3)).sum().backward()
    assert [name for name, p in net.named_parameters() if p.requires_grad] == ["0.A", "0.B"]


def test_messages_have_a_bounded_length():
    net = adapt(nn.ModuleList(nn.Linear(2, 2) for _ in range(300)), "lora", ["0"])
    for call in (lambda: adapt(net, "lora", [f"missing.{i}" for i in range(300)]),
                 lambda: load_adapter_state_dict(net, {"x" * 10**5: torch.zeros(1)}),
                 lambda: load_adapter_state_dict(net, {"0.A": torch.zeros(8, 3)})):
        with pytest.raises(ValueError) as info:
            call()
        assert len(str(info.value)) < 500


@pytest.mark.parametrize("message, targets, options", [
    ("lora, dora, dora_matrix, pre_diag, sora, got 'vera'", ["0"], {"method": "vera"}),
    ("['proj'] match no module", ["0", "proj"], {}),
    ("are named ['0', 'out', 'v_proj', 'xq_proj']", ["k_proj"], {}),
    ("[] match no module", [], {}),
    ("2 must be exactly an nn.Linear", ["0", "2"], {}),
    ("1.q_proj is already adapted", ["0", "q_proj"], {}),
    ("1.q_proj.base is already adapted", ["base"], {}),
    ("r must be", ["0"], {"r": 0})])
def test_a_call_of_adapt_that_is_refused_names_the_offender_and_changes_nothing(
        message, targets, options):
    net = disturb(model("lora", "q_proj"))
    net[2].requires_grad_(True)
    before = picture(net)
    with pytest.raises((ValueError, TypeError), match=re.escape(message)):
        adapt(net, **{"method": "dora", "target_modules": targets, **options})
    assert picture(net) == before


def refused_state(change):
    """The message for the state of a model after change(state). The model stays as it was."""
    net = disturb(model("lora", "q_proj"))
    before, state = picture(net), {name: t + 1 for name, t in adapter_state_dict(net).items()}
    change(state)
    with pytest.raises(ValueError) as info:
        load_adapter_state_dict(net, state)
    assert picture(net) == before
    return str(info.value)


@pytest.mark.parametrize("wrong", [
    torch.zeros(2, 6), torch.zeros(9, 6), torch.zeros(8, 6).long(), torch.zeros(8, 6) * 1j, [1.0],
    torch.full((8, 6), math.nan), torch.full((8, 6), 1e300, dtype=f64), None, np.zeros((8, 6)),
    torch.zeros(8, 6).as_subclass(Piece), torch.zeros(8, 6, device="meta"),
    torch.zeros(8, 6).to_sparse()])
def test_a_state_with_a_tensor_that_does_not_fit_is_refused_by_name_and_shape(wrong):
    message = refused_state(lambda state: state.update({"1.q_proj.A": wrong}))
    assert "1.q_proj.A must be finite floats of shape (8, 6), got " in message
    assert type(wrong).__name__ in message


def test_a_state_with_other_names_is_refused_with_their_numbers():
    message = refused_state(lambda state: state.pop("1.q_proj.A"))
    assert "1 missing (1.q_proj.A), 0 unexpected ()" in message
    message = refused_state(lambda state: state.update({"e": state.pop("1.q_proj.A")}))
    assert "1 missing (1.q_proj.A), 1 unexpected (e)" in message and "prefix" not in message


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod."])
def test_a_state_whose_names_have_a_prefix_is_refused_in_a_short_message(prefix):
    net = nn.Sequential(*(Attention() for _ in range(40)))
    adapt(net, "sora", ["q_proj", "v_proj"], r=1)
    state = {prefix + name: t for name, t in adapter_state_dict(net).items()}
    with pytest.raises(ValueError, match=f"all with the prefix '{prefix}'") as info:
        load_adapter_state_dict(net, state)
    assert "400 missing (0.q_proj.A, " in str(info.value) and len(str(info.value)) < 400


def flat(p):
    p.data = p.data.flatten()


def on_meta(net):
    net[1].q_proj._parameters["B"] = nn.Parameter(net[1].q_proj.B.to("meta"))


BROKEN = {
    "1.q_proj.A is sharded": lambda net: flat(net[1].q_proj.A),
    "0.weight is sharded": lambda net: flat(net[0].requires_grad_(True).weight),
    "2.weight is sharded": lambda net: setattr(net[2].weight, "data", torch.zeros(0)),
    "1.q_proj.B is sharded, empty or on meta": on_meta,
    "2.bias is sharded, empty or on meta: Piece": lambda net: net[2]._parameters.update(
        bias=nn.Parameter(torch.zeros(6).as_subclass(Piece))),
}


@pytest.mark.parametrize("message", BROKEN)
def test_a_sharded_parameter_is_refused_by_name_with_what_to_do(message):
    """A flat piece of FSDP1, an empty one, a tensor of another class (DTensor), or none at all."""
    net = model("lora", "q_proj")
    net[2].requires_grad_(True)
    state = adapter_state_dict(net)
    BROKEN[message](net)
    for call in (adapter_state_dict, lambda net: load_adapter_state_dict(net, state)):
        with pytest.raises(ValueError, match="summon_full_params.*full_state_dict=True") as info:
            call(net)
        assert message in str(info.value)


@every_kind
def test_a_sharded_base_is_not_merged(kind):
    """A flat piece of FSDP1."""
    layer = make(kind)
    flat(layer.base.weight)
    with pytest.raises(ValueError, match=r"W0 \(5, 7\) whole.*got .*W0 \(35,\)"):
        layer.merge()


CHANGES = {
    "weight Tensor": lambda base: prune.identity(base, "weight"),
    "ParametrizedLinear": nn.utils.parametrizations.weight_norm,
    "_forward_hooks": lambda base: base.register_forward_hook(lambda *args: None),
    "int8": lambda base: setattr(base.weight, "data", base.weight.data.to(torch.int8)),
}


@pytest.mark.parametrize("got", CHANGES)
def test_a_base_that_changed_after_adapt_is_not_merged(got):
    """A weight that a hook computes would forget W'. Nothing is replaced."""
    net = disturb(model("lora"))
    CHANGES[got](net[1].q_proj.base)
    before = picture(net)
    with pytest.raises(TypeError, match=f"1.q_proj: base must be .*{got}"):
        merge_adapters(net)
    assert picture(net) == before


def test_a_linear_without_a_weight_of_its_own_does_not_hinder_the_state():
    """One that borrows its weight elsewhere."""
    net = model("lora", "q_proj")
    net.append(Subclassed(3, 2, bias=False))
    net[-1].weight = None
    assert len(adapter_state_dict(net)) == 2


@every_kind
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_weights_that_are_not_finite_are_not_merged(kind, bad):
    """Neither by the layer nor in a model, where nothing is then replaced."""
    net = nn.Sequential(make("lora", m=7), make(kind))
    net[1].A.data[0, 0] = bad
    before = picture(net)
    for merge, name in ((net[1].merge, ""), (lambda: merge_adapters(net), "1: ")):
        with pytest.raises(ValueError, match=f"^{name}{type(net[1]).__name__}.merge: .*not finite"):
            merge()
    assert picture(net) == before


def test_a_weight_that_overflows_on_the_cast_is_not_merged():
    half = LoRALinear(nn.Linear(3, 2).half(), r=1)
    half.B.data.fill_(1e6)
    with pytest.raises(ValueError, match="not finite"):
        half.merge()


# ------------------------------------------------------------------ in other code

@pytest.mark.parametrize("method", METHODS)
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_transformer_encoder_is_right_on_its_fast_path(method):
    """In eval mode it reads linear1.weight past the module, and finds W'; in padded batches."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    net = disturb(adapt(nn.TransformerEncoder(layer, 2), method, ["linear1", "linear2"], r=2))
    x, padding = torch.randn(3, 5, 8), torch.arange(5) >= torch.tensor([[5], [3], [4]])
    slow, plain = net(x, src_key_padding_mask=padding), merge_adapters(copy.deepcopy(net)).eval()
    with torch.no_grad():
        fast, merged = (m(x, src_key_padding_mask=padding)[~padding] for m in (net.eval(), plain))
    assert torch.allclose(fast, slow[~padding], atol=1e-4)
    assert torch.allclose(fast, merged, atol=1e-5)


# ------------------------------------------------------------------ the price, in counts

def test_a_layer_costs_the_operations_and_bytes_of_its_thin_form():
    """At 2048 tokens, 1024 → 1024, r = 16, r_p = 4: figures that depend on no machine."""
    T, d, r, q = 2048, 1024, 16, 8  # q = 2 r_p
    soras = ("sora", "sora cayley", "sora first_order")
    layers = train_tiny.bench_layers(d, torch.device("cpu"), f32)
    x = torch.randn(T, d, requires_grad=True)
    count = {name: train_tiny.flops(layer, x) for name, layer in layers.items()}
    kept = {name: train_tiny.saved_bytes(layer, x) / (T * d * 4) for name, layer in layers.items()}
    assert count["linear"] == 2 * (2 * T * d * d)  # forward, and backward to x
    assert count["lora"] == count["pre_diag"] == count["linear"] + 3 * 2 * T * r * (d + d)
    assert count["dora_matrix"] == count["lora"] + 2 * (d * d * r + 2 * d * r * r)  # and the norm
    assert count["dora"] == 1.5 * count["linear"] + 3 * 2 * d * d * r  # W' and its (m, n) gradient
    # Rank r + q, and (d ∘ V)ᵀW0 with its gradient; the rest has no T and only one d in it.
    sora = count["linear"] + 3 * 2 * T * (r + q) * (d + d) + 2 * 2 * d * d * q
    assert all(sora < count[name] < 1.001 * sora for name in soras)
    assert kept["linear"] == 0 and kept["lora"] <= 0.05
    assert kept["pre_diag"] <= 1.03 and kept["dora_matrix"] <= 1.033  # no graph of a norm
    assert all(1 <= kept[name] <= 1.15 for name in soras)
    assert kept["dora"] > 2 * d / T  # W0 + sBA and W', each (m, n)
    with torch.no_grad():
        assert all(train_tiny.saved_bytes(layer, x) == 0 for layer in layers.values())
    merged = layers["sora"].merge()
    assert train_tiny.flops(merged, x) == count["linear"] and train_tiny.saved_bytes(merged, x) == 0


# ------------------------------------------------------------------ train_tiny.py

SMALL = {"DIM": 32, "LAYERS": 1, "CONTEXT": 16, "BATCH": 4, "BASE_STEPS": 4, "STEPS": 4,
         "BENCH_SIZES": [(32, 16)], "BENCH_ROUNDS": 2}
KEYS = {"method", "seed", "lr", "trainable", "bpb", "merged_bpb", "ms_per_step", "entropy",
        "stable_rank", "orthogonality"}


@pytest.fixture
def script(monkeypatch, tmp_path):
    """Run the script at a small size; returns its exit status and its results."""
    for name, value in SMALL.items():
        monkeypatch.setattr(train_tiny, name, value)

    def run(*argv):
        file = tmp_path / "record.json"
        status = train_tiny.main(["--device", "cpu", "--json", str(file), *argv])
        return status, json.loads(file.read_text())
    return run


def test_the_record_holds_every_method_and_seed_with_its_keys(script):
    methods = ["full", "lora", "dora", "dora_matrix", "sora", "sora_first_order"]
    status, record = script("--seeds", "2", "--methods", *methods)
    by = {(r["method"], r["seed"]): r for r in record["results"]}
    assert status == 0 and by.keys() == {(m, s) for m in methods for s in (0, 1)}
    assert {"device", "torch", "python", "config", "base", "results"} <= record.keys()
    assert record["base"].keys() == {"base_bpb", "target_bpb"}
    for r in record["results"]:
        assert r.keys() == KEYS and r["bpb"] == pytest.approx(r["merged_bpb"], abs=1e-5)
        assert (r["orthogonality"] is not None) == r["method"].startswith("sora")
    for seed in (0, 1):
        assert by["dora", seed]["bpb"] == pytest.approx(by["dora_matrix", seed]["bpb"], abs=1e-5)
        assert by["sora", seed]["orthogonality"] < 1e-6
        assert by["sora_first_order", seed]["orthogonality"] > 1e-6
    assert by["sora", 0]["bpb"] != by["sora", 1]["bpb"]


def test_rows_at_equal_parameters_have_about_equal_parameters():
    base = train_tiny.GPT()
    count = {}
    for name in train_tiny.METHODS:
        trained = train_tiny.adapted(base, name, 0).parameters()
        count[name] = sum(p.numel() for p in trained if p.requires_grad)
    assert count["lora_r13"] == pytest.approx(count["sora"], rel=0.01)
    assert count["sora_r3"] == pytest.approx(count["lora"], rel=0.01)
    assert count["sora_no_diag"] < count["sora"]


def results(*scores):
    """What a run leaves behind, for these (method, seed, bpb)."""
    rest = {"trainable": 445952, "merged_bpb": 2.5, "ms_per_step": 999.9, "entropy": 4.0}
    return {"config": {"parameters": 445952}, "base": {"target_bpb": 3.0}, "results": [
        {"method": method, "seed": seed, "bpb": bpb, **rest,
         "orthogonality": 1e-7 if "sora" in method else None} for method, seed, bpb in scores]}


def test_the_table_of_five_seeds_of_all_rows_fits_100_columns(capsys):
    scores = [(name, seed, 2.5 + seed / 9) for name in train_tiny.METHODS for seed in range(5)]
    train_tiny.report(results(*scores))
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 + len(train_tiny.METHODS) + 2 and max(map(len, lines)) <= 100
    assert lines[3].startswith("lora ") and "+0.0000 ± 0.0000" in lines[3]


def test_the_difference_from_lora_is_paired_with_its_standard_error(capsys):
    scores = [("lora", 0, 2.0), ("lora", 1, 3.0), ("dora", 0, 2.1), ("dora", 1, 3.3)]
    train_tiny.report(results(*scores))
    assert "+0.2000 ± 0.1000" in capsys.readouterr().out


def test_a_method_that_diverges_is_a_row_and_the_rest_stands(script, monkeypatch, capsys):
    monkeypatch.setitem(train_tiny.METHODS, "sora", ("sora", {}, 1e30))
    status, record = script("--methods", "full", "lora", "sora")
    bpb = {r["method"]: r["bpb"] for r in record["results"]}
    row = [line for line in capsys.readouterr().out.splitlines() if line.startswith("sora ")]
    assert status == 0 and "diverged" in row[0]
    assert bpb["sora"] is None and 0 < bpb["full"] < 10 and 0 < bpb["lora"] < 10


def interrupt_at_seed(monkeypatch, seed):
    adapted = train_tiny.adapted

    def interrupted(base, name, s):
        if s == seed:
            raise KeyboardInterrupt
        return adapted(base, name, s)
    monkeypatch.setattr(train_tiny, "adapted", interrupted)


def test_an_interrupt_keeps_what_is_finished_and_exits_with_130(script, monkeypatch, capsys):
    interrupt_at_seed(monkeypatch, 1)
    status, record = script("--methods", "lora", "sora", "--seeds", "3")
    out = capsys.readouterr().out
    assert status == 130 and [r["method"] for r in record["results"]] == ["lora", "sora"]
    assert "bits/byte" in out and out.splitlines()[-1].startswith("Interrupted: 2 results")


def test_an_interrupt_before_any_result_is_one_calm_line(monkeypatch, capsys):
    monkeypatch.setattr(train_tiny, "train", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
    assert train_tiny.main(["--device", "cpu"]) == 130
    assert capsys.readouterr().out.splitlines()[-1].startswith("Interrupted: 0 results")


def test_the_record_is_written_before_anything_is_printed_about_it(script, monkeypatch, tmp_path):
    def broken(record):
        raise BrokenPipeError
    monkeypatch.setattr(train_tiny, "report", broken)
    with pytest.raises(BrokenPipeError):
        script("--methods", "lora", "dora")
    record = json.loads((tmp_path / "record.json").read_text())
    assert [r["method"] for r in record["results"]] == ["lora", "dora"]


@pytest.mark.parametrize("flag", ["--quick", "--reach", "--bench"])
def test_any_console_will_do(flag, script, monkeypatch):
    console = io.TextIOWrapper(io.BytesIO(), encoding="cp1252")
    monkeypatch.setattr(sys, "stdout", console)
    script(flag, "--steps", "2")
    console.flush()
    table = console.buffer.getvalue().decode("cp1252")
    assert {"--quick": "bits/byte", "--reach": "best rank r", "--bench": "GFLOP"}[flag] in table


def test_lora_reaches_the_bound_of_its_rank_and_sora_alone_a_rotation(script, monkeypatch):
    monkeypatch.setattr(train_tiny.minisora, "METHODS",
                        {name: train_tiny.minisora.METHODS[name] for name in ("lora", "sora")})
    rows = {row["target"]: row for row in script("--reach", "--steps", "60")[1]["results"]}
    assert len(rows) == 4 and rows["low rank"]["sora"] < 0.1
    for row in rows.values():
        assert row["lora"] == pytest.approx(row["best rank r"], abs=0.03)
    assert rows["rotation"]["sora"] < 0.1 and rows["rotation"]["lora"] > 0.5


def test_the_bench_has_a_row_for_each_layer(script, capsys):
    results = script("--bench")[1]["results"]
    assert [r["layer"] for r in results] == [
        "linear", *METHODS, "dora as in PEFT", "sora cayley", "sora first_order"]
    assert results[1]["/ lora"] == 1 and all(r["ms"] > 0 for r in results)
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 100 and lines[-1].startswith("sora first_order")


def test_dora_as_in_peft_is_dora():
    layers, x = train_tiny.bench_layers(16, torch.device("cpu"), f32), torch.randn(5, 16)
    peft, dora = layers["dora as in PEFT"], layers["dora"]
    dora.load_state_dict(peft.state_dict())
    close(dora, peft(x), dora(x), output(dora, x)[1])


@pytest.mark.parametrize("file", ["no/where.json", "."])
def test_a_record_that_cannot_be_written_stops_the_run_before_any_work(file, monkeypatch):
    monkeypatch.setattr(train_tiny, "experiment", None)
    with pytest.raises(OSError, match=file):
        train_tiny.main(["--json", file])


@pytest.mark.parametrize("command", ["--steps 0", "--seeds 0", "--device mps", "--device cuda"])
def test_what_cannot_be_done_is_refused_with_status_2(command, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(SystemExit) as info:
        train_tiny.main(command.split())
    assert info.value.code == 2 and command.split()[0] in capsys.readouterr().err


# ------------------------------------------------------------------ two processes

DDP_SCRIPT = '''
import sys
import torch
from minisora import METHODS, adapt

rank, meeting = int(sys.argv[1]), sys.argv[2]
torch.set_num_threads(1)
torch.distributed.init_process_group(
    "gloo", init_method=f"file://{meeting}", rank=rank, world_size=2)

def gradients(method, wrap, part):
    torch.manual_seed(0)
    body = [torch.nn.Linear(8, 6), torch.nn.Tanh(), torch.nn.Linear(6, 4), torch.nn.Linear(4, 3)]
    model = adapt(torch.nn.Sequential(*body), method, ["0", "2"])
    model[3].requires_grad_(True)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.1 * torch.randn_like(p))
    x = torch.randn(16, 8)[part]
    wrapped = wrap(model)  # kept to the end: when it goes, so does the averaging
    wrapped(x).square().mean().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}

for method in METHODS:
    both = gradients(method, torch.nn.parallel.DistributedDataParallel, slice(rank, None, 2))
    alone = gradients(method, lambda model: model, slice(None))
    for name in alone:
        assert alone[name].abs().max() > 0, (method, name)
        torch.testing.assert_close(both[name], alone[name], rtol=1e-4, atol=1e-6)
torch.distributed.destroy_process_group()
'''


def test_distributed_data_parallel_gives_the_gradients_of_one_process(tmp_path):
    def start(rank):
        command = [sys.executable, "-c", DDP_SCRIPT, str(rank), str(tmp_path / "meeting")]
        return subprocess.Popen(command, cwd=HERE,
                                stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    workers = [start(rank) for rank in range(2)]
    try:
        for worker in workers:
            output, _ = worker.communicate(timeout=120)
            assert worker.returncode == 0, output
    finally:
        for worker in workers:
            worker.kill()


# ------------------------------------------------------------------ the README

HERE = pathlib.Path(__file__).parent
README = (HERE / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.S)


def table(heading):
    """The rows, as lists of cells, of the first table under a heading."""
    lines = README.split(f"\n## {heading}\n", 1)[1].splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("|"))
    rows = [line.strip("|").split(" | ") for line in lines[start:lines.index("", start)]]
    return rows[2:]


def test_readme_names_tests_that_exist_and_lines_that_are_right():
    for row in table("Equation, code, proof"):
        assert re.findall(r"`(test_\w+)`", row[2]), row
    for name in re.findall(r"`(test_\w+)`", README):
        assert callable(globals()[name]), name
    links = re.findall(r"\[`([\w.]+)`\]\(minisora\.py#L(\d+)\)", README)
    assert {cls.__name__ for cls in METHODS.values()} <= {name for name, _ in links}
    for name, line in links:
        assert inspect.getsourcelines(getattr(minisora, name))[1] == int(line), name


@pytest.mark.parametrize("block", BLOCKS, ids=range(len(BLOCKS)))
def test_readme_python_blocks_run_and_leave_no_file_behind(block, tmp_path, monkeypatch):
    """Their asserts are the recipes' promises."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(minisora, "METHODS", dict(METHODS))
    exec(block, {})
    assert not list(tmp_path.iterdir())


def copied(names):
    """These names of the module alone, in a namespace with copy, math and torch."""
    namespace = {"copy": copy, "math": math, "torch": torch}
    for name in names:
        exec(inspect.getsource(getattr(minisora, name)), namespace)
    return namespace


@pytest.mark.parametrize("kind", THIN + ["dora"])
def test_a_class_copies_out_with_the_names_the_readme_says_and_no_fewer(kind):
    """It trains and merges, and says the same."""
    layer = make(kind)
    name, options = type(layer).__name__, KINDS[kind][1]
    names = {row[0].strip("` "): re.findall(r"`(\w+)`", row[1])
             for row in table("Copy one layer out")}[name]
    if name == "SORALinear":
        options = {**options, "r_p": 2}
    twin = copied(names)[name](copy.deepcopy(layer.base), 3, 5, **options)
    twin.load_state_dict(layer.state_dict())
    assert train(twin) == train(layer)
    assert torch.equal(twin.merge().weight, layer.merge().weight)
    for spare in names:
        with pytest.raises((NameError, KeyError)):
            layer = copied([other for other in names if other != spare])[name](nn.Linear(3, 2))
            layer(torch.zeros(1, 3))


def readme_block(text):
    """The names that the README's Python block with this text defines."""
    namespace = {}
    exec(next(block for block in BLOCKS if text in block), namespace)
    return namespace


CONFIG = {"peft_type": "LORA", "r": 2, "lora_alpha": 6, "target_modules": "a regular.*expression",
          "bias": "none", "init_lora_weights": True, "lora_dropout": 0.1, "peft_version": "0.21.2",
          "megatron_core": "megatron.core", "qalora_group_size": 16, "inference_mode": True,
          "use_dora": False, "use_rslora": False, "rank_pattern": {}, "modules_to_save": None}


def peft_model():
    torch.manual_seed(0)
    return torch.nn.ModuleDict({"q_proj": torch.nn.Linear(6, 5), "o_proj": torch.nn.Linear(5, 6)})


def peft_file(dora):
    """The tensors of a file with PEFT's key names, for q_proj alone."""
    key = "base_model.model.q_proj.lora_"
    tensors = {key + "A.weight": torch.randn(2, 6), key + "B.weight": torch.randn(5, 2)}
    if dora:
        tensors[key + "magnitude_vector"] = torch.rand(5)
    return tensors


@pytest.mark.parametrize("dora", [False, True])
def test_a_peft_file_becomes_the_weight_that_peft_writes_down_and_comes_back(dora):
    readme = readme_block("def from_peft")
    tensors = peft_file(dora)
    A, B, *magnitude = tensors.values()
    method, targets, kwargs, state = readme["from_peft"]({**CONFIG, "use_dora": dora}, tensors)
    model = adapt(peft_model(), method, targets, **kwargs)
    load_adapter_state_dict(model, state)
    W = model["q_proj"].W0 + 6 / 2 * B @ A
    if dora:
        W = magnitude[0][:, None] * W / W.norm(dim=1, keepdim=True)
    torch.testing.assert_close(model["q_proj"].adapted_weight(), W)
    assert type(model["o_proj"]) is torch.nn.Linear
    config, back = readme["to_peft"](method, targets, kwargs, adapter_state_dict(model))
    assert back.keys() == tensors.keys()
    assert all(torch.equal(back[key], tensors[key]) for key in tensors)
    assert (config["peft_type"], config["r"], config["lora_alpha"]) == ("LORA", 2, 6)
    assert config["use_dora"] is dora and config["target_modules"] == ["q_proj"]


@pytest.mark.parametrize("field, value", [
    ("peft_type", "IA3"), ("use_rslora", True), ("alpha_pattern", {"q_proj": 4}),
    ("rank_pattern", {"q_proj": 4}), ("init_lora_weights", "pissa"), ("bias", "lora_only"),
    ("init_lora_weights", "olora"), ("modules_to_save", ["head"]), ("fan_in_fan_out", True),
    ("use_qalora", True), ("layer_replication", [[0, 1]]), ("a_field_of_the_future", True)])
def test_a_peft_setting_that_means_another_function_is_refused_by_name(field, value):
    with pytest.raises(ValueError, match=field):
        readme_block("def from_peft")["from_peft"]({**CONFIG, field: value}, peft_file(False))


@pytest.mark.parametrize("key", [
    "q_proj.lora_A.weight", "base_model.model.head.weight", "base_model.model.q_proj.lora_B.bias",
    "base_model.model.q_proj.lora_embedding_A"])
def test_a_peft_tensor_that_is_no_linears_adapter_is_refused_by_name(key):
    with pytest.raises(ValueError, match=key):
        readme_block("def from_peft")["from_peft"](CONFIG, {key: torch.ones(2, 2)})


@pytest.mark.parametrize("method", METHODS)
def test_only_lora_and_dora_go_to_peft_and_nothing_trained_beside_them(method):
    to_peft = readme_block("def from_peft")["to_peft"]
    net = adapt(peft_model(), method, "q_proj")
    state = adapter_state_dict(net)
    if method in ("pre_diag", "sora"):
        with pytest.raises(ValueError, match=method):
            to_peft(method, ["q_proj"], {}, state)
    else:
        config, _ = to_peft(method, ["q_proj"], {}, state)
        assert (config["r"], config["lora_alpha"]) == (8, 16)  # the defaults of adapt
    rest = {"o_proj.weight": torch.ones(1)} if method == "lora" else {}
    with pytest.raises(ValueError, match="no place for"):
        to_peft("lora", ["q_proj"], {}, {**state, **rest})
