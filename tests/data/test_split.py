"""What is held out for validation is not trained on."""

import numpy as np
import pytest

from afa_jax.data.sources import PictureSource
from afa_jax.data.split import Subset, hold_out
from afa_jax.errors import InputError


class Captions:
    """Each picture several times, with a caption each."""

    fingerprint = "captions"

    def __init__(self, pictures: int, captions: int):
        self.pictures, self.captions = pictures, captions

    def __len__(self) -> int:
        return self.pictures * self.captions

    def __getitem__(self, index: int) -> dict:
        return dict(image=np.full((4, 4, 3), index // self.captions, np.uint8), caption=f"caption {index}")

    def name(self, index: int) -> str:
        return f"{index // self.captions}.png"


@pytest.mark.parametrize("captions", [1, 5])
def test_no_picture_is_on_both_sides(captions):
    source = Captions(20, captions)
    train, held_out = hold_out(source, 6, seed=3)
    sides: tuple[object, object] = (train, held_out)
    assert all(isinstance(side, PictureSource) for side in sides) and len(held_out) == 6
    seen = {train.name(i) for i in range(len(train))}
    unseen = {held_out.name(i) for i in range(6)}
    assert seen and not seen & unseen and seen | unseen == {source.name(i) for i in range(len(source))}
    if captions == 1:
        assert len(train) == 14
    np.testing.assert_array_equal(train[2]["image"], source[int(train.indices[2])]["image"])
    # The same choice again, another one for another seed, and each known by its fingerprint.
    again, other = hold_out(source, 6, seed=3)[1], hold_out(source, 6, seed=4)[1]
    np.testing.assert_array_equal(again.indices, held_out.indices)
    assert again.fingerprint == held_out.fingerprint != other.fingerprint != Subset(source, train.indices).fingerprint


def test_something_must_stay():
    with pytest.raises(InputError, match=r"validation\.pairs=4, but there are 5 examples"):
        hold_out(Captions(1, 5), 4, seed=0)
