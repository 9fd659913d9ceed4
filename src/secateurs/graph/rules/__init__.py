"""The rules of the shape algebra, one file an op family; importing this package registers them all.

A rule is `(call) -> types of the outputs`, plus unifications on the shared solver; it never sees a module.
"""

from . import complex, contract, conv, index, norm, packed, pointwise, reduce, view

__all__ = ["complex", "contract", "conv", "index", "norm", "packed", "pointwise", "reduce", "view"]
