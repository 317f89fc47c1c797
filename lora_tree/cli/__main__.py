"""``python -m lora_tree.cli``, where the script ``lora-tree`` is not on the path."""

from . import main

if __name__ == "__main__":
    main()
