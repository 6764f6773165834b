"""The check of formats takes a loader out of its file, and sees a wrong one."""

import textwrap

import numpy as np
import pytest

LOADER = """
    import json
    import os
    import a_package_that_is_not_here
    from another import Thing
    from torch.utils.data import Dataset
    import numpy as np

    raise SystemExit("a script that must not run")

    class Base(Dataset):
        def __len__(self):
            return len(self.names)

    class Config:
        pass

    class CustomDataset(Base):
        def __init__(self, features_dir, labels_dir, config: Config = None, thing: Thing = None):
            self.folders = features_dir, labels_dir
            self.names = sorted(os.listdir(features_dir))

        def __getitem__(self, index):
            features, labels = (np.load(os.path.join(folder, self.names[index])) for folder in self.folders)
            return features * SCALE, labels
"""


@pytest.fixture
def checkout(tmp_path):
    def write(scale):
        (tmp_path / "checkouts/fast").mkdir(parents=True, exist_ok=True)
        code = textwrap.dedent(LOADER).replace("SCALE", str(scale))
        (tmp_path / "checkouts/fast/train.py").write_text(code)
        return tmp_path / "checkouts"

    return write


def test_a_loader_is_lifted_and_wrong_values_show(tool, checkout, tmp_path):
    tools = tool("check_formats")
    fastdit = next(peer for peer in tools.PEERS if peer.format == "fastdit")
    store = tools.make_store(tmp_path)
    outcomes = {}
    for scale in (1, 1.01):
        root = checkout(scale)
        path = tools.find(fastdit, [root])
        assert path == root / "fast/train.py"
        outcomes[scale] = tools.check(fastdit, tools.lift(path, fastdit.loader, path.parent), tmp_path, store)
    assert outcomes[1] == {"opens": True, "items": tools.IMAGES}
    assert outcomes[1.01]["opens"] is False
    assert "latents: (1, 4, 8, 8) float32 is not what the store has" in outcomes[1.01]["error"]


def test_a_missing_checkout_is_none(tool, tmp_path):
    tools = tool("check_formats")
    (tmp_path / "train.py").write_text("class Other: pass")
    assert [tools.find(peer, [tmp_path]) for peer in tools.PEERS] == [None] * 6
    with pytest.raises(AssertionError, match="label"):
        tools.same(np.array([1]), [2], "label")
