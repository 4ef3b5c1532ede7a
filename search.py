"""Query expansion for a search engine: a model adds words to a query, and learns from what comes back.

    torchrun search.py                            the embedded collection, an expander from nothing
    torchrun search.py --corpus DIR --model NAME  a collection in BEIR's layout, your model
    python search.py ask "heart kidney children"  the expansion of a query, the documents before and after

No reference answer exists here, only a score: reward +1 where the results are better than the query's own. The engine
is BM25, in data/bm25.py.
"""

import collections
import dataclasses
import os
import re
import sys
import time
from itertools import combinations
from typing import Optional

import numpy as np

import eval as evaluation
import train
from data import library
from data.tasks import render_prompt, without_marks
from data.rollouts import read_rollouts, write_rollouts
from engine import measures, run_folder, sampler
from engine.bm25 import (
    ANALYSERS,
    document_ids,
    index_corpus,
    measure,
    open_index,
    place,
    read_topics,
    search_many,
    texts,
)
from engine.common import Problem, parse, part_of, read_json, run_main, say, setting, table, whole_file, write_json
from engine.parallel import barrier, gather, rank, start_ranks, world

# ---- the task: a query, the words that the model adds to it, and what comes back ----

ASK = ("Which other words would the documents hold that answer this search query? Write at most ten of them, technical "
       "terms and synonyms, on one line, and nothing else.")
EXAMPLES = """Query: aspirin after a heart attack
Words: acetylsalicylic acid antiplatelet myocardial infarction secondary prevention

Query: why do leaves turn yellow
Words: chlorosis chlorophyll foliage nitrogen iron deficiency senescence

Query: laws on keeping bees in town
Words: apiculture beekeeping urban ordinance zoning hive regulation"""
STOP = "\nQuery:"  # a plain model runs on to a query of its own
FAULTS = ("no words", "repeats", "cut off")
SHOWN = ("recall@10", "ndcg@10", "mrr")
NAMES = {"sft": "positives only", "topr": "TOPR", "reinforce": "naive REINFORCE", "is": "importance sampling",
         "tis": "truncated importance sampling"}


@dataclasses.dataclass
class Settings:
    corpus: str = setting("", "collection to search, a folder in BEIR's layout (none: the embedded one, made here)")
    model: str = setting("", "expander to start from: a directory or a hub name (none: the embedded one, made here)")
    out: str = setting("", "folder for all that is made (default: runs/search-CORPUS)")
    split: str = setting("test", "judged queries to measure on")
    train_split: str = setting("train", "judged queries to learn from")
    queries: int = setting(0, "how many queries to learn from (0: all)")
    test_queries: int = setting(0, "how many queries to measure on (0: all)")
    # the engine
    k1: float = setting(0.9, "of BM25: how much further occurrences of a word add")
    b: float = setting(0.4, "of BM25: how much the length of a document takes away, 0 to 1")
    analyser: str = setting("simple", "how a text becomes words", tuple(ANALYSERS))
    # the reward
    metric: str = setting("recall@10", "what is rewarded: recall, ndcg or p at a depth, map or mrr")
    bar: Optional[float] = setting(None, "value that earns +1 (none: any above that of the query without expansion)")
    repeats: int = setting(2, "how often an expansion may hold the same word", least=1)
    # training: train.py --help says more
    losses: str = setting("sft,topr", "what to train with and to compare, by commas; topr:0.4 takes the baseline that "
                          "makes the effective share of positives 0.4")
    optimizer: str = setting("adafactor", "update rule", ("adafactor", "adamw"))
    learning_rate: float = setting(5e-7, "size of a step")
    epochs: int = setting(1, "passes over the rollouts", least=1)
    sequences: int = setting(64, "completions in an optimizer step, over all ranks", least=1)
    together: int = setting(4, "completions of a query that follow each other in the random order: they share a row",
                            least=1)
    tokens_per_pass: int = setting(16384, "tokens in a forward pass, padding included", least=1)
    # sampling: eval.py --help says more
    samples: int = setting(16, "expansions of each query", least=1)
    temperature: float = setting(1.0, "of sampling")
    top_k: int = setting(0, "sample from the k likeliest tokens (0: all)")
    max_new_tokens: int = setting(64, "longest expansion", least=1)
    batch_size: int = setting(256, "expansions written at once", least=1)
    precision: str = setting("float32", "of weights and arithmetic while sampling, of the arithmetic in training",
                             ("float32", "bfloat16"))
    seed: int = setting(0, "of the first run")
    seeds: int = setting(1, "runs to average, each with the next seed", least=1)


