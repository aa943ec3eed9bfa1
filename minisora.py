# SPDX-License-Identifier: MIT
"""minisora: LoRA, Pre-Diag, DoRA and SORA in one file.

After *Calibrating and Rotating: A Unified Framework for Weight Conditioning in PEFT*
(arXiv 2511.00051, AAAI 2026), and its authors' code (github.com/MaeChd/SORA).

A linear layer computes y = W0 x + b. To fine-tune it cheaply, we freeze W0 and b and train a few
new parameters, which turn W0 into W'. Training starts at W' = W0.

LoRA adds a low-rank update sBA to W0. The other methods also multiply by conditioning matrices.
Those in the column "before" act on W0 alone, those in "after" on the sum:

            before   after    W'                    W'x                 trained parameters
  LoRA      –        –        W0 + sBA              W0x + sBAx          r (m + n)
  Pre-Diag  diag(d)  –        diag(d) W0 + sBA      d * W0x + sBAx      r (m + n) + m
  DoRA      –        diag(c)  diag(c) (W0 + sBA)    c * (W0x + sBAx)    r (m + n) + m
  SORA      diag(d)  R        R (diag(d) W0 + sBA)  R (d * W0x + sBAx)  r (m + n) + m + 2 m r_p

  W0, W' (m, n)       m = out_features, n = in_features
  A (r, n), B (m, r)  the factors of the update; r is its rank, and s = lora_alpha / r
  d (m,)              the parameter `diag`
  c (m,)              the parameter `magnitude` over the row lengths of W0 + sBA
  R (m, m)            a rotation e^P, where P (m, m) is skew and made of C, D (m, r_p)

Each of these matrices multiplies from the left. So a layer can apply it to the vectors W0x and
sBAx, as in the column W'x, and need not form W'.

To copy a method out, take the imports, check_base, its class and its parent classes. SORA also
needs what stands under "the rotation of SORA".
"""
import math

import torch
import torch.nn.functional as F
from torch import nn


class Adapter(nn.Module):
    """A frozen plain nn.Linear, base, and the trained factors A, B of its update sBA.

    A method is a child class whose equation(W0x, sBAx) returns W'x. Arguments and result are
    (…, m), a row for each input x. So R z is written z @ R.T.
    The equation also gives W'. If the inputs are the rows of I, then W0x is W0ᵀ, sBAx is (sBA)ᵀ,
    and the result is W'ᵀ. For this it must be jointly linear in W0x and sBAx, without a constant,
    and not random: dropout on x belongs into update.
    Raises TypeError if base is not plain, ValueError if r < 1 or lora_alpha is 0, ∞ or NaN.
    """

    def __init__(self, base, r=8, lora_alpha=16):
        super().__init__()
        check_base(base)
        if r < 1:
            raise ValueError(f"r must be at least 1, got {r}")
        if lora_alpha == 0 or not math.isfinite(lora_alpha):
            raise ValueError(f"lora_alpha must be finite and not 0, got {lora_alpha}")
        self.r, self.lora_alpha = r, lora_alpha
        self.scaling = lora_alpha / r
        m, n = base.weight.shape
        self.out_features, self.in_features = m, n
        # At least float32, for 16 bits would round small steps away.
        dtype = torch.promote_types(base.weight.dtype, torch.float32)
        A = base.weight.new_empty(r, n, dtype=dtype)
        bound = n ** -0.5
        self.A = nn.Parameter(A.uniform_(-bound, bound))
        self.B = nn.Parameter(A.new_zeros(m, r))  # sBA starts at 0
        self.base = base.requires_grad_(False)

    def equation(self, W0x, sBAx):
        raise NotImplementedError(f"{type(self).__name__} has no equation")

    def forward(self, x):
        """x (…, n) -> y = W'x + b (…, m), in the dtype of base(x)."""
        y0 = self.base(x)  # W0x + b (…, m); this runs the hooks of base
        b = 0 if self.base.bias is None else self.base.bias
        with torch.autocast(x.device.type, enabled=False):  # it would use 16 bits
            W0x = y0.to(self.B.dtype) - b  # no method acts on b: it is added below
            y = self.equation(W0x, self.update(x)) + b
        return y.to(y0.dtype)

    def update(self, x):  # sBAx (…, m)
        Ax = F.linear(x, self.A.to(x.dtype))  # (…, r)
        return F.linear(Ax.to(self.B.dtype), self.scaling * self.B)

    def adapted_weight(self):
        """W' (m, n), in the dtype of B, differentiable."""
        with torch.autocast(self.B.device.type, enabled=False):
            W0 = self.base.weight.to(self.B.dtype, copy=True)  # (m, n), in case an equation writes
            sBA = self.scaling * self.B @ self.A  # (m, n)
            return self.equation(W0.T, sBA.T).T  # at the rows of I

    @torch.no_grad()
    def merge(self, name="base"):
        """A new nn.Linear with W' in the dtype of W0. Its bias, hooks and mode are base's.

        Raises ValueError, which names the layer, if W' overflows that dtype.
        """
        W = self.adapted_weight().to(self.base.weight.dtype).contiguous()
        if not W.isfinite().all():
            raise ValueError(f"{name}: W' is not finite in {W.dtype}")
        # Fill an empty nn.Linear with what base has, then replace its weight.
        merged = nn.Linear(1, 1, device="meta")
        for key in vars(merged):  # not a forward patched onto base: it uses W0
            vars(merged)[key] = vars(self.base)[key]
        merged._parameters = merged._parameters.copy()  # base keeps W0
        merged.weight = nn.Parameter(W, requires_grad=False)
        return merged

    # In eval, nn.TransformerEncoder reads these two instead of calling the layer.
    @property
    def weight(self):
        return self.adapted_weight().to(self.base.weight.dtype)

    @property
    def bias(self):
        return self.base.bias

    def extra_repr(self):
        return f"r={self.r}, lora_alpha={self.lora_alpha}"


