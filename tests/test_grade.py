"""Reading and judging answers: small cases, then published labels, if ../shared/data exists."""

import json
import random
import re
import time
from fractions import Fraction

import pytest

from conftest import ROOT
from data.grade import LONGEST, last_boxed, read_answer, read_number, same_maths, same_number
from engine.measures import group_answers

DATA = ROOT.parent / "shared" / "data"


def rows_of(file):
    path = DATA / file
    if not path.is_file():
        pytest.skip(f"{path} is not there")
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def both_ways(same, a, b):
    assert same(a, b) == same(b, a), f"{a!r} and {b!r} are judged by their order"
    return same(a, b)


READ = [
    ("So 9 + 8 = 17. The answer is 17 .", "17"),
    ("The answer is $1,234.50.", "$1,234.50"),
    ("The answer is: \\boxed{3}", "3"),
    ("**The answer is 17.**", "17"),
    ("The answer is **17**.", "17"),
    ("The answer is `17`.", "17"),
    ("The answer is $\\frac{1}{2}$.", "\\frac{1}{2}"),
    ("The answer is $$x^2$$", "x^2"),
    ("The answer is \\(x\\).", "x"),
    ("The answer is $1$ and $2$.", "$1$ and $2$"),
    ("The answer is (3, \\frac{\\pi}{2}).", "(3, \\frac{\\pi}{2})"),
    ("The answer is 17. I hope it is correct.", "17"),
    ("The answer is 5\nThe answer is 6\nand so on 7", "6"),
    ("The answer is\t-3.5\r\nDone", "-3.5"),
    ("The answer is 5. The answer is", None),
    ("The answer is $$1$$ or $$2$$.", "$$1$$ or $$2$$"),
    ("The answer is $$.", None),
    ("It is 17.", None),
    ("", None),
    (None, None),
    # An answer on the next line, or after "the answer is" in another case, counted as invalid.
    ("The answer is:\n\\[\\boxed{18}\\]", "18"),
    ("The answer is:\n\n\\[\n18\n\\]\n\nI hope it helps.", "18"),
    ("**The answer is:**\n\n$$\n\\boxed{\\frac12}\n$$", "\\frac12"),
    ("The answer is \n17", "17"),
    ("The answer is\r\n\r\n **17** dollars.", "17 dollars"),
    ("So the answer is 18.", "18"),
    ("SO THE ANSWER IS: 18", "18"),
    ("9 * 2 = 18The answer is 18.", "18"),
    ("The answer is 5. Wait. So the answer is 6.", "6"),
    ("Then the answer is:\n", None),
    # A cap on the length of what is looked at must not cut off the end, where the answer is.
    ("x" * 10**6 + "\nThe answer is 5.", "5"),
    ("The answer is 5.\n" + "x" * 10**6, "5"),
]


@pytest.mark.parametrize("text, expected", READ)
def test_read_answer(text, expected):
    assert read_answer(text) == expected


def test_read_answer_takes_other_markers():
    """A short marker inside a word is none: "banana: 7" does not end in "A: 7"."""
    assert read_answer("72\n#### 1,234", marker="####") == "1,234"
    assert read_answer("so much\nA: 5\nbanana: 7", marker="A:") == "5"


BOXED = [
    ("\\boxed{\\frac{3}{4}} is it", "\\frac{3}{4}"),
    ("\\boxed{1} or \\fbox{2}", "2"),
    ("\\boxed 9.", "9"),
    ("\\boxed{\\{1, 2\\}}", "\\{1, 2\\}"),
    ("\\boxed{\\left\\{ x \\right.}", "\\left\\{ x \\right."),
    ("\\boxed{}", ""),
    ("\\boxed{3", None),
    ("\\boxed x", None),
    ("3", None),
    (None, None),
    ("{" * 10**6 + "\\boxed{7}" + "}" * 10**6, "7"),
]


