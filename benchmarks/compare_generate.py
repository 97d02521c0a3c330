"""The sampler and the ranker beside Hugging Face `generate`: the same prompts, as many genes, in one run, by turns.

    python benchmarks/compare_generate.py --corpus CORPUS --torch-python TORCH_VENV/bin/python --json OUT

Hugging Face runs in a process of its own (this file again, with --serve), in an environment with torch and
transformers, so that the project needs neither; it waits on its input while the other side is timed.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

TOP_K, VISIBLE, NUM_SPECIAL, POSITIONS = 50, 0.2, 16, 1024
# For each shape the batches that are timed, and how often.
WORK = {"one": 7, "many": 3}
SHAPES = {
    "laptop": {"num_layers": 1, "width": 512, "num_heads": 8, "hidden_width": 1024},
    "120M": {"num_layers": 12, "width": 768, "num_heads": 12},
}
FULL_VOCABULARY = 44_902


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--corpus", help="a prepared corpus: its vocabulary, and its test sets to complete")
    parser.add_argument("--torch-python", help="python of an environment with torch and transformers")
    parser.add_argument("--json", help="file to write")
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--sets", type=int, default=1000, help="sets of the large batch at the laptop shape")
    parser.add_argument("--few", type=int, default=8, help="sets of the large batch at the 120M shape")
    parser.add_argument("--longest", type=int, default=300, help="genes of the longest set that is used")
    parser.add_argument("--batch-rows", type=int, default=64, help="rows Hugging Face generates at once")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve()
        return
    if not (options.corpus and options.torch_python and options.json):
        parser.error("--corpus, --torch-python and --json are needed")
    compare(options)


def compare(options: argparse.Namespace) -> None:
    """Time all shapes and write the JSON file and, on standard output, a table."""
    import jax
    import numpy as np

    from tcc_jax.benchmarking.records import processor
    from tcc_jax.corpus.store import open_corpus

    corpus = open_corpus(options.corpus)
    rows: list[dict[str, Any]] = []
    versions: dict[str, str] = {}
    for name in options.shapes:
        shape = SHAPES[name]
        size = corpus.vocabulary.size if name == "laptop" else FULL_VOCABULARY
        sets = corpus.lengths[corpus.indices("test")]
        lengths = sets[(sets >= 5) & (sets <= options.longest)]
        random = np.random.default_rng(0)
        count = options.sets if name == "laptop" else options.few
        many = [make_query(int(length), size, random) for length in random.choice(lengths, count, replace=False)]
        work = {"one": [make_query(100, size, random)], "many": many}
        model = make_model(shape, size)
        with subprocess.Popen(
            [options.torch_python, __file__, "--serve"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        ) as server:
            versions = ask(server, {"shape": shape, "vocabulary": size})
            for kind, repeats in WORK.items():
                rows += time_by_turns(name, kind, work[kind], repeats, model, server, options.batch_rows)
            assert server.stdin is not None
            server.stdin.close()
    details = {
        "versions": {"jax": jax.__version__, "python": platform.python_version(), **versions},
        "device": f"{processor()}, {os.cpu_count()} cores",
        "top_k": TOP_K,
        "temperature": 1.0,
        "batch_rows": options.batch_rows,
        "longest_set": options.longest,
        "shapes": SHAPES,
    }
    Path(options.json).write_text(json.dumps({**details, "rows": rows}, indent=2) + "\n", encoding="utf-8")
    print(as_table(rows))


def time_by_turns(
    shape: str, kind: str, work: list[tuple[Any, int]], repeats: int, model: Any, server: Any, batch_rows: int
) -> list[dict[str, Any]]:
    """Time the three methods one after the other, `repeats` times over, after one round that is not counted."""
    from tcc_jax.completion.sampler import Sampling

    job = {"queries": [[prompt.tolist(), count] for prompt, count in work], "batch_rows": batch_rows}

    def ours(sampling: Sampling | None) -> float:
        start = time.perf_counter()
        found = list(model.propose(iter(work), sampling=sampling))
        seconds = time.perf_counter() - start
        assert [len(ids) for ids, _ in found] == [count for _, count in work]
        return seconds

    methods = {
        "ranker": lambda: ours(None),
        "sampler": lambda: ours(Sampling(top_k=TOP_K)),
        "generate": lambda: float(ask(server, job)["seconds"]),
    }
    seconds: dict[str, list[float]] = {method: [] for method in methods}
    for turn in range(repeats + 1):
        for method, run in methods.items():
            took = run()
            if turn:
                seconds[method].append(took)
    genes = sum(count for _, count in work)
    medians = {method: statistics.median(times) for method, times in seconds.items()}
    return [
        {
            "shape": shape,
            "sets": len(work),
            "genes": genes,
            "method": method,
            "seconds": times,
            "median_seconds": medians[method],
            "sets_per_second": len(work) / medians[method],
            "genes_per_second": genes / medians[method],
            "times_generate": medians["generate"] / medians[method],
        }
        for method, times in seconds.items()
    ]


def make_query(length: int, size: int, random: Any) -> tuple[Any, int]:
    """Return the visible genes of a random set of this length, and how many are hidden."""
    visible = max(1, round(VISIBLE * length))
    prompt = NUM_SPECIAL + random.choice(size - NUM_SPECIAL, visible, replace=False)
    return prompt.astype("int32"), length - visible


def make_model(shape: dict[str, int], size: int) -> Any:
    """Return a model of this shape with fresh parameters: the time does not depend on their values."""
    import jax
    import numpy as np

    from tcc_jax.completion.model import Model
    from tcc_jax.config import from_dict
    from tcc_jax.corpus.vocabulary import SPECIAL_SYMBOLS, Vocabulary
    from tcc_jax.model.decoder import initial_params
    from tcc_jax.runs.checkpoint import LoadedCheckpoint

    config = from_dict({"model": dict(shape), "training": {"row_length": POSITIONS}})
    symbols = (*SPECIAL_SYMBOLS, *(f"G{index}" for index in range(size - NUM_SPECIAL)))
    vocabulary = Vocabulary(symbols, ("",) * size, np.zeros(size, np.int64))
    params = initial_params(config.model, size, POSITIONS, jax.random.key(0))
    return Model(LoadedCheckpoint({}, config, vocabulary, params, Path(), 0))


def ask(server: Any, message: dict[str, Any]) -> Any:
    """Send one line of JSON to the other process, and wait for its answer."""
    server.stdin.write(json.dumps(message) + "\n")
    server.stdin.flush()
    answer = server.stdout.readline()
    if not answer:
        raise SystemExit("the torch process ended; see its messages above")
    return json.loads(answer)


def serve() -> None:
    """Generate with Hugging Face, a job a line: the first line is the model's shape."""
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    first = json.loads(sys.stdin.readline())
    shape = first["shape"]
    config = transformers.GPT2Config(
        vocab_size=first["vocabulary"],
        n_positions=POSITIONS,
        n_layer=shape["num_layers"],
        n_embd=shape["width"],
        n_inner=shape.get("hidden_width"),
        n_head=shape["num_heads"],
        bos_token_id=1,
        eos_token_id=None,
        pad_token_id=0,
    )
    model = transformers.GPT2LMHeadModel(config).train(False)
    answer = {"torch": torch.__version__, "transformers": transformers.__version__}
    print(json.dumps({**answer, "torch_threads": str(torch.get_num_threads())}), flush=True)

    class Once(transformers.LogitsProcessor):
        """No special id, and no gene that is visible or drawn already: `generate` has nothing of its own for it."""

        def __call__(self, input_ids: Any, scores: Any) -> Any:
            scores = scores.scatter(1, input_ids, -torch.inf)
            scores[:, :NUM_SPECIAL] = -torch.inf
            return scores

    for line in sys.stdin:
        job = json.loads(line)
        # By the number to draw, so that the rows of a batch end together.
        queries = sorted(job["queries"], key=lambda query: query[1])
        start = time.perf_counter()
        for place in range(0, len(queries), job["batch_rows"]):
            batch = queries[place : place + job["batch_rows"]]
            length = 1 + max(len(prompt) for prompt, _ in batch)
            # <start> and the genes, padded on the left as `generate` wants it.
            tokens = torch.tensor([[0] * (length - 1 - len(prompt)) + [1, *prompt] for prompt, _ in batch])
            out = model.generate(
                tokens,
                attention_mask=(tokens != 0).long(),
                do_sample=True,
                temperature=1.0,
                top_k=TOP_K,
                max_new_tokens=max(count for _, count in batch),
                use_cache=True,
                logits_processor=transformers.LogitsProcessorList([Once()]),
            )
            assert out.shape[1] == length + max(count for _, count in batch)
        print(json.dumps({"seconds": time.perf_counter() - start}), flush=True)


def as_table(rows: list[dict[str, Any]]) -> str:
    """Return the rows as a Markdown table."""
    lines = ["| shape | sets | genes | method | seconds | sets/s | genes/s | times generate |"]
    lines.append("|---|--:|--:|---|--:|--:|--:|--:|")
    for row in rows:
        lines.append(
            f"| {row['shape']} | {row['sets']:,} | {row['genes']:,} | {row['method']} | {row['median_seconds']:.4g} "
            f"| {row['sets_per_second']:,.4g} | {row['genes_per_second']:,.0f} | {row['times_generate']:.2f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
