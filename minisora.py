# SPDX-License-Identifier: MIT
"""minisora: weight conditioning for fine-tuning, small enough to read in one sitting.

After *Calibrating and Rotating: A Unified Framework for Weight Conditioning in PEFT*
(arXiv 2511.00051, AAAI 2026). A frozen weight W0 gets a low-rank update sBA and a conditioning
matrix, which acts on W0 before the update is added, or on the sum after it:

                before                         after
    identity    W0 + sBA           LoRA        W0 + sBA               LoRA
    diagonal    diag(d) W0 + sBA   Pre-Diag    diag(c) (W0 + sBA)     DoRA
    rotation    R W0 + sBA         (open)      R (diag(d) W0 + sBA)   SORA

    W0 (m, n)            frozen weight of y = x W'ᵀ + b; b is never conditioned
    A (r, n), B (m, r)   low-rank factors; s = lora_alpha / r
    diag (m,)            holds d
    magnitude (m,)       c = magnitude / ‖W0 + sBA‖, one norm a row
    C, D (m, r_p)        thin factors of a skew P (m, m); R = e^P = I + LVᵀ (m, m) is a rotation

Each is W' = diag(d) W0 + up down with thin up (m, k) and down (k, n), where d is 1 for LoRA and c
for DoRA. All but DoRA as first written are computed so: y = d ∘ (W0 x) + up (down x) + b.

    model = adapt(model, "sora", ["q_proj", "v_proj"], r=8, lora_alpha=16)
    ...                                # train: only the adapters have requires_grad
    state = adapter_state_dict(model)  # all that was trained
    model = merge_adapters(model)      # plain nn.Linears again
"""
import copy
import math

import torch


class Adapter(torch.nn.Module):
    """What the methods share: the frozen nn.Linear `base`, A, B, the forward and the merge.

    To add a method: check its arguments, call super().__init__, make its parameters and write
    dense(), the equation W' (m, n). Put the class in METHODS: it runs, saves and merges.
    thin() makes it fast: (d (m,) or None, up, down) with dense() = diag(d) W0 + up down.

    Parameters and dense() have the base's dtype, or float32 for a half one, under autocast too; y
    has that of base(x). TypeError for a wrong base, ValueError for a wrong r, lora_alpha or x.
    """

    def __init__(self, base, r=8, lora_alpha=16):
        super().__init__()
        self.check_base(base)
        self.check_rank("r", r)
        self.r, self.lora_alpha, self.scaling = int(r), lora_alpha, float(lora_alpha / int(r))
        if not 1e-30 < abs(self.scaling) < 1e30:
            raise ValueError(f"lora_alpha / r must be finite and not 0, got {lora_alpha!r} / {r}")
        self.in_features, self.out_features = base.in_features, base.out_features
        self.base = base
        A = base.weight.new_empty(self.r, self.in_features, dtype=self.wide)
        self.A = torch.nn.Parameter(torch.nn.init.kaiming_uniform_(A, a=math.sqrt(5)))
        self.B = torch.nn.Parameter(self.A.new_zeros(self.out_features, self.r))
        base.requires_grad_(False)  # last: a refused argument leaves the base as it was

    def __init_subclass__(cls):
        if "dense" in vars(cls) and "thin" not in vars(cls):
            cls.thin = Adapter.thin  # an inherited one would be of another equation

    @staticmethod
    def check_base(base, name="base"):
        weight, inside = getattr(base, "weight", None), getattr(base, "__dict__", {}).items()
        own = [k for k, v in inside if k == "forward" or k.endswith("_hooks") and v]
        plain = type(base) is torch.nn.Linear and type(weight) is torch.nn.Parameter and not own
        got = [weight.shape, weight.dtype, weight.device] if plain else own
        if (not plain or 0 in weight.shape or weight.shape != (base.out_features, base.in_features)
                or weight.is_meta or not weight.is_floating_point() or weight.element_size() == 1):
            raise TypeError(
                f"{name} must be exactly an nn.Linear, without hooks or a forward of its own, with "
                "a weight of 16 to 64 bit floats, not empty, computed, quantised, sharded or meta; "
                f"got {type(base).__name__}, weight {type(weight).__name__}, {got}")

    @staticmethod
    def check_rank(name, value):
        if isinstance(value, bool) or not hasattr(value, "__index__") or value.__index__() < 1:
            raise ValueError(f"{name} must be a whole number ≥ 1, got {value!r}")

    def check_input(self, x):  # torch on the CPU multiplies by a meta weight, and returns garbage
        W0, devices = self.base.weight, {t.device for t in (x, *self.parameters())}
        shape = (self.out_features, self.in_features)
        if W0.shape != shape or x.shape[-1:] != shape[1:] or len(devices) > 1:
            raise ValueError(f"x must be (…, {shape[1]}) and W0 {shape} whole, all on one device; "
                             f"got x {tuple(x.shape)}, W0 {tuple(W0.shape)}, {devices}")

    wide = property(lambda self: torch.promote_types(self.base.weight.dtype, torch.float32))
    W0 = property(lambda self: self.base.weight.to(self.wide))  # frozen (m, n), to be read only
    bias = property(lambda self: self.base.bias)

    @property
    def weight(self):
        """W' in the base's dtype, computed at each read: writing into it does nothing."""
        return self.adapted_weight().to(self.base.weight.dtype)

    def adapted_weight(self):
        """dense(), W' (m, n), differentiable, in float32 or wider."""
        self.check_input(self.A)  # for W0 and the devices: A passes for an x
        with torch.autocast(self.A.device.type, enabled=False):
            return self.dense()

    def thin(self):
        return None

    def forward(self, x):
        """x (…, n) -> y = x W'ᵀ + b (…, m)."""
        self.check_input(x)
        with torch.autocast(self.A.device.type, enabled=False):
            thin = self.thin()
        if thin is None:
            weight = self.adapted_weight().to(self.base.weight.dtype)  # self.weight hides typos
            return torch.nn.functional.linear(x, weight, self.bias)
        d, up, down = thin
        y0 = torch.nn.functional.linear(x, self.base.weight)  # (…, m)
        h = x @ down.T.to(x.dtype)  # (…, k)
        update = torch.nn.functional.linear(h, up.to(h.dtype), self.bias)  # (…, m)
        y = y0 if d is None else d * y0  # d is not cast down: bfloat16 would round 1.003 to 1
        return (y + update).to(y0.dtype)

    @torch.no_grad()
    def merge(self):
        """A new nn.Linear, W' frozen. ValueError if not finite, TypeError for a changed base."""
        weight = self.adapted_weight().to(self.base.weight.dtype)
        self.check_base(self.base)  # again: a weight that hooks compute would not keep W'
        if not weight.isfinite().all():
            raise ValueError(f"{type(self).__name__}.merge: W' is not finite")
        weight = torch.nn.Parameter(weight, requires_grad=False)
        return copy.deepcopy(self.base, {id(self.base.weight): weight})  # W' in place of W0

    def extra_repr(self):
        shown = {k: v for k, v in vars(self).items() if k[0] != "_" and k != "training"}
        return ", ".join(f"{k}={v}" for k, v in shown.items())


