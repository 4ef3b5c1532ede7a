"""Reads the answer out of what a model wrote, and judges it against the reference.

What a model wrote is never run: no eval, no computer algebra. Every function answers for any input, in bounded time
and without an exception: a text above LONGEST characters is no answer (the longest of MATH has 159), nothing nests
deeper than DEEPEST, no number has more than BITS bits.
"""

import math
import re
from fractions import Fraction
from itertools import accumulate
from operator import add, mul, sub, truediv

LONGEST, DEEPEST, BITS = 300, 20, 4000


# ---- reading: from a completion to its answer ----


def read_answer(text, marker="The answer is"):
    r"""What follows the last marker, in any case, up to the end of its line or sentence, or None.

    Where the rest of the marker's line is empty, the next one counts; \[...\] is read whole.
    'So 9 + 8 = 17. The answer is $17$.' -> '17'; 'so the answer is:\n\\[\\boxed{18}\\]' -> '18'
    """
    edge = r"\b" if marker[:1].isalnum() else ""  # "Banana: 3" does not hold the marker "A:"
    found = re.match(rf"(?is).*{edge}{re.escape(marker)}", text) if isinstance(text, str) else None
    if not found:
        return None
    after = re.sub(r"^[\s:=*`]*\n\s*", "", text[found.end():found.end() + LONGEST])
    display = re.match(r"(?s)[ \t:=]*(?:\\\[|\$\$)([^$]*?)(?:\\\]|\$\$)[ \t.*]*(?:\n|$)", after)
    line = " ".join(display[1].split()) if display else (after.splitlines() or [""])[0]
    line = re.split(r"\.[*$]*\s+(?=[A-Z])", line, maxsplit=1)[0]  # "17. I hope that helps" -> "17"
    boxed = last_boxed(line)
    if boxed is not None:
        return boxed.strip() or None
    line = re.sub(r"\*\*(.+?)\*\*", r"\1", line).strip(" \t:=*`").rstrip(" \t.*`")
    for left, right in (("$", "$"), ("\\(", "\\)")):
        inside = line[len(left):-len(right)]
        if line.startswith(left) and line.endswith(right) and left not in inside:
            line = inside
    return line.strip().rstrip(" .") or None


def last_boxed(text):
    """What the last \\boxed{...} or \\fbox{...} holds: 'so \\boxed{\\frac{1}{2}}' -> '\\frac{1}{2}'."""
    at = max(text.rfind("\\boxed"), text.rfind("\\fbox")) if isinstance(text, str) else -1
    text = text[at:at + LONGEST] if at >= 0 else ""
    start = re.match(r"\\(?:boxed|fbox)\s*(?:\{|([0-9]+))", text)
    if not start or start[1]:
        return start and start[1]  # \boxed 9 is a box too
    depth = 1
    for mark in re.compile(r"\\.|[{}]", re.DOTALL).finditer(text, start.end()):
        depth += {"{": 1, "}": -1}.get(mark[0], 0)
        if depth == 0:
            return text[start.end():mark.start()]
    return None


# ---- one spelling for what looks the same on paper ----

