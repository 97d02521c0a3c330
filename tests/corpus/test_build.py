"""The steps of the preparation, each against what it promises."""

import numpy as np
import pytest

from tcc_jax.corpus.build import BuildOptions, build_corpus
from tcc_jax.corpus.store import SPLITS
from tcc_jax.corpus.vocabulary import NUM_SPECIAL
from tcc_jax.files import sha256
from tcc_jax.terminal import UserError
from tests.corpus.corpora import approved_symbols, random_sets, write_gmt_file

OPEN = dict(min_sets_per_gene=1, min_genes=1, validation_share=0.0, test_share=0.0)


def build(tmp_path, sets, name="lib.gmt", more=(), **options):
    files = [write_gmt_file(tmp_path / name, sets), *more]
    return build_corpus(files, BuildOptions(**options))


def symbols_of(corpus, index):
    return [corpus.vocabulary.symbols[gene] for gene in corpus.genes(index)]


def as_sets(corpus, split=None):
    chosen = range(corpus.num_sets) if split is None else corpus.indices(split)
    return [frozenset(corpus.genes(index).tolist()) for index in chosen]


def count_of(corpus, step):
    return next(entry for entry in corpus.meta["counts"] if step in entry["step"])


def test_harmonised_deduplicated_and_in_file_order(tmp_path):
    sets = [("a", ["MLL", "TP53", "KMT2A", "BRCA1", "SEPT2"]), ("b", ["SEPTIN2", "BRCA1", "TP53", "KMT2A"])]
    corpus = build(tmp_path, sets, **OPEN)
    assert corpus.names == ["a"]
    assert corpus.other_names == [["lib/b"]]
    assert symbols_of(corpus, 0) == ["KMT2A", "TP53", "BRCA1", "SEPTIN2"]
    assert [entry["sets"] for entry in corpus.meta["counts"][:3]] == [2, 2, 1]


def test_sets_under_the_mapped_share_are_dropped(tmp_path):
    genes = approved_symbols()[:20]
    sets = [("nine of ten", [*genes[:9], "NOTAGENE"]), ("eight of ten", [*genes[:8], "NOTAGENE", "NEITHER"])]
    corpus = build(tmp_path, sets, **OPEN)
    assert corpus.names == ["nine of ten"]
    assert len(corpus.genes(0)) == 9
    assert corpus.meta["harmonisation"]["not_mapped"][0] == {"symbol": "NOTAGENE", "mentions": 2}


def test_a_set_exactly_at_the_mapped_share_stays(tmp_path):
    sets = [("at", [*approved_symbols()[:14], *(f"NOTAGENE{i}" for i in range(11))])]
    assert build(tmp_path, sets, **{**OPEN, "min_mapped": 0.56}).names == ["at"]


def test_rare_genes_then_collapse_then_short_sets(tmp_path):
    genes = approved_symbols()[:40]
    common = genes[:6]
    sets = [(f"s{i}", [*common, genes[10 + i]]) for i in range(6)]  # alike once their own rare gene is gone
    sets += [("short", [*common[:3], genes[20]]), ("other", common[:5])]
    corpus = build(tmp_path, sets, **{**OPEN, "min_sets_per_gene": 3, "min_genes": 5})
    assert corpus.names == ["s0", "other"]
    assert corpus.other_names[0] == [f"lib/s{i}" for i in range(1, 6)]
    assert corpus.vocabulary.size == NUM_SPECIAL + 6


def test_a_corpus_that_loses_most_genes_is_told_what_keeps_them(tmp_path, capsys):
    genes = approved_symbols()[:40]
    build(tmp_path, [(f"s{i}", [*genes[:6], genes[10 + i]]) for i in range(6)], **{**OPEN, "min_sets_per_gene": 3})
    assert "6 of 12 genes" not in capsys.readouterr().err
    build(tmp_path, [(f"s{i}", [*genes[:6], genes[10 + i]]) for i in range(7)], **{**OPEN, "min_sets_per_gene": 3})
    assert "6 of 13 genes are in 3 sets or more" in capsys.readouterr().err


