# SPDX-License-Identifier: MIT
"""minisora: weight conditioning for fine-tuning, in one file.

After *Calibrating and Rotating: A Unified Framework for Weight Conditioning in PEFT*
(arXiv 2511.00051, AAAI 2026). A linear layer is y = x W0ᵀ + b. Fine-tuning freezes W0 and b, and
trains a few parameters that turn W0 into W'. At first W' = W0.

    W0, W' (m, n)       m = out_features, n = in_features
    A (r, n), B (m, r)  trained factors of the rank-r update sBA, s = lora_alpha / r
    d (m,)              trained diagonal, the parameter `diag`
    c (m,)              trained `magnitude` over the row lengths of W0 + sBA
    C, D (m, r_p)       trained factors of a skew P (m, m), Pᵀ = −P; unrelated to c, d
    R (m, m)            the rotation e^P, kept as I + LVᵀ with thin L, V (m, 2 r_p)

A conditioning matrix multiplies W0 alone (before the update), or the sum (after it):

              before   after    W'                     in code
    LoRA      –        –        W0 + sBA               Weight(W0, None, sB, A)
    Pre-Diag  diag(d)  –        diag(d) W0 + sBA       Weight(W0, d, sB, A)
    DoRA      –        diag(c)  diag(c) (W0 + sBA)     scale(c, Weight(W0, None, sB, A))
    SORA      diag(d)  R        R (diag(d) W0 + sBA)   rotate(L, V, Weight(W0, d, sB, A))
"""
import copy
import math
from typing import NamedTuple

import torch
from torch import nn

class Weight(NamedTuple):
    """diag(d) M + up @ down, an (m, n) matrix kept in parts. Only matrix() forms it."""
    M: torch.Tensor  # (m, n): W0, maybe half precision, or the method's own
    d: torch.Tensor = None  # (m,), None for 1
    up: torch.Tensor = None  # (m, k) with a small k, None for 0
    down: torch.Tensor = None  # (k, n)

def wide_dtype(tensor):  # at least float32
    return torch.promote_types(tensor.dtype, torch.float32)

def matrix(W):
    """W formed (m, n), in float32 or wider."""
    M = W.M.to(wide_dtype(W.M))
    if W.d is not None:
        M = W.d[:, None] * M
    if W.up is not None:
        with torch.autocast(M.device.type, enabled=False):
            M = M + W.up.to(M.dtype) @ W.down.to(M.dtype)
    return M.clone() if M is W.M else M  # a change in place must not reach W0

