# SPDX-License-Identifier: MIT
"""minisora: weight conditioning for fine-tuning, small enough to read in one sitting.

After *Calibrating and Rotating: A Unified Framework for Weight Conditioning in PEFT*
(arXiv 2511.00051, AAAI 2026), https://arxiv.org/abs/2511.00051.

A frozen weight W0 (m, n) gets a low-rank update sBA and a conditioning matrix. Where that matrix
stands and what it is span a grid:

                 before the update, on W0        after it, on the sum
    identity     W0 + sBA           LoRA         (the same)
    diagonal     diag(d) W0 + sBA   Pre-Diag     𝔇 (W0 + sBA)           DoRA
    rotation                                     R (diag(d) W0 + sBA)   SORA

One kernel computes them all without another (m, n) matrix, since 𝔇(W0 + sBA) = 𝔇W0 + s(𝔇B)A:

    y = d ∘ (W0 x) + M c + b,   with c = A x, and [A x; Vᵀ(d ∘ W0 x + sBA x)] for the rotation.

One meaning a letter: A (r, n), B (m, r), s = lora_alpha / r, magnitude (m,), diag d (m,), skew factors
C, D (m, r_p), P skew-symmetric, R rotation. The bias b is never conditioned, and W' = W0 at step 0.

    model = adapt(model, "sora", ["q_proj", "v_proj"], r=8, lora_alpha=16)
    ...                        # train as usual: only the adapters have requires_grad
    model = merge_adapters(model)
"""
import math

import torch


def full_precision(method):
    """Run a layer's method with autocast off: a norm, a rotation or a merge is never taken in half precision."""
    def wrapper(layer):
        with torch.autocast(layer.A.device.type, enabled=False):
            return method(layer)
    wrapper.__doc__ = method.__doc__
    return wrapper


class Adapter(torch.nn.Module):
    """What the five layers share: the frozen `base`, A and B, and the way back to a plain nn.Linear.

    base: the nn.Linear to adapt, weight W0 (m, n); it is frozen and kept as it is, never written.
    r: rank of the update BA, an int ≥ 1. lora_alpha: the update is scaled by s = lora_alpha / r.
    A (r, n) starts Kaiming-uniform(√5), B (m, r) at zero. Adapter tensors are float32, or float64 on a
    float64 base, on W0's device. Each method adds adapted_weight(): W' (m, n), dense and differentiable, in
    float32 or wider, the equation literally; and forward(x), the cheap path to x W'ᵀ + b for x (…, n).
    Raises TypeError if base is not exactly an nn.Linear, ValueError if r is not an int ≥ 1.
    Source: LoRA (arXiv 2106.09685) for A, B and s.
    """

    def __init__(self, base, r, lora_alpha):
        super().__init__()
        if type(base) is not torch.nn.Linear:  # a subclass may use its weight in ways of its own
            raise TypeError(f"{type(self).__name__} adapts a plain nn.Linear, got {type(base).__name__}")
        if type(r) is not int or r < 1:
            raise ValueError(f"r must be an int ≥ 1, got {r!r}")
        self.base = base.requires_grad_(False)
        self.r, self.lora_alpha, self.scaling = r, lora_alpha, lora_alpha / r
        self.in_features, self.out_features = n, m = base.in_features, base.out_features
        self.A = torch.nn.Parameter(self.W0.new_empty(r, n))
        self.B = torch.nn.Parameter(self.W0.new_zeros(m, r))
        torch.nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))

    @property
    def W0(self):
        """The frozen weight (m, n), in float32 or wider."""
        return self.base.weight.to(torch.promote_types(self.base.weight.dtype, torch.float32))

    # Code that reads a Linear's weight past its forward, as nn.TransformerEncoder does in eval mode, gets W'.
    @property
    def weight(self):
        """W' in W0's dtype."""
        return self.adapted_weight().to(self.base.weight.dtype)

    @property
    def bias(self):
        """The base's bias (m,) or None."""
        return self.base.bias

    def check(self, x):
        """Raise ValueError unless x is (…, n)."""
        if x.shape[-1:] != (self.in_features,):
            raise ValueError(f"x must have {self.in_features} features in its last dimension, got shape {tuple(x.shape)}")

    def products(self, x):
        """y0 = x W0ᵀ (…, m) and h = x Aᵀ (…, r): all that a cheap path takes from x (…, n)."""
        self.check(x)
        return torch.nn.functional.linear(x, self.base.weight), x @ self.A.T.to(x.dtype)

    def conditioned(self, y0, d, c, M):
        """The one kernel, y = d ∘ y0 + c Mᵀ + b, in y0's dtype; d (m,), c (…, k), M (m, k)."""
        # d stays in float32: bfloat16 would round 1.003 to 1 for every x.
        return (d * y0 + torch.nn.functional.linear(c, M.to(c.dtype), self.base.bias)).to(y0.dtype)

    @torch.no_grad()
    def merge(self):
        """A fresh plain nn.Linear with weight W', frozen like the base; the layer and W0 stay as they are.

        W' is formed in float32 or wider and cast once. Raises ValueError if an entry of it is not finite.
        There is no unmerge: keep the layer.
        """
        weight = self.weight
        if not weight.isfinite().all():
            raise ValueError(f"{type(self).__name__}.merge: the adapted weight has non-finite entries")
        merged = torch.nn.Linear(self.in_features, self.out_features, bias=self.bias is not None, device="meta")
        merged.weight = torch.nn.Parameter(weight, requires_grad=False)
        if self.bias is not None:
            merged.bias = torch.nn.Parameter(self.bias.clone(), requires_grad=False)
        return merged.train(self.training)