@pytest.mark.parametrize("text, expected", BOXED)
def test_last_boxed(text, expected):
    """Inner and escaped braces do not end the box; an unclosed one holds nothing."""
    assert last_boxed(text) == expected


# ---- pairs: the same, or look-alikes such as two numbers where guessing one would reward luck ----

NUMBERS = r"""
    $1,234.50 | 1234.5    17. | 17    1e3 | 1000    1.5e3 | 1500    1e-3 | 0.001    1/2 | 0.5
    -1/2 | -0.5    3 1/2 | 3.5    -5 | -5.0    -$5 | -5    $-5 | -5    −7 | -7    +7 | 7
    50% | 50    18 dollars | 18    $18 per day | 18    $18/day | 18    x = 5 | 5
    16 - 3 = 13 | 13    **18** | 18    \frac{1}{2} | 1/2    \$18 | 18    1,000,000 | 1000000
    1{,}234 | 1234    €5 | 5    5 cm^2 | 5    .5 | 1/2    70,000.00 | 70000    (18) | 18
    18° | 18    007 | 7    \text{18 dollars} | 18    20\text{ miles} | 20    -\frac{1}{2} | -0.5
"""
OTHER_NUMBERS = r"""
    18 | 17    -5 | 5    5 or 6 | 5    5 or 6 | 6    10-15 | 10    10-15 | 15    3*6 | 18
    9+9 | 18    2 hours 30 minutes | 2    abc | abc    1/0 | 1/0    1,5 | 15    5+x | 5
    1e999999999 | 1    1.2.3 | 1.2    0.3333 | 1/3    50% | 0.5    x1 | 1    2^3 | 8    2^3 | 2
    5\pi | 5    5 and 234 | 5234    3 4 | 34    0.1 | 0.10000000000000001    5 million | 5
    9007199254740993 | 9007199254740992    (1,2) | 1
"""
MATHS = r"""
    \tfrac{1}{2} | 0.5    \dfrac12 | 1/2    1\frac{1}{2} | 3/2    1 1/2 | 1.5
    -15\frac{3}{5} | -15.6    \frac{\sqrt{3}}2 | \sqrt3/2    -\frac{1}{2} | \frac{-1}{2}
    \frac{1}{\sqrt{2}} | \frac{\sqrt{2}}{2}    50\% | 50    90^\circ | 90
    90^{\circ} | 90 degrees    60^\circ, 120^\circ | 60,120    10\text{ cm} | 10
    10 cm | 10\text{ cm}    15\mbox{ cm}^2 | 15\text{ square cm}    12 marbles | 12
    2\sqrt{3}\text{ feet} | 2\sqrt{3}    \$ 1,234.50 | 1234.5
    8:34 \text{ p.m.} | 8\!:\!34\text{ p.m.}    x = 3 | 3    f(x)=2x | 2x    x \in [1,2] | [1,2]
    x=1,y=2 | 1,2    x=2 or x=3 | 2,3    2, 3, \text{ and } 4 | 2,3,4
    x = (2,4) | (2,4)    x \in (0,9) \cup (9,36) | (0,9) \cup (9,36)    x = 1, 2 | x=1, x=2
    d = 10 cm | 10\text{ cm}    x = 10 cm | 10
    \left(3, \frac{\pi}{2}\right) | (3,\pi/2)    [1,2) | \left[1, 2\right)
    \{1,2\} | \{ 2, 1\}    (1,2)\cup(3,4) | (3,4) \cup (1,2)
    (-\infty,3] | \left(-\infty, 3\right]    (1, 0.5) | (1,\frac{1}{2})    1,234 | 1234
    1{,}234 | 1234    1,\!234 | 1234    10\,000 | 10000    81,256 | 81, 256
    \begin{pmatrix} 1/2 & 2 \\ 3 & 4 \end{pmatrix} | \begin{bmatrix}0.5&2\\3&4\end{bmatrix}
    \sqrt{12} | 2\sqrt{3}    \sqrt[3]{8} | 2    \sqrt2 | sqrt(2)    4^{1/2} | 2    2^{10} | 1024
    2^10 | 1024    3\cdot 10^5 | 300000    \frac{35}{2}\pi | 17.5π    \frac{3i}{4} | \frac34i
    x^{2}+1 | 1+x^2    3+2i | 2i+3    \frac{1}{2}x | \frac{x}{2}    \frac{x+2}{7} | (x+2)/7
    3x+2y | 2y+3x    \text{Even} | even    \text{(A)} | A    11_2 | 11_{2}
    2x \le 3 | 2x\leq 3    3. | 3.0
"""
OTHER_MATHS = r"""
    1 | 2    -3 | 3    (1,2) | [1,2]    (1,2) | (2,1)    1,2 | 2,1    1,2,3 | 1,2
    (1,234) | 1234    (20,100) | 20100    0.3333333333 | 1/3    3.1415926535897932384626 | \pi
    1.41421356 | \sqrt2    (x-2)(x+2) | x^2-4    x^2/x | x    2x+3x | 5x    x=2 | y=2
    x=1,y=2 | y=1,x=2    x = 3 cm | 3\text{ boxes}
    2x=6 | 6    5=6 | 6    5=6 | 5    5 am | 5 pm    3\text{ cm} | 3\text{ boxes}
    125\% | 125\text{ miles}    20 million | 20    3 4 | 12    even | odd    CBAD | DCBA
    no | on    2x | 2y    x+y | x-y    a-b | b-a    \infty | -\infty    \{1,2\} | (1,2)
    \{1,2\} | \{1,3\}    11_2 | 11_3    11_2 | 11    1/2/3 | 3/2    10^{50}+1 | 10^{50}
    2^{200} | 2^{200}+1    (14/3, 4/6) | (14/3,2/3)    50% | 1/2    x^{23} | x^{2}3
    \begin{pmatrix}1\\2\end{pmatrix} | \begin{pmatrix}1&2\end{pmatrix}
    3\sqrt{2} | \sqrt[3]{2}    2<3 | 2>3    1e3 | 1000
    21/2 | 2\frac{1}{2}    \frac{21}{2} | 2 1/2    12 | 1 2    (21/2,1) | (2\frac12,1)
    21/2 cm | 2 1/2 cm    x\frac{1}{2}3 | x1/23    \frac{1 2}{3} | 1 2/3    2^{-9999999999} | 0
    0^{-1} | 10^{-1000}    \frac{1}{16) | \frac{1}{16}    1. 5 | 1.5
"""


