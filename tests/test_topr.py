"""The loss maths against worked numbers and against plain Python, by value and by gradient.

Every test takes the module as its argument `topr`, so that test_mutants.py can hand it a broken
one.
"""

import itertools
import math

import pytest
import torch

A = dict(
    rewards=[1, -1], logps=[[-0.5, -1, -0.25], [-1.2, -0.8]], mus=[[-0.7, -0.9, -0.4], [-1, -0.5]]
)
F = dict(
    rewards=[1, -1, -1, 1],
    logps=A["logps"] + [[-2], [-0.1, -0.2, -0.3, -0.4]],
    mus=A["mus"] + [[-1], [-0.2] * 4],
)


@pytest.fixture
def topr():
    import topr

    return topr


def tensors(example, padding=float("nan"), left=False, requires_grad=True):
    """Ragged lists as padded tensors; what stands in the padding must not matter."""
    longest = max(map(len, example["logps"]))
    place = lambda row: (
        [padding] * (longest - len(row)) * left
        + list(row)
        + [padding] * (longest - len(row)) * (not left)
    )
    logp = torch.tensor(
        [place(row) for row in example["logps"]], dtype=torch.float32, requires_grad=requires_grad
    )
    mu = torch.tensor([place(row) for row in example["mus"]], dtype=torch.float32)
    mask = torch.tensor([place([1.0] * len(row)) for row in example["logps"]]) == 1
    return logp, mu, torch.tensor(example["rewards"], dtype=torch.float32), mask


def by_hand(example, taper, baseline=0.0):
    """The loss and its gradient in plain Python: an independent computation."""
    loss, gradients, n = 0.0, [], len(example["rewards"])
    for reward, logp, mu in zip(example["rewards"], example["logps"], example["mus"]):
        advantage = reward - baseline
        low, high = taper.pos if advantage > 0 else taper.neg
        d = [l - m for l, m in zip(logp, mu)]
        ratios = {"sequence": [sum(d)] * len(d), "mean": [sum(d) / len(d)] * len(d), "token": d}
        weights = [min(max(math.exp(min(ratio, 700)), low), high) for ratio in ratios[taper.ratio]]
        loss -= advantage * sum(w * l for w, l in zip(weights, logp)) / len(logp) / n
        gradients.append([-advantage * weight / len(logp) / n for weight in weights])
    return loss, gradients


def close(a, b, tolerance=1e-6):
    assert abs(a - b) <= tolerance * max(1, abs(b)), f"{a} is not {b}"


def check(topr, example, taper, expected, baseline=0.0, gradients=None, tolerance=1e-6):
    logp, mu, reward, mask = tensors(example)
    loss, stats = topr.topr_loss(logp, mu, reward, mask, taper=taper, baseline=baseline)
    loss.backward()
    limits = topr.TAPERS[taper] if isinstance(taper, str) else taper
    value, slopes = by_hand(example, limits, baseline)
    close(loss.item(), value, tolerance)
    if expected is not None:
        close(loss.item(), expected)
    for row, slope in enumerate(slopes):
        got = logp.grad[row][mask[row]].tolist()
        assert got == pytest.approx(slope, abs=1e-6, rel=1e-5)
        if gradients:
            assert got == pytest.approx([gradients[row]] * len(got), abs=1e-6)
    # nothing leaks into the padding
    assert torch.equal(logp.grad[~mask], torch.zeros(int((~mask).sum())))
    return stats


def test_worked_example_a(topr):
    """The smallest case: one positive, one negative that the policy has begun to leave."""
    stats = check(topr, A, "topr", -0.011599, gradients=[-0.166667, 0.151633])
    assert stats["weight"].tolist() == pytest.approx([1, 0.606531], abs=1e-6)
    assert stats["log_ratio"].tolist() == pytest.approx([0.25, -0.5], abs=1e-6)


def test_worked_example_f_and_the_other_tapers(topr):
    stats = check(topr, F, "topr", -0.127239, gradients=[-0.083333, 0.075816, 0.091970, -0.062500])
    assert stats["weight"].tolist() == pytest.approx([1, 0.606531, 0.367879, 1], abs=1e-6)
    check(topr, F, "reinforce", -0.541667)
    check(topr, F, "tis", -0.138568)
    check(topr, F, "is", -0.097148)
    check(topr, F, "sft", None)
    check(topr, F, topr.Taper(pos=(0.5, 2), neg=(0.4, 0.5)), None)


