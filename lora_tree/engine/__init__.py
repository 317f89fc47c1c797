"""What happens to the base when a path is activated: plan, arithmetic, pristine, merged, unmerged.

blend ─→ plan (site → terms) ─┬─→ merged:   pristine + terms, written into the weights once
                              └─→ unmerged: terms side by side, added to the site's output
"""
