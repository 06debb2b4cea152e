"""Files as their runtimes serve them: at which precision, how close to torch, how fast, and where the time goes."""

from __future__ import annotations

from nncf_compactprune.serving.open import open_server
from nncf_compactprune.serving.server import Serving

__all__ = ["Serving", "open_server"]
