"""A repair of Triton's interpreter, which tests on machines without a GPU run in."""

from typing import Any

from triton.runtime import interpreter

from refusion.model.kernels.launch import interpreted


def repair() -> None:
    """Let loops run to a bound read from memory.

    The interpreter of Triton 3.6 holds scalars as arrays of one element and calls `int` on them, which NumPy 2.4 refuses.
    """
    patch = interpreter._patch_lang_tensor
    if not interpreted() or getattr(patch, "is_repaired", False):
        return

    def patch_and_repair(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    patch_and_repair.is_repaired = True  # pyright: ignore[reportFunctionMemberAccess]: a mark, so that a second call does nothing
    interpreter._patch_lang_tensor = patch_and_repair
