"""Nothing lost on the way: kills, signals, full disks, tasks that are not as they should be."""

import io
import json
import os
import pathlib
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pandas
import pytest
from problems import quadratic_problem, quadratic_tasks

import memmeta as mm
from memmeta.__main__ import main
from memmeta.runs import RunFolder, checkpoints, make_trainer

pytestmark = pytest.mark.slow

TINY = [
    *("--ways=2", "--queries=1", "--test-queries=1", "--width=2", "--tasks=2", "--log-every=1"),
    *("--checkpoint-every=2", "--episodes=2"),
]
QUICK = ["--method=protonet"]  # nothing adapts: little to compile
FIXED = ["--method=memory_reduced", "--inner-steps=2", "--cg-steps=2", "--inner-rate=1e30"]


def start(path, *options, steps=12):
    """A small run, or the rest of one, of its own process, on one device."""
    new = [] if "--resume" in options else [*TINY, *QUICK, f"--meta-steps={steps}"]
    return start_with(path, "--devices=1", *options, *new)


def start_with(path, *options):
    """A real run of its own process, without this one's simulated devices, quickly compiled."""
    flags = [f for f in os.environ["XLA_FLAGS"].split() if "device_count" not in f]
    environment = os.environ | {"XLA_FLAGS": " ".join(flags)}
    command = [sys.executable, "-m", "memmeta", "train", "--run", str(path), *options]
    return subprocess.Popen(
        command,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def ended(process, code=0):
    """What a process wrote to stderr, once it has ended with that exit code."""
    errors = process.communicate()[1]
    assert process.returncode == code, errors
    return errors


def lines(path):
    whole, _, _ = (path / "metrics.jsonl").read_text().rpartition("\n")
    found = pandas.read_json(io.StringIO(whole), lines=True)
    return found.drop(columns="tasks_per_second")


def final_state(path):
    """The bytes of every array of the newest checkpoint."""
    folder = RunFolder(path)
    trainer, state = make_trainer(folder.config()).restored(folder.checkpoints)
    state = state._replace(key=jax.random.key_data(state.key))
    return [np.asarray(leaf) for leaf in jax.tree.leaves(trainer.stored(state))]


def assert_same_run(first, second):
    pandas.testing.assert_frame_equal(lines(first), lines(second))
    for one, other in zip(final_state(first), final_state(second), strict=True):
        np.testing.assert_array_equal(one, other)


def line_count(path):
    file = path / "metrics.jsonl"
    return file.read_text().count("\n") if file.exists() else 0


def wait_for_lines(path, process, count):
    while process.poll() is None and line_count(path) < count:
        time.sleep(0.01)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """The folder of a run that nothing happened to."""
    path = tmp_path_factory.mktemp("faults") / "whole"
    ended(start(path))
    return path


def kill_and_resume(path, moments, rng, steps):
    """Kill a run and resume it, `moments` times, then let it end."""
    process = start(path, steps=steps)
    for moment in range(moments):
        if moment % 2:  # wherever it is by then: imports, reading, compiling, steps
            time.sleep(rng.random() * 4)
        else:  # while it makes steps, judges or saves
            wait_for_lines(path, process, line_count(path) + rng.randrange(1, 3))
            time.sleep(rng.random() * 0.3)
        process.kill()
        process.communicate()
        known = ["--resume"] if (path / "config.json").exists() else []
        process = start(path, *known, steps=steps)
    ended(process)


def signal_and_say(path, process, number):
    """Send a signal; the run saves, says how to go on, and its metrics end where it saved."""
    process.send_signal(number)
    last = ended(process, 75).strip().splitlines()[-1]
    assert "which is saved; go on with --resume" in last
    assert checkpoints.whole(path / "checkpoints")[0] == lines(path)["step"].max()


def test_a_stopped_and_a_killed_run_goes_on_as_if_nothing_had_happened(uninterrupted, tmp_path):
    path = tmp_path / "stopped"
    process = start(path)
    wait_for_lines(path, process, 2)
    # held still while it is asked to stop, so that it cannot be over before
    process.send_signal(signal.SIGSTOP)
    process.send_signal(signal.SIGTERM)
    signal_and_say(path, process, signal.SIGCONT)
    done = len(lines(path))
    assert done < 12
    process = start(path, "--resume")
    wait_for_lines(path, process, min(done + 1, 12))
    process.kill()
    process.communicate()
    ended(start(path, "--resume"))
    assert_same_run(uninterrupted, path)


@pytest.mark.slow
def test_an_interrupt_saves_too(tmp_path):
    path = tmp_path / "stopped"
    process = start(path, steps=3000)
    wait_for_lines(path, process, 3)
    signal_and_say(path, process, signal.SIGINT)


@pytest.mark.slow
def test_a_run_killed_at_twenty_moments(tmp_path):
    whole = start(tmp_path / "whole", steps=40)
    kill_and_resume(tmp_path / "killed", 20, random.Random(1), steps=40)
    ended(whole)
    assert_same_run(tmp_path / "whole", tmp_path / "killed")


def test_a_run_that_died_before_its_first_checkpoint(uninterrupted, tmp_path):
    path = tmp_path / "early"
    path.mkdir()
    shutil.copy(uninterrupted / "config.json", path)
    (path / "metrics.jsonl").write_text('{"step": 1, "loss": 0.5}\n{"st')
    assert main(["train", "--run", str(path), "--resume"]) == 0
    first, second = lines(uninterrupted), lines(path)
    pandas.testing.assert_frame_equal(first, second, rtol=1e-2, atol=1e-3)


def test_a_full_disk_leaves_earlier_checkpoints_whole(tmp_path):
    state = {"weight": jnp.arange(100_000.0)}
    checkpoints.save(tmp_path, 1, state)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
    try:
        with pytest.raises(OSError, match="make room there, then go on with --resume"):
            checkpoints.save(tmp_path, 2, {"weight": jax.random.normal(jax.random.key(0), 10**5)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert checkpoints.whole(tmp_path) == [1]
    found = checkpoints.restore(tmp_path, state)
    np.testing.assert_array_equal(found["weight"], state["weight"])
    checkpoints.save(tmp_path, 2, state)
    assert checkpoints.whole(tmp_path) == [2, 1]


@pytest.mark.slow
def test_a_run_on_a_full_disk_goes_on_as_if_nothing_had_happened(uninterrupted, tmp_path):
    path = tmp_path / "full"
    process = start(path)
    wait_for_lines(path, process, 3)
    process.send_signal(signal.SIGSTOP)
    hard = resource.prlimit(process.pid, resource.RLIMIT_FSIZE)[1]
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (1_000, hard))
    process.send_signal(signal.SIGCONT)
    said = ended(process, 1).strip().splitlines()
    assert said[-1].startswith("memmeta: ")
    assert "Traceback" not in "".join(said)
    before = lines(path)
    assert len(before) >= 3
    ended(start(path, "--resume"))
    pandas.testing.assert_frame_equal(lines(path)[: len(before)], before)
    assert_same_run(uninterrupted, path)


def test_what_a_kill_left_of_a_checkpoint_is_tidied_away(tmp_path):
    state = {"weight": jnp.ones(3)}
    for step in (1, 2):
        checkpoints.save(tmp_path, step, state)
        manifest = json.loads((tmp_path / f"{step:08d}.json").read_text())
        # as it is before the checkpoint is whole
        (tmp_path / f"{step:08d}.json").write_text(json.dumps(manifest | {"files": None}))
    (tmp_path / "00000002").rename(tmp_path / "00000002.orbax-checkpoint-tmp-5")
    (tmp_path / "notes").mkdir()
    assert checkpoints.whole(tmp_path) == []
    checkpoints.save(tmp_path, 3, state)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["00000003", "00000003.json", "notes"]


def test_links_out_of_a_checkpoint_are_not_followed(tmp_path):
    state, folder = {"weight": jnp.ones(3)}, tmp_path / "checkpoints"
    checkpoints.save(folder, 1, state)
    (tmp_path / "outside").write_text("secret")
    (folder / "00000001" / "link").symlink_to(tmp_path / "outside")
    (folder / "99999999999999999999.json").write_text("{}")
    (folder / "00000002.json").write_text("[" * 100_000)
    with pytest.raises(checkpoints.CheckpointError, match="every checkpoint was altered"):
        checkpoints.restore(folder, state)


def test_a_checkpoint_is_read_on_another_number_of_devices(tmp_path):
    def state_on(count):
        step = mm.make_meta_step(
            quadratic_problem(),
            mm.InnerLoop(steps=2),
            mm.hypergradient.implicit(),
            optax.adam(0.1),
            mesh=mm.meta.task_mesh(jax.devices()[:count]),
        )
        return step, step.init(jnp.linspace(0.0, 1.0, 4))

    step, state = state_on(4)
    state, _ = step(state, quadratic_tasks(jax.random.key(0), tasks=4))
    checkpoints.save(tmp_path, 1, state)
    _, like = state_on(2)
    found = checkpoints.restore(tmp_path, like)
    assert len(found.meta_params.sharding.device_set) == 2
    np.testing.assert_array_equal(found.meta_params, state.meta_params)


def test_strict_stops_and_keeps_what_went_wrong(tmp_path, capsys):
    path = tmp_path / "strict"
    code = main(["train", "--run", str(path), "--strict", *TINY, *FIXED, "--meta-steps=4"])
    assert code == 3
    assert "trouble in meta-step 1" in capsys.readouterr().err
    assert checkpoints.whole(path / "checkpoints") == [0]
    batch = np.load(path / "offending_batch.npz", allow_pickle=False)
    assert batch["support_inputs"].shape == (2, 2, 28, 28, 1)


@pytest.mark.parametrize(
    ("rate", "code", "words"), [("1e3", 0, ""), ("1e30", 1, "no task was usable, so nothing was")]
)
def test_without_strict_such_a_run_goes_to_its_end_and_counts(rate, code, words, tmp_path, capsys):
    path = tmp_path / "lenient"
    options = [*TINY, *FIXED, f"--inner-rate={rate}", "--meta-steps=2"]
    assert main(["train", "--run", str(path), *options]) == code
    assert words in capsys.readouterr().err
    found = lines(path)
    assert found["step"].tolist() == [1, 2]
    assert (found["masked"] + found["diverging"] > 0).all()
    assert all(np.isfinite(leaf).all() for leaf in final_state(path))


def adversarial(key, tasks):
    """Quadratic tasks of which most are spoilt, each in its own way; some batches are immense."""
    keys = jax.random.split(key, 3)
    found = quadratic_tasks(keys[0], tasks=tasks)
    kinds = jax.random.randint(keys[1], (tasks,), 0, 7)
    scale = jnp.array([1.0, jnp.nan, jnp.inf, 0.0, 1e30, -1.0, 1e-30])[kinds]
    immense = (kinds == 0) & jax.random.bernoulli(keys[2], 0.03)
    return found._replace(
        hessian=found.hessian * scale[:, None, None],
        target=found.target * jnp.where(immense, 1e12, 1.0)[:, None],
    )


@pytest.mark.parametrize("estimator", ["implicit", "unrolled"])
def test_a_long_run_on_adversarial_tasks_ends_finite(estimator):
    step = mm.make_meta_step(
        quadratic_problem(),
        mm.InnerLoop(optax.sgd(0.1), steps=10),
        mm.hypergradient.ESTIMATORS[estimator].make(),
        optax.adam(0.01),
        task_chunk=2,
    )

    @jax.jit
    def run(state):
        def body(state, key):
            state, metrics = step.update(state, adversarial(key, 8))
            return state, metrics.counts

        return jax.lax.scan(body, state, jax.random.split(jax.random.key(9), 1000))

    state, counts = run(step.init(jnp.linspace(-1.0, 1.0, 4)))
    assert np.isfinite(state.meta_params).all()
    assert np.abs(state.meta_params).max() < 100
    totals = {name: int(jnp.sum(count)) for name, count in counts.as_dict().items()}
    assert totals["masked"] > 1000
    assert totals["refused"] > 0
    if estimator == "implicit":
        assert totals["indefinite"] > 500


@pytest.mark.slow
def test_adversarial_images_leave_the_network_finite():
    images = np.asarray(mm.data.load("glyphs", "test").inputs[:6, :4], np.float32) / 255
    spoilt = images.copy()
    spoilt[0, 0, 3, 3] = np.nan
    spoilt[1] = 0.5
    spoilt[2] = spoilt[3]  # one class twice
    spoilt[4] *= 1e30
    learner = mm.algorithms.memory_reduced(
        mm.models.conv4(ways=2, width=4), inner=mm.InnerLoop(steps=5)
    )

    def task(first, second, labels=(0, 1)):
        pair = np.stack([spoilt[first], spoilt[second]])
        targets = np.array(labels, np.int32)
        return mm.Task(
            pair[:, :1].reshape(2, 28, 28, 1),
            targets,
            pair[:, 1:].reshape(6, 28, 28, 1),
            np.repeat(targets, 3),
        )

    tasks = [task(0, 5), task(1, 1), task(2, 3), task(4, 5), task(3, 5, (1, 0)), task(3, 5)]
    batch = jax.tree.map(lambda *leaves: jnp.stack(leaves), *tasks)
    step = learner.make_meta_step(optax.adam(1e-2))
    state = step.init(learner.init(jax.random.key(0)))
    for _ in range(5):
        state, metrics = step(state, batch)
    assert all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(state.meta_params))
    assert int(metrics.counts.masked) >= 1
    assert np.isfinite(metrics.loss)


def test_an_exploding_gradient_is_left_out_and_counted():
    step = mm.make_meta_step(
        quadratic_problem(),
        mm.InnerLoop(steps=50),
        mm.hypergradient.implicit(),
        optax.sgd(1e-3),
    )
    tasks = quadratic_tasks(jax.random.key(0))
    state = step.init(jnp.linspace(-1.0, 1.0, 4))
    for _ in range(3):
        state, metrics = step(state, tasks)
        assert int(metrics.counts.refused) == 0
    before = np.asarray(state.meta_params)
    state, metrics = step(state, tasks._replace(target=1e6 * tasks.target))
    assert int(metrics.counts.refused) == 1
    np.testing.assert_array_equal(before, state.meta_params)


def test_a_loop_of_no_steps_does_not_diverge():
    parts = (quadratic_problem(), mm.InnerLoop(steps=0), mm.hypergradient.unrolled())
    step = mm.make_meta_step(*parts, optax.sgd(0.1))
    _, metrics = step(step.init(jnp.ones(4)), quadratic_tasks(jax.random.key(0)))
    assert jnp.isinf(metrics.report.inner_gradient_norm)
    assert int(metrics.counts.diverging) == 0


def test_what_does_not_fit_is_said_before_it_starts(tmp_path, monkeypatch, capsys):
    options = [*TINY, "--tasks=4", "--task-chunk=4", "--inner-steps=1", "--cg-steps=1"]
    options = ["--run", str(tmp_path / "run"), "--devices=1", "--meta-steps=0", *options]

    def gigabytes(free):
        """The figures of what a run says on a machine of that much memory, and the words."""
        machine = {"SC_PAGE_SIZE": 1, "SC_PHYS_PAGES": round(free * 1e9)}
        with monkeypatch.context() as patch:
            patch.setattr(os, "sysconf", machine.__getitem__)
            assert main(["train", *options]) == 1
        said = capsys.readouterr().err
        return [float(figure) for figure in re.findall(r"([\d.e-]+) GB", said)], said

    (needed, _, smallest), said = gigabytes(1e-6)
    assert "with --task-chunk 1 it would still need" in said
    (again, _, fits), said = gigabytes(0.99 * needed)
    assert again == needed
    assert re.search("--task-chunk [12] would need about", said)
    assert smallest <= fits < needed
    assert not (tmp_path / "run").exists()
    assert main(["train", *options]) == 0


def test_a_long_run_keeps_nothing(tmp_path):
    adam = optax.adam(1e-3)
    traced_twice = adam._replace(update=chex.assert_max_traces(adam.update, n=2))
    step = mm.make_meta_step(
        quadratic_problem(), mm.InnerLoop(steps=2), mm.hypergradient.implicit(), traced_twice
    )
    tasks = quadratic_tasks(jax.random.key(0))
    state = step.init(jnp.ones(4))

    def used():
        pages = int(pathlib.Path("/proc/self/statm").read_text().split()[1])
        return pages * resource.getpagesize(), len(os.listdir("/proc/self/fd"))

    for number in range(600):
        state, _ = step(state, tasks)
        if number % 100 == 0:
            checkpoints.save(tmp_path, number, state)
        if number == 300:
            memory, files = used()
    later_memory, later_files = used()
    assert later_memory - memory < 20e6
    assert later_files <= files + 2
    assert json.loads((tmp_path / "00000500.json").read_text())


def test_the_checkpoint_saved_last_is_the_newest(tmp_path):
    state = {"weight": jnp.ones(3)}
    for step in (100, 200, 300):
        checkpoints.save(tmp_path, step, state)
    checkpoints.save(tmp_path, 1, {"weight": jnp.zeros(3)})
    assert checkpoints.whole(tmp_path) == [1, 300, 200]
    np.testing.assert_array_equal(checkpoints.restore(tmp_path, state)["weight"], 0)


def test_steps_of_nine_digits(tmp_path):
    state = {"weight": jnp.ones(3)}
    for step in (99_999_999, 100_000_000, 100_000_001):
        checkpoints.save(tmp_path, step, state)
    assert checkpoints.whole(tmp_path) == [100_000_001, 100_000_000, 99_999_999]


def test_what_is_not_ours_is_never_removed(tmp_path):
    state = {"weight": jnp.ones(3)}
    theirs = ["20240101/photo", "00000001/photo", "20220101.json", "00000002.json", "3.json"]
    for name in theirs:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text('{"mine": "yes"}')
    for step in (4, 5, 6, 7, 8):
        checkpoints.save(tmp_path, step, state, {"about": "this"})
    for step in (1, 2):  # in the way
        with pytest.raises(OSError, match="not one of ours: move it"):
            checkpoints.save(tmp_path, step, state)
    assert all((tmp_path / name).read_text() == '{"mine": "yes"}' for name in theirs)
    assert checkpoints.whole(tmp_path) == [8, 7, 6]
    assert checkpoints.note(tmp_path, 8) == {"about": "this"}


@pytest.fixture
def ended_run(uninterrupted, tmp_path):
    """A copy of a run that ended."""
    return pathlib.Path(shutil.copytree(uninterrupted, tmp_path / "ended"))


def resume(path, *options):
    return main(["train", "--run", str(path), "--resume", "--devices=1", *options])


@pytest.mark.parametrize("gone", ["folder", "manifests"])
def test_a_run_whose_checkpoints_are_gone_is_not_begun_again(gone, ended_run, capsys):
    if gone == "folder":
        shutil.rmtree(ended_run / "checkpoints")
    for manifest in (ended_run / "checkpoints").glob("*.json"):
        manifest.unlink()
    before = (ended_run / "metrics.jsonl").read_bytes()
    assert resume(ended_run) == 1
    assert "go to meta-step 12, but no checkpoint is there" in capsys.readouterr().err
    assert (ended_run / "metrics.jsonl").read_bytes() == before


def test_a_checkpoint_whose_manifest_is_gone_is_set_aside(ended_run, uninterrupted):
    (ended_run / "checkpoints" / "00000012.json").unlink()
    content = sorted((ended_run / "checkpoints" / "00000012").rglob("*"))
    assert "00000012.set-aside-1" in ended(start(ended_run, "--resume"))
    aside = ended_run / "checkpoints" / "00000012.set-aside-1"
    assert len(sorted(aside.rglob("*"))) == len(content)
    assert_same_run(ended_run, uninterrupted)


def test_a_damaged_line_is_set_aside_and_no_other(ended_run, capsys):
    file = ended_run / "metrics.jsonl"
    rows = file.read_bytes().splitlines(keepends=True)
    rows[2] = b"\x80" + rows[2][1:]
    file.write_bytes(b"".join(rows) + b'{"step": 13, "to')
    assert resume(ended_run) == 0
    assert "2 unreadable of its lines are set aside" in capsys.readouterr().err
    assert lines(ended_run)["step"].tolist() == [1, 2, *range(4, 13)]
    aside = (ended_run / "metrics.set-aside-1").read_bytes()
    assert aside == rows[2] + b'{"step": 13, "to\n'


def test_a_damaged_checkpoint_is_passed_over_aloud(ended_run, uninterrupted):
    file = max(
        (path for path in (ended_run / "checkpoints" / "00000012").rglob("*") if path.is_file()),
        key=lambda path: path.stat().st_size,
    )
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    said = ended(start(ended_run, "--resume"))
    assert "the checkpoint of meta-step 12 was altered or torn" in said
    assert "for that of meta-step 10" in said
    assert_same_run(ended_run, uninterrupted)


def test_a_run_is_lengthened(ended_run, capsys):
    assert resume(ended_run, "--meta-steps=11") == 1
    assert "--meta-steps: was 12 in this run, found 11" in capsys.readouterr().err
    assert resume(ended_run, "--meta-steps=14") == 0
    said = capsys.readouterr().out
    assert "lengthened from 12 to 14 meta-steps: from here on the rate follows the cosine" in said
    assert lines(ended_run)["step"].tolist() == list(range(1, 15))
    assert RunFolder(ended_run).config().meta_steps == 14
    assert json.loads((ended_run / "report.json").read_text())["meta_steps"] == 14


@pytest.mark.slow
def test_a_folder_moved_while_its_run_goes_on(uninterrupted, tmp_path):
    path, moved = tmp_path / "here", tmp_path / "there"
    process = start(path)
    wait_for_lines(path, process, 3)
    process.send_signal(signal.SIGSTOP)
    path.rename(moved)
    process.send_signal(signal.SIGCONT)
    assert "moved or replaced while the run was going on" in ended(process, 1)
    assert not path.exists()
    ended(start(moved, "--resume"))
    assert_same_run(uninterrupted, moved)


CONVERT = """
import sys
from memmeta.data import load_host
load_host("folder", "train", sys.argv[1])
"""


@pytest.mark.slow
def test_a_conversion_killed_at_twenty_moments(tmp_path):
    image = pytest.importorskip("PIL.Image", reason="the extra [images] is not installed")
    rng, noise = random.Random(2), np.random.default_rng(0)
    for number in range(60):
        folder = tmp_path / "killed" / f"class {number}"
        folder.mkdir(parents=True)
        for example in range(20):
            pixels = noise.integers(0, 256, (200, 200, 3), np.uint8)
            image.fromarray(pixels).save(folder / f"{example}.png")
    shutil.copytree(tmp_path / "killed", tmp_path / "whole")
    journal = tmp_path / "killed" / ".memmeta" / "folder" / "finished.jsonl"

    def size():
        return journal.stat().st_size if journal.exists() else 0

    kills = 0
    for _ in range(20):
        before = size()
        process = subprocess.Popen([sys.executable, "-c", CONVERT, str(tmp_path / "killed")])
        while process.poll() is None and size() == before:
            time.sleep(0.001)
        time.sleep(rng.random() * 0.02)
        process.kill()
        kills += process.wait() == -signal.SIGKILL
    assert kills == 20
    for split in ("train", "validation", "test"):
        killed, whole = (
            mm.data.load_host("folder", split, tmp_path / name) for name in ("killed", "whole")
        )
        np.testing.assert_array_equal(killed.rows, whole.rows)
        assert killed.index.class_names == whole.index.class_names


def test_a_full_disk_during_a_conversion(tmp_path):
    image = pytest.importorskip("PIL.Image", reason="the extra [images] is not installed")
    for number in range(30):
        (tmp_path / f"class {number}").mkdir()
        image.new("RGB", (84, 84), (number, 0, 0)).save(tmp_path / f"class {number}" / "1.png")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(mm.data.DataError, match="cannot be written"):
            mm.data.load("folder", "train", tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert len(mm.data.load("folder", "train", tmp_path).class_names) == 19
