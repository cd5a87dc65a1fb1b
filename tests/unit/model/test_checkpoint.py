import pytest
import torch
from torch import nn

from offramp.errors import ArtifactError
from offramp.model.checkpoint import load_weights, save_weights
from offramp.model.multi_exit import MultiExitNetwork
from offramp.zoo.mlp import mlp


@pytest.fixture
def saved(network, tmp_path):
    path = tmp_path / "model.safetensors"
    save_weights(network, path)
    return path


def another_network() -> MultiExitNetwork:
    return mlp(in_features=6, widths=(5, 8, 7), num_classes=4)


def snapshot(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[k], right[k]) for k in left)


def test_weights_come_back_bit_for_bit(network, saved):
    other = another_network()
    assert not same(snapshot(other), snapshot(network))
    load_weights(other, saved)
    assert same(snapshot(other), snapshot(network))


def test_buffers_and_channels_last_weights_come_back(tmp_path):
    def build() -> nn.Module:
        module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
        return module.to(memory_format=torch.channels_last)

    trained, fresh = build(), build()
    trained(torch.randn(2, 3, 5, 5))
    save_weights(trained, tmp_path / "w.safetensors")
    load_weights(fresh, tmp_path / "w.safetensors")
    assert same(snapshot(fresh), snapshot(trained))
    assert fresh[1].num_batches_tracked == 1


def test_exits_that_share_a_head_come_back(tmp_path):
    def build() -> MultiExitNetwork:
        head = nn.Linear(4, 3)
        return MultiExitNetwork([nn.Linear(4, 4), nn.Linear(4, 4)], [head, head])

    trained, fresh = build(), build()
    save_weights(trained, tmp_path / "w.safetensors")
    load_weights(fresh, tmp_path / "w.safetensors")
    assert same(snapshot(fresh), snapshot(trained))


def cut_in_half(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def overwrite(path):
    path.write_bytes(b"not a safetensors file")


@pytest.mark.parametrize("damage", [cut_in_half, overwrite, lambda path: path.unlink()])
def test_unreadable_file_is_refused_and_changes_nothing(saved, damage):
    damage(saved)
    other = another_network()
    before = snapshot(other)
    with pytest.raises(ArtifactError, match=str(saved)):
        load_weights(other, saved)
    assert same(snapshot(other), before)


@pytest.mark.parametrize(
    ("options", "first"),
    [
        # Seven classes instead of four: weight and bias of three heads.
        ({"widths": (5, 8, 7), "num_classes": 7}, "6 tensors differ, first 'exits.0.bias'"),
        # Another layer: its stage and head are missing from the file.
        ({"widths": (5, 8, 7, 7), "num_classes": 4}, "4 tensors differ, first 'exits.3.bias'"),
    ],
)
def test_weights_of_another_architecture_are_refused_and_change_nothing(saved, options, first):
    other = mlp(in_features=6, **options)
    before = snapshot(other)
    with pytest.raises(ArtifactError, match=first):
        load_weights(other, saved)
    assert same(snapshot(other), before)


def test_full_disk_keeps_the_old_file_and_leaves_nothing_behind(
    network, saved, tmp_path, monkeypatch
):
    def fail(tensors, path):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    before = saved.read_bytes()
    monkeypatch.setattr("offramp.model.checkpoint.save_file", fail)
    with pytest.raises(ArtifactError, match="No space left"):
        save_weights(network, saved)
    assert saved.read_bytes() == before
    assert list(tmp_path.iterdir()) == [saved]
