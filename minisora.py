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

A diagonal passes through the sum, 𝔇(W0 + sBA) = 𝔇W0 + s(𝔇B)A, and a rotation R = I + LVᵀ of thin L and V adds
to the rank, so that no layer but the original DoRA needs another (m, n) matrix: y = d ∘ (W0 x) + up (down x) + b,

    LoRA       d = 1               up = sB                 down = A
    DoRA       d = diagonal of 𝔇   up = s𝔇B                down = A
    Pre-Diag   d = diag            up = sB                 down = A
    SORA       d = diag            up = [sB L]             down = [A; Vᵀ(diag(d) W0 + sBA)]

Letters: A (r, n), B (m, r), s = lora_alpha / r, magnitude and diag (m,), skew factors C and D (m, r_p), P skew-
symmetric, R its rotation (m, m). The bias b is never conditioned, and W' = W0 at step 0.

    model = adapt(model, "sora", ["q_proj", "v_proj"], r=8, lora_alpha=16)
    ...                        # train as usual: only the adapters have requires_grad
    model = merge_adapters(model)
"""
import math

import torch


class Adapter(torch.nn.Module):
    """What the five layers share: the frozen `base`, A and B, and the way back to a plain nn.Linear.

    base: the nn.Linear to adapt, weight W0 (m, n), bias b (m,) or None; it is frozen, kept and never written.
    r: rank of the update BA, an int ≥ 1. lora_alpha: the update is scaled by s = lora_alpha / r.
    A (r, n) starts Kaiming-uniform(√5), B (m, r) at zero, on W0's device. Adapter tensors are float32 on a
    half precision base, else of the base's dtype. Each subclass adds adapted_weight(): W' (m, n), dense and
    differentiable, in float32 or wider, the equation literally; and forward(x), the cheap path to x W'ᵀ + b,
    for x (…, n) of the base's dtype (autocast aside) to y (…, m) of the dtype that the base would give.
    Raises TypeError for a base that is no plain nn.Linear, ValueError if r is not an int ≥ 1 or lora_alpha not
    finite; in forward ValueError if x has another width, TypeError if it is nested.
    Source: LoRA (arXiv 2106.09685) for A, B and s.
    """

    def __init__(self, base, r, lora_alpha):
        super().__init__()
        self.refuse(base)
        if type(r) is not int or r < 1:
            raise ValueError(f"r must be an int ≥ 1, got {r!r}")
        if not isinstance(lora_alpha, (int, float)) or not math.isfinite(lora_alpha):
            raise ValueError(f"lora_alpha must be a finite number, got {lora_alpha!r}")
        self.base = base
        self.r, self.lora_alpha, self.scaling = r, lora_alpha, lora_alpha / r
        self.in_features, self.out_features = base.in_features, base.out_features
        self.A = torch.nn.Parameter(self.W0.new_empty(r, self.in_features))
        self.B = torch.nn.Parameter(self.W0.new_zeros(self.out_features, r))
        torch.nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))
        self.train(base.training)
        base.requires_grad_(False)  # last: a layer that fails leaves its base as it was

    @staticmethod
    def refuse(base, name="base"):
        """Raise TypeError unless base is exactly an nn.Linear: a subclass may use its weight in ways of its own."""
        if type(base) is not torch.nn.Linear:
            raise TypeError(f"{name} must be a plain nn.Linear, got {type(base).__name__}")
        if "weight" not in base._parameters:
            raise TypeError(f"{name} must be a plain nn.Linear, its weight is computed (weight_norm, pruning)")

    @property
    def W0(self):
        """The frozen weight (m, n), in float32 or wider."""
        return self.base.weight.to(torch.promote_types(self.base.weight.dtype, torch.float32))

    @property
    def weight(self):
        """W' in W0's dtype, for code that reads a Linear's weight past its forward (nn.TransformerEncoder in eval)."""
        return self.adapted_weight().to(self.base.weight.dtype)

    @property
    def bias(self):
        """The base's bias (m,) or None."""
        return self.base.bias

    def full_precision(self):
        """A context without autocast: weights, norms and rotations keep the dtypes that are written."""
        return torch.autocast(self.A.device.type, enabled=False)

    def check_width(self, x):
        if x.is_nested:
            raise TypeError("x must not be a nested tensor (nn.TransformerEncoder: pass enable_nested_tensor=False)")
        if x.shape[-1:] != (self.in_features,):
            raise ValueError(f"x must have {self.in_features} features in its last dimension, got {tuple(x.shape)}")

    def low_rank(self, x, up, down):
        """y0 = W0 x and up (down x) + b, both (…, m); up (m, k) and down (k, n) in the dtype the base computes in."""
        self.check_width(x)
        linear, h = torch.nn.functional.linear, x @ down.T.to(x.dtype)  # h (…, k)
        return linear(x, self.base.weight), linear(h, up.to(h.dtype), self.base.bias)

    def kernel(self, x, d, up, down):
        """y = d ∘ (W0 x) + up (down x) + b (…, m); d (m,), up (m, k), down (k, n)."""
        y0, update = self.low_rank(x, up, down)
        return (d * y0 + update).to(y0.dtype)  # d stays in float32: bfloat16 would round 1.003 to 1 for every x

    @torch.no_grad()
    def merge(self):
        """A fresh plain nn.Linear with weight W', frozen like the base; the layer and W0 stay as they are.

        W' is formed in float32 or wider and cast once to W0's dtype. Raises ValueError if an entry of it is
        not finite. There is no unmerge: keep the layer.
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

    def adapted_weight(self):
        """W' = W0 + sBA."""
        with self.full_precision():
            return self.W0 + self.scaling * self.B @ self.A

    def forward(self, x):
        """y = W0 x + sB (A x) + b: the kernel at d = 1, without its product."""
        y0, update = self.low_rank(x, self.scaling * self.B, self.A)
        return y0 + update