class LoRALinear(Adapter):
    """LoRA: W' = W0 + sBA.

    At step 0 W' = W0, since B = 0. Arguments and errors as in Adapter.
    Source: LoRA (arXiv 2106.09685).
    """

    def __init__(self, base, r=8, lora_alpha=16):
        super().__init__(base, r, lora_alpha)

    @full_precision
    def adapted_weight(self):
        """W' = W0 + sBA."""
        return self.W0 + self.scaling * self.B @ self.A

    def forward(self, x):
        """y = W0 x + sB (A x) + b."""
        y0, h = self.products(x)
        return y0 + torch.nn.functional.linear(h, (self.scaling * self.B).to(h.dtype), self.base.bias)


class DoRALinear(Adapter):
    """DoRA as first written: W' = magnitude ∘ V / ‖V‖row with V = W0 + sBA, formed as a full matrix.

    magnitude (m,) starts at ‖W0‖row, so W' = W0 at step 0. One norm per output feature: dim=1 of a (m, n)
    weight. The DoRA paper stores the transpose and calls this column-wise; ports differ, so look twice.
    detach_norm: no gradient through the norm, as the DoRA paper proposes in its section 4.3. The gradient
    of V is then (magnitude/‖v‖) G, and in full (magnitude/‖v‖)(G − ⟨G, v̂⟩v̂) per row.
    A row with V = 0 has no direction: it stays zero, in value and in gradient.
    Other arguments and errors as in Adapter. Source: DoRA (arXiv 2402.09353).
    """

    def __init__(self, base, r=8, lora_alpha=16, detach_norm=True):
        super().__init__(base, r, lora_alpha)
        self.detach_norm = detach_norm
        self.magnitude = torch.nn.Parameter(self.W0.square().sum(dim=1).sqrt())

    def conditioner(self, squared_norm):
        """The diagonal (m,) of 𝔇 = diag(magnitude / ‖V‖row), from ‖V‖²row (m,)."""
        norm = squared_norm.masked_fill(squared_norm == 0, math.inf).sqrt()  # 0/∞, not 0/0
        return self.magnitude / (norm.detach() if self.detach_norm else norm)

    @full_precision
    def adapted_weight(self):
        """W' = 𝔇V with V = W0 + sBA and 𝔇 = diag(magnitude / ‖V‖row)."""
        V = self.W0 + self.scaling * self.B @ self.A
        return self.conditioner(V.square().sum(dim=1))[:, None] * V

    def forward(self, x):
        """y = W' x + b, with W' formed: what the matrix form does without."""
        self.check(x)
        return torch.nn.functional.linear(x, self.weight, self.base.bias)