@pytest.mark.parametrize(
    "ratio, expected, weights, slopes",
    [
        ("sequence", -0.011599, [0.606531] * 2, [0.151633] * 2),
        ("mean", -0.097734, [0.778801] * 2, [0.194700] * 2),
        ("token", -0.102116, [0.818731, 0.740818], [0.204683, 0.185205]),
    ],
)
def test_worked_example_a_with_each_ratio(topr, ratio, expected, weights, slopes):
    """A positive of TOPR has weight 1 whatever the ratio is."""
    logp, mu, reward, mask = tensors(A)
    loss, stats = topr.topr_loss(logp, mu, reward, mask, taper=of_ratio(topr, ratio))
    loss.backward()
    close(loss.item(), expected)
    assert logp.grad[1, :2].tolist() == pytest.approx(slopes, abs=1e-6)
    assert logp.grad[0].tolist() == pytest.approx([-0.166667] * 3, abs=1e-6)
    assert stats["weight"].tolist() == pytest.approx([1, sum(weights) / 2], abs=1e-6)
    assert stats["log_ratio"].tolist() == pytest.approx([0.25, -0.5], abs=1e-6)


def of_ratio(topr, ratio):
    return topr.Taper(pos=(1, 1), neg=(0, 1), ratio=ratio)


@pytest.mark.parametrize("ratio", ["mean", "token"])
def test_the_properties_hold_for_each_ratio(topr, ratio):
    """N over any split, padding of any kind, extreme ratios, tokens of probability 0."""
    taper = of_ratio(topr, ratio)
    whole = check_value(topr, F, taper)
    for padding, left in itertools.product((0.0, math.nan, math.inf, -math.inf), (False, True)):
        parts = [
            {name: [values[i] for i in part] for name, values in F.items()}
            for part in ([3, 1], [2, 0])
        ]
        close(
            sum(
                topr.topr_loss(*tensors(part, padding, left), taper=taper, count=4)[0].item()
                for part in parts
            ),
            whole,
        )
    for d in (200, -200):
        long = dict(rewards=[-1], logps=[[-1.0] * 400], mus=[[-1.0 - d] * 400])
        stats = check(topr, long, taper, None)
        assert stats["weight"].item() == float(d > 0)
    logp, mu, reward, mask = tensors({**A, "logps": [A["logps"][0], [-math.inf, -0.8]]})
    loss, _ = topr.topr_loss(logp, mu, reward, mask, taper=taper)
    loss.backward()
    assert loss.isfinite() and (logp.grad[1] == 0).all()


def test_on_policy_is_reinforce(topr):
    on_policy = {**A, "mus": A["logps"]}
    check(topr, on_policy, "topr", -0.208333)
    check(topr, on_policy, "reinforce", -0.208333)


def test_baseline_moves_branch_and_coefficient_together(topr):
    """The bug: choosing the limits by the sign of R while the coefficient is R - c."""
    check(topr, A, "topr", -0.309065, baseline=0.5)
    check(topr, A, "topr", 0.285867, baseline=-0.5)
    # with c = 0.3 the first one turns into a negative
    graded = {**F, "rewards": [0.2, 0.4, -0.3, 2.5]}
    check(topr, graded, "topr", None, baseline=0.3)
    twice_sft = check_value(topr, A, "sft") * 2
    close(check_value(topr, A, "topr", baseline=-1.0), twice_sft)


def check_value(topr, example, taper, **options):
    return topr.topr_loss(*tensors(example), taper=taper, **options)[0].item()


def test_the_ratio_is_of_the_sequence(topr):
    """T = 400 with every token at -0.01: w is exp(-4), not the 0.99 of a token ratio or a ratio
    divided by T."""
    long = dict(rewards=[-1], logps=[[-1.01] * 400], mus=[[-1.0] * 400])
    _, stats = topr.topr_loss(*tensors(long))
    close(stats["weight"].item(), 0.018316)
    check(topr, long, "topr", None)