def test_same_name_in_two_libraries_is_two_sets(tmp_path):
    other = write_gmt_file(tmp_path / "other.gmt", [("a", ["TP53", "MDM2"])])
    corpus = build(tmp_path, [("a", ["TP53", "BRCA1"])], more=[other], **OPEN)
    assert list(zip(corpus.libraries, corpus.names, strict=True)) == [("lib", "a"), ("other", "a")]


def test_holdout_drops_exactly_what_reaches_the_limit(tmp_path):
    sets = random_sets(number=400, num_genes=60, seed=1)
    held = [(f"held {i}", genes) for i, (_, genes) in enumerate(random_sets(number=20, num_genes=60, seed=2))]
    held.append(("a copy", sets[7][1]))
    file = write_gmt_file(tmp_path / "held.gmt", held)
    for limit in (0.28, 0.3, 0.5, 0.56, 1.0):
        corpus = build(tmp_path, sets, holdout=(file,), max_jaccard=limit, **OPEN)
        expected = [
            name
            for name, genes in sets
            if all(len(set(genes) & set(h)) / len(set(genes) | set(h)) < limit for _, h in held)
        ]
        assert corpus.names == expected
        assert count_of(corpus, "held-out")["sets"] == len(expected) < 400
        assert corpus.meta["leaks"]["holdout"]["with_training_set_at_jaccard"]["0.9"] == 0


def test_a_folder_can_be_held_out(tmp_path):
    sets = random_sets(number=40)
    (tmp_path / "held").mkdir()
    for name, held in (("b", sets[:3]), ("a", sets[5:6])):
        write_gmt_file(tmp_path / "held" / f"{name}.gmt", held)
    corpus = build(tmp_path, sets, holdout=(tmp_path / "held",), **OPEN)
    assert corpus.names == [name for place, (name, _) in enumerate(sets) if place not in (0, 1, 2, 5)]
    hashes = [{"file": f"{name}.gmt", "sha256": sha256(tmp_path / "held" / f"{name}.gmt")} for name in ("a", "b")]
    assert corpus.meta["holdout"] == hashes


def test_holdout_still_holds_once_rare_genes_are_gone(tmp_path):
    genes = approved_symbols()[:60]
    common, rare = genes[:6], genes[20:]
    # Jaccard 6/20 with its rare genes, 6/6 without them; the others stay at 6/15.
    others = [(f"s{i}", common + [gene for j, gene in enumerate(genes[6:16]) if j != i]) for i in range(6)]
    sets = [("near", common + rare[:7]), *others]
    file = write_gmt_file(tmp_path / "held.gmt", [("held", common + rare[7:14])])
    corpus = build(tmp_path, sets, holdout=(file,), **{**OPEN, "min_sets_per_gene": 2})
    assert corpus.names == [name for name, _ in others]
    assert count_of(corpus, "dropped again")["sets"] == corpus.num_sets


def test_leaks_of_the_holdout_are_over_the_genes_that_the_corpus_keeps(tmp_path):
    genes = approved_symbols()[:60]
    sets = [(f"s{i}", [gene for j, gene in enumerate(genes[:11]) if j != 4 + i]) for i in range(7)]
    # 4 of 10 genes are shared; of 30 with the held-out set's own, which the corpus never had or has no more.
    sets.append(("rare", genes[:5] + genes[20:35]))
    file = write_gmt_file(tmp_path / "held.gmt", [("held", genes[:4] + genes[30:50])])
    corpus = build(tmp_path, sets, holdout=(file,), **{**OPEN, "min_sets_per_gene": 2})
    leaks = {"sets": 1, "with_training_set_at_jaccard": {"0.3": 1, "0.5": 0, "0.9": 0}}
    assert corpus.meta["leaks"]["holdout"] == leaks


