"""Adapt a tiny language model from prose to Python code, with every method of minisora.

    python train_tiny.py    a table in 2 to 4 minutes on 2 CPU cores, nothing to download
        --quick             the same with few steps, in 20 seconds
        --seeds 5           mean ± deviation over five adaptations
        --reach             instead: which weights each method can reach at all
        --bench             instead: what one layer costs in time, memory and operations

A byte-level GPT learns the Python language reference. Each method then adapts a copy of it to the
source of the standard library. All step in turn on the same batches, so that their times compare.
"""
import argparse
import copy
import inspect
import pathlib
import sys
import time
from pydoc_data.topics import topics

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import minisora

# Each rate was the best of 1e-3, 3e-3, 1e-2 and 3e-2 on target text outside training and test. The
# last three rows took over lora's and sora's. Unless said, r = 8, lora_alpha = 16, r_p = 4.
METHODS = {  # name: (method of minisora, its arguments, learning rate)
    "full": (None, {}, 3e-3),
    "lora": ("lora", {}, 1e-2),
    "dora": ("dora", {}, 1e-2),
    "dora_matrix": ("dora_matrix", {}, 1e-2),
    "pre_diag": ("pre_diag", {}, 1e-2),
    "sora": ("sora", {}, 1e-2),  # the default run ends here
    "sora_cayley": ("sora", {"rotation": "cayley"}, 1e-2),
    "sora_first_order": ("sora", {"rotation": "first_order"}, 1e-2),
    "sora_no_diag": ("sora", {}, 1e-2),  # the rotation alone, diag is kept at 1
    "sora_r3": ("sora", {"r": 3, "lora_alpha": 6}, 1e-2),  # as many parameters as lora
    "lora_r13": ("lora", {"r": 13, "lora_alpha": 26}, 1e-2),  # as many parameters as sora
}
LINEARS = ["qkv", "proj", "fc", "out"]  # what is adapted in each block
DIM, HEAD, LAYERS, CONTEXT, BATCH = 128, 32, 2, 128, 8
BASE_STEPS, BASE_RATE, STEPS = 1400, 3e-3, 300
REACH_STEPS, REACH_RATE = 600, 0.2
BENCH_SIZES, BENCH_ROUNDS = [(2048, 1024), (512, 2048)], 25  # (tokens, dim)
DEVICES = [name for name in ("cuda", "mps") if getattr(torch, name).is_available()] + ["cpu"]


# ---- the experiment: data, model, training, results

