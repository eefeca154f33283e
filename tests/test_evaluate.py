import math
from dataclasses import replace

import pytest
import torch

import dali_vit.evaluate
from dali_vit import data as datasets
from dali_vit.config import UserError
from dali_vit.evaluate import evaluate, evaluate_splits
from dali_vit.model import create_model
from tests.conftest import write_image_folder


class FromPixels(torch.nn.Module):
    """Logits read off the picture: the first pixel's red, green, blue and three constants, times 10."""

    def forward(self, images):  # [N, 3, H, W] in [-1, 1]
        pixel = images[:, :, 0, 0]
        return 10 * torch.cat([pixel, torch.full((len(images), 3), -1.0)], dim=1)


def picture(winner: int) -> torch.Tensor:
    image = torch.zeros(4, 4, 3, dtype=torch.uint8)
    image[0, 0, winner] = 255
    return image


def batches():
    # Winners 0 1 2 0 and padding; labels 0 1 0 5 -1.
    yield torch.stack([picture(0), picture(1), picture(2)]), torch.tensor([0, 1, 0])
    yield torch.stack([picture(0), picture(0)]), torch.tensor([5, -1])


def test_counts_by_hand():
    result = evaluate(FromPixels(), batches(), torch.device("cpu"))
    # Logits are +10 once and -10 five times. Right: 2 of 4. The label 0 of the third image is among the first
    # five whatever the tie; label 5 is the last of the tied ones.
    right = math.log(1 + 5 * math.exp(-20))
    assert result["count"] == 4
    assert result["top1"] == 50.0
    assert result["loss"] == pytest.approx((2 * right + 2 * (20 + right)) / 4, rel=1e-6)
    assert result["top5"] in (75.0, 100.0)


def test_a_share_is_the_nearest_number_to_it():
    labels = torch.zeros(500, dtype=torch.int64)
    labels[494:] = 1
    result = evaluate(FromPixels(), [(picture(0).expand(500, 4, 4, 3), labels)], torch.device("cpu"))
    assert result["top1"] == 98.8  # 494 times 100 / 500 is 98.80000000000001


def test_an_evaluation_that_is_broken_off_leaves_training_mode():
    def broken():
        yield from batches()
        raise InterruptedError

    model = FromPixels().train()
    with pytest.raises(InterruptedError):
        evaluate(model, broken(), torch.device("cpu"))
    assert model.training


def test_five_classes_count_as_the_top_five():
    class Ranked(torch.nn.Module):
        def forward(self, images):
            return torch.arange(8.0, 0.0, -1.0).expand(len(images), 8)

    pictures = picture(0).expand(8, 4, 4, 3)
    result = evaluate(Ranked(), [(pictures, torch.arange(8))], torch.device("cpu"))
    assert (result["top1"], result["top5"]) == (100 / 8, 100 * 5 / 8)


def test_acceptable_labels_by_hand():
    # Rows of the images: {0, 2}, {0}, none, {2}; winners 0 1 2 0 -> right, wrong, left out, wrong.
    acceptable = torch.tensor([[0, 2], [0, -1], [-1, -1], [2, -1]])
    pictures = torch.stack([picture(w) for w in (0, 1, 2, 0, 0)])
    result = evaluate(FromPixels(), [(pictures, torch.tensor([0, 1, 2, 3, -1]))], torch.device("cpu"), acceptable)
    assert result == {"top1": pytest.approx(100 / 3), "count": 3}


def test_model_returns_to_its_mode():
    model = FromPixels().train()
    evaluate(model, batches(), torch.device("cpu"))
    assert model.training


@pytest.mark.timeout(60)
@pytest.mark.parametrize(("parts", "largest"), [(1, 4), (2, 2)])
def test_no_more_images_at_once_than_in_a_part_of_a_step(parts, largest, tiny_config, cpu):
    """Else an evaluation would not fit into memory that a step fits into."""
    config = replace(
        tiny_config,
        optim=replace(tiny_config.optim, batch_size=4),
        run=replace(tiny_config.run, grad_accum_steps=parts),
    )
    dataset = datasets.load_dataset(config.data.data, minival=0.1)
    model = create_model(config.model, num_classes=len(dataset.classes), resolution=32)
    seen = []
    model.register_forward_hook(lambda _, inputs, __: seen.append(len(inputs[0])))
    loaders = {}
    evaluate_splits(model, dataset, config, cpu, loaders)
    for loader in loaders.values():
        loader.close()
    assert max(seen) == largest


@pytest.mark.timeout(120)
def test_loaders_are_kept_between_evaluations(tiny_config, cpu, tmp_path, caplog):
    """The second makes none, counts the same, and still leaves out what the first found undecodable."""
    root = write_image_folder(tmp_path / "images")
    bad = root / "val/bee/003.jpg"
    bad.write_bytes(bad.read_bytes()[:300])
    config = replace(tiny_config, data=replace(tiny_config.data, data=str(root), max_bad_share=0.1))
    dataset = datasets.load_dataset(root, minival=0.1)
    model = create_model(config.model, num_classes=4, resolution=32)
    loaders = {}
    first = evaluate_splits(model, dataset, config, cpu, loaders)
    made = dict(loaders)
    second = evaluate_splits(model, dataset, config, cpu, loaders)
    assert set(made) == {"val", "minival"}
    assert all(loaders[name] is made[name] for name in made)
    assert first == second
    assert first["val/bad_samples"] == 1
    assert "minival/bad_samples" not in first
    assert sum("val/bee/003.jpg" in message for message in caplog.messages) == 1


