"""Text to tokens and back."""

import difflib
import functools
import unicodedata


def all_token_ids(rows, tokenizer):
    """(prompt_ids, completion_ids) of each row: the file's own where it holds them, made from the text where not.

    For many rows at once, which takes a fraction of the time.
    """
    missing = lambda field: list(dict.fromkeys(row[field] for row in rows if row.get(f"{field}_ids") is None))
    prompts, completions, end = missing("prompt"), missing("completion"), tokenizer.eos_token_id
    prompts = dict(zip(prompts, (with_start(ids, tokenizer) for ids in encode(prompts, tokenizer))))
    completions = dict(zip(completions, encode(completions, tokenizer)))
    tokens = []
    for row in rows:
        completion_ids = row.get("completion_ids")
        if completion_ids is None:
            completion_ids = completions[row["completion"]]
            if row.get("finish") != "length" and completion_ids[-1:] != [end]:
                completion_ids = completion_ids + [end]  # it stopped, so it wrote the end token
        prompt_ids = row.get("prompt_ids")
        tokens.append((prompts[row["prompt"]] if prompt_ids is None else prompt_ids, completion_ids))
    return tokens


def encode(texts, tokenizer):
    """Texts to tokens, no special ones added; past transformers' own wrapping, which takes longer than the work."""
    if len(texts) < 2 or not tokenizer.is_fast:
        return [tokenizer(text, add_special_tokens=False).input_ids for text in texts]
    tokenizer("")  # turns off the truncation and padding that a tokenizer.json may ask for
    return [found.ids for found in tokenizer.backend_tokenizer.encode_batch_fast(texts, add_special_tokens=False)]


def decode(ids, tokenizer, skip_special_tokens=True):
    """Lists of tokens to texts."""
    if tokenizer.is_fast:
        return tokenizer.backend_tokenizer.decode_batch(ids, skip_special_tokens=skip_special_tokens)
    return tokenizer.batch_decode(ids, skip_special_tokens=skip_special_tokens)


def foreign_tokens(rows, tokenizer):
    """For each row whether its completion_ids clearly say something else than its completion: another tokenizer's.

    Only clear cases: engines differ in white space, special tokens, stop words that they cut off, and in half a
    character at the end.
    """
    held = [row for row in rows if row.get("completion_ids") and max(row["completion_ids"]) < 2**31]
    texts = dict(zip(map(id, held), decode([row["completion_ids"] for row in held], tokenizer)))
    same = lambda row: texts.get(id(row), row["completion"]) == row["completion"]
    return [not same(row) and not fits(row, texts[id(row)], tokenizer) for row in rows]


def fits(row, text, tokenizer):
    """Whether completion_ids, which decode to `text` and not quite to the completion, can still be its tokens."""
    ids, completion = row["completion_ids"], row["completion"]
    own = encode([completion], tokenizer)[0]  # words that the tokenizer does not know decode to nothing
    return alike(text, completion) or alike(*decode([ids], tokenizer, False), completion) or bool(own) and ids[: len(own)] == own


def alike(a, b):
    bare = lambda text: "".join(unicodedata.normalize("NFKC", text).replace("\ufffd", "").casefold().split())[:2000]
    a, b = bare(a), bare(b)
    if not a or not b or a.startswith(b) or b.startswith(a) or a.endswith(b) or b.endswith(a):
        return bool(a) or not b
    return difflib.SequenceMatcher(None, a, b, autojunk=False).ratio() > 0.7


def prompt_tokens(text, tokenizer):
    """The tokens a model sees: with its start token, once, also where a chat template has written it already."""
    return with_start(tokenizer(text, add_special_tokens=False).input_ids, tokenizer)


def with_start(ids, tokenizer):
    start = start_token(tokenizer)
    return [start] + ids if start is not None and ids[:1] != [start] else ids


@functools.lru_cache
def start_token(tokenizer):
    """The token that this tokenizer puts before every text, or None."""
    start = tokenizer.bos_token_id
    return start if start is not None and tokenizer("").input_ids[:1] == [start] else None
