# SPDX-License-Identifier: MIT
"""minisora: weight conditioning for fine-tuning, in one file.

After *Calibrating and Rotating: A Unified Framework for Weight Conditioning in PEFT*
(arXiv 2511.00051, AAAI 2026). A linear layer is y = x W0ᵀ + b. Fine-tuning freezes W0 and trains
a few parameters that turn it into W'. At step 0 W' = W0. The bias b never changes.

    W0, W' (m, n)        m = out_features, n = in_features
    A (r, n), B (m, r)   trained factors of the rank-r update sBA, s = lora_alpha / r
    d (m,)               a trained diagonal, the parameter `diag`
    c (m,)               trained magnitude / ‖W0 + sBA‖row, where ‖·‖row (m,) is each row's norm
    R (m, m)             the rotation e^P of a skew P (Pᵀ = −P), from trained C and D (m, r_p)

A method is what stands before and after the sum: W0 → [before] → + sBA → [after] → W'

    LoRA      –          –          W0 + sBA
    Pre-Diag  diag(d)    –          diag(d) W0 + sBA
    DoRA      –          diag(c)    diag(c) (W0 + sBA)
    SORA      diag(d)    R          R (diag(d) W0 + sBA)
"""
import copy

import torch
from torch import nn


class Adapter(nn.Module):
    """A frozen nn.Linear `base` with trained A and B.

    A method is a child that defines dense(W0), the equation W' (m, n). It may add thin(W0), which
    is then used instead: (d, up, down) with W' = diag(d) W0 + up down, d (m,) or None for 1,
    up (m, k), down (k, n), k small. Test that the two agree: nothing here does. W0 comes as it is
    to run, and in float32 or wider to be read or merged. A and B are float32 or wider, unless you
    cast the model. TypeError for the base, ValueError for r, lora_alpha or the device of x.
    """

    def __init__(self, base, r=8, lora_alpha=16):
        super().__init__()
        check_base(base)
        refuse(r < 1, f"r must be at least 1, got {r}")
        refuse(not 0 < abs(lora_alpha) < torch.inf, f"lora_alpha is 0 or not finite: {lora_alpha}")
        self.out_features, self.in_features = m, n = base.weight.shape
        self.r, self.lora_alpha, self.scaling = r, lora_alpha, lora_alpha / r
        A = base.weight.new_empty(r, n, dtype=torch.promote_types(base.weight.dtype, torch.float32))
        self.A = nn.Parameter(A.uniform_(-(n**-0.5), n**-0.5))
        self.B = nn.Parameter(A.new_zeros(m, r))
        self.base = base.requires_grad_(False)

    def __init_subclass__(cls):  # a child with its own dense() must not run its parent's thin()
        if "dense" in vars(cls) and "thin" not in vars(cls):
            cls.thin = Adapter.thin

    sB = property(lambda self: self.scaling * self.B)

    def thin(self, W0):
        return None

    def adapted_weight(self):
        """W' (m, n), differentiable, in float32 or wider."""
        with torch.autocast(self.base.weight.device.type, enabled=False):
            W0 = self.base.weight.to(torch.promote_types(self.base.weight.dtype, torch.float32))
            thin = self.thin(W0)
            if thin is None:
                return self.dense(W0)
            d, up, down = thin
            return (W0 if d is None else d[:, None] * W0) + up.to(W0.dtype) @ down.to(W0.dtype)

    def forward(self, x):
        """x (…, n) -> y = x W'ᵀ + b (…, m) in base(x)'s dtype."""
        W0, b = self.base.weight, self.base.bias
        refuse(x.device != W0.device, f"x is on {x.device}, the base on {W0.device}")
        with torch.autocast(W0.device.type, enabled=False):
            thin = self.thin(W0)
        if thin is None:
            return nn.functional.linear(x, self.adapted_weight().to(W0.dtype), b)
        d, up, down = thin
        y0 = self.base(x)  # x W0ᵀ + b (…, m)
        h = x @ down.T.to(x.dtype)  # (…, k)
        if d is None:
            return y0 + h @ up.T.to(h.dtype)
        if b is not None:  # y0 has b in it, and d b + (1 − d) b = b
            b = ((1 - d) * b).to(h.dtype)
        update = nn.functional.linear(h, up.to(h.dtype), b)  # (…, m)
        return (d * y0 + update).to(y0.dtype)  # in bfloat16 a d of 1.003 would be 1

    @torch.no_grad()
    def merge(self, name="base"):
        """A new frozen nn.Linear: W' rounded to base's dtype. ValueError if it is not finite."""
        check_base(self.base, name)
        merged = copy.deepcopy(self.base).requires_grad_(False)
        merged.weight.copy_(self.adapted_weight())
        refuse(not merged.weight.isfinite().all(), f"{name}: W' is not finite")
        return merged

    # For code that bypasses forward, as nn.TransformerEncoder does in eval mode.
    weight = property(lambda self: self.adapted_weight().to(self.base.weight.dtype))
    bias = property(lambda self: self.base.bias)

    def extra_repr(self):
        shown = {k: v for k, v in vars(self).items() if k[0] != "_" and k != "training"}
        return ", ".join(f"{k}={v}" for k, v in shown.items())


