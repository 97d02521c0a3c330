"""A step of training beside the same-shaped GPT-2 of Hugging Face transformers: the same packed tokens, by turns.

    python benchmarks/compare_pytorch.py --json OUT [--torch-python TORCH_VENV/bin/python]

Both take the same batches of next-gene targets, one at every position that has one, without dropout, with tied
embeddings, AdamW, clipping, and the vocabulary padded to a multiple of 128. PyTorch runs in a process of its own (this
file again, with --serve) that waits on its input while the other side is timed; it may need an environment of its own.
The fastest form of PyTorch is what the others are compared with. Its plain causal mask lets a set see those packed
before it, which is less work than to keep them apart; `segments` keeps them apart, as tcc_jax always does.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

# The same for both, from run.sh: large pages, and freed memory is kept.
TUNABLES = "glibc.malloc.hugetlb=1:glibc.malloc.mmap_threshold=33554432:glibc.malloc.trim_threshold=4000000000"
WARM_UP = 3
IGNORED = -100
_MIXED = ("float32", "bfloat16")
# Bytes of our part of a GPU's memory under which a batch is halved: 64 rows of the 120M shape need about 34 GiB
# of it by arithmetic (AOT.md and three states), nobody has run it there.
SMALLEST_SHARE = 45 * 2**30
# Both sides; a constant learning rate, since the schedule takes no time.
ADAMW = {"learning_rate": 3e-4, "beta1": 0.9, "beta2": 0.98, "weight_decay": 0.1, "gradient_clip": 1.0}
SHAPES: dict[str, dict[str, Any]] = {
    "cpu": {
        "model": {"num_layers": 4, "width": 128, "num_heads": 4},
        "training": {"batch_rows": 32, "row_length": 256, "segments_per_row": 16},
        "vocabulary": 5_000,
    },
    "120M": {
        "model": {"num_layers": 12, "width": 768, "num_heads": 12},
        "training": {"batch_rows": 64, "row_length": 1024, "segments_per_row": 64},
        "vocabulary": 44_902,
    },
    "tiny": {
        "model": {"num_layers": 1, "width": 32, "num_heads": 2},
        "training": {"batch_rows": 4, "row_length": 64, "segments_per_row": 8},
        "vocabulary": 300,
    },
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", help="file to write")
    parser.add_argument("--torch-python", default=sys.executable, help="python with torch and transformers")
    parser.add_argument("--shape", choices=list(SHAPES), help="120M, or cpu where there is no accelerator")
    parser.add_argument("--attention", nargs="+", default=["auto"], help="attention backends of tcc_jax to time")
    parser.add_argument("--windows", type=int, default=7)
    parser.add_argument("--steps", type=int, help="steps in a window: 20, on a CPU 3")
    parser.add_argument("--dtypes", nargs="+", choices=["float32", "bfloat16"], help="both on a CPU, else bfloat16")
    parser.add_argument("--residuals", nargs="+", choices=["float32", "bfloat16"], help="both, on a CPU float32")
    parser.add_argument("--parts", type=int, nargs="+", default=[4], help="on a CPU also in so many parts")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve()
        return
    if not options.json or not Path(options.json).absolute().parent.is_dir():
        parser.error("--json is needed, a file in a folder that is there")
    if min(options.windows, options.steps or 1, *options.parts) < 1:
        parser.error("--windows, --steps and --parts must be at least 1")
    if not shutil.which(options.torch_python):
        parser.error(f"--torch-python {options.torch_python}: no such program")
    if sys.platform == "linux" and "GLIBC_TUNABLES" not in os.environ:
        # Read when a process starts, so this one starts again.
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, "GLIBC_TUNABLES": TUNABLES})
    # On a GPU the rest is PyTorch's.
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.4")
    compare(options)


def compare(options: argparse.Namespace) -> None:
    """Time all forms and write the JSON file and, on standard output, a table."""
    import jax
    import numpy as np

    from benchmarks.compare_generate import ask
    from tcc_jax.benchmarking.measures import Trainer, train_batches, useful_tokens
    from tcc_jax.benchmarking.records import spread, surroundings
    from tcc_jax.benchmarking.synthetic import synthetic_corpus
    from tcc_jax.config import from_dict
    from tcc_jax.model.decoder import padded_vocabulary_size
    from tcc_jax.training.flops import flops_per_token, peak_flops
    from tcc_jax.training.sharding import make_mesh
    from tcc_jax.training.state import create_state
    from tcc_jax.training.step import attention_in_words, make_train_step

    where = surroundings()
    on_cpu = jax.default_backend() == "cpu"
    name = options.shape or ("cpu" if on_cpu else "120M")
    shape, size = SHAPES[name], SHAPES[name]["vocabulary"]
    if ((jax.local_devices()[0].memory_stats() or {}).get("bytes_limit") or math.inf) < SMALLEST_SHARE:
        rows = shape["training"]["batch_rows"] // 2
        print(f"half of the rows, {rows}: this device has little memory for both sides", file=sys.stderr)
        shape = {**shape, "training": {**shape["training"], "batch_rows": rows}}
    steps = options.steps or (3 if on_cpu else 20)

    def config_of(objective: str, dtype: str, attention: str, parts: int, residual: str) -> Any:
        return from_dict(
            {
                "model": {**shape["model"], "matmul_dtype": dtype, "residual_dtype": residual},
                "training": {**shape["training"], "microbatches": parts},
                "objective": {"kind": objective},
                "optimizer": {**ADAMW, "warmup_steps": 0, "final_fraction": 1.0},
                "compute": {"attention": attention},
                "mesh": {"data": 1},
            }
        )

    dtypes = options.dtypes or (["float32", "bfloat16"] if on_cpu else ["bfloat16"])
    # On a CPU both sides are also timed with the gradient summed over parts of a batch, which fit its caches.
    all_parts = [parts for parts in options.parts if parts > 1] if on_cpu else []
    # On an accelerator both sides are also timed with the residual stream in bfloat16.
    residuals = options.residuals or (["float32"] if on_cpu else ["float32", "bfloat16"])
    ours = [
        ("next-gene", dtype, attention, 1, residual)
        for attention in options.attention
        for dtype in dtypes
        for residual in residuals
    ]
    ours += [("remaining-set", dtypes[0], attention, 1, residuals[-1]) for attention in options.attention]
    ours += [
        (objective, dtype, "auto", parts, residuals[0])
        for objective in ("next-gene", "remaining-set")
        for dtype in dtypes
        for parts in all_parts
    ]
    config = config_of(*ours[0])
    corpus = synthetic_corpus(size, 20_000)
    batches = train_batches(config, corpus, WARM_UP + options.windows * steps)
    folder = tempfile.TemporaryDirectory()
    file = Path(folder.name) / "batches.npz"
    np.savez(file, tokens=[batch["tokens"] for batch in batches], segments=[batch["segments"] for batch in batches])
    server = subprocess.Popen(
        [options.torch_python, __file__, "--serve"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    with folder, server:
        first = {
            "model": shape["model"],
            "vocabulary": padded_vocabulary_size(size),
            "batches": str(file),
            "dtypes": dtypes,
            "parts": all_parts,
            "residuals": residuals,
        }
        theirs = ask(server, first)
        forms: list[dict[str, Any]] = []
        for objective, dtype, attention, parts, residual in ours:
            name_of_form = f"{objective}, {attention} attention{variant(parts, residual)}"
            form = {"side": "tcc_jax", "form": name_of_form, "dtype": dtype}
            try:
                made = config_of(objective, dtype, attention, parts, residual)
                mesh = make_mesh(made)
                state = create_state(made, size, None, mesh)
                trainer = Trainer(state, make_train_step(made, size, mesh), mesh)
                began = time.perf_counter()
                trainer.seconds(batches[:1])
                form |= {"attention": attention_in_words(made, mesh)}
                form |= {"first_step_seconds": time.perf_counter() - began, "initial_loss": trainer.loss()}
                trainer.seconds(batches[1:WARM_UP])
                forms.append(form | {"run": trainer.seconds, "loss": trainer.loss})
            except Exception as error:
                forms.append(form | {"failed": repr(error)[:300]})
            tell("warmed up", forms[-1])
        for number, form in enumerate(theirs["forms"]):
            answer = ask(server, {"form": number, "batches": [0, WARM_UP], "warm_up": True})
            form = {"side": "PyTorch", **form, **answer}
            if "failed" not in form:
                form["number"] = number
            forms.append(form)
            tell("warmed up", form)
        seconds: list[list[float]] = [[] for _ in forms]
        processor: list[list[float]] = [[] for _ in forms]
        for window in range(options.windows):
            print(f"window {window + 1} of {options.windows}", file=sys.stderr)
            start = WARM_UP + window * steps
            for form, times, busy in zip(forms, seconds, processor, strict=True):
                if "run" in form:
                    before = time.process_time()
                    try:
                        times.append(form["run"](batches[start : start + steps]))
                    except Exception as error:  # such as a device whose memory ends between two windows
                        form["failed"] = repr(error)[:300]
                        del form["run"]
                        times.clear()
                        tell("timed", form)
                        continue
                    busy.append(time.process_time() - before)
                elif "number" in form:
                    answer = ask(server, {"form": form["number"], "batches": [start, start + steps]})
                    times.append(answer["seconds"])
                    busy.append(answer["processor_seconds"])
                    form["last_loss"] = answer["loss"]
        assert server.stdin is not None
        server.stdin.close()
    tokens = [sum(map(useful_tokens, batches[start : start + steps])) for start in range(WARM_UP, len(batches), steps)]
    flops, peak = flops_per_token(config, size), peak_flops(where["device"])
    rows = []
    for form, times, busy in zip(forms, seconds, processor, strict=True):
        if "run" in form:
            form["last_loss"] = form["loss"]()
        row = {key: value for key, value in form.items() if key not in ("run", "loss", "number")}
        if times:
            row["step_ms"] = spread([1000 * duration / steps for duration in times])
            row["processor_ms"] = spread([1000 * duration / steps for duration in busy])
            rates = [count / duration for count, duration in zip(tokens, times, strict=True)]
            row["useful_tokens_per_second"] = spread(rates)
            row["mfu"] = None if peak is None else row["useful_tokens_per_second"]["median"] * flops / peak
        rows.append(row)
    add_ratios(rows)
    record = {
        **where,
        "load_average_after": round(os.getloadavg()[0], 2),
        "versions": {**where["versions"], **theirs["versions"]},
        "torch_device": theirs["device"],
        "torch_threads": theirs["threads"],
        "shape": {"name": name, **shape, "padded_vocabulary": padded_vocabulary_size(size)},
        "windows": options.windows,
        "steps_per_window": steps,
        "fill": sum(map(useful_tokens, batches)) / sum(batch["tokens"].size for batch in batches),
        "flops_per_token": flops,
        "checks": checks(rows, theirs["matmul_parameters"], flops_per_token(config, size, 0) / 6, size),
        "rows": rows,
    }
    Path(options.json).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(as_table(rows))
    for check in record["checks"]:
        print(check)
    if missing := untimed(rows):
        sys.exit(f"error: not timed: {'; '.join(missing)}")


def variant(parts: int, residual: str) -> str:
    """Say how a batch is taken, if not at once, and what the residual stream is, if not float32."""
    return (f", in {parts} parts" if parts > 1 else "") + ("" if residual == "float32" else f", {residual} residual")


def tell(what: str, form: dict[str, Any]) -> None:
    """Print on standard error how far the comparison is."""
    failed = f", failed: {form['failed']}" if "failed" in form else ""
    print(f"{what}: {form['side']}, {form['form']}, {form['dtype']}{failed}", file=sys.stderr)


def add_ratios(rows: list[dict[str, Any]]) -> None:
    """Put into each row that was timed how many times as fast it is as the fastest form of PyTorch."""
    timed = [row for row in rows if "useful_tokens_per_second" in row]
    theirs = [row["useful_tokens_per_second"]["median"] for row in timed if row["side"] == "PyTorch"]
    for row in timed:
        row["times_pytorch"] = row["useful_tokens_per_second"]["median"] / max(theirs) if theirs else None


def untimed(rows: list[dict[str, Any]]) -> list[str]:
    """Name each form that failed, and each side of which nothing was timed."""
    missing = [f"{row['side']}, {row['form']}, {row['dtype']} ({row['failed']})" for row in rows if "failed" in row]
    timed = {row["side"] for row in rows if "useful_tokens_per_second" in row}
    return missing + [f"anything of {side}" for side in ("tcc_jax", "PyTorch") if side not in timed]


def checks(rows: list[dict[str, Any]], theirs: int, ours: float, size: int) -> list[str]:
    """Say whether both sides do the same work; a loss is that of the first step, before any update."""
    said = [f"matmul parameters: {ours:,.0f} and PyTorch {theirs:,}: {'same' if ours == theirs else 'DIFFERENT'}"]
    uniform = math.log(size)
    for row in rows:
        if "initial_loss" in row:
            apart = row["initial_loss"] / uniform - 1
            said.append(
                f"initial loss of {row['side']}, {row['form']}, {row['dtype']}: {row['initial_loss']:.3f}, "
                f"{100 * apart:+.1f} % from log V = {uniform:.3f}{'' if abs(apart) < 0.05 else ': TOO FAR'}"
            )
    return said


def serve() -> None:
    """Train with PyTorch, a window a line: the first line is the shape and the file of batches."""
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    # Compilers may print: only answers go to the other process.
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    import numpy as np
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    # transformers gives a compiled model a full mask where eager gets `is_causal`, and so no flash kernel: pass on what
    # the model is called with, None or the mask of segments.
    transformers.models.gpt2.modeling_gpt2.create_causal_mask = lambda *_, attention_mask, **__: attention_mask
    torch.set_float32_matmul_precision("high")
    first = json.loads(sys.stdin.readline())
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with np.load(first["batches"]) as arrays:
        tokens_SBT, segments_SBT = arrays["tokens"].astype(np.int64), arrays["segments"].astype(np.int64)
    labels_SBT = next_tokens(tokens_SBT, segments_SBT)
    shape = first["model"]
    model_config = transformers.GPT2Config(
        vocab_size=first["vocabulary"],
        n_positions=tokens_SBT.shape[2],
        n_layer=shape["num_layers"],
        n_embd=shape["width"],
        n_head=shape["num_heads"],
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        use_cache=False,
        attn_implementation="sdpa",
    )
    dtypes = first["dtypes"]
    residuals = first["residuals"]
    # Products in float32 have no use for a narrower residual stream.
    kept = [(dtype, residual) for dtype in dtypes for residual in residuals if (dtype, residual) != _MIXED]
    kinds = [("causal", dtype, True, 1, residual) for dtype, residual in kept]
    kinds += [("segments", dtype, True, 1, residuals[0]) for dtype in dtypes]
    if device == "cpu":  # a GPU is always faster with what is compiled
        kinds += [("causal", dtype, False, 1, residuals[0]) for dtype in dtypes]
    kinds += [("causal", dtype, True, parts, residuals[0]) for dtype in dtypes for parts in first["parts"]]

    class Rounded(torch.nn.Module):
        """In place of the dropout after the embedding: each block adds to the stream in the type that it has."""

        def forward(self, x: Any) -> Any:
            return x.to(torch.bfloat16)

    def make_step(mask: str, dtype: str, compiled: bool, parts: int, residual: str) -> Any:
        torch.manual_seed(0)
        model = transformers.GPT2LMHeadModel(model_config).to(device).train()
        if residual == "bfloat16":
            model.transformer.drop = Rounded()
        optimizer = make_adamw(model, ADAMW)
        length = tokens_SBT.shape[2]
        before_TT = torch.ones(length, length, dtype=torch.bool, device=device).tril()

        def loss_of(tokens_BT: Any, labels_BT: Any, segments_BT: Any) -> Any:
            visible = None
            if mask == "segments":
                visible = (segments_BT[:, None, :, None] == segments_BT[:, None, None, :]) & before_TT
            with torch.autocast(device, torch.bfloat16, enabled=dtype == "bfloat16"):
                logits = model(tokens_BT, attention_mask=visible).logits
                flat, labels = logits.view(-1, logits.shape[-1]), labels_BT.view(-1)
                return torch.nn.functional.cross_entropy(flat, labels, ignore_index=IGNORED, reduction="sum")

        loss_of = torch.compile(loss_of) if compiled else loss_of

        def step(number: int) -> Any:
            optimizer.zero_grad(set_to_none=True)
            scored, loss = max(1, int((labels_SBT[number] != IGNORED).sum())), 0.0
            batch = [torch.from_numpy(array[number]) for array in (tokens_SBT, labels_SBT, segments_SBT)]
            for part in zip(*(array.chunk(parts) for array in batch), strict=True):
                mean = loss_of(*(array.to(device, non_blocking=True) for array in part)) / scored
                mean.backward()
                loss = loss + mean.detach()
            torch.nn.utils.clip_grad_norm_(model.parameters(), ADAMW["gradient_clip"])
            optimizer.step()
            return loss

        return step

    def window(step: Any, numbers: range) -> dict[str, float]:
        start, before = time.perf_counter(), time.process_time()
        for number in numbers:
            loss = step(number)
        if device == "cuda":
            torch.cuda.synchronize()
        seconds, busy = time.perf_counter() - start, time.process_time() - before
        return {"seconds": seconds, "processor_seconds": busy, "loss": loss.item()}

    def answer(message: dict[str, Any]) -> None:
        print(json.dumps(message), file=answers, flush=True)

    model = transformers.GPT2LMHeadModel(model_config)
    products = [module.weight for module in model.modules() if isinstance(module, transformers.pytorch_utils.Conv1D)]
    answer(
        {
            "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
            "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
            "threads": torch.get_num_threads(),
            "matmul_parameters": sum(weight.numel() for weight in [*products, model.lm_head.weight]),
            "forms": [
                {
                    "form": f"{mask} mask, {'compiled' if compiled else 'eager'}{variant(parts, residual)}",
                    "dtype": dtype,
                }
                for mask, dtype, compiled, parts, residual in kinds
            ],
        }
    )
    ready = {}
    for line in sys.stdin:
        job = json.loads(line)
        numbers = range(*job["batches"])
        if not job.get("warm_up"):
            answer(window(ready[job["form"]], numbers))
            continue
        try:
            step = make_step(*kinds[job["form"]])
            first_window = window(step, numbers[:1])
            window(step, numbers[1:])
        except Exception as error:
            answer({"failed": repr(error)[:300]})
            continue
        ready[job["form"]] = step
        answer({"first_step_seconds": first_window["seconds"], "initial_loss": first_window["loss"]})


def make_adamw(model: Any, settings: dict[str, Any]) -> Any:
    """Return PyTorch's fused AdamW; matrices decay, the rest does not."""
    import torch

    matrices = [parameter for parameter in model.parameters() if parameter.ndim >= 2]
    others = [parameter for parameter in model.parameters() if parameter.ndim < 2]
    return torch.optim.AdamW(
        [{"params": matrices}, {"params": others, "weight_decay": 0.0}],
        lr=settings["learning_rate"],
        betas=(settings["beta1"], settings["beta2"]),
        weight_decay=settings["weight_decay"],
        fused=True,
    )