@pytest.mark.parametrize("seed", range(3))
def test_random_split_has_no_near_duplicates_across(tmp_path, seed):
    random = np.random.default_rng(seed)
    base = random_sets(number=400, num_genes=500, seed=seed)
    sets = list(base)
    for name, genes in base[:120]:
        sets.append((name + " variant", [g for g in genes if random.random() < 0.85] or genes))
    corpus = build(tmp_path, sets, min_sets_per_gene=1, test_share=0.2, validation_share=0.1, seed=seed)
    train, validation, test = (as_sets(corpus, split) for split in SPLITS)
    for held, others in ((test, train), (test, validation), (validation, train)):
        assert max(len(a & b) / len(a | b) for a in held for b in others) < 0.5
    for cluster in np.unique(corpus.clusters):
        assert len(np.unique(corpus.splits[corpus.clusters == cluster])) == 1
    assert 0.1 < len(test) / corpus.num_sets <= 0.21
    leaks = corpus.meta["leaks"]["test"]
    best = [max(len(a & b) / len(a | b) for b in train) for a in test]
    assert leaks["with_training_set_at_jaccard"]["0.3"] == sum(value >= 0.3 for value in best)


def test_large_clusters_go_to_training(tmp_path):
    sets = random_sets(number=300, num_genes=400)
    family = [
        (f"copy {i}", [g for j, g in enumerate(sets[0][1]) if j != i % 5] + [f])
        for i, f in enumerate(approved_symbols()[3000:3010])
    ]
    sets[0] = ("source", sets[0][1])
    corpus = build(tmp_path, sets + family, min_sets_per_gene=1, test_share=0.5)
    splits = {SPLITS[corpus.splits[i]] for i, name in enumerate(corpus.names) if name.startswith("copy")}
    assert splits == {"train"}
    assert int(max(corpus.meta["cluster_sizes"], key=int)) >= 10


def test_library_split_holds_out_near_duplicates_and_shared_sets(tmp_path):
    sets = random_sets(number=200, num_genes=300)
    shared = ("renamed", sets[3][1])
    near = ("near", [*sets[4][1][1:], "TP53"])
    other = write_gmt_file(tmp_path / "wiki.gmt", [shared, near, *random_sets(number=40, num_genes=300, seed=9)])
    corpus = build(tmp_path, sets, more=[other], split="library", test_library=("wiki",), min_sets_per_gene=1)
    tested = [corpus.names[i] for i in corpus.indices("test")]
    assert {corpus.libraries[i] for i in corpus.indices("test")} == {"wiki"}
    assert "renamed" in tested and "near" in tested
    assert sets[3][0] not in [corpus.names[i] for i in corpus.indices("train")]
    train, test = as_sets(corpus, "train"), as_sets(corpus, "test")
    assert max(len(a & b) / len(a | b) for a in test for b in train) < 0.5


def test_tail_split_takes_the_last_sets(tmp_path):
    sets = random_sets(number=200, num_genes=300)
    sets.append(("copy of the first", [*sets[0][1][:-1], "TP53"]))
    corpus = build(tmp_path, sets, split="tail", min_sets_per_gene=1)
    assert [corpus.names[i] for i in corpus.indices("test")] == [name for name, _ in sets[-10:]]
    assert len(corpus.indices("validation")) == 2
    assert sets[0][0] in corpus.names
    corpus = build(tmp_path, sets, split="tail", drop_near_duplicates=True, min_sets_per_gene=1)
    assert sets[0][0] not in corpus.names


def test_vocabulary_by_falling_training_count_then_symbol(tmp_path):
    corpus = build(tmp_path, random_sets(), test_share=0.2)
    vocabulary = corpus.vocabulary
    training = np.concatenate([corpus.genes(index) for index in corpus.indices("train")])
    np.testing.assert_array_equal(vocabulary.counts, np.bincount(training, minlength=vocabulary.size))
    keys = list(zip(-vocabulary.counts[NUM_SPECIAL:], vocabulary.symbols[NUM_SPECIAL:], strict=True))
    assert keys == sorted(keys)


def test_mouse_sets_and_dates_are_reported(tmp_path):
    sets = [("mouse", ["Trp53", "Mdm2", "Brca1"]), ("dates", ["2-Sep", "1-Mar", "TP53"])]
    corpus = build(tmp_path, sets, **{**OPEN, "min_mapped": 0.5})
    assert corpus.meta["harmonisation"]["looks_like_mouse"] == {"sets": 1, "libraries": {"lib": 1}}
    assert [(d["symbol"], d["mapped_to"]) for d in corpus.meta["harmonisation"]["dates"]] == [
        ("1-Mar", None),
        ("2-Sep", "SEPTIN2"),
    ]
    corpus = build(tmp_path, sets, **{**OPEN, "min_mapped": 0.5, "case_insensitive": True})
    assert corpus.names == ["mouse", "dates"]


