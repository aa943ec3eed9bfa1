"""Adapt a tiny language model from prose to code, with every method of minisora.

    python train_tiny.py    a table, in 2 to 3 minutes on two free cores
        --quick             the same in a few steps, to see it run
        --methods ROW ...   only these ROWS
        --seeds 5           means over five adaptations, ± their standard errors
        --plot FILE         and a picture of the singular values of W' − W0
        --reach             instead: which weights each method can reach
        --bench             instead: what one adapted layer costs
"""
import argparse
import copy
import importlib.util
import math
import pathlib
import sys
import sysconfig
import time
from statistics import mean, median

import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.lr_scheduler import OneCycleLR
from torch.utils.benchmark import Timer
from torch.utils.flop_counter import FlopCounterMode

import minisora

# ---- settings

# Each row has its peak learning rate, the best of 1e-3, 3e-3, 1e-2 and 3e-2 over two seeds on
# the tenth of the code that is not used here, then its arguments of minisora.adapt. The defaults
# are r = 8, lora_alpha = 16 and, for the rotation, r_p = 4.
ROWS = {
    "full": (3e-3, {}),  # no adapters
    "lora": (1e-2, {"method": "lora"}),
    "lora_r13": (1e-2, {"method": "lora", "r": 13, "lora_alpha": 26}),  # the size of sora
    "dora": (1e-2, {"method": "dora"}),
    "dora_matrix": (1e-2, {"method": "dora_matrix"}),
    "pre_diag": (1e-2, {"method": "pre_diag"}),
    "sora": (1e-2, {"method": "sora"}),
    "sora_r3": (1e-2, {"method": "sora", "r": 3, "lora_alpha": 6}),  # the size of lora
    "sora_cayley": (1e-2, {"method": "sora", "rotation": "cayley"}),
    "sora_first_order": (1e-2, {"method": "sora", "rotation": "first_order"}),
    "sora_no_diag": (1e-2, {"method": "sora"}),  # diag stays 1
}
DEFAULT_ROWS = [name for name in ROWS if not name.startswith("sora_")]
TARGETS = ("qkv", "proj", "fc", "out")  # a block's linear layers
DIM, HEADS, LAYERS, CONTEXT, BATCH = 128, 4, 2, 128, 8
BASE_STEPS, STEPS = 1400, 300
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


# ---- data

def texts():
    """Prose (Python's help topics) and code (its standard library), as bytes."""
    folder = sysconfig.get_path("stdlib")
    library = sorted(pathlib.Path(folder).glob("*.py"))
    if not library or not importlib.util.find_spec("pydoc_data"):
        sys.exit(f"This Python lacks the texts to train on: pydoc_data or {folder}/*.py")
    from pydoc_data.topics import topics
    return "\n".join(topics.values()).encode(), b"\n".join(file.read_bytes() for file in library)