@pytest.mark.parametrize("d, weight", [(200, 1.0), (-200, 0.0)])
def test_clip_before_exp(topr, d, weight):
    """exp(200) is inf, and inf times a zero gradient is NaN."""
    for tokens in (1, 10, 4000):
        example = dict(rewards=[-1], logps=[[-1.0] * tokens], mus=[[-1.0 - d / tokens] * tokens])
        logp, mu, reward, mask = tensors(example)
        loss, stats = topr.topr_loss(logp, mu, reward, mask)
        loss.backward()
        assert stats["weight"].item() == weight
        assert logp.grad.isfinite().all() and loss.isfinite()


def test_differences_before_sums_before_exp(topr):
    """4,000 tokens whose ratios multiply to inf half-way and come back: d is -100, whatever the
    product does."""
    logps = [-1.0] * 2000 + [-4.05] * 2000
    example = dict(rewards=[-1], logps=[logps], mus=[[-4.0] * 2000 + [-1.0] * 2000])
    _, stats = topr.topr_loss(*tensors(example))
    close(stats["log_ratio"].item(), -100, 0.05)
    assert stats["weight"].item() == pytest.approx(math.exp(-100), abs=1e-30)


@pytest.mark.parametrize("split", [[[0], [1], [2], [3]], [[0, 1, 2], [3]], [[3, 1], [2, 0]]])
def test_any_split_into_micro_batches(topr, split):
    """A mean of micro-batch means gives -0.001493 for the second split; the sum over N is -0.127239
    for every one."""
    total = 0.0
    for part in split:
        example = {name: [values[i] for i in part] for name, values in F.items()}
        total += topr.topr_loss(*tensors(example), count=4)[0].item()
    close(total, -0.127239)


@pytest.mark.parametrize("padding", [0.0, math.nan, math.inf, -math.inf, 1e30])
@pytest.mark.parametrize("left", [False, True])
def test_padding_may_hold_anything(topr, padding, left):
    """0 * NaN is NaN: masked positions are selected away, never multiplied away."""
    logp, mu, reward, mask = tensors(F, padding, left)
    for loss, _ in (topr.topr_loss(logp, mu, reward, mask), topr.ppo_loss(logp, mu, reward, mask)):
        logp.grad = None
        loss.backward()
        assert loss.isfinite() and logp.grad.isfinite().all()
    close(topr.topr_loss(logp, mu, reward, mask)[0].item(), -0.127239)


def test_zero_advantage_counts_in_n(topr):
    example = {**F, "rewards": [1, -1, 0, 0]}
    logp, mu, reward, mask = tensors(example)
    loss, _ = topr.topr_loss(logp, mu, reward, mask)
    loss.backward()
    close(loss.item(), -0.011599 / 2)
    assert logp.grad[2:].nan_to_num(0).abs().max() == 0


def test_pi_of_zero(topr):
    """A negative that the policy can no longer write has faded away entirely; a positive like that
    is an error."""
    for taper in ("topr", "reinforce", "is"):
        example = {**A, "logps": [A["logps"][0], [-math.inf, -0.8]]}
        logp, mu, reward, mask = tensors(example)
        loss, _ = topr.topr_loss(logp, mu, reward, mask, taper=taper)
        loss.backward()
        assert loss.isfinite() and logp.grad.isfinite().all() and (logp.grad[1] == 0).all()
    example = {**A, "logps": [[-0.5, -math.inf, -0.25], A["logps"][1]]}
    with pytest.raises(ValueError, match="sequence 0"):
        topr.topr_loss(*tensors(example))