class LoRALinear(Adapter):
    """LoRA: W' = W0 + sBA. Source: LoRA (arXiv 2106.09685); the start of A from loralib."""

    def dense(self):
        return self.W0 + self.scaling * self.B @ self.A

    def thin(self):
        return None, self.scaling * self.B, self.A


class DoRALinear(Adapter):
    """DoRA as first written: W' = diag(c) W with W = W0 + sBA and c = magnitude / ‖W‖row.

    magnitude (m,) starts at ‖W0‖row. A row is dim=1 of an (m, n) weight; the DoRA paper stores the
    transpose, and calls it a column. detach_norm: no gradient through the norm (its section 4.3).
    Where g is the gradient of a row of W', the row w of W then gets cg, not c(g − ⟨g, ŵ⟩ŵ), with
    ŵ = w / ‖w‖. A row w = 0 stays 0. Base weights loaded later leave magnitude stale.
    Source: DoRA (arXiv 2402.09353).
    """

    def __init__(self, base, r=8, lora_alpha=16, detach_norm=True):
        super().__init__(base, r, lora_alpha)
        self.detach_norm = detach_norm
        self.magnitude = torch.nn.Parameter(self.W0.square().sum(dim=1).sqrt())

    def row_scale(self, squared_norm):
        norm = squared_norm.masked_fill(squared_norm == 0, math.inf).sqrt()  # c = 0 at a zero row
        return self.magnitude / (norm.detach() if self.detach_norm else norm)

    def dense(self):
        W = self.W0 + self.scaling * self.B @ self.A
        return self.row_scale(W.square().sum(dim=1))[:, None] * W