class Adapter(nn.Module):
    """A frozen nn.Linear `base` with trained A and B. A method is a child with equation(W0).

    equation returns W' as a Weight. W0 (m, n) is base.weight in forward, maybe half precision, and
    elsewhere float32 or wider. If M is not W0, or up is None, forward skips base and its hooks.
    A starts uniform in ±1/√n, B at 0. TypeError for an unfit base, ValueError for r or lora_alpha.
    """
    options = "r", "lora_alpha"

    def __init__(self, base, r=8, lora_alpha=16):
        super().__init__()
        check_base(base)
        refuse(r < 1, f"r must be at least 1, got {r}")
        refuse(lora_alpha == 0 or not math.isfinite(lora_alpha),
               f"lora_alpha must be finite and not 0, got {lora_alpha}")
        self.out_features, self.in_features = m, n = base.weight.shape
        self.r, self.lora_alpha, self.scaling = r, lora_alpha, lora_alpha / r
        A = base.weight.new_empty(r, n, dtype=wide_dtype(base.weight)).uniform_(-n**-0.5, n**-0.5)
        self.A, self.B = nn.Parameter(A), nn.Parameter(A.new_zeros(m, r))
        self.base = base.requires_grad_(False)

    def adapted_weight(self):
        """W' (m, n) in float32 or wider, differentiable."""
        W0 = self.base.weight
        with torch.autocast(W0.device.type, enabled=False):
            return matrix(self.equation(W0.to(wide_dtype(W0))))

    def forward(self, x):
        """x (…, n) -> y = x W'ᵀ + b (…, m), in the dtype of base(x)."""
        W0, b = self.base.weight, self.base.bias
        refuse(x.device != W0.device, f"x is on {x.device}, the base on {W0.device}")
        with torch.autocast(W0.device.type, enabled=False):  # it would round the parts of W'
            W = self.equation(W0)
        if W.M is not W0 or W.up is None:  # not base(x) plus an update
            return nn.functional.linear(x, matrix(W).to(W0.dtype), b)
        y0 = self.base(x)  # x W0ᵀ + b (…, m): rounded once, with base's hooks
        h = x @ W.down.T.to(x.dtype)  # (…, k)
        if W.d is None:
            return y0 + h @ W.up.T.to(h.dtype)
        if b is not None:  # d ∘ y0 holds d ∘ b: add the rest
            b = ((1 - W.d) * b).to(h.dtype)
        update = nn.functional.linear(h, W.up.to(h.dtype), b)  # (…, m)
        return (W.d * y0 + update).to(y0.dtype)  # d is not cast: in bfloat16 1.003 is 1

    @torch.no_grad()
    def merge(self, name="base"):
        """A new frozen nn.Linear: W' in base's dtype, a copy of b, and base's own hooks."""
        check_base(self.base, name)
        W, b = self.adapted_weight().to(self.base.weight.dtype).contiguous(), self.base.bias
        refuse(not W.isfinite().all(), f"{name}: W' is not finite in {W.dtype}")
        merged = nn.Linear(*W.T.shape, bias=False, device="meta").train(self.base.training)
        merged.weight = nn.Parameter(W)
        merged.bias = None if b is None else nn.Parameter(b.clone())
        for table in [k for k in vars(merged) if "hook" in k]:
            vars(merged)[table] = copy.copy(vars(self.base)[table])
        return merged.requires_grad_(False)

    # nn.TransformerEncoder in eval mode without grad reads these, and skips forward.
    weight = property(lambda self: self.adapted_weight().to(self.base.weight.dtype))
    bias = property(lambda self: self.base.bias)

    def extra_repr(self):
        return ", ".join(f"{k}={getattr(self, k)}" for k in self.options)

class LoRALinear(Adapter):
    """LoRA: W' = W0 + sBA. Source: arXiv 2106.09685."""

    def equation(self, W0):
        return Weight(W0, None, self.scaling * self.B, self.A)

class PreDiagLinear(Adapter):
    """Pre-Diag: W' = diag(d) W0 + sBA. diag starts at 1."""

    def __init__(self, base, r=8, lora_alpha=16):
        super().__init__(base, r, lora_alpha)
        self.diag = nn.Parameter(self.B.new_ones(self.out_features))

    def equation(self, W0):
        return Weight(W0, self.diag, self.scaling * self.B, self.A)

def scale(c, W):
    """diag(c) W for c (m,): diag(c ∘ d) M + (c ∘ up) down."""
    d = c if W.d is None else c * W.d
    up = None if W.up is None else c[:, None] * W.up
    return Weight(W.M, d, up, W.down)

def row_norm(W):
    """‖W‖row (m,), the length of each row, 0 for one of zeros, in float32 or wider.

    The DoRA paper says columns, since its W is (in, out).
    """
    norm = torch.linalg.vector_norm(W.M, dim=1, dtype=wide_dtype(W.M))
    if W.d is not None:
        norm = W.d.abs() * norm
    if W.up is None:
        return norm
    # ‖w + u‖² = ‖w‖² + 2⟨w, u⟩ + ‖u‖² for rows w of diag(d) M and u of up down
    up, down = W.up.to(norm.dtype), W.down.to(norm.dtype)
    w2 = norm.square()
    wu = (up * (W.M @ down.T.to(W.M.dtype))).sum(dim=1)  # M downᵀ (m, k)
    if W.d is not None:
        wu = W.d * wu
    u2 = (up * (up @ (down @ down.T))).sum(dim=1)
    # A short w + u cancels here: sum2 below ε ‖w‖² (ε of M's dtype) is mostly rounding error. So
    # ε ‖w‖² is the floor, constant in the backward: at w = 0 it is √0, without a derivative.
    sum2, floor = w2 + 2 * wu + u2, torch.finfo(W.M.dtype).eps * w2.detach()
    return torch.where(sum2 <= floor, floor, sum2).sqrt()

