"""Collective operations found in programs for 8 devices."""

import functools

import jax
from jax import lax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
import pytest

from mdm_jax.runtime import sharding
from mdm_jax.tools import hlo


def compiled(function):
  """Text of `function` on 8 parts of float32 [64, 16], 512 bytes each."""
  mesh = sharding.make_mesh({'data': 8, 'fsdp': 1, 'spatial': 1})
  part = jax.shard_map(
    function,
    mesh=mesh,
    in_specs=P('data'),
    out_specs=P('data'),
    check_vma=False,
  )
  x = jax.ShapeDtypeStruct((64, 16), jnp.float32)
  return jax.jit(part).lower(x).compile().as_text()


@pytest.mark.parametrize(
  'function, expected',
  [
    (lambda x: lax.psum(x, 'data'), {'all-reduce': 512}),
    (lambda x: lax.all_gather(x, 'data'), {'all-gather': 8 * 512}),
    # What is reduced, not the part that is kept of it.
    (
      lambda x: lax.psum_scatter(x, 'data', tiled=True),
      {'reduce-scatter': 512},
    ),
    (lambda x: lax.all_to_all(x, 'data', 0, 0), {'all-to-all': 512}),
    (lambda x: lax.ppermute(x, 'data', [(0, 1)]), {'collective-permute': 512}),
    (lambda x: x + 1, {}),
  ],
)
def test_kinds(function, expected):
  assert hlo.collective_bytes(compiled(function)) == expected


def test_a_loop_counts_as_often_as_it_turns():
  def function(x):
    def body(_, x):
      return lax.psum(x, 'data') * 0.1 + lax.ppermute(x, 'data', [(0, 1)])

    return lax.fori_loop(0, 3, body, x)

  text = compiled(function)
  assert hlo.collective_bytes(text, turns=5) == {
    'all-reduce': 3 * 512,
    'collective-permute': 3 * 512,
  }
  # A TPU's compiler does not always say it.
  assert 'known_trip_count' in text
  assert hlo.collective_bytes(
    text.replace('known_trip_count', 'unknown'), turns=5
  ) == {'all-reduce': 5 * 512, 'collective-permute': 5 * 512}


def test_what_a_tpu_starts_and_awaits():
  # As its compiler writes it: operands, results and two flags; and what it
  # fuses.
  shape = 'bf16[16,8]{1,0:T(8,128)(2,1)}'
  text = f"""HloModule jit_f

%fused (p: bf16[16,8]) -> bf16[16,8] {{
  %p = {shape} parameter(0)
  ROOT %all-reduce.1 = {shape} all-reduce(%p), to_apply=%add
}}

ENTRY %main (x: bf16[2,8]) -> bf16[16,8] {{
  %x = bf16[2,8]{{1,0}} parameter(0)
  %s = (bf16[2,8]{{1,0}}, {shape}) all-gather-start(%x), dimensions={{0}}
  %d = {shape} all-gather-done(%s)
  %c = ({shape}, {shape}, u32[], u32[]{{:S(2)}}) collective-permute-start(%d)
  %e = {shape} collective-permute-done(%c)
  ROOT %f = {shape} fusion(%e), kind=kCustom, calls=%fused
}}
"""
  assert hlo.collective_bytes(text) == {
    'all-gather': 256,
    'collective-permute': 256,
    'all-reduce': 256,
  }


def test_what_a_gpus_kernels_move():
  # As its compiler writes it: a fusion is one kernel, whatever it computes, and
  # a library's workspace is no traffic.
  text = """HloModule jit_f

%fused (p: f32[8,4]) -> f32[8,4] {
  %p = f32[8,4]{1,0} parameter(0)
  %q = f32[8,4]{1,0} negate(%p)
  ROOT %r = f32[8,4]{1,0} exponential(%q)
}

%body (t: (s32[], f32[8,4])) -> (s32[], f32[8,4]) {
  %t = (s32[], f32[8,4]{1,0}) parameter(0)
  %u = f32[8,4]{1,0} get-tuple-element(%t), index=1
  %v = f32[8,4]{1,0} copy(%u)
  ROOT %w = (s32[], f32[8,4]{1,0}) tuple(%v)
}

ENTRY %main (x: f32[8,4], y: bf16[4,2]) -> f32[8,2] {
  %x = f32[8,4]{1,0} parameter(0)
  %y = bf16[4,2]{1,0} parameter(1)
  %f = f32[8,4]{1,0} fusion(%x), kind=kLoop, calls=%fused
  %l = (s32[], f32[8,4]{1,0}) while(%f), condition=%c, body=%body
  %g = (f32[8,2]{1,0}, s8[99]{0}) custom-call(%f, %y), custom_call_target="gemm"
  ROOT %h = f32[8,2]{1,0} get-tuple-element(%g), index=0
}
"""
  assert hlo.moved_bytes(text, turns=5) == {
    'fusion': 2 * 128,
    'copy': 5 * 2 * 128,
    'gemm': 64 + 128 + 16,
  }


def test_gradients_of_sharded_parameters():
  # Two parameters of [64, 64] float32 gathered, once a pass or once in all,
  # and their gradients reduced.
  mesh = sharding.make_mesh({'data': 1, 'fsdp': 8, 'spatial': 1})
  place = functools.partial(jax.NamedSharding, mesh)
  w = jax.ShapeDtypeStruct(
    (64, 64), jnp.float32, sharding=place(P(None, 'fsdp'))
  )
  x = jax.ShapeDtypeStruct((2048, 64), jnp.float32, sharding=place(P('fsdp')))

  def loss(w, x):
    return (jnp.tanh(x @ w) ** 2).sum()

  text = (
    jax.jit(jax.grad(loss), out_shardings=w.sharding)
    .lower(w, x)
    .compile()
    .as_text()
  )
  found = hlo.collective_bytes(text)
  assert found['all-gather'] == 64 * 64 * 4
  assert (
    found.get('reduce-scatter', 0) + found.get('all-reduce', 0) == 64 * 64 * 4
  )