def check_base(base, name="base"):
    """Raise TypeError unless base is a plain nn.Linear with an ordinary weight."""
    if type(base) is not nn.Linear:  # a child of it may compute something else
        raise TypeError(f"{name} must be a plain nn.Linear, but is {type(base)}")
    weight = base.weight
    floats = torch.float64, torch.float32, torch.bfloat16, torch.float16
    if type(weight) is not nn.Parameter or weight.is_meta or weight.dtype not in floats:
        raise TypeError(f"{name}.weight is no ordinary Parameter of 16 to 64 bit floats, but "
                        f"{type(weight)} of {weight.dtype} on {weight.device}")


class LoRALinear(Adapter):
    """LoRA (arXiv 2106.09685): W' = W0 + sBA."""

    def equation(self, W0x, sBAx):
        return W0x + sBAx


class PreDiagLinear(Adapter):
    """Pre-Diag (the paper's): W' = diag(d) W0 + sBA. d starts at 1."""

    def __init__(self, base, r=8, lora_alpha=16):
        super().__init__(base, r, lora_alpha)
        self.diag = nn.Parameter(self.B.new_ones(self.out_features))

    def equation(self, W0x, sBAx):
        return self.diag * W0x + sBAx


class DoRALinear(Adapter):
    """DoRA (arXiv 2402.09353): W' = diag(c) (W0 + sBA), c = magnitude / row_norm.

    magnitude sets the length of each row of W', and starts at those of W0. (The DoRA paper says
    columns, since its W is (in, out).) As in that paper, each forward forms W0 + sBA. detach_norm
    treats row_norm as a constant in the backward, to save memory (its section 4.3).
    A row of zeros in W0 stays zero: its magnitude is 0, so its row of B gets no gradient.
    """

    def __init__(self, base, r=8, lora_alpha=16, detach_norm=True):
        super().__init__(base, r, lora_alpha)
        self.detach_norm = detach_norm
        self.magnitude = nn.Parameter(self.row_norm().detach())  # the same call: c = 1 exactly

    def row_norm(self):
        """The lengths of the rows of W0 + sBA, (m,)."""
        with torch.autocast(self.B.device.type, enabled=False):
            W = self.base.weight + self.scaling * self.B @ self.A  # (m, n)
        return torch.linalg.vector_norm(W, dim=1)

    def equation(self, W0x, sBAx):
        norm = self.row_norm()
        if self.detach_norm:
            norm = norm.detach()
        norm = norm.masked_fill(norm == 0, torch.inf)  # a row of zeros gets c = 0, not 0/0
        c = self.magnitude / norm  # (m,)
        return c * (W0x + sBAx)

    def extra_repr(self):
        return f"{super().extra_repr()}, detach_norm={self.detach_norm}"


