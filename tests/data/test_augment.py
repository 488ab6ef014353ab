import colorsys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from paradigms.data import augment as lift
from paradigms.data import (
    blur,
    chain,
    colour_jitter,
    crop,
    cutmix,
    cutout,
    flip,
    greyscale,
    mixup,
    randaugment,
    random_resized_crop,
    rotate,
    solarise,
    translate,
    trivial_augment,
)
from paradigms.data.augment import resize, rotation, warp
from paradigms.data.colour import shift_hue
from paradigms.data.policies import autocontrast, equalise, operation, posterise

X = np.random.default_rng(0).random((9, 8, 3), np.float32)
KEYS = jax.random.split(jax.random.key(0), 40)


def _many(fn, x=X):
    return np.asarray(jax.jit(jax.vmap(fn, (0, None)))(KEYS, x))


@pytest.mark.parametrize(
    "fn",
    [crop(0), translate(0), flip(0), rotate(0), random_resized_crop((1, 1), (1, 1)), cutout(0), greyscale(0), blur(p=0),
     colour_jitter(0, 0, 0, 0), colour_jitter(p=0), solarise(p=0), randaugment(0)],
)  # fmt: skip
def test_identity_settings_change_nothing(fn):
    square = X[:8]
    np.testing.assert_array_equal(_many(fn, square), np.broadcast_to(square, (40, *square.shape)))


@pytest.mark.parametrize(
    "make",
    [lambda: crop(2), lambda: translate(2), flip, lambda: rotate(20), random_resized_crop, lambda: cutout(3), greyscale,
     blur, colour_jitter, solarise, randaugment, trivial_augment],
)  # fmt: skip
def test_shape_dtype_range_and_equality(make):
    assert make() == make()
    assert hash(make()) == hash(make())
    for x in (X, X[..., :1]):
        out = _many(make(), x)
        assert out.shape == (40, *x.shape)
        assert out.dtype == np.float32
        assert out.min() >= -1e-6
        assert out.max() <= 1 + 1e-6
        if x.shape[-1] == 3 or make is not greyscale:
            assert len(np.unique(out.reshape(40, -1), axis=0)) > 1


@pytest.mark.parametrize(("fn", "mode"), [(crop(2), "constant"), (crop(2, "reflect"), "reflect"), (translate(2), "constant")])
def test_crops_are_windows_of_the_padded_image(fn, mode):
    padded = np.pad(X, ((2, 2), (2, 2), (0, 0)), mode=mode)
    places = {(i, j): padded[i : i + 9, j : j + 8] for i in range(5) for j in range(5)}
    found = [[place for place, window in places.items() if np.array_equal(window, out)] for out in _many(fn)]
    assert all(len(place) == 1 for place in found)
    assert len({place[0] for place in found}) > 12


def test_flip_mirrors_half_the_images():
    np.testing.assert_array_equal(_many(flip(1)), np.broadcast_to(X[:, ::-1], (40, *X.shape)))
    mirrored = [np.array_equal(out, X[:, ::-1]) for out in _many(flip())]
    assert 8 <= sum(mirrored) <= 32


def test_quarter_turns_and_shifts_are_exact_rearrangements():
    x = X[:8]
    for turns in range(-2, 3):
        turned = warp(jnp.asarray(x), rotation(jnp.float32(turns * np.pi / 2)), jnp.zeros(2))
        np.testing.assert_allclose(turned, np.rot90(x, turns), atol=2e-5)
    moved = warp(jnp.asarray(x), jnp.eye(2), jnp.array([2.0, -1.0]))
    np.testing.assert_array_equal(moved[:6, 1:], x[2:, :7])
    assert not np.asarray(moved[6:]).any()
    assert not np.asarray(moved[:, 0]).any()


def test_resize_is_bilinear_with_half_pixel_centres():
    box = np.asarray(resize(jnp.asarray(X), jnp.array([2.0, 1.0]), jnp.array([3.0, 4.0])))
    expected = jax.image.resize(X[2:5, 1:5], X.shape, "linear")
    np.testing.assert_allclose(box, expected, atol=1e-6)


def test_cutout_blanks_its_square_clipped_at_the_border():
    ones = np.ones((9, 8, 1), np.float32)
    blank = 1 - _many(cutout(4), ones)[..., 0]
    for mask in blank:
        rows, columns = mask.any(axis=1).sum(), mask.any(axis=0).sum()
        assert mask.sum() == rows * columns
        assert 2 <= rows <= 4
        assert 2 <= columns <= 4
    assert blank.sum(axis=(1, 2)).max() == 16
    filled = _many(cutout(4, (0.25, 0.5, 0.75)), np.zeros_like(X)).max(axis=(1, 2))
    np.testing.assert_array_equal(filled, np.broadcast_to(np.float32([0.25, 0.5, 0.75]), (40, 3)))


