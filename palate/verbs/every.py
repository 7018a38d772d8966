"""What every verb takes, as records of options: for completion, and for the page of all options."""

from __future__ import annotations


def records(verb: str) -> dict[str, type]:
    """The records of a verb's options by a heading; the heading is empty where there is one."""
    if verb == "train":
        from palate.runs.recipe import RECORDS

        return RECORDS
    if verb == "vote":
        from palate.votes.exchange import ExportOptions as VotesOut
        from palate.votes.exchange import ImportOptions as VotesIn
        from palate.votes.share import ShareOptions
        from palate.votes.study import VoteOptions

        return {
            "": VoteOptions,
            "palate vote results": ShareOptions,
            "palate vote export": VotesOut,
            "palate vote import": VotesIn,
        }
    if verb in ("recipes", "completion"):
        return {}
    return {"": _record(verb)}


def _record(verb: str) -> type:
    from palate.runs.accuracy import AccuracyOptions
    from palate.runs.export import ExportOptions
    from palate.runs.label import LabelOptions
    from palate.runs.plan import PlanOptions
    from palate.runs.sections import EvaluationOptions
    from palate.verbs import compare, encode, generate, report, score, serve_judge

    return {
        "accuracy": AccuracyOptions,
        "compare": compare.Options,
        "encode": encode.EncodeOptions,
        "evaluate": EvaluationOptions,
        "export": ExportOptions,
        "generate": generate.GenerateOptions,
        "label": LabelOptions,
        "plan": PlanOptions,
        "report": report.Options,
        "score": score.ScoreOptions,
        "serve-judge": serve_judge.ServeOptions,
    }[verb]
