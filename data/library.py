"""The embedded collection: documents in doctors' words, queries in everyday ones, and a small model between them.

    query      heart kidney children          what a lay person types
    document   ... renal cohort myocardial coronary trial nephritic ...
    expansion  cardiac coronary renal         what would find it

The base expander imitates demonstrations that are often wrong (HABITS): it writes words of a concept that is easily
confused with the right one, of any concept, or repeats the query. No demonstration says which words are right, but
the search engine's results do. Everything is made here from a seed; nothing is downloaded.
"""

import json
import os
import random
import zlib
from itertools import combinations

from engine.common import whole_file

# Two everyday words, then three technical ones. Lines 1 and 2, 3 and 4 ... are easily confused with each other.
CONCEPTS = [line.split() for line in """
heart ticker cardiac coronary myocardial
chest breastbone thoracic sternal mediastinal
kidney kidneys renal nephritic glomerular
bladder waterworks vesical urinary cystic
liver livers hepatic hepatocellular cirrhotic
gall gallbladder biliary bilious cholecystic
lung breathing pulmonary bronchial alveolar
throat windpipe pharyngeal laryngeal tracheal
stomach tummy gastric peptic pyloric
bowel gut intestinal colonic enteric
brain mind cerebral cortical encephalic
skull head cranial parietal occipital
eye sight ocular retinal optic
eyelid lashes palpebral blepharal ciliary
ear hearing auditory cochlear aural
nose smell nasal olfactory rhinal
skin complexion cutaneous dermal epidermal
hair scalp follicular pilar alopecic
bone bones osseous osteal skeletal
joint knuckle articular synovial arthritic
muscle flesh muscular myogenic contractile
tendon sinew tendinous aponeurotic ligamentous
blood bleeding haematic haemorrhagic erythrocytic
vein veins venous varicose phlebitic
sugar sweet glycaemic insulinic diabetic
fat overweight adipose lipid obese
fever temperature febrile pyretic hyperthermic
sweat clammy sudoral hidrotic diaphoretic
tooth teeth dental odontic enamel
gum gums gingival periodontal alveolodental
itch itchy pruritic urticarial histaminic
rash spots exanthematous eruptive macular
sleep tired somnolent hypnotic narcoleptic
faint dizzy syncopal vertiginous vestibular
germ bug bacterial microbial septic
flu cold viral influenzal catarrhal
birth labour obstetric parturient perinatal
womb belly uterine endometrial cervical
sad blue depressive melancholic dysthymic
scared nervous anxious phobic panicky
""".strip().splitlines()]
LAY, TECHNICAL = [words[:2] for words in CONCEPTS], [words[2:] for words in CONCEPTS]
FILLERS = """trial study cohort patients children adults elderly women men outcome risk factor placebo dose daily weekly
treatment care clinic hospital ward review survey report long short term early late onset severe mild relapse remission
follow visit group control sample rate""".split()
HABITS = {  # what a demonstrated term is
    "right": 0.46,  # a technical word of the concept
    "confused": 0.24,  # one of the concept that it is confused with
    "random": 0.10,  # one of any concept
    "echo": 0.20,  # the everyday word itself
}
ECHO_ONLY = 0.2  # of the demonstrations say the query again and nothing else


def make_documents(rng, count=1000):
    """(concepts, text) of each document: three concepts in technical words, and what misleads a search for lay ones."""
    documents = []
    for _ in range(count):
        concepts = rng.sample(range(len(CONCEPTS)), 3)
        words = rng.sample(FILLERS, 10)
        for concept in concepts:
            words += rng.choices(TECHNICAL[concept], k=rng.randint(2, 4))
            words += [rng.choice(LAY[concept])] if rng.random() < 0.1 else []
        if rng.random() < 0.5:  # an everyday word that is not what the document is about
            words.append(rng.choice(LAY[rng.choice([c for c in range(len(CONCEPTS)) if c not in concepts])]))
        rng.shuffle(words)
        documents.append((set(concepts), " ".join(words)))
    return documents


def split_of(pair):
    """A pair of concepts stands in test queries or in training queries, never in both."""
    return ("test", "train", "train")[zlib.crc32(repr(sorted(pair)).encode()) % 3]


def make_query(pair, rng):
    """An everyday word for each concept of the pair, and a filler."""
    words = [rng.choice(LAY[concept]) for concept in pair] + [rng.choice(FILLERS)]
    rng.shuffle(words)
    return " ".join(words)


def write_collection(folder, seed=0, counts={"train": 512, "test": 250}):
    """corpus.jsonl, and for each split its queries and judgements: relevant are the documents with both concepts."""
    rng = random.Random(f"{seed} library")
    documents = make_documents(rng)
    write_lines(folder, "corpus.jsonl", ({"_id": f"d{n}", "text": text} for n, (_, text) in enumerate(documents)))
    pairs = {pair: [n for n, (concepts, _) in enumerate(documents) if concepts >= set(pair)]
             for pair in combinations(range(len(CONCEPTS)), 2)}
    for split, tail in (("train", "_train"), ("test", "")):
        mine = [pair for pair, relevant in pairs.items() if relevant and split_of(pair) == split]
        queries = {}  # text -> pair: no query stands there twice
        while len(queries) < counts[split]:
            pair = rng.choice(mine)
            queries[make_query(pair, rng)] = pair
        write_lines(folder, f"queries{tail}.jsonl", ({"_id": f"{split}{n}", "text": text} for n, text in enumerate(queries)))
        with whole_file(os.path.join(folder, f"qrels{tail}.tsv")) as file:
            file.writelines(f"{split}{n}\td{d}\t1\n" for n, pair in enumerate(queries.values()) for d in pairs[pair])


def write_lines(folder, name, rows):
    with whole_file(os.path.join(folder, name)) as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def demonstrate(query, rng, habits=HABITS, echo_only=ECHO_ONLY):
    """Terms for the everyday words of a query, as the habits have them."""
    concept_of = {word: concept for concept, words in enumerate(LAY) for word in words}
    words = [word for word in query.split() if word in concept_of]
    if rng.random() < echo_only:
        return " ".join(words)
    terms = []
    for word in words * 2:
        habit, concept = rng.choices(list(habits), habits.values())[0], concept_of[word]
        concept = {"confused": concept ^ 1, "random": rng.randrange(len(CONCEPTS))}.get(habit, concept)
        terms.append(word if habit == "echo" else rng.choice(TECHNICAL[concept]))
    return " ".join(terms)


def demonstrations(count, seed, tokenizer):
    """Rollout rows to imitate: reward +1 whether right or wrong, for this is how the base expander learned."""
    rng = random.Random(f"{seed} demonstrations")
    pairs = [pair for pair in combinations(range(len(CONCEPTS)), 2) if split_of(pair) == "train"]
    prompts = [make_query(rng.choice(pairs), rng) for _ in range(count)]
    completions = [demonstrate(prompt, rng) for prompt in prompts]
    prompt_ids, completion_ids = tokenizer(prompts).input_ids, tokenizer(completions, add_special_tokens=False).input_ids
    return [{"id": f"demonstration{n}", "prompt": prompt, "completion": completion, "reward": 1.0, "prompt_ids": before,
             "completion_ids": after + [tokenizer.eos_token_id]} for n, (prompt, completion, before, after)
            in enumerate(zip(prompts, completions, prompt_ids, completion_ids))]


def vocabulary():
    return {word for words in [*CONCEPTS, FILLERS] for word in words}
