"""Reads the answer out of what a model wrote, and judges it against the reference.

What a model wrote is never run: no eval, no computer algebra. Every function answers for any input,
in bounded time and without an exception: a text above LONGEST characters is no answer (the longest
of MATH has 159), brackets nest no deeper than DEEPEST, no number is above 10**75.
"""

import math
import re
from decimal import Context, Decimal, Underflow, localcontext
from functools import lru_cache
from itertools import accumulate
from operator import add, mul, sub, truediv

LONGEST, DEEPEST = 300, 20
cached = lru_cache(10_000)  # votes compare the answers of a question pair by pair: read each once


# ---- reading: from a completion to its answer ----


def read_answer(text, marker="The answer is"):
    r"""What follows the last marker, in any case, up to the end of its line or sentence, or None.

    Where the rest of the marker's line is empty, the next one counts; \[...\] is read whole.
    'So 9 + 8 = 17. The answer is $17$.' -> '17'; 'so the answer is:\n\\[\\boxed{18}\\]' -> '18'
    """
    marked = rf"(?i)(?<![A-Za-z]){re.escape(marker)}"  # there is no "A:" in "banana: 3"
    *before, after = re.split(marked, text if isinstance(text, str) else "")
    if not before:
        return None
    after = re.sub(r"^[\s:=*`]*\n\s*", "", after[:LONGEST])
    display = re.match(r"(?s)[ \t:=]*(?:\\\[|\$\$)([^$]*?)(?:\\\]|\$\$)[ \t.*]*(?:\n|$)", after)
    line = " ".join(display[1].split()) if display else [*after.splitlines(), ""][0]
    line = re.sub(r"\.[*$]*\s+[A-Z].*", "", line)  # "17. I hope that helps" -> "17"
    line = last_boxed(line) or line
    line = re.sub(r"\*\*(.+?)\*\*", r"\1", line).strip(" \t:=*`").rstrip(" \t.*`")
    line = re.sub(r"^(?:\$([^$]*)\$|\\\(((?:(?!\\\().)*)\\\))$", r"\1\2", line)  # $x$, \(x\) -> x
    return line.strip().rstrip(" .") or None


def last_boxed(text):
    r"""What the last \boxed{...} or \fbox{...} holds: 'so \boxed{\frac{1}{2}}' -> '\frac{1}{2}'."""
    text = text if isinstance(text, str) else ""
    text = re.sub(r"\\(boxed|fbox)\s*([0-9]+)", r"\\\1{\2}", text)  # \boxed 9 is a box too
    *before, inside = re.split(r"\\(?:boxed|fbox)\s*\{", text)
    if not before:
        return None
    depth = 1
    for mark in re.finditer(r"(?s)\\.|[{}]", inside[:LONGEST]):
        depth += (mark[0] == "{") - (mark[0] == "}")
        if depth == 0:
            return inside[: mark.start()]


# ---- one spelling for what looks the same on paper ----

