"""Command lines that each command's help shows; the tests run every one of them.

They use a folder of adapters ``zoo/``, its base in ``models/base`` and rows in JSON lines.
"""

from __future__ import annotations

__all__ = ["EXAMPLES"]

EXAMPLES: dict[str, tuple[str, ...]] = {
    "show": (
        "lora-tree show zoo/ --depth 2",
        "lora-tree show zoo/ fr --sort bytes --svg tree.svg",
        "lora-tree show zoo/ fr/legal@1",
    ),
    "check": (
        "lora-tree check zoo/",
        "lora-tree check zoo/ --base models/base",
        "lora-tree check zoo/ fr/legal --merged merged/legal --base models/base",
    ),
    "explore": ("lora-tree explore zoo/ --html zoo.html",),
    "lock": ("lora-tree lock zoo/ --accept-stale",),
    "init": ("lora-tree init new-zoo/ --base models/base --r 8 --target q_proj",),
    "add": ("lora-tree add zoo/ fr/tax downloads/tax --copy",),
    "mv": ("lora-tree mv zoo/ fr/medical medical --keep-effective",),
    "rm": ("lora-tree rm zoo/ fr/medical --dry-run", "lora-tree rm zoo/ fr/medical"),
    "set": (
        "lora-tree set zoo/ fr/legal --weight 0.8",
        "lora-tree set zoo/ fr/legal --weight '*.q_proj=0.5,default=1'",
    ),
    "log": ("lora-tree log zoo/", "lora-tree log zoo/ fr/legal --json"),
    "restore": ("lora-tree restore zoo/ fr/legal@1", "lora-tree restore zoo/ fr/medical"),
    "gc": ("lora-tree gc zoo/ --dry-run", "lora-tree gc zoo/ --versions 1"),
    "diff": (
        "lora-tree diff zoo/ fr/legal fr/medical",
        "lora-tree diff zoo/ fr --with zoo-before/",
        "lora-tree diff zoo/ fr/legal@1 fr/legal",
    ),
    "similar": ("lora-tree similar zoo/ --picture alike.svg",),
    "squash": ("lora-tree squash zoo/ fr/legal --to legal",),
    "split": ("lora-tree split zoo/ fr --to fr/rest --rank 1",),
    "pick": ("lora-tree pick zoo/ fr/legal --to de/legal",),
    "rebase": ("lora-tree rebase zoo/ --all fr --was zoo-before/fr",),
    "hoist": ("lora-tree hoist zoo/ fr",),
    "merge": ("lora-tree merge zoo/ fr/legal fr/medical --to fr/both --density 0.5",),
    "compress": ("lora-tree compress zoo/ --rank 1 --dry-run",),
    "grow": ("lora-tree grow flat-zoo/ --max-error 0.1 --dry-run",),
    "absorb": ("lora-tree absorb zoo/ tax downloads/tax --rank 2 --dry-run",),
    "export": (
        "lora-tree export zoo/ fr/legal --out export/legal",
        "lora-tree export zoo/ fr/legal:0.5+de:0.5 --rank 8 --out export/blend",
        "lora-tree export zoo/ fr/legal --as mlx --out export/mlx",
        "lora-tree export zoo/ fr/legal --as model --base models/base --out export/model",
        "lora-tree export zoo/ --all --out export/leaves",
    ),
    "extract": ("lora-tree extract models/base models/tuned --out extracted --rank 4",),
    "push": (
        "lora-tree push zoo/ org/zoo --base-name org/model --dry-run",
        "lora-tree push zoo/ org/zoo --base-name org/model --private --license apache-2.0",
    ),
    "pull": ("lora-tree pull org/zoo zoo-there/", "lora-tree pull org/zoo zoo-there/ --dry-run"),
    "generate": ("lora-tree generate zoo/ fr/legal --base models/base --prompt 'Article 1'",),
    "train": ("lora-tree train zoo/ --data rows.jsonl --base models/base --steps 20",),
    "retrain": (
        "lora-tree retrain zoo/ --stale --dry-run",
        "lora-tree retrain zoo/ --stale --fresh --dry-run",
        "lora-tree retrain zoo/ --stale --base models/base --yes",
    ),
    "runs": ("lora-tree runs zoo/", "lora-tree runs zoo/ 1 --picture run.svg"),
    "eval": (
        "lora-tree eval zoo/ --data rows.jsonl --base models/base --picture losses.svg",
        "lora-tree eval zoo/ fr/legal@1 fr/legal --data rows.jsonl --base models/base",
    ),
    "blame": ("lora-tree blame zoo/ fr/legal --data rows.jsonl --base models/base --by kinds",),
    "bisect": ("lora-tree bisect zoo/ fr/legal --data rows.jsonl --base models/base",),
    "promote": ("lora-tree promote zoo/ fr/legal --from zoo/.training/checkpoint-20",),
    "vllm-args": ("lora-tree vllm-args zoo/ --cache vllm-cache --allow 'fr/**'",),
    "llama-args": ("lora-tree llama-args zoo/ fr/legal --files gguf",),
    "schema": ("lora-tree schema > tree.schema.json",),
    "demo": ("lora-tree demo --quick",),
    "help": ("lora-tree help paths",),
}
"""Command → shell lines, in an order in which they can be run one after the other."""
