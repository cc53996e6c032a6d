"""`glyphs`: characters of 21 scripts in 20 font styles, embedded in the package.

`archives/glyphs.md` says how the archive is built, split and licensed.
"""

from pathlib import Path

import jax.numpy as jnp
import numpy as np

from memmeta.data._archive import read_archive
from memmeta.data._dataset import Dataset


def load_glyphs(split: str, data_dir: Path | None) -> Dataset:
    """The characters of one split's scripts; classes are characters and groups are scripts.

    Args:
        split: "train", "validation" or "test".
        data_dir: not used; the archive is inside the package.

    Returns:
        The data set, `inputs` uint8 `[characters, 20, 28, 28, 1]`, white (255) on black (0).

    Raises:
        DataError: the archive is missing, truncated or altered.

    Example:
        >>> load_glyphs("test", None).class_names[0]
        'U+0D85'
    """
    del data_dir
    arrays = read_archive("glyphs")
    scripts = np.flatnonzero(arrays["script_splits"] == split)
    chosen = np.isin(arrays["script"], scripts)
    packed = arrays["images"][chosen]  # two 4-bit pixels per byte, the left in the high bits
    levels = np.stack([packed >> 4, packed & 15], axis=-1).reshape(*packed.shape[:-1], -1)
    count = np.full(len(packed), packed.shape[1], np.int32)
    return Dataset(
        inputs=jnp.asarray(levels[..., None] * np.uint8(17)),
        count=jnp.asarray(count),
        group=jnp.asarray(np.searchsorted(scripts, arrays["script"][chosen]).astype(np.int32)),
        family=jnp.asarray(arrays["family"][chosen].astype(np.int32)),
        name="glyphs",
        split=split,
        class_names=tuple(f"U+{code:04X}" for code in arrays["codepoint"][chosen]),
        group_names=tuple(str(name) for name in arrays["script_names"][scripts]),
        family_names=tuple(str(name) for name in arrays["family_names"]),
        within_group=True,
    )