class DoRAMatrixLinear(DoRALinear):
    """DoRA in matrix form: W' = diag(c) W0 + s(diag(c) B)A.

    DoRALinear's parameters, values and gradients, without a second (m, n) matrix: thin() sums the
    square of each row's norm from terms that may cancel. Below ε times the square of the row of
    W0, with ε of the base's dtype, no digit of the sum is right: it is held there.
    Source: the paper's abstract has the idea; the norm is own derivation, also in arXiv 2603.22276.
    """

    def thin(self):
        A, B = self.A, self.B
        if self.detach_norm:
            A, B = A.detach(), B.detach()  # in row_scale, a graph of the norm would be kept
        W0, sB = self.base.weight, self.scaling * B
        # ‖w0 + sbA‖² = ‖w0‖² + 2 sb·(Aw0) + sb (AAᵀ) sbᵀ for a row w0 of W0 and its row b of B
        w2 = torch.linalg.vector_norm(W0, dim=1, dtype=self.wide).square()
        cross = (sB * (W0 @ A.T.to(W0.dtype))).sum(dim=1)
        u2 = (sB @ (A @ A.T) * sB).sum(dim=1)
        floor = torch.finfo(W0.dtype).eps * w2
        c = self.row_scale(torch.maximum(w2 + 2 * cross + u2, floor))
        return c, c[:, None] * (self.scaling * self.B), self.A


class PreDiagLinear(Adapter):
    """Pre-Diag: W' = diag(d) W0 + sBA.

    d, the parameter diag (m,), starts at 1. With no zero in d, diag(d)(W0 + sBA) reaches the
    same weights, and trains differently. Source: the paper's abstract and framework figure.
    """

    def __init__(self, base, r=8, lora_alpha=16):
        super().__init__(base, r, lora_alpha)
        self.diag = torch.nn.Parameter(self.B.new_ones(self.out_features))

    def dense(self):
        return self.diag[:, None] * self.W0 + self.scaling * self.B @ self.A

    def thin(self):
        return self.diag, self.scaling * self.B, self.A


def rotation_factors(C, D, rotation="exp"):
    """Thin L and V (m, 2 r_p) of R = I + LVᵀ, for the skew P = s_P (DCᵀ − CDᵀ).

        exp           R = e^P, to 1e-12 in float64 for ‖P‖₂ up to 70
        cayley        R = (I − P/2)⁻¹ (I + P/2)
        first_order   R = I + P, not orthogonal: RᵀR = I + PᵀP

    C, D: (m, r_p), any float dtype; returns float64, or float32 on mps, which has none.
    s_P = min(1, 1 / (‖C‖F + ‖D‖F + 1e-6)): from a sum of 1 on, angles grow linearly with it.
    Raises ValueError for another name. Source: authors' code for P and s_P; own for the thin R.
    """
    dtype = torch.float32 if C.device.type == "mps" else torch.float64
    C, D = C.to(dtype), D.to(dtype)
    s_P = (1 / (torch.linalg.matrix_norm(C) + torch.linalg.matrix_norm(D) + 1e-6)).clamp(max=1)
    # E = D − τC, column by column, has the same P for every τ, so τ needs no gradient. This one
    # takes off what lies along C and would cancel in P: P is exactly 0 where D = C.
    c2 = C.detach().square().sum(dim=0).clamp(min=torch.finfo(dtype).tiny)
    E = D - C * ((C * D).detach().sum(dim=0) / c2)
    # P = UVᵀ, so Pʲ = U Zʲ⁻¹ Vᵀ with a small Z = VᵀU: every power series I + k₁P + k₂P² + … is
    # R = I + U K Vᵀ with K = k₁I + k₂Z + …. For e^P, K = φ(Z) with φ(z) = (eᶻ − 1) / z.
    U, V = torch.cat([E, C], dim=1), s_P * torch.cat([C, -E], dim=1)
    Z = V.T @ U  # (2 r_p, 2 r_p)
    K = I = torch.eye(len(Z), dtype=dtype, device=Z.device)  # first order
    if rotation == "exp":
        # The [4/4] Padé approximant at P/2⁹, squared nine times: (I + UKVᵀ)² = I + U(2K + KZK)Vᵀ.
        # A diagonal Padé approximant of e^P is orthogonal for a skew P, even where it is not e^P.
        z = Z / 2**9
        z2 = z @ z
        denominator = I - z / 2 + z2 * (3 / 28) - z2 @ z / 84 + z2 @ z2 / 1680
        K = torch.linalg.inv_ex(denominator).inverse @ (I + z2 / 42) / 2**9  # inv_ex: no GPU wait
        for _ in range(9):
            K = 2 * K + K @ Z @ K
    elif rotation == "cayley":  # the [1/1] one, not squared
        K = torch.linalg.inv_ex(I - Z / 2).inverse
    elif rotation != "first_order":
        raise ValueError(f"unknown rotation {rotation!r}")
    return U @ K, V


