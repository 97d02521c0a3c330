"""The PyTorch side of the time to quality: the same-shaped GPT-2 of Hugging Face transformers with the next-gene loss.

    python -m benchmarks.speedrun_pytorch CONFIG --gmt tcc1000.gmt --drawn-counts TABLE --out FILE.json
        [--torch-python TORCH_VENV/bin/python]

CONFIG is that of a next-gene run, such as configs/speedrun_pytorch.toml: its packed rows, shape, AdamW and schedule
are taken over. PyTorch trains in a process of its own (this file again), compiled, in bfloat16 on a GPU, with its plain
causal mask, the fastest form: a set then sees those packed before it. Positions count from the start of each set.
Seconds are those of training, compilation included; unlike in `benchmarks.speedrun` no reading, packing or wait for
data and no validation is in them, which favours PyTorch. The reference sets are completed by its logits after the
visible genes, ranked and tested as there. Run from the repository's root.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.compare_pytorch import IGNORED, make_adamw, next_tokens

_ROWS_AT_ONCE = 32
# The id of <start>; the process with torch has no tcc_jax to ask.
_START = 1
# What the two sides have in common.
_WANTED = {
    "objective.kind": "next-gene",
    "objective.cut_points": 0,
    "objective.frequency_bias": False,
    "objective.spectral_start": False,
    "objective.false_genes": 0.0,
    "model.position": "learned",
    "optimizer.kind": "adamw",
    "optimizer.ema_decay": 0.0,
}


def main() -> None:
    """Run the command, or PyTorch's side of it."""
    if sys.argv[1:] == ["--serve"]:
        serve()
        return
    from tcc_jax.terminal import command

    # JAX ranks and tests alone: on a GPU the rest is PyTorch's.
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.2")
    command(_speedrun)()


