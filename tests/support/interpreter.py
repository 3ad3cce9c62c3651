"""Triton's interpreter without what it does again and again. Import it before kernels run.

It prepares its language for every kernel, and anew for every function that a kernel calls, whether
that is done already or not: a quarter of the time of these tests.
"""

from __future__ import annotations

from typing import Any

import triton.language as tl
from triton.runtime import interpreter


def _call(self: Any, *args: Any, **kwargs: Any) -> Any:
    known = (tl, tl.core)
    used = [module for module in known if any(module is x for x in self.fn.__globals__.values())]
    if any(tl.core.is_builtin(module.arange) for module in used):
        interpreter._patch_lang(self.fn)
    return self.rewrite()(*args, **kwargs)


if hasattr(interpreter, "_patch_lang"):  # of Triton 3.9
    interpreter.InterpretedFunction.__call__ = _call
