"""Tell whether a server is alive and sees its tree: exit 0, or 1 with the reason.

vLLM's own /health says that the engine runs. It does not say that the plugin is there, nor that the
tree can be read: vLLM serves its base on without either. This asks for both, with the standard
library alone.

    python health.py [http://127.0.0.1:8000]
"""

from __future__ import annotations

import os
import sys
import urllib.request

TIMEOUT_S = 4.0


def main(url: str) -> str | None:
    """Return the problem, or None."""
    try:
        ask(f"{url}/health")
        figures = ask(f"{url}/metrics")
    except OSError as error:
        return f"{url}: {error}"
    for line in figures.splitlines():
        name, _, value = line.rpartition(" ")
        if name == "lora_tree_unreadable":
            return None if float(value) == 0 else "the tree can't be read: see the server's log"
    return "the plugin does not run: LORA_TREE_VLLM_ZOO names a tree, VLLM_PLUGINS has lora_tree"


def ask(url: str) -> str:
    """Return the body of a URL's answer; an HTTP error is an OSError."""
    with urllib.request.urlopen(url, timeout=TIMEOUT_S) as answer:
        return str(answer.read(), "utf-8")


if __name__ == "__main__":
    here = f"http://127.0.0.1:{os.environ.get('SERVE_PORT', '8000')}"
    wrong = main(sys.argv[1] if len(sys.argv) > 1 else here)
    if wrong is not None:
        sys.exit(f"unhealthy: {wrong}")