class DoRALinear(Adapter):
    """DoRA as first written: W' = magnitude ∘ W / ‖W‖row with W = W0 + sBA, formed as a full matrix.

    magnitude (m,) starts at ‖W0‖row, so W' = W0 at step 0. One norm per output feature: dim=1 of a (m, n)
    weight. The DoRA paper stores the transpose and calls this column-wise; ports differ, so look twice.
    detach_norm: no gradient through the norm, as the DoRA paper proposes in its section 4.3. With G the
    gradient of W', c = magnitude / ‖w‖ and ŵ = w / ‖w‖ for a row w, that of W is then cG, and in full
    c(G − ⟨G, ŵ⟩ŵ); that of magnitude is ⟨G, ŵ⟩ either way. A row W = 0 has no direction: it stays zero, and
    so does its gradient. Other arguments and errors as in Adapter. Source: DoRA (arXiv 2402.09353).
    """

    def __init__(self, base, r=8, lora_alpha=16, detach_norm=True):
        super().__init__(base, r, lora_alpha)
        self.detach_norm = detach_norm
        self.magnitude = torch.nn.Parameter(self.W0.square().sum(dim=1).sqrt())

    def row_scale(self, squared_norm):
        """magnitude / ‖W‖row (m,), the diagonal of 𝔇, from ‖W‖²row (m,)."""
        norm = squared_norm.masked_fill(squared_norm == 0, math.inf).sqrt()  # 0/∞, not 0/0
        return self.magnitude / (norm.detach() if self.detach_norm else norm)

    def adapted_weight(self):
        """W' = 𝔇W with W = W0 + sBA and 𝔇 = diag(magnitude / ‖W‖row)."""
        with self.full_precision():
            W = self.W0 + self.scaling * self.B @ self.A
            return self.row_scale(W.square().sum(dim=1))[:, None] * W

    def forward(self, x):
        """y = W' x + b, with W' formed: what the matrix form does without."""
        self.check_width(x)
        return torch.nn.functional.linear(x, self.weight, self.base.bias)


