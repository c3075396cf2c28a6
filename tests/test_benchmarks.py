"""Tasks cut from images, and the batches that strategies see."""

import gzip
from pathlib import Path

import pytest
import torch

from experiments.benchmarks import Permuted, Split
from experiments.data import MNIST, Digits, Images, ImageSource
from experiments.loaders import EvaluationBatches, TrainingBatches

CPU = torch.device("cpu")
NOWHERE = Path("/nonexistent")


def data_of(tasks, stream="train"):
    return [experience.data for experience in tasks.scenario.streams[stream]]


def whole(data):
    return data.batch(torch.arange(len(data)))


@pytest.mark.parametrize("scenario", ["task", "domain", "class"])
@pytest.mark.parametrize("stream", ["train", "test"])
def test_split_gives_every_image_to_one_task(scenario, stream):
    tasks = Split(Digits(), 5, scenario).build(NOWHERE, 0, CPU)
    train, test = Digits().load(NOWHERE)
    images = train if stream == "train" else test
    parts = data_of(tasks, stream)
    assert sum(map(len, parts)) == len(images)
    for number, part in enumerate(parts):
        x, y, *task = whole(part)
        original = images.labels[part.index]
        torch.testing.assert_close(x, images.pixels[part.index], rtol=0, atol=0)
        assert len(original.unique()) == len(y.unique()) == 2
        assert len({*zip(original.tolist(), y.tolist(), strict=True)}) == 2  # one to one
        first = 2 * number if scenario == "class" else 0
        assert y.unique().tolist() == [first, first + 1]
        assert [t.unique().tolist() for t in task] == ([[number]] if scenario == "task" else [])
    assert tasks.num_outputs == (10 if scenario == "class" else 2)
    assert tasks.num_heads == (5 if scenario == "task" else None)


def test_a_seed_decides_the_tasks():
    def pairs(seed):
        tasks = Split(Digits(), 5).build(NOWHERE, seed, CPU)
        labels = Digits().load(NOWHERE)[0].labels
        return [labels[part.index].unique().tolist() for part in data_of(tasks)]

    assert pairs(0) == pairs(0)
    assert pairs(0) != pairs(1)


@pytest.mark.parametrize(("scenario", "outputs"), [("domain", 10), ("task", 10), ("class", 30)])
def test_permuted_shuffles_pixels_alike_in_training_and_test(scenario, outputs):
    tasks = Permuted(Digits(), 3, scenario).build(NOWHERE, 0, CPU)
    assert tasks.num_outputs == outputs
    for stream, images in zip(("train", "test"), Digits().load(NOWHERE), strict=True):
        for number, part in enumerate(data_of(tasks, stream)):
            x, y, *_ = whole(part)
            order = part.permutation if number else torch.arange(64)
            assert sorted(order.tolist()) == list(range(64))
            torch.testing.assert_close(x, images.pixels[:, order], rtol=0, atol=0)
            first = 10 * number if scenario == "class" else 0
            assert torch.equal(y, images.labels + first)
    train, test = data_of(tasks), data_of(tasks, "test")
    assert torch.equal(train[1].permutation, test[1].permutation)
    assert not torch.equal(train[1].permutation, train[2].permutation)
    # Ten tasks take the memory of one.
    assert train[1].images.pixels.data_ptr() == train[2].images.pixels.data_ptr()


def test_only_the_middle_square_is_shuffled():
    train = data_of(Permuted(Digits(), 3, square=4).build(NOWHERE, 0, CPU))
    pixels = torch.arange(64).view(8, 8)
    for part in train[1:]:
        order = part.permutation.view(8, 8)
        moved = order != pixels
        assert not moved[[0, 1, 6, 7]].any()
        assert not moved[:, [0, 1, 6, 7]].any()
        assert moved[2:6, 2:6].sum() > 8
        assert sorted(order[2:6, 2:6].flatten().tolist()) == pixels[2:6, 2:6].flatten().tolist()


@pytest.mark.parametrize("square", [0, 3, 10])
def test_impossible_squares_say_what_is_possible(square):
    with pytest.raises(ValueError, match=rf"square is {square}: .*squares of 2, 4, 6, 8"):
        Permuted(Digits(), 3, square=square)


def test_what_a_loader_of_avalanche_reads_is_what_a_batch_holds():
    tasks = Split(Digits(), 5, "task").build(NOWHERE, 0, CPU)
    experience = tasks.scenario.streams["train"][3]
    x, y, task = experience.data.batch(torch.tensor([5]))
    item_x, item_y, item_task = experience.dataset[5]
    assert torch.equal(x[0], item_x)
    assert int(y) == int(item_y) == experience.dataset.targets[5]
    assert int(task) == item_task == 3
    assert experience.classes_in_this_experience == [0, 1]


