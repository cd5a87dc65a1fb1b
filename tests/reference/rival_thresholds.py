"""Other ways of choosing thresholds, written out: what Offramp's search is measured against.

Shapes: ``K`` exits, ``N`` samples.
"""

import numpy as np


def geometric_shares(confidence_KN, q):
    """MSDNet's search: exit k gets a share of the samples proportional to q to the power k.

    Its threshold is the confidence at that rank among the samples that have not left before.
    Huang et al. (2018), Multi-Scale Dense Networks, dynamic evaluation.
    """
    num_exits, num_samples = confidence_KN.shape
    share_K = q ** np.arange(1, num_exits + 1)
    share_K = share_K / share_K.sum()
    has_left = np.zeros(num_samples, dtype=bool)
    thresholds = []
    for k in range(num_exits - 1):
        surest = np.argsort(-confidence_KN[k], kind="stable")
        surest = surest[~has_left[surest]]
        count = min(int(num_samples * share_K[k]), len(surest))
        threshold = confidence_KN[k][surest[count - 1]] if count else np.inf
        thresholds.append(float(threshold))
        has_left |= confidence_KN[k] >= threshold
    return tuple(thresholds)


def shared_thresholds(confidence_KN, count=200):
    """One threshold for all exits: quantiles of all confidences, and one that nobody reaches."""
    levels = np.quantile(confidence_KN[:-1], np.linspace(0, 1, count))
    return [(float(level),) * (len(confidence_KN) - 1) for level in (*levels, np.inf)]


def first_sure_exit(confidence_KN, thresholds):
    """The exit of each sample, looked for one sample at a time by the rule of DESIGN."""
    exits = []
    for n in range(confidence_KN.shape[1]):
        sure = [k for k, t in enumerate(thresholds) if confidence_KN[k, n] >= t]
        exits.append(sure[0] if sure else len(confidence_KN) - 1)
    return np.array(exits)


def waudby_smith_ramdas(losses_N, target, delta):
    """P-value of "the mean is above the target" by predictable plug-in bets on all samples."""
    count = np.arange(1, len(losses_N) + 1)
    mean_N = np.cumsum(losses_N) / (count + 1)
    variance_N = (0.25 + np.cumsum((losses_N - mean_N) ** 2)) / (count + 1)
    before_N = np.concatenate([[0.25], variance_N[:-1]])
    bet_N = np.minimum(
        np.sqrt(2 * np.log(1 / delta) / (len(losses_N) * before_N)), 0.75 / (1 - target)
    )
    return float(np.exp(-np.cumsum(np.log1p(bet_N * (target - losses_N))).max()))


def learn_then_test(confidence_KN, gap_KN, target, delta, count=100):
    """Learn then Test with one threshold for all exits, from sure to unsure, on all samples.

    Returns the last threshold that passes before the first that fails; None if the first fails.
    Jazbec et al. (2024), Fast yet Safe, choose so.
    """
    num_exits, num_samples = confidence_KN.shape
    chosen = None
    for level in np.quantile(confidence_KN[:-1], np.linspace(0, 1, count))[::-1]:
        thresholds = (float(level),) * (num_exits - 1)
        exit_N = np.full(num_samples, num_exits - 1)
        for k in reversed(range(num_exits - 1)):
            exit_N[confidence_KN[k] >= level] = k
        losses_N = gap_KN[exit_N, np.arange(num_samples)]
        if waudby_smith_ramdas(losses_N, target, delta) > delta:
            break
        chosen = thresholds
    return chosen
