"""Weights of I3D; `test_feature_extractors` checks its logits."""

import numpy as np
import pytest

from mdm_jax.eval import i3d


def test_other_networks_are_refused(i3d_weights):
  i3d.from_state_dict(i3d_weights)
  weights = dict(i3d_weights)
  del weights['Mixed_5c.b3b.bn.weight']
  weights['logits.conv3d.bias'] = np.zeros(600)
  with pytest.raises(ValueError) as error:
    i3d.from_state_dict(weights)
  assert str(error.value) == (
    'These are weights of another network: logits.conv3d.bias is (600,), not '
    '(400,); Mixed_5c.b3b.bn.weight is missing: give rgb_imagenet.pt, also '
    'known as i3d_pretrained_400.pt.'
  )