class DoRALinear(Adapter):
    """DoRA as first written: W' = diag(c) (W0 + sBA), c = magnitude / ‖W0 + sBA‖row.

    W0 + sBA is formed. magnitude starts at ‖W0‖row. A row of zeros in W0 stays zero.
    detach_norm (section 4.3): norm is constant in the backward. Source: arXiv 2402.09353.
    """
    options = "r", "lora_alpha", "detach_norm"

    def __init__(self, base, r=8, lora_alpha=16, detach_norm=True):
        super().__init__(base, r, lora_alpha)
        self.detach_norm = detach_norm
        # By the row_norm that equation divides by, so c starts at 1.
        self.magnitude = nn.Parameter(row_norm(self.unscaled(base.weight)))

    def unscaled(self, W0):
        return Weight(matrix(Weight(W0, None, self.scaling * self.B, self.A)))

    def equation(self, W0):
        W = self.unscaled(W0)
        norm = row_norm(W).detach() if self.detach_norm else row_norm(W)
        norm = norm.masked_fill(norm == 0, torch.inf)  # c = 0 for a row of zeros, not 0/0
        return scale(self.magnitude / norm, W)

class DoRAMatrixLinear(DoRALinear):
    """DoRA in matrix form: W' = diag(c) W0 + s diag(c) BA. W0 + sBA is not formed.

    Equals DoRALinear to rounding, except for a row shrunk to δ times its length in W0: its c errs
    by about ε/δ² (bfloat16: some 0.6 % at δ = 1/2, 16 % at 1/10), ε of W0's dtype in forward, of
    float32 in merge. A row that should vanish is not 0.
    """

    def unscaled(self, W0):
        return Weight(W0, None, self.scaling * self.B, self.A)

ROTATIONS = "exp", "cayley", "first_order"

def rotation_factors(C, D, rotation="exp"):
    """Thin L, V (m, 2 r_p) of R = I + LVᵀ, from C, D (m, r_p), in float64.

    P = s_P (DCᵀ − CDᵀ), as in the authors' code. s_P makes P grow linearly with long C, D.
    "exp": R ≈ e^P, off by ‖P‖₂⁵/(720·2⁴⁸): 5e-13 at 10. "cayley": R = (I + P/2) (I − P/2)⁻¹.
    "first_order": R = I + P, no rotation: RᵀR = I + PᵀP.
    """
    refuse(rotation not in ROTATIONS, f"rotation {rotation!r} is not in {ROTATIONS}")
    C, D = C.double(), D.double()
    s_P = (1 / (torch.linalg.norm(C) + torch.linalg.norm(D) + 1e-6)).clamp(max=1)
    E = D - C  # gives the same P, since the two CCᵀ cancel, and exactly 0 at D = C
    # P = UVᵀ, P² = U Z Vᵀ, P³ = U Z² Vᵀ, …, Z = VᵀU. So I + P g(P) = I + U g(Z) Vᵀ, any g.
    U, V = torch.cat([E, C], dim=1), s_P * torch.cat([C, -E], dim=1)
    if rotation == "first_order":
        return U, V  # g = 1
    # Else R = q(−P) q(P)⁻¹. Both q have q(−z) = q(z) + z, so R = I + P q(P)⁻¹ and g = 1/q.
    # P is skew, so q(P)ᵀ = q(−P) and RᵀR = q(−P)⁻¹ q(P) q(−P) q(P)⁻¹ = I: R is a rotation. Z has
    # P's eigenvalues or 0, imaginary; q's roots are not. So q(Z)⁻¹ exists: no check, no GPU wait.
    Z = V.T @ U  # (2 r_p, 2 r_p)
    I = torch.eye(len(Z), dtype=Z.dtype, device=Z.device)
    if rotation == "cayley":  # q(z) = 1 − z/2
        return U @ torch.linalg.inv_ex(I - Z / 2).inverse, V
    # q(z) = 1 − z/2 + z²/12: q(−z)/q(z) ≈ e^z for small z (Padé). So take P/2¹², and so V/2¹² and
    # Z/2¹², K = q(Z)⁻¹, and square R twelve times: (I + U K Vᵀ)² = I + U K (2I + Z K) Vᵀ.
    Z, two_I = Z / 2**12, 2 * I
    K = torch.linalg.inv_ex(I - Z / 2 + Z @ Z / 12).inverse
    for _ in range(12):
        K = K @ torch.addmm(two_I, Z, K)
    return U @ K / 2**12, V  # the 2¹² of V/2¹²