EMBEDDED = dict(optimizer="adamw", learning_rate=1e-3, epochs=2, sequences=128, prompt_group=1, tokens_per_pass=4096,
                max_new_tokens=12, batch_size=512, seeds=3)


def make_prompt(query, tokenizer, settings):
    """Exactly what the model sees: the chat template where the tokenizer has one, else three worked examples. The
    embedded expander knows no English: it sees the words of the query alone."""
    if not settings.model:
        return " ".join(ANALYSERS[settings.analyser](query))
    query = " ".join(without_marks(query, tokenizer).split())
    return render_prompt(f"{ASK}\n\nQuery: {query}", f"{EXAMPLES}\n\nQuery: {query}\nWords:", tokenizer)


def read_expansion(row, settings):
    """(words that a completion adds to its query, its fault or None). With a fault the query is searched alone."""
    text, stopped, _ = row["completion"].partition(STOP)
    words = ANALYSERS[settings.analyser](text)
    most = max(collections.Counter(words).values(), default=0)
    present = (not words, most > settings.repeats, row.get("finish") == "length" and not stopped)
    fault = next((name for name, there in zip(FAULTS, present) if there), None)
    return ([] if fault else words), fault


def count_faults(rows, settings):
    found = collections.Counter(read_expansion(row, settings)[1] for row in rows)
    return {name: found[name] for name in FAULTS}


def read_split(settings, index, split, count, besides=()):
    """{query id: (text, {number of a document: grade})} of the queries that can be judged, and are not `besides`."""
    queries, judgements = read_topics(settings.corpus, index, split)
    topics = {id: (text, {place(index.ids, document): grade for document, grade in judgements[id].items()})
              for id, text in queries.items() if max(judgements[id].values()) > 0 and text not in besides}
    if len(topics) < len(queries):
        say(f"{settings.corpus}: {len(queries) - len(topics)} of {len(queries)} {split} queries are left out: they have no "
            "relevant document, or are test queries too")
    if not topics:
        raise Problem(f"{settings.corpus}: the split {split!r} has no query with a relevant document")
    return dict(list(topics.items())[:count or None])


def look_up(index, topics, rows, names, settings):
    """Each measure of what query + expansion bring back, as one batch that the ranks share: array [rows, names]."""
    words, mine = ANALYSERS[settings.analyser], rows[rank()::world()]
    queries = [words(topics[row["id"]][0]) + read_expansion(row, settings)[0] for row in mine]
    found = search_many(index, queries, max(int(name.partition("@")[2] or 1000) for name in names), "searching")
    part = [[measure(name, numbers.tolist(), topics[row["id"]][1]) for name in names]
            for row, (numbers, _) in zip(mine, found)]
    scores = np.empty((len(rows), len(names)))
    for number, theirs in enumerate(gather(part)):
        scores[number::world()] = np.reshape(theirs, (-1, len(names)))
    return scores


def alone(topics):
    """Rows of the queries without an expansion."""
    return [{"id": id, "completion": ""} for id in topics]


def reward(index, topics, rows, settings):
    """The rows with reward +1 where the expansion has no fault and what it brings back is good enough, else -1."""
    before = dict(zip(topics, look_up(index, topics, alone(topics), [settings.metric], settings)[:, 0]))
    rewarded = []
    for row, score in zip(rows, look_up(index, topics, rows, [settings.metric], settings)[:, 0].tolist()):
        words, fault = read_expansion(row, settings)
        enough = score > before[row["id"]] if settings.bar is None else score >= settings.bar
        rewarded.append({**row, "reward": 1.0 if enough and not fault else -1.0, "answer": " ".join(words) or None,
                         "score": score})
    return rewarded


