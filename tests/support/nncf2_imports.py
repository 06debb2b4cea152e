"""What a script imports on NNCF 2.x, and what it imports here: as ``docs/from_nncf2.md`` says."""

from __future__ import annotations

import re

from support.places import ROOT


def imports() -> tuple[str, str]:
    """The lines for NNCF 2.x, and those for this package."""
    document = (ROOT / "docs" / "from_nncf2.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```diff\n(-from nncf .*?)```", document, re.DOTALL)
    kinds = ("".join(f"{line[1:]}\n" for line in block.splitlines() if line.startswith(sign)) for sign in ("-", "+"))
    theirs, ours = kinds
    return theirs, ours
