"""The verbs by what they are for, and what each does: all that ``palate --help`` needs to load."""

from __future__ import annotations

GROUPS = {
    "start here": {
        "train": "align a model: palate train RECIPE [--option value ...]",
        "plan": "memory, time and disk that a recipe will take: palate plan RECIPE [--memory GB] [--option value ...]",
        "recipes": "what can be trained how: palate recipes [WORD ...], such as palate recipes sdxl",
        "report": "runs or comparisons as one page: palate report FOLDER [FOLDER ...]",
    },
    "data": {
        "encode": "fill the cache before training, on any number of machines: palate encode RECIPE [--shard I/N]",
        "vote": "a page on which people judge pictures: palate vote DIR [--option value ...]",
        "label": "judges' opinions as pairs to train on: palate label DIR|PAIRS --judges '[...]' --output pairs.parquet",
        "generate": "pictures of many prompts: palate generate MODEL --prompts P --output_dir DIR [--option value ...]",
    },
    "judge": {
        "score": "what judges say of pictures: palate score DIR --judges '[...]'",
        "compare": "which folder of pictures is better: palate compare BASE OTHER [OTHER ...] [--option value ...]",
        "evaluate": "compare base and tuned model of a finished run again: palate evaluate RUN [--option value ...]",
        "accuracy": "how often judges and tuned models prefer what people did: palate accuracy PAIRS --judges ... --model RUN",
        "serve-judge": "serve a judge over HTTP: palate serve-judge NAME [--port PORT]",
    },
    "share": {
        "export": "a LoRA for ComfyUI and A1111, merged weights, a pipeline: palate export RUN --format kohya --output F",
        "completion": "completion of these words in a shell: palate completion bash|zsh|fish",
    },
}
VERBS = {verb: text for group in GROUPS.values() for verb, text in group.items()}
