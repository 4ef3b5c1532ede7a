"""The loss that the settings ask for, and the rows that it leaves alone."""

import dataclasses
from functools import partial

import numpy as np

import topr
from engine.common import Problem

OTHERS = {"ppo": topr.ppo_loss, "dpo": topr.dpo_loss}  # than those of topr.TAPERS


def check(settings):
    """Options that would do nothing, refused before hours of work."""
    is_other, has_share = settings.loss in OTHERS, settings.positive_share is not None
    if is_other and (settings.baseline or has_share):
        raise Problem(f"--baseline and --positive-share have no place in --loss {settings.loss}")
    if settings.ratio and (is_other or not topr.TAPERS[settings.loss].needs_mu):
        raise Problem(f"--ratio has no place in --loss {settings.loss}: no weight depends on it")


def make_loss(settings, data):
    """(loss_function(logp, mu_logp, reward, mask, count=N) -> (loss, stats), whether it needs mu,
    for which rows it is silent: it gives them no gradient, whatever pi is)"""
    if settings.loss in OTHERS:
        return OTHERS[settings.loss], True, np.zeros(len(data.rows), bool)
    rewards, baseline = data.rewards[data.units], settings.baseline
    taper = topr.TAPERS[settings.loss]
    if settings.ratio:
        taper = dataclasses.replace(taper, ratio=settings.ratio)
    is_binary = (np.abs(rewards) == 1).all()
    if settings.positive_share is not None:
        if settings.baseline or not is_binary:
            raise Problem("--positive-share needs rewards of +1 and -1, and no --baseline")
        try:
            baseline = topr.baseline_for_share((rewards > 0).mean(), settings.positive_share)
        except ValueError as error:
            raise Problem(f"--positive-share {settings.positive_share}: {error}")
    if is_binary and abs(baseline) > 1:
        raise Problem(f"--baseline {baseline}: above 1 or below -1 the sign of a reward would turn")
    advantage = data.rewards - baseline  # [rows]
    largest = np.where(advantage > 0, taper.pos[1], taper.neg[1])  # weight [rows]
    silent = (advantage == 0) | (largest == 0)  # [rows]
    return partial(topr.topr_loss, taper=taper, baseline=baseline), taper.needs_mu, silent