SPELLINGS = [(re.compile(pattern), spelling) for pattern, spelling in [
    (r"\\(?:text(?:bf|it|rm|normal)?|mbox|math(?:bf|it|rm)|operatorname)\s*\{([^{}]*)\}", r" \\text \1 "),
    (r"\{,\}|,\s*\\!", ","),                                              # 1{,}000 and 1,\!000
    (r"(?<!\\)\\\\(?=[dtc]?frac)", r"\\"),                                  # \\frac, escaped once too often
    (r"(?<!\\)\\[,;:!()\[\]]|\\(?:left|right)\s*\.|\\(?:left|right|[bB]igg?[lr]?|displaystyle|boxed)(?![a-z])", ""),
    (r"(?<!\\)\\ |\\q?quad(?![a-z])|~|\\phantom\s*(?:\{[^{}]*\}|\S)", " "),
    (r"\^\s*(?:\{\s*\\circ\s*\}|\\circ(?![a-z]))|\\degree", "°"), (r"\\?[$]|[€£¥]", ""),
    (r"° ?$", r" \\text degrees"), (r"\\?% ?$", r" \\text percent"), (r"°|\\?%", ""),
    (r"\\(?:cdot|times|ast)(?![a-z])|[×·⋅]", "*"), (r"\\div(?![a-z])|÷", "/"), (r"[−–]", "-"),
    (r"(?<![\\A-Za-z])(sqrt|pi(?![A-Za-z]))", r"\\\1 "),
    (r"√", r"\\sqrt "), (r"π", r"\\pi "), (r"∞", r"\\infty "), (r"∪", r"\\cup "),
    (r"\\(le|ge|ne)q(?![a-z])", r"\\\1 "), (r"\\lbrace", r"\\{"), (r"\\rbrace", r"\\}"),
    (r"\{[pb]matrix\}", "{matrix}"),
    (r"\\[dtc]?frac ?([0-9A-Za-z])", r"\\frac{\1}"),                      # \frac12 takes one digit at a time
    (r"\\[dtc]?frac ?\{([^{}]*)\} ?([0-9A-Za-z])", r"\\frac{\1}{\2}"),
    (r"\\[dtc]frac", r"\\frac"),
    (r"(\\sqrt|\^) ?\(([^()]*)\)", r"\1{\2}"), (r"(\\sqrt) ?([0-9A-Za-z])", r"\1{\2}"),
    (r"([_^]) ?([0-9]+|[A-Za-z])", r"\1{\2}"),
    (r"(?<![0-9./^])([0-9]+) ([0-9]+) ?/ ?([0-9]+)", r"\1\\frac{\2}{\3}"),  # 1 1/2
    (r"\b([ap])\.m\.?", r"\1m"),
    (r"[ ,]{0,3}(?:\\text[ ,]{0,3})?\b(?:and|or)\b", ", "),
    (r"^ ?(?:=|\\approx)", ""),
]]
UNITS = re.compile(r"(?: \\text [A-Za-z. ]+| (?:[A-Za-z]{3,}|cm|mm|km|ft|in|kg|lb|sq)\b[A-Za-z. ]*)(?:\^ ?\{[23]\})?$")
NO_UNIT = r"\b(?:[ap]m|dozen|hundred|thousand|[mbtr]+illion)\b"
TOKEN = re.compile(r"\\(?:begin|end)\{[a-z]*\}|\\sqrt\[[0-9]\]|\\[A-Za-z]+|\\.|[0-9]*\.?[0-9]+|[A-Za-z]{2,}|\S")
BRACKETS = dict.fromkeys(("(", "[", "{", "\\{", "\\begin{matrix}"), 1) | \
    dict.fromkeys((")", "]", "}", "\\}", "\\end{matrix}"), -1)


def respell(text):
    text = " ".join(text.split())
    for pattern, spelling in SPELLINGS:
        text = pattern.sub(spelling, text)
    return " ".join(text.split()).rstrip(" .,;:")


def without_commas(text):
    """1,234,567 -> 1234567"""
    return re.sub(r"(?<![0-9.])[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])", lambda number: number[0].replace(",", ""), text)


def tokens_of(text):
    """'\\frac{1}{2}x' -> ['\\frac', '{', '1', '}', '{', '2', '}', 'x']"""
    tokens = [token for token in TOKEN.findall(text) if token != "\\text"]
    return [token.lower() if token.isalpha() and len(token) > 2 else token for token in tokens]


def as_text(tokens):
    """One string, fractions with a slash: \\frac{x+1}{2} -> (x+1)/2."""
    text, found = "".join(tokens).removeprefix("+"), True
    while found:
        text, found = re.subn(r"\\frac\{([^{}]*)\}\{([^{}]*)\}", lambda match: "/".join(
            part if re.fullmatch(r"\\?\w+", part) else f"({part})" for part in match.groups()), text)
    return text


# ---- numbers: exact fractions, and roots to 60 digits ----

PI = Fraction(31415926535897932384626433832795028841971, 10**40)  # more digits than anybody writes out
SCALE = 10**60
TIGHTNESS = {"+": 1, "-": 1, "*": 2, "/": 2, "^": 3}


def value(tokens):
    """The number that the tokens stand for, or None. A letter stands for a number of its own, so that x/2 equals
    \\frac12x; but never twice or in a sum: (x-2)(x+2) and x^2-4 are two answers, one factored, one expanded."""
    letters = [token for token in tokens if token != "i" and re.fullmatch("[A-Za-z]", token)]
    if len(set(letters)) < len(letters) or letters and {"+", "-", "("} & set(tokens[1:]):
        return None
    rest = tokens[::-1]
    try:
        number = read(rest, 0, 0)
        return None if rest else number
    except (ValueError, ZeroDivisionError, IndexError):
        return None