class DoRAMatrixLinear(DoRALinear):
    """DoRA in matrix form: the same equation, but row_norm does not form W0 + sBA (m, n).

    Equals DoRALinear to rounding, unless W0 + sBA nearly cancels. Where a row shrinks to a
    fraction δ of its length in W0, c is off by up to about ε/δ² in half precision, by a few ε/δ²
    in float32, and by more if BA itself cancels (ε of W0's dtype).
    """

    def row_norm(self):
        # For a row w of W0 and the row u of sBA: ‖w + u‖² = w·w + 2 w·u + u·u.
        W0 = self.base.weight  # (m, n), maybe of 16 bits: too few for squares
        dtype = torch.promote_types(W0.dtype, torch.float32)
        A = self.A.to(dtype)  # (r, n)
        sB = self.scaling * self.B.to(dtype)  # (m, r)
        with torch.autocast(self.B.device.type, enabled=False):
            W0At = W0 @ A.T.to(W0.dtype)  # (m, r); casting W0 would copy it
            wu = (sB * W0At).sum(dim=1)  # the diagonal of W0 (sBA)ᵀ
            uu = (sB * (sB @ (A @ A.T))).sum(dim=1)  # the diagonal of sBA (sBA)ᵀ
        ww = torch.linalg.vector_norm(W0, dim=1, dtype=dtype).square()
        squared = ww + 2 * wu + uu
        # Below the floor, rounding dominates. (With clamp the gradient at w = 0 would be 0 · ∞.)
        floor = torch.finfo(W0.dtype).eps * ww.detach()
        return torch.where(squared <= floor, floor, squared).sqrt().to(self.B.dtype)


# ---- the rotation of SORA
#
# P = s_P (DCᵀ − CDᵀ) is skew, Pᵀ = −P. So R = e^P is a rotation: Rᵀ = e^−P is its inverse.
# P and R are (m, m), and a forward forms neither: P = UVᵀ with thin U, V (m, 2 r_p). Let Z = VᵀU
# (2 r_p, 2 r_p). Then P² = U (VᵀU) Vᵀ = U Z Vᵀ, P³ = U Z² Vᵀ, and so on. Hence
#
#     e^P = I + P + P²/2 + P³/6 + … = I + U (I + Z/2 + Z²/6 + …) Vᵀ
#
# Call the series in brackets g(Z). Two other g below give other R = I + U g(Z) Vᵀ. Each of the
# three gets Z, and the I of its size.

def g_exp(Z, I):
    """g(Z) = I + Z/2 + Z²/6 + …, for R = e^P.

    It is (e^Z − I) Z⁻¹, but Z need not have an inverse, and has none at the start. So it is read
    off the exponential of a larger matrix, exp [[Z, I], [0, 0]] = [[e^Z, g(Z)], [0, I]].
    """
    block = F.pad(torch.cat([Z, I], dim=1), (0, 0, 0, len(Z)))  # zeros below
    return torch.linalg.matrix_exp(block)[:len(Z), len(Z):]  # makes the CPU wait for a GPU


def g_cayley(Z, I):
    """g(Z) = (I − Z/2)⁻¹, for the rotation R = (I + P/2) (I − P/2)⁻¹, near e^P for small P."""
    # The inverse exists: the eigenvalues of Z are 0 or those of P, which are imaginary, never 2.
    return torch.linalg.inv_ex(I - Z / 2).inverse  # inv waits for a GPU, too


def g_first_order(Z, I):
    """g(Z) = I, for R = I + P, as in the authors' code. It is no rotation: RᵀR = I + PᵀP."""
    return I