class DoRAMatrixLinear(DoRALinear):
    """DoRA in matrix form: W' = 𝔇 (W0 + sBA) = 𝔇W0 + s(𝔇B)A with 𝔇 = diag(magnitude / ‖W0 + sBA‖row).

    The same parameters, values and gradients as DoRALinear, without another (m, n) matrix. The norm comes
    from thin factors; where ‖W0 + sBA‖² falls below ε (‖W0‖² + ‖sBA‖²) in a row, it has no correct digits
    left and is held there. Arguments and errors as in DoRALinear. Source: own derivation of the norm; the
    matrix form is the paper's.
    """

    @full_precision
    def factors(self):
        """d (m,) and M (m, r) of y = d ∘ (W0 x) + M (A x) + b: the diagonal of 𝔇, and s𝔇B."""
        W0, sB = self.base.weight, self.scaling * self.B
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.detach_norm):
            # ‖w + sbA‖² = ‖w‖² + 2 sb·(A w) + sb (AAᵀ) sbᵀ, row by row
            w2 = torch.linalg.vector_norm(W0, dim=1, dtype=self.A.dtype).square()
            cross = (sB * (W0 @ self.A.T.to(W0.dtype))).sum(dim=1)
            u2 = (sB @ (self.A @ self.A.T) * sB).sum(dim=1)
            floor = torch.finfo(W0.dtype).eps * (w2 + u2).detach()
            squared_norm = torch.maximum(w2 + 2 * cross + u2, floor)
        d = self.conditioner(squared_norm)
        return d, d[:, None] * sB

    def forward(self, x):
        """y = d ∘ (W0 x) + s(d ∘ B)(A x) + b with d the diagonal of 𝔇."""
        d, M = self.factors()
        y0, h = self.products(x)
        return self.conditioned(y0, d, h, M)


class PreDiagLinear(Adapter):
    """Pre-Diag: W' = diag(d) W0 + sBA.

    The parameter diag (m,) holds d and starts at 1, so W' = W0 at step 0. Where d has no zero this reaches
    the same weights as diag(d)(W0 + BA): the placements differ in how they train, not in what they reach.
    Arguments and errors as in Adapter. Source: the paper's abstract and framework figure.
    """

    def __init__(self, base, r=8, lora_alpha=16):
        super().__init__(base, r, lora_alpha)
        self.diag = torch.nn.Parameter(torch.ones_like(self.B[:, 0]))

    @full_precision
    def adapted_weight(self):
        """W' = diag(d) W0 + sBA."""
        return self.diag[:, None] * self.W0 + self.scaling * self.B @ self.A

    def forward(self, x):
        """y = d ∘ (W0 x) + sB (A x) + b."""
        y0, h = self.products(x)
        return self.conditioned(y0, self.diag, h, self.scaling * self.B)


def rotation_factors(C, D, rotation="exp", s0=1.0):
    """Thin L and V, both (m, 2 r_p), of the rotation R = I + LVᵀ of P = s_P (DCᵀ − CDᵀ), without an (m, m) matrix.

    With P = UVᵀ and the core Z = VᵀU, 2r_p × 2r_p:  R = I + U K Vᵀ,  L = UK,  where
        exp:          R = e^P,                    K = φ(Z), φ(z) = (eᶻ − 1)/z
        cayley:       R = (I − P/2)⁻¹(I + P/2),   K = (I − Z/2)⁻¹
        first_order:  R = I + P, no rotation,     K = I
    C, D: (m, r_p), any float dtype. s_P = min(1, s0 / (‖C‖F + ‖D‖F + 1e-6)) makes the angles of R grow
    linearly with the factors, not quadratically; it does not bound them. Returns float64 tensors (float32
    where the device has no float64).
    Source: P and s_P from the authors' code; the thin exact R is own derivation.
    """
    C, D = (factor.to(torch.float32 if C.device.type == "mps" else torch.float64) for factor in (C, D))
    s_P = (s0 / (torch.linalg.matrix_norm(C) + torch.linalg.matrix_norm(D) + 1e-6)).clamp(max=1)
    E = D - C  # ECᵀ − CEᵀ is the same P, without the cancellation of DCᵀ − CDᵀ where D is near C
    U, V = torch.cat([E, C], dim=1), s_P * torch.cat([C, -E], dim=1)
    Z = V.T @ U
    I = torch.eye(len(Z), dtype=Z.dtype, device=Z.device)
    if rotation == "exp":  # exp([[Z, I], [0, 0]]) = [[e^Z, φ(Z)], [0, I]]
        block = torch.cat([torch.cat([Z, I], dim=1), torch.zeros_like(torch.cat([Z, I], dim=1))])
        K = torch.linalg.matrix_exp(block)[:len(Z), len(Z):]
    elif rotation == "cayley":  # never singular, as Z has P's imaginary spectrum; inv_ex: no wait for the GPU
        K = torch.linalg.inv_ex(I - Z / 2).inverse
    elif rotation == "first_order":
        K = I
    else:
        raise ValueError(f"rotation must be 'exp', 'cayley' or 'first_order', got {rotation!r}")
    return U @ K, V


