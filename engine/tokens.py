"""Text to tokens and back, for many texts at once."""

import difflib
import unicodedata

from engine.common import Problem


def all_token_ids(rows, tokenizer, end_token):
    """(prompt_ids, completion_ids) of each row: the file's own, or made from its text."""
    prompts = missing_ids(rows, "prompt", tokenizer)
    completions = missing_ids(rows, "completion", tokenizer)
    tokens, start = [], start_tokens(tokenizer)
    for row in rows:
        before, after = row.get("prompt_ids"), row.get("completion_ids")
        if before is None:
            before = with_start(prompts[row["prompt"]], start)
        if after is None:
            after = completions[row["completion"]]
            if row.get("finish") != "length" and after[-1:] != [end_token]:
                after = after + [end_token]  # it stopped, so the policy wrote the end token
        tokens.append((before, after))
    return tokens


def missing_ids(rows, field, tokenizer):
    """{text: tokens} of the prompts or completions whose tokens are not in the file."""
    texts = {row[field]: None for row in rows if row.get(f"{field}_ids") is None}
    return dict(zip(texts, encode(list(texts), tokenizer)))


def encode(texts, tokenizer):
    """Texts to tokens without special ones; bypasses transformers' wrapper, the slower part."""
    if len(texts) < 2 or not tokenizer.is_fast:
        return [tokenizer(text, add_special_tokens=False).input_ids for text in texts]
    tokenizer("")  # turns off the truncation and padding that a tokenizer.json may ask for
    encodings = tokenizer.backend_tokenizer.encode_batch_fast(texts, add_special_tokens=False)
    return [encoding.ids for encoding in encodings]


def decode(ids, tokenizer, skip_special_tokens=True):
    """Lists of tokens to texts."""
    if tokenizer.is_fast:
        tokenizer = tokenizer.backend_tokenizer
        return tokenizer.decode_batch(ids, skip_special_tokens=skip_special_tokens)
    return tokenizer.batch_decode(ids, skip_special_tokens=skip_special_tokens)


def foreign_tokens(rows, tokenizer):
    """For each row whether its completion_ids clearly say something else than its completion.

    Only clear cases, the tokens of another tokenizer: engines differ in white space, special
    tokens, stop words that they cut off, and in half a character at the end.
    """
    ids = [row.get("completion_ids") or [] for row in rows]
    ids = [row if max(row, default=0) < 2**31 else [] for row in ids]
    return [bool(tokens) and text != row["completion"] and not fits(row, text, tokenizer)
            for row, tokens, text in zip(rows, ids, decode(ids, tokenizer))]


def fits(row, text, tokenizer):
    """Whether completion_ids, decoded to `text`, can still be the tokens of the completion."""
    ids, completion = row["completion_ids"], row["completion"]
    with_special, = decode([ids], tokenizer, skip_special_tokens=False)
    own, = encode([completion], tokenizer)  # words unknown to the tokenizer decode to nothing
    same_tokens = own and ids[: len(own)] == own
    return same_tokens or alike(text, completion) or alike(with_special, completion)


def alike(a, b):
    a, b = bare(a), bare(b)
    if not a or not b:
        return not b
    shorter, longer = sorted((a, b), key=len)
    if longer.startswith(shorter) or longer.endswith(shorter):
        return True
    return difflib.SequenceMatcher(None, a, b, autojunk=False).ratio() > 0.7


def bare(text):
    """Without white space, case and broken characters; enough of it to compare."""
    text = unicodedata.normalize("NFKC", text).replace("\ufffd", "").casefold()
    return "".join(text.split())[:2000]


def prompt_tokens(text, tokenizer):
    """What a model sees: with its start token, once, also if a chat template wrote it already."""
    ids = tokenizer(text, add_special_tokens=False).input_ids
    return with_start(ids, start_tokens(tokenizer))


def with_start(ids, start):
    return ids if ids[:1] == start else start + ids


def start_tokens(tokenizer):
    """The token that this tokenizer puts before every text, as a list: of one, or of none."""
    return [token for token in tokenizer("").input_ids[:1] if token == tokenizer.bos_token_id]


# ---- where a completion ends ----


def end_tokens(model, tokenizer):
    """Every token that ends a completion, in order; `model` may be its configuration, or None."""
    config = getattr(model, "config", model)
    ends = {tokenizer.eos_token_id}
    for source in (config and config.get_text_config(), getattr(model, "generation_config", None)):
        ids = getattr(source, "eos_token_id", None)  # a number, several, or None
        ends.update(ids if isinstance(ids, list) else [ids])
    ends.discard(None)
    if not ends:
        raise Problem("neither the tokenizer nor the model names an end-of-sequence token: "
                      "set eos_token_id in the model's generation_config.json")
    return sorted(ends)


def end_token_of(model, tokenizer):
    """The end token of a completion of which only the text is known; arguments as of end_tokens.

    It is the one that the chat template writes after an answer (Gemma and Phi end their turns with
    another than the tokenizer's eos), else eos.
    """
    ends, answer, after = end_tokens(model, tokenizer), "An answer.", []
    if getattr(tokenizer, "chat_template", None):
        turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": answer}]
        text = tokenizer.apply_chat_template(turns, tokenize=False).rpartition(answer)[2]
        after = tokenizer(text, add_special_tokens=False).input_ids
    return next((token for token in [*after, tokenizer.eos_token_id] if token in ends), ends[0])


def stop_position(text, stop):
    """Where the first of the stop strings begins in a text; its length when none is in it."""
    return min([text.find(mark) for mark in stop if mark and mark in text], default=len(text))


def until_stop(ids, ended, stop, tokenizer):
    """The completion, finish and completion_ids of a row; `ended`: the last token ends it.

    A task that stops a completion at a string of its own is what ends it, not the model. So no end
    token is added, and finish is "stop": the text goes up to the string, the tokens up to the last
    that holds some of that text (at least one: a row needs a token). log mu is that of these tokens
    alone, each was sampled, and pi/mu is 1 before the first step as for any other row.
    """
    text = tokenizer.decode(ids[:-1] if ended else ids, skip_special_tokens=True)
    end = stop_position(text, stop)
    if end == len(text):
        finish = "stop" if ended else "length"
        return {"completion": text, "finish": finish, "completion_ids": ids}
    count = len(ids)
    while count > 1 and len(tokenizer.decode(ids[: count - 1], skip_special_tokens=True)) >= end:
        count -= 1
    return {"completion": text[:end], "finish": "stop", "completion_ids": ids[:count]}
