"""Training: data, losses, tasks, recipes, the run folder."""

from offramp.model.torchvision_ops import define_missing_ops

define_missing_ops()  # Lightning's metrics import torchvision where there is one
