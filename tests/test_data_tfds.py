"""Data sets by tensorflow-datasets, without a network: prepared files that the tests write in the
real ArrayRecord format, and tensorflow-datasets' own mocking."""

import importlib.util
import io
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import memmeta.data
from memmeta.__main__ import main
from memmeta.data import DataError, Limits, Reading, load, load_host

pytestmark = pytest.mark.slow

tfds = pytest.importorskip("tensorflow_datasets", reason="the extra [tfds] is not installed")
array_record = pytest.importorskip("array_record.python.array_record_module")
Image = pytest.importorskip("PIL.Image")
naming = pytest.importorskip("tensorflow_datasets.core.naming")
splits = pytest.importorskip("tensorflow_datasets.core.splits")
proto = pytest.importorskip("tensorflow_datasets.proto")
tf_example_pb2, tf_feature_pb2 = proto.tf_example_pb2, proto.tf_feature_pb2

SPLITS = ("train", "validation", "test")
COARSE = [
    "aquatic_mammals",
    "fish",
    "flowers",
    "food_containers",
    "fruit_and_vegetables",
    "household_electrical_devices",
    "household_furniture",
    "insects",
    "large_carnivores",
    "large_man-made_outdoor_things",
    "large_natural_outdoor_scenes",
    "large_omnivores_and_herbivores",
    "medium_mammals",
    "non-insect_invertebrates",
    "people",
    "reptiles",
    "small_mammals",
    "trees",
    "vehicles_1",
    "vehicles_2",
]


@pytest.fixture(autouse=True)
def no_tensorflow():
    """Nothing here may import TensorFlow."""
    yield
    assert "tensorflow" not in sys.modules


def feature(value):
    if isinstance(value, np.ndarray):
        file = io.BytesIO()
        Image.fromarray(value.squeeze()).save(file, "PNG")
        value = file.getvalue()
    if isinstance(value, bytes):
        return tf_feature_pb2.Feature(bytes_list=tf_feature_pb2.BytesList(value=[value]))
    return tf_feature_pb2.Feature(int64_list=tf_feature_pb2.Int64List(value=[value]))


def write_prepared(data_dir, name, examples, names):
    """Prepare a data set as tensorflow-datasets would, in the format array_record."""
    builder = tfds.builder(name, data_dir=data_dir, file_format="array_record")
    builder.data_path.mkdir(parents=True)
    for key, found in names.items():
        builder.info.features[key].names = found
    infos = []
    for split, found in examples.items():
        template = naming.ShardedFileTemplate(
            data_dir=builder.data_dir,
            dataset_name=builder.name,
            split=split,
            filetype_suffix="array_record",
        )
        path = template.sharded_filepath(shard_index=0, num_shards=1)
        writer = array_record.ArrayRecordWriter(str(path), "group_size:1")
        for example in found:
            features = {key: feature(value) for key, value in example.items()}
            record = tf_example_pb2.Example(features=tf_feature_pb2.Features(feature=features))
            writer.write(record.SerializeToString())
        writer.close()
        info = splits.SplitInfo(
            name=split, shard_lengths=[len(found)], num_bytes=0, filename_template=template
        )
        infos.append(info)
    builder.info.set_splits(splits.SplitDict(infos))
    builder.info.write_to_directory(builder.data_dir)


def cifar_names():
    """The 100 labels in alphabetical order, as the data set numbers them."""
    (path,) = Path(memmeta.data.__file__).parent.rglob("cifar_fs.json")
    content = json.loads(path.read_text())["splits"]
    return sorted(name for split in SPLITS for name in content[split])