ROTATIONS = {"exp": g_exp, "cayley": g_cayley, "first_order": g_first_order}


def rotation_factors(C, D, rotation="exp"):
    """L, V (m, 2 r_p) of R = I + LVᵀ, from C, D (m, r_p), in float64.

    P = s_P (DCᵀ − CDᵀ), s_P = min(1, 1 / (‖C‖ + ‖D‖ + 1e-6)), as in the authors' code.
    """
    C, D = C.double(), D.double()  # so that R is orthogonal to the last bits of float32
    s_P = (1 / (C.norm() + D.norm() + 1e-6)).clamp(max=1)
    # D − C in place of D leaves P the same, as CCᵀ − CCᵀ = 0, but exactly 0 at D = C.
    E = D - C
    U = torch.cat([E, C], dim=1)  # (m, 2 r_p)
    V = s_P * torch.cat([C, -E], dim=1)  # (m, 2 r_p), so P = UVᵀ
    Z = V.T @ U  # (2 r_p, 2 r_p)
    I = torch.eye(len(Z), dtype=Z.dtype, device=Z.device)
    g = ROTATIONS[rotation]
    return U @ g(Z, I), V


class SORALinear(Adapter):
    """SORA (the paper's): W' = R (diag(d) W0 + sBA), where R turns at most 2 r_p dimensions.

    d starts at 1, and D at C, so that P = 0 and R = I. (D = 0 would do that, too, but then C
    would get no gradient at first.) Unlike here, the authors' code also applies d and R to b.
    Raises ValueError for r_p < 1 or a rotation that is not in ROTATIONS.
    """

    def __init__(self, base, r=8, lora_alpha=16, r_p=4, rotation="exp"):
        if r_p < 1:
            raise ValueError(f"r_p must be at least 1, got {r_p}")
        if rotation not in ROTATIONS:
            raise ValueError(f"rotation {rotation!r} is not in {list(ROTATIONS)}")
        super().__init__(base, r, lora_alpha)
        self.r_p, self.rotation = r_p, rotation
        m = self.out_features
        self.diag = nn.Parameter(self.B.new_ones(m))
        bound = m ** -0.5
        self.C = nn.Parameter(self.B.new_empty(m, r_p).uniform_(-bound, bound))
        self.D = nn.Parameter(self.C.detach().clone())

    def rotate(self, z):
        """R z = z + L Vᵀz, for each row z of (…, m)."""
        L, V = rotation_factors(self.C, self.D, self.rotation)
        Vtz = z @ V.to(z.dtype)  # (…, 2 r_p)
        return z + Vtz @ L.T.to(z.dtype)  # (…, m)

    def equation(self, W0x, sBAx):
        return self.rotate(self.diag * W0x + sBAx)

    def rotation_matrix(self):
        """R (m, m), in the dtype of C."""
        I = torch.eye(self.out_features, dtype=torch.float64, device=self.C.device)
        return self.rotate(I).T.to(self.C.dtype)

    def extra_repr(self):
        return f"{super().extra_repr()}, r_p={self.r_p}, rotation={self.rotation}"


# ---- models

METHODS = {"lora": LoRALinear, "pre_diag": PreDiagLinear, "dora": DoRALinear,
           "dora_matrix": DoRAMatrixLinear, "sora": SORALinear}


def names_of(model, cls):
    """{module of class cls: its names, several if shared}. Raises ValueError if none."""
    names = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if name and isinstance(module, cls):  # the model itself is called ""
            names.setdefault(module, []).append(name)
    if not names:
        raise ValueError(f"there is no {cls.__name__} in this {type(model).__name__}")
    return names


