"""Adapt a tiny language model from prose to Python code with every method of minisora, side by side.

    python train_tiny.py                  a table in under 3 minutes on 2 CPU cores, nothing to download
    python train_tiny.py --quick          the same with few steps
    python train_tiny.py --seeds 3 --lr 1e-3 3e-3 1e-2        each method at its best rate, mean ± deviation
    python train_tiny.py --bench          what one layer costs: time, FLOPs, memory kept for the backward

A byte-level GPT learns the Python language reference (pydoc_data.topics); then each method adapts a copy
of it to the source of the standard library. All methods step in turn on the same batches, so that their
times are comparable. A corpus is split into 80 % for training, 10 % for validation, on which a learning
rate is chosen, and 10 % for test, on which all bits per byte below are measured.
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

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import minisora

# Found by: python train_tiny.py --lr 1e-3 3e-3 1e-2 3e-2
METHODS = {  # name: (method of minisora, its arguments, learning rate); full fine-tuning has no adapter
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


# ------------------------------------------------------------------------------------------------ model

class Block(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.heads = max(1, dim // 32)
        self.ln1, self.ln2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.fc, self.out = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)

    def forward(self, x):  # (batch, time, dim)
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in self.qkv(self.ln1(x)).chunk(3, dim=-1))
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)  # (batch, heads, time, dim/heads)
        x = x + self.proj(attended.transpose(1, 2).flatten(2))
        return x + self.out(F.gelu(self.fc(self.ln2(x))))


class GPT(nn.Module):
    """A byte-level GPT; its embedding is its head."""

    def __init__(self, dim, layers, context):
        super().__init__()
        self.context = context
        self.byte, self.position = nn.Embedding(256, dim), nn.Embedding(context, dim)
        self.blocks = nn.ModuleList(Block(dim) for _ in range(layers))
        self.ln = nn.LayerNorm(dim)
        for embedding in (self.byte, self.position):
            nn.init.normal_(embedding.weight, std=0.02)

    def forward(self, tokens):  # (batch, time) bytes -> (batch, time, 256) logits
        x = self.byte(tokens) + self.position.weight[:tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        return F.linear(self.ln(x), self.byte.weight)


def loss_of(model, windows, device):
    """Mean cross-entropy, in nats a byte, of windows (batch, context + 1)."""
    windows = windows.to(device)
    with torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type == "cuda"):
        logits = model(windows[:, :-1])
    return F.cross_entropy(logits.float().flatten(0, 1), windows[:, 1:].flatten())


@torch.no_grad()
def bits_per_byte(model, windows, device):
    model.eval()
    losses = [loss_of(model, chunk, device) * len(chunk) for chunk in windows.split(32)]
    model.train()
    return (sum(losses) / len(windows) / math.log(2)).item()


# ------------------------------------------------------------------------------------------------ text

def corpus(text, context):
    """80 % of text (bytes) to train on, and up to 256 windows each from the next 10 % and from the last 10 %."""
    data = torch.frombuffer(bytearray(text), dtype=torch.uint8).long()
    train, validation, test = data.tensor_split([len(data) * 8 // 10, len(data) * 9 // 10])

    def windows(part):
        every = part.unfold(0, context + 1, context)
        return every[torch.linspace(0, len(every) - 1, min(256, len(every))).long()]
    return {"train": train, "validation": windows(validation), "test": windows(test)}


def base_text():
    return "\n".join(text for _, text in sorted(pydoc_data.topics.topics.items())).encode()


def target_text():
    return b"\n".join(file.read_bytes() for file in sorted(pathlib.Path(json.__file__).parent.parent.glob("*.py")))


# ------------------------------------------------------------------------------------------------ training

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
            loss = loss_of(model, batch, args.device)
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


@torch.no_grad()
def measure(model, base, target, args):
    """What a trained model is worth, and the shape of its updates W' − W0, in float64 so that rounding adds no rank."""
    found = {"trainable": sum(p.numel() for p in model.parameters() if p.requires_grad),
             "validation_bpb": bits_per_byte(model, target["validation"], args.device),
             "bpb": bits_per_byte(model, target["test"], args.device),
             "merged_bpb": bits_per_byte(minisora.merge_adapters(copy.deepcopy(model)), target["test"], args.device)}
    updates = {name: (wide - base.get_submodule(name).weight.double()).cpu() for name, wide in weights(model).items()}
    for key, diagnostic in (("entropy", minisora.singular_value_entropy), ("stable_rank", minisora.stable_rank)):
        values = {name: diagnostic(delta).item() for name, delta in updates.items()}
        found[key] = statistics.mean(values.values())
        for kind, targets in TARGETS.items():
            found[f"{key}_{kind}"] = statistics.mean(v for n, v in values.items() if n.rpartition(".")[2] in targets)
    rotations = [layer for layer in model.modules() if isinstance(layer, minisora.SORALinear)]
    Rs = [layer.rotation_matrix().double().cpu() for layer in rotations]
    found["orthogonality"] = max(((R.T @ R - torch.eye(len(R))).abs().max().item() for R in Rs), default=None)
    # I + P = I + UVᵀ, and P = UVᵀ has the eigenvalues ±iθ of the small VᵀU
    thin = [minisora.rotation_factors(layer.C.cpu(), layer.D.cpu(), "first_order") for layer in rotations]
    found["theta"] = [torch.linalg.eigvals(V.T @ U).imag.max().item() for U, V in thin]
    return found