# ---- the job: sample, reward, train, measure; the sampler is eval.py's, the loop train.py's ----


def main():
    if sys.argv[1:2] == ["ask"]:
        return ask(sys.argv[2:])
    settings, start = parse(Settings, description=__doc__), time.time()
    if not settings.model:
        settings = parse(Settings, description=__doc__, **EMBEDDED)
    start_ranks()
    index = prepare(settings)
    test = read_split(settings, index, settings.split, settings.test_queries)
    learn = read_split(settings, index, settings.train_split, settings.queries, {text for text, _ in test.values()})
    bases = {seed: settings.model or train.base_policy(f"{settings.out}/seed{seed}", seed, library, steps=500, layers=2)
             for seed in range(settings.seed, settings.seed + settings.seeds)}
    compare(settings, index, learn, test, bases, start)
    if not settings.model and settings.bar is None:
        say("\nWhere positives are few the baseline matters. With +1 from a value of 0.6 on, the first seed alone:")
        few = dataclasses.replace(settings, out=f"{settings.out}/few", bar=0.6, losses="sft,topr,topr:0.4")
        compare(few, index, learn, test, {settings.seed: bases[settings.seed]}, start)


def prepare(settings):
    """Checks what can be checked before hours of work; makes the collection and the index. Returns the index."""
    measure(settings.metric, [], {})  # a Problem where there is no such measure
    for loss in settings.losses.split(","):
        if not re.fullmatch(f"{'|'.join(NAMES)}|topr:0?[.][0-9]+", loss):
            raise Problem(f"--losses {settings.losses}: {loss!r} is not one of {', '.join(NAMES)} and topr:SHARE")
    if settings.corpus and not settings.model:
        raise Problem("--corpus needs --model: the embedded expander knows the embedded collection alone")
    settings.out = settings.out or f"runs/search-{os.path.basename(os.path.normpath(settings.corpus or 'library'))}"
    embedded, settings.corpus = not settings.corpus, settings.corpus or f"{settings.out}/corpus"
    if rank() == 0:
        if embedded and not os.path.exists(f"{settings.corpus}/qrels.tsv"):
            library.write_collection(settings.corpus)
        index_corpus(f"{settings.corpus}/corpus.jsonl", f"{settings.out}/index", settings.k1, settings.b, settings.analyser)
    barrier()
    index = open_index(f"{settings.out}/index")
    check_same_job(settings, index)
    return index


def check_same_job(settings, index):
    """What a folder holds is reused, so it belongs to one job: another one is refused, naming what differs."""
    path, free = f"{settings.out}/job.json", ("losses", "seeds", "batch_size")  # what is kept does not hang on these
    now = {**vars(settings), "fingerprint": index.facts["corpus"]}
    before = read_json(path) if os.path.exists(path) else now
    differ = [f"{name} was {before.get(name)!r} and is {now[name]!r}" for name in now
              if name not in free and before.get(name) != now[name]]
    if differ:
        raise Problem(f"{settings.out} holds another job: {'; '.join(differ)}. Use another --out, or remove it")
    barrier()
    if rank() == 0:
        write_json(path, now)


def compare(settings, index, learn, test, bases, start):
    """Trains with each loss from each seed's base expander, measures on the test queries, shows what came of it."""
    names, runs, learned = list(dict.fromkeys([settings.metric, *SHOWN])), [], []
    for seed, base in bases.items():
        folder = f"{settings.out}/seed{seed}"
        rollouts, facts = rewarded_rollouts(settings, index, learn, base, folder, seed)
        policies = {"base": base}
        for loss in settings.losses.split(","):
            name, _, share = loss.partition(":")
            title = NAMES[name] + (f" (share {share})" if share else "")
            policies[title] = trained(settings, base, rollouts, folder, name, share, seed)
        runs.append({name: measured(settings, index, test, policy, names, folder, seed)
                     for name, policy in policies.items()})
        learned.append(facts)
    none = look_up(index, test, alone(test), names, settings)
    report(settings, names, none, runs, {"learned": learned, "seconds": time.time() - start})