class SORALinear(Adapter):
    """SORA: W' = R (diag(d) W0 + sBA), R (m, m) a rotation of up to 2 r_p dimensions.

    C (m, r_p) starts uniform in ±1/√m and D = C, so that P = 0; C = D = 0 would never move. Raises
    ValueError for r_p or rotation. Source: the paper's figure; the start from the authors' code.
    """

    def __init__(self, base, r=8, lora_alpha=16, r_p=4, rotation="exp"):
        self.check_rank("r_p", r_p)
        if rotation not in ("exp", "cayley", "first_order"):
            raise ValueError(f"rotation must be exp, cayley or first_order, got {rotation!r}")
        super().__init__(base, r, lora_alpha)
        self.r_p, self.rotation = int(r_p), rotation
        bound = 1 / math.sqrt(self.out_features)
        C = self.B.new_empty(self.out_features, self.r_p).uniform_(-bound, bound)
        self.diag = torch.nn.Parameter(self.B.new_ones(self.out_features))
        self.C, self.D = torch.nn.Parameter(C), torch.nn.Parameter(C.clone())

    def rotation_matrix(self):
        """R (m, m), dense and differentiable, in float32 or wider."""
        L, V = rotation_factors(self.C, self.D, self.rotation)
        return (torch.eye(len(L), device=L.device) + L @ V.T).to(self.wide)

    def dense(self):
        M = self.diag[:, None] * self.W0 + self.scaling * self.B @ self.A
        return self.rotation_matrix() @ M

    def thin(self):
        # With M = diag(d) W0 + sBA, R M = M + L(VᵀM) is a Pre-Diag of rank r + 2 r_p.
        L, V = (t.to(self.C.dtype) for t in rotation_factors(self.C, self.D, self.rotation))
        W0, sB = self.base.weight, self.scaling * self.B
        VM = (self.diag[:, None] * V).T.to(W0.dtype) @ W0 + (V.T @ sB) @ self.A  # (2 r_p, n)
        return self.diag, torch.cat([sB, L], dim=1), torch.cat([self.A, VM])


METHODS = {"lora": LoRALinear, "dora": DoRALinear, "dora_matrix": DoRAMatrixLinear,
           "pre_diag": PreDiagLinear, "sora": SORALinear}


def adapters(model):
    return [(name, layer) for name, layer in model.named_modules() if isinstance(layer, Adapter)]


def replace_module(model, old, new):
    """Put new at every place of old in model; returns model, or new if model is old."""
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if child is old:
                setattr(parent, name, new)
    return new if model is old else model


def adapt(model, method, target_modules, **kwargs):
    """Wrap the nn.Linears that target_modules names, in place; returns model.

    method: a key of METHODS, whose class gets kwargs (r, lora_alpha, …). target_modules: one name
    or several; each selects the modules whose dotted name equals it or ends in "." + it, as in
    Hugging Face PEFT. A linear at several places is wrapped once, and shared. The first adapt
    freezes the model, a later one only what it wraps. Raises ValueError for a method, a name or an
    argument, TypeError for a module that Adapter refuses; the model is then unchanged.
    """
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}")
    targets = [target_modules] if isinstance(target_modules, str) else list(target_modules)
    adapted = {module for _, layer in adapters(model) for module in layer.modules()}
    bases, unmatched = {}, set(targets)
    for name, module in model.named_modules(remove_duplicate=False):
        hits = {target for target in targets if f".{name}".endswith(f".{target}")}
        if hits:
            bases[module] = name
            unmatched -= hits
    if unmatched or not targets:
        linears = {name.rpartition(".")[2] for name, module in model.named_modules()
                   if type(module) is torch.nn.Linear and module not in adapted}
        raise ValueError(f"target_modules {sorted(unmatched)[:3]} match no module; "
                         f"nn.Linears are named {sorted(linears)[:9]} …")
    for module, name in bases.items():
        if module in adapted:
            raise ValueError(f"{name} is already adapted; merge_adapters(model) first")
        Adapter.check_base(module, name)  # here for the name in its message
    trained = [p for p in model.parameters() if p.requires_grad]
    try:
        layers = {base: METHODS[method](base, **kwargs) for base in bases}
    except BaseException:  # the second may fail when the first has frozen its base
        for p in trained:
            p.requires_grad = True
        raise
    if not adapted:
        for p in trained:
            p.requires_grad = False
    for base, layer in layers.items():
        layer.train(base.training)
        model = replace_module(model, base, layer)
    return model