def test_greyscale_weights_and_solarise():
    grey = X @ np.float32([0.299, 0.587, 0.114])
    np.testing.assert_allclose(_many(greyscale(1))[0], np.repeat(grey[..., None], 3, -1), atol=1e-6)
    np.testing.assert_array_equal(_many(solarise(0.5, 1))[0], np.where(X >= 0.5, 1 - X, X))


def test_hue_is_colorsys():
    turned = np.asarray(shift_hue(jnp.asarray(X), 0.3)).reshape(-1, 3)
    for pixel, out in zip(X.reshape(-1, 3), turned, strict=True):
        hue, saturation, value = colorsys.rgb_to_hsv(*pixel.tolist())
        np.testing.assert_allclose(out, colorsys.hsv_to_rgb((hue + 0.3) % 1, saturation, value), atol=1e-5)
    np.testing.assert_allclose(shift_hue(jnp.asarray(X), 0.0), X, atol=1e-6)


def test_jitter_of_brightness_alone_scales_within_its_range():
    factors = _many(colour_jitter(0.4, 0, 0, 0), X * 0.5) / (X * 0.5)
    assert np.ptp(factors, axis=(1, 2, 3)).max() < 1e-4
    means = factors.mean(axis=(1, 2, 3))
    assert means.min() >= 0.6 - 1e-5
    assert means.max() <= 1.4 + 1e-5
    assert np.ptp(means) > 0.5


def test_blur_of_a_point_is_the_gaussian():
    point = np.zeros((9, 9, 1), np.float32)
    point[4, 4] = 1
    kernel = np.exp(-0.5 * np.arange(-3, 4) ** 2 / 1.5**2)
    kernel /= kernel.sum()
    np.testing.assert_allclose(_many(blur((1.5, 1.5), 1, 3), point)[0, 1:8, 1:8, 0], np.outer(kernel, kernel), atol=1e-6)


def test_policy_operations_are_pil_ones():
    image = pytest.importorskip("PIL.Image")
    enhance, ops = pytest.importorskip("PIL.ImageEnhance"), pytest.importorskip("PIL.ImageOps")
    levels = (X * 200 + 20).astype(np.uint8)
    picture, x = image.fromarray(levels), jnp.asarray(levels / np.float32(255))

    op = jax.jit(operation)

    def same(ours, theirs, off=0):
        ours = np.round(np.asarray(ours) * 255)
        assert np.abs(ours - np.asarray(theirs).astype(float)).max() <= off

    same(autocontrast(x), ops.autocontrast(picture), 1)
    same(equalise(x), ops.equalize(picture))
    same(posterise(x, 3), ops.posterize(picture, 3))
    same(op(x, 9, 0.5, 1.0), ops.solarize(picture, 128))
    same(op(x, 10, 1.0, -1.0), enhance.Color(picture).enhance(0.1), 1)
    same(op(x, 11, 1.0, 1.0), enhance.Contrast(picture).enhance(1.9), 2)
    same(op(x, 12, 1.0, -1.0), enhance.Brightness(picture).enhance(0.1), 1)
    same(op(x, 13, 1.0, -1.0), enhance.Sharpness(picture).enhance(0.1), 1)
    same(op(x, 0, 1.0, 1.0), picture)


def test_every_example_has_its_own_key():
    batch = {"x": jnp.asarray(np.broadcast_to(X, (16, *X.shape))), "y": jnp.zeros(16, int)}
    out = lift(crop(3))(KEYS[0], batch)
    assert len(np.unique(np.asarray(out["x"]).reshape(16, -1), axis=0)) > 4
    assert chain()(KEYS[0], batch) is batch
    one = chain(lift(crop(3)), lift(flip()))
    assert one == chain(lift(crop(3)), lift(flip()))


def _batch():
    x = jnp.asarray(np.random.default_rng(1).random((6, 8, 8, 2), np.float32))
    return {"x": x, "y": jnp.arange(6) % 4}


@pytest.mark.parametrize("make", [mixup, cutmix])
def test_mixtures_weigh_labels_as_the_images_are_mixed(make):
    batch = _batch()
    x, partner = np.asarray(batch["x"]), np.roll(batch["x"], 1, axis=0)
    hot = np.eye(4, dtype=np.float32)[np.asarray(batch["y"])]
    run = jax.jit(make(1.0, 4))
    shares = []
    for key in KEYS[:12]:
        out = run(key, batch)
        share = float(((np.asarray(out["x"]) - x) / (partner - x)).mean())  # of the partner, in each image
        np.testing.assert_allclose(out["y"], (1 - share) * hot + share * np.roll(hot, 1, axis=0), atol=1e-4)
        np.testing.assert_allclose(np.asarray(out["y"]).sum(axis=1), 1, atol=1e-5)
        shares.append(share)
    assert np.ptp(shares) > 0.3
    off = make(0, 4)(KEYS[0], batch)
    np.testing.assert_array_equal(off["x"], x)
    np.testing.assert_array_equal(off["y"], hot)


