"""The terms of the package, one file per method. Importing this registers them, in the order of their losses."""

from __future__ import annotations

import importlib

# l_pix, l_ts and l_lcr first, as every paper writes them; DCKD's, MiPKD's and MCLIR's own after what they build on.
for _name in ("logits", "dukd", "features", "csd", "facd", "slkd", "dckd", "mipkd", "mclir"):
    importlib.import_module(f"{__name__}.{_name}")
