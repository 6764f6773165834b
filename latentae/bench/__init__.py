"""The judge: measures any autoencoder by one stated protocol and writes results and a report.

``latentae.bench(...)`` is `latentae.bench.run.bench`. The function and this package share a name, and importing the
package makes it an attribute of ``latentae``; so the package itself can be called.
"""

import sys
from types import ModuleType
from typing import Any


class _Callable(ModuleType):
    def __call__(self, *arguments: Any, **options: Any) -> dict[str, Any]:
        from latentae.bench.run import bench

        return bench(*arguments, **options)


sys.modules[__name__].__class__ = _Callable