# A regular expression and what replaces it, one pair a line, in this order.
SPELLINGS = re.findall(
    r"(?m)^ *(\S.*?)  +'(.*?)'(?:  .*)?$",
    r"""
    \s+                                        ' '
    \\(?:text(?:bf|it|rm|normal)?|mbox|math(?:bf|it|rm)|operatorname)\s*\{([^{}]*)\}  ' \\text \1 '
    \{,\}|,\s*\\!                              ','             1{,}000 and 1,\!000
    (?<!\\)\\\\(?=[dtc]?frac)                  '\\'            \\frac, escaped once too often
    (?<!\\)\\[,;:!()\[\]]|\\(?:left|right)\s*\.  ''
    \\(?:left|right|[bB]igg?[lr]?|displaystyle|boxed)(?![a-z])  ''
    (?<!\\)\\ |\\q?quad(?![a-z])|~|\\phantom\s*(?:\{[^{}]*\}|\S)  ' '
    \^\s*(?:\{\s*\\circ\s*\}|\\circ(?![a-z]))|\\degree  '°'
    \\?[$]|[€£¥]                               ''
    ° ?$                                       ' \\text degrees'
    \\?% ?$                                    ' \\text percent'
    °|\\?%                                     ''
    \\(?:cdot|times|ast)(?![a-z])|[×·⋅]        '*'
    \\div(?![a-z])|÷                           '/'
    [−–]                                       '-'
    (?<![\\A-Za-z])(sqrt|pi(?![A-Za-z]))       '\\\1 '
    √                                          '\\sqrt '
    π                                          '\\pi '
    ∞                                          '\\infty '
    ∪                                          '\\cup '
    \\(le|ge|ne)q(?![a-z])                     '\\\1 '
    \\lbrace                                   '\\{'
    \\rbrace                                   '\\}'
    \{[pb]matrix\}                             '{matrix}'
    \\[dtc]?frac ?([0-9A-Za-z])                '\\frac{\1}'    \frac12 takes one digit at a time
    \\[dtc]?frac ?\{([^{}]*)\} ?([0-9A-Za-z])  '\\frac{\1}{\2}'
    \\[dtc]?frac ?                             '\\frac'
    \} \{                                      '}{'
    ([0-9]) \\frac                             '\1\\frac'
    (\\sqrt|\^) ?\(([^()]*)\)                  '\1{\2}'
    (\\sqrt) ?([0-9A-Za-z])                    '\1{\2}'
    ([_^]) ?([0-9]+|[A-Za-z])                  '\1{\2}'
    (?<![0-9./^])([0-9]+) ([0-9]+) ?/ ?([0-9]+)  '\1\\frac{\2}{\3}'  1 1/2
    \b([ap])\.m\.?                             '\1m'
    [ ,]{0,3}(?:\\text[ ,]{0,3})?\b(?:and|or)\b  ', '
    ^ ?(?:=|\\approx)                          ''
""",
)
UNITS = (
    r"(?: \\text [A-Za-z. ]+| (?:[A-Za-z]{3,}|cm|mm|km|ft|in|kg|lb|sq)\b[A-Za-z. ]*)"
    r"(?:\^ ?\{[23]\})?$"
)
NO_UNIT = r"\b(?:[ap]m|dozen|hundred|thousand|[mbtr]+illion)\b"
TOKEN = (
    r"\\(?:begin|end)\{[a-z]*\}|\\sqrt\[[0-9]\]|\\[A-Za-z]+|\\."
    r"|[0-9]*\.?[0-9]+|[A-Za-z]{2,}|\S"
)
OPENING, CLOSING = r"( [ { \{ \begin{matrix}".split(), r") ] } \} \end{matrix}".split()


def respell(text):
    for pattern, spelling in SPELLINGS:
        text = re.sub(pattern, spelling, text)
    return " ".join(text.split()).rstrip(" .,;:")


def without_commas(text):
    """1,234,567 -> 1234567"""
    numbers = r"(?<![0-9.])[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])"
    return re.sub(numbers, lambda number: number[0].replace(",", ""), text)


@cached
def tokens_of(text):
    """'\\frac{1}{2}x' -> ('\\frac', '{', '1', '}', '{', '2', '}', 'x')"""
    return tuple(
        token.lower() if token.isalpha() and len(token) > 2 else token
        for token in re.findall(TOKEN, text)
        if token != "\\text"
    )


@cached
def as_text(tokens):
    """One string, fractions with a slash: \\frac{x+1}{2} -> (x+1)/2; 2\\frac12 stays 2 1/2."""

    def bracketed(side):
        return side if re.fullmatch(r"\\?\w+", side) else f"({side})"

    def with_slash(fraction):
        return f" {bracketed(fraction[1])}/{bracketed(fraction[2])} "

    gap = " (?![0-9.])|(?<![0-9.]) "  # any but those between two numbers
    text, found = re.sub(gap, "", " ".join(tokens)), True
    while found:
        text, found = re.subn(r"\\frac\{([^{}]*)\}\{([^{}]*)\}", with_slash, text)
    return re.sub(gap, "", text)


# ---- numbers ----

# Roots are not exact: of 120 digits 100 count. No two written fractions are so close.
CONTEXT, ROUNDED = Context(prec=120, Emax=75, Emin=-75), Context(prec=100)
CONTEXT.traps[Underflow] = True  # a number out of range is an error, not 0
PI = Decimal("3.1415926535897932384626433832795028841971")  # more digits than anyone writes
OPERATORS = {"+": (add, 1), "-": (sub, 1), "*": (mul, 2), "/": (truediv, 2), "^": (pow, 3)}
GROUPS = {"(": ")", "{": "}"}