@pytest.fixture(scope="module")
def cifar100(tmp_path_factory):
    """Two examples a class in train, one in test; each image holds its label and number."""
    data_dir = tmp_path_factory.mktemp("tfds")
    examples = {"train": [], "test": []}
    for number in range(300):
        label, split = number * 7 % 100, "train" if number < 200 else "test"
        image = np.full((32, 32, 3), (label, label % 20, number // 100), np.uint8)
        record = {"image": image, "label": label, "coarse_label": label % 20, "id": b"x"}
        examples[split].append(record)
    names = {"label": cifar_names(), "coarse_label": COARSE}
    write_prepared(data_dir, "cifar100", examples, names)
    return data_dir


def test_cifar_fs_is_the_published_split(cifar100):
    found = {split: load("cifar_fs", split, cifar100) for split in SPLITS}
    assert [len(dataset.class_names) for dataset in found.values()] == [64, 16, 20]
    names = cifar_names()
    for dataset in found.values():
        assert dataset.inputs.shape[1:] == (3, 32, 32, 3)  # its train and test examples together
        assert (np.asarray(dataset.count) == 3).all()
        for row, name in enumerate(dataset.class_names):
            label = names.index(name)
            pixels = np.asarray(dataset.inputs[row, :, 5, 5])
            np.testing.assert_array_equal(pixels, [[label, label % 20, n] for n in range(3)])
            assert dataset.group_names[dataset.group[row]] == COARSE[label % 20]
    assert {"baby", "rocket", "worm"} < set(found["test"].class_names)
    assert {"beaver", "tractor"} < set(found["validation"].class_names)


def test_fc100_is_the_published_split_by_superclass(cifar100):
    found = {split: load_host("fc100", split, cifar100).index for split in SPLITS}
    assert [len(dataset.class_names) for dataset in found.values()] == [60, 20, 20]
    assert found["test"].group_names == ("aquatic_mammals", "insects", "medium_mammals", "people")
    groups = [set(dataset.group_names) for dataset in found.values()]
    assert sum(map(len, groups)) == len(set.union(*groups)) == 20


def test_any_builder_by_name(cifar100):
    found = {split: load("tfds:cifar100", split, cifar100) for split in SPLITS}
    assert [len(dataset.class_names) for dataset in found.values()] == [64, 16, 20]
    assert len({name for dataset in found.values() for name in dataset.class_names}) == 100
    # converted once: the prepared files are not read again
    (cifar100 / ".memmeta" / "tfds-cifar100" / "manifest.json").stat()


def test_the_pixel_limit_is_that_of_the_reading(tmp_path, capsys):
    image = np.zeros((32, 32, 3), np.uint8)
    records = [{"image": image, "label": n, "coarse_label": 0, "id": b"x"} for n in range(100)]
    names = {"label": cifar_names(), "coarse_label": COARSE}
    write_prepared(tmp_path, "cifar100", {"train": records, "test": records[:1]}, names)
    for name in ("cifar_fs", "tfds:cifar100"):
        with pytest.raises(DataError, match="32 x 32 pixels, more than most_pixels=1000"):
            load(name, "train", tmp_path, Reading(limits=Limits(most_pixels=1000)))
    options = ["--data=tfds:cifar100", f"--data-dir={tmp_path}", "--most-pixels=1000"]
    assert main(["train", "--run", str(tmp_path / "run"), *options]) == 1
    assert "32 x 32 pixels, more than" in capsys.readouterr().err
    load("tfds:cifar100", "train", tmp_path, Reading(limits=Limits(most_pixels=1024)))


def omniglot_source(characters=1623, alphabets=50, background=964):
    """Records in the real format: a black stroke on white that shows label and number."""
    found = {"train": [], "test": [], "small1": [], "small2": []}
    for label in range(characters):
        alphabet = label * alphabets // characters
        for number in range(2):
            image = np.full((105, 105, 3), 255, np.uint8)
            image[10 * number : 10 * number + 40, :20] = label % 256
            record = {"image": image, "label": label, "alphabet": alphabet}
            record["alphabet_char_id"] = label
            found["train" if label < background else "test"].append(record)
    found["small1"] = found["train"][:4]  # repeats of background characters
    return found


@pytest.fixture
def tensorflow(monkeypatch):
    """Says whether TensorFlow is installed and how a preparation by it ends; none is run."""

    def set_to(installed, code=0, stderr=""):
        spec = importlib.util.find_spec

        def find_spec(name, *rest):
            return installed or None if name == "tensorflow" else spec(name, *rest)

        def run(command, **_):
            return subprocess.CompletedProcess(command, code, stderr=stderr)

        monkeypatch.setattr(importlib.util, "find_spec", find_spec)
        monkeypatch.setattr(subprocess, "run", run)

    return set_to


@pytest.fixture
def mocked_omniglot(tensorflow):
    source = omniglot_source()
    tensorflow(installed=True)  # the files are never there for the mocked builder

    def as_data_source(self, split=None, decoders=None, **_):
        assert self.name == "omniglot"
        return dict(source) if split is None else source[split]

    with tfds.testing.mock_data(as_data_source_fn=as_data_source):
        yield


def test_omniglot_by_character_with_rotations(tmp_path, mocked_omniglot):
    found = {split: load_host("omniglot", split, tmp_path) for split in SPLITS}
    assert [len(host.index.class_names) for host in found.values()] == [4400, 400, 1692]
    names = {name.split()[0] for host in found.values() for name in host.index.class_names}
    assert len(names) == 1623
    host = found["validation"]
    assert host.rows.shape == (800, 28, 28, 1)
    dataset = host.to_device()
    images = dataset.inputs
    assert images.shape == (400, 2, 28, 28, 1)
    assert (np.asarray(dataset.count) == 2).all()
    characters = [name.split()[0] for name in dataset.class_names[:100]]
    turned = [f"{name} {angle}°" for angle in (0, 90, 180, 270) for name in characters]
    assert list(dataset.class_names) == turned
    assert len(set(turned)) == 400
    for turn in range(4):
        expected = np.rot90(np.asarray(images[:100]), turn, axes=(2, 3))
        np.testing.assert_array_equal(images[100 * turn : 100 * (turn + 1)], expected)
    assert images[0, 0, -1, -1, 0] == 0  # the background is black


def test_omniglot_by_alphabet(tmp_path, mocked_omniglot):
    found = {split: load_host("omniglot_alphabets", split, tmp_path).index for split in SPLITS}
    groups = {split: set(dataset.group_names) for split, dataset in found.items()}
    assert len(groups["validation"]) == 5
    assert not groups["train"] & groups["validation"]
    assert len(found["test"].class_names) == 659
    assert sum(len(dataset.class_names) for dataset in found.values()) == 1623
    assert found["train"].within_group


def test_what_is_no_image_classification(tmp_path):
    write_prepared(tmp_path, "coil100", {"train": []}, {})
    with pytest.raises(DataError, match=r"tfds:coil100 .*expected an image and a label"):
        load("tfds:coil100", "train", tmp_path)
    with pytest.raises(DataError, match=r"tfds:no_such_data cannot be read"):
        load("tfds:no_such_data", "train", tmp_path)


def test_examples_of_the_wrong_shape_are_refused(tmp_path):
    examples = [
        {"image": np.zeros((32, 32 - (label == 7), 3), np.uint8), "label": label}
        for label in range(100)
    ]
    names = {"label": cifar_names(), "coarse_label": COARSE}
    records = [example | {"coarse_label": 0, "id": b"x"} for example in examples]
    write_prepared(tmp_path, "cifar100", {"train": records, "test": records[:1]}, names)
    with pytest.raises(DataError, match=r"uint8 \(32, 31, 3\), expected uint8 \(32, 32, 3\)"):
        load("cifar_fs", "train", tmp_path)


def test_another_file_format_is_refused(tmp_path):
    builder = tfds.builder("mnist", data_dir=tmp_path, file_format="tfrecord")
    builder.data_path.mkdir(parents=True)
    template = naming.ShardedFileTemplate(
        data_dir=builder.data_dir, dataset_name="mnist", split="train", filetype_suffix="tfrecord"
    )
    info = splits.SplitInfo(
        name="train", shard_lengths=[1], num_bytes=0, filename_template=template
    )
    builder.info.set_splits(splits.SplitDict([info]))
    builder.info.write_to_directory(builder.data_dir)
    with pytest.raises(DataError, match=r"tfds:mnist cannot be read .*array_record"):
        load("tfds:mnist", "train", tmp_path)


def test_missing_extras_are_asked_for_with_the_pip_line(tmp_path, monkeypatch, tensorflow):
    tensorflow(installed=False)
    with pytest.raises(DataError, match=r"needs TensorFlow .*pip install 'memmeta\[tfds-prepare\]"):
        load("cifar_fs", "train", tmp_path)
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
    with pytest.raises(DataError, match=r"pip install 'memmeta\[tfds\]'"):
        load("cifar_fs", "train", tmp_path)


def test_a_failed_preparation_is_said_in_one_line(tmp_path, tensorflow):
    tensorflow(installed=True, code=1, stderr="Traceback\n  line\nOSError: no net")
    with pytest.raises(DataError, match="preparing cifar100 failed: OSError: no net"):
        load("cifar_fs", "train", tmp_path)


def test_training_from_the_host(cifar100, tmp_path):
    options = [
        *("--data=cifar_fs", f"--data-dir={cifar100}", "--on-host", "--normalise", "--width=2"),
        *("--method=protonet", "--ways=2", "--queries=1", "--test-queries=1", "--tasks=2"),
        *("--meta-steps=3", "--log-every=2", "--checkpoint-every=2", "--episodes=2"),
    ]
    assert main(["train", "--run", str(tmp_path / "run"), *options]) == 0
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["meta_steps"] == 3
    assert report["meta_step_temporary_bytes"] > 0
    metrics = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in metrics] == [2, 3]