@pytest.mark.parametrize(
    "table, same, expected",
    [
        (NUMBERS, same_number, True),
        (OTHER_NUMBERS, same_number, False),
        (MATHS, same_maths, True),
        (OTHER_MATHS, same_maths, False),
    ],
)
def test_pairs(table, same, expected):
    """Pairs stand in a line, with three spaces or more between them."""
    pairs = [pair.split(" | ") for pair in re.split(r"\s{3,}", table.strip())]
    assert [(a, b) for a, b in pairs if both_ways(same, a, b) != expected] == []


def test_no_answer_is_no_right_answer():
    for a, b in [("0", ""), (None, "1"), (1, 1), (None, None)]:
        assert not both_ways(same_maths, a, b) and not both_ways(same_number, a, b)


def spellings(whole, top, bottom):
    """[(a notation of whole + top/bottom or of its negative, its value)]"""
    number = whole + Fraction(top, bottom)
    a, b = number.as_integer_ratio()
    texts = [
        f"{a}/{b}",
        f"\\frac{{{a}}}{{{b}}}",
        f"${a * 2}/{b * 2}$",
        f"{whole} {top}/{bottom}",
        f"{whole}\\dfrac{{{top}}}{{{bottom}}}",
        f"{whole} \\frac {{{top}}} {{{bottom}}}",
    ]
    if 1000 % b == 0:
        texts += [f"{float(number)}", f"{float(number):.4f}"]
    return [(text, number) for text in texts] + [(f"-{text}", -number) for text in texts]


