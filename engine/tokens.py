"""Text to tokens and back."""

from engine.common import Problem
from engine.tasks import one_line


def token_ids(row, tokenizer, end_token):
    """(prompt_ids, completion_ids) of a row: the file's own, or made from its text."""
    prompt, completion = row.get("prompt_ids"), row.get("completion_ids")
    if prompt is None:
        prompt = prompt_tokens(row["prompt"], tokenizer)
    if completion is None:
        completion = plain_tokens(row["completion"], tokenizer)
        if row.get("finish") != "length" and completion[-1:] != [end_token]:
            completion = [*completion, end_token]  # it stopped, so the policy wrote the end token
    return prompt, completion


def is_foreign(row, tokenizer):
    """Whether its completion_ids clearly say something else than its completion.

    Engines differ in white space, special tokens, and in stop words that they cut off.
    """
    text = tokenizer.decode(row.get("completion_ids") or [], skip_special_tokens=True)
    text, completion = "".join(text.split()), "".join(row["completion"].split())
    return text not in completion and completion not in text


def plain_tokens(text, tokenizer):
    return tokenizer(text, add_special_tokens=False, verbose=False).input_ids


def prompt_tokens(text, tokenizer):
    """What a model sees: with its start token, once, also if a chat template wrote it already."""
    ids, start = plain_tokens(text, tokenizer), start_tokens(tokenizer)
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
        raise Problem(
            "neither the tokenizer nor the model names an end-of-sequence token: "
            "set eos_token_id in the model's generation_config.json"
        )
    return sorted(ends)


def end_token_of(model, tokenizer):
    """The end token of a completion of which only the text is known; arguments as of end_tokens.

    It is the one that the chat template writes after an answer (Gemma and Phi end their turns with
    another than the tokenizer's eos), else eos.
    """
    ends, answer, after = end_tokens(model, tokenizer), "An answer.", []
    if getattr(tokenizer, "chat_template", None):
        turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": answer}]
        with one_line("the chat template takes no question with an answer"):
            text = tokenizer.apply_chat_template(turns, tokenize=False).rpartition(answer)[2]
        after = plain_tokens(text, tokenizer)
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
    stopped = end < len(text)
    if stopped:
        while len(ids) > 1 and len(tokenizer.decode(ids[:-1], skip_special_tokens=True)) >= end:
            ids = ids[:-1]
    finish = "stop" if ended or stopped else "length"
    return {"completion": text[:end], "finish": finish, "completion_ids": ids}
