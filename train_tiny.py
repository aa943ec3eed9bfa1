"""Adapt a tiny language model from prose to Python code with every method of minisora, side by side.

    python train_tiny.py                  a table in under 3 minutes on 2 CPU cores, nothing to download
    python train_tiny.py --quick          the same with few steps
    python train_tiny.py --seeds 3 --lr 1e-3 3e-3 1e-2       each method at its best rate, mean ± deviation
    python train_tiny.py --bench          what one layer costs: time, FLOPs, memory kept for the backward

A byte-level GPT learns the Python language reference (pydoc_data.topics), then each method adapts a copy of
it to the source of the standard library. The methods step in turn on the same batches, so that their times
compare. 80 % of a corpus is for training, 10 % for validation, which chooses the learning rate, and the last
10 % for test, on which all bits per byte in the table are measured.
"""
import argparse
import copy
import importlib.util
import json
import math
import os
import pathlib
import pickle
import platform
import pydoc_data.topics
import statistics
import sys
import time
from statistics import mean

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import minisora

METHODS = {  # name: (method of minisora, its arguments, learning rate found by --lr 1e-3 3e-3 1e-2 3e-2)
    "full": (None, {}, 3e-3),
    "lora": ("lora", {}, 1e-2),
    "dora": ("dora", {}, 1e-2),
    "dora_matrix": ("dora_matrix", {}, 1e-2),
    "pre_diag": ("pre_diag", {}, 1e-2),
    "sora": ("sora", {"r_p": 4}, 1e-2),
    "sora_cayley": ("sora", {"r_p": 4, "rotation": "cayley"}, 1e-2),
    "sora_first_order": ("sora", {"r_p": 4, "rotation": "first_order"}, 1e-2),
}
TARGETS = {"attention": ["qkv", "proj"], "mlp": ["fc", "out"]}


# ------------------------------------------------------------------------------------------------ model and text

class Block(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.heads = max(1, dim // 32)
        self.ln1, self.ln2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.fc, self.out = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)

    def forward(self, x):  # (batch, time, dim)
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in self.qkv(self.ln1(x)).chunk(3, dim=-1))
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)  # (batch, heads, time, dim / heads)
        x = x + self.proj(attended.transpose(1, 2).flatten(2))
        return x + self.out(F.gelu(self.fc(self.ln2(x))))


class GPT(nn.Module):
    """A byte-level GPT whose embedding is its head."""

    def __init__(self, dim, layers, context):
        super().__init__()
        self.byte, self.position = nn.Embedding(256, dim), nn.Embedding(context, dim)
        self.blocks, self.ln = nn.Sequential(*(Block(dim) for _ in range(layers))), nn.LayerNorm(dim)
        for embedding in (self.byte, self.position):
            nn.init.normal_(embedding.weight, std=0.02)

    def forward(self, tokens):  # (batch, time) bytes -> (batch, time, 256) logits
        x = self.byte(tokens) + self.position.weight[:tokens.shape[1]]
        return F.linear(self.ln(self.blocks(x)), self.byte.weight)

    def loss(self, windows):
        """Mean cross-entropy, in nats a byte, of windows (batch, context + 1)."""
        windows = windows.to(self.byte.weight.device)
        with torch.autocast(windows.device.type, dtype=torch.bfloat16, enabled=windows.is_cuda):
            logits = self(windows[:, :-1])
        return F.cross_entropy(logits.float().flatten(0, 1), windows[:, 1:].flatten())

    @torch.no_grad()
    def bits_per_byte(self, windows):
        return sum(self.loss(chunk).item() * len(chunk) for chunk in windows.split(32)) / len(windows) / math.log(2)

    @torch.no_grad()
    def sample(self, prompt, length=160):
        generator, tokens = torch.Generator().manual_seed(0), torch.tensor([list(prompt)])
        for _ in range(length):
            logits = self(tokens[:, -len(self.position.weight):].to(self.byte.weight.device))[0, -1].float().cpu()
            tokens = torch.cat([tokens, torch.multinomial(F.softmax(logits / 0.7, 0), 1, generator=generator)[None]], 1)
        return bytes(tokens[0].tolist()).decode(errors="replace")


def base_text():
    return "\n".join(text for _, text in sorted(pydoc_data.topics.topics.items())).encode()


def target_text():
    return b"\n".join(file.read_bytes() for file in sorted(pathlib.Path(os.__file__).parent.glob("*.py")))


