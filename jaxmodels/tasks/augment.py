"""Random augmentation of images on the device: pure functions of a key and a batch [B, H, W, C].

Each example has its own draws, so that the result does not depend on the sharding. Mixup and cutmix mix an example with the row before it,
the first with the last: batches are shuffled, so this is a random other example.
"""

import jax
import jax.numpy as jnp


def random_crop(key: jax.Array, image_BHWC: jax.Array, padding: int) -> jax.Array:
    """Pad with `padding` pixels of zeros on each side, and cut a window of the original size at a random position."""
    B, H, W, C = image_BHWC.shape
    padded = jnp.pad(image_BHWC, ((0, 0), (padding, padding), (padding, padding), (0, 0)))
    corner_B2 = jax.random.randint(key, (B, 2), 0, 2 * padding + 1)
    return jax.vmap(lambda image, corner: jax.lax.dynamic_slice(image, (*corner, 0), (H, W, C)))(padded, corner_B2)


def random_flip(key: jax.Array, image_BHWC: jax.Array) -> jax.Array:
    """Mirror each image left to right with probability 0.5."""
    return jnp.where(_as_images(jax.random.bernoulli(key, 0.5, image_BHWC.shape[:1])), image_BHWC[:, :, ::-1], image_BHWC)


def scale(image: jax.Array) -> jax.Array:
    """Convert uint8 to float32 in [0, 1]. Leave other types unchanged."""
    return image.astype(jnp.float32) / 255 if image.dtype == jnp.uint8 else image


def resize(image_BHWC: jax.Array, height: int, width: int) -> jax.Array:
    """Resize images to another height and width, bilinear, with anti-aliasing where they shrink."""
    B, _, _, C = image_BHWC.shape
    return jax.image.resize(image_BHWC, (B, height, width, C), "linear")


def partners(x: jax.Array) -> jax.Array:
    """Return, for each row of a batch, the row that it is mixed with."""
    return jnp.roll(x, 1, axis=0)


def mixup(image_BHWC: jax.Array, share_B: jax.Array) -> jax.Array:
    """Return `share` of each image plus 1 - `share` of its partner (Zhang et al. 2018). Images are floats."""
    share = _as_images(share_B).astype(image_BHWC.dtype)
    return share * image_BHWC + (1 - share) * partners(image_BHWC)


def cutmix(key: jax.Array, image_BHWC: jax.Array, share_B: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Paste a rectangle of its partner into each image (Yun et al. 2019).

    The rectangle has the image's aspect ratio and 1 - `share` of its area. Its centre is uniform over the image; it is clipped at the border.

    Returns:
      Images, and the share of each image that is its own, float [B].
    """
    B, H, W, _ = image_BHWC.shape
    side_B = jnp.sqrt(1 - share_B)
    centre_2B = jax.random.uniform(key, (2, B))

    def inside(size, centre):
        length = jnp.floor(size * side_B)
        start = jnp.floor(size * centre) - jnp.floor(length / 2)
        place = jnp.arange(size)
        return (place >= start[:, None]) & (place < (start + length)[:, None])

    box_BHW = inside(H, centre_2B[0])[:, :, None] & inside(W, centre_2B[1])[:, None, :]
    return jnp.where(box_BHW[..., None], partners(image_BHWC), image_BHWC), 1 - jnp.mean(box_BHW, axis=(1, 2), dtype=jnp.float32)


def mix(key: jax.Array, image_BHWC: jax.Array, *, mixup_alpha: float, cutmix_alpha: float, probability: float) -> tuple[jax.Array, jax.Array]:
    """Apply mixup, cutmix, or, with both, one of the two to each example at random.

    Args:
      key: of this batch.
      image_BHWC: floats.
      mixup_alpha, cutmix_alpha: the share of an image that stays its own is drawn from Beta(alpha, alpha); 0 turns the method off.
      probability: that an example is mixed.

    Returns:
      Images, and the share of each that is its own, float [B] in [0, 1]. Mix labels by the same shares.
    """
    which, whether, place, first, second = jax.random.split(key, 5)
    B = image_BHWC.shape[:1]
    mixed = jax.random.bernoulli(whether, probability, B)
    use_cutmix = jax.random.bernoulli(which, 0.5 if mixup_alpha else 1.0, B) if cutmix_alpha else jnp.zeros(B, bool)
    result, share = image_BHWC, jnp.ones(B)
    if mixup_alpha:
        share = jnp.where(mixed & ~use_cutmix, jax.random.beta(first, mixup_alpha, mixup_alpha, B), 1.0)
        result = mixup(image_BHWC, share)
    if cutmix_alpha:
        wanted = jnp.where(mixed & use_cutmix, jax.random.beta(second, cutmix_alpha, cutmix_alpha, B), 1.0)
        pasted, own = cutmix(place, image_BHWC, wanted)
        result, share = jnp.where(_as_images(use_cutmix), pasted, result), jnp.where(use_cutmix, own, share)
    return result, share


def _as_images(x_B: jax.Array) -> jax.Array:
    return x_B[:, None, None, None]
