"""Tasks cut from images, and the batches that strategies see."""

import errno
import gzip
import hashlib
import os
from concurrent.futures import ThreadPoolExecutor
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest
import torch

from experiments.tasks.benchmarks import Permuted, Split
from experiments.tasks.images import MNIST, Digits, Images, ImageSource
from experiments.tasks.mnist_files import MNIST_FILES, IdxFile, read_files
from experiments.training.loaders import EvaluationBatches, TrainingBatches

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
    with pytest.raises(ValueError, match=rf"square must be 2, 4, 6, 8 .*, got {square}"):
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
    message = "1 or more" if num_tasks == 0 else "num_tasks must be 1, 2, 5 for 10 classes, got"
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
    with pytest.raises(ValueError, match="padding must be a whole number, 0 or more, got -1"):
        MNIST(padding=-1)


# --- the files of MNIST -------------------------------------------------------------------


def test_missing_mnist_says_where_to_put_it(tmp_path, monkeypatch):
    monkeypatch.setattr("torchvision.datasets.MNIST.mirrors", ["http://127.0.0.1:9/"])
    root = tmp_path / "new" / "root"
    message = r"train-images-idx3-ubyte of MNIST is not in .*raw and .*data_root=DIR.*digits"
    with pytest.raises(FileNotFoundError, match=message):
        MNIST().load(root)
    assert not root.parent.exists()


CONTENTS = {
    "train-images": bytes([0, 0, 8, 3, *(0, 0, 0, 5), *(0, 0, 0, 2), *(0, 0, 0, 3), *range(30)]),
    "train-labels": bytes([0, 0, 8, 1, *(0, 0, 0, 5), *range(5)]),
    "test-images": bytes([0, 0, 8, 3, *(0, 0, 0, 2), *(0, 0, 0, 2), *(0, 0, 0, 3), *range(12)]),
    "test-labels": bytes([0, 0, 8, 1, *(0, 0, 0, 2), 9, 0]),
}
SHAPES = {"train-images": (5, 2, 3), "train-labels": (5,), "test-images": (2, 2, 3)}
SHAPES["test-labels"] = (2,)
FILES = [
    IdxFile(name, SHAPES[name], hashlib.sha256(content).hexdigest())
    for name, content in CONTENTS.items()
]


@pytest.fixture
def raw(tmp_path):
    """A folder with the four files, two of them compressed."""
    folder = tmp_path / "raw"
    folder.mkdir()
    for name, content in CONTENTS.items():
        if name.startswith("train"):
            (folder / name).write_bytes(content)
        else:
            (folder / f"{name}.gz").write_bytes(gzip.compress(content))
    return folder


@pytest.fixture
def mirror(tmp_path, monkeypatch):
    """A server of compressed files: its folder, its address, and what it was asked for."""
    folder = tmp_path / "mirror"
    folder.mkdir()
    for name, content in CONTENTS.items():
        (folder / f"{name}.gz").write_bytes(gzip.compress(content))
    asked = []

    class Handler(SimpleHTTPRequestHandler):
        def __init__(self, *args):
            super().__init__(*args, directory=folder)

        def log_request(self, *_):
            asked.append(self.path.removeprefix("/"))

        def log_message(self, *_):
            pass

    monkeypatch.setenv("no_proxy", "*")
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield folder, f"http://127.0.0.1:{server.server_port}/", asked
        server.shutdown()


