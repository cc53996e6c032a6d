"""What several tests assert in the same words."""

import jax
import jax.numpy as jnp
import optax
import pytest
from jaxtyping import TypeCheckError
from typechecker import PLAIN


def relative_error(found, exact):
    """‖found − exact‖ / ‖exact‖ over whole trees."""
    difference = jax.tree.map(jnp.subtract, found, exact)
    return float(optax.tree.norm(difference) / optax.tree.norm(exact))


def refused(name, message):
    """The block raises what names the argument and says the message.

    Where annotations are checked, a value of a wrong type gets no further than them.
    """
    ours = f"{name}: {message}"
    if PLAIN:
        return pytest.raises(ValueError, match=ours)
    return pytest.raises((ValueError, TypeCheckError), match=f"{ours}|parameter '{name}'")
