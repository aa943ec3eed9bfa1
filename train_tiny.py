"""Adapt a tiny language model from prose to Python code, with every method of minisora.

    python train_tiny.py             a table in 2 to 4 minutes on 2 CPU cores, nothing to download
    python train_tiny.py --quick     the same with few steps
    python train_tiny.py --seeds 5   mean ± deviation over five adaptations
    python train_tiny.py --reach     which weights each method can reach at all
    python train_tiny.py --bench     what one layer costs: time, FLOPs, bytes kept for the backward

A byte-level GPT learns the Python language reference. Each method then adapts a copy of it to the
source of the standard library. All step in turn on the same batches, so that their times compare.
"""
import argparse
import copy
import functools
import json
import math
import os
import pathlib
import platform
import pydoc_data.topics
import sys
import time
from statistics import mean, median, stdev

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
BENCH_SIZES, BENCH_SIZES_CUDA, BENCH_ROUNDS = [(2048, 1024), (512, 2048)], [(8192, 4096)], 25


def corpus(text):
    """The first 80 % of the bytes to train on, and up to 256 windows of the last 10 % as a test."""
    data = torch.frombuffer(bytearray(text), dtype=torch.uint8).long()
    windows = data[len(data) * 9 // 10:].unfold(0, CONTEXT + 1, CONTEXT)
    chosen = torch.linspace(0, len(windows) - 1, min(256, len(windows))).long()
    return data[:len(data) * 8 // 10], windows[chosen]


# ---- model


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.ln1, self.ln2 = nn.LayerNorm(DIM), nn.LayerNorm(DIM)
        self.qkv, self.proj = nn.Linear(DIM, 3 * DIM), nn.Linear(DIM, DIM)
        self.fc, self.out = nn.Linear(DIM, 4 * DIM), nn.Linear(4 * DIM, DIM)

    def forward(self, x):  # (batch, time, dim)
        qkv = self.qkv(self.ln1(x)).unflatten(-1, (3, -1, HEAD))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (batch, heads, time, 32)
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
        """Mean cross-entropy, in nats a byte, of windows (batch, context + 1)."""
        windows = windows.to(self.byte.weight.device)
        with torch.autocast(windows.device.type, torch.bfloat16, enabled=windows.is_cuda):
            logits = self(windows[:, :-1])
        return F.cross_entropy(logits.float().flatten(0, 1), windows[:, 1:].flatten())

    @torch.no_grad()
    def bits_per_byte(self, windows):
        total = sum(self.loss(chunk).item() * len(chunk) for chunk in windows.split(32))
        return total / len(windows) / math.log(2)


def adapted(base, name, seed):
    """A copy of base to be trained by METHODS[name]."""
    model, (method, arguments, _) = copy.deepcopy(base), METHODS[name]
    torch.manual_seed(seed)
    if method:
        minisora.adapt(model, method, LINEARS, **arguments)
    if name == "sora_no_diag":
        for _, layer in minisora.adapters(model):
            layer.diag.requires_grad_(False)
    return model


# ---- training


def train(models, rates, data, steps, seed, label):
    """Step all models in turn on the same batches. Returns their losses and times (ms)."""
    generator, optimizers = torch.Generator().manual_seed(seed), {}
    for name, model in models.items():
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizers[name] = torch.optim.AdamW(trained, betas=(0.9, 0.95), weight_decay=0.0)
    losses, times = {name: [] for name in models}, {name: [] for name in models}
    warm, begin = max(1, steps // 10), time.time()
    for step in range(steps):
        starts = torch.randint(len(data) - CONTEXT, (BATCH, 1), generator=generator)
        batch = data[starts + torch.arange(CONTEXT + 1)]
        share = min((step + 1) / warm, (steps - step) / max(1, steps - warm))  # up, then down
        for name, model in models.items():
            if losses[name] and not math.isfinite(losses[name][-1]):
                continue  # diverged; the others go on
            start = time.perf_counter()
            optimizers[name].param_groups[0]["lr"] = rates[name] * share
            loss = model.loss(batch)
            optimizers[name].zero_grad()
            loss.backward()
            optimizers[name].step()
            losses[name].append(loss.item())  # waits for the device, so that the clock is right
            times[name].append((time.perf_counter() - start) * 1e3)
        if (step + 1) % 50 == 0:
            left = (time.time() - begin) * (steps / (step + 1) - 1)
            print(f"{label}, step {step + 1} of {steps}, {left:.0f} s left", file=sys.stderr)
    return losses, times


def updates(model, base):
    """W' − W0 of the adapted layers, in float64 so that rounding adds no rank."""
    wide, deltas = copy.deepcopy(model).cpu().double(), []
    for name, linear in base.named_modules():
        if name.endswith(tuple(LINEARS)):
            W = wide.get_submodule(name).weight
            deltas.append((W - linear.weight.cpu().double()).detach())
    return deltas


@torch.no_grad()
def measure(model, base, test):
    """What a trained model is worth, and the shape of its updates. All None if it diverged."""
    bpb = model.bits_per_byte(test)
    if not math.isfinite(bpb):
        return dict.fromkeys(["bpb", "merged_bpb", "entropy", "stable_rank", "orthogonality"])
    merged, deltas, defects = copy.deepcopy(model), updates(model, base), []
    if any(isinstance(layer, minisora.Adapter) for layer in model.modules()):
        merged = minisora.merge_adapters(merged)
    for layer in model.modules():
        if isinstance(layer, minisora.SORALinear):
            R = layer.rotation_matrix().cpu().double()
            defects.append(torch.linalg.matrix_norm(R.T @ R - torch.eye(len(R)), 2).item())
    return {"bpb": bpb, "merged_bpb": merged.bits_per_byte(test),
            "entropy": mean(minisora.singular_value_entropy(d).item() for d in deltas),
            "stable_rank": mean(minisora.stable_rank(d).item() for d in deltas),
            "orthogonality": max(defects, default=None)}


def experiment(args, record):
    """The base, then all methods for each seed. The record is filled, and written, on the way."""
    topics = "\n".join(text for _, text in sorted(pydoc_data.topics.topics.items()))
    library = sorted(pathlib.Path(os.__file__).parent.glob("*.py"))
    base_data, base_test = corpus(topics.encode())
    data, test = corpus(b"\n".join(file.read_bytes() for file in library))
    torch.manual_seed(0)
    base = GPT().to(args.device)
    train({"base": base}, {"base": BASE_RATE}, base_data, args.base_steps, 0, "base")
    record["base"] = {"base_bpb": base.bits_per_byte(base_test),
                      "target_bpb": base.bits_per_byte(test)}
    record["config"]["parameters"] = sum(p.numel() for p in base.parameters())
    for seed in range(args.seeds):
        models = {name: adapted(base, name, seed) for name in args.methods}
        rates = {name: args.lr or METHODS[name][2] for name in models}
        losses, times = train(models, rates, data, args.steps, seed, f"seed {seed}")
        for name, model in models.items():
            trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
            keep(record, args, {
                "method": name, "seed": seed, "lr": rates[name], "trainable": trained,
                "ms_per_step": median(times[name]), **measure(model, base, test)})
    if args.plot:
        plot(args.plot, base, models, losses)


def keep(record, args, result):
    """Add a result, and write the record: beside its file first, so that nobody finds a half."""
    record["results"].append(result)
    if args.json:
        pathlib.Path(f"{args.json}.part").write_text(json.dumps(record, indent=1, allow_nan=False))
        os.replace(f"{args.json}.part", args.json)
    print(f"result {len(record['results'])}", file=sys.stderr)


# ---- tables and picture


def print_table(rows):
    """Rows are dicts with the same keys, the header."""
    table = [list(rows[0])]
    for row in rows:
        table.append([f"{c:.3f}" if isinstance(c, float) else str(c) for c in row.values()])
    widths = [max(map(len, column)) for column in zip(*table)]
    table.insert(1, ["-" * width for width in widths])
    for first, *others in table:
        cells = [cell.rjust(width) for cell, width in zip(others, widths[1:])]
        print("  ".join([first.ljust(widths[0]), *cells]).rstrip())


def spread(values, form, root=1.0):
    """mean ± standard deviation / root."""
    deviation = f" ± {stdev(values) / root:.4f}" if len(values) > 1 else ""
    return f"{mean(values):{form}}{deviation}"


def report(record):
    """A row for each method. "− lora" is the paired difference, ± its standard error."""
    rows, results, gap = [], record["results"], 0.0
    lora = {r["seed"]: r["bpb"] for r in results if r["method"] == "lora" and r["bpb"]}
    for name in dict.fromkeys(r["method"] for r in results):
        found = [r for r in results if r["method"] == name]
        share = found[0]["trainable"] / record["config"]["parameters"]
        row = {"method": name, "trainable": f"{found[0]['trainable']:,} {share:6.1%}",
               "bits/byte": "diverged", "− lora": "",
               "ms/step": f"{mean(r['ms_per_step'] for r in found):.1f}",
               "entropy": "", "‖RᵀR − I‖₂": ""}
        if all(r["bpb"] for r in found):
            row["bits/byte"] = spread([r["bpb"] for r in found], ".4f")
            pairs = [r["bpb"] - lora[r["seed"]] for r in found if r["seed"] in lora]
            if pairs:
                row["− lora"] = spread(pairs, "+.4f", math.sqrt(len(pairs)))
            row["entropy"] = f"{mean(r['entropy'] for r in found):.2f}"
            if found[0]["orthogonality"] is not None:
                row["‖RᵀR − I‖₂"] = f"{max(r['orthogonality'] for r in found):.1e}"
            gap = max(gap, *(abs(r["bpb"] - r["merged_bpb"]) for r in found))
        rows.append(row)
    print_table(rows)
    print(f"\nMerged and unmerged differ by at most {gap:.0e} bits per byte. "
          f"Before, the base scores {record['base']['target_bpb']:.4f}.")


def plot(file, base, models, losses):
    """Losses, and the mean singular values of W' − W0: the paper's first finding as a picture."""
    from matplotlib.figure import Figure
    figure = Figure((12, 4.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.set(xlabel="step", ylabel="training loss, nats a byte")
    right.set(xlabel="i", ylabel="σᵢ / σ₁ of W' − W0", yscale="log", ylim=(1e-4, 1.2))
    for name, model in models.items():
        if math.isfinite(losses[name][-1]):
            left.plot(losses[name], label=name)
            S = torch.stack([torch.linalg.svdvals(delta) for delta in updates(model, base)])
            right.plot((S / S[:, :1]).mean(0))
    left.legend()
    figure.savefig(file)


# ---- what each method can reach


def fit(method, W0, target, args):
    """‖W' − W*‖F / ‖W* − W0‖F, with r = r_p = 4, after Adam at a rate that falls to 0."""
    torch.manual_seed(0)
    linear = nn.Linear(64, 64, bias=False)
    linear.weight.data.copy_(W0)
    layer = minisora.METHODS[method](linear, r=4, lora_alpha=8).to(args.device)
    W0, target = W0.to(args.device), target.to(args.device)
    optimizer = torch.optim.Adam([p for p in layer.parameters() if p.requires_grad])
    for step in range(args.steps):
        optimizer.param_groups[0]["lr"] = REACH_RATE * (1 - step / args.steps)
        optimizer.zero_grad()
        (layer.adapted_weight() - target).square().sum().backward()
        optimizer.step()
    return ((layer.adapted_weight() - target).norm() / (target - W0).norm()).item()


def reach(args, record):
    """Four known targets W*, how near each method comes, and the best update of rank r = 4."""
    torch.manual_seed(0)
    W0, d = torch.randn(64, 64) / 8, 0.5 + torch.rand(64, 1)
    Q = torch.linalg.qr(torch.randn(64, 8)).Q
    R = torch.linalg.matrix_exp(Q[:, :4] @ Q[:, 4:].T - Q[:, 4:] @ Q[:, :4].T)  # 4 planes, 1 radian
    targets = {"low rank": W0 + torch.randn(64, 4) @ torch.randn(4, 64) / 16, "diagonal": d * W0,
               "rotation": R @ W0, "rotation of a diagonal": R @ (d * W0)}
    for name, W in targets.items():
        row = {method: fit(method, W0, W, args) for method in minisora.METHODS}
        S = torch.linalg.svdvals(W - W0)
        row["best rank r"] = (S[4:].norm() / S.norm()).item()  # Eckart and Young
        keep(record, args, {"target": name, **row})


# ---- what one layer costs


class PEFTDoRA(minisora.DoRALinear):
    """DoRA as PEFT and its authors compute it: a split product, the norm from a dense matrix."""

    def forward(self, x):
        W0, sB = self.base.weight, self.scaling * self.B
        c = self.magnitude / (W0 + sB @ self.A).detach().norm(dim=1)
        update = x @ self.A.T.to(x.dtype) @ sB.T.to(x.dtype)
        return (c * F.linear(x, W0) + c * update).to(x.dtype) + self.base.bias


def bench_layers(dim, device, dtype):
    """{name: layer} of an nn.Linear and of every method around a copy, away from its start."""
    torch.manual_seed(0)
    layers = {"linear": nn.Linear(dim, dim, device=device, dtype=dtype).requires_grad_(False)}
    kinds = {**minisora.METHODS, "dora as in PEFT": PEFTDoRA}
    for rotation in ("cayley", "first_order"):
        kinds[f"sora {rotation}"] = functools.partial(minisora.SORALinear, rotation=rotation)
    for name, kind in kinds.items():
        layers[name] = kind(copy.deepcopy(layers["linear"]), r=16, lora_alpha=32)
        for p in layers[name].parameters(recurse=False):
            p.data += 0.02 * torch.randn_like(p)
    return layers


def saved_bytes(layer, x):
    """Bytes that autograd keeps for the backward: each storage once, without x and parameters."""
    kept = []

    def pack(t):
        kept.append(t)
        return t
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        layer(x)
    sizes = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in kept}
    known = {t.untyped_storage().data_ptr() for t in (x, *layer.parameters())}
    return sum(size for pointer, size in sizes.items() if pointer not in known)


def flops(layer, x):
    """Floating-point operations of the matrix products in one forward and backward."""
    with FlopCounterMode(display=False) as counter:
        layer(x).sum().backward()
    return counter.get_total_flops()


def bench(args, record):
    """The layers in turn in each round; medians of the times, and of each round's ratios."""
    cuda, wait = args.device == "cuda", getattr(torch, args.device).synchronize
    dtype = torch.bfloat16 if cuda else torch.float32
    for tokens, dim in BENCH_SIZES_CUDA if cuda else BENCH_SIZES:
        layers = bench_layers(dim, args.device, dtype)
        x = torch.randn(tokens, dim, device=args.device, dtype=dtype, requires_grad=True)
        G, ms = torch.randn_like(x), {name: [] for name in layers}
        for _ in range(BENCH_ROUNDS + 3):
            for name, layer in layers.items():
                inputs = [x, *(p for p in layer.parameters() if p.requires_grad)]
                wait()
                start = time.perf_counter()
                torch.autograd.grad(layer(x), inputs, G)
                wait()
                ms[name].append((time.perf_counter() - start) * 1e3)
        ms = {name: times[3:] for name, times in ms.items()}  # the first rounds warm up
        for name, layer in layers.items():
            row = {"ms": median(ms[name]), "GFLOP": flops(layer, x) / 1e9,
                   "/ linear": median(a / b for a, b in zip(ms[name], ms["linear"])),
                   "/ lora": median(a / b for a, b in zip(ms[name], ms["lora"])),
                   "saved": saved_bytes(layer, x) / (x.numel() * x.element_size())}
            if cuda:
                torch.cuda.reset_peak_memory_stats()
                before = torch.cuda.memory_allocated()
                layer(x).backward(G)
                row["peak MiB"] = (torch.cuda.max_memory_allocated() - before) / 2**20
            keep(record, args, {"layer": name, "tokens": tokens, "dim": dim, **row})


# ---- the command line


def arguments(argv):
    """What can be refused is refused here, before any work."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add, names = parser.add_argument, list(METHODS)
    add("--methods", nargs="+", choices=names, metavar="NAME", default=names[:6],
        help=", ".join(names))
    add("--device", choices=["auto", "cpu", "cuda", "mps"], default="auto")
    add("--quick", action="store_true", help="60 steps for the base and 12 to adapt")
    add("--seeds", type=int, default=1, help="number of adaptations")
    add("--steps", type=int, help="to adapt, or to fit with --reach")
    add("--lr", type=float, help="one learning rate for all methods")
    add("--json", metavar="FILE", help="write the record, as results arrive")
    add("--plot", metavar="FILE", help="draw losses and singular values of the last seed")
    instead = parser.add_mutually_exclusive_group().add_argument
    instead("--reach", action="store_true", help="fit single layers to known targets instead")
    instead("--bench", action="store_true", help="time single layers instead")
    args = parser.parse_args(argv)
    args.base_steps, steps = (60, 12) if args.quick else (BASE_STEPS, STEPS)
    if args.steps is None:
        args.steps = REACH_STEPS if args.reach else steps
    args.methods = list(dict.fromkeys(args.methods))
    if min(args.seeds, args.steps) < 1:
        parser.error("--seeds and --steps must be at least 1")
    if args.lr is not None and not 0 < args.lr < math.inf:
        parser.error(f"--lr must be above 0 and finite, got {args.lr}")
    has = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if args.device == "auto":
        args.device = next(name for name in has if has[name])
    if not has[args.device]:
        parser.error(f"--device {args.device}: this machine has none, auto takes what is there")
    if args.plot:
        import matplotlib  # if it is missing, this fails now and not after the work
    if args.json:
        open(args.json, "a").close()  # likewise
    return args


def main(argv=None):
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a console that lacks a letter shows a ?
    args, status = arguments(argv), 0
    device = torch.cuda.get_device_name() if args.device == "cuda" else args.device
    config = {**vars(args), "dim": DIM, "layers": LAYERS, "context": CONTEXT, "batch": BATCH}
    record = {"device": device, "torch": str(torch.__version__), "config": config, "base": None,
              "python": platform.python_version(), "results": []}
    print(f"torch {record['torch']}, Python {record['python']}, {device}, "
          f"{torch.get_num_threads()} CPU threads\n", flush=True)
    try:
        if args.bench:
            bench(args, record)
        elif args.reach:
            reach(args, record)
        else:
            experiment(args, record)
    except KeyboardInterrupt:
        status = 130
    finally:  # whatever happened, show what was finished
        if record["base"] and record["results"]:
            report(record)
        elif record["results"]:
            print_table(record["results"])
    if status:
        print(f"Interrupted: {len(record['results'])} results were finished.")
    return status


if __name__ == "__main__":
    sys.exit(main())