def next_tokens(tokens: Any, segments: Any) -> Any:
    """Return the next token of each position's own segment, -100 where there is none; NumPy arrays, positions last."""
    labels = tokens * 0 + IGNORED
    same = (segments[..., 1:] == segments[..., :-1]) & (segments[..., 1:] > 0)
    labels[..., :-1][same] = tokens[..., 1:][same]
    return labels


def as_table(rows: list[dict[str, Any]]) -> str:
    """Return the rows as a Markdown table."""
    lines = ["| side | form | type | step, ms (min to max) | processor, ms | useful tokens/s | MFU | times PyTorch |"]
    lines.append("|---|---|---|--:|--:|--:|--:|--:|")
    for row in rows:
        start = f"| {row['side']} | {row['form']} | {row['dtype']} |"
        if "failed" in row:
            lines.append(f"{start} failed: {row['failed'].splitlines()[0]} | | | | |")
            continue
        step, rate, mfu, times = (row[key] for key in ("step_ms", "useful_tokens_per_second", "mfu", "times_pytorch"))
        lines.append(
            f"{start} {step['median']:.1f} ({step['min']:.1f} to {step['max']:.1f}) "
            f"| {row['processor_ms']['median']:.1f} | {rate['median']:,.0f} "
            f"| {'-' if mfu is None else f'{100 * mfu:.1f} %'} | {'-' if times is None else f'{times:.2f}'} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
