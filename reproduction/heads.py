"""Head to heads of models that meet in no other table: how often the second is preferred, from the same prompts and noise.

python reproduction/heads.py
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from online_curves import REWARDS
from runs import JUDGES, interval, mean_gain, options, sides, table, versus
from short import SEEDS, UNSEEN
from tuning import METHODS, SEED, SEEN, best, named, told

HEADS = {
    "DPO against SFT, both tuned": ("sft-tuned-{}", "dpo-{}"),
    "DPO against KTO, both tuned": ("kto-tuned-{}", "dpo-{}"),
    "mid against last_down": ("ncp-last_down-one-step-back-{}", "ncp-mid-one-step-back-{}"),
    "twenty steps back against one": ("ncp-last_down-one-step-back-{}", "ncp-last_down-20-steps-back-{}"),
    "a random time against one step back": ("ncp-last_down-one-step-back-{}", "ncp-last_down-a-random-time-{}"),
    "one fixed draw of time and noise against fresh ones": ("draws-fresh-{}", "draws-1-{}"),
    "four fixed draws against fresh ones": ("draws-fresh-{}", "draws-4-{}"),
    "sixteen fixed draws against fresh ones": ("draws-fresh-{}", "draws-16-{}"),
    "200 votes against 50": ("votes-50-{}", "votes-200-{}"),
    "800 votes against 50": ("votes-50-{}", "votes-800-{}"),
    "800 votes against 200": ("votes-200-{}", "votes-800-{}"),
    "three votes on each of 133 against one on each of 400": ("raters-1-margin-0.12-{}", "raters-3-margin-0.12-{}"),
    "nine votes on each of 44 against one on each of 400": ("raters-1-margin-0.12-{}", "raters-9-margin-0.12-{}"),
    "no ties allowed against ties": ("raters-1-margin-0.12-{}", "raters-1-margin-0-{}"),
    "ties four times as readily against ties": ("raters-1-margin-0.12-{}", "raters-1-margin-0.48-{}"),
    "labels of mini-pickscore against votes": ("dpo-{}", "labelled-mini-pickscore-{}"),
    "the three with the best of four against all six": ("pairs-all-{}", "pairs-winner-{}"),
    "the best with the worst of four against all six": ("pairs-all-{}", "pairs-extremes-{}"),
    "DPO on a weaker model's pairs against its own": ("dpo-{}", "weaker-DPO-{}"),
    "DPO on renders against votes": ("dpo-{}", "offpolicy-DPO-{}"),
    "DPO on renders, 160 updates against 40": ("offpolicy-DPO-{}", "offpolicy-DPO-160-updates-{}"),
    "SDPO on renders, 160 updates against 40": ("offpolicy-SDPO-{}", "offpolicy-SDPO-160-updates-{}"),
    "SFT on renders, 160 updates against 40": ("offpolicy-SFT-{}", "offpolicy-SFT-160-updates-{}"),
    "160 updates on renders: SDPO against DPO": ("offpolicy-DPO-160-updates-{}", "offpolicy-SDPO-160-updates-{}"),
    "160 updates on renders: NCP-DPO against DPO": ("offpolicy-DPO-160-updates-{}", "offpolicy-NCP-DPO-160-updates-{}"),
    "160 updates on renders: SFT against DPO": ("offpolicy-DPO-160-updates-{}", "offpolicy-SFT-160-updates-{}"),
    "votes, then the reward, against votes alone": ("drawn-votes-{}", "drawn-reward-on-top-{}"),
    "votes, then the reward, against the reward alone": ("drawn-reward-alone-{}", "drawn-reward-on-top-{}"),
    "trust region against a quarter of the LoRA": ("drawn-far-plain-{}-0.25", "drawn-far-trust-region-{}-1"),
    "trust region against the clip": ("drawn-far-plain-{}-1", "drawn-far-trust-region-{}-1"),
}
"""Label -> names of runs, of which ``{}`` is the seed."""
ONLINE = (("DDPO-SF", "DDPO-IS"), ("RWR", "DDPO-SF"), ("RWR", "DDPO-IS"), ("RWR-sparse", "RWR"))


def tables(measured: Path, seeds: Sequence[int]) -> list[str]:
    found = [
        _row(measured, label, [(a.format(seed), b.format(seed)) for seed in seeds], UNSEEN) for label, (a, b) in HEADS.items()
    ]
    for method in METHODS:
        if chosen := best(measured, method):
            pair = (f"{named(method, {})}-{SEED}", f"{named(method, chosen)}-{SEED}")
            found.append(_row(measured, f"{method}, {told(chosen)} against the recipe's, seen prompts", [pair], SEEN))
    lines = table(["", "held out", "preference", "prompt", "looks"], [row for row in found if row[1:]])
    return [*lines, "", *table(["reward", "more than", "gain"], _rewarded(measured, seeds))]


def _row(measured: Path, label: str, pairs: Sequence[tuple[str, str]], prompts: str) -> list[str]:
    """Of each judge the preference, and 95 % of the gain in its points."""
    if (both := sides(measured, pairs, prompts, JUDGES)) is None:
        return [label]
    gains = (both[1] - both[0]).transpose(2, 0, 1)
    told = zip(versus(measured, pairs, prompts), map(interval, gains), strict=True)
    return [label, *(f"{rate} ({low:+.2f} to {high:+.2f})" for rate, (low, high) in told)]


def _rewarded(measured: Path, seeds: Sequence[int]) -> list[list[str]]:
    """How much more of its reward one method gains than another with as many queries, on unseen prompts."""
    rows = []
    for reward, judge in REWARDS.items():
        for less, more in ONLINE:
            pairs = [(f"drawn-{reward}-{less}-{seed}", f"drawn-{reward}-{more}-{seed}") for seed in seeds]
            scored = judge.replace("incompress", "compress")
            if (both := sides(measured, pairs, UNSEEN, [scored])) is None:
                continue
            gains = (both[1] - both[0])[:, :, 0] * (1 if scored == judge else -1)
            rows.append([reward, f"{more}, {less}", mean_gain(gains)])
    return rows


if __name__ == "__main__":
    given = options(__doc__, SEEDS).parse_args()
    print("\n".join(tables(given.measured, given.seeds)))
