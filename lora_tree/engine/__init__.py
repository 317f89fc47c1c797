"""The base's side of an activated path: plan, arithmetic, pristine, merged, unmerged.

blend ─→ plan (site → terms) ─┬─→ merged:   pristine + terms, written once into the weights
                              └─→ unmerged: terms side by side, added to the site's output
"""