def test_sets_in_lower_case_are_told_of_the_option(tmp_path, capsys):
    sets = [("lower", ["tp53", "mdm2"]), ("upper", ["TP53", "MDM2", "brca1"]), ("no genes", ["abcde", "fghij"])]
    corpus = build(tmp_path, sets, **{**OPEN, "min_mapped": 0.5})
    assert corpus.names == ["upper"]
    assert "sets in lower case: 1 in lib (1); --case-insensitive matches them by name" in capsys.readouterr().err
    assert build(tmp_path, sets, **{**OPEN, "case_insensitive": True}).names == ["lower", "upper"]
    build(tmp_path, sets[1:], **{**OPEN, "min_mapped": 0.5})
    assert "lower case" not in capsys.readouterr().err


def test_a_hold_out_that_holds_nothing_out_is_an_error(tmp_path):
    file = write_gmt_file(tmp_path / "mouse.gmt", [("m", ["Trp53", "Mdm2"])])
    with pytest.raises(UserError, match="nothing would be held out"):
        build(tmp_path, random_sets(number=60), holdout=(file,), **OPEN)


def test_a_split_that_ends_empty_is_an_error(tmp_path):
    genes = approved_symbols()[:30]
    alike = [(f"s{i}", [gene for j, gene in enumerate(genes) if j != i]) for i in range(30)]
    with pytest.raises(UserError, match="no validation set is left"):
        build(tmp_path, alike)
    mouse = write_gmt_file(tmp_path / "mouse.gmt", [("m", ["Trp53", "Mdm2"])])
    with pytest.raises(UserError, match="--test-library mouse: none of its sets"):
        build(tmp_path, random_sets(), more=[mouse], split="library", test_library=("mouse",))


@pytest.mark.parametrize("options", [{"min_mapped": 1.0}, {"min_sets_per_gene": 99}, {"min_genes": 99}])
def test_nothing_left_names_the_option_and_shows_the_counts(tmp_path, capsys, options):
    flag = "--" + next(iter(options)).replace("_", "-")
    with pytest.raises(UserError, match=f"no gene set is left .*; it is decided by {flag}$"):
        build(tmp_path, [("s", ["TP53", "MDM2", "NOTAGENE"])], **{**OPEN, "min_mapped": 0.5, **options})
    shown = [line.split() for line in capsys.readouterr().err.splitlines()]
    assert ["read", "1", "3", "3"] in shown and shown[-1][-3:] == ["0", "0", "0"]


def test_limit_between_splits_is_its_own_setting(tmp_path):
    sets = random_sets(number=300, num_genes=60, seed=4)
    corpus = build(tmp_path, sets, split_jaccard=0.28, max_jaccard=0.9, min_sets_per_gene=1, test_share=0.1)
    train, test = as_sets(corpus, "train"), as_sets(corpus, "test")
    assert max(len(a & b) / len(a | b) for a in test for b in train) < 0.28


def test_repeated_names_in_a_library_are_counted(tmp_path):
    corpus = build(tmp_path, [("a", ["TP53", "MDM2"]), ("a", ["TP53", "BRCA1"])], **OPEN)
    assert corpus.names == ["a", "a"]
    assert corpus.meta["problems"] == {"set names repeated within a library": 1}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"min_mapped": 1.5}, "--min-mapped 1.5"),
        ({"max_jaccard": 0.0}, "must be above 0"),
        ({"validation_share": 0.5, "test_share": 0.5}, "under 1"),
        ({"split": "library"}, "go together"),
        ({"split": "library", "test_library": ("lab",)}, "the nearest is lib"),
        ({"seed": -1}, "--seed -1"),
        ({"drop_near_duplicates": True}, "only for --split tail"),
        ({"min_genes": 10**6}, "no gene set is left"),
        ({"min_genes": 0}, "at least 1"),
    ],
)
def test_bad_options(tmp_path, options, words):
    with pytest.raises(UserError, match=words):
        build(tmp_path, random_sets(number=30), **options)