class DoRAMatrixLinear(DoRALinear):
    """DoRA in matrix form: W' = 𝔇 (W0 + sBA) = 𝔇W0 + s(𝔇B)A with 𝔇 = diag(magnitude / ‖W0 + sBA‖row).

    The parameters of DoRALinear and, to rounding, its values and gradients, without another (m, n) matrix:
    the norm comes from thin factors. Where a row has ‖W0 + sBA‖² below ε‖W0‖², ε that of the base's dtype,
    no digit of that sum is right; there it is held at this floor, which has no gradient.
    Arguments and errors as in DoRALinear. Source: the paper's abstract; the norm is own derivation.
    """

    def thin_row_scale(self):
        """The diagonal of 𝔇 (m,), from thin factors."""
        with self.full_precision():
            A, B = (self.A.detach(), self.B.detach()) if self.detach_norm else (self.A, self.B)  # keep no graph in vain
            weight, sB = self.base.weight, self.scaling * B
            # ‖w + sbA‖² = ‖w‖² + 2 sb·(A w) + sb (AAᵀ) sbᵀ, row by row, each term (m,). ‖w‖² is not kept from one
            # call to the next: it would go stale when another base is loaded, and it is a small part of the time.
            w2 = torch.linalg.vector_norm(weight, dim=1, dtype=A.dtype).square()
            cross = (sB * (weight @ A.T.to(weight.dtype))).sum(dim=1)
            u2 = (sB @ (A @ A.T) * sB).sum(dim=1)
            return self.row_scale(torch.maximum(w2 + 2 * cross + u2, torch.finfo(weight.dtype).eps * w2))

    def forward(self, x):
        """y = d ∘ (W0 x) + s(d ∘ B)(A x) + b with d the diagonal of 𝔇."""
        d = self.thin_row_scale()
        return self.kernel(x, d, d[:, None] * (self.scaling * self.B), self.A)


class PreDiagLinear(Adapter):
    """Pre-Diag: W' = diag(d) W0 + sBA.

    The parameter diag (m,) holds d and starts at 1, so W' = W0 at step 0. Where d has no zero this reaches
    the same weights as diag(d)(W0 + BA): the placements differ in how they train, not in what they reach.
    Arguments and errors as in Adapter. Source: the paper's abstract and framework figure.
    """

    def __init__(self, base, r=8, lora_alpha=16):
        super().__init__(base, r, lora_alpha)
        self.diag = torch.nn.Parameter(torch.ones_like(self.B[:, 0]))

    def adapted_weight(self):
        """W' = diag(d) W0 + sBA."""
        with self.full_precision():
            return self.diag[:, None] * self.W0 + self.scaling * self.B @ self.A

    def forward(self, x):
        """y = d ∘ (W0 x) + sB (A x) + b."""
        return self.kernel(x, self.diag, self.scaling * self.B, self.A)


