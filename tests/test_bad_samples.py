"""Training leaves out samples that cannot be decoded: no other sample moves, whichever rank finds them and whenever."""

from __future__ import annotations

import functools
import logging
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from nvidia.dali import Pipeline, fn, pipeline_def, types

import pipelines.loader
from pipelines import bad_samples, crop, probe
from pipelines.bad_samples import BadSamples, still_bad
from pipelines.crop import Decoder
from pipelines.loader import DecodeError, EvalLoader, LackOfMemory
from pipelines.order import EvalOrder
from pipelines.readers import EvalSource, FileList, Samples, read
from pipelines.train import Augment
from tests.bad_images import BAD, InMemory, assert_equal, encoded, loader, mutations, take, with_bad, write

pytestmark = pytest.mark.timeout(240)

LOGGER = "dali_vit.data"


def test_300_mutated_images_do_not_end_a_run(tmp_path: Path) -> None:
    """Two epochs; what is found on the way is what was bad from the start, on one rank and on two."""
    contents = [encoded(seed=i) for i in range(300)] + mutations(300)
    files = write(tmp_path / "images", contents)
    steps, options = 2 * 600 // 40, {"batch_size": 40}
    alone = loader(files, **options)
    images, labels = take(alone, steps)

    bad = alone.bad_samples
    assert 150 < len(bad) < 300
    assert min(bad) >= 300
    assert set(range(300, 300 + len(BAD))) <= set(bad)
    for epoch in labels.reshape(2, 600).tolist():
        assert sorted(label for label in epoch if label >= 0) == sorted(set(range(600)) - set(bad))
        assert epoch.count(-1) == len(bad)

    assert_equal(take(loader(files, bad_samples=bad, **options), steps), (images, labels))
    ranks = [loader(files, rank=rank, world_size=2, **options) for rank in range(2)]
    streams = [take(rank, steps) for rank in ranks]
    assert_equal((torch.cat([s[0] for s in streams], 1), torch.cat([s[1] for s in streams], 1)), (images, labels))
    assert set(ranks[0].bad_samples) | set(ranks[1].bad_samples) == set(bad)
    in_memory = loader(InMemory(contents, files.labels), **options)
    assert_equal(take(in_memory, steps // 2), (images[: steps // 2], labels[: steps // 2]))


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_sample_is_named_once_and_replaced(kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    good = write(tmp_path / "good", with_bad(12, {}))
    files = write(tmp_path / "bad", with_bad(12, {7: BAD[kind]}))
    train = loader(files, batch_size=4)
    with caplog.at_level(logging.WARNING, LOGGER):
        images, labels = take(train, 9)  # three epochs
    assert [record.message for record in caplog.records] == [
        f"{files.path(7)} cannot be read, decoded or cropped: left out; the next start tries it again"
    ]
    assert train.bad_samples == (7,)
    assert train.state_dict()["bad_samples"] == [7]

    expected_images, expected_labels = take(loader(good, batch_size=4), 9)
    replaced = expected_labels == 7
    assert replaced.sum() == 3
    assert torch.equal(labels, torch.where(replaced, -1, expected_labels))
    assert torch.equal(images[~replaced], expected_images[~replaced])
    assert (images[replaced] == 128).all()


@pytest.mark.parametrize("suffix", [".png", ".webp", ".jpeg.txt", ""])
@pytest.mark.parametrize("in_memory", [False, True])
def test_a_jpeg_cut_short_is_known_by_its_bytes_whatever_its_name(suffix: str, in_memory: bool, tmp_path: Path) -> None:
    """When its turn comes, even if the window that is drawn of it does not reach the rows that are missing."""
    contents = [encoded()[:-20], encoded(name="PNG")]
    files = write(tmp_path / "images", contents, suffix)
    samples = InMemory(contents, files.labels, suffix) if in_memory else files
    for seed in range(8):
        train = loader(samples, batch_size=2, seed=seed)
        assert sorted(next(train)[1].tolist()) == [-1, 1]
        assert train.bad_samples == (0,)


def test_a_missing_file_and_one_that_goes_missing(tmp_path: Path) -> None:
    files = write(tmp_path / "images", with_bad(64, {}))
    Path(files.path(3)).unlink()
    train = loader(files, batch_size=16)
    take(train, 4)
    assert train.bad_samples == (3,)
    Path(files.path(60)).unlink()
    _, labels = take(train, 8)
    assert train.bad_samples == (3, 60)
    assert (labels == -1).sum() >= 3


def test_resumed_at_any_step_with_what_was_known_then(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipelines.loader._LOOK_AHEAD", 0)
    files = write(tmp_path / "images", with_bad(40, dict.fromkeys((5, 17, 31), BAD["without its end"])))
    options: dict[str, Any] = {"batch_size": 4}
    train = loader(files, **options)
    batches, states = [], []
    for _ in range(20):
        states.append(train.state_dict())
        batches.append(next(train))
    assert (states[0]["bad_samples"], states[-1]["bad_samples"]) == ([], [5, 17, 31])
    assert any(len(state["bad_samples"]) in (1, 2) for state in states)
    for start in (1, 5, 9):
        resumed = loader(files, start_step=start, bad_samples=states[start]["bad_samples"], **options)
        for step in range(start, start + 4):
            assert_equal(next(resumed), batches[step])


def test_jpegs_with_something_after_their_end_are_good(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And are not decoded once more to find that out, as training would wait for it."""
    contents = with_bad(12, {i: encoded(seed=i) + bytes(100) for i in range(0, 12, 2)})
    contents[1] = encoded(seed=1, name="PNG")
    train = loader(write(tmp_path / "images", contents), batch_size=12)
    runs: list[Pipeline] = []
    run = Pipeline.run

    def recording_run(pipeline: Pipeline) -> Any:
        runs.append(pipeline)
        return run(pipeline)

    monkeypatch.setattr(Pipeline, "run", recording_run)
    looked_at: list[np.ndarray] = []
    look = bad_samples._may_be_cut_short
    monkeypatch.setattr(bad_samples, "_may_be_cut_short", lambda *given: looked_at.append(given[1]) or look(*given))
    _, labels = take(train, 5)
    assert train.bad_samples == ()
    assert torch.equal(labels.sort().values, torch.arange(12).expand(5, 12))
    assert len(runs) == 5
    assert len(looked_at) == 7  # once each, in five epochs


# ---------------------------------------------------------------------------------------------------- limits


def test_too_large_a_share_ends_the_run(tmp_path: Path) -> None:
    files = write(tmp_path / "images", with_bad(100, dict.fromkeys((10, 20, 30, 40), BAD["text"])))
    assert len(loader(files, bad_samples=range(29), max_bad_share=0.29).bad_samples) == 29  # 0.29 * 100 is below 29
    take(loader(files, max_bad_share=0.04), 13)
    train = loader(files, max_bad_share=0.03)
    with pytest.raises(
        DecodeError, match=r"4 of 100 samples .* more than the 3 .* put good ones in their place, .* .`dali-vit verify"
    ) as error:
        take(train, 13)
    assert sorted(error.value.paths) == [files.path(i) for i in (10, 20, 30, 40)]
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="closed"):
        next(train)
    with pytest.raises(DecodeError, match="3 of 100 samples"):
        loader(files, bad_samples=[1, 2, 3], max_bad_share=0.02)


def test_one_bad_sample_is_allowed_in_a_small_set_unless_none_is(tmp_path: Path) -> None:
    files = write(tmp_path / "images", with_bad(12, {4: BAD["text"]}))
    take(loader(files, max_bad_share=0.01), 3)
    with pytest.raises(DecodeError, match=r"cannot read, decode or crop .*004.JPEG: replace or remove the file"):
        take(loader(files, max_bad_share=0.0), 3)
    files = write(tmp_path / "images", with_bad(12, {4: BAD["text"], 5: BAD["half"]}))
    with pytest.raises(DecodeError, match="2 of 12 samples"):
        take(loader(files, max_bad_share=0.01), 3)


def test_a_lost_disk_is_not_blamed_on_the_samples(caplog: pytest.LogCaptureFixture) -> None:
    for count in (3, 1000):
        files = FileList.from_paths([f"/nowhere/{i}.jpg" for i in range(count)], np.arange(count))
        with pytest.raises(RuntimeError, match="/nowhere/"):
            next(loader(files, max_bad_share=0.1))
    assert not caplog.records


def test_samples_that_are_all_bad_are_to_blame(tmp_path: Path) -> None:
    """As an image that is good still decodes, and they can be read."""
    for count, named in (2, "2 of 2"), (40, "16 of 40"):
        files = write(tmp_path / str(count), with_bad(count, dict.fromkeys(range(count), BAD["half"])))
        with pytest.raises(
            DecodeError, match=f"{named} samples cannot be read, decoded or cropped, more than the 1 that"
        ):
            next(loader(files, batch_size=2, max_bad_share=0.01))
    options: dict[str, Any] = {"batch_size": 8, "image_size": 32, "rank": 0, "world_size": 1, "device": "cpu"}
    evaluation = EvalLoader(files, num_threads=1, max_bad_share=1.0, **options)
    assert [labels.tolist() for _, labels in evaluation] == [8 * [-1]] * 5
    assert evaluation.bad_samples == tuple(range(40))


def test_a_device_that_decodes_nothing_is_not_blamed_on_the_samples(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    files = write(tmp_path / "images", with_bad(40, {}))
    training = loader(files)

    def run(_: Pipeline) -> None:
        raise RuntimeError("the device is lost")

    monkeypatch.setattr(Pipeline, "run", run)
    with pytest.raises(RuntimeError, match="the device is lost"):
        next(training)
    assert training.bad_samples == ()
    assert caplog.messages == []


@pytest.mark.parametrize(
    "said",
    [
        "Error in GPU operator `nvidia.dali.fn.resize`:\n\nCUDA runtime API error cudaErrorMemoryAllocation (2):",
        "Critical error in pipeline: CUDA allocation failed",
        "Error in GPU operator `nvidia.dali.fn.decoders.image_slice`:\n\nCan't allocate 12869632 bytes on device 0.",
        "DLTensorPythonFunction error: OutOfMemoryError: CUDA out of memory. Tried to allocate 20.00 MiB.",
        "CUDA error: out of memory",
        "Triton Error [CUDA]: out of memory",
        'nvJPEG error "5" : NVJPEG_STATUS_ALLOCATOR_FAILURE',
    ],
)
def test_a_gpus_lack_of_memory_is_not_blamed_on_the_samples(
    said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Of those tried then some might fail and others not."""
    files = write(tmp_path / "images", with_bad(8, {}))
    tried: list[Pipeline] = []

    def run(pipeline: Pipeline) -> None:
        tried.append(pipeline)
        raise RuntimeError(said)

    monkeypatch.setattr(Pipeline, "run", run)
    training = loader(files)
    with pytest.raises(LackOfMemory, match=re.escape(said[:40])):
        next(training)
    evaluation = EvalLoader(files, batch_size=4, image_size=32, rank=0, world_size=1, device="cpu", num_threads=1)
    with pytest.raises(LackOfMemory):
        next(iter(evaluation))
    make = functools.partial(probe.decode_pipeline, decoder=Decoder(), device_id=None, num_threads=1)
    with pytest.raises(LackOfMemory):
        list(probe.try_samples(files, make))
    assert len(tried) == 3
    assert training.bad_samples == evaluation.bad_samples == ()
    assert caplog.messages == []


def test_arguments_are_checked(tmp_path: Path) -> None:
    files = write(tmp_path / "images", with_bad(4, {}))
    with pytest.raises(ValueError, match=r"max_bad_share is 1.5"):
        loader(files, max_bad_share=1.5)
    for index in (-1, 4):
        with pytest.raises(ValueError, match="bad_samples"):
            loader(files, bad_samples=[index])


@pytest.fixture
def lenient(monkeypatch: pytest.MonkeyPatch) -> None:
    """The loaders' own pipelines decode anything, as a GPU's decoder may; those that try samples are as they are."""

    def grey(_: Any, *__: Any, size: int = 64, **___: Any) -> Any:
        return fn.constant(idata=128, shape=[size, size, 3], dtype=types.UINT8, layout="HWC")

    for name, decoding in [("train_pipeline", "decode_window"), ("eval_pipeline", "decode")]:
        make = getattr(pipelines.loader, name)

        def patched(*arguments: Any, make: Any = make, decoding: str = decoding, **options: Any) -> Pipeline:
            with monkeypatch.context() as patch:
                patch.setattr(crop, decoding, grey)
                return make(*arguments, **options)

        monkeypatch.setattr(pipelines.loader, name, patched)
    monkeypatch.setattr(
        pipelines.loader, "_on_cpu", lambda decoding: functools.partial(probe.decode_pipeline, **decoding)
    )


@pytest.mark.usefixtures("lenient")
@pytest.mark.filterwarnings("ignore:The external source node")  # whose windows a decoder like this does not use
def test_what_was_cut_short_is_left_out_where_the_decoder_takes_it(tmp_path: Path) -> None:
    files = write(tmp_path, with_bad(12, {7: encoded(seed=7)[:-50]}))
    train = loader(files, batch_size=4, augment=Augment(randaug_layers=0))
    images, labels = take(train, 9)
    assert train.bad_samples == (7,)
    assert sorted(labels.flatten().tolist()) == sorted(3 * [*range(7), *range(8, 12), -1])
    assert (images == 128).all()

    options: dict[str, Any] = {"batch_size": 5, "image_size": 32, "rank": 0, "world_size": 1, "device": "cpu"}
    evaluation = EvalLoader(files, num_threads=1, max_bad_share=0.1, **options)
    for _ in range(2):
        labels = torch.cat([batch for _, batch in evaluation])
        assert labels.tolist() == [*range(7), -1, *range(8, 12), -1, -1, -1]
    assert evaluation.bad_samples == (7,)
    with pytest.raises(DecodeError, match=re.escape(files.path(7))):
        list(EvalLoader(files, num_threads=1, **options))


def test_that_a_gpu_decodes_a_sample_is_not_enough_to_call_it_good(tmp_path: Path) -> None:
    """It is tried there after another's failure; that it was cut short shows when its own turn comes, all the same."""
    cut = encoded(seed=3)[:-50]
    files = write(tmp_path, with_bad(6, {1: b"hello, I am no image", 3: cut, 5: b"\xff\xd8\xff\xe0" + bytes(300)}))
    on_cpu = functools.partial(probe.decode_pipeline, decoder=Decoder(), device_id=None, num_threads=1)

    def on_gpu(samples: Samples, order: EvalOrder) -> Pipeline:
        @pipeline_def(batch_size=order.batch_size, num_threads=1, device_id=None)
        def graph() -> Any:
            contents, labels = read(EvalSource(samples, order))
            return crop.image_size(contents), labels

        return graph()

    bad = BadSamples(files, on_gpu, [], 0.5, on_cpu)
    indices = np.arange(6)
    assert bad.find(indices, failed=True)
    assert bad.indices == (1, 5)
    last_bytes = np.stack([np.frombuffer(Path(files.path(i)).read_bytes()[-8:], np.uint8) for i in range(6)])
    assert bad.cut_short(indices, last_bytes).tolist() == [3]  # the last is known
    assert bad.find(bad.cut_short(indices, last_bytes), failed=False)
    assert bad.indices == (1, 3, 5)
    assert bad.cut_short(indices, last_bytes).tolist() == []


def test_samples_that_were_bad_are_tried_again_while_there_is_time(tmp_path: Path) -> None:
    files = write(tmp_path / "images", with_bad(40, {3: BAD["half"], 17: BAD["text"]}))
    given: dict[str, Any] = {"device_id": None, "num_threads": 1}
    assert still_bad(files, [1, 3, 5, 17, 39], **given, seconds=60) == [3, 17]
    assert still_bad(files, [3, 17], **given, seconds=60) == [3, 17]
    assert still_bad(files, [1, 3, 5], **given, seconds=0) == [3, 5]  # the first is tried in any case
