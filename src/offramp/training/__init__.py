"""Training: fit, its settings, losses and tasks."""

from offramp.model.torchvision_ops import define_missing_ops

define_missing_ops()  # Lightning's metrics import torchvision where there is one