class LoRALinear(Adapter):
    """LoRA: W' = W0 + sBA.

    A starts uniform in ±1/√n, as in loralib and PEFT, B at 0. Source: LoRA (arXiv 2106.09685).
    """

    def dense(self, W0):
        return W0 + self.sB @ self.A

    def thin(self, W0):
        return None, self.sB, self.A


class PreDiagLinear(Adapter):
    """Pre-Diag: W' = diag(d) W0 + sBA.

    diag starts at 1. Source: the paper's abstract and framework figure.
    """

    def __init__(self, base, r=8, lora_alpha=16):
        super().__init__(base, r, lora_alpha)
        self.diag = nn.Parameter(self.B.new_ones(self.out_features))

    def dense(self, W0):
        return self.diag[:, None] * W0 + self.sB @ self.A

    def thin(self, W0):
        return self.diag, self.sB, self.A


def row_norm(W):
    """‖W‖row (m,), in float32 or wider. The DoRA paper says columns: it stores Wᵀ."""
    return torch.linalg.vector_norm(W, dim=1, dtype=torch.promote_types(W.dtype, torch.float32))


class DoRALinear(Adapter):
    """DoRA as first written: W' = diag(c) W with W = W0 + sBA and c = magnitude / ‖W‖row.

    magnitude starts at ‖W0‖row. A row of zeros in W stays zero.
    detach_norm: the norm is a constant in the backward. If a row of W' has the gradient g, the
    row w of W gets c g; without detach_norm it gets c (g − ⟨g, ŵ⟩ ŵ) with ŵ = w / ‖w‖.
    W' is rounded to base's dtype before it meets x; the matrix form keeps c in float32.
    Source: DoRA (arXiv 2402.09353), section 4.3 for detach_norm.
    """

    def __init__(self, base, r=8, lora_alpha=16, detach_norm=True):
        super().__init__(base, r, lora_alpha)
        self.detach_norm = detach_norm
        self.magnitude = nn.Parameter(row_norm(base.weight))

    def row_scale(self, norm2):
        """c (m,) from the squared norms, 0 where they are 0."""
        norm = norm2.masked_fill(norm2 == 0, torch.inf).sqrt()
        return self.magnitude / (norm.detach() if self.detach_norm else norm)

    def dense(self, W0):
        W = W0 + self.sB @ self.A
        return self.row_scale(row_norm(W).square())[:, None] * W


class DoRAMatrixLinear(DoRALinear):
    """DoRA in matrix form: W' = diag(c) W0 + s diag(c) BA, where W0 + sBA is never formed.

    Values and gradients are DoRALinear's. The squared norm is a sum, which cancels where a row of
    W0 + sBA is near 0. Below ε ‖W0‖²row no digit is right, so that is its minimum (ε: W0's dtype).
    Source: the paper's abstract; the norm is ours, and that of arXiv 2603.22276.
    """

    def thin(self, W0):
        A, sB = self.A, self.sB
        if self.detach_norm:  # in row_scale alone, the backward would keep 7 tensors more
            A, sB = A.detach(), sB.detach()
        # ‖w + u‖² = ‖w‖² + 2⟨w, u⟩ + ‖u‖² for each row w of W0 and u of sBA
        w2 = row_norm(W0).square()
        wu = (sB * (W0 @ A.T.to(W0.dtype))).sum(dim=1)
        u2 = (sB * (sB @ (A @ A.T))).sum(dim=1)
        c = self.row_scale(torch.maximum(w2 + 2 * wu + u2, torch.finfo(W0.dtype).eps * w2))
        return c, c[:, None] * self.sB, self.A