def adapt(model, method, target_modules, **options):
    """Wrap the nn.Linears that target_modules names, in place; returns model.

    method is a key of METHODS, or a child of Adapter. As in PEFT's lists, the target "q" means
    each module whose dotted name is "q" or ends in ".q". The first adapt freezes the model, a
    later one only what it wraps. Raises ValueError or TypeError for a wrong method, target or
    option; then no layer is replaced.
    """
    cls = METHODS.get(method, method)
    if not (isinstance(cls, type) and issubclass(cls, Adapter)):
        raise ValueError(f"method {method!r} is not in {list(METHODS)}, nor a child of Adapter")
    targets = {target_modules} if isinstance(target_modules, str) else set(target_modules)
    names = names_of(model, nn.Module)
    chosen = {}
    missed = set(targets)
    for module, places in names.items():
        for target in targets:
            if any(f".{place}".endswith(f".{target}") for place in places):
                check_base(module, places[0])
                chosen[module] = places
                missed.discard(target)
    if missed or not targets:
        ends = {places[0].split(".")[-1] for places in names_of(model, nn.Linear).values()}
        raise ValueError(f"target_modules: no module is called {sorted(missed)[:3]}. "
                         f"There are {sorted(ends)[:8]}")
    layers = {module: cls(module, **options).train(module.training) for module in chosen}
    if not any(isinstance(module, Adapter) for module in names):
        model.requires_grad_(False)
    for module, places in chosen.items():
        for place in places:
            model.set_submodule(place, layers[module])
    return model


def adapters(model):
    """[(name, layer)] of all adapters. Raises ValueError if there are none."""
    return [(names[0], layer) for layer, names in names_of(model, Adapter).items()]


def merge_adapters(model):
    """Put each adapter's merge() in its place; returns model. An error leaves some merged."""
    names = list(names_of(model, Adapter).values())  # names keep no layer alive
    for places in reversed(names):  # inner ones first: a base can be wrapped
        merged = model.get_submodule(places[0]).merge(places[0])
        for place in places:
            model.set_submodule(place, merged)
    return model


def trained_parameters(model):
    """{name: parameter} of all adapters, and of all else that has requires_grad."""
    own = set()
    for _, layer in adapters(model):
        own.update(p for name, p in layer.named_parameters() if not name.startswith("base."))
    return {name: p for name, p in model.named_parameters() if p in own or p.requires_grad}


def adapter_state_dict(model):
    """{name: copy} of all trained parameters. Keep adapt's arguments beside it."""
    return {name: p.detach().clone() for name, p in trained_parameters(model).items()}


@torch.no_grad()
def load_adapter_state_dict(model, state):
    """Copy state, all or nothing, into a model adapted like the saved one; returns model.

    Raises ValueError for other names or shapes, or a value that is not finite.
    """
    trained = trained_parameters(model)
    missing = sorted(trained.keys() - state.keys())
    unknown = sorted(state.keys() - trained.keys())
    if missing or unknown:
        raise ValueError(f"the state lacks {missing[:3]} and has {unknown[:3]} more: adapt with "
                         "the saved options, and unfreeze the same modules")
    for name, p in trained.items():  # check all before the first is copied
        new = state[name].to(p)
        if new.shape != p.shape:
            raise ValueError(f"{name} is {new.shape} in the state, {p.shape} in the model")
        if not new.isfinite().all():
            raise ValueError(f"{name} is not finite in the state")
    for name, p in trained.items():
        p.copy_(state[name])
    return model


# ---- diagnostics of delta = W' − W0 (…, m, n)
#
# Use a copy of the layer in double(): rounding to float32 adds singular values.

def relative_singular_values(delta):
    """σ_i / σ_1, the largest first. All are 0 for delta = 0."""
    S = torch.linalg.svdvals(delta.to(torch.promote_types(delta.dtype, torch.float32)))
    return S / S[..., :1].clamp(min=torch.finfo(S.dtype).tiny)


def singular_value_entropy(delta):
    """−Σ p_i log p_i, p_i = σ_i / Σ_j σ_j, in nats (Roy and Vetterli, 2007). LoRA: ≤ log r."""
    S = relative_singular_values(delta)
    p = S / S.sum(dim=-1, keepdim=True).clamp(min=1)  # the sum is ≥ 1, or 0 for delta = 0
    p = p.masked_fill(p == 0, 1)  # entr is 0 at 0 and 1, but its gradient at 0 is infinite
    return torch.special.entr(p).sum(dim=-1)


def stable_rank(delta):
    """Σ σ_i² / σ_1², which is at most the rank."""
    return relative_singular_values(delta).square().sum(dim=-1)
