"""The embedded search task: documents in medical terms, queries in everyday words.

    query      heart kidney children          what a lay person types
    document   ... renal cohort myocardial coronary trial nephritic ...
    expansion  cardiac coronary renal         what would find it

The base expander, a small model, imitates demonstrations that are often wrong (HABITS): terms of a
concept that is easily confused with the right one, terms of any concept, or the query again. No
demonstration says which terms are right, but the search engine's results do. Everything is
generated from a seed; nothing is downloaded.
"""

import random
import zlib
from itertools import combinations

from engine.common import whole_file
from engine.rollouts import write_rollouts

# Two everyday words, then three technical terms. Lines 1 and 2, 3 and 4 ... are easily confused.
CONCEPTS = [
    line.split()
    for line in """
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
""".strip().splitlines()
]
LAY, TECHNICAL = [words[:2] for words in CONCEPTS], [words[2:] for words in CONCEPTS]
FILLERS = """trial study cohort patients children adults elderly women men outcome risk factor
placebo dose daily weekly treatment care clinic hospital ward review survey report long short term
early late onset severe mild relapse remission follow visit group control sample rate""".split()
PAIRS = list(combinations(range(len(CONCEPTS)), 2))
CONCEPT_OF = {word: concept for concept, words in enumerate(LAY) for word in words}
HABITS = {  # what a demonstrated term is
    "right": 0.46,  # a technical term of the concept
    "confused": 0.24,  # a term of the concept that it is confused with
    "random": 0.10,  # a term of any concept
    "echo": 0.20,  # the everyday word itself
}
ECHO_ONLY = 0.2  # share of the demonstrations that only repeat the query


def make_documents(rng):
    """{text: its concepts}: terms of three concepts, and misleading words."""
    documents, concepts = {}, range(len(CONCEPTS))
    while len(documents) < 1000:
        chosen, words = rng.sample(concepts, 3), rng.sample(FILLERS, 10)
        for concept in chosen:
            words += rng.choices(TECHNICAL[concept], k=rng.randint(2, 4))
            if rng.random() < 0.1:
                words.append(rng.choice(LAY[concept]))
        if rng.random() < 0.5:  # an everyday word of a concept that the document is not about
            others = [concept for concept in concepts if concept not in chosen]
            words.append(rng.choice(LAY[rng.choice(others)]))
        rng.shuffle(words)
        documents[" ".join(words)] = set(chosen)
    return documents


def split_of(pair):
    """A pair of concepts occurs in test queries or in training queries, never in both."""
    return ("test", "train", "train")[zlib.crc32(repr(sorted(pair)).encode()) % 3]


def make_query(pair, rng):
    """An everyday word for each concept of the pair, and a filler."""
    words = [rng.choice(LAY[concept]) for concept in pair] + [rng.choice(FILLERS)]
    rng.shuffle(words)
    return " ".join(words)


def write_collection(folder):
    """A folder in BEIR's layout. A document is relevant to a query if it has both concepts."""
    rng = random.Random("0 library")
    documents = make_documents(rng)
    write_texts(f"{folder}/corpus.jsonl", "d", documents)
    relevant = {
        pair: [n for n, concepts in enumerate(documents.values()) if concepts >= {*pair}]
        for pair in PAIRS
    }
    for split, tail, count in (("train", "_train", 512), ("test", "", 250)):
        pairs = [pair for pair in PAIRS if relevant[pair] and split_of(pair) == split]
        queries = {}  # text -> pair: the texts differ
        while len(queries) < count:
            pair = rng.choice(pairs)
            queries[make_query(pair, rng)] = pair
        write_texts(f"{folder}/queries{tail}.jsonl", split, queries)
        with whole_file(f"{folder}/qrels{tail}.tsv") as file:
            for n, pair in enumerate(queries.values()):
                file.writelines(f"{split}{n}\td{d}\t1\n" for d in relevant[pair])


def write_texts(path, prefix, texts):
    write_rollouts(path, ({"_id": f"{prefix}{n}", "text": text} for n, text in enumerate(texts)))


def demonstrate(query, rng):
    """Terms for the everyday words of a query, drawn with the habits' frequencies."""
    words = [word for word in query.split() if word in CONCEPT_OF]
    if rng.random() < ECHO_ONLY:
        return " ".join(words)
    terms = []
    for word in words * 2:
        (habit,) = rng.choices(list(HABITS), HABITS.values())
        concept, other = CONCEPT_OF[word], rng.randrange(len(CONCEPTS))
        concept = {"confused": concept ^ 1, "random": other}.get(habit, concept)
        terms.append(word if habit == "echo" else rng.choice(TECHNICAL[concept]))
    return " ".join(terms)


def demonstrations(count, seed):
    """Rows to imitate: reward +1 whether right or wrong; this is how the base expander learns."""
    rng = random.Random(f"{seed} demonstrations")
    pairs = [pair for pair in PAIRS if split_of(pair) == "train"]
    prompts = [make_query(rng.choice(pairs), rng) for _ in range(count)]
    return [
        {
            "id": f"demonstration{n}",
            "prompt": prompt,
            "completion": demonstrate(prompt, rng),
            "reward": 1.0,
        }
        for n, prompt in enumerate(prompts)
    ]


def vocabulary():
    return set(FILLERS).union(*CONCEPTS)