def corpus(text):
    """The first 80 % of the bytes to train on, and up to 256 windows of the last 10 % as a test."""
    data = torch.frombuffer(bytearray(text), dtype=torch.uint8).long()
    windows = data[len(data) * 9 // 10:].unfold(0, CONTEXT + 1, CONTEXT)
    chosen = torch.linspace(0, len(windows) - 1, min(256, len(windows))).long()
    return data[:len(data) * 8 // 10], windows[chosen]


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.ln1, self.ln2 = nn.LayerNorm(DIM), nn.LayerNorm(DIM)
        self.qkv, self.proj = nn.Linear(DIM, 3 * DIM), nn.Linear(DIM, DIM)
        self.fc, self.out = nn.Linear(DIM, 4 * DIM), nn.Linear(4 * DIM, DIM)

    def forward(self, x):  # (batch, time, dim)
        qkv = self.qkv(self.ln1(x)).unflatten(-1, (3, -1, HEAD))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (batch, heads, time, HEAD)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.proj(attended.transpose(1, 2).flatten(2))
        return x + self.out(F.gelu(self.fc(self.ln2(x))))


class GPT(nn.Module):
    """A byte-level GPT whose embedding is its head."""

    def __init__(self):
        super().__init__()
        self.byte, self.position = nn.Embedding(256, DIM), nn.Embedding(CONTEXT, DIM)
        self.blocks = nn.Sequential(*(Block() for _ in range(LAYERS)))
        self.ln = nn.LayerNorm(DIM)
        for embedding in (self.byte, self.position):
            nn.init.normal_(embedding.weight, std=0.02)

    def forward(self, tokens):  # (batch, time) bytes -> (batch, time, 256) logits
        x = self.byte(tokens) + self.position.weight[:tokens.shape[1]]
        return F.linear(self.ln(self.blocks(x)), self.byte.weight)

    def loss(self, windows):
        """Mean cross-entropy, in nats per byte, of windows (batch, context + 1)."""
        windows = windows.to(self.byte.weight.device)
        return F.cross_entropy(self(windows[:, :-1]).flatten(0, 1), windows[:, 1:].flatten())

    @torch.no_grad()
    def bits_per_byte(self, windows):
        total = sum(self.loss(chunk).item() * len(chunk) for chunk in windows.split(32))
        return total / len(windows) / np.log(2)


def adapted(base, name, seed):
    """A copy of base to be trained by METHODS[name]."""
    model = copy.deepcopy(base)
    method, arguments, model.rate = METHODS[name]
    torch.manual_seed(seed)
    if method:
        minisora.adapt(model, method, LINEARS, **arguments)
    if name == "sora_no_diag":
        for _, layer in minisora.adapters(model):
            layer.diag.requires_grad_(False)
    return model


def train(models, data, steps, seed, steps_left):
    """Step all models in turn on the same batches. Returns {name: [ms of each step]}."""
    generator = torch.Generator().manual_seed(seed)
    optimizers = {name: torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.0)
                  for name, model in models.items()}
    times, warm = {name: [] for name in models}, max(1, steps // 10)
    for step in range(steps):
        starts = torch.randint(len(data) - CONTEXT, (BATCH, 1), generator=generator)
        batch = data[starts + torch.arange(CONTEXT + 1)]
        share = min((step + 1) / warm, (steps - step) / max(1, steps - warm))  # up, then down
        for name, model in models.items():
            start = time.perf_counter()
            optimizers[name].param_groups[0]["lr"] = model.rate * share
            loss = model.loss(batch)
            optimizers[name].zero_grad()
            loss.backward()
            optimizers[name].step()
            loss.item()  # waits for the device
            times[name].append((time.perf_counter() - start) * 1e3)
        if (step + 1) % warm == 0:  # steps_left: of one model each, until the whole run ends
            left = (steps_left - (step + 1) * len(models)) * np.median(list(times.values())) / 1e3
            print(f"{' '.join(models)}: seed {seed}, step {step + 1} of {steps}, "
                  f"about {left:.0f} s left in all", file=sys.stderr)
    return times


@torch.no_grad()
def measure(name, model, base, test):
    """What a trained model is worth, and the shape of its updates W' − W0. NaN if it diverged."""
    bpb = model.bits_per_byte(test)
    if not np.isfinite(bpb):
        return dict.fromkeys(["bpb", "gap", "entropy", "defect"], np.nan)
    merged = model if name == "full" else minisora.merge_adapters(copy.deepcopy(model))
    wide = copy.deepcopy(model).cpu().double()  # rounding to float32 would add rank
    updates = [wide.get_submodule(path).weight - linear.weight.cpu().double()
               for path, linear in base.named_modules() if path.endswith(tuple(LINEARS))]
    rotations = [layer.rotation_matrix().cpu().double() for layer in model.modules()
                 if isinstance(layer, minisora.SORALinear)]
    defects = [torch.linalg.matrix_norm(R.T @ R - torch.eye(len(R)), 2).item() for R in rotations]
    return {"bpb": bpb, "gap": abs(merged.bits_per_byte(test) - bpb),
            "entropy": np.mean([minisora.singular_value_entropy(delta) for delta in updates]),
            "spectrum": sum(map(minisora.relative_singular_values, updates)) / len(updates),
            "defect": max(defects, default=0.0)}


def spread(values, form, root=1.0):
    """mean ± standard deviation / root."""
    deviation = f" ± {np.std(values, ddof=1) / root:.4f}" if len(values) > 1 else ""
    return f"{np.mean(values):{form}}{deviation}"


def table(results):
    """A row for each method. "− lora" is the mean paired difference, ± its standard error."""
    print("method            rate trainable ms/step        bits/byte            − lora "
          "entropy ‖RᵀR − I‖₂")
    lora = [row["bpb"] for row in results.get("lora", [])]
    for name, rows in results.items():
        bpb = [row["bpb"] for row in rows]
        score = spread(bpb, ".4f") if np.isfinite(bpb).all() else "diverged"
        less = spread(np.subtract(bpb, lora), "+.4f", len(bpb)**0.5) if lora else ""
        ms, entropy = (np.mean([row[key] for row in rows]) for key in ("ms", "entropy"))
        defect = max(row["defect"] for row in rows)
        print(f"{name:16} {METHODS[name][2]:5.0e} {rows[0]['trainable']:9,} {ms:7.1f} {score:>16} "
              f"{less:>17} {entropy:7.2f} {f'{defect:10.1e}' if defect else ''}".rstrip())
    gap = np.nanmax([row["gap"] for rows in results.values() for row in rows])
    print(f"Merged and unmerged differ by at most {gap:.0e} bits per byte.")


def experiment(methods=tuple(METHODS)[:6], seeds=1, plot=None, quick=False, device=DEVICES[0]):
    """Train the base, then adapt it. Returns {method: [a row for each seed]}."""
    base_steps, steps = (60, 12) if quick else (BASE_STEPS, STEPS)
    library = sorted(pathlib.Path(copy.__file__).parent.glob("*.py"))
    prose, _ = corpus("\n".join(topics[name] for name in sorted(topics)).encode())
    code, test = corpus(b"\n".join(file.read_bytes() for file in library))
    seed_steps = len(methods) * (steps + 25)  # measuring a model takes as long as 25 steps
    torch.manual_seed(0)
    base = GPT().to(device)
    base.rate = BASE_RATE
    train({"base": base}, prose, base_steps, 0, base_steps + seeds * seed_steps)
    print(f"Before it is adapted, the base scores {base.bits_per_byte(test):.4f} bits per byte.")
    results = {name: [] for name in methods}
    for seed in range(seeds):
        models = {name: adapted(base, name, seed) for name in results}
        times = train(models, code, steps, seed, (seeds - seed) * seed_steps)
        for name, model in models.items():
            trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
            results[name].append({"trainable": trainable, "ms": np.median(times[name]),
                                  **measure(name, model, base, test)})
        print(f"\nAfter {seed + 1} of {seeds} seeds:")
        table(results)
        if plot:
            draw(plot, results)
    return results


def draw(file, results):
    """The paper's first finding: LoRA's update has rank r, a conditioned one has more."""
    from matplotlib.figure import Figure
    axes = Figure(layout="constrained").subplots()
    axes.set(title="Singular values of W' − W0 of the last seed, mean of all layers",
             xlabel="i", ylabel="σᵢ / σ₁", yscale="log", ylim=(1e-4, 1.2))
    for name, rows in results.items():
        if "spectrum" in rows[-1]:
            axes.plot(rows[-1]["spectrum"], label=name)
            axes.legend()
    axes.figure.savefig(file)


# ---- in place of the experiment

def reach(device=DEVICES[0]):
    """How near layers come to a known W*: ‖W' − W*‖F / ‖W* − W0‖F, with r = r_p = 4."""
    torch.manual_seed(0)
    W0, d = torch.randn(64, 64) / 8, 0.5 + torch.rand(64, 1)
    Q = torch.linalg.qr(torch.randn(64, 8)).Q
    R = torch.linalg.matrix_exp(Q[:, :4] @ Q[:, 4:].T - Q[:, 4:] @ Q[:, :4].T)  # 4 planes, 1 radian
    targets = {"low rank": W0 + torch.randn(64, 4) @ torch.randn(4, 64) / 16, "diagonal": d * W0,
               "rotation": R @ W0, "rotation of a diagonal": R @ (d * W0)}
    print(f"{'target':22}", *(f"{name:>11}" for name in [*minisora.METHODS, "best rank r"]))
    for name, target in targets.items():
        errors, S = [], torch.linalg.svdvals(target - W0)  # S.norm() is ‖W* − W0‖F
        for method in minisora.METHODS.values():
            torch.manual_seed(0)
            linear = nn.Linear(64, 64, bias=False)
            linear.weight.data = W0
            layer, W = method(linear, r=4, lora_alpha=8).to(device), target.to(device)
            optimizer = torch.optim.Adam(layer.parameters())
            for step in range(REACH_STEPS):
                optimizer.param_groups[0]["lr"] = REACH_RATE * (1 - step / REACH_STEPS)
                optimizer.zero_grad()
                (layer.adapted_weight() - W).square().sum().backward()
                optimizer.step()
            errors.append((layer.adapted_weight() - W).norm() / S.norm())
        errors.append(S[4:].norm() / S.norm())  # by Eckart and Young
        print(f"{name:22}", *(f"{error:11.3f}" for error in errors))


def bench_layers(dim, device, dtype):
    """{name: layer} of an nn.Linear and of every method around a copy, away from its start."""
    torch.manual_seed(0)
    layers = {"linear": nn.Linear(dim, dim, device=device, dtype=dtype).requires_grad_(False)}
    for name in [*minisora.METHODS, "sora first_order"]:
        method, *rotation = name.split()
        options = {"rotation": rotation[0]} if rotation else {}
        base = copy.deepcopy(layers["linear"])
        layers[name] = minisora.METHODS[method](base, r=16, lora_alpha=32, **options)
        for p in layers[name].parameters(recurse=False):
            p.data += 0.02 * torch.randn_like(p)
    return layers


def saved_bytes(layer, x):
    """Bytes that autograd keeps for the backward: each storage once, without x and parameters."""
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(kept.append, id):  # nothing is unpacked
        layer(x)
    sizes = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in kept}
    for t in (x, *layer.parameters()):
        sizes.pop(t.untyped_storage().data_ptr(), None)
    return sum(sizes.values())


def flops(layer, x):
    """Floating-point operations of the matrix products in one forward and backward."""
    with FlopCounterMode(display=False) as counter:
        layer(x).sum().backward()
    return counter.get_total_flops()


def bench(quick=False, device=DEVICES[0]):
    """Time single layers in turn. saved: bytes kept for the backward, over those of x."""
    rounds = BENCH_ROUNDS // 5 + 1 if quick else BENCH_ROUNDS
    wait, sizes, cells = getattr(torch, device).synchronize, " " * 16, {}
    for tokens, dim in BENCH_SIZES:
        layers = bench_layers(dim, device, torch.float32)
        x = torch.randn(tokens, dim, device=device, requires_grad=True)
        G, ms = torch.randn_like(x), {name: [] for name in layers}
        for name, layer in list(layers.items()) * rounds:
            inputs = [t for t in (x, *layer.parameters()) if t.requires_grad]
            wait()
            start = time.perf_counter()
            torch.autograd.grad(layer(x), inputs, G)
            wait()
            ms[name].append((time.perf_counter() - start) * 1e3)
        sizes += f"{tokens:12} tokens, {dim:4} → {dim:4}   "
        for name, layer in layers.items():
            ratios = [np.median(np.divide(ms[name], ms[other])) for other in ("linear", "lora")]
            saved, gflop = saved_bytes(layer, x) / x.nbytes, flops(layer, x) / 1e9
            cells[name] = cells.get(name, []) + [np.median(ms[name]), *ratios, saved, gflop]
    print(sizes.rstrip())
    print("layer           " + "     ms  /base  /lora  saved  GFLOP" * len(BENCH_SIZES))
    for name, row in cells.items():
        print(f"{name:16}" + "".join(f"{cell:7.2f}" for cell in row))


def main(argv=None):
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a console that lacks a letter shows a ?
            stream.reconfigure(errors="replace", line_buffering=True)
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], argument_default=argparse.SUPPRESS)
    add, instead = parser.add_argument, parser.add_mutually_exclusive_group()
    add("--methods", nargs="+", choices=METHODS, metavar="NAME", help=", ".join(METHODS))
    add("--seeds", type=int, help="how many adaptations")
    add("--plot", metavar="FILE", help="draw the singular values of the updates")
    add("--quick", action="store_true", help="few steps, with --bench few rounds")
    add("--device", choices=DEVICES, help="in every mode, by default the first")
    for mode in (reach, bench):
        instead.add_argument(f"--{mode.__name__}", dest="mode", action="store_const", const=mode,
                             help=mode.__doc__)
    flags = vars(parser.parse_args(argv))
    mode = flags.pop("mode", experiment)
    for flag in flags.keys() - inspect.signature(mode).parameters.keys():
        parser.error(f"--{mode.__name__} does not read --{flag}")
    if "plot" in flags:
        try:
            draw(flags["plot"], {})  # an empty picture now rather than an error after the work
        except (ImportError, OSError, ValueError) as error:
            parser.error(f"--plot {flags['plot']}: {error}")
    print(f"torch {torch.__version__}, Python {sys.version.split()[0]}, "
          f"{torch.get_num_threads()} CPU threads")
    return mode(**flags)


if __name__ == "__main__":
    main()
