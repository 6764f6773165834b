"""The scripts of ``tools/`` as modules."""

import importlib.util
import sys
from pathlib import Path

import pytest

TOOLS = Path(__file__).parents[2] / "tools"


@pytest.fixture
def tool(monkeypatch):
    """Loads a script by its name; what it imports from beside it is found."""
    monkeypatch.syspath_prepend(str(TOOLS))

    def load(name):
        spec = importlib.util.spec_from_file_location(f"tool_{name}", TOOLS / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, spec.name, module)
        spec.loader.exec_module(module)
        return module

    return load


@pytest.fixture
def claims(tool, monkeypatch):
    """The modules of the claims, beside the script."""
    tool("claims")
    for name in [name for name in sys.modules if name == "claims" or name.startswith("claims.")]:
        monkeypatch.delitem(sys.modules, name)
    import claims.dcae
    import claims.dcae_speed
    import claims.diffusion_decoder
    import claims.eqvae
    import claims.frame
    import claims.litevae
    import claims.pictures
    import claims.probe
    import claims.probe_codecs
    import claims.realism
    import claims.samplers

    return claims
