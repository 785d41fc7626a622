"""Maps as pictures, and sums over many of them."""

import io

import numpy as np
import pytest
from PIL import Image, ImageSequence

from afa_jax.report.trust import Mean, routing_of
from afa_jax.sampling.map_pictures import COLOURS, animation, contact_sheet, frames, mean_maps, most_varied, paint

EXPERTS, SITES, STEPS = ("animals", "food", "things"), ("conv_in", "mid_block", "conv_out"), [801, 401, 1]
RNG = np.random.default_rng(0)
MAPS = [RNG.dirichlet(np.ones(3), (3, *size)).transpose(0, 3, 1, 2) for size in ((8, 16), (2, 4), (8, 16))]
PATH = RNG.integers(0, 256, (3, 32, 64, 3), np.uint8)


def one_hot(expert: int, steps: int = 3, size: tuple[int, int] = (2, 4)) -> np.ndarray:
    maps = np.zeros((steps, 3, *size))
    maps[:, expert] = 1
    return maps


def test_mean_maps_enlarge_each_site_to_the_largest():
    mean = mean_maps([np.asarray([[[0.0, 1.0]]]), np.asarray([[[0.0, 0.0, 1.0, 1.0], [1.0, 1.0, 0.0, 0.0]]])])
    np.testing.assert_array_equal(mean, [[[0, 0, 1, 1], [0.5, 0.5, 0.5, 0.5]]])
    # Sizes that are no multiples of one another.
    assert mean_maps([np.ones((3, 2, 5, 7)), np.ones((3, 2, 3, 4))]).shape == (3, 2, 5, 7)
    np.testing.assert_allclose(mean_maps(MAPS).sum(1), 1, rtol=1e-6)


def test_the_site_that_differs_most_from_place_to_place():
    flat = np.full((3, 3, 4, 4), 1 / 3)
    stripes = one_hot(0)
    stripes[:, :, :, 2:] = one_hot(1)[:, :, :, 2:]
    assert most_varied([flat, one_hot(2), stripes, flat]) == 2


def test_a_contact_sheet_has_a_row_for_each_site_and_the_pictures():
    plain = contact_sheet(MAPS, SITES, STEPS)
    whole = contact_sheet(MAPS, SITES, STEPS, path=PATH, experts=EXPERTS)
    assert plain.height == 20 + 4 * 36 and whole.height == 40 + 5 * 36  # sites, their mean; legend and pictures
    # In the pictures' row every pixel is there.
    tile = np.asarray(whole)[40 : 40 + 32, plain.width - 3 * 68 :][:, :64]
    np.testing.assert_array_equal(tile, PATH[0])
    # The last site's map at the last timestep, in the experts' colours.
    tile = np.asarray(plain)[20 + 3 * 36 :][:32, plain.width - 68 :][:, :64]
    np.testing.assert_array_equal(tile[::4, ::4], paint(MAPS[2][2]))


def test_an_animation_has_a_frame_for_each_step_with_the_picture_in_it():
    made = frames(MAPS, SITES, STEPS, PATH, EXPERTS, "octopus and pizza, noto style", width=64)
    assert len(made) == 3
    with Image.open(io.BytesIO(animation(made))) as moving:
        seen = [np.asarray(frame.convert("RGB")) for frame in ImageSequence.Iterator(moving)]
    assert len(seen) == 3
    for frame, original, picture in zip(seen, made, PATH, strict=True):
        np.testing.assert_array_equal(frame, np.asarray(original))
        assert any(np.array_equal(frame[y : y + 32, 10:74], picture) for y in range(30, frame.shape[0] - 32))


def test_who_is_trusted_alone_has_the_pure_colour():
    for expert in range(3):
        (frame,) = frames([one_hot(expert, 1)] * 2, SITES[:2], [1], PATH[:1], EXPERTS, "octopus")
        pixels = np.asarray(frame)
        counts = [(pixels == colour.astype(np.uint8)).all(-1).sum() for colour in COLOURS[:3]]
        assert np.argmax(counts) == expert and sorted(counts)[1] < 400 < sorted(counts)[2]  # the others: legend only


def test_long_texts_are_inside_the_frame_and_the_sheet():
    short = frames(MAPS, SITES, STEPS, PATH, EXPERTS, "octopus")[0]
    names = [f"realistic vision, merge {i}" for i in range(3)]
    for prompt in ("a very long prompt " * 20, "WWWW " * 50, "x" * 300):
        made = frames(MAPS, SITES, STEPS, PATH, names, prompt)
        assert made[0].width == short.width and made[0].height > short.height
        pixels = np.asarray(made[0])
        assert (pixels[:, -8:] == 255).all() and (pixels[-4:] == 255).all()
    sheet = contact_sheet(MAPS, SITES, STEPS, columns=2, experts=names)
    assert sheet.height > contact_sheet(MAPS, SITES, STEPS, columns=2, experts=EXPERTS).height
    colours = {tuple(pixel) for pixel in np.asarray(sheet)[:60].reshape(-1, 3)}
    assert {tuple(colour) for colour in COLOURS[:3].astype(np.uint8)} <= colours  # every key is there


def test_labels_of_sites_have_room_beside_one_another():
    long = ("conv_in", "down_blocks.2.downsampler", "up_blocks.2.layers.1")
    pixels = np.asarray(frames(MAPS, long, STEPS, PATH, EXPERTS, "octopus")[0])
    grey = (pixels < 250).any(-1)
    part, gap = (2 * 340 + 8 - 3 * 8) // 4, 8
    tiles = -10 - 20 - gap - part // 2  # where the second row of tiles begins; above it are the labels
    label = grey[tiles - 16 : tiles - 1]
    for place in range(3):
        end = 10 + (place + 1) * (part + gap)
        assert label[:, end - gap - part : end - gap].any() and not label[:, end - gap : end - 1].any()


def test_means_and_deviations_are_numpys_whatever_the_number():
    rows = RNG.normal(1000, 1, (7, 4, 5, 3)).astype(np.float32)
    found = Mean()
    for row in rows:
        found.add(dict(weights=row, entropy=row[..., 0]))
    exact = rows.astype(np.float64)
    np.testing.assert_allclose(found.mean("weights"), exact.mean(0), rtol=1e-12)
    np.testing.assert_allclose(found.deviation("weights"), exact.std(0), rtol=1e-9)
    np.testing.assert_allclose(found.deviation("entropy"), exact[..., 0].std(0), rtol=1e-9)
    assert found.count == 7


@pytest.mark.parametrize(("maps", "entropy"), [(one_hot(1), 0.0), (np.full((3, 3, 2, 4), 1 / 3), 1.0)])
def test_entropy_is_from_one_alone_to_all_alike(maps, entropy):
    found = routing_of([maps, maps])
    assert found["weights"].shape == (3, 2, 3)
    np.testing.assert_allclose(found["entropy"], np.full((3, 2), entropy), atol=1e-12)