def split(text):
    """Windows of bytes: all of the first 80 % to train on, 256 of the last 10 % to test on."""
    data = torch.tensor(list(text), device=DEVICE)
    train = data[:len(data) * 8 // 10].unfold(0, CONTEXT + 1, 1)  # one at each byte
    test = data[len(data) * 9 // 10:].unfold(0, CONTEXT + 1, 1)
    return train, test[torch.linspace(0, len(test) - 1, 256).long()]


# ---- model

class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.ln1, self.ln2 = nn.LayerNorm(DIM), nn.LayerNorm(DIM)
        self.qkv, self.proj = nn.Linear(DIM, 3 * DIM), nn.Linear(DIM, DIM)
        self.fc, self.out = nn.Linear(DIM, 4 * DIM), nn.Linear(4 * DIM, DIM)

    def forward(self, x):  # (batch, time, DIM)
        heads = self.qkv(self.ln1(x)).unflatten(-1, (3, HEADS, DIM // HEADS))
        q, k, v = heads.permute(2, 0, 3, 1, 4)  # each (batch, HEADS, time, DIM / HEADS)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.proj(y.transpose(1, 2).flatten(2))
        return x + self.out(F.gelu(self.fc(self.ln2(x))))


class GPT(nn.Module):
    """A GPT over bytes; its output layer is its embedding."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Parameter(0.02 * torch.randn(256, DIM))
        self.position = nn.Parameter(0.02 * torch.randn(CONTEXT, DIM))
        self.blocks = nn.Sequential(*[Block() for _ in range(LAYERS)])
        self.ln = nn.LayerNorm(DIM)

    def forward(self, tokens):  # (batch, time) bytes -> (batch, time, 256) logits
        x = F.embedding(tokens, self.embedding) + self.position[:tokens.shape[1]]
        return F.linear(self.ln(self.blocks(x)), self.embedding)

    def loss(self, windows):
        """The cross-entropy of each byte, given those before it, in bits per byte."""
        logits = self(windows[:, :-1]).flatten(0, 1)
        return F.cross_entropy(logits, windows[:, 1:].flatten()) / math.log(2)

    @torch.no_grad()
    def score(self, windows):
        return mean(self.loss(batch).item() for batch in windows.split(32))

    @torch.no_grad()
    def write(self):
        """Continue "def " by 150 bytes, at temperature 0.7."""
        torch.manual_seed(0)
        text = list(b"def ")
        for _ in range(150):
            logits = self(torch.tensor([text[-CONTEXT:]], device=DEVICE))[0, -1]
            text.append(torch.multinomial(F.softmax(logits / 0.7, dim=-1), 1).item())
        return bytes(text).decode(errors="replace")


def adapted(base, name, seed):
    """A copy of base, adapted as ROWS[name] says."""
    model = copy.deepcopy(base)
    _, arguments = ROWS[name]
    if not arguments:
        return model
    torch.manual_seed(seed)
    minisora.adapt(model, target_modules=TARGETS, **arguments)
    torch.manual_seed(seed)  # draw A anew: rows of one r share it
    for _, layer in minisora.adapters(model):
        nn.init.kaiming_uniform_(layer.A, a=5**0.5)  # ±1/√in_features
        if name == "sora_no_diag":
            layer.diag.requires_grad_(False)
    return model


# ---- loop

def train(models, windows, steps, seed, later=0):
    """Train {row: model}. Returns {row: ms of a step}. later: how many steps follow these.

    The models step in turn on the same batch, so that a busy machine slows all alike.
    """
    runs, losses, ms = [], {}, {}
    for name, model in models.items():
        rate, _ = ROWS[name]
        # Without weight decay, which would pull diag and magnitude to 0.
        optimizer = torch.optim.Adam(model.parameters(), betas=(0.9, 0.95))
        # The rate rises for a tenth of the steps, then falls to almost 0.
        schedule = OneCycleLR(optimizer, rate, steps, pct_start=0.1, cycle_momentum=False)
        runs.append((name, model, optimizer, schedule))
        losses[name], ms[name] = [], []
    generator = torch.Generator().manual_seed(seed)
    for step in range(1, steps + 1):
        batch = windows[torch.randint(len(windows), (BATCH,), generator=generator)]
        for name, model, optimizer, schedule in runs:
            start = time.perf_counter()
            loss = model.loss(batch)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            losses[name].append(loss.item())  # waits for the GPU
            ms[name].append(1000 * (time.perf_counter() - start))
        if step % (steps // 10) == 0:
            left_ms = mean(map(mean, ms.values())) * ((steps - step) * len(models) + later)
            print(f"step {step:4} of {steps}, {left_ms / 1000:3.0f} s left, loss:",
                  *[f"{name} {mean(losses[name][-steps // 10:]):.2f}" for name in models])
    return {name: median(ms[name]) for name in models}


# ---- table

COLUMNS = {"trained": ",.0f", "ms": ".1f", "code": ".4f", "− lora": ".4f", "forgotten": ".4f",
           "entropy": ".2f", "‖RᵀR − I‖": ".1g"}


@torch.no_grad()
def measure(model, base, code, prose):
    """What the table and the picture show of one model."""
    row = dict.fromkeys([*COLUMNS, "spectrum"], math.nan)
    row["trained"] = sum(p.numel() for p in model.parameters() if p.requires_grad)
    row["code"] = model.score(code)
    row["forgotten"] = model.score(prose) - base.score(prose)
    if not math.isfinite(row["code"]):  # it diverged: the rest stays nan
        return row
    # In float64: rounding is no part of an update.
    model, base = copy.deepcopy(model).double(), copy.deepcopy(base).double()
    updates = [model.get_submodule(path).weight - linear.weight  # an adapter's weight is W'
               for path, linear in base.named_modules() if path.endswith(TARGETS)]
    row["entropy"] = mean(minisora.singular_value_entropy(update).item() for update in updates)
    row["spectrum"] = minisora.relative_singular_values(updates[0]).tolist()
    rotations = [m.rotation_matrix() for m in model.modules() if hasattr(m, "rotation_matrix")]
    defects = [torch.dist(R.T @ R, torch.eye(len(R)).to(R)).item() for R in rotations]
    row["‖RᵀR − I‖"] = max(defects, default=0)  # 0 without a rotation
    return row


def print_table(results):
    """Means over the seeds and, below, ± their standard errors."""
    print(" " * 16, *[f"{column:>9}" for column in COLUMNS])
    for name, rows in results.items():
        values = torch.tensor([[row[column] for column in COLUMNS] for row in rows])
        lines = {name: values.mean(dim=0)}
        if len(rows) > 1:
            lines["  ±"] = values.std(dim=0) / len(rows)**0.5
        for title, line in lines.items():
            print(f"{title:16}", *[f"{v:9{form}}" for v, form in zip(line, COLUMNS.values())])
    print("code: bits per byte, − lora: minus lora's, forgotten: on prose, minus the base's.\n"
          "entropy: of the singular values of W' − W0. nan: diverged, or there is no lora.")


def draw(file, results):
    """The singular values of W' − W0 in the first qkv, after the last seed."""
    from matplotlib.figure import Figure
    axes = Figure().subplots()
    axes.set(yscale="log", ylim=(1e-4, 1.2), ylabel="σᵢ / σ₁ of W' − W0")
    for name, rows in results.items():
        axes.plot(rows[-1]["spectrum"], label=name)
        axes.legend()
    axes.figure.savefig(file)


# ---- instead of the table

def reach():
    """‖W' − W*‖ / ‖W0 − W*‖ after 600 steps of Adam, an upper bound, for r = r_p = 4."""
    torch.manual_seed(0)
    linear = nn.Linear(64, 64)
    W0, d = linear.weight.detach(), 0.5 + torch.rand(64, 1)
    U, V = torch.randn(2, 64, 4) / 8
    R = torch.linalg.matrix_exp(U @ V.T - V @ U.T)  # turns four planes
    targets = {"W0 + UVᵀ": W0 + U @ V.T, "d * W0": d * W0,
               "R @ W0": R @ W0, "R @ (d * W0)": R @ (d * W0)}
    print(f"{'W*':12}", *[f"{name:>11}" for name in minisora.METHODS])
    for target, W in targets.items():
        layers = [method(linear, r=4, lora_alpha=8) for method in minisora.METHODS.values()]
        optimizer = torch.optim.Adam(nn.ModuleList(layers).parameters())
        for step in range(600):
            optimizer.param_groups[0]["lr"] = 0.2 * (1 - step / 600)
            optimizer.zero_grad()
            sum((layer.adapted_weight() - W).square().sum() for layer in layers).backward()
            optimizer.step()
        distances = [torch.dist(layer.adapted_weight(), W) for layer in layers]
        print(f"{target:12}", *[f"{distance / torch.dist(W0, W):11.2f}" for distance in distances])


def bench():
    """Forward and backward of one layer, r = 16, r_p = 4, on Timer's one thread.

    GFLOP as torch counts them: matrix products, but not those of an exponential.
    """
    for tokens, width in (64, 1024), (2048, 1024), (512, 2048):
        linear = nn.Linear(width, width, device=DEVICE)
        layers = {name: method(linear, r=16, lora_alpha=32)
                  for name, method in minisora.METHODS.items()}
        x = torch.randn(tokens, width, device=DEVICE, requires_grad=True)
        rounds = [{name: Timer("f(x).sum().backward()", globals={"f": layer, "x": x}).timeit(1).mean
                   for name, layer in layers.items()} for _ in range(20)]  # in turn, as in train
        print(f"\n{tokens:4} tokens, {width} wide   ms   / lora    GFLOP")
        for name, layer in layers.items():
            ms = 1000 * median(seconds[name] for seconds in rounds)
            ratio = median(seconds[name] / seconds["lora"] for seconds in rounds)
            with FlopCounterMode(display=False) as counter:
                layer(x).sum().backward()
            print(f"{name:18} {ms:8.2f} {ratio:8.2f} {counter.get_total_flops() / 1e9:8.2f}")


# ---- main

def main():
    if hasattr(sys.stdout, "reconfigure"):  # a console that lacks a letter gets a ?
        sys.stdout.reconfigure(errors="replace", line_buffering=True)
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--methods", nargs="+", choices=ROWS, default=DEFAULT_ROWS, metavar="ROW")
    parser.add_argument("--seeds", type=int, choices=range(1, 11), default=1, metavar="N")
    parser.add_argument("--plot", metavar="FILE")
    for flag in "--quick", "--reach", "--bench":
        parser.add_argument(flag, action="store_true")
    args = parser.parse_args()
    if args.reach or args.bench:
        return reach() if args.reach else bench()
    if args.plot:
        draw(args.plot, {})  # what cannot be drawn fails now
    # The base learns prose, so that code is nearly new to it.
    (prose, prose_test), (code, code_test) = map(split, texts())
    base_steps, steps = (60, 20) if args.quick else (BASE_STEPS, STEPS)
    torch.manual_seed(0)
    base = GPT().to(DEVICE)
    train({"full": base}, prose, base_steps, 0, later=args.seeds * len(args.methods) * steps)
    print(f"The base scores {base.score(prose_test):.4f} bits per byte on prose, "
          f"{base.score(code_test):.4f} on code, and writes:\n{base.write()}\n")

    results = {name: [] for name in args.methods}
    for seed in range(args.seeds):
        models = {name: adapted(base, name, seed) for name in results}
        ms = train(models, code, steps, seed, later=(args.seeds - seed - 1) * len(models) * steps)
        for name, model in models.items():
            row = measure(model, base, code_test, prose_test)
            results[name].append({**row, "ms": ms[name]})
        if "lora" in results:
            for rows in results.values():
                rows[-1]["− lora"] = rows[-1]["code"] - results["lora"][-1]["code"]
        print(f"\nAfter {seed + 1} of {args.seeds} seeds:")
        print_table(results)
    if args.plot:
        draw(args.plot, results)
    if math.isfinite(row["code"]):  # of the last model
        print(f"\nAdapted by {name}, it writes:\n{model.write()}")


if __name__ == "__main__":
    main()
