"""The probability that a model gives to the right choice, from the log-likelihoods of a question's choices.

Accuracy sees which choice is the highest. The probability of the right one moves with every question, also where the
highest stays the same: of a model that prefers one letter it still tells what the text of the question moved.
"""

from __future__ import annotations

import re

import numpy as np
import pandas as pd
from scipy.special import softmax

from raylora.mmlu.cloze import COLUMNS, normalised
from raylora.records import Score

LETTER_SCORINGS = frozenset({"letters", "logits", ""})
"""Names of the scoring that compares the log-likelihoods of letters. ``logits`` is the older one; where nothing is
named, there was no other."""


def choice_logprobs(score: Score) -> pd.DataFrame:
    """The log-likelihood of every choice that counts, in nats: (N, choices), with a letter for each column.

    Of cloze it is that which the answer goes by (``--cloze-per``): nats a character, by default. NaN where a
    question has no such choice, and everywhere for written answers.
    """
    columns = {name: name[-1].upper() for name in map(str, score.questions) if re.fullmatch("logprob_[a-z]", name)}
    logprobs = score.questions[list(columns)].rename(columns=columns).astype(float)
    if f"{COLUMNS['character']}_a" in score.questions:
        logprobs[:] = normalised(score.questions, score.info.get("cloze_per", "character"))
    return logprobs


def choice_probabilities(score: Score) -> pd.DataFrame:
    """The probability of every choice of every question: the softmax over its choices; shape and NaN as above.

    Letters are calibrated first: from each log-likelihood the model's mean preference for the letter is taken off
    (``letter_preferences``). Small models prefer a letter whatever is asked (Zhao et al. 2021, "Calibrate Before Use",
    arXiv:2102.09690), often by more nats than a question moves: without this, training that only moves the favourite
    letter changes the probability of right choices, and where the favourite has a probability near 1 nothing else is
    seen. Zhao et al. measure the preference on a prompt without content; here the questions themselves measure it, as
    Zhou et al. 2024 do ("Batch Calibration", arXiv:2309.17249), so that it needs no pass of its own. With next to no
    questions, or where nearly all have the same right letter, what the model knows is taken off, too: of a single
    question the probabilities become equal.
    """
    logprobs = choice_logprobs(score)
    values = logprobs.fillna(-np.inf).to_numpy()
    is_asked = np.isfinite(values).any(axis=1)
    probabilities = np.full(values.shape, np.nan)
    if is_asked.any():
        of_letters = score.info.get("scoring", "") in LETTER_SCORINGS
        preferences = letter_preferences(values[is_asked]) if of_letters else 0.0
        probabilities[is_asked] = softmax(values[is_asked] - preferences, axis=1)
    return pd.DataFrame(probabilities, logprobs.index, logprobs.columns).where(logprobs.notna())


def letter_preferences(logprobs: np.ndarray) -> np.ndarray:
    """The mean preference for each letter, in nats, (choices,): the letters' part of a model of questions plus letters.

    Where all questions have the same number of choices this is the mean over questions of a letter's log-likelihood,
    but for a constant that a softmax does not see. Where numbers differ, it is the least squares fit of (question +
    letter), so that the last letters are not judged by their few questions' level.

    Args:
        logprobs: (N, choices), minus infinity where a question has no such choice; each has one at least.
    """
    has = np.isfinite(logprobs)
    shares = has / has.sum(axis=1, keepdims=True)
    present = np.where(has, logprobs, 0.0)
    centred = np.where(has, logprobs - (shares * present).sum(axis=1, keepdims=True), 0.0)
    # The normal equations, from which the questions' part is eliminated: one row and column a letter.
    equations = np.diag(has.sum(axis=0)) - shares.T @ has
    fitted: np.ndarray = np.linalg.lstsq(equations, centred.sum(axis=0))[0]
    return fitted


def question_probabilities(score: Score) -> pd.DataFrame:
    """By question id: ``correct_probability``, 0 to 1, and ``brier``; NaN where there are no log-likelihoods.

    ``brier`` is the sum over the choices of (p - y)^2, with y of 1 for the right choice and 0 for others (Brier 1950,
    "Verification of forecasts expressed in terms of probability"): 0 at best, 2 at worst.
    """
    probabilities = choice_probabilities(score)
    values = probabilities.to_numpy()
    is_right = score.questions["answer"].to_numpy(dtype=object)[:, None] == probabilities.columns.to_numpy(dtype=object)
    is_known = (is_right & ~np.isnan(values)).any(axis=1)
    right, brier = np.nansum(values * is_right, axis=1), np.nansum((values - is_right) ** 2, axis=1)
    found = {"correct_probability": np.where(is_known, right, np.nan), "brier": np.where(is_known, brier, np.nan)}
    return pd.DataFrame(found, index=score.questions["question_id"])