def test_ranks_that_leave_out_too_many_images_together_end_a_run(tiny_config, cpu, monkeypatch):
    """Each of two has found one bad image, which alone is allowed; `evaluate` sums over ranks."""
    dataset = replace(datasets.load_dataset(tiny_config.data.data, minival=0.1), val=None)
    model = create_model(tiny_config.model, num_classes=4, resolution=32)
    left_out = 1
    monkeypatch.setattr(
        dali_vit.evaluate, "evaluate", lambda *_: {"top1": 1.0, "count": len(dataset.minival) - left_out}
    )
    assert evaluate_splits(model, dataset, tiny_config, cpu, {})["minival/bad_samples"] == 1
    left_out = 2
    of = f"2 of {len(dataset.minival)} images of minival cannot be read, decoded or cropped"
    with pytest.raises(
        UserError, match=rf"^{of} \(--max-bad-share 0.01\): put good ones in their place, or prepare shards"
    ):
        evaluate_splits(model, dataset, tiny_config, cpu, {})


class Given(torch.nn.Module):
    """Gives logits that were made before, one batch after the other."""

    def __init__(self, logits):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(()))
        self.logits = iter(logits)

    def forward(self, images):
        return next(self.logits) * self.scale.to(torch.bfloat16)


def test_the_loss_of_bfloat16_logits_is_summed_in_full():
    """As autocast gives them on a GPU: in bfloat16 a sum of some hundred losses has two digits."""
    generator = torch.Generator().manual_seed(0)
    logits = [torch.randn(37, 10, generator=generator).bfloat16() for _ in range(30)]
    labels = [torch.randint(10, (37,), generator=generator) for _ in logits]
    pictures = torch.zeros(37, 4, 4, 3, dtype=torch.uint8)
    batches = [(pictures, of_batch) for of_batch in labels]
    result = evaluate(Given(logits), batches, torch.device("cpu"))
    expected = torch.nn.functional.cross_entropy(torch.cat(logits).double(), torch.cat(labels)).item()
    assert result["loss"] == pytest.approx(expected, rel=1e-6)
    assert result["count"] == 30 * 37


def test_nothing_is_kept_for_a_backward_pass():
    class Noting(FromPixels):
        def forward(self, images):
            seen.append(torch.is_grad_enabled())
            return super().forward(images)

    seen = []
    evaluate(Noting(), batches(), torch.device("cpu"))
    assert seen == [False, False]


def test_of_no_images_there_is_no_accuracy():
    """As where none can be decoded, of which the share tells; and a model in eval mode stays in it."""
    model = FromPixels().eval()
    result = evaluate(model, [(picture(0)[None], torch.tensor([-1]))], torch.device("cpu"))
    assert result == {"top1": 0, "top5": 0, "loss": 0, "count": 0}
    assert not model.training


class Recorded:
    """Stands for a loader of two batches of two images, and notes when they are fetched."""

    def __init__(self, events, files):
        self.events, self.files = events, files

    def __iter__(self):
        for _ in range(2):
            self.events.append("fetched")
            yield torch.stack([picture(0), picture(1)]), torch.tensor([0, 1])


@pytest.mark.parametrize("world_size", [1, 2])
def test_loaders_are_made_as_the_run_says_and_progress_is_told_around_each_batch(
    world_size, tiny_config, cpu, monkeypatch
):
    config = replace(
        tiny_config,
        data=replace(tiny_config.data, max_bad_share=0.7),
        optim=replace(tiny_config.optim, batch_size=8),
        run=replace(tiny_config.run, grad_accum_steps=2, threads=3),
    )
    dataset = datasets.load_dataset(config.data.data, minival=0.1)
    made, events = [], []

    def eval_loader(files, **options):
        made.append(options)
        return Recorded(events, files)

    monkeypatch.setattr(dali_vit.evaluate, "eval_loader", eval_loader)
    monkeypatch.setattr(dali_vit.evaluate.left_out, "check_share", lambda *_, **__: None)
    group = replace(cpu, world_size=world_size)
    evaluate_splits(FromPixels(), dataset, config, group, {}, lambda: events.append("told"))
    expected = {"batch_size": 8 // world_size // 2, "resolution": 32, "group": group, "threads": 3}
    assert made == [expected | {"max_bad_share": 0.7}] * 2
    assert events == ["told", "fetched", "told", "fetched", "told"] * 2


def test_every_rank_evaluates_with_the_same_buffers(monkeypatch):
    """Those of batch norm have come of each rank's own images."""
    shared = []
    monkeypatch.setattr(dali_vit.evaluate, "share_buffers", shared.append)
    model = FromPixels()
    evaluate(model, batches(), torch.device("cpu"))
    assert shared == [model]