def test_cutmix_pastes_one_box():
    batch, run = _batch(), jax.jit(cutmix(1.0, 4))
    for key in KEYS[:12]:
        out = np.asarray(run(key, batch)["x"])
        pasted = (out == np.roll(batch["x"], 1, axis=0)).all(axis=(0, 3))
        assert pasted.sum() == pasted.any(axis=0).sum() * pasted.any(axis=1).sum()
        kept = (out == np.asarray(batch["x"])).all(axis=(0, 3))
        np.testing.assert_array_equal(kept, ~pasted)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: crop(-1), "padding is -1"),
        (lambda: flip(1.5), "p is 1.5"),
        (lambda: rotate(-3), "degrees is -3"),
        (lambda: random_resized_crop((0, 1)), r"scale is \(0, 1\)"),
        (lambda: colour_jitter(hue=0.6), "hue is 0.6"),
        (lambda: blur((0, 1)), r"sigma is \(0, 1\)"),
        (lambda: cutout(-2), "size is -2"),
        (lambda: randaugment(2, 31), "m is 31"),
        (lambda: mixup(-1, 3), "alpha is -1"),
        (lambda: cutmix(float("nan"), 3), "alpha is nan, must be finite"),
        (lambda: rotate(float("nan")), "degrees is nan, must be finite"),
        (lambda: colour_jitter(float("nan")), "brightness is nan"),
        (lambda: solarise(float("nan")), "threshold is nan"),
        (lambda: crop(mode="foo"), "mode is 'foo', must be one of constant, reflect"),
        (lambda: cutout(2, 127), r"fill is 127, must be in \[0, 1\]"),
        (lambda: cutout(2, (0.5, float("nan"))), r"fill is \(0.5, nan\)"),
        (lambda: cutmix(1, 0), "classes is 0"),
    ],
)
def test_settings_out_of_range_raise(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("transform", "x", "message"),
    [
        (lift(greyscale(1.0)), np.ones((2, 4, 4, 3), np.uint8), "augment: .* is uint8, must be floating: .*pixels"),
        (lift(solarise(0, 1.0)), np.ones((2, 4, 4, 3), np.int32), "augment: .* is int32"),
        (lift(flip()), np.ones((2, 4, 4), np.float32), r"augment: .* has shape \(2, 4, 4\), must be .*\(B, H, W, C\).*pixels"),
        (mixup(1.0, 3), np.ones((2, 4), np.uint8), "mixup: .* is uint8, must be floating: .*pixels"),
        (cutmix(1.0, 3), np.ones((2, 4, 4, 3), np.uint8), "cutmix: .* is uint8, must be floating: .*pixels"),
        (cutmix(1.0, 3), np.ones((2, 4, 4), np.float32), r"cutmix: .* has shape \(2, 4, 4\), must be .*\(B, H, W, C\)"),
    ],
)
def test_transforms_refuse_what_they_would_spoil(transform, x, message):
    with pytest.raises(ValueError, match=message):
        transform(KEYS[0], {"x": jnp.asarray(x), "y": jnp.arange(2)})


def test_functions_of_ones_own_take_any_shape():
    rows = {"x": jnp.asarray(X.reshape(1, -1))}
    doubled = lift(lambda key, x: 2 * x)(KEYS[0], rows)["x"]
    np.testing.assert_array_equal(doubled, 2 * rows["x"])
    made = lift(lambda key, x: x.reshape(X.shape), flip(1))(KEYS[0], rows)["x"]
    np.testing.assert_array_equal(made, X[None, :, ::-1])


@pytest.mark.parametrize("make", [mixup, cutmix])
def test_labels_outside_the_classes_are_nan_and_a_batch_of_one_stays(make):
    batch = {"x": _batch()["x"], "y": jnp.array([0, 4, 1, 2, -1, 3])}
    off = make(0, 4)(KEYS[0], batch)["y"]
    np.testing.assert_array_equal(np.isnan(off).all(axis=1), [False, True, False, False, True, False])
    np.testing.assert_array_equal(off[2], [0, 1, 0, 0])
    one = {"x": batch["x"][:1], "y": batch["y"][:1]}
    out = make(1.0, 4)(KEYS[0], one)
    np.testing.assert_allclose(out["x"], one["x"], atol=1e-6)
    np.testing.assert_allclose(out["y"], [[1, 0, 0, 0]], atol=1e-6)
