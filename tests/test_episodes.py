"""Episodes: what every one of them must be, whatever the data, the key and the chunking."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memmeta.data import DataError, Dataset, Episodes, load

CLASSES, EXAMPLES, GROUPS, FAMILIES = 12, 8, 3, 2


def make_dataset(count, group, family):
    """A data set whose every input is its own number, so that a draw can be traced back."""
    return Dataset(
        inputs=jnp.arange(CLASSES * EXAMPLES, dtype=jnp.int32).reshape(CLASSES, EXAMPLES, 1),
        count=jnp.asarray(count, jnp.int32),
        group=jnp.asarray(group, jnp.int32),
        family=jnp.asarray(family, jnp.int32),
        name="numbers",
        split="test",
        class_names=tuple(f"class {i}" for i in range(CLASSES)),
        group_names=tuple(f"group {i}" for i in range(GROUPS)),
        family_names=tuple(f"family {i}" for i in range(FAMILIES)),
        within_group=True,
    )


def full_dataset():
    """Groups of 6, 4 and 2 full classes; in each class the two families take turns."""
    family = np.tile(np.arange(EXAMPLES) % FAMILIES, (CLASSES, 1))
    return make_dataset(np.full(CLASSES, EXAMPLES), [0] * 6 + [1] * 4 + [2] * 2, family)


arrays = st.fixed_dictionaries(
    {
        "count": st.lists(st.integers(2, EXAMPLES), min_size=CLASSES, max_size=CLASSES),
        "group": st.lists(st.integers(0, GROUPS - 1), min_size=CLASSES, max_size=CLASSES),
        "family": st.lists(
            st.lists(st.integers(0, FAMILIES - 1), min_size=EXAMPLES, max_size=EXAMPLES),
            min_size=CLASSES,
            max_size=CLASSES,
        ),
    }
)
# One compilation each: everything below varies the values, never the shapes.
SPECS = [
    Episodes(ways=3, shots=2, queries=3),
    Episodes(ways=3, shots=1, queries=2, cross_family=True),
    Episodes(ways=5, shots=1, queries=1, within_group=False),
    Episodes(ways=(2, 3), shots=(1, 2), queries=2),
]
NAMES = ["plain", "cross_family", "any_group", "padded"]
SAMPLERS = {spec: jax.jit(spec.sample_batch, static_argnums=2) for spec in SPECS}
MANY = 2000


def draw(spec, dataset, key, first=0):
    """`MANY` tasks, always by the same compiled function."""
    return SAMPLERS[spec](dataset, key, MANY, jnp.int32(first))


def reference_usable(spec, dataset):
    """For each (support, query) family pair the usable classes, by plain counting."""
    count, family = np.asarray(dataset.count), np.asarray(dataset.family)
    pairs = list(itertools.permutations(range(FAMILIES), 2)) if spec.cross_family else [None]
    for pair in pairs:
        usable = []
        for c in range(CLASSES):
            kinds = family[c, : count[c]].tolist()
            if pair is None:
                enough = len(kinds) >= spec.most_shots + spec.queries
            else:
                enough = kinds.count(pair[0]) >= spec.shots and kinds.count(pair[1]) >= spec.queries
            usable += [c] * enough
        yield usable


def reference_allowed(spec, dataset):
    """Whether the data allow the episodes."""
    group = np.asarray(dataset.group).tolist()
    sizes = [0]
    for usable in reference_usable(spec, dataset):
        owners = [group[c] if spec.within_group is None else 0 for c in usable]
        sizes += [owners.count(g) for g in set(owners)]
    return max(sizes) >= spec.most_ways


def check_task(spec, dataset, task):
    """Assert everything an episode promises."""
    count, group, family = map(np.asarray, (dataset.count, dataset.group, dataset.family))
    support, query = (np.asarray(x)[:, 0] for x in (task.support_inputs, task.query_inputs))
    assert support.shape == task.support_targets.shape == (spec.most_ways * spec.most_shots,)
    assert query.shape == task.query_targets.shape == (spec.most_ways * spec.queries,)
    used = [np.asarray(x) >= 0 for x in (task.support_targets, task.query_targets)]
    assert not support[~used[0]].any()
    assert not query[~used[1]].any()
    support, query = support[used[0]], query[used[1]]
    ways = len(query) // spec.queries
    shots = len(support) // ways
    assert (ways, shots) == (spec.ways, spec.shots) or spec is SPECS[3]
    assert 2 <= ways <= spec.most_ways
    assert 1 <= shots <= spec.most_shots
    drawn = np.concatenate([support, query])
    assert len(set(drawn.tolist())) == len(drawn)  # nothing twice, nothing on both sides
    assert (drawn % EXAMPLES < count[drawn // EXAMPLES]).all()  # no padding
    labels = np.concatenate([task.support_targets, task.query_targets])
    labels = labels[labels >= 0]
    meaning = dict(zip(labels.tolist(), (drawn // EXAMPLES).tolist(), strict=True))
    assert sorted(meaning) == list(range(ways))
    assert len(set(meaning.values())) == ways
    assert [meaning[label] for label in labels.tolist()] == (drawn // EXAMPLES).tolist()
    if spec.within_group is None:
        assert len(set(group[drawn // EXAMPLES].tolist())) == 1
    if spec.cross_family:
        kinds = [set(family[x // EXAMPLES, x % EXAMPLES].tolist()) for x in (support, query)]
        assert len(kinds[0]) == len(kinds[1]) == 1
        assert kinds[0] != kinds[1]


@pytest.mark.parametrize("spec", SPECS, ids=NAMES)
@given(arrays=arrays, seed=st.integers(0, 2**31 - 1))
@settings(max_examples=20, deadline=None)
def test_every_episode_keeps_its_promises(spec, arrays, seed):
    dataset = make_dataset(**arrays)
    if not reference_allowed(spec, dataset):
        with pytest.raises(DataError, match="numbers/test"):
            spec.check(dataset)
        return
    spec.check(dataset)
    tasks = draw(spec, dataset, jax.random.key(seed))
    for i in range(4):
        check_task(spec, dataset, jax.tree.map(lambda x, i=i: x[i], tasks))


@pytest.mark.parametrize("spec", SPECS, ids=NAMES)
def test_every_example_is_drawn_on_both_sides(spec):
    dataset = full_dataset()
    tasks = draw(spec, dataset, jax.random.key(0))
    # The group of two classes is too small for three ways.
    classes = CLASSES if spec.within_group is False else CLASSES - 2
    for inputs in (tasks.support_inputs, tasks.query_inputs):
        assert set(np.unique(inputs)) == set(range(classes * EXAMPLES))


def test_groups_by_size_and_labels_uniform():
    spec, dataset = SPECS[0], full_dataset()
    tasks = draw(spec, dataset, jax.random.key(1))
    classes = np.asarray(tasks.support_inputs)[:, :: spec.shots, 0] // EXAMPLES
    share = (classes[:, 0] < 6).mean()  # 6 of the 10 classes of groups that are large enough
    assert abs(share - 0.6) < 4 * np.sqrt(0.6 * 0.4 / MANY)
    for label in range(spec.ways):
        share = np.bincount(classes[:, label], minlength=CLASSES)[:10] / MANY
        np.testing.assert_allclose(share, 0.1, atol=4 * np.sqrt(0.1 * 0.9 / MANY))


def test_ranges_of_ways_and_shots_are_drawn_uniformly():
    tasks = draw(SPECS[3], full_dataset(), jax.random.key(5))
    ways = (np.asarray(tasks.query_targets) >= 0).sum(axis=1) // 2
    shots = (np.asarray(tasks.support_targets) >= 0).sum(axis=1) // ways
    for found in (ways == 3, shots == 2, (ways == 3) & (shots == 2)):
        expected = 0.25 if found.mean() < 0.4 else 0.5
        assert abs(found.mean() - expected) < 4 * 0.5 / np.sqrt(MANY)


def test_both_directions_of_a_family_pair():
    spec = SPECS[1]
    tasks = draw(spec, full_dataset(), jax.random.key(2))
    share = (np.asarray(tasks.support_inputs)[:, 0, 0] % FAMILIES).mean()
    assert abs(share - 0.5) < 4 * 0.5 / np.sqrt(MANY)


@pytest.mark.parametrize("spec", SPECS, ids=NAMES)
def test_a_task_depends_on_its_number_alone(spec):
    dataset, key = full_dataset(), jax.random.key(3)
    tasks = draw(spec, dataset, key)
    later = draw(spec, dataset, key, first=MANY - 2)
    with jax.enable_x64(True):
        alone = jax.jit(spec.sample)(dataset, jax.random.fold_in(key, MANY - 1))
    for some, others, one in zip(*map(jax.tree.leaves, (tasks, later, alone)), strict=True):
        np.testing.assert_array_equal(some[-2:], others[:2])
        np.testing.assert_array_equal(some[-1], one)
        assert some.dtype == one.dtype


def test_sharding_over_devices_changes_nothing():
    spec, dataset, key = SPECS[0], full_dataset(), jax.random.key(4)
    devices = jax.make_mesh((jax.device_count(),), ("tasks",))
    sharding = jax.NamedSharding(devices, jax.P("tasks"))
    spread = jax.jit(spec.sample_batch, static_argnums=2, out_shardings=sharding)
    tasks = spread(dataset, key, 2 * jax.device_count())
    together = draw(spec, dataset, key)
    for found, expected in zip(*map(jax.tree.leaves, (tasks, together)), strict=True):
        np.testing.assert_array_equal(found, expected[: len(found)])


def test_data_set_is_an_argument_not_a_constant():
    dataset = full_dataset()
    lowered = SAMPLERS[SPECS[0]].lower(dataset, jax.random.key(0), MANY, jnp.int32(0))
    arguments = jax.tree.leaves(lowered.in_avals)
    assert dataset.inputs.shape in [argument.shape for argument in arguments]
    assert jax.tree.map(lambda x: x + x.dtype.type(1), dataset).count[0] == EXAMPLES + 1


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (Episodes(ways=7, shots=1, queries=1), r"ways=7 .* group 0, has 6 .* ways <= 6"),
        (Episodes(ways=13, queries=1, within_group=False), r"ways=13 .* it has 12 .* ways <= 12"),
        (Episodes(ways=2, shots=2, queries=7), r"shots=2 and queries=7 .* 8 .* queries <= 8"),
        (
            Episodes(ways=2, shots=5, queries=1, cross_family=True),
            r"shots=5 .* shots <= 4 and queries <= 4",
        ),
    ],
)
def test_what_the_data_do_not_allow_is_said_with_the_largest_figure(spec, message):
    with pytest.raises(DataError, match=message) as error:
        spec.check(full_dataset())
    assert "\n" not in str(error.value)
    with pytest.raises(DataError, match=message):
        spec.sample(full_dataset(), jax.random.key(0))


def test_cross_family_needs_two_families_in_a_class():
    spec = Episodes(ways=2, shots=1, queries=1, cross_family=True)
    one_each = np.tile((np.arange(CLASSES) % FAMILIES)[:, None], (1, EXAMPLES))
    dataset = make_dataset(np.full(CLASSES, EXAMPLES), np.zeros(CLASSES, int), one_each)
    with pytest.raises(DataError, match=r"no class .* two families"):
        spec.check(dataset)


@pytest.mark.parametrize("name", ["ways", "shots", "queries"])
@pytest.mark.parametrize("value", [0, -1])
def test_figures_must_be_positive_integers(name, value):
    with pytest.raises(ValueError, match=f"{name}={value}: it must be a positive integer"):
        Episodes(**{name: value})


@pytest.mark.parametrize("value", [(3, 2), (0, 2)])
@pytest.mark.parametrize("name", ["ways", "shots"])
def test_ranges_must_go_up(name, value):
    with pytest.raises(ValueError, match=r"a positive integer or a range \(least, most\)"):
        Episodes(**{name: value})


def test_a_data_set_that_is_closed_over_is_checked_too():
    dataset = load("glyphs", "test")
    drawn = jax.jit(Episodes(ways=2, queries=1).sample)
    inside = jax.jit(lambda key: Episodes(ways=2, queries=1).sample(dataset, key))
    key = jax.random.key(0)
    for one, other in zip(drawn(dataset, key), inside(key), strict=True):
        np.testing.assert_array_equal(one, other)
    with pytest.raises(DataError, match="too many"):
        jax.jit(lambda key: Episodes(queries=40).sample(dataset, key))(key)


def test_unchecked_episodes_are_padded_never_wrong():
    # in compiled code nothing can be refused: more queries than a font family has examples
    dataset, episodes = load("glyphs", "test"), Episodes(queries=15, cross_family=True)
    task = jax.jit(episodes.sample)(dataset, jax.random.key(0))
    assert (np.asarray(task.query_targets) == -1).all()
    assert not np.asarray(task.query_inputs).any()
    with pytest.raises(DataError, match="queries=25 is too many for these data; use queries <= 20"):
        jax.jit(Episodes(queries=25).sample)(dataset, jax.random.key(0))