def corpus(text, context):
    """The first 80 % of text (bytes) to train on, and up to 256 windows of each of the next and the last 10 %."""
    data = torch.frombuffer(bytearray(text), dtype=torch.uint8).long()
    parts = dict(zip(("train", "validation", "test"), data.tensor_split([len(data) * 8 // 10, len(data) * 9 // 10])))
    for part in ("validation", "test"):
        windows = parts[part].unfold(0, context + 1, context)
        parts[part] = windows[torch.linspace(0, len(windows) - 1, min(256, len(windows))).long()]
    return parts


# ------------------------------------------------------------------------------------------------ the experiment

def progress(total):
    """A function to call after each of total steps: one line on stderr with the time left, redrawn on a terminal."""
    tty, start, done, shown = sys.stderr.isatty(), time.time(), 0, 0.0

    def step(text):
        nonlocal done, shown
        done, now = done + 1, time.time()
        if done == total or now - shown > (0.2 if tty else 10):
            shown, text = now, f"{text} | {(now - start) * (total / done - 1):.0f} s left"
            print(f"\r\033[K{text[:150]}" if tty else text, end="" if tty and done < total else "\n", file=sys.stderr, flush=True)
    return step


def train(models, rates, data, steps, seed, args, step_done, label):
    """Step all models in turn on the same batches. Returns each one's losses and its median ms per step."""
    generator = torch.Generator().manual_seed(seed)
    optimizers = {name: torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rates[name],
                                          betas=(0.9, 0.95), weight_decay=0.0) for name, model in models.items()}
    warm = max(1, steps // 10)  # up to the learning rate, then linearly down
    schedules = [torch.optim.lr_scheduler.LambdaLR(o, lambda t: min((t + 1) / warm, (steps - t) / max(1, steps - warm)))
                 for o in optimizers.values()]
    losses, times = {name: [] for name in models}, {name: [] for name in models}
    for step in range(steps):
        starts = torch.randint(len(data) - args.context, (args.batch, 1), generator=generator)
        batch = data[starts + torch.arange(args.context + 1)]
        for name, model in models.items():
            start = time.perf_counter()
            loss = model.loss(batch)
            optimizers[name].zero_grad()
            loss.backward()
            optimizers[name].step()
            losses[name].append(loss.item())  # waits for the device, so that the clock is right
            times[name].append((time.perf_counter() - start) * 1e3)
        for schedule in schedules:
            schedule.step()
        step_done(f"{label}, step {step + 1}/{steps}, loss " + " ".join(f"{n} {l[-1]:.2f}" for n, l in losses.items()))
    return losses, {name: statistics.median(t) for name, t in times.items()}


def adapted(base, name, seed, args):
    """A copy of base to be trained by METHODS[name]."""
    model, (method, kwargs, _), r = copy.deepcopy(base), METHODS[name], args.r
    if method is None:
        return model
    if args.match_params and method == "sora":  # r costs r (m + n) parameters; the diagonal, C and D cost m (1 + 2 r_p)
        linears = [module for module in base.modules() if isinstance(module, nn.Linear)]
        extra = sum(linear.out_features for linear in linears) * (1 + 2 * kwargs["r_p"])
        r = max(1, round(r - extra / sum(linear.out_features + linear.in_features for linear in linears)))
    torch.manual_seed(seed)
    return minisora.adapt(model, method, sum(TARGETS.values(), []), r=r, lora_alpha=2 * r, **kwargs)


def updates(model, base):
    """{name: W' − W0} of the adapted layers, in float64 so that rounding adds no rank."""
    wide = copy.deepcopy(model).double()
    return {name: (wide.get_submodule(name).weight - linear.weight.double()).detach().cpu()
            for name, linear in base.named_modules() if name.rpartition(".")[2] in sum(TARGETS.values(), [])}


@torch.no_grad()
def measure(model, base, target):
    """What a trained model is worth, and the shape of its updates and rotations."""
    found = {"trainable": sum(p.numel() for p in model.parameters() if p.requires_grad),
             "validation_bpb": model.bits_per_byte(target["validation"]), "bpb": model.bits_per_byte(target["test"]),
             "merged_bpb": minisora.merge_adapters(copy.deepcopy(model)).bits_per_byte(target["test"])}
    deltas = updates(model, base).items()
    for key, diagnostic in (("entropy", minisora.singular_value_entropy), ("stable_rank", minisora.stable_rank)):
        for kind, targets in TARGETS.items():
            found[f"{key}_{kind}"] = mean(diagnostic(d).item() for name, d in deltas if name.rpartition(".")[2] in targets)
        found[key] = mean(found[f"{key}_{kind}"] for kind in TARGETS)
    layers = [layer for layer in model.modules() if isinstance(layer, minisora.SORALinear)]
    Rs = [layer.rotation_matrix().double().cpu() for layer in layers]
    found["orthogonality"] = max(((R.T @ R - torch.eye(len(R))).abs().max().item() for R in Rs), default=None)
    # At first order R = I + P = I + UVᵀ, and P has the eigenvalues ±iθ of the small VᵀU.
    thin = [minisora.rotation_factors(layer.C.cpu(), layer.D.cpu(), "first_order") for layer in layers]
    found["theta"] = [torch.linalg.eigvals(V.T @ U).imag.max().item() for U, V in thin]
    return found


def experiment(base, target, args):
    """Each method over the seeds: the records, and the first seed's models. That seed chooses --lr, on validation."""
    grid, best, records, models = len(args.lr or [None]), {}, [], {}
    step_done = progress(args.steps * (grid + args.seeds - 1))
    for i in range(grid + args.seeds - 1):
        seed = args.seed + max(0, i - grid + 1)
        rates = {name: best[name]["lr"] if i >= grid else args.lr[i] if args.lr else METHODS[name][2] for name in args.methods}
        trained = {name: adapted(base, name, seed, args) for name in args.methods}
        losses, ms = train(trained, rates, target["train"], args.steps, seed, args, step_done, f"seed {seed}")
        for name, model in trained.items():
            record = {"method": name, "seed": seed, "lr": rates[name], **measure(model, base, target),
                      "ms_per_step": ms[name], "losses": losses[name]}
            if i >= grid:
                records.append(record)
            elif name not in best or record["validation_bpb"] < best[name]["validation_bpb"]:
                best[name], models[name] = record, model
            if args.lr and i < grid:
                print(f"lr {rates[name]:<6g} {name:<12} {record['validation_bpb']:.4f} validation bits per byte")
    return [*best.values(), *records], models


# ------------------------------------------------------------------------------------------------ the report

def spread(values, form=".4f", root=1.0):
    """mean ± standard deviation / root."""
    deviation = f" ± {statistics.stdev(values) / root:{form.strip('+')}}" if len(values) > 1 else ""
    return f"{mean(values):{form}}{deviation}"


def print_table(rows):
    """Rows as dicts of text, all with the same keys."""
    widths = {key: max(len(key), *(len(row[key]) for row in rows)) for key in rows[0]}
    for row in [{key: key for key in widths}, {key: "-" * width for key, width in widths.items()}, *rows]:
        print("| " + " | ".join(f"{row[key]:{'<>'[i > 0]}{width}}" for i, (key, width) in enumerate(widths.items())) + " |")


def curve(losses):
    """At most 60 means of consecutive losses."""
    n = min(60, len(losses))
    return [mean(losses[i * len(losses) // n:(i + 1) * len(losses) // n]) for i in range(n)]


def report(records, before, parameters, args):
    """The table, a curve for each method, and the paper's four claims with the answer found here."""
    def of(name, key):
        return [r[key] for r in records if r["method"] == name]

    def minus(name, other):
        """The paired difference over seeds, with its standard error."""
        return spread([a - b for a, b in zip(of(name, "bpb"), of(other, "bpb"))], "+.4f", args.seeds**0.5)

    have = set(args.methods)
    print_table([{
        "method": name, "lr": f"{of(name, 'lr')[0]:g}",
        "trainable": f"{of(name, 'trainable')[0]:,} ({100 * of(name, 'trainable')[0] / parameters:.1f}%)",
        "before": f"{before:.4f}", "bits/byte": spread(of(name, "bpb")), "− lora": minus(name, "lora") if "lora" in have else "",
        "merged": spread(of(name, "merged_bpb")), "ms/step": spread(of(name, "ms_per_step"), ".1f"),
        "entropy": spread(of(name, "entropy"), ".2f"), "stable rank": spread(of(name, "stable_rank"), ".2f"),
        "‖RᵀR − I‖max": f"{max(of(name, 'orthogonality')):.1e}" if of(name, "theta")[0] else ""} for name in args.methods])
    curves = {name: curve(of(name, "losses")[0]) for name in args.methods}
    low, high = min(map(min, curves.values())), max(map(max, curves.values()))
    print(f"\ntraining loss of the first seed, █ {high:.2f} to ▁ {low:.2f} nats a byte")
    for name, values in curves.items():
        print(f"{name:>16} " + "".join("▁▂▃▄▅▆▇█"[round((v - low) / (high - low or 1) * 7)] for v in values))
    print(f"\nthe paper's claims in this miniature, {args.seeds} seed(s); test bits per byte ± standard error, less is better")
    for kind in TARGETS if {"lora", "dora"} <= have else ():
        entropy = {name: mean(of(name, f"entropy_{kind}")) for name in ("lora", "dora", "full") if name in have}
        print(f"1. entropy of W' − W0, {kind}: " + ", ".join(f"{n} {e:.2f}" for n, e in entropy.items()) +
              f": DoRA {'above' if entropy['dora'] > entropy['lora'] else 'not above'} LoRA")
    for other in (name for name in ("dora_matrix", "pre_diag") if {name, "dora"} <= have):
        gap = max(abs(a - b) for x, y in zip(of("dora", "losses"), of(other, "losses")) for a, b in zip(x, y))
        print({"dora_matrix": f"2. DoRA in matrix form: training losses within {gap:.1e} of the original's",
               "pre_diag": f"3. Pre-Diag − DoRA: {minus('pre_diag', 'dora')}"}[other] +
              f"; {mean(of(other, 'ms_per_step')):.1f} ms a step, DoRA's original {mean(of('dora', 'ms_per_step')):.1f}")
    if "sora" in have:
        for other in (name for name in args.methods if not name.startswith("sora")):
            print(f"4. SORA − {other}: {minus('sora', other)}")
        theta = sum(of("sora", "theta"), [])
        print(f"4. SORA turned by {math.degrees(statistics.median(theta)):.0f}° (median of the layers) to {math.degrees(max(theta)):.0f}°, "
              f"|RᵀR − I| {max(of('sora', 'orthogonality')):.1e}; at first order ‖RᵀR − I‖₂ = θ² would be {max(theta)**2:.2f}")


def plot(records, models, base, file):
    from matplotlib.figure import Figure
    figure = Figure((12, 4.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.set(xlabel="step", ylabel="training loss, nats a byte", title="loss of the first seed")
    right.set(xlabel="i", ylabel="σᵢ / σ₁, mean over layers", yscale="log", ylim=(1e-4, 1.1), title="singular values of W' − W0")
    for name, model in models.items():
        losses = next(r["losses"] for r in records if r["method"] == name)
        values, spectra = curve(losses), [torch.linalg.svdvals(delta) for delta in updates(model, base).values()]
        left.plot([(i + 0.5) * len(losses) / len(values) for i in range(len(values))], values, label=name)
        right.plot(range(1, 1 + len(spectra[0])), torch.stack([S / S[0] for S in spectra]).mean(0), label=name)
    left.legend()
    figure.savefig(file)


# ------------------------------------------------------------------------------------------------ the benchmark

def bench_layers(dim, device, dtype, r=16, r_p=4):
    """{label: layer} of one nn.Linear(dim, dim), and of every method around a copy of it, off its starting point."""
    torch.manual_seed(0)
    layers = {"linear": nn.Linear(dim, dim, device=device, dtype=dtype).requires_grad_(False)}
    rotations = [("sora", {"rotation": rotation, "r_p": r_p}) for rotation in ("exp", "cayley", "first_order")]
    for name, kwargs in [(name, {}) for name in minisora.METHODS if name != "sora"] + rotations:
        layer = minisora.METHODS[name](copy.deepcopy(layers["linear"]), r=r, lora_alpha=2 * r, **kwargs)
        for p in layer.parameters(recurse=False):
            p.data += 0.02 * torch.randn_like(p)
        layers[" ".join([name, kwargs.get("rotation", "")]).strip()] = layer
    return layers


def saved_bytes(layer, x):
    """Bytes that autograd keeps for the backward: each storage once, x and the parameters left out."""
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()  # held, so that no address comes twice
        return tensor
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        layer(x)
    for known in (x, *layer.parameters()):
        kept.pop(known.untyped_storage().data_ptr(), None)
    return sum(storage.nbytes() for storage in kept.values())


def flops(layer, x):
    """Floating-point operations of the matrix products in one forward and backward."""
    with FlopCounterMode(display=False) as counter:
        layer(x).sum().backward()
    return counter.get_total_flops()


def milliseconds(function, device):
    if device.type != "cuda":
        start = time.perf_counter()
        function()
        return (time.perf_counter() - start) * 1e3
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    function()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def bench(args):
    """Forward and backward of one linear layer, the layers in turn in each round; medians of times and of ratios."""
    results, dtype = [], torch.bfloat16 if args.device.type == "cuda" else torch.float32
    for tokens, dim in args.sizes:
        layers = bench_layers(dim, args.device, dtype)
        x = torch.randn(tokens, dim, device=args.device, dtype=dtype, requires_grad=True)
        G, ms, step_done = torch.randn_like(x), {name: [] for name in layers}, progress(args.rounds + 3)
        for i in range(args.rounds + 3):
            for name, layer in layers.items():
                layer.zero_grad()
                x.grad = None
                ms[name].append(milliseconds(lambda: layer(x).backward(G), args.device))
            step_done(f"{tokens} tokens, {dim} → {dim}, round {i + 1}")
        ms, rows = {name: times[3:] for name, times in ms.items()}, []  # the first rounds warm up
        for name, layer in layers.items():
            r = {"tokens": tokens, "dim": dim, "layer": name, "ms": statistics.median(ms[name]), "flops": flops(layer, x),
                 **{f"over_{other}": statistics.median(a / b for a, b in zip(ms[name], ms[other])) for other in ("linear", "lora")},
                 "saved_outputs": saved_bytes(layer, x) / (G.numel() * G.element_size())}
            rows.append({"layer": name, "ms": f"{r['ms']:.2f}", "/ linear": f"{r['over_linear']:.2f}", "/ lora": f"{r['over_lora']:.2f}",
                         "GFLOP": f"{r['flops'] / 1e9:.3f}", "saved / output": f"{r['saved_outputs']:.3f}"})
            if args.device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
                before = torch.cuda.memory_allocated()
                layer(x).backward(G)
                r["peak_mib"] = (torch.cuda.max_memory_allocated() - before) / 2**20
                rows[-1]["peak MiB"] = f"{r['peak_mib']:.0f}"
            results.append(r)
        print(f"\n{tokens} tokens, {dim} → {dim}, r = 16, r_p = 4, {dtype}, forward + backward, median of {args.rounds} rounds")
        print_table(rows)
    return results


# ------------------------------------------------------------------------------------------------ the command line

class Parser(argparse.ArgumentParser):
    def error(self, message):
        self.exit(2, f"{self.prog}: {message}\n")


def positive(kind):
    def parse(text):
        if not 0 < kind(text) < math.inf:
            raise ValueError
        return kind(text)
    parse.__name__ = f"positive {kind.__name__}"
    return parse


def size(text):
    tokens, dim = map(positive(int), text.split("x"))
    return tokens, dim


def arguments(argv):
    """The arguments, what --load holds, and both corpora; whatever can be wrong is said here, before any work."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--methods", nargs="+", choices=METHODS, metavar="METHOD", default=list(METHODS)[:6], help=", ".join(METHODS))
    add("--device", choices=["auto", "cpu", "cuda", "mps"], default="auto")
    add("--quick", action="store_true", help="few steps: 60 for the base, 12 to adapt")
    add("--seed", type=int, default=0, help="of the base, and the first of the adapters")
    add("--seeds", type=positive(int), default=1, help="number of adapter seeds (start and batches)")
    add("--steps", type=positive(int), help="steps to adapt (300)")
    add("--base-steps", type=positive(int), help="steps to train the base (1400)")
    add("--lr", nargs="+", type=positive(float), help="learning rates for each method to choose from, on validation")
    add("--match-params", action="store_true", help="lower SORA's r to LoRA's number of parameters")
    for name, default in (("r", 8), ("dim", 128), ("layers", 2), ("context", 128), ("batch", 8)):
        add(f"--{name}", type=positive(int), default=default, help=f"({default})")
    add("--base-text", metavar="FILE", help="train the base on it")
    add("--target-text", metavar="FILE", help="adapt to it")
    add("--json", metavar="FILE", help="write the record")
    add("--plot", metavar="FILE", help="draw loss curves and singular values, if matplotlib is installed")
    add("--save", metavar="FILE", help="write the base and the first seed's adapters")
    add("--load", metavar="FILE", help="score what --save wrote, without training")
    add("--bench", action="store_true", help="benchmark single layers instead")
    add("--sizes", nargs="+", type=size, metavar="TOKENSxDIM", help="for --bench (2048x1024 512x2048; on CUDA 8192x4096)")
    add("--rounds", type=positive(int), default=25, help="for --bench (25)")
    args, saved, corpora = parser.parse_args(argv), None, []
    if args.load:
        try:
            saved = torch.load(args.load, weights_only=True)
            vars(args).update(saved["config"])
        except (OSError, RuntimeError, KeyError, TypeError, EOFError, pickle.UnpicklingError) as error:
            parser.error(f"--load {args.load}: not a file that --save wrote ({type(error).__name__})")
    if args.device == "auto":
        args.device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    elif args.device != "cpu" and not getattr(torch, args.device).is_available():
        parser.error(f"--device {args.device}: this machine has none; --device auto takes what is there")
    args.device, args.methods = torch.device(args.device), list(dict.fromkeys(args.methods))
    args.steps, args.base_steps = args.steps or (12 if args.quick else 300), args.base_steps or (60 if args.quick else 1400)
    args.sizes = args.sizes or ([(8192, 4096)] if args.device.type == "cuda" else [(2048, 1024), (512, 2048)])
    if args.dim > 32 and args.dim % 32:
        parser.error(f"--dim {args.dim}: above 32 it must be a multiple of 32, the width of a head")
    for flag in ("json", "plot", "save"):
        file = getattr(args, flag)
        if file and (os.path.isdir(file) or not os.access(os.path.dirname(os.path.abspath(file)), os.W_OK)):
            parser.error(f"--{flag} {file}: cannot be written there")
    if args.plot and not importlib.util.find_spec("matplotlib"):
        parser.error("--plot needs matplotlib: pip install matplotlib")
    for flag, file, default in (("--base-text", args.base_text, base_text), ("--target-text", args.target_text, target_text)):
        try:
            text = pathlib.Path(file).read_bytes() if file else default()
        except OSError as error:
            parser.error(f"{flag} {file}: {error.strerror}")
        if len(text) < 10 * (args.context + 2):
            parser.error(f"{flag} {file or 'default'}: {len(text)} bytes are too few; --context {args.context} takes {10 * (args.context + 2)}")
        corpora.append(corpus(text, args.context))
    return args, saved, *corpora


def main(argv=None):
    args, saved, source, target = arguments(argv)
    config = {key: value for key, value in vars(args).items() if key not in ("device", "json", "plot", "save", "load")}
    device = torch.cuda.get_device_name() if args.device.type == "cuda" else str(args.device)
    record = {"device": device, "torch": str(torch.__version__), "python": platform.python_version(), "config": config}
    print(f"torch {record['torch']}, Python {record['python']}, {device}, {torch.get_num_threads()} CPU threads")
    if args.bench:
        record["results"] = bench(args)
    else:
        torch.manual_seed(args.seed)
        base = GPT(args.dim, args.layers, args.context).to(args.device)
        if saved:
            base.load_state_dict(saved["base"])
        else:
            train({"base": base}, {"base": 3e-3}, source["train"], args.base_steps, args.seed, args, progress(args.base_steps), "base")
        parameters = sum(p.numel() for p in base.parameters())
        record["base"] = {"base_bpb": base.bits_per_byte(source["test"]), "target_bpb": base.bits_per_byte(target["test"])}
        print(f"base: {parameters:,} parameters, {record['base']['base_bpb']:.4f} bits per byte on its own text, "
              f"{record['base']['target_bpb']:.4f} on the target\n")
        if saved:
            models = {name: adapted(base, name, args.seed, args) for name in saved["adapters"]}
            for name, model in models.items():
                load = nn.Module.load_state_dict if name == "full" else minisora.load_adapter_state_dict
                load(model, saved["adapters"][name])
            record["results"] = [{"method": name, "seed": args.seed, **measure(model, base, target)} for name, model in models.items()]
            print_table([{"method": r["method"], "bits/byte": str(r["bpb"]), "merged": str(r["merged_bpb"])} for r in record["results"]])
        else:
            record["results"], models = experiment(base, target, args)
            report(record["results"], record["base"]["target_bpb"], parameters, args)
        for name, model in [("base", base), *models.items()][::len(models)]:  # the base and the last
            print(f"\n--- {name} goes on from 'def ' ---\n{model.sample(b'def ')}")
        if args.plot and not saved:
            plot(record["results"], models, base, args.plot)
        if args.save:
            adapters = {name: model.state_dict() if name == "full" else minisora.adapter_state_dict(model) for name, model in models.items()}
            torch.save({"config": config, "base": base.state_dict(), "adapters": adapters}, args.save)
    if args.json:
        pathlib.Path(args.json).write_text(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