def rotate(L, V, W):
    """R W = W + L (VᵀW) for R = I + LVᵀ, with L, V (m, k) of any dtype."""
    L, V = L.to(wide_dtype(W.M)), V.to(wide_dtype(W.M))
    dV = V if W.d is None else W.d[:, None] * V
    VW = dV.T.to(W.M.dtype) @ W.M  # VᵀW (k, n) is (d ∘ V)ᵀM + (Vᵀup) down
    if W.up is None:
        return Weight(W.M, W.d, L, VW)
    VW = VW + (V.T @ W.up.to(V.dtype)) @ W.down.to(V.dtype)
    return Weight(W.M, W.d, torch.cat([W.up, L], dim=1), torch.cat([W.down, VW]))

class SORALinear(Adapter):
    """SORA: W' = R (diag(d) W0 + sBA), where R turns at most 2 r_p dimensions.

    diag starts at 1, C uniform in ±1/√m, and D = C, so that P = 0 and R = I. At C = D = 0 neither
    would have a gradient, since each multiplies the other. ValueError for a bad r_p or rotation.
    """
    options = "r", "lora_alpha", "r_p", "rotation"

    def __init__(self, base, r=8, lora_alpha=16, r_p=4, rotation="exp"):
        refuse(r_p < 1, f"r_p must be at least 1, got {r_p}")
        refuse(rotation not in ROTATIONS, f"rotation {rotation!r} is not in {ROTATIONS}")
        super().__init__(base, r, lora_alpha)
        self.r_p, self.rotation, m = r_p, rotation, self.out_features
        self.diag = nn.Parameter(self.B.new_ones(m))
        C = self.B.new_empty(m, r_p).uniform_(-m**-0.5, m**-0.5)
        self.C, self.D = nn.Parameter(C), nn.Parameter(C.clone())

    def equation(self, W0):
        L, V = rotation_factors(self.C, self.D, self.rotation)
        return rotate(L, V, Weight(W0, self.diag, self.scaling * self.B, self.A))

    def rotation_matrix(self):  # R (m, m)
        L, V = rotation_factors(self.C, self.D, self.rotation)
        return (torch.eye(len(L), device=L.device) + L @ V.T).to(self.C.dtype)

METHODS = {"lora": LoRALinear, "pre_diag": PreDiagLinear, "dora": DoRALinear,
           "dora_matrix": DoRAMatrixLinear, "sora": SORALinear}

# ---- models

def adapt(model, method, target_modules, **kwargs):
    """Wrap the nn.Linears that target_modules names, in place; returns model.

    method: a key of METHODS or a child of Adapter; kwargs: its options. As in PEFT's lists, t
    selects the modules whose dotted name is t or ends in "." + t. The first adapt freezes the
    model, a later one only what it wraps. On a ValueError or TypeError nothing is changed.
    """
    cls = METHODS.get(method, method)
    refuse(not isinstance(cls, type) or not issubclass(cls, Adapter),
           f"method {method!r} is not in {list(METHODS)}, nor a child of Adapter")
    targets = [target_modules] if isinstance(target_modules, str) else list(target_modules)
    names = names_of(model, nn.Module)
    hits = {t: {mod for mod in names for name in names[mod]
                if name == t or name.endswith("." + t)} for t in targets}
    missed = [t for t in targets if not hits[t]]
    ends = {names[mod][0].split(".")[-1] for mod in names if isinstance(mod, nn.Linear)}
    refuse(missed or not targets, f"no module for {missed[:3]}: there are {sorted(ends)[:8]}")
    chosen = [mod for mod in names if any(mod in hits[t] for t in targets)]
    for mod in chosen:
        check_base(mod, names[mod][0])
    thawed = [p for p in model.parameters() if p.requires_grad]
    try:
        new = {mod: cls(mod, **kwargs).train(mod.training) for mod in chosen}
        if not names_of(model, Adapter):
            model.requires_grad_(False)
        for mod in chosen:
            for name in names[mod]:
                model.set_submodule(name, new[mod])
    except BaseException:
        for p in thawed:
            p.requires_grad_(True)
        raise
    return model