@cached
def value(tokens):
    """The number that the tokens mean, or None.

    Each letter is a number of its own, so that x/2 equals \\frac12x. A letter twice or in a sum
    gives None: (x-2)(x+2) and x^2-4 are two answers, one factored, one expanded.
    """
    letters = [token for token in tokens if re.fullmatch("[A-Za-hj-z]", token)]
    if len(set(letters)) < len(letters) or letters and {"+", "-", "("} & set(tokens[1:]):
        return None
    rest = list(tokens)
    try:
        with localcontext(CONTEXT):
            number = ROUNDED.normalize(+read(rest, 0))
    except (ValueError, ArithmeticError, IndexError):
        return None
    return None if rest or number.is_infinite() else number


def read(rest, tightness):
    """The number at the start of rest, a list of tokens, up to an operator no tighter than this.

    It removes what it reads. LONGEST bounds the recursion.
    """
    token = rest.pop(0)
    if token in ("+", "-"):
        number = OPERATORS[token][0](0, read(rest, 2))
    elif token in GROUPS:
        number = read(rest, 0)
        if rest.pop(0) != GROUPS[token]:
            raise ValueError("not closed")
    elif token == "\\frac":
        number = read(rest, 9) / read(rest, 9)
    elif token.startswith("\\sqrt"):
        number = root(read(rest, 9), int(token[6:-1] or 2))
    elif token[-1] in "0123456789":
        number = Decimal(token)
        if re.match(r"\\frac\{[0-9]+\}\{[0-9]+\}", "".join(rest[:7])):
            number += read(rest, 9)  # 1\frac{2}{3} is 1 + 2/3
    elif re.fullmatch("[A-Za-z]", token):
        number = Decimal(pow(3, ord(token), 2**31 - 1))
    elif token == "\\pi":
        number = PI
    else:
        raise ValueError("not a number")
    while rest and rest[0] not in GROUPS.values():
        apply, own_tightness = OPERATORS.get(rest[0], OPERATORS["*"])  # 2\pi is a product
        if own_tightness <= tightness:
            break
        if rest[0] in OPERATORS:
            rest.pop(0)
        elif rest[0][-1] in "0123456789":
            raise ValueError("two numbers side by side")
        number = apply(number, read(rest, own_tightness))
    return number


def root(number, n):
    return -root(-number, n) if number < 0 and n % 2 else number ** (1 / Decimal(n))


# ---- judging ----

# With its sign; not a part of x1 or 10-15.
NUMBER = (
    r"((?:^- |(?<![\w)])-|(?<![\w-])(?<![\w-]\.))(?:[0-9]*\\frac\{[0-9]+\}\{[0-9]+\}"
    r"|[0-9]*\.?[0-9]+(?:[eE][+-]?[0-9]{1,3}|/[0-9]*\.?[0-9]+)?))"
)


def are_short(*texts):
    return all(isinstance(text, str) and len(text) <= LONGEST for text in texts)


@cached
def read_number(text):
    """The one number of a text, or None: '$1,234.50 a day' -> 1234.5, '2 or 3' -> None."""
    text = without_commas(respell(text)).rpartition("=")[2]  # 16 - 3 = 13 is 13
    text = re.sub(r"\\text|(?<=[A-Za-z])\^\{[23]\}", "", text)  # cm^2
    parts = re.split(NUMBER, text.strip(" *+").replace(" / ", "/"))  # before, number, after
    if len(parts) != 3 or re.search(rf"[0-9+*^<>_\\]|{NO_UNIT}", parts[0] + parts[2]):
        return None
    return value(tokens_of(re.sub("[eE](.*)", r"*10^{\1}", parts[1])))


def same_number(answer, gold):
    """Is it the same number? '$1,234.00' is 1234. Percent signs are dropped: 50% is 50, not 1/2."""
    number = read_number(answer) if are_short(answer, gold) else None
    return number is not None and number == read_number(gold)


def same_maths(answer, gold):
    """Is it the same answer? 'x = \\frac{1}{2}' is 0.5.

    Order counts in (1,2) and in 1,2, not in \\{1,2\\} or a union. A unit, percent, degree or money
    sign may be missing.
    """
    if not are_short(answer, gold):
        return False
    (a, a_unit), (b, b_unit) = apart_from_unit(answer), apart_from_unit(gold)
    if a_unit and b_unit and not a_unit & b_unit:
        return False  # 3 cm and 3 boxes
    if a == b or alike(tokens_of(a), tokens_of(b)):
        return True
    if re.search(r"[(\[{]", a + b):
        return False  # the comma of (1,234) is no thousands comma; that of 1,234 may be
    return alike(tokens_of(without_commas(a)), tokens_of(without_commas(b)))


