"""``python -m lora_tree``: the command line, where the script ``lora-tree`` is not on the path."""

from .cli import main

if __name__ == "__main__":
    main()