def test_errors_name_the_sequence_and_the_token(topr):
    for bad in (math.nan, math.inf, -math.inf):
        with pytest.raises(ValueError, match="sequence 1, token 0.*mu"):
            topr.topr_loss(*tensors({**A, "mus": [A["mus"][0], [bad, -0.5]]}))
    with pytest.raises(ValueError, match="sequence 0, token 2"):
        topr.topr_loss(*tensors({**A, "logps": [[-0.5, -1, math.nan], A["logps"][1]]}))
    with pytest.raises(ValueError, match="sequence 1: .*no completion"):
        topr.topr_loss(*tensors({**A, "logps": [A["logps"][0], []], "mus": [A["mus"][0], []]}))
    with pytest.raises(ValueError, match="sequence 1.*reward"):
        topr.topr_loss(*tensors({**A, "rewards": [1, math.nan]}))
    for pos in ((1, 0.5), (-0.1, 1), (math.nan, 1), (0, math.nan)):
        with pytest.raises(ValueError, match="limits"):
            topr.Taper(pos=pos, neg=(0, 1))


def test_a_count_of_zero_is_refused(topr):
    """It would count as not given; and a batch without sequences has no mean."""
    empty = [torch.zeros(0, 3), torch.zeros(0, 3), torch.zeros(0), torch.zeros(0, 3).bool()]
    for loss in (topr.topr_loss, topr.ppo_loss, topr.dpo_loss):
        for batch, count in ((tensors(A), 0), (tensors(A), -1), (empty, None)):
            with pytest.raises(ValueError, match="count is"):
                loss(*batch, count=count)
        assert loss(*empty, count=4)[0] == 0  # a rank that has none in this step


def test_weights_have_no_gradient(topr):
    """The bug leaves the loss as it is and turns the gradient of a negative round."""
    logp, mu, reward, mask = tensors(A)
    _, stats = topr.topr_loss(logp, mu, reward, mask)
    assert not stats["weight"].requires_grad and not stats["log_ratio"].requires_grad
    d = torch.tensor([-0.5], requires_grad=True)
    assert not topr.taper_weights(d, torch.tensor([-1.0]), "topr").requires_grad


def test_half_precision_inputs_are_summed_in_float32(topr):
    logp = torch.full((1, 1000), -1.0, dtype=torch.bfloat16)
    mu = torch.full((1, 1000), -1.0078125, dtype=torch.bfloat16)  # the next number in bfloat16
    _, stats = topr.topr_loss(logp, mu, torch.tensor([-1.0]), torch.ones(1, 1000, dtype=torch.bool))
    close(stats["log_ratio"].item(), 7.8125, 1e-3)


def test_random_batches_against_autograd_free_python(topr):
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.rand(*shape, generator=generator).tolist()
    for _ in range(5):
        lengths = [1 + int(9 * u) for u in draw(7)]
        example = dict(
            rewards=[4 * u - 2 for u in draw(7)],
            logps=[[-3 * u for u in draw(n)] for n in lengths],
            mus=[[-3 * u for u in draw(n)] for n in lengths],
        )
        for name in topr.TAPERS:
            # float32 against float64
            check(topr, example, name, None, baseline=0.25, tolerance=1e-5)


def test_ppo(topr):
    """Token ratios, the worse of clipped and unclipped, by hand."""
    logp, mu, reward, mask = tensors(F)
    loss, stats = topr.ppo_loss(logp, mu, reward, mask, clip=0.2)
    loss.backward()
    expected = 0.0
    for row, (r, ls, ms) in enumerate(zip(F["rewards"], F["logps"], F["mus"])):
        terms, slopes = [], []
        for l, m in zip(ls, ms):
            ratio = math.exp(l - m)
            bounded = min(max(ratio, 0.8), 1.2)
            terms.append(min(ratio * r, bounded * r))
            slopes.append(-ratio * r / len(ls) / 4 if ratio * r <= bounded * r else 0.0)
        expected -= sum(terms) / len(ls) / 4
        assert logp.grad[row][mask[row]].tolist() == pytest.approx(slopes, abs=1e-6)
    close(loss.item(), expected)