@cached
def apart_from_unit(text):
    """'15 square cm' -> ('15', {'s', 'c'}): a unit's initials survive its abbreviation."""
    text = respell(text)
    left, unit, *_ = *re.split(f"({UNITS})", text), ""
    sign = re.search(r"\\text (degrees|percent)$", unit)
    number = value(tokens_of(left.rpartition("=")[2]))
    if not sign and (number is None or re.search(NO_UNIT, unit)):
        return text, set()
    return left, set(re.findall(r"\b(?<!\\)[A-Za-z]", unit.lower()))


SEPARATORS = (",", ";", "&", "\\\\")
KINDS = (("\\cup",), SEPARATORS, ("=", "\\in", "\\le", "\\ge", "<", ">"))  # of what divides parts
NAME = r"(?!\\frac|\\sqrt)[A-Za-z\\][^-+*/^<>]*"


def alike(a, b):
    """Do they mean the same, with the name in x = 3 or, if one of them has none, without it?"""
    a_names, b_names = names(a), names(b)
    if a_names == b_names or not a_names or not b_names:
        return form(a, bare=True) == form(b, bare=True)
    return form(a) == form(b)


def names(tokens):
    """['x'] of x = 1, x = 2 and of x = 1, 2"""
    found = re.findall(r"([^ ,;][^,;]*) (?:=|\\in) ", " ".join(tokens))
    return list(dict.fromkeys(found))


@cached
def form(tokens, bare=False):
    """What all spellings of an answer have in common: a number, the forms of its parts, or terms.

    bare: without names, so that f(x) = 3 is 3 and x \\in [1,2] is [1,2].
    """
    number, pair = value(tokens), brackets(tokens)
    if number is not None:
        return number
    inside, kinds = (tokens[1:-1], [SEPARATORS]) if pair else (tokens, KINDS)
    splits = (split(inside, separators) for separators in kinds)
    parts = next((parts for parts in splits if len(parts) > 1), [inside])
    if bare and parts[1:-1] in (["="], ["\\in"]) and re.fullmatch(NAME, "".join(parts[0])):
        return form(parts[2], bare)
    if parts == [tokens]:
        return terms(tokens)
    forms = [form(part, bare) if reduced(part) else as_text(part) for part in parts[::2]]
    if pair == "()" and len(forms) == 1:
        return forms[0]  # (C) is C
    if pair == "\\{\\}" or "\\cup" in parts:
        forms.sort(key=str)  # of a set or a union in any order
    return pair, parts[1::2], forms


def reduced(tokens):
    """4/6 is 2/3 by itself, but the published graders do not take (14/3, 4/6) for (14/3, 2/3)."""
    fraction = re.fullmatch(r"-?([0-9]+)/([0-9]+)", as_text(tokens))
    return not fraction or math.gcd(*map(int, fraction.groups())) == 1


@cached
def split(tokens, separators):
    """Parts and separators in turn, brackets kept whole.

    1,(2,3) -> [('1',), ',', ('(', '2', ',', '3', ')')]
    """
    parts, depth = [()], 0
    for token in tokens:
        depth += (token in OPENING) - (token in CLOSING)
        if token in separators and depth == 0:
            parts += [token, ()]
        else:
            parts[-1] += (token,)
    return parts


def brackets(tokens):
    """The one pair that holds it all: () of (1,2), none of (1,2)\\cup(3,4)."""
    depths = [0, *accumulate((token in OPENING) - (token in CLOSING) for token in tokens)]
    encloses = depths[-1] == 0 and min(depths[1:-1], default=0) > 0 and max(depths) <= DEEPEST
    return tokens[0] + tokens[-1] if encloses else None


@cached
def terms(tokens):
    """The terms of a sum in an order and a spelling of their own: equal for 2x-1 and -1+x*2."""
    parts = split(tokens, ("+", "-"))
    parts = ["+", *parts] if parts[0] else parts[1:]
    return sorted(
        sign + str(value(part) or as_text(part)) for sign, part in zip(parts[::2], parts[1::2])
    )