def rotation_factors(C, D, rotation="exp"):
    """L, V (m, 2 r_p) of R = I + LVᵀ, for C, D (m, r_p) and P = s_P (DCᵀ − CDᵀ).

        exp          R = e^P, a rotation, since (e^P)ᵀ = e^(Pᵀ) = e^(−P) = (e^P)⁻¹
        cayley       R = (I − P/2)⁻¹ (I + P/2), another rotation
        first_order  R = I + P, no rotation, since RᵀR = I + PᵀP
    s_P = min(1, 1 / (‖C‖F + ‖D‖F + 1e-6)) keeps P linear, not quadratic, in long C and D.
    L, V are float64, where exp errs by 1e-12 at ‖P‖₂ = 10 and by 1e-7 at 100, or float32 on mps.
    ValueError for another name. Source: P is the authors' code, R our derivation.
    """
    refuse(rotation not in ROTATIONS, f"rotation {rotation!r} is not in {ROTATIONS}")
    dtype = torch.float32 if C.device.type == "mps" else torch.float64
    C, D = C.to(dtype), D.to(dtype)
    s_P = (1 / (torch.linalg.norm(C) + torch.linalg.norm(D) + 1e-6)).clamp(max=1)
    # E = D − Cτ has the same P for every diagonal τ: CτCᵀ is symmetric and drops out. This one
    # removes D's part along C, which would cancel in P. At D = C it makes P exactly 0.
    c2 = C.detach().square().sum(dim=0).clamp(min=torch.finfo(dtype).tiny)
    E = D - C * ((C * D).detach().sum(dim=0) / c2)
    # P = UVᵀ, so P² = U Z Vᵀ, P³ = U Z Z Vᵀ, … with the small Z = VᵀU. So each power series in P
    # that begins with I is I + U K Vᵀ, and only the small K differs.
    U, V = torch.cat([E, C], dim=1), s_P * torch.cat([C, -E], dim=1)
    Z = V.T @ U  # (2 r_p, 2 r_p)
    K = I = torch.eye(len(Z), dtype=dtype, device=Z.device)  # first_order
    if rotation == "exp":
        # K = I + Z/2! + Z²/3! + … makes U K Vᵀ = P + P²/2! + P³/3! + … = e^P − I. Begin at P/2¹²:
        # near 0, e^z ≈ (denominator + z) / denominator, a Padé approximant, and so K, which is
        # (e^z − 1) / z, is 1 / denominator. This R is orthogonal at any angle of P.
        z = Z / 2**12
        denominator = I - z / 2 + z @ z / 12
        K = torch.linalg.inv_ex(denominator).inverse / 2**12  # inv syncs the GPU
        for _ in range(12):  # (I + U K Vᵀ)² = I + U K (2I + Z K) Vᵀ
            K = K @ torch.addmm(I, Z, K, beta=2)
    elif rotation == "cayley":
        K = torch.linalg.inv_ex(I - Z / 2).inverse
    return U @ K, V


class SORALinear(Adapter):
    """SORA: W' = R (diag(d) W0 + sBA), where R turns at most 2 r_p dimensions.

    diag starts at 1, C uniform in ±1/√m, and D = C, so that P = 0 and R = I. C = D = 0 would have
    no gradient, since P is linear in each. ValueError for r_p or rotation.
    Source: the paper's figure; the start from the authors' code.
    """

    def __init__(self, base, r=8, lora_alpha=16, r_p=4, rotation="exp"):
        refuse(r_p < 1, f"r_p must be at least 1, got {r_p}")
        refuse(rotation not in ROTATIONS, f"rotation {rotation!r} is not in {ROTATIONS}")
        super().__init__(base, r, lora_alpha)
        self.r_p, self.rotation, m = r_p, rotation, self.out_features
        C = self.B.new_empty(m, r_p).uniform_(-(m**-0.5), m**-0.5)
        self.diag = nn.Parameter(self.B.new_ones(m))
        self.C, self.D = nn.Parameter(C), nn.Parameter(C.clone())

    def rotation_matrix(self):
        """R (m, m), in the dtype of C."""
        L, V = rotation_factors(self.C, self.D, self.rotation)
        return (torch.eye(len(L), device=L.device) + L @ V.T).to(self.C.dtype)

    def dense(self, W0):
        return self.rotation_matrix() @ (self.diag[:, None] * W0 + self.sB @ self.A)

    def thin(self, W0):  # R M = M + L (VᵀM) with M = diag(d) W0 + sBA: k = r + 2 r_p
        L, V = rotation_factors(self.C, self.D, self.rotation)
        L, V, sB = L.to(self.C.dtype), V.to(self.C.dtype), self.sB
        VM = (self.diag[:, None] * V).T.to(W0.dtype) @ W0 + (V.T @ sB) @ self.A  # (2 r_p, n)
        return self.diag, torch.cat([sB, L], dim=1), torch.cat([self.A, VM])


METHODS = {"lora": LoRALinear, "pre_diag": PreDiagLinear, "dora": DoRALinear,
           "dora_matrix": DoRAMatrixLinear, "sora": SORALinear}
ROTATIONS = "exp", "cayley", "first_order"


# ---- using it on a model

