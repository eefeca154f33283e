"""The two loaders on the CPU: every file once an epoch, the same bits from any step on, and bad files."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from nvidia.dali import Pipeline
from PIL import Image

from pipelines.crop import Decoder
from pipelines.crop import _options as crop_options
from pipelines.eval import eval_pipeline
from pipelines.loader import DecodeError, EvalLoader, TrainLoader
from pipelines.order import EvalOrder, TrainOrder
from pipelines.readers import FileList
from pipelines.train import Augment, train_pipeline

pytestmark = pytest.mark.timeout(120)

NUM_FILES = 23
CROP_ONLY = Augment(randaug_layers=0)


def write_images(folder: Path, count: int) -> FileList:
    """JPEGs of noise, 20 to 60 pixels a side; the label of each is its index."""
    rng = np.random.default_rng(0)
    paths = []
    for i in range(count):
        height, width = rng.integers(20, 60, 2)
        paths.append(str(folder / f"{i:03d}.jpg"))
        Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8)).save(paths[-1], quality=90)
    return FileList.from_paths(paths, np.arange(count))


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> FileList:
    return write_images(tmp_path_factory.mktemp("images"), NUM_FILES)


def train_loader(files: FileList, **options: Any) -> TrainLoader:
    defaults: dict[str, Any] = {
        "batch_size": 6,
        "image_size": 16,
        "seed": 1,
        "rank": 0,
        "world_size": 1,
        "device": "cpu",
        "num_threads": 1,
        "augment": CROP_ONLY,
    }
    return TrainLoader(files, **(defaults | options))


def eval_loader(files: FileList, **options: Any) -> EvalLoader:
    defaults: dict[str, Any] = {
        "batch_size": 4,
        "image_size": 16,
        "rank": 0,
        "world_size": 1,
        "device": "cpu",
        "num_threads": 1,
    }
    return EvalLoader(files, **(defaults | options))


# ------------------------------------------------------------------------------------------------- training


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize(("num_files", "batch_size"), [(NUM_FILES, 6), (5, 12)])
def test_every_file_comes_once_an_epoch(files: FileList, world_size: int, num_files: int, batch_size: int) -> None:
    subset = files.subset(np.arange(num_files))
    loaders = [train_loader(subset, batch_size=batch_size, rank=r, world_size=world_size) for r in range(world_size)]
    steps = -(-2 * num_files // batch_size)
    labels = np.concatenate([next(loader)[1].numpy() for _ in range(steps) for loader in loaders])
    epochs = labels[: 2 * num_files].reshape(2, num_files)
    np.testing.assert_array_equal(np.sort(epochs), [np.arange(num_files)] * 2)
    assert (epochs[0] != epochs[1]).any()


def test_batches_are_uint8_nhwc_images_and_int64_labels(files: FileList) -> None:
    images, labels = next(train_loader(files, batch_size=6, world_size=2, rank=1, image_size=24))
    assert (images.shape, images.dtype, images.device.type) == ((3, 24, 24, 3), torch.uint8, "cpu")
    assert (labels.shape, labels.dtype, labels.device.type) == ((3,), torch.int64, "cpu")
    assert images.is_contiguous()


def test_a_loader_made_at_any_step_continues_bit_for_bit(files: FileList) -> None:
    full = train_loader(files, augment=Augment())
    batches = [next(full) for _ in range(9)]  # the third epoch begins in step 7
    assert (full.step, full.state_dict()) == (9, {"num_samples": NUM_FILES, "bad_samples": []})
    for start in (1, 6):
        resumed = train_loader(files, augment=Augment(), start_step=start)
        for step in range(start, 9):
            assert resumed.step == step
            images, labels = next(resumed)
            assert torch.equal(images, batches[step][0])
            assert torch.equal(labels, batches[step][1])


def test_threads_and_the_pipelines_they_part_into_change_no_bit(files: FileList) -> None:
    one, several = train_loader(files, num_threads=1), train_loader(files, num_threads=3)
    for step in range(5):
        assert one.step == several.step == step
        for expected, actual in zip(next(one), next(several), strict=True):
            assert torch.equal(expected, actual)


@pytest.mark.parametrize("world_size", [2, 4])
def test_a_sample_is_augmented_alike_on_any_number_of_ranks(files: FileList, world_size: int) -> None:
    options: dict[str, Any] = {"batch_size": 8, "augment": Augment(), "start_step": 1}
    alone = train_loader(files, **options)
    ranks = [train_loader(files, rank=rank, world_size=world_size, **options) for rank in range(world_size)]
    for _ in range(2):
        images, labels = zip(*map(next, ranks), strict=True)
        expected_images, expected_labels = next(alone)
        assert torch.equal(torch.cat(images), expected_images)
        assert torch.equal(torch.cat(labels), expected_labels)


def test_augmentation_is_drawn_anew_each_epoch(files: FileList) -> None:
    loader = train_loader(files.subset([0]), batch_size=4)
    images = torch.cat([next(loader)[0] for _ in range(4)])
    assert len(torch.unique(images, dim=0)) == 16


def test_flips_are_fair_and_can_be_switched_off(tmp_path: Path) -> None:
    path = tmp_path / "ramp.png"
    ramp = np.broadcast_to(np.arange(0, 200, 5, dtype=np.uint8)[None, :, None], (40, 40, 3))
    Image.fromarray(ramp).save(path)
    files = FileList.from_paths([str(path)], [0])
    for flip, low, high in ((True, 430, 570), (False, 0, 0)):  # 1000 draws, 4.4 standard deviations
        loader = train_loader(files, batch_size=1000, augment=Augment(flip=flip, randaug_layers=0))
        images = next(loader)[0].int()
        mirrored = (images[:, 8, 0, 0] > images[:, 8, -1, 0]).sum()
        assert low <= mirrored <= high


@pytest.mark.parametrize(
    ("name", "value", "least"),
    [("num_threads", 0, 1), ("image_size", 9.5, 1), ("batch_size", 0, 1), ("prefetch", 0, 1), ("start_step", -1, 0)],
)
def test_loaders_reject_numbers_out_of_range(name: str, value: float, least: int, files: FileList) -> None:
    message = f"{name} is {value}: it must be a whole number of at least {least}"
    with pytest.raises(ValueError, match=message):
        train_loader(files, **{name: value})
    if name in ("num_threads", "image_size", "batch_size"):
        with pytest.raises(ValueError, match=message):
            eval_loader(files, **{name: value})


def test_loaders_reject_other_devices(files: FileList) -> None:
    with pytest.raises(ValueError, match="device is 'meta'"):
        train_loader(files, device="meta")


# --------------------------------------------------------------------------------------------------- memory


def test_batches_share_dalis_memory_and_stay_valid(files: FileList, monkeypatch: pytest.MonkeyPatch) -> None:
    addresses: list[list[int]] = []
    run = Pipeline.run

    def recording_run(pipeline: Pipeline) -> Any:
        outputs = run(pipeline)
        addresses.append([output.as_tensor().data_ptr() for output in outputs[:2]])
        return outputs

    monkeypatch.setattr(Pipeline, "run", recording_run)
    loader = train_loader(files)
    kept = [(batch, [tensor.clone() for tensor in batch]) for batch in (next(loader) for _ in range(10))]
    assert [[tensor.data_ptr() for tensor in batch] for batch, _ in kept] == addresses
    loader.close()
    for batch, copies in kept:
        assert all(map(torch.equal, batch, copies))


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def threads() -> int:
    return len(os.listdir("/proc/self/task"))


def test_pipelines_end_with_their_loader_whoever_holds_them(files: FileList) -> None:
    """The garbage collector may come by in a thread of another pipeline, which one freed there can wait for."""
    before = threads()
    loader, evaluation = train_loader(files), eval_loader(files)
    batches = iter(evaluation)
    batch = next(loader)
    copies = [tensor.clone() for tensor in batch]
    next(batches)
    held = [*loader._pipelines, batches.gi_frame.f_locals["pipeline"]]  # type: ignore[attr-defined]
    assert threads() > before
    loader.close()
    batches.close()  # type: ignore[attr-defined]
    assert threads() <= before
    assert len(held) == 2
    assert all(map(torch.equal, batch, copies))


def test_memory_stays_flat_and_close_ends_the_threads(files: FileList) -> None:
    before = threads()
    loader = train_loader(files, batch_size=16, image_size=64, num_threads=3)
    for _ in range(50):
        next(loader)
    early = resident_bytes()
    for _ in range(250):
        next(loader)
    assert resident_bytes() - early < 8 * 2**20  # 250 batches of 192 KB are 47 MB
    assert threads() >= before + 3
    loader.close()
    assert threads() <= before
    with pytest.raises(ValueError, match="closed"):
        next(loader)


# ----------------------------------------------------------------------------------------------- evaluation


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("num_files", [1, 8, 12, NUM_FILES])
def test_evaluation_counts_every_file_once(files: FileList, num_files: int, world_size: int) -> None:
    subset = files.subset(np.arange(num_files))
    loaders = [eval_loader(subset, rank=rank, world_size=world_size) for rank in range(world_size)]
    assert {len(loader) for loader in loaders} == {-(-num_files // (4 * world_size))}
    for _ in range(2):  # passes
        labels = [batch_labels for loader in loaders for _, batch_labels in loader]
        assert len(labels) == sum(map(len, loaders))
        counted = torch.cat(labels)
        assert sorted(counted[counted != -1].tolist()) == list(range(num_files))


def test_evaluation_gives_the_same_images_in_any_batch(files: FileList) -> None:
    def by_label(**options: Any) -> dict[int, torch.Tensor]:
        batches = [batch for rank in range(2) for batch in eval_loader(files, rank=rank, world_size=2, **options)]
        return {
            label: image
            for images, labels in batches
            for image, label in zip(images, labels.tolist(), strict=True)
            if label >= 0
        }

    small, large = by_label(batch_size=3), by_label(batch_size=10, num_threads=3)
    assert small.keys() == large.keys() == set(range(NUM_FILES))
    assert all(torch.equal(small[label], large[label]) for label in small)


def test_a_pass_given_up_half_way_leaves_nothing_behind(files: FileList) -> None:
    loader = eval_loader(files)
    assert next(iter(loader))[1].tolist() == [0, 1, 2, 3]
    a, b = iter(loader), iter(loader)  # and passes may overlap
    assert [next(a)[1][0].item(), next(b)[1][0].item(), next(a)[1][0].item()] == [0, 0, 4]
    counted = torch.cat([labels for _, labels in loader])
    assert counted.tolist() == [*range(NUM_FILES), -1]


# ------------------------------------------------------------------------------------------------ bad files


def truncated(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])


BAD: dict[str, Callable[[Path], object]] = {
    "missing": Path.unlink,
    "empty": lambda path: path.write_bytes(b""),
    "text": lambda path: path.write_text("hello, I am no image"),
    "truncated": truncated,
    "corrupt": lambda path: path.write_bytes(b"\xff\xd8\xff\xe0" + bytes(range(256)) * 4),
}


@pytest.mark.parametrize("kind", BAD)
def test_evaluation_names_a_bad_file(kind: str, tmp_path: Path) -> None:
    files = write_images(tmp_path, 12)
    for i in (4, 9):
        BAD[kind](Path(files.path(i)))
    batches = iter(eval_loader(files))
    assert next(batches)[1].tolist() == [0, 1, 2, 3]
    with pytest.raises(DecodeError) as error:
        next(batches)
    assert set(error.value.paths) <= {files.path(4), files.path(9)}
    assert files.path(4) in error.value.paths
    assert files.path(4) in str(error.value)
    assert "\n" not in str(error.value)
    assert isinstance(error.value.__cause__, RuntimeError)


def test_a_lost_disk_is_not_blamed_on_every_file() -> None:
    files = FileList.from_paths([f"/nowhere/{i}.jpg" for i in range(40)], np.arange(40))
    with pytest.raises(RuntimeError, match="/nowhere/"):
        next(train_loader(files, batch_size=40))


# -------------------------------------------------------------------------------------------------- the GPU


@pytest.mark.parametrize("randaug", [True, False])
@pytest.mark.parametrize("region", ["window", "full"])
@pytest.mark.parametrize("crop", ["tensorflow", "torchvision"])
def test_the_training_graph_can_be_laid_out_for_a_gpu(files: FileList, crop: Any, region: Any, randaug: bool) -> None:
    # Building needs a GPU; laying out checks every operator's arguments and that pixels never leave the device.
    pipeline = train_pipeline(
        files,
        TrainOrder(NUM_FILES, 8, 0, 1, seed=0),
        image_size=32,
        augment=Augment(crop=crop),
        decoder=Decoder(region=region, hw_decoder_load=0.9, preallocate_width_hint=640),
        device_id=0,
        num_threads=2,
        randaug_in_graph=randaug,
    )
    # Images, labels, last bytes of the files and, where RandAugment is no part of the graph, its uniforms.
    assert output_devices(pipeline) == ["gpu", "cpu", "cpu"] + ([] if randaug else ["cpu"])


def test_the_evaluation_graph_can_be_laid_out_for_a_gpu(files: FileList) -> None:
    order = EvalOrder(NUM_FILES, 8, 0, 1)
    pipeline = eval_pipeline(files, order, image_size=32, decoder=Decoder(), device_id=0, num_threads=2)
    assert output_devices(pipeline)[:2] == ["gpu", "cpu"]


def test_on_a_gpu_chroma_is_interpolated_in_evaluations_and_repeated_in_training(files: FileList) -> None:
    with closing(train_loader(files)) as loader:
        training = loader._decoder
    evaluation = eval_loader(files)._make_pipeline.keywords["decoder"]
    assert (training.fancy_upsampling, evaluation.fancy_upsampling) == (False, True)


def test_no_gpu_need_know_the_cores_near_it() -> None:
    """DALI's decoder would ask NVML by default, and fail where that does not know."""
    assert crop_options(Decoder(), "gpu")["affine"] is False


def output_devices(pipeline: Pipeline) -> list[str]:
    pipeline._build_graph()
    return [node.device for node in pipeline._graph_outputs]