def _speedrun() -> None:
    import numpy as np

    from benchmarks.compare_generate import ask
    from benchmarks.speedrun import Options, count_seen, first_points, is_due, measure, prepare, read_reference, table
    from tcc_jax.corpus.loader import BatchSource
    from tcc_jax.model.decoder import padded_vocabulary_size
    from tcc_jax.terminal import UserError, parse_arguments
    from tcc_jax.training.optimizer import learning_rate

    @dataclass(frozen=True)
    class TorchOptions(Options):
        """What to train, and what it is measured on."""

        torch_python: str = sys.executable
        """Python with torch and transformers."""

    options = parse_arguments(TorchOptions, prog="python -m benchmarks.speedrun_pytorch")
    command_began = time.perf_counter()
    config, corpus = prepare(options)
    for field, wanted in _WANTED.items():
        section, name = field.split(".")
        if (value := getattr(getattr(config, section), name)) != wanted:
            raise UserError(f"{options.config}: {field} = {value!r}: PyTorch trains here with {wanted!r} only")
    if config.data.gene_order == "file" and "packed_from" in corpus.meta:
        raise UserError(
            f'{options.config}: data.gene_order = "file": {corpus.path} was unpacked, its genes lie in the order of '
            'their ids and no longer in that of the file; use data.gene_order = "shuffled"'
        )
    size, steps = corpus.vocabulary.size, config.training.steps
    reference, seen = read_reference(options, corpus.vocabulary), count_seen(config, corpus)
    batches = BatchSource(config, corpus, "train").batches()
    server = subprocess.Popen(
        [options.torch_python, __file__, "--serve"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    points: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder, server:
        file = Path(folder) / "arrays.npz"
        optimizer = config.optimizer
        where = ask(
            server,
            {
                "file": str(file),
                "model": {
                    "vocab_size": padded_vocabulary_size(size),
                    "n_positions": config.training.row_length,
                    "n_layer": config.model.num_layers,
                    "n_embd": config.model.width,
                    "n_head": config.model.num_heads,
                    "n_inner": config.model.hidden_width or None,
                },
                "dropout": config.model.dropout,
                "optimizer": dataclasses.asdict(optimizer),
                "seed": config.run.seed,
            },
        )

        def score(visible: Sequence[np.ndarray]) -> np.ndarray:
            most = config.training.row_length - 1
            np.savez(
                file, lengths=[min(len(ids), most) for ids in visible], ids=np.concatenate([i[:most] for i in visible])
            )
            ask(server, {"score": size})
            return np.load(file.with_suffix(".npy"))

        seconds, last = 0.0, 0
        for start in range(0, steps, options.every):
            stop = min(start + options.every, steps)
            window = [next(batches) for _ in range(start, stop)]
            np.savez(file, **{name: np.stack([batch[name] for batch in window]) for name in ("tokens", "segments")})
            rates = [float(learning_rate(optimizer, steps, step)) for step in range(start, stop)]
            answer = ask(server, {"train": rates})
            seconds += answer["seconds"]
            late = options.limit and time.perf_counter() - command_began > options.limit
            if late or is_due(stop, steps, last):
                last = stop
                # Its start is random, and takes no time that is counted.
                point = {"step": stop, "seconds": round(seconds, 2), "seconds_with_start": round(seconds, 2)}
                point |= seen(stop)._asdict() | {"loss": answer["loss"]}
                points.append(point | measure(score, reference, size))
                print(json.dumps(points[-1]), flush=True)
            if late:
                break
    record = {
        "config": config.to_dict(),
        **where,
        "start_seconds": 0.0,
        "wall_seconds": round(time.perf_counter() - command_began, 1),
        "points": points,
        "marks": first_points(points),
    }
    options.out.write_text(json.dumps(record, indent=1) + "\n")
    print(table(record))


def serve() -> None:
    """Train and score with PyTorch, a job a line: the first line is the model's shape."""
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    # Compilers may print: only answers go to the other process.
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    import numpy as np
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    # Else a compiled model gets a full mask, and no flash kernel (see compare_pytorch.py).
    transformers.models.gpt2.modeling_gpt2.create_causal_mask = lambda *_, attention_mask, **__: attention_mask
    torch.set_float32_matmul_precision("high")
    first = json.loads(sys.stdin.readline())
    torch.manual_seed(first["seed"])
    file, device = Path(first["file"]), "cuda" if torch.cuda.is_available() else "cpu"
    dropout = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), first["dropout"])
    model_config = transformers.GPT2Config(**first["model"], **dropout, use_cache=False, attn_implementation="sdpa")
    model = transformers.GPT2LMHeadModel(model_config).to(device)
    adamw = first["optimizer"]
    optimizer = make_adamw(model, adamw)

    def autocast() -> Any:
        return torch.autocast(device, torch.bfloat16, enabled=device == "cuda")

    @torch.compile
    def loss_of(tokens_BT: Any, labels_BT: Any, places_BT: Any) -> Any:
        with autocast():
            logits = model(tokens_BT, position_ids=places_BT).logits
            flat, labels = logits.view(-1, logits.shape[-1]), labels_BT.view(-1)
            return torch.nn.functional.cross_entropy(flat, labels, ignore_index=IGNORED)

    def train(rates: list[float]) -> dict[str, float]:
        with np.load(file) as arrays:
            tokens_SBT, segments_SBT = arrays["tokens"].astype(np.int64), arrays["segments"]
        work = (tokens_SBT, next_tokens(tokens_SBT, segments_SBT), places(segments_SBT))
        model.train()
        began = time.perf_counter()
        for number, rate in enumerate(rates):
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.zero_grad(set_to_none=True)
            loss = loss_of(*(torch.from_numpy(array[number]).to(device, non_blocking=True) for array in work))
            loss.backward()
            if adamw["gradient_clip"]:
                torch.nn.utils.clip_grad_norm_(model.parameters(), adamw["gradient_clip"])
            optimizer.step()
        last = loss.item()
        return {"seconds": time.perf_counter() - began, "loss": last}

    def score(size: int) -> dict[str, int]:
        with np.load(file) as arrays:
            prompts = np.split(arrays["ids"].astype(np.int64), np.cumsum(arrays["lengths"])[:-1])
        scores_NV = np.empty((len(prompts), size), np.float32)
        model.train(False)
        for start in range(0, len(prompts), _ROWS_AT_ONCE):
            rows = prompts[start : start + _ROWS_AT_ONCE]
            tokens_BT = np.zeros((len(rows), 1 + max(map(len, rows))), np.int64)
            tokens_BT[:, 0] = _START
            for row, ids in zip(tokens_BT, rows, strict=True):
                row[1 : 1 + len(ids)] = ids
            lengths_B = torch.tensor([len(ids) for ids in rows], device=device)
            with torch.no_grad(), autocast():
                h_BTD = model.transformer(torch.from_numpy(tokens_BT).to(device)).last_hidden_state
                logits_BV = model.lm_head(h_BTD[torch.arange(len(rows), device=device), lengths_B])
            scores_NV[start : start + len(rows)] = logits_BV[:, :size].float().cpu().numpy()
        np.save(file.with_suffix(".npy"), scores_NV)
        return {"scored": len(prompts)}

    def answer(message: dict[str, Any]) -> None:
        print(json.dumps(message), file=answers, flush=True)

    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    answer({"device": torch.cuda.get_device_name() if device == "cuda" else "cpu", "versions": versions})
    for line in sys.stdin:
        job = json.loads(line)
        answer(train(job["train"]) if "train" in job else score(job["score"]))


def places(segments: Any) -> Any:
    """Return each position's place in its own segment, NumPy int64, positions last."""
    import numpy as np

    index = np.arange(segments.shape[-1])
    is_first = np.diff(segments, axis=-1, prepend=-1) != 0
    return index - np.maximum.accumulate(np.where(is_first, index, 0), axis=-1)


if __name__ == "__main__":
    main()