def adapt(model, method, target_modules, **kwargs):
    """Wrap the nn.Linears that target_modules names, in place; returns model.

    method: a key of METHODS, whose class gets kwargs. target_modules: one name or several. Each
    selects the modules whose dotted name is it or ends in "." + it, as in PEFT.
    The first adapt freezes the whole model, a later one only what it wraps. ValueError for the
    method, a name or an option, TypeError for what is no plain nn.Linear: nothing is changed.
    """
    refuse(method not in METHODS, f"method {method!r} is not in {list(METHODS)}")
    targets = [target_modules] if isinstance(target_modules, str) else target_modules
    ends = tuple("." + target for target in targets)
    named = [(f".{name}", m) for name, m in model.named_modules(remove_duplicate=False)]
    unmatched = [end[1:] for end in ends if not any(name.endswith(end) for name, _ in named)]
    refuse(unmatched or not ends, f"no module for {unmatched[:3]}")
    chosen = {module: name[1:] for name, module in named if name.endswith(ends)}
    taken = {m for layer in model.modules() if isinstance(layer, Adapter) for m in layer.modules()}
    for module, name in chosen.items():
        refuse(module in taken, f"{name} is adapted: merge, or adapt a deepcopy of the original")
        check_base(module, name)
    layers = {base: METHODS[method](base, **kwargs).train(base.training) for base in chosen}
    if not taken:
        model.requires_grad_(False)
    return replace_modules(model, layers)


def replace_modules(model, new):
    """Put new[module] at every place of module; returns model, or new[model]."""
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if name and module in new:
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, new[module])
    return new.get(model, model)


def adapters(model):
    """[(name, layer)] of all adapters; ValueError if there is none."""
    found = [(name, m) for name, m in model.named_modules() if isinstance(m, Adapter)]
    refuse(not found, "the model has no adapters of this copy of minisora: adapt it first")
    return found


def merge_adapters(model):
    """Replace each adapter by its merge(); returns model. What merge raises stops it half-way."""
    layers = adapters(model)
    while layers:
        name, layer = layers.pop()  # frees each base before the next
        model = replace_modules(model, {layer: layer.merge(name)})
    return model


def trained_parameters(model):
    """{name: parameter} of every adapter tensor, and all else with requires_grad."""
    own = {p for _, layer in adapters(model) for name, p in layer.named_parameters()
           if name[:5] != "base."}
    trained = {name: p for name, p in model.named_parameters() if p in own or p.requires_grad}
    for name, p in trained.items():
        refuse(type(p) is not nn.Parameter, f"{name} is a sharded {type(p).__name__}: gather first")
    return trained


def adapter_state_dict(model):
    """{name: copy} of trained_parameters. The arguments of adapt are not in it."""
    return {name: p.detach().clone() for name, p in trained_parameters(model).items()}


@torch.no_grad()
def load_adapter_state_dict(model, state):
    """Copy a state into a model adapted and unfrozen as the saved one was; returns model.

    ValueError for other names or shapes, or values not finite: nothing is copied.
    """
    own = trained_parameters(model)
    missing, extra = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    refuse(missing or extra, f"the state has {len(missing)} missing names {missing[:3]} "
                             f"and {len(extra)} unexpected {extra[:3]}")
    for name, p in own.items():
        refuse(state[name].shape != p.shape, f"{name} must be {p.shape}, got {state[name].shape}")
        refuse(not state[name].to(p).isfinite().all(), f"{name} is not finite")
    for name, p in own.items():
        p.copy_(state[name])
    return model


# ---- checks, for what torch would accept in silence

def refuse(wrong, message, error=ValueError):
    if wrong:
        raise error(message)


def check_base(base, name="base"):
    weight = getattr(base, "weight", None)
    plain = (type(base) is nn.Linear and type(weight) is nn.Parameter and not weight.is_meta
             and weight.is_floating_point() and weight.element_size() > 1)
    refuse(not plain, f"{name} must be an nn.Linear with a Parameter of 16 to 64 bit floats, not "
                      f"meta: it is {type(base).__name__}, {type(weight).__name__}", TypeError)


# ---- the paper's diagnostics of delta = W' − W0 (…, m, n)

def relative_singular_values(delta):
    """σ_i / σ_1, or 0 where delta is 0."""
    S = torch.linalg.svdvals(delta.to(torch.promote_types(delta.dtype, torch.float32)))
    return S / S[..., :1].clamp(min=torch.finfo(S.dtype).tiny)


def singular_value_entropy(delta):
    """−Σ p_i log p_i with p_i = σ_i / Σ_j σ_j, in nats. At most log r for LoRA, 0 for delta = 0.

    Take W' from copy.deepcopy(layer).double(): rounding W' gives delta full rank.
    Source: the paper's abstract; p as in Roy and Vetterli (2007).
    """
    S = relative_singular_values(delta)
    p = S / S.sum(dim=-1, keepdim=True).clamp(min=1)
    return -(p * p.masked_fill(p == 0, 1).log()).sum(dim=-1)  # 0 log 0 = 0, its gradient finite


def stable_rank(delta):
    """‖delta‖²F / ‖delta‖₂² = Σ σ_i² / σ_1²: at most the rank, 0 for delta = 0."""
    return relative_singular_values(delta).square().sum(dim=-1)
