"""What the model sees of a question: the one place where prompts are made."""


def render_prompt(message, plain, tokenizer, settings=None):
    """The prompt of a question: `message` in the tokenizer's chat template, `plain` where it has none.

    A chat prompt already holds its begin token, so it is tokenized with add_special_tokens=False.
    """
    if not getattr(tokenizer, "chat_template", None):
        return plain
    messages = [{"role": "user", "content": message}]
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)


def without_marks(text, tokenizer):
    """A question cannot end its own turn: each special token in it gets a space inside, <|eot|> becomes < |eot|>.

    A template whose marks are ordinary text, as [INST] is for some models, cannot be kept safe in this way."""
    added = getattr(tokenizer, "added_tokens_decoder", {}).values()
    marks = {str(token) for token in [*added, *getattr(tokenizer, "all_special_tokens", [])]}
    for mark in sorted(marks, key=len, reverse=True):
        if len(mark) > 1 and not mark.isspace() and not mark.isalnum():
            text = text.replace(mark, f"{mark[0]} {mark[1:]}")
    return text