def expand(settings, policy, topics, seed, out="", **changes):
    """Rollout rows that a policy writes for the queries, with a reward of -1 that holds the place of the real one."""
    model, tokenizer = sampler.load_model(policy, settings.precision, start_ranks())
    questions = [{"id": id, "question": text, "prompt": make_prompt(text, tokenizer, settings)}
                 for id, (text, _) in topics.items()]
    sampling = part_of(evaluation.Settings, settings, model=policy, seed=seed, **changes)
    return sampler.sample_rollouts(model, tokenizer, questions, lambda *_: (None, -1.0), sampling, out)


def rewarded_rollouts(settings, index, topics, policy, folder, seed):
    """(the rollout file that a policy wrote on the training queries, made once; what it holds)"""
    path, unrewarded = f"{folder}/rollouts.jsonl", f"{folder}/unrewarded.jsonl"
    if os.path.exists(path):
        say(f"{path}: the rollouts are there, reusing them")
    else:
        rows = reward(index, topics, expand(settings, policy, topics, seed, unrewarded), settings)
        if rank() == 0:
            write_rollouts(path, rows)
            os.remove(unrewarded)
        barrier()
    rows = read_rollouts(path)
    facts = {"expansions": len(rows), "positive": sum(row["reward"] > 0 for row in rows), **count_faults(rows, settings)}
    say(f"{path}: " + ", ".join(f"{name} {count:,}" for name, count in facts.items()))
    return path, facts


def trained(settings, policy, rollouts, folder, loss, share, seed):
    """The folder of the expander that a loss makes of a policy."""
    this = part_of(train.Settings, settings, model=policy, rollouts=rollouts, out=f"{folder}/{loss}{share}", loss=loss,
                   seed=seed, positive_share=float(share) if share else None)
    train.train_or_reuse(this)
    return this.out


KINDS = {"sampled": {}, "greedy": {"temperature": 0.0, "samples": 1}}


def measured(settings, index, topics, policy, names, folder, seed):
    """For each kind the measures of each test query, and the share of expansions with each fault; kept as a file."""
    path = f"{folder}/measures-{os.path.basename(os.path.normpath(policy))}.json"
    if not os.path.exists(path):
        result = {}
        for kind, changes in KINDS.items():
            rows = expand(settings, policy, topics, seed, **changes)
            scores = look_up(index, topics, rows, names, settings).reshape(len(topics), -1, len(names))
            result[kind] = {"scores": scores.mean(1).tolist(), "faults": [
                count / len(rows) for count in count_faults(rows, settings).values()]}
        if rank() == 0:
            write_json(path, result)
        barrier()
    return read_json(path)


# ---- what came of it ----


def report(settings, names, none, runs, facts):
    """Prints means, paired differences over the queries and a picture; writes results.json and results.svg."""
    intervals = lambda values: dict(zip(names, map(measures.interval, values.mean(0).T)))  # [seeds, queries, names]
    every = lambda what: {f"{policy}, {kind}": np.array([run[policy][kind][what] for run in runs])
                          for kind in KINDS for policy in runs[0]}
    scores, faults = {"no expansion": none[None]} | every("scores"), every("faults")  # faults: [seeds, FAULTS]
    pairs = {f"{b} - {a}, {kind}": intervals(scores[f"{b}, {kind}"] - scores[f"{a}, {kind}"])
             for kind in KINDS for a, b in combinations(runs[0], 2)}
    means = {row: intervals(values) for row, values in scores.items()}
    seeds = {row: values[:, :, 0].mean(1).round(4).tolist() for row, values in scores.items()}
    say(table((f"{len(none)} test queries", *names, f"{names[0]} by seed", *FAULTS), [
        (row, *(f"{m['mean']:.3f} +-{m['high'] - m['mean']:.3f}" for m in means[row].values()),
         " ".join(f"{mean:.3f}" for mean in seeds[row]),
         *([f"{share:.1%}" for share in faults[row].mean(0)] if row in faults else [""] * len(FAULTS))) for row in scores]))
    say()
    say(table(("difference, 95% interval", *names), [
        (pair, *(f"{m['mean']:+.3f} ({m['low']:+.3f} to {m['high']:+.3f})" for m in measures.values()))
        for pair, measures in pairs.items()]))
    say(f"\n{names[0]}")
    for row, m in means.items():
        say(f"{row:>30} |{'#' * round(60 * m[names[0]]['mean'])} {m[names[0]]['mean']:.3f}")
    if rank() == 0:
        write_json(f"{settings.out}/results.json", {
            "settings": vars(settings), **facts, "means": means, "by_seed": seeds, "differences": pairs,
            "faults": {row: dict(zip(FAULTS, shares.mean(0).tolist())) for row, shares in faults.items()}})
        draw({row: m[names[0]]["mean"] for row, m in means.items()}, names[0], f"{settings.out}/results.svg")
    say(f"{facts['seconds']:.0f} s; the expanders, their rollouts and the results are in {settings.out}")


