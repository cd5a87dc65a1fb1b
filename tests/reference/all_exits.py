"""Early exit as the tutorial does it, written out without Offramp's policies or runners."""

import math
from dataclasses import dataclass

import torch


@dataclass
class Chosen:
    """What the loop chose for each sample, and how near any exit before came to its threshold."""

    exits: list[int]
    predictions: list[int]
    distances: list[float]


@torch.no_grad()
def choose_afterwards(network, inputs, thresholds_nats) -> Chosen:
    """Run every stage and every head on the whole batch, then choose sample by sample.

    A sample takes the first exit whose entropy, from log-softmax, is at most its threshold in
    nats, else the final exit. Distances are in units of confidence: entropy over log C.
    """
    features, predictions, entropies = inputs, [], []
    for stage, head in zip(network.stages, network.exits, strict=True):
        features = stage(features)
        log_p = torch.log_softmax(head(features), dim=1)
        predictions.append(log_p.argmax(1).tolist())
        entropies.append((-(log_p.exp() * log_p).sum(1)).tolist())
    log_classes = math.log(log_p.shape[1])
    chosen = Chosen([], [], [])
    for n in range(len(inputs)):
        exit_index = 0
        while exit_index < len(thresholds_nats):
            if entropies[exit_index][n] <= thresholds_nats[exit_index]:
                break
            exit_index += 1
        gaps = (abs(entropies[k][n] - t) / log_classes for k, t in enumerate(thresholds_nats))
        chosen.exits.append(exit_index)
        chosen.predictions.append(predictions[exit_index][n])
        chosen.distances.append(min(gaps))
    return chosen