def held(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def check_arrays(arrays):
    for name, array in zip(CONTENTS, arrays, strict=True):
        assert array.shape == SHAPES[name]
        assert array.tobytes() == CONTENTS[name][-array.size :]


def test_files_are_read_compressed_or_not(raw):
    check_arrays(read_files(raw, FILES, []))


def changed(content, place, value):
    return content[:place] + bytes([value]) + content[place + 1 :]


LABELS = CONTENTS["train-labels"]
DAMAGES = {
    "empty": b"",
    "cut": LABELS[:-1],
    "longer": LABELS + b"\0",
    "one label fewer": bytes([0, 0, 8, 1, *(0, 0, 0, 4), *range(4)]),
    "no labels": bytes([0, 0, 8, 1, *(0, 0, 0, 0)]),
    "another type": changed(LABELS, 2, 0x0D),
    "other dimensions": changed(LABELS, 3, 2),
    "other sizes": changed(LABELS, 7, 4),
    "a flipped bit": changed(LABELS, 10, LABELS[10] ^ 1),
    "a label of 255": changed(LABELS, 12, 255),
    "zeros": bytes(len(LABELS)),
    "a page": b"<html>",
}


@pytest.mark.parametrize("compressed", [False, True], ids=["", "compressed"])
@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_files_are_named_and_kept(raw, mirror, damage, compressed):
    victim, content = raw / "train-labels", DAMAGES[damage]
    if compressed:
        victim.unlink()
        victim, content = raw / "train-labels.gz", gzip.compress(content)
    victim.write_bytes(content)
    (raw / "test-labels.gz").unlink()
    before = held(raw)
    with pytest.raises(ValueError, match=f"{victim.name} is damaged, it.*: put the original"):
        read_files(raw, FILES, [mirror[1]])
    assert held(raw) == before
    assert mirror[2] == []


@pytest.mark.parametrize("byte", range(len(gzip.compress(LABELS))))
def test_damaged_compression_is_named_or_does_no_harm(raw, byte):
    victim = raw / "train-labels.gz"
    (raw / "train-labels").unlink()
    whole = gzip.compress(LABELS)
    for content in (whole[:byte], changed(whole, byte, whole[byte] ^ 255)):
        victim.write_bytes(content)
        try:
            arrays = read_files(raw, FILES, [])
        except ValueError as error:
            assert f"{victim.name} is damaged, it" in str(error)  # noqa: PT017
        else:
            check_arrays(arrays)  # the header holds a date, too


def test_files_that_cannot_be_read_are_not_called_damaged(raw, monkeypatch):
    read = Path.read_bytes

    def refuse(path):
        if path.name == "train-labels":
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return read(path)

    before = held(raw)
    monkeypatch.setattr(Path, "read_bytes", refuse)
    message = r"train-labels cannot be read \(Permission denied\): make it readable"
    with pytest.raises(ValueError, match=message):
        read_files(raw, FILES, [])
    monkeypatch.undo()
    assert held(raw) == before


def test_what_is_no_file_is_not_waited_for(raw):
    (raw / "train-labels").unlink()
    os.mkfifo(raw / "train-labels")
    with pytest.raises(ValueError, match="train-labels is no regular file"):
        read_files(raw, FILES, [])


@pytest.mark.parametrize("missing", [[name] for name in CONTENTS] + [list(CONTENTS)])
def test_only_missing_files_are_downloaded(raw, mirror, missing):
    for name in missing:
        (raw / name).unlink(missing_ok=True)
        (raw / f"{name}.gz").unlink(missing_ok=True)
    before = held(raw)
    _, address, asked = mirror
    check_arrays(read_files(raw, FILES, [address]))
    assert asked == [f"{name}.gz" for name in missing]
    assert held(raw) == before | {name: CONTENTS[name] for name in missing}
    check_arrays(read_files(raw, FILES, []))


@pytest.mark.parametrize(
    "content",
    [None, b"<html>", gzip.compress(LABELS)[:-9], gzip.compress(b"")],
    ids=["missing", "a page", "cut", "empty"],
)
def test_a_failed_download_leaves_what_is_there(tmp_path, mirror, content):
    folder, address, _ = mirror
    served = folder / "test-images.gz"
    served.unlink() if content is None else served.write_bytes(content)
    raw = tmp_path / "new" / "raw"
    message = (
        r"test-images of MNIST is not in .*raw and could not be downloaded \(http.*: .*\): put"
    )
    with pytest.raises(FileNotFoundError, match=message):
        read_files(raw, FILES, [address])
    # Those before it are whole, and the next run goes on from there.
    assert held(raw) == {name: CONTENTS[name] for name in ("train-images", "train-labels")}
    served.write_bytes(gzip.compress(CONTENTS["test-images"]))
    check_arrays(read_files(raw, FILES, [address]))


def test_another_mirror_is_tried(tmp_path, mirror):
    folder, address, asked = mirror
    (folder / "bad").mkdir()
    (folder / "bad" / "train-images.gz").write_bytes(b"<html>")
    check_arrays(read_files(tmp_path / "raw", FILES, [f"{address}bad/", address]))
    assert asked[:2] == ["bad/train-images.gz", "train-images.gz"]


def test_a_folder_that_cannot_be_written_is_said(tmp_path, mirror):
    (tmp_path / "MNIST").write_text("a file where a folder is wanted")
    with pytest.raises(FileNotFoundError, match=r"was downloaded but cannot be written \("):
        read_files(tmp_path / "MNIST" / "raw", FILES, [mirror[1]])
    assert (tmp_path / "MNIST").read_text().startswith("a file")


def test_a_full_disk_leaves_no_half_file(tmp_path, mirror, monkeypatch):
    def full(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    raw = tmp_path / "raw"
    with pytest.raises(FileNotFoundError, match=r"cannot be written \(No space left on device\)"):
        read_files(raw, FILES, [mirror[1]])
    assert held(raw) == {}


def test_two_downloads_at_once_do_not_disturb_each_other(tmp_path, mirror):
    folder, address, _ = mirror
    (folder / "bad").mkdir()
    raw = tmp_path / "raw"
    with ThreadPoolExecutor(8) as pool:
        addresses = [address, f"{address}bad/"] * 8
        runs = [pool.submit(read_files, raw, FILES, [address]) for address in addresses]
    for run in runs[::2]:
        check_arrays(run.result())
    assert held(raw) == CONTENTS


@pytest.mark.parametrize("number", range(4))
def test_the_checksums_are_those_of_mnist(mnist_root, tmp_path, number):
    file = MNIST_FILES[number]
    content = (mnist_root / "MNIST" / "raw" / file.name).read_bytes()
    assert file.array(content, is_compressed=False).shape == file.shape
    (tmp_path / file.name).write_bytes(changed(content, 10**4, content[10**4] ^ 1))
    with pytest.raises(ValueError, match=f"{file.name} is damaged, its SHA-256 is"):
        read_files(tmp_path, [file], [])
