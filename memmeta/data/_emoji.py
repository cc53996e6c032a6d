"""`emoji`: about a thousand concepts in six designs, in colour, embedded in the package.

`archives/emoji.md` says how the archive is built, split and licensed.
"""

from pathlib import Path

import jax.numpy as jnp
import numpy as np

from memmeta.data._archive import read_archive
from memmeta.data._dataset import Dataset


def load_emoji(split: str, data_dir: Path | None) -> Dataset:
    """The concepts in the Unicode groups of one split; each concept is a class.

    Each design is also included mirrored, because six examples of a class would leave a 5-shot task
    only one query. Episodes with `cross_family=True` take support and query from the designs of
    different makers.

    Args:
        split: "train", "validation" or "test".
        data_dir: not used; the archive is inside the package.

    Returns:
        The data set, `inputs` uint8 `[concepts, 12, 32, 32, 3]`: six designs on white, then the
        same six mirrored.

    Raises:
        DataError: the archive is missing, truncated or altered.

    Example:
        >>> load_emoji("test", None).class_names[:3]
        ('amphora', 'ant', 'avocado')
    """
    del data_dir
    arrays = read_archive("emoji")
    groups = np.flatnonzero(arrays["group_splits"] == split)
    chosen = np.isin(arrays["group"], groups)
    images = (arrays["images"][chosen].astype(np.uint16) * 255 // 31).astype(np.uint8)
    inputs = np.concatenate([images, images[:, :, :, ::-1]], axis=1)
    classes, examples = inputs.shape[:2]
    return Dataset(
        inputs=jnp.asarray(inputs),
        count=jnp.full(classes, examples, jnp.int32),
        group=jnp.asarray(np.searchsorted(groups, arrays["group"][chosen]).astype(np.int32)),
        family=jnp.asarray(np.tile(arrays["family"].astype(np.int32), (classes, 2))),
        name="emoji",
        split=split,
        class_names=tuple(map(str, arrays["concept"][chosen])),
        group_names=tuple(map(str, arrays["group_names"][groups])),
        family_names=tuple(map(str, arrays["family_names"])),
    )