def merge_adapters(model):
    """Replace every adapter by its merge(), in place; returns model.

    Raises what merge() raises, with the layer's name; the model is then unchanged, since all are
    merged on trial first. One W' at a time is held beside its base.
    """
    layers = adapters(model)
    for name, layer in layers:
        try:
            layer.merge()
        except (TypeError, ValueError) as error:
            raise type(error)(f"{name}: {error}") from error
    while layers:
        _, layer = layers.pop()
        model = replace_module(model, layer, layer.merge())
    return model


def trained_parameters(model):
    """{name: parameter} of what adapter_state_dict copies."""
    own, flat = set(), set()
    for module in model.modules():
        if isinstance(module, Adapter):
            own |= set(module.parameters()) - set(module.base.parameters())
        if isinstance(module, (Adapter, torch.nn.Linear)):
            mine = dict(module.named_parameters())
            matrix = mine.get("A", mine.get("weight"))
            if matrix is not None and matrix.dim() == 1:  # FSDP1 leaves flat pieces
                flat |= set(mine.values())
    if not own:
        raise ValueError("the model has no adapters: take its state before it is merged")
    trained = {name: p for name, p in model.named_parameters() if p in own or p.requires_grad}
    for name, p in trained.items():
        if p in flat or type(p) is not torch.nn.Parameter or p.is_meta or p.numel() == 0:
            raise ValueError(
                f"{name} is sharded, empty or on meta: {type(p).__name__} {tuple(p.shape)}, "
                f"{p.device}. Gather first (FSDP.summon_full_params, or get_model_state_dict with "
                "full_state_dict=True and ignore_frozen_params=True); load before sharding")
    return trained


def adapter_state_dict(model):
    """{name: copy} of every adapter tensor and every other parameter with requires_grad (a head).

    All that training changes but buffers. Keep the arguments of adapt beside it: they are not in
    it. Raises ValueError without adapters, or for a parameter that is sharded or on meta.
    """
    return {name: p.detach().clone() for name, p in trained_parameters(model).items()}


@torch.no_grad()
def load_adapter_state_dict(model, state):
    """Copy an adapter_state_dict into a model adapted and unfrozen as it was.

    Raises ValueError with the numbers and the first names of what is missing and unexpected, or
    for a tensor of another shape, not of plain floats or not finite; nothing is then copied.
    """
    own, ready = trained_parameters(model), {}
    missing = sorted(own.keys() - state.keys())
    unexpected = sorted(str(name) for name in state.keys() - own.keys())
    if missing or unexpected:
        message = ("the state does not fit the model, adapted and unfrozen as it is: "
                   f"{len(missing)} missing ({', '.join(missing[:3]):.300}), "
                   f"{len(unexpected)} unexpected ({', '.join(unexpected[:3]):.300})")
        if missing and unexpected:
            prefix = unexpected[0].removesuffix(missing[0])
            if unexpected == [prefix + name for name in missing]:
                message += f", all with the prefix {prefix!r}"
        raise ValueError(message)
    for name, p in own.items():
        tensor = state[name]
        plain = (type(tensor) in (torch.Tensor, torch.nn.Parameter) and not tensor.is_meta
                 and tensor.is_floating_point() and tensor.layout is torch.strided)
        if plain and tensor.shape == p.shape:
            ready[name] = tensor.to(p, copy=True)  # a copy: state may hold the model's own tensors
        if name not in ready or not ready[name].isfinite().all():
            got = [getattr(tensor, what, None) for what in ("shape", "dtype")]
            raise ValueError(f"{name} must be finite floats of shape {tuple(p.shape)}, "
                             f"got {type(tensor).__name__} {got}")
    for name, tensor in ready.items():
        own[name].copy_(tensor)


def relative_singular_values(delta):
    """σ_i / σ_1 of delta (…, m, n), 0 for delta = 0: no sum of them can overflow."""
    S = torch.linalg.svdvals(delta.to(torch.promote_types(delta.dtype, torch.float32)))
    return S / S[..., :1].masked_fill(S[..., :1] == 0, 1)


def singular_value_entropy(delta):
    """−Σ p_i log p_i with p_i = σ_i / Σ_j σ_j, in nats, of delta (…, m, n): the spread of W' − W0.

    At most log r for LoRA. The p are Roy and Vetterli's (2007), whose effective rank is exp of the
    entropy; the paper's were not at hand. Take W' − W0 in float64: rounding adds rank.
    """
    S = relative_singular_values(delta)
    return torch.special.entr(S / S.sum(dim=-1, keepdim=True).clamp(min=1)).sum(dim=-1)


def stable_rank(delta):
    """‖delta‖²F / ‖delta‖²₂ = Σ σ_i² / σ_1² of delta (…, m, n), at most its rank; 0 for 0."""
    return relative_singular_values(delta).square().sum(dim=-1)