class SORALinear(Adapter):
    """SORA: W' = R (diag(d) W0 + sBA), R (m, m) a rotation of the outputs in at most 2 r_p dimensions.

    r_p: rank of the skew factors C and D (m, r_p), an int ≥ 1. C starts uniform on ±1/√m and D = C, so that
    P = 0 and R = I, hence W' = W0 at step 0; C = D = 0 would never get a gradient. diag (m,) as in Pre-Diag.
    rotation: "exp" or "cayley", both orthogonal to rounding, or "first_order", the authors' code's I + P,
    which stretches: RᵀR = I + PᵀP.
    Raises ValueError on r_p or rotation; other arguments and errors as in Adapter.
    Source: the paper's abstract and framework figure; init from the authors' code.
    """

    def __init__(self, base, r=8, lora_alpha=16, r_p=4, rotation="exp"):
        if type(r_p) is not int or r_p < 1:
            raise ValueError(f"r_p must be an int ≥ 1, got {r_p!r}")
        rotation_factors(torch.ones(1, 1), torch.ones(1, 1), rotation)  # raises if there is no such rotation
        super().__init__(base, r, lora_alpha)
        self.r_p, self.rotation = r_p, rotation
        bound = 1 / math.sqrt(self.out_features)
        self.diag = torch.nn.Parameter(torch.ones_like(self.B[:, 0]))
        self.C = torch.nn.Parameter(self.B.new_empty(self.out_features, r_p).uniform_(-bound, bound))
        self.D = torch.nn.Parameter(self.C.detach().clone())

    @full_precision
    def rotation_matrix(self):
        """R (m, m), dense and differentiable, in float32 or wider."""
        L, V = rotation_factors(self.C, self.D, self.rotation)
        return (torch.eye(len(L), dtype=L.dtype, device=L.device) + L @ V.T).to(self.W0.dtype)

    @full_precision
    def adapted_weight(self):
        """W' = R (diag(d) W0 + sBA)."""
        return self.rotation_matrix() @ (self.diag[:, None] * self.W0 + self.scaling * self.B @ self.A)

    @full_precision
    def factors(self):
        """M = [sB L] (m, r + 2r_p), and d ∘ V (m, 2r_p) and (sB)ᵀV (r, 2r_p), which take y0 and h to t."""
        L, V = (factor.to(self.A.dtype) for factor in rotation_factors(self.C, self.D, self.rotation))
        sB = self.scaling * self.B
        return torch.cat([sB, L], dim=1), self.diag[:, None] * V, sB.T @ V

    def forward(self, x):
        """y = R (d ∘ y0 + sB h) + b = d ∘ y0 + [sB L] [h; t] + b with y0 = W0 x, h = A x, t = Vᵀ(d ∘ y0 + sB h).

        A LoRA of rank r + 2r_p: autograd keeps y0, h and t, no second (…, m) activation.
        """
        M, dV, BV = self.factors()
        y0, h = self.products(x)
        t = y0 @ dV.to(y0.dtype) + h @ BV.to(h.dtype)  # Vᵀ(d ∘ y0 + sB h) = (d ∘ V)ᵀ y0 + (VᵀsB) h
        return self.conditioned(y0, self.diag, torch.cat([h, t], dim=-1), M)


METHODS = {"lora": LoRALinear, "dora": DoRALinear, "dora_matrix": DoRAMatrixLinear,
           "pre_diag": PreDiagLinear, "sora": SORALinear}


def adapter_parameters(model):
    """{name: parameter} of every adapter tensor in model, by its name in model."""
    own = {id(p) for layer in model.modules() if isinstance(layer, Adapter) for p in layer.parameters(recurse=False)}
    return {name: p for name, p in model.named_parameters() if id(p) in own}


def replace_modules(model, new):
    """Put new[module] where module stands in model, at every place; returns model, or what replaces it."""
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child in new:
                setattr(parent, name, new[child])
    return new.get(model, model)