def weights(model):
    """{name: weight in float64} of the layers that are adapted."""
    return {name: module.weight.detach() for name, module in copy.deepcopy(model).double().named_modules()
            if name.rpartition(".")[2] in sum(TARGETS.values(), [])}


def experiment(base, target, args):
    """Each method over the seeds: the records, and the first seed's models. It also chooses the --lr, on validation."""
    grid, best, records, models = len(args.lr or [None]), {}, [], {}
    step_done = progress(args.steps * (grid + args.seeds - 1))
    for i in range(grid + args.seeds - 1):
        seed = args.seed + max(0, i - grid + 1)
        rates = {name: best[name]["lr"] if i >= grid else args.lr[i] if args.lr else METHODS[name][2] for name in args.methods}
        trained = {name: adapted(base, name, seed, args) for name in args.methods}
        losses, ms = train(trained, rates, target["train"], args.steps, seed, args, step_done, f"seed {seed}")
        for name, model in trained.items():
            record = {"method": name, "seed": seed, "lr": rates[name], **measure(model, base, target, args),
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
    return f"{statistics.mean(values):{form}}{deviation}"


def print_table(header, rows):
    widths = [max(map(len, column)) for column in zip(header, *rows)]
    for row in [header, ["-" * width for width in widths], *rows]:
        print("| " + " | ".join([row[0].ljust(widths[0])] + [c.rjust(w) for c, w in zip(row[1:], widths[1:])]) + " |")


def report(records, before, parameters, args):
    """The table, a curve for each method, and the paper's four claims with the answer found here."""
    by = {name: [r for r in records if r["method"] == name] for name in args.methods}

    def all_of(name, key):
        return [r[key] for r in by[name]]

    def minus(name, other):
        """The paired difference over seeds, with its standard error."""
        d = [a - b for a, b in zip(all_of(name, "bpb"), all_of(other, "bpb"))]
        return spread(d, "+.4f", len(d) ** 0.5)

    print_table(["method", "lr", "trainable", "before", "bits/byte", "− lora", "merged", "ms/step", "entropy", "stable rank", "|RᵀR − I|"],
                [[name, f"{found[0]['lr']:g}", f"{found[0]['trainable']:,} ({100 * found[0]['trainable'] / parameters:.1f}%)",
                  f"{before:.4f}", spread(all_of(name, "bpb")), minus(name, "lora") if "lora" in by else "",
                  spread(all_of(name, "merged_bpb")), spread(all_of(name, "ms_per_step"), ".1f"),
                  spread(all_of(name, "entropy"), ".2f"), spread(all_of(name, "stable_rank"), ".2f"),
                  "" if found[0]["orthogonality"] is None else f"{max(all_of(name, 'orthogonality')):.1e}"]
                 for name, found in by.items()])

    curves = {name: [statistics.mean(part) for part in chunks(found[0]["losses"], 60)] for name, found in by.items()}
    low, high = min(map(min, curves.values())), max(map(max, curves.values()))
    print(f"\ntraining loss of the first seed, █ {high:.2f} to ▁ {low:.2f} nats a byte")
    for name, curve in curves.items():
        print(f"{name:>16} " + "".join("▁▂▃▄▅▆▇█"[round((v - low) / (high - low or 1) * 7)] for v in curve))

    print(f"\nthe paper's claims, in this miniature, over {args.seeds} seed(s): test bits per byte ± standard error, less is better")
    for kind in TARGETS if {"lora", "dora"} <= by.keys() else ():
        entropy = {name: statistics.mean(all_of(name, f"entropy_{kind}")) for name in ("lora", "dora", "full") if name in by}
        print(f"1. entropy of W' − W0, {kind}: " + ", ".join(f"{n} {e:.2f}" for n, e in entropy.items()) +
              f": DoRA {'above' if entropy['dora'] > entropy['lora'] else 'not above'} LoRA")
    for form in (name for name in ("dora_matrix", "pre_diag") if {name, "dora"} <= by.keys()):
        ratio = statistics.mean(all_of(form, "ms_per_step")) / statistics.mean(all_of("dora", "ms_per_step"))
        gap = max(abs(a - b) for o, m in zip(by["dora"], by[form]) for a, b in zip(o["losses"], m["losses"]))
        print({"dora_matrix": f"2. DoRA in matrix form: training losses within {gap:.1e} of the original's",
               "pre_diag": f"3. Pre-Diag − DoRA: {minus('pre_diag', 'dora')}"}[form] + f"; {ratio:.2f} × the ms per step of dora")
    for other in (name for name in by if "sora" in by and not name.startswith("sora")):
        print(f"4. SORA − {other}: {minus('sora', other)}")
    if "sora" in by:
        theta = sum(all_of("sora", "theta"), [])
        print(f"4. SORA turned by {math.degrees(statistics.median(theta)):.0f}° (median over layers) and {math.degrees(max(theta)):.0f}°"
              f" (most), |RᵀR − I| {max(all_of('sora', 'orthogonality')):.1e}; at first order ‖RᵀR − I‖₂ = θ² were {max(theta)**2:.2f}")


def chunks(values, n):
    n = min(n, len(values))
    return [values[i * len(values) // n:(i + 1) * len(values) // n] for i in range(n)]


@torch.no_grad()
def sample(model, prompt, args):
    tokens, generator = torch.tensor([list(prompt.encode())]), torch.Generator().manual_seed(args.seed)
    for _ in range(160):
        logits = model(tokens[:, -args.context:].to(args.device))[0, -1].float().cpu()
        tokens = torch.cat([tokens, torch.multinomial(F.softmax(logits / 0.7, dim=-1), 1, generator=generator)[None]], dim=1)
    return bytes(tokens[0].tolist()).decode(errors="replace")


def plot(records, models, base, file):
    from matplotlib.figure import Figure
    figure = Figure((12, 4.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.set(xlabel="step", ylabel="training loss, nats a byte", title="loss of the first seed")
    right.set(xlabel="i", ylabel="σᵢ / σ₁, mean over layers", yscale="log", ylim=(1e-4, 1.1), title="singular values of W' − W0")
    for name, model in models.items():
        losses = next(r["losses"] for r in records if r["method"] == name)
        curve = [statistics.mean(part) for part in chunks(losses, 60)]
        left.plot([(i + 0.5) * len(losses) / len(curve) for i in range(len(curve))], curve, label=name)
        spectra = [torch.linalg.svdvals(w - base.get_submodule(n).weight.double()).cpu() for n, w in weights(model).items()]
        right.plot(range(1, 1 + len(spectra[0])), torch.stack([S / S[0] for S in spectra]).mean(0), label=name)
    left.legend()
    figure.savefig(file)


# ------------------------------------------------------------------------------------------------ the benchmark

def bench_layers(dim, device, dtype, r=16, r_p=4):
    """{label: layer} of one nn.Linear(dim, dim), and of every method around a copy of it, off its starting point."""
    torch.manual_seed(0)
    layers = {"linear": nn.Linear(dim, dim, device=device, dtype=dtype).requires_grad_(False)}
    for name, kwargs in [*((m, {}) for m in list(minisora.METHODS)[:-1]),
                         *(("sora", {"rotation": rotation, "r_p": r_p}) for rotation in ("exp", "cayley", "first_order"))]:
        layer = minisora.METHODS[name](copy.deepcopy(layers["linear"]), r=r, lora_alpha=2 * r, **kwargs)
        for p in layer.parameters(recurse=False):
            p.data += 0.02 * torch.randn_like(p)
        layers[" ".join([name, kwargs.get("rotation", "")]).strip()] = layer
    return layers


def saved_bytes(layer, x):
    """Bytes that autograd keeps for the backward: each storage once, x and the parameters left out."""
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = layer(x)  # held until counted, so that no address is used twice
    for known in (x, y, *layer.parameters()):
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
    cuda, results = args.device.type == "cuda", []
    for tokens, dim in args.sizes:
        dtype = torch.bfloat16 if cuda else torch.float32
        layers = bench_layers(dim, args.device, dtype)
        x = torch.randn(tokens, dim, device=args.device, dtype=dtype, requires_grad=True)
        G, times, step_done, rows = torch.randn_like(x), {name: [] for name in layers}, progress(args.rounds + 3), []
        for i in range(args.rounds + 3):
            for name, layer in layers.items():
                layer.zero_grad()
                x.grad = None
                times[name].append(milliseconds(lambda: layer(x).backward(G), args.device))
            step_done(f"{tokens} tokens, {dim} → {dim}, round {i + 1}")
        for name, layer in layers.items():
            ms = {n: t[3:] for n, t in times.items()}  # the first rounds warm up
            r = {"tokens": tokens, "dim": dim, "layer": name, "ms": statistics.median(ms[name]), "flops": flops(layer, x),
                 **{f"over_{n}": statistics.median(a / b for a, b in zip(ms[name], ms[n])) for n in ("linear", "lora")},
                 "saved_outputs": saved_bytes(layer, x) / (G.numel() * G.element_size())}
            if cuda:
                torch.cuda.reset_peak_memory_stats()
                before = torch.cuda.memory_allocated()
                layer(x).backward(G)
                r["peak_mib"] = (torch.cuda.max_memory_allocated() - before) / 2**20
            results.append(r)
            rows.append([name, f"{r['ms']:.2f}", f"{r['over_linear']:.2f}", f"{r['over_lora']:.2f}", f"{r['flops'] / 1e9:.3f}",
                         f"{r['saved_outputs']:.3f}"] + ([f"{r['peak_mib']:.0f}"] if cuda else []))
        print(f"\n{tokens} tokens, {dim} → {dim}, r = 16, r_p = 4, {dtype}, forward + backward, median of {args.rounds} rounds")
        print_table(["layer", "ms", "/ linear", "/ lora", "GFLOP", "saved / output"] + ["peak MiB"] * cuda, rows)
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
    """The arguments, and both corpora; whatever can be wrong is said here, before any work."""
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
    args = parser.parse_args(argv)
    saved = None
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
    args.device = torch.device(args.device)
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
    corpora = []
    for flag, file, default in (("--base-text", args.base_text, base_text), ("--target-text", args.target_text, target_text)):
        try:
            text = pathlib.Path(file).read_bytes() if file else default()
        except OSError as error:
            parser.error(f"{flag} {file}: {error.strerror}")
        if len(text) < 10 * (args.context + 2):
            parser.error(f"{flag} {file}: {len(text)} bytes are too few; with --context {args.context} it takes {10 * (args.context + 2)}")
        corpora.append(corpus(text, args.context))
    return args, saved, *corpora


def main(argv=None):
    args, saved, source, target = arguments(argv)
    config = {key: value for key, value in vars(args).items() if key not in ("device", "json", "plot", "save", "load")}
    record = {"device": str(args.device), "torch": torch.__version__, "python": platform.python_version(), "config": config}
    if args.device.type == "cuda":
        record["device"] = torch.cuda.get_device_name()
    print(f"torch {record['torch']}, python {record['python']}, {record['device']}, {torch.get_num_threads()} CPU threads")
    if args.bench:
        record["results"] = bench(args)
    else:
        torch.manual_seed(args.seed)
        base = GPT(args.dim, args.layers, args.context).to(args.device)
        if saved:
            base.load_state_dict(saved["base"])
        else:
            train({"base": base}, {"base": 3e-3}, source["train"], args.base_steps, args.seed, args, progress(args.base_steps), "base")
        record["base"] = {"base_bpb": bits_per_byte(base, source["test"], args.device),
                          "target_bpb": bits_per_byte(base, target["test"], args.device)}
        parameters = sum(p.numel() for p in base.parameters())
        print(f"base: {parameters:,} parameters; {record['base']['base_bpb']:.4f} bits per byte on its own text, "
              f"{record['base']['target_bpb']:.4f} on the target\n")
        if saved:
            models = {name: adapted(base, name, args.seed, args) for name in saved["adapters"]}
            for name, model in models.items():
                load = model.load_state_dict if name == "full" else lambda state: minisora.load_adapter_state_dict(model, state)
                load(saved["adapters"][name])
            record["results"] = [{"method": name, "seed": args.seed, **measure(model, base, target, args)} for name, model in models.items()]
            print_table(["method", "bits/byte", "merged"],
                        [[r["method"], str(r["bpb"]), str(r["merged_bpb"])] for r in record["results"]])
        else:
            record["results"], models = experiment(base, target, args)
            report(record["results"], record["base"]["target_bpb"], parameters, args)
        prompt = "def "
        for name, model in {"base": base, **dict([*models.items()][-1:])}.items():
            print(f"\n--- a sample of {name} ---\n{sample(model, prompt, args)}")
        if args.plot:
            plot(record["results"], models, base, args.plot)
        if args.save:
            adapters = {name: model.state_dict() if name == "full" else minisora.adapter_state_dict(model) for name, model in models.items()}
            torch.save({"config": config, "base": base.state_dict(), "adapters": adapters}, args.save)
    if args.json:
        pathlib.Path(args.json).write_text(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
