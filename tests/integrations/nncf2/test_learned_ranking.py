"""A learned ranking with the functions that a script registered, as NNCF 2.x took them."""

from __future__ import annotations

from typing import Any

import torch
from support.networks import classifier  # type: ignore[import-not-found]
