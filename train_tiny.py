"""Adapt a tiny language model from prose to code, with every method of minisora.

    python train_tiny.py    a table in 2 to 5 minutes on 2 CPU cores
        --quick             only to see that it runs, in 25 seconds
        --seeds 5           the mean over five adaptations, ± its standard error
        --reach             instead: which weights each method can reach
        --bench             instead: what one layer costs in time, memory and operations
"""
import argparse
import copy
import pathlib
import sys
import time
import weakref
from pydoc_data.topics import topics

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import minisora

# ---- settings

# Defaults: r = 8, lora_alpha = 16, r_p = 4. Rates are the best of 1e-3, 3e-3, 1e-2 and 3e-2, but
# lora_r13 has lora's, sora_no_diag and sora_r3 have sora's.
ROWS = {  # name: (method of minisora, its arguments, learning rate)
    "full": (None, {}, 3e-3),  # all parameters, as in the base's own training
    "lora": ("lora", {}, 1e-2),
    "lora_r13": ("lora", {"r": 13, "lora_alpha": 26}, 1e-2),  # about as large as sora
    "dora": ("dora", {}, 1e-2),
    "dora_matrix": ("dora_matrix", {}, 1e-2),
    "pre_diag": ("pre_diag", {}, 1e-2),
    "sora": ("sora", {}, 1e-2),  # the default run ends here
    "sora_cayley": ("sora", {"rotation": "cayley"}, 1e-2),
    "sora_first_order": ("sora", {"rotation": "first_order"}, 1e-2),
    "sora_no_diag": ("sora", {}, 1e-2),  # LoRA and the rotation, diag stays 1
    "sora_r3": ("sora", {"r": 3, "lora_alpha": 6}, 1e-2),  # about as large as lora
}
LINEARS = ["qkv", "proj", "fc", "out"]  # what is adapted in each block
DIM, HEADS, LAYERS, CONTEXT, BATCH = 128, 4, 2, 128, 8
BASE_STEPS, STEPS = 1400, 300  # a few minutes; more would still lower bits/byte
REACH_STEPS, BENCH_ROUNDS = 600, 25
BENCH_SIZES = [(2048, 1024), (512, 2048)]  # (tokens, dim)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # not mps, which has no float64

# ---- data