def adapt(model, method, target_modules, **kwargs):
    """Freeze model, then wrap the nn.Linears that target_modules names, in place; returns model.

    method: a key of METHODS. target_modules: names, or one name; as in Hugging Face PEFT a name matches
    the modules whose dotted name equals it or ends in "." + it. kwargs go to the layer: r, lora_alpha, ….
    A linear used at several places is wrapped once and stays shared. Adapters already there train on.
    Raises ValueError for an unknown method, a name that matches nothing or one that is adapted already,
    TypeError for a target that is no plain nn.Linear, and what the layer raises. model is then unchanged.
    """
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}")
    names = [target_modules] if isinstance(target_modules, str) else list(target_modules)
    bases = {layer.base for layer in model.modules() if isinstance(layer, Adapter)}
    modules = {name: m for name, m in model.named_modules(remove_duplicate=False) if m not in bases}
    matches = {t: [name for name in modules if ("." + name).endswith("." + t)] for t in names}
    if not names or not all(matches.values()):
        wrong = [t for t in names if not matches[t]]
        linears = sorted({name.rpartition(".")[2] for name, m in modules.items() if type(m) is torch.nn.Linear})
        raise ValueError(f"target_modules {wrong} match no module; the nn.Linears here are named {linears}")
    targets = {}  # a dict, as an ordered set
    for name in sum(matches.values(), []):
        if isinstance(modules[name], Adapter):
            raise ValueError(f"{name} is already adapted; merge_adapters(model) first")
        if type(modules[name]) is not torch.nn.Linear:
            raise TypeError(f"{name} must be a plain nn.Linear, got {type(modules[name]).__name__}")
        targets[modules[name]] = None
    new = {linear: METHODS[method](linear, **kwargs) for linear in targets}
    trained = {id(p) for p in adapter_parameters(model).values()}
    for p in model.parameters():
        p.requires_grad_(id(p) in trained and p.requires_grad)
    return replace_modules(model, new)


def merge_adapters(model):
    """Replace every adapter in model by its merge(), in place; returns model (or the merged layer, if model is one).

    Raises ValueError if an adapted weight is not finite; model is then unchanged.
    """
    return replace_modules(model, {layer: layer.merge() for layer in model.modules() if isinstance(layer, Adapter)})


def adapter_state_dict(model):
    """{name: copy} of the adapter tensors alone: a few kilobytes to save, or a snapshot to return to."""
    return {name: p.detach().clone() for name, p in adapter_parameters(model).items()}


@torch.no_grad()
def load_adapter_state_dict(model, state):
    """Copy a state from adapter_state_dict into model, adapted alike (same method, targets, r and lora_alpha).

    Raises ValueError that lists every missing, unexpected, misshapen or non-finite tensor; model is then
    unchanged. lora_alpha and rotation are not in the state: keep them with it.
    """
    own = adapter_parameters(model)
    wrong = [f"missing {name}" for name in own if name not in state]
    for name, tensor in state.items():
        if name not in own:
            wrong.append(f"unexpected {name}")
        elif not torch.is_tensor(tensor) or tensor.shape != own[name].shape:
            shape = tuple(tensor.shape) if torch.is_tensor(tensor) else type(tensor).__name__
            wrong.append(f"{name} must be a tensor of shape {tuple(own[name].shape)}, got {shape}")
        elif not tensor.isfinite().all():
            wrong.append(f"non-finite {name}")
    if wrong:
        raise ValueError("adapter state does not fit: " + "; ".join(wrong))
    for name, p in own.items():
        p.copy_(state[name])


def singular_value_entropy(delta):
    """−Σ p_i log p_i with p_i = σ_i / Σ_j σ_j, in nats, of delta (…, m, n): the spread of an update W' − W0.

    Its exponential is the effective rank of Roy and Vetterli (2007), between 1 and the rank: an update of
    rank r has at most log r. This normalisation is our choice, the paper's was not available. 0 for delta = 0.
    """
    S = torch.linalg.svdvals(delta.to(torch.promote_types(delta.dtype, torch.float32)))
    return torch.special.entr(S / S.sum(dim=-1, keepdim=True).clamp(min=torch.finfo(S.dtype).tiny)).sum(dim=-1)


def stable_rank(delta):
    """‖delta‖²F / ‖delta‖²₂ = Σ σ_i² / σ_1², between 1 and the rank, of delta (…, m, n). 0 for delta = 0."""
    S = torch.linalg.svdvals(delta.to(torch.promote_types(delta.dtype, torch.float32)))
    return (S / S[..., :1].clamp(min=torch.finfo(S.dtype).tiny)).square().sum(dim=-1)
