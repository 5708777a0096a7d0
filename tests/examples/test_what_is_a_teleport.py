"""The picture in the README: what it says of a teleport is so, and it is drawn."""

import matplotlib.image
import numpy as np
from conftest import ROOT, load_script

example = load_script("examples/what_is_a_teleport.py")


def test_the_jump_stays_on_its_level_set_and_descent_after_it_is_the_twin_s():
    moved, s, (plain, jumped, twin) = example.runs()
    assert abs(moved.drift) <= 1e-15 and abs(s - example.BOUND) < 1e-12
    np.testing.assert_allclose(twin[1], jumped[1], rtol=1e-9, atol=1e-15)
    np.testing.assert_allclose(twin[0] * [s, 1 / s], jumped[0], rtol=1e-12)
    assert jumped[1][10] < plain[1][10] / 1000
    for path, _ in (plain, jumped, twin):
        assert abs(path[-1].prod() - 1) < 1e-3  # each ends on the set of minima


def test_the_picture_has_content_and_stands_in_the_readme(tmp_path):
    example.main(tmp_path)
    image = matplotlib.image.imread(tmp_path / "what_is_a_teleport.png")
    committed = matplotlib.image.imread(ROOT / "figures" / "what_is_a_teleport.png")
    assert image[..., :3].std() > 0.02 and image.shape == committed.shape
    assert "(figures/what_is_a_teleport.png)" in (ROOT / "README.md").read_text()
