import torch

from offramp import DensePolicy
from offramp.drawing.exit_maps import exit_maps


def test_pixels_are_drawn_as_sure_as_the_policy_finds_them():
    policy = DensePolicy((0.5,), pixel_threshold=0.8, temperatures=(0.3, 2.0))
    outputs = [torch.randn(1, 3, 6, 8), torch.randn(1, 3, 6, 8)]
    confidences_K = torch.cat([policy.step(k, output, ())[1] for k, output in enumerate(outputs)])
    maps = exit_maps(policy, outputs, confidences_K, taken=0)
    assert [each.is_taken for each in maps] == [True, False]
    for each in maps:
        sure = each.logits_Chw.softmax(0).amax(0) >= policy.pixel_threshold
        assert each.confidence == sure.float().mean()
    assert 0 < maps[0].confidence < 1