def read(rest, tightness, depth):
    """Reads an expression off the end of rest, the tokens in reverse, up to an operator no tighter than tightness."""
    if depth > DEEPEST:
        raise ValueError("nested too deep")
    token = rest.pop()
    if token in ("+", "-"):
        number = read(rest, 2, depth + 1) * (1 if token == "+" else -1)
    elif token in ("(", "{"):
        number = read(rest, 0, depth + 1)
        if rest.pop() != {"(": ")", "{": "}"}[token]:
            raise ValueError("not closed")
    elif token == "\\frac":
        number = combine(read(rest, 9, depth + 1), "/", read(rest, 9, depth + 1))
    elif token.startswith("\\sqrt"):
        number = root(read(rest, 9, depth + 1), int(token[6:-1] or 2))
    elif token[-1] in "0123456789":
        number = Fraction(token)
        if re.match(r"\\frac\{[0-9]+\}\{[0-9]+\}", "".join(rest[:-8:-1])):
            number += read(rest, 9, depth + 1)  # 1\frac{2}{3} is 1 + 2/3
    elif re.fullmatch("[A-Za-z]", token):
        number = Fraction(pow(3, ord(token), 2**61 - 1), 2**31 - 1)
    elif token == "\\pi":
        number = PI
    else:
        raise ValueError("not a number")
    while rest and rest[-1] not in (")", "}"):
        operator = rest[-1] if rest[-1] in TIGHTNESS else "*"  # 2\pi is a product
        if TIGHTNESS[operator] <= tightness:
            break
        if rest[-1] == operator:
            rest.pop()
        elif rest[-1][-1] in "0123456789":
            raise ValueError("two numbers side by side")
        number = combine(number, operator, read(rest, TIGHTNESS[operator], depth + 1))
    return number


def combine(a, operator, b):
    if operator == "^":
        a, b = root(a, b.denominator) if b.denominator > 1 else a, b.numerator
    bits = sum(part.bit_length() for part in (a.numerator, a.denominator, b.numerator, b.denominator))
    if bits * (abs(b) if operator == "^" else 1) > BITS:
        raise ValueError("too large")
    return {"+": add, "-": sub, "*": mul, "/": truediv, "^": pow}[operator](a, b)


def root(number, n):
    if number < 0 and n % 2:
        return -root(-number, n)
    if number < 0 or not 2 <= n <= 9:
        raise ValueError("no such root")
    exact = Fraction(whole_root(number.numerator, n), whole_root(number.denominator, n))
    return exact if exact ** n == number else Fraction(whole_root(int(number * SCALE**n), n), SCALE)