def draw(means, title, path):
    """Bars, as a picture that any browser shows."""
    text = lambda x, y, words, anchor="start": f'<text x="{x:.0f}" y="{y}" text-anchor="{anchor}">{words}</text>'
    bar = lambda y, length: f'<rect x="300" y="{y}" width="{length:.0f}" height="18" fill="steelblue"/>'
    rows = [text(290, 24 * n + 14, row, "end") + bar(24 * n, 400 * mean) + text(306 + 400 * mean, 24 * n + 14, f"{mean:.3f}")
            for n, (row, mean) in enumerate(means.items(), 1)]
    with whole_file(path) as file:
        file.write(f'<svg xmlns="http://www.w3.org/2000/svg" width="760" height="{24 * len(rows) + 30}" '
                   f'font-family="sans-serif" font-size="14">{text(300, 14, title)}{"".join(rows)}</svg>\n')


# ---- one typed query ----


@dataclasses.dataclass
class Ask:
    out: str = setting("runs/search-library", "folder of the job that trained the expander")
    expander: str = setting("seed0/topr", "which of its expanders")
    documents: int = setting(5, "how many documents to show", least=1)


def ask(argv):
    """Shows the likeliest expansion of a typed query, and the best documents without it and with it."""
    query, options = (argv[0], argv[1:]) if argv and not argv[0].startswith("-") else ("", argv)
    wish = parse(Ask, options, 'python search.py ask "a query": its expansion, the documents before and after')
    if not re.search(r"\w", query):
        raise Problem('the query has no words: python search.py ask "heart kidney children"')
    if not run_folder.finished(train.Settings(out=f"{wish.out}/{wish.expander}")):
        raise Problem(f"no trained expander in {wish.out}/{wish.expander}: torchrun search.py --out {wish.out} makes one")
    job = read_json(f"{wish.out}/job.json")
    settings = Settings(**{name: job[name] for name in vars(Settings())})
    query = query.encode(errors="replace").decode()  # a terminal can hand over what is no text
    words = ANALYSERS[settings.analyser](query)
    if not words:
        raise Problem('the query has no words: python search.py ask "heart kidney children"')
    row, = expand(settings, f"{wish.out}/{wish.expander}", {"query": (query, {})}, 0, temperature=0.0, samples=1)
    added, fault = read_expansion(row, settings)
    say(f"query      {query}\nexpansion  {' '.join(added)}" + (f"none ({fault}): {row['completion']}" if fault else ""))
    index = open_index(f"{wish.out}/index")
    found = [document_ids(index, numbers) for numbers, _ in search_many(index, [words, words + added], wish.documents)]
    text_of = {id: text for _, id, text in texts(f"{settings.corpus}/corpus.jsonl") if id in {*found[0], *found[1]}}
    for title, ids in zip(("the query alone finds", "query and expansion find"), found):
        say(f"\n{title}")
        for number, id in enumerate(ids, 1):
            say(f"{number:3}  {id:8}  {' '.join(text_of[id].split()):.100}")


if __name__ == "__main__":
    run_main(main)
