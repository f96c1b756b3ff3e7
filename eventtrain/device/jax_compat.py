"""JAX's 64-bit mode, which is a setting of each thread: whoever starts a thread hands it on."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import jax
import jax.experimental


def sixty_four_bit(enabled: bool) -> AbstractContextManager[Any]:
    """``jax.enable_x64``, wherever this version of JAX keeps it."""
    module: Any = jax if hasattr(jax, "enable_x64") else jax.experimental
    return module.enable_x64(enabled)
