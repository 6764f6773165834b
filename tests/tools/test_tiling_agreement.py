import numpy as np
import pytest
from PIL import Image

from latentae import create


def table(text):
    return [line.split() for line in text.splitlines()[2:]]


@pytest.mark.filterwarnings("ignore:These latents are:UserWarning")
def test_exact_and_blended_tiles_of_a_folder_and_a_preset(tool, tmp_path, capsys, randomise):
    agreement = tool("tiling_agreement")
    randomise(create("litevae-tiny")).save_pretrained(tmp_path / "model")
    noise = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "a b.png")
    agreement.main([str(tmp_path / "model"), str(tmp_path / "a b.png"), "--size", "96", "--tiles", "32", "96"])
    tiled, whole = table(capsys.readouterr().out.replace("a b.png", "ab.png"))
    assert tiled[:2] == ["ab.png", "32"]
    assert min(map(float, tiled[2:4])) > 90
    assert whole[1:] == ["96", "inf", "inf", "-"]
    agreement.main(["dito-tiny", str(tmp_path / "a b.png"), "--size", "96", "--tiles", "32"])
    ((_, _, latents, pixels, other),) = table(capsys.readouterr().out.replace("a b.png", "ab.png"))
    assert float(latents) > 90
    assert 5 < float(pixels) < 80
    assert 0 < float(other) < 80