def rotation_factors(C, D, rotation="exp"):
    """Thin L and V, both (m, 2 r_p), of the rotation R = I + LVᵀ of P = s_P (DCᵀ − CDᵀ), without an (m, m) matrix.

    P = UVᵀ with U = [E C], V = s_P [C −E] and E = D − C diag(τ), for any τ. With the core Z = VᵀU (2r_p, 2r_p)
    R = I + U K Vᵀ, so L = UK, where
        exp:          R = e^P                       K = φ(Z), φ(z) = (eᶻ − 1)/z
        cayley:       R = (I − P/2)⁻¹(I + P/2)      K = (I − Z/2)⁻¹
        first_order:  R = I + P, no rotation        K = I
    C, D: (m, r_p), any float dtype. s_P = min(1, 1 / (‖C‖F + ‖D‖F + 1e-6)): once it is below 1 the angles of R
    grow linearly with the factors, no longer quadratically; it does not bound them. Returns float64 tensors,
    float32 where the device has no float64. Raises ValueError for another rotation.
    Source: P and s_P from the authors' code; the thin exact R is own derivation.
    """
    dtype = torch.float32 if C.device.type == "mps" else torch.float64
    C, D = C.to(dtype), D.to(dtype)
    s_P = (1 / (torch.linalg.matrix_norm(C) + torch.linalg.matrix_norm(D) + 1e-6)).clamp(max=1)
    # What a column of D has along its column of C drops out of P. Taken off first it cannot cancel later, and
    # D = C, the start, gives τ = 1, E = 0 and P = 0 exactly.
    tau = (C * D).detach().sum(dim=0) / C.detach().square().sum(dim=0).clamp(min=torch.finfo(dtype).tiny)
    E = D - C * tau
    U, V = torch.cat([E, C], dim=1), s_P * torch.cat([C, -E], dim=1)
    Z = V.T @ U
    I = torch.eye(len(Z), dtype=dtype, device=Z.device)
    if rotation == "exp":  # exp([[Z, I], [0, 0]]) = [[e^Z, φ(Z)], [0, I]]
        top = torch.cat([Z, I], dim=1)
        K = torch.linalg.matrix_exp(torch.cat([top, torch.zeros_like(top)]))[:len(Z), len(Z):]
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
        rotation_factors(torch.ones(1, 1), torch.ones(1, 1), rotation)  # refuse an unknown one before base is frozen
        super().__init__(base, r, lora_alpha)
        self.r_p, self.rotation = r_p, rotation
        bound = 1 / math.sqrt(self.out_features)
        self.diag = torch.nn.Parameter(torch.ones_like(self.B[:, 0]))
        self.C = torch.nn.Parameter(self.B.new_empty(self.out_features, r_p).uniform_(-bound, bound))
        self.D = torch.nn.Parameter(self.C.detach().clone())

    def rotation_matrix(self):
        """R (m, m), dense and differentiable, in float32 or wider."""
        with self.full_precision():
            L, V = rotation_factors(self.C, self.D, self.rotation)
            return (torch.eye(len(L), dtype=L.dtype, device=L.device) + L @ V.T).to(self.W0.dtype)

    def adapted_weight(self):
        """W' = R (diag(d) W0 + sBA)."""
        with self.full_precision():
            return self.rotation_matrix() @ (self.diag[:, None] * self.W0 + self.scaling * self.B @ self.A)

    def up_and_down(self):
        """[sB L] (m, r + 2r_p) and [A; VᵀM] (r + 2r_p, n) with M = diag(d) W0 + sBA."""
        with self.full_precision():
            L, V = (factor.to(self.A.dtype) for factor in rotation_factors(self.C, self.D, self.rotation))
            weight, sB = self.base.weight, self.scaling * self.B
            VM = (self.diag[:, None] * V).T.to(weight.dtype) @ weight + (V.T @ sB) @ self.A  # (2r_p, n), no (m, n)
            return torch.cat([sB, L], dim=1), torch.cat([self.A, VM])

    def forward(self, x):
        """y = (I + LVᵀ) M x + b = d ∘ (W0 x) + [sB L] ([A; VᵀM] x) + b: a Pre-Diag of rank r + 2r_p."""
        return self.kernel(x, self.diag, *self.up_and_down())


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

    method: a key of METHODS. target_modules: names, or one name (never a regular expression); as in Hugging
    Face PEFT a name matches the modules whose dotted name equals it or ends in "." + it. kwargs go to the
    layer: r, lora_alpha, …. A linear used at several places is wrapped once and stays shared. Adapters
    already there keep their requires_grad.
    Raises ValueError for an unknown method, a name that matches nothing or one that is adapted already,
    TypeError for a target that is no plain nn.Linear, and what the layer raises. model is then unchanged.
    """
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}")
    targets = [target_modules] if isinstance(target_modules, str) else list(target_modules)
    bases = {layer.base for layer in model.modules() if isinstance(layer, Adapter)}
    modules = {name: module for name, module in model.named_modules(remove_duplicate=False) if module not in bases}
    matches = {target: [name for name in modules if ("." + name).endswith("." + target)] for target in targets}
    if not targets or not all(matches.values()):
        wrong = [target for target in targets if not matches[target]]
        there = sorted({name.rpartition(".")[2] for name, module in modules.items() if type(module) is torch.nn.Linear})
        raise ValueError(f"target_modules {wrong} match no module; the nn.Linears here are named {there}")
    matched = {name: module for name, module in modules.items() if any(name in names for names in matches.values())}
    for name, module in matched.items():
        if isinstance(module, Adapter):
            raise ValueError(f"{name} is already adapted; merge_adapters(model) first")
        Adapter.refuse(module, name)  # all of them, before the first is frozen
    new = {linear: METHODS[method](linear, **kwargs) for linear in dict.fromkeys(matched.values())}
    trained = {id(p) for p in adapter_parameters(model).values()}
    for p in model.parameters():
        p.requires_grad_(id(p) in trained and p.requires_grad)
    return replace_modules(model, new)


def merge_adapters(model):
    """Replace every adapter in model by its merge(), in place; returns model (or the merged layer, if model is one).

    Raises ValueError, with the layer's name, if an adapted weight is not finite; model is then unchanged.
    """
    new = {}
    for name, layer in model.named_modules():
        if isinstance(layer, Adapter):
            try:
                new[layer] = layer.merge()
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from None
    return replace_modules(model, new)


def adapter_state_dict(model):
    """{name: copy} of the adapter tensors alone: small to save, or a snapshot to return to."""
    return {name: p.detach().clone() for name, p in adapter_parameters(model).items()}


@torch.no_grad()
def load_adapter_state_dict(model, state):
    """Copy a state from adapter_state_dict into model: the same base weights, adapted with the same arguments.

    The state holds neither (lora_alpha and rotation least of all): keep them with it. Raises ValueError that
    lists every missing, unexpected, misshapen or non-finite tensor; model is then unchanged.
    """
    own, ready = adapter_parameters(model), {}
    wrong = [f"missing {name}" for name in own if name not in state]
    for name, tensor in state.items():
        if name not in own:
            wrong.append(f"unexpected {name}")
        elif not torch.is_tensor(tensor) or not tensor.is_floating_point() or tensor.shape != own[name].shape:
            got = f"{tuple(tensor.shape)}, {tensor.dtype}" if torch.is_tensor(tensor) else type(tensor).__name__
            wrong.append(f"{name} must be a floating-point tensor of shape {tuple(own[name].shape)}, got {got}")
        else:
            ready[name] = tensor.to(own[name], copy=True)  # a copy, should state hold model's own tensors
            if not ready[name].isfinite().all():
                wrong.append(f"non-finite {name}")
    if wrong:
        raise ValueError("adapter state does not fit: " + "; ".join(wrong))
    for name, tensor in ready.items():
        own[name].copy_(tensor)


def relative_singular_values(delta):
    """σ_i / σ_1 of delta (…, m, n), all 0 for delta = 0; so scaled, no sum of them can overflow."""
    S = torch.linalg.svdvals(delta.to(torch.promote_types(delta.dtype, torch.float32)))
    return S / S[..., :1].masked_fill(S[..., :1] == 0, 1)


def singular_value_entropy(delta):
    """−Σ p_i log p_i with p_i = σ_i / Σ_j σ_j, in nats, of delta (…, m, n): the spread of an update W' − W0.

    Its exponential is the effective rank of Roy and Vetterli (2007), between 1 and the rank: an update of
    rank r has at most log r. This normalisation is our choice, the paper's was not available. 0 for delta = 0.
    Take W' − W0 of a small update in float64: in float32 the rounding of W' adds a little of every rank.
    """
    S = relative_singular_values(delta)
    return torch.special.entr(S / S.sum(dim=-1, keepdim=True).clamp(min=1)).sum(dim=-1)


def stable_rank(delta):
    """‖delta‖²F / ‖delta‖²₂ = Σ σ_i² / σ_1², between 1 and the rank, of delta (…, m, n). 0 for delta = 0."""
    return relative_singular_values(delta).square().sum(dim=-1)