def test_dpo(topr):
    # better, worse, better, worse
    example = {name: [values[i] for i in (0, 1, 3, 2)] for name, values in F.items()}
    logp, mu, reward, mask = tensors(example)
    loss, stats = topr.dpo_loss(logp, mu, reward, mask, beta=0.5)
    loss.backward()
    d = [sum(l - m for l, m in zip(ls, ms)) for ls, ms in zip(example["logps"], example["mus"])]
    margins = [0.5 * (d[0] - d[1]), 0.5 * (d[2] - d[3])]
    close(loss.item(), sum(math.log(1 + math.exp(-m)) for m in margins) / 2)
    for row in range(4):
        slope = (-1 if row % 2 == 0 else 1) * 0.5 / (1 + math.exp(margins[row // 2])) / 2
        assert logp.grad[row][mask[row]].tolist() == pytest.approx(
            [slope] * int(mask[row].sum()), abs=1e-6
        )
    with pytest.raises(ValueError, match="better one first"):
        topr.dpo_loss(*tensors(A | {"rewards": [-1, 1]}))


def test_shares_and_baselines(topr):
    close(topr.effective_positive_share(0.5, 0.8), 0.1)
    close(topr.effective_positive_share(0.1, -0.8), 0.5)
    for p in (0.05, 0.3, 0.9):
        for share in (0.0, 0.1, 0.5, 1.0):
            close(topr.effective_positive_share(p, topr.baseline_for_share(p, share)), share)
        count = 1000  # and by counting |A| over a data set
        c, positives = 0.3, round(count * p)
        close(
            topr.effective_positive_share(p, c),
            positives * (1 - c) / (positives * (1 - c) + (count - positives) * (1 + c)),
        )
    for p, c in ((0.5, 1.1), (0.5, -1.1), (1.2, 0), (math.nan, 0)):
        with pytest.raises(ValueError):
            topr.effective_positive_share(p, c)


def test_a_reward_that_the_baseline_makes_zero_leaves_no_share(topr):
    """It was a ZeroDivisionError."""
    for p, c in ((1, 1), (0, -1)):
        with pytest.raises(ValueError, match="no share"):
            topr.effective_positive_share(p, c)


def test_an_unknown_ratio_is_refused_at_once(topr):
    with pytest.raises(ValueError, match="'tokens': sequence, mean or token"):
        topr.Taper(pos=(1, 1), neg=(0, 1), ratio="tokens")


def test_the_baseline_is_not_rounded_to_the_dtype_of_the_rewards(topr):
    """-1 - 0.3 is -1.296875 in bfloat16."""
    logp, mu, reward, mask = tensors(A)
    rounded, _ = topr.topr_loss(logp, mu, reward.bfloat16(), mask, baseline=0.3)
    expected, _ = topr.topr_loss(logp, mu, reward, mask, baseline=0.3)
    assert rounded == expected
    for p, share in ((0, 0.5), (1, 0.5), (0.5, 1.5)):
        with pytest.raises(ValueError):
            topr.baseline_for_share(p, share)


def test_anna_karenina_and_pairs(topr):
    rows = [
        dict(id=i, reward=r, n=n)
        for n, (i, r) in enumerate(
            [
                ("a", -1),
                ("a", 1),
                ("b", 1),
                ("a", 1),
                ("a", -1),
                ("b", 1),
                ("c", -1),
                ("c", -0.3),
                ("b", 2.5),
            ]
        )
    ]
    assert [row["n"] for row in topr.anna_karenina(rows)] == [0, 1, 2, 4, 6, 7]
    assert topr.anna_karenina([]) == []
    assert topr.preference_pairs(rows) == [(1, 0), (3, 4)]


def test_the_surrogate_is_bounded(topr):
    """Two actions, one negative, learning rate 1: the logit gap grows like log(steps) under topr,
    like steps without."""
    gaps = {}
    for taper in ("topr", "reinforce"):
        logits = torch.zeros(2, requires_grad=True)
        for step in range(1, 401):
            logp = logits.log_softmax(-1)[:1].view(1, 1)  # the negative is action 0
            loss, _ = topr.topr_loss(
                logp,
                torch.tensor([[math.log(0.5)]]),
                torch.tensor([-1.0]),
                torch.ones(1, 1),
                taper=taper,
            )
            (gradient,) = torch.autograd.grad(loss, logits)
            logits = (logits - gradient).detach().requires_grad_()
            gaps[taper, step] = (logits[1] - logits[0]).item()
    close(gaps["topr", 400] - gaps["topr", 200], math.log(2), 0.05)
    assert gaps["reinforce", 400] - gaps["reinforce", 200] > 150
