"""The terms of the package, one file per method. Importing this package registers them in the order of the log."""

from __future__ import annotations

import importlib

# l_pix, l_ts and l_lcr first, as in the papers; then the methods' own losses.
for _name in ("logits", "dukd", "features", "csd", "facd", "slkd", "dckd", "mipkd", "mclir"):
    importlib.import_module(f"{__name__}.{_name}")