def test_two_numbers_are_the_same_if_their_values_are():
    """21/2 was the same as 2 1/2, and 12 as 1 2: a whole part was joined to its numerator."""
    dice, known = random.Random(0), []
    for _ in range(200):
        known += spellings(dice.randint(0, 30), dice.randint(1, 30), dice.randint(1, 16))
    known.sort(key=lambda pair: re.sub("[^0-9]", "", pair[0]))  # neighbours: nearly the same digits
    for n in range(100_000):
        at = dice.randrange(len(known))
        near = at + dice.randint(1, 10 if n % 2 else len(known))
        (a, x), (b, y) = known[at], known[near % len(known)]
        assert same_maths(a, b) == same_number(a, b) == (x == y), (a, b)


@pytest.mark.parametrize("form", ["{}", "x^2+{}"])
def test_many_different_answers_vote_in_time(form):
    """Both answers of each pair were read again: 512 answers to one question took 30 seconds."""
    start = time.process_time()
    numbers = group_answers([form.format(n) for n in range(512)] * 2, same_maths)
    assert numbers == [*range(512)] * 2 and time.process_time() - start < 15


def hostile():
    """What a model may write by accident or because it pays: it must not hang, crash or be run."""
    big = 10**6
    pieces = r"""
        { } ( ) [ (1, \frac \frac{ \frac12 \dfrac{\frac \sqrt \sqrt{ \sqrt2+ \sqrt[9]{3}* \boxed{
        \boxed \fbox{ \text{ \text{a} \left \left. \\ \ $ $$ ** * ^ ^2 ^{2 ^{9} _1 = x= f(x)= x\in
        - + +1 1/ 1/3+ 1/7* 1, 1,000 1\frac{2}{3} 1. .1 1e5 1e5/ \pi \pi^{90} i* a+b- ,and or ~ {,}
        ,\! \phantom{ \{ \{1\}\cup (1,2)\cup \begin{pmatrix} 1& \quad % ° ٧ ² ½ 😀 √2 ∞ ﷺ A: ####
        <|eot_id|> a- (2^{200}) 2^{1/9} | ' 9""".split()
    pieces += [
        "1 ",
        "1 1/2",
        "ab ",
        "6 cm ",
        " and ",
        " ",
        "\n",
        "\t",
        "\r",
        "\u2028",
        "\x00",
        "\u202e",
        "\u200f",
        "\ud800",
        "\U0010ffff",
        "The answer is ",
        "The answer is: ",
    ]
    yield from r"""
        9**9**9**9 10^10^10 10^{10^{10}} 2^{9999999999} 2^{-9999999999} (2^{-199})^{-199} 0^{-1} 0^0
        1e999999999 -1e-999999999 1/0 \frac{1}{0} \sqrt{-1} \sqrt[0]{3} \sqrt[9]{-8} nan inf -inf
        Infinity __import__('os').system('exit') ().__class__.__bases__[0] ١٧ １７ (a+)+$ x+2^{99/2}
        \sqrt{10^{-400}}""".split()
    yield from [
        "1\x000",
        "\u202e71",
        "17\udfff",
        "\ufeff17",
        "a" * 30 + "!",
        None,
        17,
        1.5,
        b"17",
        ["17"],
        "9" * big,
        "0." + "3" * big,
        "\\frac{" * 5000 + "1" + "}{2}" * 5000,
        "{" * 140 + "1" + "}" * 140,
        "(" * 40 + "1" + ")" * 40,
    ]
    for piece in pieces:
        yield from (piece, piece * (big // len(piece)))
        yield from ((piece * LONGEST)[:LONGEST], (piece * LONGEST)[: LONGEST - 1] + "!")
    dice = random.Random(0)
    for _ in range(100):
        yield "".join(dice.choice(pieces) for _ in range(60))[:LONGEST]


def test_hostile_texts():
    """Each of 400 texts gets an answer within 0.1 s, and no exception."""
    for text in hostile():
        calls = [
            (read_answer, text),
            (read_answer, f"The answer is {text}"),
            (last_boxed, text),
            (last_boxed, f"\\boxed{{{text}}}"),
            (same_number, text, text),
            (same_maths, text, text),
            (same_maths, text, "(1,2)\\cup(3,4)"),
            (same_maths, "x^2+1", text),
        ]
        for function, *arguments in calls:
            start = time.process_time()
            function(*arguments)
            seconds = time.process_time() - start
            assert seconds < 0.1, f"{function.__name__} took {seconds:.3f} s for {text!r:.60}"
        assert text == "\ufeff17" or not same_maths(text, "17"), text


def test_nothing_is_run(tmp_path):
    trap = f"__import__('pathlib').Path({str(tmp_path / 'trap')!r}).touch()"
    for text in (trap, f"The answer is {trap}", f"\\boxed{{{trap}}}"):
        same_maths(text, text), same_number(text, text), read_answer(text), last_boxed(text)
    assert not list(tmp_path.iterdir())


# ---- against published labels ----


@pytest.mark.parametrize(
    "file, same, share",
    [
        ("real_gsm8k", same_number, 0.995),
        ("math_train_normalised", same_maths, 0.99),
        ("hendrycks_is_equiv_tests", same_maths, 1),
        ("rasbt_grade_answer_tests", same_maths, 1),
    ],
)
def test_published_pairs(file, same, share):
    rows = [row for row in rows_of(f"grader/{file}.jsonl") if not row["note"]]
    wrong = [row for row in rows if same(row["a"], row["b"]) != row["equal"]]
    assert len(rows) - len(wrong) >= share * len(rows), wrong


def test_published_extraction():
    for row in rows_of("grader/rasbt_extraction_tests.jsonl"):
        if "last_boxed" in row["source"]:
            assert last_boxed(row["text"]) == row["expected"], row


def test_real_solutions_get_their_published_labels():
    for row in rows_of("model_solutions/gsm8k_model_solutions_long.jsonl"):
        answer = read_answer(row["solution"], marker="A:")
        assert same_number(answer, row["gold"]) == row["is_correct"], row


def test_every_gold_answer_of_gsm8k_is_a_number():
    for row in rows_of("gsm8k/train.jsonl") + rows_of("gsm8k/test.jsonl"):
        answer = read_answer(row["answer"], marker="####")
        assert read_number(answer) is not None, row["answer"][-50:]


def golds_of_math():
    return rows_of("math/train.jsonl") + rows_of("math/math500_test.jsonl")


def test_every_gold_answer_of_math_is_itself_and_is_in_its_solution():
    """A normaliser that swallows an answer whole makes two different answers equal."""
    for row in golds_of_math():
        gold = row["answer"]
        assert same_maths(gold, gold) and same_maths(last_boxed(row["solution"]), gold), gold
        read = read_answer(f"So it is.\nThe answer is ${gold.strip()}$.")
        assert not gold or same_maths(read, gold), (read, gold)


def test_different_gold_answers_of_math_are_different():
    """3,000 random pairs: what is called equal differs in its spelling alone."""
    gold = sorted({row["answer"] for row in golds_of_math()})
    ornaments = (
        r"\\(?:text|mbox|textnormal)\{[^{}]*\}(?:\^2)?|\\circ|[\s{}^\\$%!,dt]"
        r"|[a-zA-Z]\s*=|\.0+$"
    )
    dice = random.Random(0)
    for _ in range(3000):
        a, b = dice.sample(gold, 2)
        if both_ways(same_maths, a, b):
            assert re.sub(ornaments, "", a) == re.sub(ornaments, "", b), (a, b)
