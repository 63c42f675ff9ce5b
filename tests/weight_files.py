"""Files of weights as other programs and this one write them, small or untrained."""

import dataclasses
from pathlib import Path

import torch
import torchvision

import config
import encoders
import model
from run import checkpoints

IMAGES = torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def features(encoder: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return encoder.double().eval()(IMAGES.double())


def look_trained(network: torch.nn.Module) -> torch.nn.Module:
    """Change running statistics and affine parameters, so that no mix-up of them goes unseen."""
    random = torch.Generator().manual_seed(1)
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            parameters = module.weight.data, module.bias.data
            for value in (module.running_mean, module.running_var, *parameters):
                value.add_(0.2 * torch.rand(value.shape, generator=random))
    return network.eval()


def published(version: int, arch: str) -> tuple[dict, torch.nn.Module]:
    """A file as the reference's moco_v1_200ep or moco_v2_200ep, and its encoder without head.

    The names are those that its documentation gives; torchvision alone makes the networks.
    """
    state, networks = {}, {}
    for name in ("encoder_q", "encoder_k"):
        network = look_trained(torchvision.models.get_model(arch, weights=None, num_classes=128))
        if version == 2:
            width = network.fc.in_features
            hidden = torch.nn.Linear(width, width)
            network.fc = torch.nn.Sequential(hidden, torch.nn.ReLU(), network.fc)
        state |= {f"module.{name}.{key}": value for key, value in network.state_dict().items()}
        networks[name] = network
    state |= {"module.queue": torch.randn(128, 256), "module.queue_ptr": torch.zeros(1).long()}
    optimizer = {"state": {}, "param_groups": []}
    content = {"epoch": 200, "arch": arch, "state_dict": state, "optimizer": optimizer}
    return content, encoders.remove_head(networks["encoder_q"])


def small_state(**changes) -> dict[str, torch.Tensor]:
    """The state_dict of a small MoCo, under the names of a checkpoint."""
    moco = model.MoCo(**{"encoder": "resnet18", "feature_dim": 8, "num_keys": 16, **changes})
    return {f"module.{name}": value for name, value in moco.state_dict().items()}


def our_checkpoint(path: Path, arch: str = "resnet18") -> torch.nn.Module:
    """Write a checkpoint as train.py does, and return its encoder without head."""
    values = {"arch": arch, "feature_dim": 8, "num_keys": 16, "crop": 64}
    settings = config.from_values(config.TrainSettings, values)
    moco = model.MoCo(arch, feature_dim=8, num_keys=16)
    look_trained(moco.encoder_q)
    content = {
        "epoch": 1,
        "step": 10,
        "arch": arch,
        "state_dict": {f"module.{name}": value for name, value in moco.state_dict().items()},
        "config": dataclasses.asdict(settings),
    }
    checkpoints.save(path, content)
    return encoders.remove_head(moco.encoder_q)