def names_of(model, cls):  # {module: its names, several if it is shared}
    names = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, cls):
            names.setdefault(module, []).append(name)
    return names

def adapters(model):
    """[(name, layer)] of all adapters; ValueError if none."""
    found = [(names[0], layer) for layer, names in names_of(model, Adapter).items()]
    refuse(not found, "no adapters of this minisora: adapt it first")
    return found

def merge_adapters(model):
    """Replace each adapter by its merge(); returns model. If one raises, it and the rest stay."""
    layers, names = adapters(model), names_of(model, Adapter)
    while layers:
        name, layer = layers.pop()  # freed before the next merge
        merged = layer.merge(name)
        for place in names.pop(layer):
            model.set_submodule(place, merged)
    return model

def trained_parameters(model):  # adapters', and all else with requires_grad
    own = {p for _, layer in adapters(model) for name, p in layer.named_parameters()
           if not name.startswith("base.")}
    trained = {name: p for name, p in model.named_parameters() if p in own or p.requires_grad}
    for name, p in trained.items():
        refuse(type(p) is not nn.Parameter, f"{name} is a sharded {type(p).__name__}: gather first")
    return trained

def adapter_state_dict(model):
    """{name: copy} of all that training changes, without adapt's arguments."""
    return {name: p.detach().clone() for name, p in trained_parameters(model).items()}

@torch.no_grad()
def load_adapter_state_dict(model, state):
    """Copy a state into a model adapted and unfrozen like the saved one; returns model.

    On a ValueError nothing is copied.
    """
    own = trained_parameters(model)
    missing, extra = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    refuse(missing or extra, f"the state lacks {missing[:3]} and has {extra[:3]} more: adapt with "
                             "the saved options, and unfreeze the same modules")
    for name, p in own.items():
        new = state[name].to(p)
        refuse(new.shape != p.shape, f"{name} must be {p.shape}, got {new.shape}: adapt as saved")
        refuse(not new.isfinite().all(), f"{name} is not finite")
    for name, p in own.items():
        p.copy_(state[name])
    return model

# ---- checks of what torch lets pass

def refuse(wrong, message, error=ValueError):
    if wrong:
        raise error(message)

def check_base(base, name="base"):
    w = getattr(base, "weight", None)
    other = type(base) is not nn.Linear or type(w) is not nn.Parameter
    refuse(other, f"{name} must be an nn.Linear: it is {type(base)} of {type(w)}", TypeError)
    unfit = not w.is_floating_point() or w.element_size() == 1 or w.numel() == 0 or w.is_meta
    refuse(unfit, f"{name} is not 16 to 64 bit floats: {w.dtype}, {w.shape}, {w.device}", TypeError)

# ---- diagnostics of delta = W' − W0 (…, m, n)

def relative_singular_values(delta):
    """σ_i / σ_1, or 0 where delta is 0."""
    S = torch.linalg.svdvals(delta.to(wide_dtype(delta)))
    return S / S[..., :1].clamp(min=torch.finfo(S.dtype).tiny)

def singular_value_entropy(delta):
    """−Σ p_i log p_i with p_i = σ_i / Σ_j σ_j, in nats. At most log r for LoRA, 0 for delta = 0.

    Rounding adds rank: take W' from copy.deepcopy(layer).double(). But near DoRA's start take it
    from the layer: a float32 magnitude / a float64 norm is not 1. p: Roy and Vetterli (2007).
    """
    S = relative_singular_values(delta)
    p = S / S.sum(dim=-1, keepdim=True).clamp(min=1)
    return -(p * p.masked_fill(p == 0, 1).log()).sum(dim=-1)  # 0 log 0 = 0, its gradient finite

def stable_rank(delta):
    """‖delta‖²F / ‖delta‖₂² = Σ σ_i² / σ_1²: at most the rank, 0 for delta = 0."""
    return relative_singular_values(delta).square().sum(dim=-1)
