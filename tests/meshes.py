"""Losses and gradients on several simulated devices against one."""

from collections.abc import Callable
import math

import jax
import numpy as np

from mdm_jax.runtime import sharding


def make_mesh(*sizes: int) -> jax.sharding.Mesh:
  """A mesh of so many devices along data, fsdp and spatial."""
  devices = jax.devices()[: math.prod(sizes)]
  return sharding.make_mesh(dict(zip(sharding.AXES, sizes)), devices)


def measure(losses_of: Callable, params, batch, rules, mesh):
  """Losses [B] and the gradients of their mean, on the host.

  Args:
    losses_of: (params, batch) -> losses [B].
    params: on the host.
    batch: on the host.
    rules: `sharding_rules` of the config.
    mesh: the devices.
  """

  def loss(params, batch):
    losses = losses_of(sharding.gather_kernels(params, mesh), batch)
    return losses.mean(), losses

  shardings = sharding.tree_shardings(params, mesh, rules)
  grads, losses = jax.jit(jax.grad(loss, has_aux=True))(
    sharding.place(params, shardings), sharding.shard_batch(batch, mesh)
  )
  return jax.device_get((losses, grads))


def check_equal(found, expected) -> None:
  """Compares what `measure` has returned."""
  losses, grads = expected
  assert np.ptp(losses) > 0.1
  np.testing.assert_allclose(found[0], losses, rtol=1e-5)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(
      a, b, rtol=1e-3, atol=1e-4 * np.abs(b).max()
    ),
    found[1],
    grads,
  )


def check_all_axes(losses_of: Callable, params, batch, rules) -> None:
  """Compares two devices along each axis with one; arguments of `measure`."""
  expected, found = (
    measure(losses_of, params, batch, rules, make_mesh(*sizes))
    for sizes in ((1, 1, 1), (2, 2, 2))
  )
  check_equal(found, expected)