def whole_root(number, n):
    """The largest whole number whose n-th power is no more than number: Newton's steps, from above."""
    guess = 1 << -(-number.bit_length() // n)
    while number and (step := ((n - 1) * guess + number // guess ** (n - 1)) // n) < guess:
        guess = step
    return guess if number else 0


# ---- judging ----

NUMBER = re.compile(r"[0-9]*\\frac\{[0-9]+\}\{[0-9]+\}|[0-9]*\.?[0-9]+(?:[eE][+-]?[0-9]{1,3}|/[0-9]*\.?[0-9]+)?")


def read_number(text):
    """The one number of a short text, exact: '$1,234.50 a day' -> 2469/2. None for none, for two and for a sum."""
    if not isinstance(text, str) or len(text) > LONGEST:
        return None
    text = without_commas(respell(text)).rpartition("=")[2].replace("\\text", "").strip(" *+")  # 16 - 3 = 13 is 13
    text = re.sub(r"(?<=[A-Za-z])\^\{[23]\}", "", text).replace(" / ", "/")  # cm^2
    found = list(NUMBER.finditer(text))
    if len(found) != 1:
        return None
    before, after = text[:found[0].start()], text[found[0].end():]
    negative = re.search(r"(?:^|[^\w)])-$|^- $", before)
    if re.search(rf"[+*^<>_\\]|{NO_UNIT}", before + after) or re.search(r"[\w-]$", before) and not negative:
        return None
    number = value(tokens_of(re.sub("[eE](.*)", r"*10^{\1}", found[0][0])))
    return -number if number is not None and negative else number


def same_number(answer, gold):
    """Is it the same number? same_number('$1,234.00', '1234') -> True. Percent signs go: 50% is 50, not 1/2."""
    numbers = read_number(answer), read_number(gold)
    return None not in numbers and numbers[0] == numbers[1]


def same_maths(answer, gold):
    """Do the two stand for the same answer? same_maths('x = \\frac{1}{2}', '0.5') -> True

    Order counts in (1,2) and in 1,2, not in \\{1,2\\} or a union. A unit, percent, degree or money sign may be missing.
    """
    if not all(isinstance(text, str) and len(text) <= LONGEST for text in (answer, gold)):
        return False
    (a, a_unit), (b, b_unit) = (apart_from_unit(respell(text)) for text in (answer, gold))
    if a_unit and b_unit and not a_unit & b_unit:
        return False  # 3 cm and 3 boxes
    if a == b or alike(tokens_of(a), tokens_of(b), 0):
        return True
    if re.search(r"[(\[{]", a + b):
        return False  # the comma of (1,234) is no thousands comma; that of 1,234 may be
    return alike(tokens_of(without_commas(a)), tokens_of(without_commas(b)), 0)


def apart_from_unit(text):
    """'15 \\text square cm' -> ('15', {'s', 'c'}): the initials tell units apart, however they are shortened."""
    unit = UNITS.search(text)
    left = text[:unit.start()] if unit else ""
    sign = unit and re.search(r"\\text (degrees|percent)$", unit[0])
    if not sign and (value(tokens_of(left)) is None or re.search(NO_UNIT, unit[0])):
        return text, set()
    return left, set(re.findall(r"\b(?<!\\)[A-Za-z]", unit[0].lower()))


UNION, SEPARATORS = ("\\cup",), (",", ";", "&", "\\\\")
RELATIONS = ("=", "\\in", "\\le", "\\ge", "<", ">")


def alike(a, b, depth):
    if not a or not b or depth > DEEPEST:
        return False
    if as_text(a) == as_text(b):
        return True
    x, y = value(a), value(b)
    if x is not None and y is not None:  # the tolerance is for roots: fractions that people write never lie so close
        return x == y or abs(x - y) * 10**40 < min(1, abs(x), abs(y))
    if enclosed(a) and enclosed(b) and (a[0], a[-1]) == (b[0], b[-1]):
        return same_parts(a[1:-1], b[1:-1], SEPARATORS, depth, any_order=a[0] == "\\{")
    for separators in (UNION, SEPARATORS):
        if len(split(a, separators)) > 1 or len(split(b, separators)) > 1:
            return same_parts(a, b, separators, depth, any_order=separators == UNION)
    if len(split(a, RELATIONS)) == len(split(b, RELATIONS)) > 1:
        return same_parts(a, b, RELATIONS, depth)
    if (a, b) != (plain(a), plain(b)):
        return alike(plain(a), plain(b), depth + 1)
    return terms(a) == terms(b)


def same_parts(a, b, separators, depth, any_order=False):
    a, b = split(a, separators), split(b, separators)
    if a[1::2] != b[1::2]:
        return False
    a, b = (sorted(side[::2], key=terms) if any_order else side[::2] for side in (a, b))
    return all(one == other or not unreduced(one) and not unreduced(other) and alike(one, other, depth + 1)
               for one, other in zip(a, b))


def unreduced(tokens):
    """4/6 is 2/3 by itself, but the published graders do not take (14/3, 4/6) for (14/3, 2/3)."""
    fraction = re.fullmatch(r"-?([0-9]+)/([0-9]+)", as_text(tokens))
    return bool(fraction) and math.gcd(int(fraction[1]), int(fraction[2])) > 1


def split(tokens, separators):
    """Parts and separators in turn, brackets kept whole: 1,(2,3) -> [['1'], ',', ['(', '2', ',', '3', ')']]"""
    parts, depth = [[]], 0
    for token in tokens:
        depth += BRACKETS.get(token, 0)
        if token in separators and depth == 0:
            parts += [token, []]
        else:
            parts[-1].append(token)
    return parts


def enclosed(tokens):
    """Does one pair of brackets hold it all? (1,2) yes, (1,2)\\cup(3,4) no."""
    depths = list(accumulate(BRACKETS.get(token, 0) for token in tokens))
    return len(tokens) > 1 and depths[-1] == 0 and min(depths[:-1]) > 0


def plain(tokens):
    """Without its name or brackets: x = 3 -> 3; f(x) = 3 -> 3; x \\in [1,2] -> [1,2]; (C) -> C; 2x = 3 stays."""
    parts = split(tokens, ("=", "\\in"))
    if len(parts) == 3 and re.fullmatch(r"(?!\\frac|\\sqrt)[A-Za-z\\][^-+*/^<>]*", "".join(parts[0])):
        return parts[2]
    return tokens[1:-1] if enclosed(tokens) and tokens[0] + tokens[-1] == "()" else tokens


def terms(tokens):
    """The terms of a sum in an order and a spelling of their own: the same for 2x-1 and -1+x*2."""
    parts = split(tokens, ("+", "-"))
    parts = ["+", *parts] if parts[0] else parts[1:]
    return sorted(sign + (as_text(part) if (number := value(part)) is None else str(number))
                  for sign, part in zip(parts[::2], parts[1::2]))
