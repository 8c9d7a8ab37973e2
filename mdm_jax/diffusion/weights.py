"""Weights of the noising steps in the loss."""

import numpy as np

from mdm_jax.diffusion.schedule import Schedule


def vdm_weights(gammas: np.ndarray) -> np.ndarray:
  """Weights of the eps loss in the variational lower bound.

  `SNR[t - 1] / SNR[t] - 1` (Kingma et al., arXiv 2107.00630, section 4). The
  first two entries would be undefined and infinite; they repeat the third.

  Args:
    gammas: float32 [T + 1].

  Returns:
    float32 [T + 1], indexed like `gammas`.
  """
  signal = np.asarray(gammas, np.float64)
  before, after = signal[1:-1], signal[2:]
  weights = before * (1 - after) / ((1 - before) * after) - 1
  return np.concatenate([weights[:1], weights[:1], weights]).astype(np.float32)


def level_weights(
  name: str,
  schedule: Schedule,
  loss_space: str,
  *,
  min_snr_gamma: float,
  sigmoid_bias: float,
  p2: tuple[float, float],
) -> np.ndarray:
  """Weights of each level's loss, by its own signal-to-noise ratio (SNR).

  A weight belongs to an error that is measured in one space. It is converted,
  so that the product is the same whichever space the loss is measured in.

  Args:
    name: one of
      'min_snr': min(SNR, gamma) on the error of x0, so min(SNR, gamma) / SNR
        on that of eps (Hang et al., arXiv 2303.09556, section 3.4);
      'sigmoid': sigmoid(bias - logSNR) times the weights of the variational
        bound, SNR[t - 1] / SNR[t] - 1, which is about the change of logSNR, on
        the error of eps (Kingma & Gao, arXiv 2303.00848; Hoogeboom et al.,
        arXiv 2410.19324);
      'p2': 1 / (k + SNR)^gamma on the error of eps (Choi et al., arXiv
        2204.00227, eq. 8).
    schedule: the noise of each level.
    loss_space: where the error is measured: 'v', 'eps', 'x0' or 'velocity'.
    min_snr_gamma: gamma of 'min_snr'; inf for an equal weight of eps.
    sigmoid_bias: bias of 'sigmoid' in nats; inf for the variational bound.
    p2: (gamma, k) of 'p2'.

  Returns:
    float32 [levels, T + 1], indexed like the schedule. Entry 0, the clean
    image, repeats entry 1.

  Raises:
    ValueError: if there is no such weighting.
  """
  steps = np.arange(1, schedule.num_steps + 1)
  log_snr = schedule.log_snr(steps)
  snr = np.exp(log_snr)
  match name:  # On the error of eps.
    case 'min_snr':
      weights = np.minimum(snr, min_snr_gamma) / snr
    case 'sigmoid':
      # All levels' SNRs are multiples of each other.
      bound = vdm_weights(schedule.gammas[0])[1:].astype(np.float64)
      weights = bound / (1 + np.exp(log_snr - sigmoid_bias))
    case 'p2':
      gamma, k = p2
      weights = (k + snr) ** -gamma
    case _:
      raise ValueError(f'Unknown weights {name!r}: use min_snr, sigmoid or p2.')
  weights = weights * snr / _error_ratio(loss_space, snr)
  with np.errstate(over='ignore'):  # What is beyond float32 is inf.
    return np.concatenate([weights[:, :1], weights], axis=1).astype(np.float32)


def _error_ratio(loss_space: str, snr: np.ndarray) -> np.ndarray:
  """How many times the squared error of x0 that of a loss space is."""
  match loss_space:
    case 'eps':
      return snr
    case 'v':  # Of a variance-preserving path.
      return snr + 1
    case 'velocity':
      return (np.sqrt(snr) + 1) ** 2
    case 'x0':
      return np.ones_like(snr)
  raise ValueError(
    f'Unknown loss space {loss_space!r}: use v, eps, x0 or velocity.'
  )