@pytest.mark.parametrize("number", [1, 2])
def test_an_epoch_shows_every_image_once(number):
    parts = data_of(Permuted(Digits(), 2).build(NOWHERE, 0, CPU))[:number]
    size = sum(map(len, parts))
    steps = -(-size // 100)
    generator = torch.Generator().manual_seed(0)
    loader = TrainingBatches(parts, 100, 2 * steps, generator)
    batches = list(loader)
    assert len(batches) == len(loader) == 2 * steps
    everything = torch.cat([whole(part)[0] for part in parts])
    for epoch in (batches[:steps], batches[steps:]):
        seen = torch.cat([x for x, _ in epoch])
        assert sorted(seen.sum(1).tolist()) == sorted(everything.sum(1).tolist())
        assert not torch.equal(seen, everything)
    assert not torch.equal(batches[0][0], batches[steps][0])


def test_iterations_may_end_within_an_epoch():
    (part,) = data_of(Permuted(Digits(), 1).build(NOWHERE, 0, CPU))
    loader = TrainingBatches([part], 100, 3, torch.Generator().manual_seed(0))
    assert [len(y) for _, y in loader] == [100, 100, 100]


def test_evaluation_keeps_the_order():
    (part,) = data_of(Permuted(Digits(), 1).build(NOWHERE, 0, CPU))
    loader = EvaluationBatches(part, 1000)
    batches = list(loader)
    assert [len(y) for _, y in batches] == [1000, 437]
    assert len(loader) == 2
    assert torch.equal(torch.cat([y for _, y in batches]), part.labels)


class TwelveClasses(ImageSource):
    num_classes = 12
    num_pixels = 4

    def load(self, data_root):
        images = Images(torch.rand(24, 4), torch.arange(24) % 12)
        return images, images


def test_other_images_need_only_a_source():
    tasks = Split(TwelveClasses(), 4, "domain").build(NOWHERE, 0, CPU)
    assert [len(part) for part in data_of(tasks)] == [6, 6, 6, 6]
    assert tasks.num_outputs == 3


@pytest.mark.parametrize("num_tasks", [0, 3, 10])
def test_impossible_splits_say_what_is_possible(num_tasks):
    message = "1 or more" if num_tasks == 0 else "10 classes can be split into 1, 2, 5 tasks"
    with pytest.raises(ValueError, match=message):
        Split(Digits(), num_tasks)


def test_mnist_is_read_as_it_is(mnist_root, mnist):
    train, test = MNIST().load(mnist_root)
    images, labels = mnist
    assert (len(train), len(test)) == (60000, 10000)
    assert torch.equal(train.pixels[:2000], images)
    assert torch.equal(train.labels[:2000], labels)
    assert torch.bincount(test.labels).tolist() == [
        980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009,
    ]  # fmt: skip


def test_standardized_pixels_have_the_mean_and_variance_of_the_training_images(mnist_root):
    plain, standard = MNIST().load(mnist_root), MNIST(standardize=True).load(mnist_root)
    for before, after in zip(plain, standard, strict=True):
        # The constants that torchvision's users write down.
        expected = (before.pixels - 0.1307) / 0.3081
        torch.testing.assert_close(after.pixels, expected, rtol=0, atol=2e-3)
    assert float(standard[0].pixels.double().mean()) == pytest.approx(0, abs=1e-5)


def test_padding_adds_black_edges_before_all_else(mnist_root):
    plain, padded = MNIST().load(mnist_root), MNIST(padding=2).load(mnist_root)
    assert MNIST(padding=2).num_pixels == 1024
    for before, after in zip(plain, padded, strict=True):
        framed = torch.zeros(len(before), 32, 32)
        framed[:, 2:-2, 2:-2] = before.pixels.view(-1, 28, 28)
        assert torch.equal(after.pixels, framed.flatten(1))
    standard = MNIST(standardize=True, padding=2).load(mnist_root)[0].pixels
    assert float(standard.double().mean()) == pytest.approx(0, abs=1e-5)
    assert float(standard.double().std(correction=0)) == pytest.approx(1, abs=1e-5)


def test_negative_padding_is_refused():
    with pytest.raises(ValueError, match="padding is -1: it must be 0 or more"):
        MNIST(padding=-1)


def test_missing_mnist_says_where_to_put_it(tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise OSError("no network")

    monkeypatch.setattr("torchvision.datasets.MNIST.download", refuse)
    root = tmp_path / "new" / "root"
    with pytest.raises(FileNotFoundError, match=r"MNIST is not at .*raw.*data_root=DIR.*digits"):
        MNIST().load(root)
    assert not root.parent.exists()


def idx(*sizes, data):
    return bytes([0, 0, 8, len(sizes)]) + b"".join(n.to_bytes(4, "big") for n in sizes) + data


@pytest.mark.parametrize("damage", ["cut", "empty", "not gzip", "cut gzip"])
def test_damaged_files_are_named(tmp_path, damage):
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for stem, size in (("train", 2), ("t10k", 2)):
        (raw / f"{stem}-images-idx3-ubyte").write_bytes(idx(size, 28, 28, data=bytes(1568)))
        (raw / f"{stem}-labels-idx1-ubyte").write_bytes(idx(size, data=bytes(size)))
    train, test = MNIST().load(tmp_path)
    assert train.pixels.shape == test.pixels.shape == (2, 784)
    victim = raw / "train-images-idx3-ubyte"
    content = {
        "cut": victim.read_bytes()[:100],
        "empty": b"",
        "not gzip": b"nothing",
        "cut gzip": gzip.compress(victim.read_bytes())[:-9],
    }[damage]
    victim.unlink()
    if "gzip" in damage:
        victim = victim.with_name(victim.name + ".gz")
    victim.write_bytes(content)
    with pytest.raises(ValueError, match=f"{victim.name} is damaged"):
        MNIST().load(tmp_path)
