"""Short texts for ``lora-tree help TOPIC``: what several commands have in common."""

from __future__ import annotations

__all__ = ["TOPICS"]

TOPICS: dict[str, tuple[str, str]] = {
    "paths": (
        "how nodes, patterns and blends are written",
        """\
fr/legal                      a node, by the names from the top down to it
''                            the bare base
'fr/*'                        a pattern: every node below fr
fr/legal@2                    an earlier version of it, as lora-tree log numbers them
fr/legal:0.5+fr/medical:0.5   a blend: paths with weights; a weight left out is 1
fr/legal:{*.down_proj=0.5}    weights per module: the first pattern that matches counts, and
                              default=1 is for the rest

Put patterns in quotes, so that the shell leaves them alone.
""",
    ),
    "folder": (
        "how a folder of adapters is a tree",
        """\
Every folder with a PEFT adapter in it is a node, and a folder inside another stacks on it:
zoo/fr/legal was trained on top of zoo/fr.

tree.yaml    optional: the base, weights, fresh nodes, adapters that lie elsewhere
tree.lock    written by a save: the hash of each node's files, and what it was trained on

Folders whose name begins with a dot are passed over. So are checkpoints of a run.
""",
    ),
    "stale": (
        "what stale, unlocked and broken nodes are, and what to do about them",
        """\
stale      an ancestor or the base has changed since the node was trained.
           Train it again, or accept it as it is: lora-tree lock FOLDER --accept-stale
unlocked   the files are not those that tree.lock describes.
           If you replaced them on purpose: lora-tree lock FOLDER
broken     the files can't be used. lora-tree check FOLDER says why; --skip-broken leaves the node
           and everything below it out.
""",
    ),
    "overrides": (
        "nodes that replace tensors of the base: heads, embeddings, token rows",
        """\
modules_to_save: [score]            train a module whole; its weight and bias are the node's own
trainable_token_indices: [7, 9]     train these rows of the input embedding

Write them in tree.yaml, at a node or in the defaults. PEFT folders that have them are nodes, too.

On a path the deepest override of a tensor stands for the base's own. Increments of that node and of
nodes below add to it; those of nodes above it, on that module, do not count.
lora-tree show says what each node replaces, lora-tree check which increments do not count.
""",
    ),
    "data": (
        "the rows that train and eval read",
        """\
One JSON object a line, with the path of its node and one of four ways to say what is learnt:

{"path": "fr/legal", "text": "…"}                               all of the text
{"path": "fr/legal", "prompt": "…", "completion": "…"}          the completion
{"path": "fr/legal", "messages": [{"role": "…", "content": "…"}]}   the assistant's turns
{"path": "fr/legal", "prompt": "…", "chosen": "…", "rejected": "…"}   to prefer the first answer

One run learns either from such pairs of answers or from the other kinds, not from both.
Other columns are not read. A path of "" is for the bare base.
""",
    ),
    "programs": (
        "exit codes, --json and the environment, for scripts",
        """\
0   done
1   an error, printed on stderr; or problems that check or show found
2   wrong usage
130 interrupted, by Ctrl-C
143 terminated, by SIGTERM

--json    stdout is one JSON document, or empty after an error; warnings and progress go to stderr
--quiet   no progress and no notes on stderr; warnings and errors stay

LORA_TREE_TRACEBACK=1   show where an error came from
NO_COLOR=1              no colours on a terminal, either
""",
    ),
}
"""Topic → (what it is about, its text)."""