def split(text):
    """The first 80 % of the bytes to train on, and 256 windows of the last 10 % to test on.

    The rates were chosen on the 10 % between. The windows do not overlap.
    """
    data = torch.tensor(list(text), device=DEVICE)
    test = data[len(data) * 9 // 10:]
    starts = torch.linspace(0, len(test) - CONTEXT - 1, 256).long()
    return data[:len(data) * 8 // 10], test[starts[:, None] + torch.arange(CONTEXT + 1)]

# ---- model

class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.ln1, self.ln2 = nn.LayerNorm(DIM), nn.LayerNorm(DIM)
        self.qkv, self.proj = nn.Linear(DIM, 3 * DIM), nn.Linear(DIM, DIM)
        self.fc, self.out = nn.Linear(DIM, 4 * DIM), nn.Linear(4 * DIM, DIM)

    def forward(self, x):  # (batch, time, DIM)
        heads = self.qkv(self.ln1(x)).unflatten(-1, (3 * HEADS, DIM // HEADS)).transpose(1, 2)
        q, k, v = heads.chunk(3, dim=1)  # each (batch, HEADS, time, DIM / HEADS)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.proj(y.transpose(1, 2).flatten(2))
        return x + self.out(F.gelu(self.fc(self.ln2(x))))

class GPT(nn.Module):
    """A byte-level GPT whose embedding is its head."""

    def __init__(self):
        super().__init__()
        self.byte = nn.Parameter(0.02 * torch.randn(256, DIM))
        self.position = nn.Parameter(0.02 * torch.randn(CONTEXT, DIM))
        self.blocks = nn.Sequential(*(Block() for _ in range(LAYERS)))
        self.ln = nn.LayerNorm(DIM)

    def forward(self, tokens):  # (batch, time) bytes -> (batch, time, 256) logits
        x = F.embedding(tokens, self.byte) + self.position[:tokens.shape[1]]
        return F.linear(self.ln(self.blocks(x)), self.byte)

    def loss(self, windows):
        """Mean cross-entropy of windows (batch, CONTEXT + 1), in bits per byte."""
        logits = self(windows[:, :-1]).flatten(0, 1)
        return F.cross_entropy(logits, windows[:, 1:].flatten()) / np.log(2)

    @torch.no_grad()
    def score(self, windows):  # no eval(), since there is no dropout
        return np.mean([self.loss(part).item() for part in windows.split(32)])

    @torch.no_grad()
    def write(self):
        """150 bytes after "def ", at temperature 0.7."""
        text = list(b"def ")
        generator = torch.Generator().manual_seed(0)  # its own, so that scores stay the same
        for _ in range(150):
            logits = self(torch.tensor([text[-CONTEXT:]], device=DEVICE))[0, -1].cpu()
            p = F.softmax(logits / 0.7, dim=-1)
            text.append(torch.multinomial(p, 1, generator=generator).item())
        return "| " + bytes(text).decode(errors="replace").replace("\n", "\n| ")

def adapted(base, name, seed):
    """A copy of base, to be trained as ROWS[name]."""
    model = copy.deepcopy(base).cpu()
    method, arguments, _ = ROWS[name]
    if method:
        torch.manual_seed(seed)
        minisora.adapt(model, method, LINEARS, **arguments)
        for index, (_, layer) in enumerate(minisora.adapters(model)):
            # Redraw A, or it would differ by method, as SORA draws C between two layers' A.
            generator = torch.Generator().manual_seed(1000 * seed + index)
            bound = layer.in_features**-0.5
            nn.init.uniform_(layer.A, -bound, bound, generator)
            if name == "sora_no_diag":
                layer.diag.requires_grad_(False)
    return model.to(DEVICE)

# ---- loop

def train(models, data, steps, seed):
    """Step all models in turn on the same batches, so that times compare. Returns {name: ms}."""
    # Not AdamW: its decay would pull diag and magnitude to 0, away from their start.
    optimizers = {name: torch.optim.Adam(model.parameters(), betas=(0.9, 0.95))
                  for name, model in models.items()}
    generator = torch.Generator().manual_seed(seed)
    tenth = max(1, steps // 10)
    bits, ms = {name: [] for name in models}, {name: [] for name in models}
    print("\n step", *models, f"  loss in bits per byte, seed {seed}")
    for step in range(steps):
        starts = torch.randint(len(data) - CONTEXT, (BATCH, 1), generator=generator)
        batch = data[starts + torch.arange(CONTEXT + 1)]
        share = min((step + 1) / tenth, (steps - step) / max(1, steps - tenth))  # up, then down
        for name, model in models.items():
            start = time.perf_counter()
            optimizers[name].param_groups[0]["lr"] = ROWS[name][2] * share
            loss = model.loss(batch)
            optimizers[name].zero_grad()
            loss.backward()
            optimizers[name].step()
            bits[name].append(loss.item())  # waits for the device
            ms[name].append((time.perf_counter() - start) * 1e3)
        if (step + 1) % tenth == 0:
            means = (f"{np.mean(bits[name][-tenth:]):{len(name)}.2f}" for name in models)
            left = (steps - step - 1) * sum(np.median(ms[name][-tenth:]) for name in models) / 1e3
            print(f"{step + 1:5}", *means, f"  {left:.0f} s left")
    return {name: np.median(ms[name]) for name in models}

@torch.no_grad()
def measure(name, model, base, code, prose):
    """What a trained model is worth, and the shape of its updates W' − W0. NaN if it diverged."""
    bpb, prose_bpb = model.score(code), model.score(prose)
    if not np.isfinite(bpb + prose_bpb):
        return dict.fromkeys(["bpb", "prose", "gap", "entropy", "spectrum", "defect"], np.nan)
    merged = model if name == "full" else minisora.merge_adapters(copy.deepcopy(model))
    wide = copy.deepcopy(model).cpu().double()  # rounding to float32 would add rank
    updates = [wide.get_submodule(path).weight - linear.weight.cpu().double()
               for path, linear in base.named_modules() if path.endswith(tuple(LINEARS))]
    rotations = [layer.rotation_matrix() for layer in wide.modules()
                 if isinstance(layer, minisora.SORALinear)]
    defects = [torch.linalg.norm(R.T @ R - torch.eye(len(R)), 2).item() for R in rotations]
    return {"bpb": bpb, "prose": prose_bpb, "gap": abs(merged.score(code) - bpb),
            "entropy": np.mean([minisora.singular_value_entropy(delta) for delta in updates]),
            "spectrum": sum(map(minisora.relative_singular_values, updates)) / len(updates),
            "defect": max(defects, default=0.0)}

def experiment(methods, seeds=1, quick=False):
    """Train and adapt the base. Returns {name: [a dict for each seed]}."""
    if set(methods) - set(ROWS):
        raise ValueError(f"{methods} are not all in {list(ROWS)}")
    # Fine-tuning is for what is new to a model. So the base learns prose, the Python language
    # reference, and adapts to code, the standard library. Every Python has both.
    prose, prose_test = split("\n".join(topics.values()).encode())
    library = sorted(pathlib.Path(copy.__file__).parent.glob("*.py"))
    code, code_test = split(b"\n".join(file.read_bytes() for file in library))
    base_steps, steps = (60, 12) if quick else (BASE_STEPS, STEPS)
    results = {name: [] for name in methods}
    torch.manual_seed(0)
    base = GPT().to(DEVICE)
    train({"full": base}, prose, base_steps, 0)
    if quick:
        print("After so few steps the scores mean nothing yet.")
    print(f"The base scores {base.score(prose_test):.4f} bits per byte on prose and "
          f"{base.score(code_test):.4f} on code. It writes:\n{base.write()}")
    for seed in range(seeds):
        models = {name: adapted(base, name, seed) for name in results}
        ms = train(models, code, steps, seed)
        for name, model in models.items():
            row = measure(name, model, base, code_test, prose_test)
            row["trainable"] = sum(p.numel() for p in model.parameters() if p.requires_grad)
            results[name].append({**row, "ms": ms[name]})
        print(f"\nAfter {seed + 1} of {seeds} seeds:")
        table(results)
    if np.isfinite(row["bpb"]):  # of the last method and seed
        print(f"\nAdapted by {name}, it writes:\n{model.write()}")
    return results

# ---- table

def mean(values, sign=""):
    """Mean over seeds ± its standard error."""
    error = f"±{values.std(ddof=1) / len(values)**0.5:.4f}" if len(values) > 1 else ""
    return f"{values.mean():{sign}.4f}{error}" if np.isfinite(values).all() else ""

def table(results):
    """bits/byte is on code; prose on prose, up by what was forgotten. − lora: seed by seed."""
    print("method           trained   ms     bits/byte         − lora prose entropy ‖RᵀR−I‖")
    lora = [row["bpb"] for row in results["lora"]] if "lora" in results else np.nan
    for name, rows in results.items():
        keys = "ms", "bpb", "prose", "entropy", "defect"
        ms, bpb, prose, entropy, defect = np.array([[row[key] for key in keys] for row in rows]).T
        rotation = f"{defect.max():8.0e}" if defect.max() > 0 else ""
        print(f"{name:16} {rows[0]['trainable']:7,} {ms.mean():4.1f} {mean(bpb) or 'diverged':>13} "
              f"{mean(bpb - lora, '+'):>14} {prose.mean():5.3f} {entropy.mean():7.2f}{rotation}")
    gap = np.nanmax([0] + [row["gap"] for rows in results.values() for row in rows])
    print(f"Merged and unmerged differ by at most {gap:.0e} bits per byte.")

def draw(file, results):
    from matplotlib.figure import Figure
    axes = Figure(layout="constrained").subplots()
    axes.set(xlabel="i − 1", ylabel="σᵢ / σ₁ of W' − W0", yscale="log", ylim=(1e-4, 1.2))
    for name, rows in results.items():  # dora_matrix lies on dora
        axes.plot(rows[-1]["spectrum"], "k--" if name == "dora_matrix" else "-", label=name)
    axes.legend()
    axes.figure.savefig(file, format="svg")

# ---- reach

def reach():
    """How near each method comes to a known W*: ‖W' − W*‖F / ‖W* − W0‖F, r = r_p = 4."""
    torch.manual_seed(0)
    W0, d = torch.randn(64, 64) / 8, 0.5 + torch.rand(64, 1)
    Q = torch.linalg.qr(torch.randn(64, 8)).Q
    P = Q[:, :4] @ Q[:, 4:].T
    R = torch.linalg.matrix_exp(P - P.T)  # turns 4 planes by 1 radian
    targets = {"low rank": W0 + torch.randn(64, 4) @ torch.randn(4, 64) / 16, "diagonal": d * W0,
               "rotation": R @ W0, "rotation of a diagonal": R @ (d * W0)}
    linear = nn.Linear(64, 64, bias=False)
    linear.weight.data = W0
    print(f"{'target':22}", *(f"{name:>11}" for name in [*minisora.METHODS, "best rank r"]))
    for target, W in targets.items():
        layers = nn.ModuleList(method(linear, 4, 8) for method in minisora.METHODS.values())
        optimizer = torch.optim.Adam(layers.parameters())
        for step in range(REACH_STEPS):
            optimizer.param_groups[0]["lr"] = 0.2 * (1 - step / REACH_STEPS)
            optimizer.zero_grad()
            sum((layer.adapted_weight() - W).square().sum() for layer in layers).backward()
            optimizer.step()
        S = torch.linalg.svdvals(W - W0)  # S[4:] is what the best rank 4 leaves (Eckart and Young)
        distances = [(layer.adapted_weight() - W).norm() for layer in layers] + [S[4:].norm()]
        print(f"{target:22}", *(f"{distance / S.norm():11.3f}" for distance in distances))

# ---- bench

def bench_layers(dim, device, dtype):
    """{name: layer} of an nn.Linear and of every method around it, with r = 16."""
    torch.manual_seed(0)
    linear = nn.Linear(dim, dim, device=device, dtype=dtype).requires_grad_(False)
    layers = {name: method(linear, 16, 32) for name, method in minisora.METHODS.items()}
    first_order = minisora.SORALinear(linear, 16, 32, rotation="first_order")
    return {"linear": linear, **layers, "sora first_order": first_order}

def saved_bytes(layer, x):
    """Bytes that autograd keeps for the backward: each storage once, without x and parameters."""
    kept = weakref.WeakSet()

    def pack(tensor):
        alias = tensor.detach()  # returning tensor itself could make a cycle
        kept.add(alias)
        return alias
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda alias: alias):
        y = layer(x)  # holds the graph; what the forward freed is no longer in kept
    sizes = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in kept}
    for t in (x, *layer.parameters()):
        sizes.pop(t.untyped_storage().data_ptr(), None)
    return sum(sizes.values())

def flops(layer, x):
    """Floating-point operations of the matrix products in one forward and backward."""
    with FlopCounterMode(display=False) as counter:
        layer(x).sum().backward()
    return counter.get_total_flops()

def bench():
    """Time layers in turn. saved: bytes kept for the backward, over those of x."""
    wait = getattr(torch, DEVICE).synchronize
    for tokens, dim in BENCH_SIZES:
        layers = bench_layers(dim, DEVICE, torch.float32)
        x = torch.randn(tokens, dim, device=DEVICE, requires_grad=True)
        G, ms = torch.randn_like(x), {name: [] for name in layers}
        for name, layer in list(layers.items()) * BENCH_ROUNDS:
            inputs = [t for t in (x, *layer.parameters()) if t.requires_grad]
            wait()
            start = time.perf_counter()
            torch.autograd.grad(layer(x), inputs, G)
            wait()
            ms[name].append((time.perf_counter() - start) * 1e3)
        print(f"\n{tokens:4} tokens, {dim:4} wide     ms  /base  /lora  saved  GFLOP")
        for name, layer in layers.items():
            ratios = [np.median(np.divide(ms[name], ms[base])) for base in ("linear", "lora")]
            sizes = saved_bytes(layer, x) / x.nbytes, flops(layer, x) / 1e9
            print(f"{name:22}", *(f"{v:6.2f}" for v in (np.median(ms[name]), *ratios, *sizes)))

def main(argv=None):
    if hasattr(sys.stdout, "reconfigure"):  # a console that lacks a letter shows a ?
        sys.stdout.reconfigure(errors="replace", line_buffering=True)
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", choices=ROWS, default=list(ROWS)[:7],
                        metavar="NAME", help=", ".join(ROWS))
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--plot", metavar="FILE.svg")
    for flag in ("--quick", "--reach", "--bench"):
        parser.add_argument(flag, action="store_true")
    args = parser.parse_args(argv)
    if args.seeds < 1:
        parser.error("--seeds must be at least 1")
    print(f"torch {torch.__version__}, Python {sys.version.split()[0]}, "
          f"{torch.get_num_threads()} CPU threads")
    if args.reach or args.bench:
        return reach() if args.reach else bench()
    if args.plot:  # fail now, not after the work; "ab" keeps an older picture
        import matplotlib
        open(args.plot, "ab").close()
    results = experiment(args.methods, args.seeds, args.quick)
    if args.plot:
        draw(args.plot, results)
    return results

if __name__ == "__main__":
    main()
